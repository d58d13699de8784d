"""Is what the sampler, a padded batch and train mode say of a model what the model says itself?

Asked of each loaded model, on rows of a few tokens, before anything is trained: a cache that a
model's forward pass swallows, padding that it reads as text, noise that only train mode has. Each
of these trains without an error, and wrongly.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_run import ranks, rollouts
from opd_run.adapters import WithoutAdapter
from opd_run.console import RunError, one_line, say
from opd_run.models import CausalLM, rope_boundary

NUM_TOKENS, NUM_RECURRENT = 12, 32  # sampled for each row; by recurrent layers, which may drift
LONG = [2]  # of the four rows: a long one without a prefix
EXACT = 1e-3  # nats, of every token, in float32
ROUNDED = 0.1  # nats, in the mean, in bfloat16


def check_models(
    models: dict[str, Any],
    paths: dict[str, str],
    prompts: Sequence[Any],
    args: argparse.Namespace,
    kind: type,
    sample: Callable[..., Any],
    token_logp: Callable[..., Tensor],
) -> None:
    """Compare each model with plain forward passes over single rows, without padding and cache.

    Of all models: a padded batch of rows of unlike length; a row without its last tokens. Sampled
    with a cache; a frozen model that fails there is refused only where the run samples from it
    (`CausalLM.new_cache`). Of the student: two passes in train mode. Float32 weights are compared
    without autocast. Nothing is done with `--no-check-models`.

    Args:
        paths: where the models come from, for messages.
        prompts: of the run; the rows are made of their tokens.
        kind, sample, token_logp: `Rollout` and the two functions of the method file.

    Raises:
        RunError: a model would be trained or read wrongly.
    """
    if not args.check_models:
        return
    begun, found, seen = time.perf_counter(), [], set()
    for name, model in models.items():
        if not isinstance(model, CausalLM) or isinstance(model, WithoutAdapter):
            continue  # a served teacher; the student itself
        if id(model) not in seen:
            seen.add(id(model))
            who = f"{name} {paths.get(name, '')} ({model.lm.config.model_type})"
            with _plain(model) as exact:
                worst = _check(name, who, model, exact, prompts, args, kind, sample, token_logp)
            found.append(f"{name} {worst:.1e}")
    seconds = time.perf_counter() - begun
    say(f"check: sampler, padding and train mode agree to {', '.join(found)} nats; {seconds:.1f} s")


def _check(
    name: str,
    who: str,
    model: CausalLM,
    exact: bool,
    prompts: Sequence[Any],
    args: argparse.Namespace,
    kind: type,
    sample: Callable[..., Any],
    token_logp: Callable[..., Tensor],
) -> float:
    """The largest difference in nats that was found."""
    layers = model.new_cache(torch.float32).layers
    width = NUM_RECURRENT if any(hasattr(e, "conv_states") for e in layers) else NUM_TOKENS
    rows, prefixes = _rows(prompts, model, args, width)
    limit = EXACT if exact else ROUNDED
    uniform = torch.rand(len(rows), width, generator=torch.Generator().manual_seed(0))
    rollout, failure = None, ""
    if not model.engine:
        try:
            rollout = rollouts.join(
                [
                    sample(model, rows[part], uniform[part], args, prefixes=prefixes[part])
                    for part in (slice(2), slice(2, 4))  # the short rows need no padding: no mask
                ]
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each architecture has its own way to refuse a cache
            failure = (
                f"sampling with a cache ends in {type(error).__name__}: {one_line(error, 120)}"
            )
    if rollout is None:
        rollout = _written(kind, rows, uniform, model)
    mask = rollout.response_mask

    def off(one: Tensor, two: Tensor) -> float:
        values = (one - two)[mask.to(one.device)].abs().nan_to_num(math.inf, math.inf)
        return float(values.max() if exact else values.mean())

    try:
        alone = _alone(model, rollout, args, token_logp)
        shorter = _without_end(rollout)
        begun = _alone(model, shorter, args, token_logp)
        batch = _logp(model, rollout, args, token_logp)
        passes = [batch]
        if name == "student":
            model.train()
            before = _generators(model)
            passes += [_logp(model, rollout, args, token_logp) for _ in range(2)]
            drawn = not all(map(torch.equal, before, _generators(model)))
        noise = max(off(one, two) for one in passes for two in passes)
        if name == "student" and drawn and noise <= limit:  # for nothing, or seldom for something
            noise = _rare_noise(model, kind, rows, args, token_logp)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error, 200)}"
        raise RunError(f"{who}: a padded batch cannot be read: {text}") from error
    finally:
        model.eval()
    if not alone[mask.to(alone.device)].isfinite().all():
        raise RunError(f"{who}: log-probs of a plain forward pass are not finite: damaged weights?")
    change = (begun - alone[LONG, : begun.shape[1]])[0].abs().nan_to_num(math.inf, math.inf)
    ahead = float(change.max() if exact else change.mean())
    if not ahead <= limit:
        raise RunError(
            f"{who}: log-probs of tokens change by {ahead:.2g} nats with the tokens after them (at "
            f"most {limit:g}): this is no causal language model, or it reads positions by the "
            "length of the whole row; --no-check-models goes on anyway"
        )
    padded = off(batch, alone)
    if not padded <= limit:
        raise RunError(
            f"{who}: log-probs of a left-padded batch are off by {padded:.2g} nats from those of "
            f"its rows alone (at most {limit:g}): this model type reads padding as text, mixes "
            "rows or counts positions in its own way, and cannot be trained or scored in batches; "
            "--no-check-models goes on anyway"
        )
    if not noise <= limit:
        raise RunError(
            f"{who}: log-probs in train mode are off by {noise:.2g} nats from those in eval mode "
            f"(at most {limit:g}): this model type has noise in train mode, so the policy that is "
            "trained is not the one that sampled; --no-check-models goes on anyway"
        )
    sampled = 0.0
    if not failure and not model.engine:
        sampled = off(rollout.behaviour_logp, alone)
        if not sampled <= limit:
            failure = (
                f"log-probs that the sampler recorded are off by {sampled:.2g} nats from those of "
                f"the rows alone (at most {limit:g}): this model type does not go on from the cache"
            )
    if failure:
        failure = f"{who}: cannot be sampled from: {failure}; --no-check-models goes on anyway"
        if name == "student" or (name == "teacher" and args.eval_teacher):
            raise RunError(failure)
        model.refusal, sampled = failure, 0.0
    return max(padded, noise, sampled, ahead)


@contextmanager
def _plain(model: CausalLM) -> Iterator[bool]:
    """Float32 weights without autocast, and no end of sequence, so that rows are full; whether
    the model computes in float32."""
    weights = all(each.dtype == torch.float32 for each in model.lm.parameters())
    exact = weights and not (ranks.sharded(model) and model.compute_dtype != torch.float32)
    before = model.compute_dtype, model.facts
    try:
        if exact:
            model.compute_dtype = torch.float32
        model.facts = replace(model.facts, eos_ids={})
        yield exact
    finally:
        model.compute_dtype, model.facts = before


def _rare_noise(
    model: CausalLM,
    kind: type,
    rows: Sequence[Any],
    args: argparse.Namespace,
    token_logp: Callable[..., Tensor],
) -> float:
    """The largest difference between eval mode and passes in train mode, over many tokens."""
    longest = max(len(row.ids) for row in rows)
    width = int(min(64, model.facts.num_positions - longest))
    draws = torch.rand(4 * len(rows), width, generator=torch.Generator().manual_seed(1))
    rollout = _written(kind, [*rows] * 4, draws, model)
    model.eval()
    still = _logp(model, rollout, args, token_logp)
    model.train()
    passes = [_logp(model, rollout, args, token_logp) for _ in range(8)]
    return max(float((each - still).abs().max()) for each in passes)


def _generators(model: CausalLM) -> list[Tensor]:
    """The states of torch's generators of random numbers, on the CPU and where the model is."""
    found = [torch.get_rng_state()]
    if model.device.type == "cuda":
        found.append(torch.cuda.get_rng_state(model.device))
    return found


