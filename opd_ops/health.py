"""Health metrics: what tells that a run fails, masked, under the same names in every method.

Each key is defined with its formula in docs/metrics.md. Nothing here feeds back into training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import opd_ops
from opd_ops import engines, ranks, rollouts
from opd_ops.models import by_teacher


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
        "length_mean": float(lengths.float().mean()),
        "length_p95": percentile(lengths, 0.95),
        "eos_rate": float(rollout.ended.float().mean()),
        "truncated_share": 1.0 - float(rollout.ended.float().mean()),
        "repetition_share": sum(map(repeated_share, completions)) / num_rollouts,
        "verifier_pass_rate": float((rollout.verdict[verified] > 0).float().mean())
        if verified.any()
        else math.nan,
        "unverified_share": 1.0 - float(verified.float().mean()),
        "truncation_mean": _mean(
            (rollout.behaviour_logp - rollout.rollout_logp)[rollout.completion_mask]
        ),
    }


def token_metrics(tokens: dict[str, Tensor]) -> dict[str, float]:
    """Means over trained tokens of what `token_loss` reports; quantiles of the log-ratio.

    `decile` and `end`, from `places`, split the mean of the log-ratio.
    """
    decile, end = tokens.pop("decile", None), tokens.pop("end", None)
    metrics = {f"{name}_mean": _mean(values) for name, values in tokens.items()}
    metrics["num_bad_log_ratios"] = float(num_bad_log_ratios(tokens))
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


def thin(rollout: Any, num_tokens: int, seed: int) -> Any:
    """Some of the rollouts (16 at least, if there are), with bits of their masks cleared, so that
    at most `num_tokens`, chosen at random, are trained: for metrics too dear to have on all."""
    generator = np.random.default_rng([7, seed])
    lengths = rollout.trained_mask.sum(1).cpu().numpy()
    order = generator.permutation(len(lengths))
    enough = int(np.searchsorted(lengths[order].cumsum(), num_tokens)) + 1
    part = rollout.select(torch.from_numpy(order[: max(enough, 16)]))
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
        rows.append(
            {
                "prompt": prompt.text,
                "answer": prompt.answer,
                "domain": prompt.domain,
                "completion": tokenizer.decode(ids),
                "verdict": float(rollout.verdict[row]),
                "ended": bool(rollout.ended[row]),
                "source": ("student", "teacher")[int(rollout.source[row])],
                "num_tokens": len(ids),
            }
        )
    return rows


@torch.no_grad()
def exact_divergences(
    models: dict[str, Any],
    micro_batches: Iterable[Any],
    read_tokens: Callable[..., Tensor],
    law: dict[str, Any],
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Means of `divergences` between student and teacher over the trained tokens of rollouts.

    With them what `token_metrics` makes of the sampled tokens, for methods whose loss does not say:
    the advantage is then -log_ratio. `read_tokens` is the method file's; `law` holds `temperature`
    and `valid_vocab`; `names` are the metrics that are wanted, all if empty.
    """
    if engines.remote(models.values()):
        return {}  # a server does not tell whole rows
    mine, tokens = [], []
    for micro in micro_batches:
        for teacher, _, part in by_teacher(models, micro):
            pair, mask = (models["student"], teacher), part.trained_mask
            student_rows, teacher_rows = (
                read_tokens(each, part, lambda rows, head: rows)[mask]  # [N, D]
                for each in pair
            )
            heads = models["student"].head, teacher.head
            ids = None if names else part.completion_ids[mask]
            found = divergences(
                student_rows, teacher_rows, *heads, **law, names=names, token_ids=ids
            )
            if not names:
                student_logp, log_ratio = found.pop("student_logp"), found.pop("log_ratio")
                own = part.response_mask & (part.source == 0)[:, None]  # what the student sampled
                drift = (student_logp - part.behaviour_logp[mask]) * own[mask]
                each = {"log_ratio": log_ratio, "advantage": -log_ratio, "policy_log_ratio": drift}
                where = places(part, part.completion_mask)
                tokens.append(each | {name: value[mask] for name, value in where.items()})
            mine.append(found)
    metrics = {key: _mean(values) for key, values in _gathered(mine).items()}
    return metrics | token_metrics(_gathered(tokens))


def _gathered(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of all ranks, put together by name."""
    every = ranks.gather([{key: part[key].cpu() for key in part} for part in parts])
    flat = [part for of_rank in every for part in of_rank]
    return {key: torch.cat([part[key] for part in flat]) for key in (flat or [{}])[0]}


def divergences(
    student_rows: Tensor,
    teacher_rows: Tensor,
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
    device, k = student_rows.device, min(support_size, valid_vocab)
    heads = [
        None if head is None else head.detach()[:valid_vocab].to(device).float().T
        for head in (student_head, teacher_head)
    ]
    rows = student_rows.detach(), teacher_rows.detach().to(device)
    chunk = max(16, 2**24 // valid_vocab)  # 64 MiB of float32 logits
    found: dict[str, list[Tensor]] = {}
    for start in range(0, max(len(student_rows), 1), chunk):
        logits = [
            (each[start : start + chunk].float() if head is None else
             each[start : start + chunk].float() @ head)[:, :valid_vocab]
            for each, head in zip(rows, heads)
        ]  # fmt: skip
        student, teacher = (torch.log_softmax(each / temperature, -1) for each in logits)
        part = {"reverse_kl": opd_ops.full_kl(student, teacher, divergence="reverse")}
        if not names or set(names) - {"reverse_kl"}:
            support, own = teacher.topk(k, -1).indices, student.topk(k, -1).indices
            part |= {
                "forward_kl": opd_ops.full_kl(student, teacher, divergence="forward"),
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


def num_bad_log_ratios(tokens: dict[str, Tensor]) -> int:
    """How many of the log-ratios (to the teacher, to the sampler's policy) are not finite."""
    found = [values for name, values in tokens.items() if name.endswith("log_ratio")]
    return sum(int((~values.isfinite()).sum()) for values in found)


def offending(
    student: torch.nn.Module,
    batch: Iterable[tuple[Any, dict[str, Any]]],
    tokenizer: Any,
    token_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    args: argparse.Namespace,
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
        bad = num_bad_log_ratios({name: each[trained] for name, each in logged.items()})
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
