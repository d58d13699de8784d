"""The names and tuples that the ops had until version 0.1. To be deleted with their last caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_ops._ops import full_kl, gather_logp, support_kl, token_logp, topk_logp


class _Rows(torch.autograd.Function):
    """Divergences [N] whose sum is to be trained: all rows must get the same gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not bool((grad == grad[:1]).all()):
            raise RuntimeError("rows of different weight: use token_weight of the op's new name")
        return grad[:1].sum(), None


def _rows(found: Any) -> Tensor:
    rows: Tensor = _Rows.apply(found.loss, found.values)  # type: ignore[no-untyped-call]
    return rows


def linear_token_logp(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """logp, lse, and the entropy where asked for."""
    return tuple(each for each in token_logp(*args, **kwargs) if each is not None)


def linear_topk_logp(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Four tensors; with `token_ids` also token_logp and, in place of the rank, None."""
    found = topk_logp(*args, **kwargs)
    return tuple(found[:4]) if found.token_logp is None else (*found, None)


def linear_gather_logp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """logp, lse."""
    logp, lse = gather_logp(*args, **kwargs)
    return logp, lse


def linear_support_kl(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The divergences [N], for losses that are their sum."""
    return _rows(support_kl(*args, **kwargs)), None


def linear_full_kl(*args: Any, **kwargs: Any) -> Tensor:
    """The divergences [N], for losses that are their sum."""
    return _rows(full_kl(*args, **kwargs))
