"""OPD: on-policy distillation. The student samples, the teacher scores every sampled token.

With y ~ student, c_t = (prompt, y_<t), N trained tokens in the batch, sg = stop-gradient:

    log_ratio_t = log student(y_t|c_t) - log teacher(y_t|c_t)                            Eq. (1)
    advantage_t = sg[-sum_(s>=t) discount^(s-t) log_ratio_s]                             Eq. (2)
    w_t = sg[min(student(y_t|c_t) / behaviour(y_t|c_t), importance_cap)]                 Eq. (3)
    loss = -1/N sum_t w_t advantage_t log student(y_t|c_t)         --objective sampled   Eq. (4)
    loss = 1/N sum_t D(student(.|c_t), teacher(.|c_t))             --objective full      Eq. (5)
    jsd_b = b KL(teacher||M) + (1-b) KL(student||M), M = (1-b) student + b teacher       Eq. (6)

Sources: (1), (2), (4) arXiv:2603.25562v2 Eq. (2), with discount 0 the method of Thinking Machines'
"On-policy distillation" (2025); (5), (6) GKD, arXiv:2306.13649. At discount 0 the gradient of (4)
is an unbiased estimate of that of (5), reverse KL, at the prefixes that the student visits.

    python methods/opd.py                                  # the embedded tiny pair, on a CPU
    python methods/opd.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --prompts train.jsonl \\
        --verifier math --max-completion-tokens 4096 --lr 1e-6
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import opd_ops
from opd_ops import engines, health, memory, ranks, rollouts, runs, trace
from opd_ops.data import Prompt, load_prompts, verifier_function
from opd_ops.models import CausalLM, export, load_models, prepare

# ==== 1. Arguments ================================================================================


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """All flags; everything that is wrong with them is reported in one message."""
    raw, tiny, types = argparse.RawDescriptionHelpFormatter, runs.TINY, ["float32", "bfloat16"]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=__doc__, formatter_class=raw
    )
    add = partial(runs.flag, parser.add_argument_group("run"))
    add("--run-dir", f"runs/{Path(__file__).stem}/default", "folder for logs and checkpoints")
    add("--resume", False, "continue from the newest good checkpoint in --run-dir")
    add("--overwrite", False, "delete the run that is in --run-dir")
    add("--save-every", 50, "steps between checkpoints; 0: only at the end", "[0,inf)")
    add("--keep-checkpoints", 2, "how many of the newest are kept; 0: all", "[0,inf)")
    add("--report-to", "none", "live view", choices=["none", "tensorboard", "wandb", "trackio"])
    add("--seed", 0, "of data order and sampling", "[0,inf)")
    add("--device", "auto", "cpu, cuda, cuda:1; auto: cuda where there is one")
    add("--shard", "none", "over the processes of torchrun", choices=["none", "fsdp"])
    add("--shard-frozen", False, "with --shard fsdp: the frozen models too")
    add("--rank-timeout-s", 1800.0, "wait for other processes", "(0,inf)")
    add("--dry-run", False, "print resolved flags, models, checks and token budget; exit")
    add("--stop-on-alarm", False, "save and stop at the first alarm (docs/metrics.md)")
    add("--debug", False, "show tracebacks")
    add = partial(runs.flag, parser.add_argument_group("data"))
    add("--prompts", str(tiny / "prompts/train.jsonl"), "jsonl, reasoning_gym:TASK, hub name")
    add("--test-prompts", None, "held-out prompts [with the tiny prompts: the tiny test set]")
    add("--prompt-field", "prompt", "field with the user message")
    add("--answer-field", "answer", "field with the right answer, for the verifier")
    add("--domain-field", "domain", "field by which metrics are split")
    add("--chat-template", True, "render prompts with the tokenizer's template, if it has one")
    add("--chat-template-from", "student", "whose template", choices=["student", "teacher"])
    add("--chat-template-args", "{}", 'JSON for the template, such as {"enable_thinking": false}')
    add("--verifier", "exact", "exact, math, reasoning_gym:TASK, module:function")
    add("--verifier-timeout-s", 10.0, "for one answer; after that its verdict is 0", "(0,inf)")
    add("--max-prompt-tokens", 1024, "longer prompts are left out, and counted", "[1,inf)")
    add = partial(runs.flag, parser.add_argument_group("models"))
    add("--student", str(tiny / "student"), "folder or hub name")
    add("--teacher", None, "folder or hub name [the tiny teacher]", action="append")
    add("--dtype", "auto", "compute type (weights: float32)", choices=["auto", *types])
    add("--teacher-url", None, "http://HOST:PORT of a vLLM server that has the teacher")
    add("--teacher-timeout-s", 600.0, "wait for the server, then save and stop", "(0,inf)")
    add("--teacher-dtype", "auto", "type of frozen models", choices=["auto", *types])
    add("--teacher-device", "same", "device of frozen models; same: --device")
    add("--teacher-offload", False, "frozen models wait in CPU memory, come one by one to score")
    add("--lora-rank", 0, "train adapters of this rank, all layers but the head; 0: off", "[0,inf)")
    add("--lora-alpha", 32.0, "an adapter's product is multiplied by this / rank", "(0,inf)")
    add("--gradient-checkpointing", False, "recompute activations in the backward pass")
    add("--trust-remote-code", False, "run Python code that comes with the models")
    add = partial(runs.flag, parser.add_argument_group("rollout"))
    add("--prompts-per-step", 32, "prompts in one step", "[1,inf)")
    add("--rollouts-per-prompt", 4, "rollouts of each", "[1,inf)")
    add("--max-completion-tokens", 128, "longer completions are cut, and counted", "[1,inf)")
    add("--temperature", 1.0, "of sampling; the loss is not corrected for it", "(0,inf)")
    add("--top-p", 1.0, "of sampling; the loss is not corrected for the truncation", "(0,1]")
    add("--top-k", 0, "of sampling; 0: off", "[0,inf)")
    add("--sampler", "own", "who generates the student's rollouts", choices=["own", "vllm"])
    add("--sampler-memory", 0.3, "share of the GPU that vLLM may take", "(0,1)")
    add("--sampler-batch-size", 256, "rollouts generated together", "[1,inf)")
    add = partial(runs.flag, parser.add_argument_group("optimisation"))
    add("--steps", 100, "batches of rollouts", "[0,inf)")
    add("--lr", 3e-4, "peak learning rate of AdamW", "[0,inf)")
    add("--lr-schedule", "constant", "after warm-up", choices=["constant", "linear", "cosine"])
    add("--warmup-steps", 0, "of linear warm-up", "[0,inf)")
    add("--weight-decay", 0.0, "of AdamW, on matrices", "[0,inf)")
    add("--adam-beta2", 0.95, "of AdamW (beta1 is 0.9, epsilon 1e-8)", "[0,1)")
    add("--max-grad-norm", 1.0, "gradient clipping", "(0,inf]")
    add("--updates-per-rollout", 1, "optimizer steps on each batch of rollouts", "[1,inf)")
    add("--importance-cap", 5.0, "largest importance weight, Eq. (3)", "[1,inf]")
    add("--loss-temperature", 1.0, "of every log-prob in the loss, all models alike", "(0,inf)")
    add("--micro-batch-tokens", 16384, "most tokens of a forward pass, with padding", "[1,inf)")
    add("--max-bad-steps", 0, "steps that are not finite to skip, before a stop", "[0,inf)")
    add = partial(runs.flag, parser.add_argument_group("evaluation"))
    add("--eval-every", 50, "steps between evaluations, and at both ends; 0: never", "[0,inf)")
    add("--eval-samples", 8, "samples for each test prompt", "[1,inf)")
    add("--eval-temperature", 1.0, "0: greedy", "[0,inf)")
    add("--eval-top-p", 1.0, "of evaluation", "(0,1]")
    add("--eval-teacher", False, "evaluate the teacher too, once")
    add("--diagnostic-tokens", 512, "tokens of a step with exact divergences; 0: off", "[0,inf)")
    add_method_args(parser)
    args = runs.parse(parser, argv, check_method_args)
    args.teacher = args.teacher or [str(tiny / "teacher")]
    if args.test_prompts is None and args.prompts == str(tiny / "prompts/train.jsonl"):
        args.test_prompts = str(tiny / "prompts/test.jsonl")
    return args


# ==== 2. Data and verifier ========================================================================
# FORK: rows and chat format: `opd_ops.data.load_prompts`. A verifier of yours: --verifier my.py:f


def prompts_of_step(prompts: list[Prompt], step: int, args: argparse.Namespace) -> list[Prompt]:
    """A function of seed and step alone, so that resuming needs no state; reshuffled each epoch."""
    places = range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step)
    order = {
        epoch: np.random.default_rng([args.seed, 1, epoch]).permutation(len(prompts))
        for epoch in range(places[0] // len(prompts), places[-1] // len(prompts) + 1)
    }
    return [prompts[order[place // len(prompts)][place % len(prompts)]] for place in places]


def verify(rollout: Rollout, tokenizer: Any, verifier: runs.Verifier) -> None:
    """Write the verdicts: +1 right, -1 wrong, 0 unverified."""
    kept = [ids[mask] for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    items = [(text, prompt.answer, prompt.row) for text, prompt in zip(texts, rollout.prompts)]
    rollout.verdict = torch.tensor(verifier(items), device=rollout.verdict.device)


# ==== 3. Models and sampling ======================================================================


@dataclass
class Rollout:
    """B completions and how they were sampled. Names, units and signs: docs/notation.md."""

    prompts: list[Prompt]
    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    completion_ids: Tensor  # [B, T] int64, right-padded
    completion_mask: Tensor  # [B, T] bool: every token after the prompt, EOS included
    response_mask: Tensor  # [B, T] bool: tokens that the main loss trains
    prefix_mask: Tensor  # [B, T] bool: tokens of a teacher's prefix; none in opd
    rollout_logp: Tensor  # [B, T] nats, of the law that was sampled from
    behaviour_logp: Tensor  # [B, T] nats, same weights, full vocabulary, loss temperature
    coin: Tensor  # [B, T] a uniform in [0, 1) for a method's own draw at a token; zero in opd
    ended: Tensor  # [B] bool: EOS was sampled
    source: Tensor  # [B] int64: 0 student, 1 teacher
    verdict: Tensor  # [B] float: +1 right, -1 wrong, 0 unverified

    @property
    def attention_mask(self) -> Tensor:  # [B, P+T]
        return torch.cat([self.prompt_mask, self.completion_mask], 1)

    @property
    def trained_mask(self) -> Tensor:  # [B, T], N tokens; no others are scored
        return self.response_mask | self.prefix_mask

    def select(self, rows: Tensor) -> Rollout:
        """Some of the rollouts, without padding that they do not need."""
        return rollouts.select(self, rows)


def read_tokens(model: CausalLM, rollout: Rollout, read: Callable[..., Tensor]) -> Tensor:
    """`read(rows, head)` of the N rows that predict trained tokens, as [B, T, ...], else zero."""
    attention_mask = rollout.attention_mask.to(model.device)
    mask = rollout.trained_mask
    values = model(
        read,
        F.pad(mask, (rollout.prompt_ids.shape[1] - 1, 1)).to(model.device),  # t - 1 predicts t
        input_ids=torch.cat([rollout.prompt_ids, rollout.completion_ids], 1).to(model.device),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).to(mask.device)
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)


def token_logp(model: CausalLM, rollout: Rollout, args: argparse.Namespace) -> Tensor:
    """Log-probs of the sampled tokens: [B, T] nats, full vocabulary, loss temperature."""
    ids = rollout.completion_ids[rollout.trained_mask].to(model.device)
    return read_tokens(
        model,
        rollout,
        lambda rows, head: opd_ops.linear_token_logp(rows, head, ids, **loss_law(args))[0],
    )


def loss_law(args: argparse.Namespace) -> dict[str, Any]:
    """What turns logits into the distributions of the loss, the same for all models."""
    return {"temperature": args.loss_temperature, "valid_vocab": args.valid_vocab}


def uniforms(num_rollouts: int, stream: int, step: int, args: argparse.Namespace) -> Tensor:
    """[B, T], one uniform per token: randomness belongs to the row, so that neither batching nor
    the number of processes changes a sample. Streams: 1 data order, 2 rollouts, 3 evaluation."""
    generator = np.random.default_rng([args.seed, stream, step])
    shape = (num_rollouts, args.max_completion_tokens)
    return torch.from_numpy(generator.random(shape, dtype=np.float32))


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by the inverse CDF: (token, rollout_logp, behaviour_logp), each [B]."""
    logits = logits[:, : args.valid_vocab].float()
    if temperature == 0.0:  # greedy
        temperature, top_k = 1.0, 1
    probs, order = (logits / temperature).softmax(-1), None
    if top_p < 1.0 or top_k:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the first one stays
        probs[:, top_k or probs.shape[1] :] = 0.0
    cdf = probs.cumsum(-1)
    mass = cdf[:, -1:]  # 1 without truncation
    point = (uniform[:, None] * mass).minimum(mass.nextafter(torch.zeros_like(mass)))
    place = torch.searchsorted(cdf, point, right=True)  # never a token of probability 0
    place = place.clamp(max=probs.shape[1] - 1)  # rows of NaN: left to the check of the loss
    rollout_logp = (probs.gather(1, place) / mass).log()[:, 0]
    token = (place if order is None else order.gather(1, place))[:, 0]
    return token, rollout_logp, opd_ops.token_logp(logits, token, **loss_law(args))[0]


