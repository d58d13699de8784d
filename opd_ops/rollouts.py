"""Moving rollouts about: padding and columns, never a value."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_ops import ranks
from opd_ops.data import read_rows
from opd_ops.runs import OutOfMemory, RunError, is_out_of_memory, one_line, say

Found = TypeVar("Found")


def blank(kind: type, prompts: Sequence[Any], width: int, device: torch.device) -> Any:
    """A rollout of `kind` with its prompts in place and everything else zero, [B, `width`].

    Types go by name: `_mask` and `ended` are bool, `_ids` and `source` int64, the others float32.
    """
    num, length = len(prompts), max(len(prompt.ids) for prompt in prompts)
    made: dict[str, Any] = {"prompts": list(prompts)}
    for name in (field.name for field in fields(kind) if field.name != "prompts"):
        dtype = torch.float32
        if name.endswith("_mask") or name == "ended":
            dtype = torch.bool
        elif name.endswith("_ids") or name == "source":
            dtype = torch.int64
        per_token = (length,) if name.startswith("prompt") else (width,)
        shape = (num,) if name in ("ended", "source", "verdict") else (num, *per_token)
        made[name] = torch.zeros(shape, dtype=dtype)
    for row, prompt in enumerate(prompts):
        made["prompt_ids"][row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
        made["prompt_mask"][row, length - len(prompt.ids) :] = True
    return kind(**{k: v if k == "prompts" else v.to(device) for k, v in made.items()})


def select(rollout: Any, rows: torch.Tensor) -> Any:
    """Some of the rollouts, without padding that they do not need."""
    left = int((~rollout.prompt_mask[rows]).sum(1).min())
    width = int(rollout.completion_mask[rows].sum(1).max())
    cut: dict[str, Any] = {"prompts": [rollout.prompts[row] for row in rows.tolist()]}
    for name in (field.name for field in fields(rollout) if field.name != "prompts"):
        value = getattr(rollout, name)[rows]
        if value.dim() == 2:
            value = value[:, left:] if name.startswith("prompt") else value[:, :width]
        cut[name] = value
    return type(rollout)(**cut)


def gather(rollout: Any) -> Any:
    """The rollout with every rank's share of the rows (`ranks.share`) as that rank has it."""
    if ranks.world() == 1:
        return rollout
    names = [field.name for field in fields(rollout) if field.name != "prompts"]
    share = ranks.share(len(rollout.prompts))
    parts = ranks.gather({name: getattr(rollout, name)[share].cpu() for name in names})
    joined = {name: torch.cat([part[name] for part in parts]) for name in names}
    device = rollout.completion_ids.device
    return type(rollout)(rollout.prompts, **{k: v.to(device) for k, v in joined.items()})


def idle(rollout: Any, row: int) -> Any:
    """One of the rollouts with nothing to train: for a rank that has run out of work."""
    one = select(rollout, torch.tensor([row]))
    one.response_mask = torch.zeros_like(one.response_mask)
    one.prefix_mask = torch.zeros_like(one.prefix_mask)
    return one


