"""Moving rollouts about: padding, rows and columns, never a value.

A method file declares its `Rollout` with `shaped`: every tensor says its shape in the dimensions
B rollouts, P prompt tokens (left-padded), T completion tokens (right-padded). What a method adds
stands in `extra`, [B] or [B, T] each. Names that are used here are those of the prompts, of the
masks, and of what the sampler writes; no method's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from opd_run import ranks


def shaped(shape: str, dtype: torch.dtype = torch.float32) -> Any:
    """A field of a `Rollout`: a tensor of this shape (such as "BT") and type."""
    return field(metadata={"shape": shape, "dtype": dtype})


def blank(kind: type, prompts: Sequence[Any], width: int, device: torch.device) -> Any:
    """A rollout of `kind` with its prompts in place and everything else zero.

    Args:
        prompts: with attribute `ids`.  width: T, columns of the completions.
    """
    prompt_ids, prompt_mask = left_padded([prompt.ids for prompt in prompts], device)
    sizes = {"B": len(prompts), "P": prompt_ids.shape[1], "T": width}
    made: dict[str, Any] = {"prompts": list(prompts)}
    for each in fields(kind):
        if "shape" in each.metadata:
            shape = [sizes[dimension] for dimension in each.metadata["shape"]]
            made[each.name] = torch.zeros(shape, dtype=each.metadata["dtype"], device=device)
    return kind(**made | {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask})


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] int64, zeros before each row, and the mask [B, P] of what is no padding."""
    ids, mask = right_padded([row[::-1] for row in rows], max(map(len, rows)), device)
    return ids.flip(1), mask.flip(1)


