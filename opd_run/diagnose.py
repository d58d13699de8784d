"""What tells that a run fails: health metrics, and rollouts token by token for the report.

Every key is masked, has one name in all methods, and is defined with its formula in
docs/metrics.md. Nothing here feeds back into training. Functions of the method file that are needed
are handed over by name: `read_tokens`, `loss_law`, `teacher_of`, `score`, `token_loss`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import opd_ops
from opd_run import ranks, retry, rollouts, served_teacher

SUPPORT_SIZE = 5  # of the tokens of `tokens.jsonl`
NUM_TRAINED, NUM_TESTED = 2, 8  # rollouts of a training step, and of an evaluation
END = 1000  # characters of a completion in `evaluations.jsonl`


def percentile(values: Tensor, share: float) -> float:
    """The `share` quantile (nearest rank, no interpolation); NaN when empty."""
    if values.numel() == 0:
        return math.nan
    rank = min(values.numel() - 1, max(0, math.ceil(share * values.numel()) - 1))
    return float(values.flatten().float().sort().values[rank])


def repeated_share(ids: list[int], order: int = 4) -> float:
    """Share of the `order`-grams of one completion that stood in it before (0 if too short)."""
    grams = [tuple(ids[i : i + order]) for i in range(len(ids) - order + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def rollout_metrics(rollout: Any) -> dict[str, float]:
    """Lengths, endings, repetition and verdicts of a batch of rollouts."""
    lengths = rollout.completion_mask.sum(1)
    num_rollouts = max(len(lengths), 1)
    completions = [
        row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask)
    ]
    verified = rollout.verdict != 0
    return {
        "num_rollouts": float(len(lengths)),
        "num_trained_tokens": float(rollout.trained_mask.sum()),
        "num_untrained_tokens": float((rollout.completion_mask & ~rollout.trained_mask).sum()),
        "length_mean": float(lengths.float().mean()),
        "length_p95": percentile(lengths, 0.95),
        "eos_rate": float(rollout.ended.float().mean()),
        "truncated_share": 1.0 - float(rollout.ended.float().mean()),
        "repetition_share": sum(map(repeated_share, completions)) / num_rollouts,
        "verifier_pass_rate": float((rollout.verdict[verified] > 0).float().mean())
        if verified.any()
        else math.nan,
        "unverified_share": 1.0 - float(verified.float().mean()),
        **{
            f"{name}_share": float(rollout.extra[name].mean())
            for name in ("cut_but_right",)
            if name in rollout.extra
        },
        "truncation_mean": _mean(
            (rollout.behaviour_logp - rollout.rollout_logp)[rollout.completion_mask]
        ),
    }


def token_metrics(
    tokens: dict[str, Tensor], must_be_finite: Sequence[str] = ("log_ratio", "policy_log_ratio")
) -> dict[str, float]:
    """Means over trained tokens of what `token_loss` reports; quantiles of the log-ratio.

    `decile` and `end`, from `places`, split the mean of the log-ratio. What does not apply to a
    token is NaN there, and no part of its mean; in what `must_be_finite` it is an error, and stays.
    """
    decile, end = tokens.pop("decile", None), tokens.pop("end", None)
    metrics = {
        f"{name}_mean": _mean(values if name in must_be_finite else values[~values.isnan()])
        for name, values in tokens.items()
    }
    if "log_ratio" in tokens:
        for tenth in range(10) if decile is not None else ():
            metrics[f"log_ratio_decile_{tenth}"] = _mean(tokens["log_ratio"][decile == tenth])
        if end is not None:
            metrics["eos_log_ratio_mean"] = _mean(tokens["log_ratio"][end])
        metrics["log_ratio_p1"] = percentile(tokens["log_ratio"], 0.01)
        metrics["log_ratio_p99"] = percentile(tokens["log_ratio"], 0.99)
    if "advantage" in tokens:
        metrics["advantage_positive_share"] = _mean((tokens["advantage"] > 0).float())
        metrics["advantage_negative_share"] = _mean((tokens["advantage"] < 0).float())
    return metrics


def pass_metrics(verdicts: Tensor, prompts: Sequence[Any]) -> dict[str, float]:
    """avg@n (share of samples that are right) and pass@k for k = 1, 2, 4, ..., n; also by domain.

    pass@k = mean over prompts of 1 - C(n - c, k) / C(n, k) with c right of n verified samples
    (arXiv:2107.03374, Eq. 1); unverified samples leave c and n, prompts with n < k leave the mean.

    Args:
        verdicts: [prompts, samples], -1, 0, +1.  prompts: with attribute `domain`.
    """
    domains = [prompt.domain for prompt in prompts]
    metrics = {}
    for domain in ["", *sorted(set(domains))] if len(set(domains)) > 1 else [""]:
        chosen = verdicts[[domain in ("", each) for each in domains]]
        right, verified = (chosen > 0).sum(1).tolist(), (chosen != 0).sum(1).tolist()
        tail = f"/{domain}" if domain else ""
        metrics[f"avg@{verdicts.shape[1]}{tail}"] = (
            sum(right) / sum(verified) if sum(verified) else math.nan
        )
        k = 1
        while k <= verdicts.shape[1]:
            shares = [
                1.0 - math.comb(n - c, k) / math.comb(n, k)
                for c, n in zip(right, verified)
                if n >= k
            ]
            metrics[f"pass@{k}{tail}"] = sum(shares) / len(shares) if shares else math.nan
            k *= 2
    return metrics


def thin(rollout: Any, num_tokens: int, seed: Sequence[int]) -> Any:
    """Some of the rollouts (16 at least, if there are), with bits of their masks cleared, so that
    at most `num_tokens`, chosen at random, are trained: for metrics too dear to have on all."""
    generator = np.random.default_rng(seed)
    lengths = rollout.trained_mask.sum(1).cpu().numpy()
    order = generator.permutation(len(lengths))
    enough = int(np.searchsorted(lengths[order].cumsum(), num_tokens)) + 1
    part = rollouts.select(rollout, torch.from_numpy(order[: max(enough, 16)]))
    places = part.trained_mask.nonzero()
    drop = places[torch.from_numpy(generator.permutation(len(places))[num_tokens:])]
    part.response_mask[drop[:, 0], drop[:, 1]] = False
    part.prefix_mask[drop[:, 0], drop[:, 1]] = False
    return part


def samples(rollout: Any, tokenizer: Any, num: int = 4) -> list[dict[str, Any]]:
    """The first `num` rollouts as rows of `samples.jsonl`."""
    rows = []
    for row, prompt in enumerate(rollout.prompts[:num]):
        ids = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
        read = {f"{role}_prompt": tokenizer.decode(ids) for role, ids in prompt.views.items()}
        rows.append(
            read
            | {
                "prompt": prompt.text,
                "answer": json.loads(json.dumps(prompt.answer, default=str)),
                "domain": prompt.domain,
                "completion": tokenizer.decode(ids),
                "verdict": float(rollout.verdict[row]),
                "ended": bool(rollout.ended[row]),
                "source": ("student", "teacher")[int(rollout.source[row])],
                "num_tokens": len(ids),
            }
        )
    return rows


def of_prompts(rollout: Any, tokenizer: Any, num: int) -> list[dict[str, Any]]:
    """Rows of `evaluations.jsonl`: each prompt, of which `num` rollouts follow each other, with
    their verdicts and lengths, and the end of what the first of them says."""
    lengths = rollout.completion_mask.sum(1).view(-1, num).tolist()
    verdicts = rollout.verdict.view(-1, num).int().tolist()
    first = rollouts.select(rollout, torch.arange(0, len(rollout.prompts), num))
    return [
        {key: said[key] for key in ("prompt", "answer", "domain")}
        | {"row": row, "verdicts": verdicts[row], "lengths": lengths[row]}
        | {"completion_end": said["completion"][-END:]}
        for row, said in enumerate(samples(first, tokenizer, len(lengths)))
    ]


def whole_teachers(models: dict[str, Any]) -> bool:
    """Whether there are teachers to compare with: a server does not tell whole rows, and some
    methods have no teacher."""
    some = any(name.partition("/")[0] == "teacher" for name in models)
    return some and not served_teacher.remote(models.values())


@torch.no_grad()
def exact_divergences(
    models: dict[str, Any],
    micro_batches: Iterable[Any],
    args: argparse.Namespace,
    *,
    read_tokens: Callable[..., Any],
    loss_law: Callable[..., dict[str, Any]],
    teacher_of: Callable[..., str],
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Means of `divergences` between student and teacher over the trained tokens of rollouts.

    With them what `token_metrics` makes of the sampled tokens, for methods whose loss does not say:
    the advantage is then -log_ratio. `names` are the metrics that are wanted, all if empty.
    """
    if not whole_teachers(models):
        return {}
    mine, tokens, student = [], [], models["student"]
    for micro in micro_batches:
        teachers = [teacher_of(prompt, args) for prompt in micro.prompts]
        for teacher, _, part in rollouts.by_teacher(models, micro, teachers):
            mask = part.trained_mask
            student_hidden, teacher_hidden = (
                read_tokens(each, part, lambda hidden, head: hidden)[mask]  # [N, D]
                for each in (student, teacher)
            )
            found = divergences(
                student_hidden,
                teacher_hidden,
                student.head,
                teacher.head_on(teacher_hidden.device),
                **loss_law(student, args),
                names=names,
                token_ids=None if names else part.completion_ids[mask],
            )
            if not names:
                student_logp, log_ratio = found.pop("student_logp"), found.pop("log_ratio")
                own = part.response_mask & (part.source == 0)[:, None]  # what the student sampled
                drift = (student_logp - part.behaviour_logp[mask]) * own[mask]
                of_token = {"log_ratio": log_ratio, "advantage": -log_ratio}
                of_token["policy_log_ratio"] = drift
                where = places(part, part.completion_mask)
                tokens.append(of_token | {name: value[mask] for name, value in where.items()})
            mine.append(found)
    metrics = {key: _mean(values) for key, values in _gathered(mine).items()}
    return metrics | token_metrics(_gathered(tokens))