def cut(rollout: Any, scores: dict[str, Any], size: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Pieces of `size` rollouts with their scores: [B, T, ...], but for a `_head` of a model."""
    for rows in torch.split(torch.arange(len(rollout.prompts)), size):
        part = rollout.select(rows)
        width = part.completion_ids.shape[1]
        yield (
            part,
            {
                name: value if name.endswith("_head") else value[rows.to(value.device)][:, :width]
                for name, value in scores.items()
            },
        )


def fit_memory(
    work: Callable[[list[tuple[Any, dict[str, Any]]]], Found],
    batch: list[tuple[Any, dict[str, Any]]],
    args: argparse.Namespace,
) -> Found:
    """`work(batch)`; where memory runs out, again with its micro-batches cut in half, and said.

    `batch` and `args.micro_batch_tokens` stay smaller, so that the next step need not fail first.

    Raises:
        OutOfMemory: one rollout at a time is still too much.
    """
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
        sizes = [len(each.prompts) * each.attention_mask.shape[1] for each, _ in batch]
        args.micro_batch_tokens = max(1, min(args.micro_batch_tokens, max(sizes)) // 2)
        batch[:] = [
            piece for pair in batch for piece in cut(*pair, (len(pair[0].prompts) + 1) // 2)
        ]
        say(
            f"! out of memory: the update is repeated with micro-batches of at most "
            f"{(largest + 1) // 2} rollouts, later ones have --micro-batch-tokens "
            f"{args.micro_batch_tokens} ({why})"
        )


def join(rollouts: Sequence[Any]) -> Any:
    """One rollout with the rows of all: prompts are padded on the left, the rest on the right."""
    length = max(each.prompt_ids.shape[1] for each in rollouts)
    width = max(each.completion_ids.shape[1] for each in rollouts)
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(rollouts[0])):
        values = [getattr(each, name) for each in rollouts]
        if name == "prompts":
            joined[name] = [prompt for each in values for prompt in each]
            continue
        values = [value.to(values[0].device) for value in values]
        if values[0].dim() == 2 and name.startswith("prompt"):
            values = [F.pad(value, (length - value.shape[1], 0)) for value in values]
        elif values[0].dim() == 2:
            values = [F.pad(value, (0, width - value.shape[1])) for value in values]
        joined[name] = torch.cat(values)
    return type(rollouts[0])(**joined)


def token_ids(tokenizer: Any, texts: Sequence[str], flag: str) -> list[int]:
    """Ids of single tokens, spelt as in the tokenizer's vocabulary.

    Raises:
        RunError: one of them is no token; `flag` is named.
    """
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    unknown = [text for text, i in zip(texts, ids) if tokenizer.convert_ids_to_tokens(i) != text]
    if unknown:
        raise RunError(f"{flag}: no tokens of the student's tokenizer: {unknown}", code=2)
    return ids


def occurrences(rollout: Any, ids: Sequence[int], which: str) -> Tensor:
    """Where the response has one of `ids`: [B, T] bool; `which`: "first" of each id, or "all"."""
    found = torch.zeros_like(rollout.response_mask)
    for each in ids:
        hits = (rollout.completion_ids == each) & rollout.response_mask
        found |= hits & (hits.cumsum(1) == 1) if which == "first" else hits
    return found


def replace_token(rollout: Any, old: int, new: int) -> Any:
    """The rollout with `new` wherever the completion has `old`."""
    hits = (rollout.completion_ids == old) & rollout.completion_mask
    ids = rollout.completion_ids.masked_fill(hits, new)
    return type(rollout)(**(vars(rollout) | {"completion_ids": ids}))


def adopt_prefix(rollout: Any, prompts: Sequence[Any], lengths: Sequence[int], width: int) -> Any:
    """Make the last `lengths[b]` tokens of each prompt the first ones of its completion.

    They become the prefix, and are no response. What then stands beyond `width` columns is cut
    off; an EOS that is cut off has not ended its rollout. `prompts` are the prompts without them.
    """
    ids = rollout.prompt_ids
    (num, old), moved = ids.shape, torch.tensor(lengths, device=ids.device)[:, None]  # [B, 1]
    steps = torch.arange(max(old, width), device=ids.device)
    whence = (steps[:width] + old - moved).clamp(max=old + rollout.completion_ids.shape[1] - 1)
    inside = steps[:width] < moved + rollout.completion_mask.sum(1, keepdim=True)
    prefix = steps[:width] < moved
    nothing = torch.zeros_like(ids)

    def completion(left: Tensor, right: Tensor) -> Tensor:
        both = torch.cat([left.to(right.dtype), right], 1).gather(1, whence)
        return both.masked_fill(~inside, 0)

    def prompt(values: Tensor) -> Tensor:
        values = values.gather(1, (steps[:old] - moved).clamp(min=0))
        return values.masked_fill(steps[:old] < moved, 0)

    changed = {
        "prompts": list(prompts),
        "prompt_ids": prompt(ids),
        "prompt_mask": prompt(rollout.prompt_mask),
        "completion_ids": completion(ids, rollout.completion_ids),
        "completion_mask": completion(rollout.prompt_mask, rollout.completion_mask),
        "response_mask": completion(nothing, rollout.response_mask),
        "prefix_mask": prefix,
        "ended": rollout.ended & (moved[:, 0] + rollout.completion_mask.sum(1) <= width),
    }
    for name in ("rollout_logp", "behaviour_logp", "coin"):
        changed[name] = completion(nothing, getattr(rollout, name))
    joined = type(rollout)(**(vars(rollout) | changed))
    return joined.select(torch.arange(num, device=ids.device))


@cache
def completions_of(path: str, prompt_field: str, field: str) -> dict[str, list[str]]:
    """The texts in `field` of a jsonl file, by the text of their prompt; read once."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path, 0), 1):
        if not all(isinstance(row.get(key), str) for key in (prompt_field, field)):
            raise RunError(
                f"{path}: row {number}: expected text in the fields {prompt_field!r} and "
                f"{field!r}; the row has {sorted(row)}"
            )
        found.setdefault(row[prompt_field], []).append(row[field])
    return found