def next_logits(model: CausalLM, cache: Any, ids: Tensor, seen: Tensor) -> Tensor:
    """[B, V] logits after `ids` [B, n], the last columns of all that `seen` [B, L] masks."""
    return model(
        lambda rows, head: rows if head is None else rows @ head.T,
        None,
        input_ids=ids,
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: list[Prompt],
    uniform: Tensor,
    args: argparse.Namespace,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Rollout:
    """One completion per prompt, by a key/value cache; `uniform` [B, T] are its random numbers.

    Nothing but these arguments decides how: a checkpoint's generation_config is not read. Each
    process samples its share of the rows, and gets those of all.
    """
    (num, width), device = uniform.shape, model.device
    out, uniform = rollouts.blank(Rollout, prompts, width, device), uniform.to(device)
    eos = torch.tensor(args.eos_ids, device=device)
    grids = out.completion_ids, out.rollout_logp, out.behaviour_logp  # what `draw` returns
    bar = tqdm(total=num, unit="rollout", desc="sample", leave=False, disable=None)
    model.eval()
    share = torch.arange(num, device=device)[ranks.share(num)]
    chunks = share.split(args.sampler_batch_size) if len(share) else ()
    if model.engine:
        engines.sample(model, out, share, uniform, args, temperature, top_p, top_k)
        chunks = ()
    with ranks.unsharded(model), model.autocast():  # once for all steps: weights are cast once
        for rows in chunks:
            cache, place = model.new_cache(), {}  # each distinct prompt is prefilled once
            which = [place.setdefault(prompts[row].ids, len(place)) for row in rows.tolist()]
            first = rows[[which.index(each) for each in range(len(place))]]
            seen, copies = out.prompt_mask[first], torch.tensor(which, device=device)
            logits = next_logits(model, cache, out.prompt_ids[first], seen)[copies]
            cache.batch_select_indices(copies)
            seen, alive = seen[copies], torch.ones_like(rows, dtype=torch.bool)
            for t in range(width):
                drawn = draw(logits, uniform[rows, t], temperature, top_p, top_k, args)
                token, live = drawn[0], rows[alive]
                out.completion_mask[live, t] = True
                for grid, values in zip(grids, drawn):
                    grid[live, t] = values[alive]
                ends = torch.isin(token, eos) & alive
                out.ended[rows[ends]] = True
                alive = alive & ~ends
                bar.update(int(ends.sum()))
                if t + 1 == width or not alive.any():
                    break
                if alive.sum() <= 0.9 * len(alive):  # the copy costs about as much as a step
                    keep = alive.nonzero()[:, 0]
                    cache.batch_select_indices(keep)
                    rows, seen, token, alive = rows[keep], seen[keep], token[keep], alive[keep]
                seen = F.pad(seen, (0, 1), value=True)
                logits = next_logits(model, cache, token[:, None], seen)
    bar.close()
    out = rollouts.gather(out)
    out.response_mask = out.completion_mask.clone()
    return out.select(torch.arange(num, device=device))


# ==== 4. The method ===============================================================================


def add_method_args(parser: argparse.ArgumentParser) -> None:
    """Hyper-parameters of the method."""
    add = partial(runs.flag, parser.add_argument_group("method"))
    add("--objective", "sampled", "Eq. (4) or Eq. (5)", choices=["sampled", "full"])
    add("--discount", 0.0, "gamma of Eq. (2); 0: every token answers for itself", "[0,1]")
    add("--divergence", "reverse", "D of Eq. (5)", choices=["reverse", "forward", "jsd"])
    add("--jsd-beta", 0.5, "b of Eq. (6), the weight of the teacher", "(0,1)")


def check_method_args(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags, beyond their bounds."""
    errors = []
    if args.jsd_beta in (0.0, 1.0):
        errors.append("--jsd-beta 0 and 1 have no gradient: use --divergence forward or reverse")
    if len(args.teacher or []) > 1:
        errors.append("--teacher: one is expected (exopd.py takes several)")
    return errors


def model_paths(args: argparse.Namespace) -> dict[str, str]:
    """Which models exist *is* the method. All but the student are frozen."""
    return {"student": args.student, "teacher": args.teacher[0]}


def collect(
    models: dict[str, CausalLM],
    tokenizer: Any,
    verifier: runs.Verifier,
    prompts: list[Prompt],
    args: argparse.Namespace,
    step: int,
) -> tuple[Rollout, dict[str, float]]:
    """Where trajectories come from (the student), and what to log of how they came."""
    prompts = [prompt for prompt in prompts for _ in range(args.rollouts_per_prompt)]
    uniform = uniforms(len(prompts), 2, step, args)
    rollout = sample(
        models["student"], prompts, uniform, args, args.temperature, args.top_p, args.top_k
    )
    verify(rollout, tokenizer, verifier)
    return rollout, {}


@torch.no_grad()
def score(
    models: dict[str, CausalLM], rollout: Rollout, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that comes from frozen models."""
    teacher = models["teacher"]
    if args.objective == "full":
        teacher_rows = read_tokens(teacher, rollout, lambda rows, head: rows)  # [B, T, D]
        head = teacher.head if teacher.head is None else teacher.head.to(teacher_rows.device)
        return {"teacher_rows": teacher_rows, "teacher_head": head}
    return {"teacher_logp": token_logp(teacher, rollout, args)}


def token_loss(
    student: CausalLM, rollout: Rollout, scores: dict[str, Any], args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, summed over trained tokens, and what to log of each token, [B, T]."""
    if args.objective == "full":
        teacher_rows = scores["teacher_rows"][rollout.trained_mask]
        how = {"divergence": args.divergence, "beta": args.jsd_beta}  # Eq. (6)
        divergence = read_tokens(
            student,
            rollout,
            lambda rows, head: opd_ops.linear_full_kl(
                rows, head, teacher_rows, scores["teacher_head"], **how, **loss_law(args)
            ),
        )
        return divergence.sum(), {"divergence": divergence.detach()}  # Eq. (5)
    student_logp = token_logp(student, rollout, args)
    log_ratio = student_logp.detach() - scores["teacher_logp"]  # Eq. (1)
    advantage = discounted_sum(-log_ratio, args.discount)  # Eq. (2)
    policy_log_ratio = (student_logp.detach() - rollout.behaviour_logp) * rollout.trained_mask
    weight = importance_weight(policy_log_ratio, args)
    loss_sum = -(weight * advantage * student_logp).sum()  # Eq. (4)
    logged = {"log_ratio": log_ratio, "advantage": advantage, "policy_log_ratio": policy_log_ratio}
    return loss_sum, logged


def discounted_sum(values: Tensor, discount: float) -> Tensor:
    """sum_(s>=t) discount^(s-t) values_s, [B, T]; `values` are zero where nothing is trained."""
    if discount == 0.0:
        return values
    sums = [values[:, -1]]
    for column in values[:, :-1].flip(1).unbind(1):
        sums.append(column + discount * sums[-1])
    return torch.stack(sums[::-1], 1)


def importance_weight(policy_log_ratio: Tensor, args: argparse.Namespace) -> Tensor | float:
    """1 while the weights that sampled are those that are trained, in the same arithmetic."""
    on_policy = args.updates_per_rollout == 1 and args.sampler == "own"
    return 1.0 if on_policy else policy_log_ratio.exp().clamp(max=args.importance_cap)  # Eq. (3)


# ==== 5. Update, evaluation, checkpoints ==========================================================


def micro_batches(rollout: Rollout, args: argparse.Namespace) -> Iterator[Rollout]:
    """This process's pieces of like length, at most --micro-batch-tokens each (or one rollout).

    All processes have equally many: the last ones may train nothing, and keep the others in step.
    """
    sizes = torch.stack([rollout.prompt_mask.sum(1), rollout.completion_mask.sum(1)], 1).cpu()
    order = sizes.sum(1).argsort(descending=True, stable=True).tolist()
    shares = [pack(order[each :: ranks.world()], sizes, args) for each in range(ranks.world())]
    own = shares[ranks.rank()]
    for group in own:
        yield rollout.select(torch.tensor(group))
    for _ in range(max(map(len, shares)) - len(own)):
        yield rollouts.idle(rollout, order[-1])


def pack(rows: list[int], sizes: Tensor, args: argparse.Namespace) -> list[list[int]]:
    """Neighbours in one group while it fits and at most a tenth of it is padding.

    `sizes` [B, 2] are the tokens of prompts and completions; both are padded to the longest.
    """
    groups, width, num_tokens = [], torch.zeros(2, dtype=torch.int64), 0
    for row in rows:
        wider, more = width.maximum(sizes[row]), num_tokens + int(sizes[row].sum())
        padded = int(wider.sum()) * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > args.micro_batch_tokens or padded - more > 0.1 * padded:
            groups.append([])
            wider, more = sizes[row], int(sizes[row].sum())
        groups[-1].append(row)
        width, num_tokens = wider, more
    return groups


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then constant, or down to 0 at --steps."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    down = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return args.lr * down[args.lr_schedule]


def make_optimizer(student: CausalLM, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW over float32 weights; weight decay on matrices only."""
    weights = [w for w in student.parameters() if w.requires_grad]
    groups = [
        {"params": [w for w in weights if w.dim() > 1]},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    how = {"lr": args.lr, "betas": (0.9, args.adam_beta2), "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(groups, **how)
    for weight in weights:  # now, so that a checkpoint before the first step is exact
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": torch.tensor(0.0)} | moments
    return optimizer


def accumulate(
    student: CausalLM,
    num_trained_tokens: float,
    args: argparse.Namespace,
    batch: list[tuple[Rollout, dict[str, Any]]],
) -> tuple[float, dict[str, list[Tensor]]]:
    """The gradient of a batch; its loss, and what to log of the trained tokens of each piece."""
    student.zero_grad()
    loss, tokens = 0.0, {}
    for rollout, scores in batch:
        loss_sum, logged = token_loss(student, rollout, scores, args)
        (loss_sum / num_trained_tokens).backward()  # once, by the tokens of all processes
        loss += float(loss_sum.detach()) / num_trained_tokens
        for name, values in (logged | health.places(rollout)).items():
            tokens.setdefault(name, []).append(values[rollout.trained_mask])
    return loss, tokens


def train_step(
    student: CausalLM,
    optimizer: torch.optim.Optimizer,
    batch: list[tuple[Rollout, dict[str, Any]]],
    args: argparse.Namespace,
    step: int,
) -> dict[str, float]:
    """One optimizer step; skipped where loss, gradient or log-ratio is not finite (`bad_step`)."""
    num_trained_tokens = sum(int(rollout.trained_mask.sum()) for rollout, _ in batch)
    num_trained_tokens = max(1, ranks.total(num_trained_tokens))  # of all processes
    student.train()
    work = partial(accumulate, student, num_trained_tokens, args)
    loss, tokens = rollouts.fit_memory(work, batch, args)
    ranks.sum_gradients(student)
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
    loss, grad_norm = ranks.total(loss), float(ranks.whole(grad_norm))
    tokens = {name: ranks.cat(torch.cat(parts)) for name, parts in tokens.items()}
    metrics = health.token_metrics(tokens)
    good = math.isfinite(loss + grad_norm) and not metrics["num_bad_log_ratios"]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    if good:
        optimizer.step()
    done = {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate(step, args)}
    return metrics | done | {"bad_step": float(not good)}


def evaluate(
    models: dict[str, CausalLM],
    name: str,
    tokenizer: Any,
    verifier: runs.Verifier,
    prompts: list[Prompt],
    args: argparse.Namespace,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """avg@n, pass@k, lengths; of the student also the exact reverse KL on the first sample of each
    prompt, and a few of these samples token by token."""
    rows = [prompt for prompt in prompts for _ in range(args.eval_samples)]
    uniform = uniforms(len(rows), 3, 0, args)  # the same numbers in every evaluation
    rollout = sample(models[name], rows, uniform, args, args.eval_temperature, args.eval_top_p)
    verify(rollout, tokenizer, verifier)
    metrics = health.rollout_metrics(rollout)
    metrics |= health.pass_metrics(rollout.verdict.view(len(prompts), -1), prompts)
    tokens = []
    if name == "student":
        first = rollout.select(torch.arange(0, len(rows), args.eval_samples))
        metrics |= health.exact_divergences(
            models, micro_batches(first, args), read_tokens, loss_law(args), ["reverse_kl"]
        )
        tokens = trace.rows(models, first, tokenizer, args, read_tokens, loss_law(args))
    return {f"eval/{name}/{key}": value for key, value in metrics.items()}, tokens


def save_checkpoint(
    folder: Path,
    student: CausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    state: dict[str, int],
) -> None:
    """`model/` for `from_pretrained`, `trainer/` to resume; data and samples need no state."""
    export(student, tokenizer, folder / "model")
    weights, moments = get_state_dict(student, optimizer)
    dcp.save({"student": weights, "optimizer": moments} | state, checkpoint_id=folder / "trainer")


def load_checkpoint(
    folder: Path, student: CausalLM, optimizer: torch.optim.Optimizer, state: dict[str, int]
) -> dict[str, int]:
    """Put weights and moments back; return the counters that were saved with them."""
    weights, moments = get_state_dict(student, optimizer)
    saved: dict[str, Any] = {"student": weights, "optimizer": moments} | state
    dcp.load(saved, checkpoint_id=folder / "trainer")
    set_state_dict(
        student, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"]
    )
    return {key: saved[key] for key in state}


# ==== 6. Main loop ================================================================================


@runs.command
def main(argv: Sequence[str] | None = None) -> None:
    """Sample, score, update; evaluate and save."""
    args = parse_args(argv)
    ranks.start(args)
    tokenizer = prepare(model_paths(args), args)
    prompts, test = load_prompts(tokenizer, args)
    function = verifier_function(args.verifier)
    runs.say_plan(args)
    if args.dry_run:
        memory.say(model_paths(args), prompts, args)
        return
    models = load_models(model_paths(args), args)
    run, verifier = runs.Run(args, __file__), runs.Verifier(function, args.verifier_timeout_s)
    student, state = models["student"], {"step": 0, "num_bad_steps": 0}
    optimizer = make_optimizer(student, args)
    if run.resume_from:
        state = run.load(load_checkpoint, student, optimizer, state)

    for step in tqdm(range(state["step"], args.steps + 1), unit="step", disable=None):
        state["step"] = step
        save = partial(run.save, step, save_checkpoint, student, optimizer, tokenizer, state)
        run.stop_if_asked(step, save)
        last = step == args.steps
        if test and args.eval_every and (last or step % args.eval_every == 0):
            for name in ("teacher", "student") if step == 0 and args.eval_teacher else ("student",):
                if not run.has(step, f"eval/{name}/avg@{args.eval_samples}"):
                    with run.phase("eval"):
                        metrics, tokens = evaluate(models, name, tokenizer, verifier, test, args)
                    run.log(step, metrics, tokens)
        if last or (args.save_every and step and step % args.save_every == 0):
            save()
        if last:
            break
        with run.phase("generate"):
            chosen = prompts_of_step(prompts, step, args)
            rollout, metrics = collect(models, tokenizer, verifier, chosen, args, step)
        with run.phase("teacher"):
            batch = [(micro, score(models, micro, args)) for micro in micro_batches(rollout, args)]
        metrics |= health.rollout_metrics(rollout)
        if args.diagnostic_tokens:
            with run.phase("diagnose"):
                few = micro_batches(health.thin(rollout, args.diagnostic_tokens, step), args)
                metrics |= health.exact_divergences(models, few, read_tokens, loss_law(args))
                how = read_tokens, loss_law(args), score, token_loss
                run.trace(step + 1, trace.rows(models, rollout, tokenizer, args, *how))
        with run.phase("student"):
            for _ in range(args.updates_per_rollout):
                metrics |= train_step(student, optimizer, batch, args, step)
                if metrics["bad_step"]:
                    break
        run.log_step(step + 1, metrics, health.samples(rollout, tokenizer))
        if metrics["bad_step"]:
            found = health.offending(student, batch, tokenizer, token_loss, args)
            run.bad_step(step + 1, metrics, state["num_bad_steps"], found, save)
            state["num_bad_steps"] += 1
    verifier.close()
    run.finish()


if __name__ == "__main__":
    main()