def _rows(
    prompts: Sequence[Any], model: CausalLM, args: argparse.Namespace, width: int
) -> tuple[list[Any], list[tuple[int, ...]]]:
    """Two short and two long prompts, and what their completions begin with.

    Equal rows share one reading of the prompt; the row with a prefix is full before the others, and
    leaves the cache. No prompt of the run is shorter than the short ones. Where positions are read
    in another way from some length on, the long ones go beyond it, where the run can.
    """
    ids = max((prompt.ids for prompt in prompts), key=len)
    ids = tuple(each % model.facts.valid_vocab for each in ids)
    longest = min(len(ids) + args.max_completion_tokens, model.facts.num_positions) - width
    size = int(min(24, max(longest, 4)))
    boundary = rope_boundary(model.lm.config)
    if boundary and args.max_prompt_tokens + args.max_completion_tokens > boundary:
        size = max(size, boundary - width // 2)
    long = (ids * (size // len(ids) + 1))[:size]
    short = long[-min([max(1, min(size, 24) // 3), *(len(prompt.ids) for prompt in prompts)]) :]
    rows = [replace(prompts[0], ids=each, views={}) for each in (short, short, long, long)]
    return rows, [(), (), (), long[: width // 2]]


def _written(kind: type, rows: Sequence[Any], uniform: Tensor, model: CausalLM) -> Any:
    """A rollout that nobody sampled."""
    device = model.device
    made = rollouts.blank(kind, rows, uniform.shape[1], device)
    made.completion_ids[:] = (uniform * model.facts.valid_vocab).long().to(device)
    made.completion_mask[:] = True
    made.response_mask[:] = True
    return made


@torch.no_grad()
def _logp(
    model: CausalLM, rollout: Any, args: argparse.Namespace, token_logp: Callable[..., Tensor]
) -> Tensor:
    """[B, T] nats, on the device of the rollout."""
    return token_logp(model, rollout, args).float()


def _alone(
    model: CausalLM, rollout: Any, args: argparse.Namespace, token_logp: Callable[..., Tensor]
) -> Tensor:
    """[B, T] nats, each row by itself, so that no row has padding; positions are the model's."""

    def bare(module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        told = ("attention_mask", "position_ids")
        return inputs, {name: value for name, value in named.items() if name not in told}

    found = torch.zeros_like(rollout.behaviour_logp)
    hook = model.register_forward_pre_hook(bare, with_kwargs=True)
    try:
        for row in range(len(found)):
            one = rollouts.select(rollout, torch.tensor([row]))
            values = _logp(model, one, args, token_logp)
            found[row, : values.shape[1]] = values[0]
    finally:
        hook.remove()
    return found


def _without_end(rollout: Any) -> Any:
    """A long row of a rollout, with the first half of its completion."""
    one = rollouts.select(rollout, torch.tensor(LONG))
    for mask in (one.completion_mask, one.response_mask):
        mask[:, mask.shape[1] // 2 :] = False
    return rollouts.select(one, torch.tensor([0]))
