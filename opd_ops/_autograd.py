"""Row ops: shapes for `torch.compile`, and gradients of the kernels of csrc/bindings.cpp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from opd_ops._dispatch import LOADED

_F = TypeVar("_F", bound=Callable[..., Any])


class Rows(NamedTuple):
    """What gather_logp returns (empty tensors for what was not asked for), or its gradients."""

    logp: Tensor | None  # [N, K]; -inf where the id is -1
    lse: Tensor | None  # [N]
    entropy: Tensor | None  # [N] or [0]
    tail: Tensor | None  # [N] or [0]: log of the mass outside the ids
    stats: Tensor | None  # [N, 2]: shift and log_sum of the row
    tail_stats: Tensor | None  # [N, 2] or [0, 2]: the same of the complement of the ids


Gradient = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def row_dtype(logits: Tensor) -> torch.dtype:
    """The type of what belongs to a row."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def empty_rows(logits: Tensor, ids: Tensor, with_entropy: bool, with_tail: bool) -> Rows:
    """Shapes and dtypes of gather_logp."""
    rows, like = ids.shape[0], functools.partial(ids.new_empty, dtype=row_dtype(logits))
    tails = rows if with_tail else 0
    return Rows(
        like(ids.shape),
        like(rows),
        like(rows if with_entropy else 0),
        like(tails),
        like(rows, 2),
        like(tails, 2),
    )


