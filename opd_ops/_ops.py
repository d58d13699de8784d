"""The public ops where something compiled runs. What they are is written in `opd_ops.reference`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from opd_ops import _head, reference
from opd_ops._autograd import some_logits
from opd_ops._dispatch import compiled
from opd_ops.reference import (
    Divergence,
    FullKL,
    GatedKL,
    GatherLogp,
    LossOf,
    SupportKL,
    Tail,
    TokenLogp,
    TopK,
)

_F = TypeVar("_F", bound=Callable[..., Any])


def _op(function: _F) -> _F:
    """Documentation from the op of the same name in `reference`, which runs if nothing else can."""
    name = function.__name__
    plain = getattr(reference, name)

    @functools.wraps(function)
    def op(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not compiled(name, hidden):
            return plain(hidden, *args, **kwargs)
        if not torch.compiler.is_compiling():
            _check_no_tangent(name, (hidden, *args, *kwargs.values()))
        return function(hidden, *args, **kwargs)

    op.__doc__ = plain.__doc__
    return cast(_F, op)


def _check_no_tangent(name: str, values: Sequence[Any]) -> None:
    """Compiled ops have no forward mode: torch would take their derivative for 0."""
    if forward_ad._current_level < 0:
        return
    inner = [each for value in values if isinstance(value, (list, tuple)) for each in value]
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    for value in (*values, *inner):
        if isinstance(value, Tensor) and unpack(value).tangent is not None:
            raise NotImplementedError(
                f"{name}: no forward-mode derivative (torch.func.jvp); OPD_OPS_IMPL=plain has one"
            )


def _checked(
    hidden: Tensor,
    head: Tensor | None,
    valid_vocab: int | None,
    temperature: float,
    workspace_mib: float | None,
) -> tuple[int, float, float]:
    """Number of ids that count, temperature, workspace."""
    valid = reference._check_product(hidden, head, valid_vocab, temperature)
    return valid, float(temperature), reference._workspace(workspace_mib, hidden.device)


@_op
def token_logp(
    hidden: Tensor,
    head: Tensor | None,
    token_ids: Tensor,
    *,
    with_entropy: bool = False,
    check_ids: bool = True,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> TokenLogp:
    settings = _checked(hidden, head, valid_vocab, temperature, workspace_mib)
    reference._check_ids("token_ids", token_ids, hidden.shape[:1], hidden, settings[0], check_ids)
    rows = _head.gather(hidden, head, token_ids[:, None], *settings, entropy=with_entropy)
    assert rows.logp is not None and rows.lse is not None
    return TokenLogp(rows.logp[:, 0], rows.lse, rows.entropy if with_entropy else None)


@_op
def topk_logp(
    hidden: Tensor,
    head: Tensor | None,
    k: int,
    *,
    token_ids: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> TopK:
    settings = _checked(hidden, head, valid_vocab, temperature, workspace_mib)
    valid, temperature, num_mib = settings
    reference._check_k(k, valid)
    if token_ids is not None:
        reference._check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, valid)
    if not compiled("topk_logp", hidden, k):
        return reference.topk_logp(
            hidden,
            head,
            k,
            token_ids=token_ids,
            valid_vocab=valid,
            temperature=temperature,
            workspace_mib=num_mib,
        )
    hidden, arguments = hidden.detach(), (k, token_ids, valid, temperature)
    if head is None:
        outputs = torch.ops.opd_ops.topk_logp(hidden, *arguments)
    else:
        dtype = _head.product_dtype(hidden)
        outputs = torch.ops.opd_ops.linear_topk_logp(
            hidden, head.detach(), *arguments, dtype, num_mib
        )
    ids, logp, lse, tail_logp, found = outputs
    return TopK(ids, logp, lse, tail_logp, None if token_ids is None else found)


@_op
def gather_logp(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> GatherLogp:
    settings = _checked(hidden, head, valid_vocab, temperature, workspace_mib)
    reference._check_id_rows("ids", ids, hidden, settings[0])
    rows = _head.gather(hidden, head, ids, *settings)
    assert rows.logp is not None and rows.lse is not None
    return GatherLogp(rows.logp, rows.lse)


@_op
def support_kl(
    hidden: Tensor,
    head: Tensor | None,
    support_ids: Tensor,
    teacher_logp: Tensor,
    *,
    token_weight: Tensor | None = None,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    renormalise: bool = True,
    tail: Tail = "none",
    teacher_tail_logp: Tensor | None = None,
    support_mask: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> SupportKL:
    settings = _checked(hidden, head, valid_vocab, temperature, workspace_mib)
    ids, look_at_ids = reference._check_support(
        support_ids,
        teacher_logp,
        hidden,
        settings[0],
        divergence,
        beta,
        renormalise,
        tail,
        teacher_tail_logp,
        support_mask,
        token_weight,
    )
    if support_mask is not None:
        ids = ids.masked_fill(~support_mask, -1)  # of entries that do not exist
    bucket = tail == "bucket"

    def divergences(piece: slice, student: Tensor, student_tail: Tensor | None) -> Tensor:
        return reference._support_divergence(
            student,
            teacher_logp[piece],
            None if support_mask is None else support_mask[piece],
            renormalise,
            student_tail if bucket else None,
            None if teacher_tail_logp is None else teacher_tail_logp[piece],
            divergence,
            beta,
        )

    def losses(
        piece: slice, student: Tensor, student_tail: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = divergences(piece, student, student_tail)
        weight = None if token_weight is None else token_weight[piece]
        return reference._weighted(values, weight), {"values": values.detach()}

    if not renormalise and head is not None and not torch.compiler.is_compiling():
        loss, _, logged = _head.row_loss(
            hidden, head, ids, losses, *settings, look_at_ids, tail=bucket
        )
        return SupportKL(loss, logged["values"])
    look_at_ids()()
    everything = slice(0, hidden.shape[0])
    if renormalise:
        values = divergences(everything, some_logits(hidden, head, ids, settings[1]), None)
    else:
        rows = _head.gather(hidden, head, ids, *settings, tail=bucket)
        assert rows.logp is not None
        values = divergences(everything, rows.logp, rows.tail)
    return SupportKL(reference._weighted(values, token_weight).sum(), values.detach())


@_op
def gated_kl(
    hidden: Tensor,
    head: Tensor | None,
    token_ids: Tensor,
    loss_of: LossOf,
    values: Sequence[Tensor] = (),
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> GatedKL:
    settings = _checked(hidden, head, valid_vocab, temperature, workspace_mib)
    look_at_ids = reference._check_gated(token_ids, loss_of, values, hidden, settings[0])
    ids = token_ids if token_ids.dim() == 2 else token_ids[:, None]
    if head is None or torch.compiler.is_compiling():
        look_at_ids()()
        rows = _head.gather(hidden, head, ids, *settings)
        assert rows.logp is not None
        return reference._gated(rows.logp.view(token_ids.shape), loss_of, values)
    constants = [value.detach() for value in values]

    def losses(piece: slice, logp: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        student_logp = logp.view(token_ids[piece].shape)
        return reference._call_loss(loss_of, student_logp, [value[piece] for value in constants])

    loss, logp, logged = _head.row_loss(hidden, head, ids, losses, *settings, look_at_ids)
    return GatedKL(loss, logp.view(token_ids.shape), logged)


@_op
def full_kl(
    hidden: Tensor,
    head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    *,
    token_weight: Tensor | None = None,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> FullKL:
    valid = reference._check_full(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        token_weight,
        divergence,
        beta,
        valid_vocab,
        temperature,
    )
    num_mib = reference._workspace(workspace_mib, hidden.device)
    operands = (hidden, head, teacher_hidden, teacher_head, token_weight)
    settings = (valid, float(temperature), divergence, float(beta), num_mib)
    return FullKL(*_head.full_loss(*operands, *settings))
