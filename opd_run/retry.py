"""Memory that runs out in an update: the update again, in smaller pieces."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_run import ranks, rollouts
from opd_run.console import one_line, say

Found = TypeVar("Found")
_most_tokens: int | None = None  # of a micro-batch, where memory has run out in this run
_most_rows: int | None = None  # that the sampler works on together, likewise


class OutOfMemory(RuntimeError):
    """Memory ran out before an update had touched a weight, and smaller pieces did not help."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU, in one of its libraries, or on the host."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad allocation")
    return isinstance(error, (torch.OutOfMemoryError, OutOfMemory)) or any(
        text in str(error) for text in texts
    )


def start() -> None:
    """A new run has not run out of memory yet."""
    global _most_tokens, _most_rows
    _most_tokens = _most_rows = None


def micro_batch_tokens(args: argparse.Namespace) -> int:
    """`--micro-batch-tokens`, or less where memory has run out since the run started."""
    given: int = args.micro_batch_tokens
    return given if _most_tokens is None else min(given, _most_tokens)


def micro_batches(rollout: Any, args: argparse.Namespace) -> Iterator[Any]:
    """This process's pieces of like length, at most `micro_batch_tokens` each (or one rollout).

    All processes have equally many: the last ones may train nothing, and keep the others in step.
    Which rollouts go through the model together changes no number but by rounding.
    """
    groups, most, shortest = rollouts.pack(rollout, micro_batch_tokens(args))
    for group in groups:
        yield rollouts.select(rollout, torch.tensor(group))
    for _ in range(most - len(groups)):
        yield rollouts.idle(rollout, shortest)


def of_tokens(work: Callable[[Any], Tensor], rollout: Any, args: argparse.Namespace) -> Tensor:
    """`work(micro)` [b, t] of all micro-batches, put together: [B, T], zero where nothing is
    trained. Each process works on its share, and all have the whole."""
    found = torch.zeros_like(rollout.behaviour_logp)
    rows = torch.arange(len(found), device=found.device)
    for micro in micro_batches(replace(rollout, extra=rollout.extra | {"row": rows}), args):
        values = (work(micro) * micro.trained_mask).to(found)
        found[micro.extra["row"], : values.shape[1]] += values
    return torch.stack(ranks.gather(found.cpu())).sum(0).to(found.device)


def fit_memory(
    work: Callable[[list[tuple[Any, dict[str, Any]]]], Found],
    batch: list[tuple[Any, dict[str, Any]]],
    args: argparse.Namespace,
) -> Found:
    """`work(batch)`; where memory runs out, again with its micro-batches cut in half, and said.

    `batch` and `micro_batch_tokens` stay smaller, so that the next step need not fail first.

    Raises:
        OutOfMemory: one rollout at a time is still too much.
    """
    global _most_tokens
    while True:
        try:
            return work(batch)
        except RuntimeError as error:
            largest = max(len(rollout.prompts) for rollout, _ in batch)
            if not is_out_of_memory(error) or args.shard != "none":  # sharded: all or none repeats
                raise
            if largest == 1:
                raise OutOfMemory(f"not even one rollout fits: {one_line(error)}") from None
            why = one_line(error, 120)
        # Here the failed attempt is gone, with the tensors that its traceback held.
        torch.cuda.empty_cache()
        sizes = [
            len(each.prompts) * (each.prompt_ids.shape[1] + each.completion_ids.shape[1])
            for each, _ in batch
        ]
        _most_tokens = max(1, min(micro_batch_tokens(args), max(sizes)) // 2)
        batch[:] = [
            piece
            for pair in batch
            for piece in rollouts.cut(*pair, (len(pair[0].prompts) + 1) // 2)
        ]
        say(
            f"! out of memory: the update is repeated with micro-batches of at most "
            f"{(largest + 1) // 2} rollouts, later ones have --micro-batch-tokens "
            f"{_most_tokens} ({why})"
        )


def in_chunks(
    work: Callable[[Tensor], None],
    out: Any,
    rows: Tensor,
    args: argparse.Namespace,
    done: Callable[[Any], None] | None = None,
) -> None:
    """`work(chunk)` for `rows` [B] of the rollout `out`, in chunks of `--sampler-batch-size`.

    Where memory runs out, what is there of the chunk is forgotten, and it is worked on in halves,
    and said. Chunks stay smaller until the run ends. `done` gets each that is finished, a rollout.

    Raises:
        OutOfMemory: one row at a time is still too much.
    """
    global _most_rows
    while len(rows):
        chunk = rows[: min(args.sampler_batch_size, _most_rows or args.sampler_batch_size)]
        try:
            work(chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(chunk) == 1:
                raise OutOfMemory(f"not even one rollout fits: {one_line(error)}") from None
            why = one_line(error, 120)
        else:
            rows = rows[len(chunk) :]
            if done:
                done(rollouts.select(out, chunk))
            continue
        torch.cuda.empty_cache()  # the failed attempt is gone, with what its traceback held
        rollouts.clear(out, chunk)
        _most_rows = (len(chunk) + 1) // 2
        say(f"! out of memory: at most {_most_rows} rollouts are generated together now ({why})")