def right_padded(
    rows: Sequence[Sequence[int]], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [B, `width`] int64, zeros after each row, and the mask of what is no padding."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    ids[mask] = torch.tensor([each for row in rows for each in row], dtype=torch.int64)
    return ids.to(device), mask.to(device)


def scattered(values: Any, mask: Tensor) -> Any:
    """Tensors [N, ...] of the N tokens of `mask` [B, T], in tuples or dicts, as [B, T, ...], zero
    elsewhere; a sum [] stays as it is. Differentiable."""

    def of_one(each: Tensor) -> Tensor:
        if each.dim() == 0:
            return each
        each = each.to(mask.device)
        return each.new_zeros(*mask.shape, *each.shape[1:]).index_put((mask,), each)

    return tree_map(of_one, values)


def begun(rollout: Any, row: int, role: str) -> tuple[int, ...]:
    """What a model goes on from: the prompt as its role reads it, and the completion's prefix."""
    prefix = rollout.completion_ids[row][rollout.prefix_mask[row]]
    ids: tuple[int, ...] = (*rollout.prompts[row].read_by(role), *prefix.tolist())
    return ids


def _drawn(rollout: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the sampler draws of each token, [B, T] each, in its order."""
    return rollout.completion_ids, rollout.rollout_logp, rollout.behaviour_logp


def record(
    rollout: Any, rows: Tensor, column: Tensor, drawn: Sequence[tuple[Tensor, ...]], stop: Tensor
) -> None:
    """Write tokens that were drawn one after another into some of the rollouts, in place.

    Args:
        rows: [n].  column: [n], where the first token of each goes.  stop: [S], ids that end one.
        drawn: (whether this row's token counts, token, rollout_logp, behaviour_logp), [n] each.
    """
    counts, *values = (torch.stack(each, 1) for each in zip(*drawn))  # [n, tokens]
    columns = column[:, None] + torch.arange(len(drawn), device=column.device)
    where = rows[:, None].expand_as(counts)[counts], columns[counts]
    rollout.completion_mask[where] = True
    for grid, value in zip(_drawn(rollout), values):
        grid[where] = value[counts]
    rollout.ended[rows] |= (torch.isin(values[0], stop) & counts).any(1)


def clear(rollout: Any, rows: Tensor) -> None:
    """Forget what was sampled of some rollouts, in place: their prompts and prefixes are left."""
    prefix = rollout.prefix_mask[rows]
    rollout.completion_mask[rows], rollout.ended[rows] = prefix, False
    for values in _drawn(rollout):
        values[rows] = values[rows].masked_fill(~prefix, 0)  # NaN, too


def select(rollout: Any, rows: Tensor) -> Any:
    """Some of the rollouts, without padding that they do not need."""
    left = int((~rollout.prompt_mask[rows]).sum(1).min())
    width = int(rollout.completion_mask[rows].sum(1).max())

    def cut(value: Tensor, shape: str) -> Tensor:
        value = value[rows]
        return value[:, left:] if shape == "BP" else value[:, :width] if shape == "BT" else value

    return _changed(rollout, [rollout.prompts[row] for row in rows.tolist()], cut)


def gather(rollout: Any) -> Any:
    """The rollout with every rank's share of the rows (`ranks.share`) as that rank has it."""
    if ranks.world() == 1:
        return rollout
    share = ranks.share(len(rollout.prompts))
    parts = ranks.gather({name: value[share].cpu() for name, value, _ in _tensors(rollout)})
    joined = iter([torch.cat([part[name] for part in parts]) for name in parts[0]])
    return _changed(rollout, rollout.prompts, lambda value, shape: next(joined).to(value.device))


def idle(rollout: Any, row: int) -> Any:
    """One of the rollouts with nothing to train: for a rank that has run out of work."""
    one = select(rollout, torch.tensor([row]))
    one.response_mask = torch.zeros_like(one.response_mask)
    one.prefix_mask = torch.zeros_like(one.prefix_mask)
    return one


def join(rollouts: Sequence[Any]) -> Any:
    """One rollout with the rows of all, padded to the longest; `extra` has to have the same names.

    Raises:
        ValueError: it has not.
    """
    names = [[name for name, _, _ in _tensors(each)] for each in rollouts]
    if any(each != names[0] for each in names):
        raise ValueError(f"rollouts with unlike tensors cannot be joined: {names}")
    length = max(each.prompt_ids.shape[1] for each in rollouts)
    width = max(each.completion_ids.shape[1] for each in rollouts)
    device = rollouts[0].completion_ids.device

    def padded(value: Tensor, shape: str) -> Tensor:
        by = {"BP": (length - value.shape[-1], 0), "BT": (0, width - value.shape[-1])}
        return (F.pad(value, by[shape]) if shape in by else value).to(device)

    parts = zip(*([padded(value, s) for _, value, s in _tensors(each)] for each in rollouts))
    joined = iter([torch.cat(values) for values in parts])
    prompts = [prompt for each in rollouts for prompt in each.prompts]
    return _changed(rollouts[0], prompts, lambda value, shape: next(joined))


def cut(rollout: Any, scores: dict[str, Any], size: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Pieces of `size` rollouts with their scores: tensors [B, T, ...], anything else is kept."""
    for rows in torch.split(torch.arange(len(rollout.prompts)), size):
        part = select(rollout, rows)
        width = part.completion_ids.shape[1]
        yield (
            part,
            {
                name: value[rows.to(value.device)][:, :width] if torch.is_tensor(value) else value
                for name, value in scores.items()
            },
        )


def pack(rollout: Any, most_tokens: int) -> tuple[list[list[int]], int, int]:
    """Rows of this process, in groups of like length: a micro-batch each.

    A group grows while it has at most `most_tokens`, padding included, and at most a tenth of it is
    padding. Prompts and completions are both padded to the longest of the group.

    Returns:
        The groups of this process; how many groups the process with the most has; the shortest row,
        for a process that has fewer (`idle`).
    """
    longest = torch.tensor([prompt.longest for prompt in rollout.prompts])
    prompts = rollout.prompt_mask.sum(1).cpu().maximum(longest)
    sizes = torch.stack([prompts, rollout.completion_mask.sum(1).cpu()], 1)
    order = sizes.sum(1).argsort(descending=True, stable=True).tolist()
    shares = [
        _groups(order[process :: ranks.world()], sizes, most_tokens)
        for process in range(ranks.world())
    ]
    return shares[ranks.rank()], max(map(len, shares)), order[-1]


def _groups(order: Sequence[int], sizes: Tensor, most_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    width, num_tokens = torch.zeros(2, dtype=torch.int64), 0
    for row in order:
        wider, more = width.maximum(sizes[row]), num_tokens + int(sizes[row].sum())
        padded = int(wider.sum()) * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > most_tokens or padded - more > 0.1 * padded:
            groups.append([])
            wider, more = sizes[row], int(sizes[row].sum())
        groups[-1].append(row)
        width, num_tokens = wider, more
    return groups


def by_teacher(
    models: dict[str, Any], rollout: Any, names: Sequence[str]
) -> Iterator[tuple[Any, list[int], Any]]:
    """Each teacher with its rollouts: which rows they are, and these rollouts.

    All ranks have to use a sharded model together, the student too, with which a teacher is
    compared: a teacher without rows then gets a rollout with nothing to train.

    Args:
        models: those named `teacher` or `teacher/NAME` are the teachers.
        names: of each rollout, the name of the model that is its teacher.
    """
    in_step = any(ranks.sharded(model) for model in models.values())
    for name, model in models.items():
        rows = [row for row, of_row in enumerate(names) if of_row == name]
        if rows:
            yield model, rows, select(rollout, torch.tensor(rows))
        elif in_step and name.partition("/")[0] == "teacher":
            yield model, rows, idle(rollout, 0)


def _tensors(rollout: Any) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor of a rollout, with its name and shape."""
    for each in fields(rollout):
        if "shape" in each.metadata:
            yield each.name, getattr(rollout, each.name), each.metadata["shape"]
    for name, value in rollout.extra.items():
        yield f"extra/{name}", value, "BT"[: value.dim()]


def _changed(rollout: Any, prompts: Sequence[Any], change: Callable[[Tensor, str], Tensor]) -> Any:
    """A rollout of other `prompts`, every tensor replaced by `change(tensor, shape)`."""
    made = {name: change(value, shape) for name, value, shape in _tensors(rollout)}
    own = {name: value for name, value in made.items() if "/" not in name}
    extra = {name: made[f"extra/{name}"] for name in rollout.extra}
    return type(rollout)(prompts=list(prompts), **own, extra=extra)