def of_step(
    models: dict[str, Any],
    rollout: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    seed: Sequence[int],
    *,
    score: Callable[..., Any],
    token_loss: Callable[..., Any],
    **functions: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`exact_divergences` at `--diagnostic-tokens` tokens that `seed` chooses, and `traces`."""
    few = thin(rollout, args.diagnostic_tokens, seed)
    metrics = exact_divergences(models, retry.micro_batches(few, args), args, **functions)
    if any("teacher" in prompt.views for prompt in few.prompts):
        pieces = retry.micro_batches(few, args)
        metrics |= right_minus_wrong(models, pieces, args, **functions)
    functions |= {"score": score, "token_loss": token_loss}
    return metrics, traces(models, rollout, tokenizer, args, **functions)


def of_evaluation(
    models: dict[str, Any],
    name: str,
    rollout: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    **functions: Any,
) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
    """Metrics of `--eval-samples` rollouts of each test prompt, and rows by log file.

    Of the student also, on the first sample of each prompt, the reverse KL and `traces`.
    """
    num = args.eval_samples
    metrics = rollout_metrics(rollout)
    metrics |= pass_metrics(rollout.verdict.view(-1, num), rollout.prompts[::num])
    logs = {"evaluations.jsonl": of_prompts(rollout, tokenizer, num)}
    if name == "student":
        first = rollouts.select(rollout, torch.arange(0, len(rollout.prompts), num))
        pieces = retry.micro_batches(first, args)
        metrics |= exact_divergences(models, pieces, args, names=["reverse_kl"], **functions)
        logs["tokens.jsonl"] = traces(models, first, tokenizer, args, **functions)
    return metrics, logs


@torch.no_grad()
def right_minus_wrong(
    models: dict[str, Any],
    micro_batches: Iterable[Any],
    args: argparse.Namespace,
    *,
    read_tokens: Callable[..., Any],
    loss_law: Callable[..., dict[str, Any]],
    teacher_of: Callable[..., str],
) -> dict[str, float]:
    """Mean of log teacher - log student over tokens of right rollouts, less that of wrong ones.

    With the teacher's own prompt, and with the student's: what the other prompt does to the signal.
    NaN where all are right, or none is.
    """
    if served_teacher.remote(models.values()):
        return {}  # a second request for every rollout
    mine, law = [], loss_law(models["student"], args)
    for micro in micro_batches:
        names = [teacher_of(prompt, args) for prompt in micro.prompts]
        for teacher, _, part in rollouts.by_teacher(models, micro, names):
            mask = part.trained_mask
            ids = part.completion_ids[mask]
            untold = replace(part, prompts=[replace(each, views={}) for each in part.prompts])

            def logp(hidden: Tensor, head: Tensor | None, ids: Tensor = ids) -> Tensor:
                return opd_ops.token_logp(hidden, head, ids.to(hidden.device), **law).logp

            asked = ((models["student"], part), (teacher, part), (teacher, untold))
            student_logp, *scored = (read_tokens(model, of, logp)[mask] for model, of in asked)
            told, without = (teacher_logp - student_logp for teacher_logp in scored)
            verdict = part.verdict[:, None].expand(mask.shape)[mask]
            mine.append({"told": told, "without": without, "verdict": verdict})
    found = _gathered(mine)
    right, wrong = found["verdict"] > 0, found["verdict"] < 0
    told, without = (
        _mean(found[name][right]) - _mean(found[name][wrong]) for name in ("told", "without")
    )
    return {"right_minus_wrong": told, "right_minus_wrong_without_prompt": without}


def _gathered(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of all ranks, put together by name."""
    every = ranks.gather([{key: part[key].cpu() for key in part} for part in parts])
    flat = [part for of_rank in every for part in of_rank]
    return {key: torch.cat([part[key] for part in flat]) for key in (flat or [{}])[0]}


def divergences(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor | None,
    teacher_head: Tensor | None,
    valid_vocab: int,
    temperature: float,
    support_size: int = 32,
    names: Sequence[str] = (),
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Exact divergences, entropies and masses at N tokens: tensors [N].

    With `token_ids` [N] also `student_logp` and `log_ratio` of these tokens. From hidden states
    (from logits where the head is None), a few full rows at a time.
    """
    device, k = student_hidden.device, min(support_size, valid_vocab)
    heads = [
        None if head is None else head.detach()[:valid_vocab].to(device).float().T
        for head in (student_head, teacher_head)
    ]
    both = student_hidden.detach(), teacher_hidden.detach().to(device)
    chunk = max(16, 2**24 // valid_vocab)  # 64 MiB of float32 logits
    found: dict[str, list[Tensor]] = {}
    for start in range(0, max(len(student_hidden), 1), chunk):
        logits = [
            (each[start : start + chunk].float() if head is None else
             each[start : start + chunk].float() @ head)[:, :valid_vocab]
            for each, head in zip(both, heads)
        ]  # fmt: skip
        student, teacher = (torch.log_softmax(each / temperature, -1) for each in logits)
        pair = (student, None, teacher, None)  # logits
        part = {"reverse_kl": opd_ops.full_kl(*pair, divergence="reverse").values}
        if not names or set(names) - {"reverse_kl"}:
            support, own = teacher.topk(k, -1).indices, student.topk(k, -1).indices
            part |= {
                "forward_kl": opd_ops.full_kl(*pair, divergence="forward").values,
                "student_entropy": _entropy(student),
                "teacher_entropy": _entropy(teacher),
                "teacher_mass": teacher.gather(1, support).exp().sum(1),
                "student_mass": student.gather(1, support).exp().sum(1),
                "overlap": (support[:, :, None] == own[:, None, :]).any(-1).float().mean(1),
            }
        if token_ids is not None:
            ids = token_ids[start : start + chunk, None].to(device)
            logp, teacher_logp = student.gather(1, ids)[:, 0], teacher.gather(1, ids)[:, 0]
            part |= {"student_logp": logp, "log_ratio": logp - teacher_logp}
        for name, values in part.items():
            found.setdefault(name, []).append(values.float())
    return {name: torch.cat(parts) for name, parts in found.items() if not names or name in names}


def position_decile(mask: Tensor) -> Tensor:
    """Which tenth of its completion's trained tokens a token stands in: [B, T] int64, 0 to 9."""
    return (mask.cumsum(1) - 1).clamp(min=0) * 10 // mask.sum(1, keepdim=True).clamp(min=1)


def places(rollout: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
    """`decile` of each token among those of `mask` (trained ones), and where the EOS is: [B, T]."""
    written = rollout.completion_mask
    last = written & (written.cumsum(1) == written.sum(1, keepdim=True))
    decile = position_decile(rollout.trained_mask if mask is None else mask)
    return {"decile": decile, "end": last & rollout.ended[:, None]}


def num_not_finite(tokens: dict[str, Tensor], names: Sequence[str]) -> int:
    """How many values of the metrics `names`, where they are there, are not finite."""
    found = [tokens[name] for name in names if name in tokens]
    return sum(int((~values.isfinite()).sum()) for values in found)


def offending(
    student: torch.nn.Module,
    batch: Iterable[tuple[Any, dict[str, Any]]],
    tokenizer: Any,
    args: argparse.Namespace,
    token_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    must_be_finite: Sequence[str],
) -> list[dict[str, Any]]:
    """Rows of `offending.jsonl`: every rollout of a batch that failed, those that fail alone first.

    Each goes through the method's `token_loss` and its backward pass by itself. A failure that no
    rollout shows alone (an overflow of their sum) leaves all of them with `offending` false.
    """
    rows = []
    for rollout, scores in (one for pair in batch for one in rollouts.cut(*pair, 1)):
        if ranks.world() > 1 and not rollout.trained_mask.any():
            continue  # it was there to keep step only
        if ranks.sharded(student):  # ranks would not keep step: all are written, none is judged
            rows.append({"offending": False} | samples(rollout, tokenizer, 1)[0])
            continue
        student.zero_grad()
        loss_sum, logged = token_loss(student, rollout, scores, args)
        loss_sum.backward()  # type: ignore[no-untyped-call]
        grads = [weight.grad for weight in student.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        trained = rollout.trained_mask
        of_token = {name: values[trained] for name, values in logged.items()}
        bad = num_not_finite(of_token, must_be_finite)
        value = float(loss_sum.detach())
        finite = math.isfinite(value) and math.isfinite(norm) and not bad
        found = {
            "offending": not finite,
            "loss": str(value),
            "grad_norm": str(norm),
            "num_bad_log_ratios": bad,
        }
        rows.append(found | samples(rollout, tokenizer, 1)[0])
    student.zero_grad()
    rows = [row for of_rank in ranks.gather(rows) for row in of_rank]
    return sorted(rows, key=lambda row: not row["offending"])


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def _mean(values: Tensor) -> float:
    return float(values.float().mean()) if values.numel() else math.nan


@torch.no_grad()
def traces(
    models: dict[str, Any],
    rollout: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    *,
    read_tokens: Callable[..., Any],
    loss_law: Callable[..., dict[str, Any]],
    teacher_of: Callable[..., str],
    score: Callable[..., Any] | None = None,
    token_loss: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `tokens.jsonl`: what both models make of every token, for `tools/report.py`.

    With `score` and `token_loss`, a training step: the first rollout and the last, at most
    `--diagnostic-tokens` tokens of each, with everything that the method logs of a token. Without,
    an evaluation: the same few prompts each time, spread over the test set, whole.
    """
    if not whole_teachers(models):
        return []
    total, training = len(rollout.prompts), token_loss is not None
    wanted = min(total, NUM_TRAINED if training else NUM_TESTED)
    law, found = loss_law(models["student"], args), []
    for place in range(wanted):
        row = place * total // wanted
        if training:  # the last one is another prompt's, and not its first: tropd guides the first
            row = place * (total - 1)
        one = rollouts.select(rollout, torch.tensor([row]))
        logged = {}
        if score is not None and token_loss is not None:
            logged = token_loss(models["student"], one, score(models, one, args), args)[1]
        trained, num_prefix = one.trained_mask[0], int(one.prefix_mask.sum())
        one.response_mask = one.completion_mask.clone()  # all of it is shown, trained or not
        if training:
            one.response_mask &= one.response_mask.cumsum(1) <= args.diagnostic_tokens
        one.prefix_mask = torch.zeros_like(one.prefix_mask)
        shown, names = one.response_mask[0], [teacher_of(one.prompts[0], args)]
        for teacher, scored, part in rollouts.by_teacher(models, one, names):
            (sample,) = samples(part, tokenizer)
            tokens = _tokens(models["student"], teacher, part, tokenizer, read_tokens, law)
            if not scored:
                continue  # the teacher of another domain
            tokens["trained"] = trained[shown].int().tolist()
            tokens["num_prefix_tokens"] = num_prefix
            tokens["logged"] = {
                name: rounded(values[0][shown].float().tolist())
                for name, values in logged.items()
                if name != "log_ratio"  # student_logp - teacher_logp, which are there
            }
            phase = "train" if training else "eval"
            found.append({"phase": phase, "row": row} | sample | tokens)
    return found


def _tokens(
    student: Any,
    teacher: Any,
    one: Any,
    tokenizer: Any,
    read_tokens: Callable[..., Any],
    law: dict[str, Any],
) -> dict[str, Any]:
    """Both log-probs of each of the N tokens of one rollout, and of the teacher's top K there."""
    mask, size = one.response_mask, min(SUPPORT_SIZE, law["valid_vocab"])
    ids = one.completion_ids[mask]

    def read_teacher(hidden: Tensor, head: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of the token [N]; ids and log-probs of the support, [N, K]."""
        token_ids = ids.to(hidden.device)
        top = opd_ops.topk_logp(hidden, head, size, token_ids=token_ids, **law)
        assert top.token_logp is not None
        return top.token_logp, top.ids, top.logp

    scored = read_tokens(teacher, one, read_teacher)
    teacher_logp, support, support_logp = (values[mask] for values in scored)
    every = torch.cat([ids[:, None].to(support.device), support], 1)  # [N, 1 + K]
    student_logp = read_tokens(
        student,
        one,
        lambda hidden, head: opd_ops.gather_logp(hidden, head, every.to(hidden.device), **law).logp,
    )[mask]
    used = sorted(set(every.flatten().tolist()))
    return {
        "ids": ids.tolist(),
        "student_logp": rounded(student_logp[:, 0].tolist()),
        "teacher_logp": rounded(teacher_logp.tolist()),
        "support_ids": support.tolist(),
        "support_student_logp": [rounded(row) for row in student_logp[:, 1:].tolist()],
        "support_teacher_logp": [rounded(row) for row in support_logp.tolist()],
        "pieces": {str(each): piece(tokenizer, each) for each in used},
    }


def piece(tokenizer: Any, token_id: int) -> str:
    """The text of one token; U+FFFD where it holds a part of a character only."""
    text = str(tokenizer.decode([token_id]))
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
        return " " + text  # sentencepiece drops the space of a token that stands alone
    return text


def rounded(values: list[float]) -> list[float | str]:
    """Four decimals; what JSON has no number for as a string, as in `metrics.jsonl`."""
    return [round(each, 4) if math.isfinite(each) else str(each) for each in values]