def empty_topk(like: Tensor, k: int, token_ids: Tensor | None) -> tuple[Tensor, ...]:
    """Shapes and dtypes of topk_logp."""
    rows, dtype = like.shape[0], row_dtype(like)
    return (
        like.new_empty(rows, k, dtype=torch.int64),
        like.new_empty(rows, k, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(0 if token_ids is None else rows, dtype=dtype),
    )


def wanted(grads: tuple[Any, ...], with_entropy: bool, with_tail: bool) -> Rows:
    """Gradients of outputs that were not asked for do not count."""
    logp, lse, entropy, tail, *_ = grads
    return Rows(
        logp, lse, entropy if with_entropy else None, tail if with_tail else None, None, None
    )


def logp_gradient(ids: Tensor, outputs: Rows, grads: Rows) -> Gradient | None:
    """The arguments of gather_logp_backward (csrc/cpu/kernels.h: ScatterRow) from the gradients of

    logp_k = z_k - lse   scatter(g) - (sum of g) p
    lse                  g p
    entropy              -g p (logp + entropy)
    tail_logp            g (p given the complement of the ids) - g p
    """
    if grads.logp is None and grads.lse is None and grads.entropy is None and grads.tail is None:
        return None
    stats, entropy, tail = outputs.stats, outputs.entropy, outputs.tail
    assert stats is not None and entropy is not None and tail is not None
    grad = stats.new_zeros(ids.shape) if grads.logp is None else grads.logp
    total = grad[:, 0] if grad.shape[1] == 1 else grad.sum(-1)
    dense, slope, tail_stats, tail_dense = -total, None, None, None
    if grads.lse is not None:
        dense = dense + grads.lse
    if grads.entropy is not None:
        dense, slope = dense - grads.entropy * entropy, -grads.entropy
    if grads.tail is not None:
        grad_tail = grads.tail.masked_fill(tail == -torch.inf, 0.0)
        dense = dense - grad_tail
        tail_stats, tail_dense = outputs.tail_stats, grad_tail + dense * tail.exp()
    return grad, stats, dense, slope, tail_stats, tail_dense


def no_double_backward(name: str) -> None:
    """A second derivative through this op raises."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: double backward is not implemented; use opd_ops.reference")

    torch.library.register_autograd(name, backward, setup_context=setup)


def _fake(name: str) -> Callable[[_F], _F]:
    """Shapes and dtypes of an op for `torch.compile`."""
    decorator: Callable[[_F], _F] = torch.library.register_fake(name)
    return decorator


def _register() -> None:

    @_fake("opd_ops::gather_logp")
    def _(logits: Tensor, ids: Tensor, valid: int, temperature: float, *asked: bool) -> Any:
        return tuple(empty_rows(logits, ids, *asked))

    def gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
        logits, ids, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, ids, *output)

    def gather_backward(ctx: Any, *grads: Any) -> Any:
        logits, ids, *outputs = ctx.saved_tensors
        valid, temperature, *asked = ctx.settings
        gradient = logp_gradient(ids, Rows(*outputs), wanted(grads, *asked))
        if gradient is None:
            return (None,) * 6
        result = torch.ops.opd_ops.gather_logp_backward(logits, ids, *gradient, valid, temperature)
        return result, None, None, None, None, None

    torch.library.register_autograd(
        "opd_ops::gather_logp", gather_backward, setup_context=gather_setup
    )
    no_double_backward("opd_ops::gather_logp_backward")

    @_fake("opd_ops::gather_logp_backward")
    def _(logits: Tensor, *args: Any) -> Tensor:
        return logits.new_empty(logits.shape)

    @_fake("opd_ops::topk_logp")
    def _(logits: Tensor, k: int, token_ids: Tensor | None, *settings: Any) -> Any:
        return empty_topk(logits, k, token_ids)

    @_fake("opd_ops::gather_linear")
    def _(hidden: Tensor, head: Tensor, ids: Tensor, scale: float) -> Tensor:
        return hidden.new_empty(ids.shape, dtype=row_dtype(hidden))

    @_fake("opd_ops::gather_linear_backward_hidden")
    def _(hidden: Tensor, *args: Any) -> Tensor:
        return hidden.new_empty(hidden.shape)

    @_fake("opd_ops::full_kl")
    def _(student: Tensor, *args: Any) -> Any:
        rows, dtype = student.shape[0], row_dtype(student)
        return student.new_empty(rows, dtype=dtype), student.new_empty(rows, 5, dtype=dtype)

    for name in (
        "gather_logp_backward_out",
        "gather_linear_backward_head_",
        "full_kl_backward_out",
        "scale_out",
    ):
        _fake(f"opd_ops::{name}")(lambda *args: None)


if LOADED:
    _register()


# ==== K logits per row ====


class _GatherLogits(torch.autograd.Function):
    """logits.gather(1, ids) / temperature in full precision; ids of -1 give 0.

    The gradient is rounded once, after repeated ids have added up.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(logits, ids)
        values = logits.gather(1, ids.clamp_min(0)).to(row_dtype(logits)) / temperature
        return values.masked_fill(ids < 0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, ids = ctx.saved_tensors
        zeros = grad.new_zeros(ids.shape[0], 2)  # no softmax: zero but for the ids
        arguments = ids, grad, zeros, zeros[:, 0], None, None, None
        result = torch.ops.opd_ops.gather_logp_backward(
            logits, *arguments, logits.shape[1], ctx.temperature
        )
        return result, None, None


class _GatherLinear(torch.autograd.Function):
    """<hidden[n], head[ids[n, k]]> * scale."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(hidden, head, ids)
        ctx.scale = scale
        logits: Tensor = torch.ops.opd_ops.gather_linear(hidden, head, ids, scale)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, head, ids = ctx.saved_tensors
        grad, ops, grad_hidden, grad_head = grad * ctx.scale, torch.ops.opd_ops, None, None
        if ctx.needs_input_grad[0]:
            grad_hidden = ops.gather_linear_backward_hidden(hidden, head, ids, grad)
        if ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head)
            ops.gather_linear_backward_head_(grad_head, hidden, ids, grad)
        return grad_hidden, grad_head, None, None


def some_logits(hidden: Tensor, head: Tensor | None, ids: Tensor, temperature: float) -> Tensor:
    """Logits / temperature at ids [N, K], of K rows of the head or of given logits."""
    result: Tensor
    if head is None:
        result = _GatherLogits.apply(hidden, ids, temperature)  # type: ignore[no-untyped-call]
    else:
        result = _GatherLinear.apply(hidden, head, ids.clamp_min(0), 1.0 / temperature)  # type: ignore[no-untyped-call]
    return result
