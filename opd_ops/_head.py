"""The head loop: chunks of rows through one workspace of bounded size, never [N, V].

What is differentiable by itself (`gather`) multiplies again in backward: four products. A loss
(`row_loss`, `full_loss`) computes its gradients in the forward call, from those of the logits of
each chunk, and multiplies them by the incoming scalar in backward: three products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_ops._autograd import (
    Rows,
    empty_rows,
    empty_topk,
    logp_gradient,
    no_double_backward,
    row_dtype,
    wanted,
)
from opd_ops._dispatch import LOADED
from opd_ops.reference import Look

_ALIGN = 64  # columns: rows of the workspace begin at aligned addresses
_WHOLE = 8  # on a GPU, products over any other number of columns take 3 to 9 times as long
_BLOCK = 2**24  # bytes of the pieces in which products are added to another type
_STACK = 4  # where gradients have a buffer of their own: of so many chunks of logits, at most
_TILE = 128  # there, chunks are of a multiple of so many rows: products waste less of their tiles


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of `hidden @ head.T`: that of the operands, or what autocast makes of them."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _has_float32_products(device: torch.device) -> bool:
    """Whether torch multiplies 16-bit operands into float32 there (`out_dtype`)."""
    return device.type == "cuda"


def _parts(valid: int, device: torch.device) -> list[slice]:
    """The columns in which products are made: on a GPU apart those beyond a multiple of 8."""
    whole = valid if device.type == "cpu" else valid - valid % _WHOLE
    return [part for part in (slice(0, whole), slice(whole, valid)) if part.start < part.stop]


def _multiply_to_float32(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. A wider `out` gets unrounded products where torch has them."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and _has_float32_products(a.device):
        _multiply_to_float32(a, b, out, add)
    else:
        for block in _blocks(out.shape[0], out.shape[1] * a.element_size()):
            part = torch.mm(a[block], b)
            if add:
                out[block] += part
            else:
                out[block] = part
    return out


def _blocks(num_rows: int, bytes_per_row: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, bytes_per_row))
    return [slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step)]


class _Product:
    """`hidden @ head[:valid].T`, some rows at a time, in one buffer that is used again.

    Where torch can, 16-bit operands give float32 logits; their gradient is rounded, once, into a
    buffer that holds those of several chunks: products with more rows are faster, and so is adding
    up fewer of them. On a CPU a head of another type is cast block by block: fresh memory for all
    of it costs more than a second cast. On a GPU products are made in `parts` of the columns;
    logits in one, where the head has the columns that fill it up.
    """

    def __init__(
        self, hidden: Tensor, head: Tensor, valid: int, dtype: torch.dtype, gradient: bool = False
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.valid, self.parts = valid, _parts(valid, hidden.device)
        self.blocks = self.logit_blocks = self.parts
        filled = -(-valid // _WHOLE) * _WHOLE
        if len(self.parts) > 1 and filled <= head.shape[0]:
            self.logit_blocks = [slice(0, filled)]
        self.head = head[: max(valid, self.logit_blocks[-1].stop)]
        if hidden.device.type != "cpu":
            self.head = self.head.to(dtype)
        elif head.dtype != dtype:
            self.blocks = self.logit_blocks = _blocks(valid, head.shape[1] * dtype.itemsize)
        wide = dtype.itemsize == 2 and _has_float32_products(hidden.device)
        self.kind = torch.float32 if wide else dtype  # of the logits
        self.columns = -(-valid // _ALIGN) * _ALIGN
        self.bytes_per_row = self.columns * self.kind.itemsize
        self.gradient_bytes_per_row = self.columns * dtype.itemsize if wide and gradient else 0

    def allocate(self, num_rows: int, stack: int) -> None:
        """Buffers for the logits of chunks of `num_rows` rows and the gradients of `stack` rows."""
        self.stack = stack
        self.buffer = self.hidden.new_empty(num_rows, self.columns, dtype=self.kind)
        self.gradients = self.buffer
        if self.gradient_bytes_per_row:
            self.gradients = self.hidden.new_empty(stack, self.columns, dtype=self.dtype)
        if self.hidden.device.type == "cpu":
            # with AMX a 16-bit product also reads these, and NaN times 0 is NaN
            self.gradients[:, self.valid :] = 0.0

    def logits(self, piece: slice) -> Tensor:
        """Those of a chunk; they are overwritten by the next one's."""
        hidden = self.hidden[piece].to(self.dtype)
        out = self.buffer[: hidden.shape[0]]
        for block in self.logit_blocks:
            _multiply(hidden, self.head[block].to(self.dtype).t(), out[:, block])
        return out[:, : self.valid]

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """The gradient of the hidden states from that of the logits."""
        total = out
        if len(self.blocks) > 1:  # added up in float32, rounded once
            total = torch.empty_like(out, dtype=row_dtype(out))
        for block in self.blocks:
            head, add = self.head[block].to(self.dtype), block.start > 0
            _multiply(gradient[:, block], head, total, add)
        if total is not out:
            out.copy_(total)

    def gradient(self, piece: slice) -> Tensor:
        """Where that of the logits of a chunk goes: over them, or rounded beside them."""
        first = piece.start % self.stack
        return self.gradients[first : first + piece.stop - piece.start, : self.valid]


def _chunks(num_rows: int, workspace_mib: float, *products: _Product | None) -> list[slice]:
    """Pieces of the rows whose logits fit the workspace, which the products share; one at least.

    Where gradients do not go over the logits, it also holds those of a stack of pieces: as few
    stacks as possible, then as few pieces, all of one size, since a short one costs a whole one.
    """
    used = [product for product in products if product is not None]
    logits = max(1, sum(product.bytes_per_row for product in used))
    gradients = sum(product.gradient_bytes_per_row for product in used)
    budget, most = int(workspace_mib * 2**20), max(1, num_rows)
    if gradients == 0:
        stack = step = max(1, min(most, budget // logits))
    else:
        for stacks, chunks in itertools.product(range(1, most + 1), range(1, _STACK + 1)):
            step = -(-most // (stacks * chunks))
            tile = _TILE if step >= 4 * _TILE else 1
            step = min(-(-step // tile) * tile, most)
            stack = min(chunks * step, most)
            if step * logits + stack * gradients <= budget:
                break
    for product in used:
        product.allocate(min(step, num_rows), stack)
    return [slice(at, min(at + step, num_rows)) for at in range(0, max(num_rows, 1), step)]


class _Gradients:
    """d loss / d hidden and d loss / d head of a loss over chunks of rows; None is not wanted.

    The head's is added up in float32, and stays so where there are several stacks of chunks. The
    first one is written, not added to zeros.
    """

    def __init__(self, product: _Product, head: Tensor, wanted: tuple[bool, bool]) -> None:
        self.product, self.num_rows = product, product.hidden.shape[0]
        self.hidden = product.hidden.new_empty(product.hidden.shape) if wanted[0] else None
        self.head: Tensor | None = None
        if wanted[1]:
            accumulator = row_dtype(head) if self.num_rows > product.stack else head.dtype
            self.head = head.new_empty(head.shape, dtype=accumulator)
            self.head[product.valid :] = 0.0

    def add(self, piece: slice) -> None:
        """A chunk, whose d loss / d logits has been written; multiplied where a stack is full."""
        product, stack = self.product, self.product.stack
        if piece.stop % stack and piece.stop < self.num_rows:
            return
        rows = slice(piece.start // stack * stack, piece.stop)
        gradient = product.gradient(rows)
        if self.hidden is not None:
            product.to_hidden(gradient, self.hidden[rows])
        if self.head is not None:
            hidden = product.hidden[rows].to(product.dtype)
            for part in product.parts:
                _multiply(gradient[:, part].t(), hidden, self.head[part], add=rows.start > 0)


def _or_empty(
    hidden: Tensor, head: Tensor | None, grad_hidden: Tensor | None, grad_head: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Registered ops return tensors of known types, empty ones for what is not wanted."""
    return (
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        hidden.new_empty(0) if head is None or grad_head is None else grad_head.to(head.dtype),
    )


# ==== three products: a loss with its gradients ====


class _Loss(torch.autograd.Function):
    """A loss whose gradients are there already: backward multiplies them by the incoming one."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        head: Tensor | None,
        grad_hidden: Tensor | None,
        grad_head: Tensor | None,
    ) -> Tensor:
        # not by save_for_backward: autograd takes a gradient as it is if nobody else holds it
        ctx.gradients = [grad_hidden, grad_head]
        ctx.types = [hidden.dtype, hidden.dtype if head is None else head.dtype]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss have been handed over; a second backward needs a "
                "second forward"
            )
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        hidden_type, head_type = ctx.types
        grad_hidden = _scaled(grad_hidden, grad, hidden_type)
        return None, grad_hidden, _scaled(grad_head, grad, head_type), None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`gradient * factor`, rounded once, over `gradient` if it has this type."""
    if gradient is None:
        return None
    if gradient.dtype == torch.float64:  # the CUDA ops do not take it
        return gradient.mul_(factor).to(dtype)
    out = gradient
    if out.dtype != dtype:
        out = gradient.new_empty(gradient.shape, dtype=dtype)
    torch.ops.opd_ops.scale_out(gradient, factor.float(), out)
    return out


def wants_gradients(hidden: Tensor, head: Tensor | None) -> tuple[bool, bool]:
    """Whether anybody asks for them: also a Function under `no_grad` needs the inputs' gradient."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and head is not None and head.requires_grad


def row_loss(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    valid: int,
    temperature: float,
    workspace_mib: float,
    look_at_ids: Look,
    *,
    tail: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of a loss of each row's log-probs at `ids` [N, K]; these log-probs; what was logged.

    `look_at_ids()` begins to look whether ids are in range; what it returns raises if not. A GPU
    looks after the first product, and is waited for when everything has been queued: ids out of
    range have a log-prob of NaN there.
    `function(piece, logp [n, K], tail_logp [n] or [0])` returns the losses [n] of a slice of rows
    and detached tensors [n, ...] by name. Autograd differentiates it.
    """
    needed = wants_gradients(hidden, head)
    done: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    with torch.no_grad():
        product = _Product(hidden, head, valid, product_dtype(hidden), any(needed))
        for piece in _chunks(hidden.shape[0], workspace_mib, product):
            logits, settings = product.logits(piece), (valid, temperature)
            if piece.start == 0:  # a GPU multiplies while the rest is prepared
                gradients, check_range = _Gradients(product, head, needed), look_at_ids()
            rows = Rows(*torch.ops.opd_ops.gather_logp(logits, ids[piece], *settings, False, tail))
            assert rows.logp is not None and rows.tail is not None
            leaves = [rows.logp, rows.tail] if tail else [rows.logp]
            grads: list[Tensor | None] = [None, None]
            with torch.set_grad_enabled(any(needed)):
                for leaf in leaves:
                    leaf.requires_grad_(any(needed))
                try:
                    losses, logged = function(piece, rows.logp, rows.tail)
                except Exception:
                    check_range()  # the reason, if it raises
                    raise
                if any(needed):
                    grads[: len(leaves)] = torch.autograd.grad(
                        losses, leaves, torch.ones_like(losses)
                    )
            done.append((losses.detach(), rows.logp.detach(), logged))
            if any(needed):
                outer = Rows(grads[0], None, None, grads[1], None, None)
                arguments, out = logp_gradient(ids[piece], rows, outer), product.gradient(piece)
                assert arguments is not None
                torch.ops.opd_ops.gather_logp_backward_out(
                    logits, ids[piece], *arguments, *settings, out
                )
                gradients.add(piece)
        loss = torch.cat([chunk[0] for chunk in done]).sum()  # the same for any number of chunks
        logp = torch.cat([chunk[1] for chunk in done])
        logged = {name: torch.cat([chunk[2][name] for chunk in done]) for name in done[0][2]}
        check_range()
    if any(needed):
        loss = _Loss.apply(loss, hidden, head, gradients.hidden, gradients.head)  # type: ignore[no-untyped-call]
    return loss, logp, logged


_KINDS = {"reverse": 0, "forward": 1, "jsd": 2}


def _full_rows(
    hidden: Tensor,
    head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    token_weight: Tensor | None,
    valid: int,
    temperature: float,
    kind: int,
    beta: float,
    dtype: torch.dtype,
    workspace_mib: float,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss [], divergences [N], gradients of hidden states (or logits) and head."""
    needed, student, teacher = (need_hidden, need_head), None, None
    if head is not None:
        student = _Product(hidden, head, valid, dtype, any(needed))
    if teacher_head is not None:  # never lowered: what a frozen model says is a constant
        teacher = _Product(teacher_hidden, teacher_head, valid, teacher_hidden.dtype)
    pieces = _chunks(hidden.shape[0], workspace_mib, student, teacher)
    weight = hidden.new_ones(hidden.shape[0]) if token_weight is None else token_weight
    weight = weight.to(row_dtype(hidden))
    values, gradients, grad_logits = [], None, None
    if student is not None and head is not None:
        gradients = _Gradients(student, head, needed)
    elif need_hidden:  # the hidden states are logits
        grad_logits = hidden.new_empty(hidden.shape)
    for piece in pieces:
        near = hidden[piece] if student is None else student.logits(piece)
        far = teacher_hidden[piece] if teacher is None else teacher.logits(piece)
        if (near.dtype == torch.float64) != (far.dtype == torch.float64):
            far = far.to(row_dtype(near))  # other types may be mixed
        settings = (valid, temperature, kind, beta)
        value, stats = torch.ops.opd_ops.full_kl(near, far, *settings)
        values.append(value)
        if any(needed):
            if student is not None:
                out = student.gradient(piece)
            else:
                assert grad_logits is not None
                out = grad_logits[piece]
            torch.ops.opd_ops.full_kl_backward_out(near, far, stats, weight[piece], *settings, out)
            if gradients is not None:
                gradients.add(piece)
    result = torch.cat(values)
    loss = (weight * result.masked_fill(weight == 0, 0.0)).sum()
    if gradients is not None:
        return loss, result, gradients.hidden, gradients.head
    return loss, result, grad_logits, None


def full_loss(
    hidden: Tensor,
    head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    token_weight: Tensor | None,
    valid: int,
    temperature: float,
    divergence: str,
    beta: float,
    workspace_mib: float,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the divergences of student and teacher, and the divergences [N]."""
    needed = wants_gradients(hidden, head)
    dtype = hidden.dtype if head is None else product_dtype(hidden)
    operands = (hidden, head, teacher_hidden, teacher_head, token_weight)
    arguments: list[Any] = [None if each is None else each.detach() for each in operands]
    arguments += [valid, temperature, _KINDS[divergence], beta, dtype, workspace_mib, *needed]
    if torch.compiler.is_compiling():  # as one op, whose results have the types of its arguments
        loss, values, *gradients = torch.ops.opd_ops.linear_full_kl(*arguments)
        kept = [each if need else None for each, need in zip(gradients, needed)]
        del gradients
    else:
        with torch.no_grad():
            loss, values, *kept = _full_rows(*arguments)
    if any(needed):
        loss = _Loss.apply(loss, hidden, head, *kept)  # type: ignore[no-untyped-call]
    return loss, values


# ==== ops ====


def gather(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    valid: int,
    temperature: float,
    workspace_mib: float,
    *,
    entropy: bool = False,
    tail: bool = False,
) -> Rows:
    """Differentiable log-probs and statistics of rows; an id of -1 gives -inf."""
    settings = (ids, valid, temperature, entropy, tail)
    if head is None:
        return Rows(*torch.ops.opd_ops.gather_logp(hidden, *settings))
    dtype = product_dtype(hidden)
    return Rows(
        *torch.ops.opd_ops.linear_gather_logp(hidden, head, *settings, dtype, workspace_mib)
    )


def _register() -> None:
    op = functools.partial(torch.library.custom_op, mutates_args=())

    @op("opd_ops::linear_gather_logp")
    def linear_gather_logp(
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        valid: int,
        temperature: float,
        with_entropy: bool,
        with_tail: bool,
        dtype: torch.dtype,
        workspace_mib: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        product = _Product(hidden, head, valid, dtype)
        chunks = [
            torch.ops.opd_ops.gather_logp(
                product.logits(piece), ids[piece], valid, temperature, with_entropy, with_tail
            )
            for piece in _chunks(hidden.shape[0], workspace_mib, product)
        ]
        a, b, c, d, e, f = (torch.cat(part) for part in zip(*chunks))
        return a, b, c, d, e, f

    @linear_gather_logp.register_fake
    def _(hidden: Tensor, head: Tensor, ids: Tensor, *settings: Any) -> Any:
        return tuple(empty_rows(hidden, ids, *settings[2:4]))

    @op("opd_ops::linear_gather_logp_backward")
    def linear_gather_logp_backward(
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        grad: Tensor,
        stats: Tensor,
        dense: Tensor,
        slope: Tensor | None,
        tail_stats: Tensor | None,
        tail_dense: Tensor | None,
        valid: int,
        temperature: float,
        dtype: torch.dtype,
        workspace_mib: float,
        need_hidden: bool,
        need_head: bool,
    ) -> tuple[Tensor, Tensor]:
        product = _Product(hidden, head, valid, dtype, gradient=True)
        pieces = _chunks(hidden.shape[0], workspace_mib, product)
        gradients = _Gradients(product, head, (need_hidden, need_head))
        arguments = (ids, grad, stats, dense, slope, tail_stats, tail_dense)
        for piece in pieces:
            logits = product.logits(piece)
            parts = (None if argument is None else argument[piece] for argument in arguments)
            out = product.gradient(piece)
            torch.ops.opd_ops.gather_logp_backward_out(logits, *parts, valid, temperature, out)
            gradients.add(piece)
        return _or_empty(hidden, head, gradients.hidden, gradients.head)

    @linear_gather_logp_backward.register_fake
    def _(hidden: Tensor, head: Tensor, *args: Any) -> Any:
        return _fake_gradients(hidden, head, *args[-2:])

    def gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, head, ids, valid, temperature, *ctx.asked, dtype, workspace_mib = inputs
        ctx.settings = (valid, temperature, dtype, workspace_mib)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, ids, *output)

    def gather_backward(ctx: Any, *grads: Any) -> Any:
        hidden, head, ids, *outputs = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        gradient = logp_gradient(ids, Rows(*outputs), wanted(grads, *ctx.asked))
        if gradient is None or not any(need):
            return (None,) * 9
        grad_hidden, grad_head = torch.ops.opd_ops.linear_gather_logp_backward(
            hidden, head, ids, *gradient, *ctx.settings, *need
        )
        return (grad_hidden if need[0] else None, grad_head if need[1] else None, *(None,) * 7)

    linear_gather_logp.register_autograd(gather_backward, setup_context=gather_setup)
    no_double_backward("opd_ops::linear_gather_logp_backward")

    @op("opd_ops::linear_topk_logp")
    def linear_topk_logp(
        hidden: Tensor,
        head: Tensor,
        k: int,
        token_ids: Tensor | None,
        valid: int,
        temperature: float,
        dtype: torch.dtype,
        workspace_mib: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        product = _Product(hidden, head, valid, dtype)
        chunks = [
            torch.ops.opd_ops.topk_logp(
                product.logits(piece),
                k,
                None if token_ids is None else token_ids[piece],
                valid,
                temperature,
            )
            for piece in _chunks(hidden.shape[0], workspace_mib, product)
        ]
        a, b, c, d, e = (torch.cat(part) for part in zip(*chunks))
        return a, b, c, d, e

    @linear_topk_logp.register_fake
    def _(hidden: Tensor, head: Tensor, k: int, token_ids: Tensor | None, *settings: Any) -> Any:
        return empty_topk(hidden, k, token_ids)

    @op(
        "opd_ops::linear_full_kl",
        schema="(Tensor hidden, Tensor? head, Tensor teacher_hidden, Tensor? teacher_head, "
        "Tensor? token_weight, int valid, float temperature, int kind, float beta, "
        "ScalarType dtype, float workspace_mib, bool need_hidden, bool need_head) -> "
        "(Tensor loss, Tensor values, Tensor grad_hidden, Tensor grad_head)",
    )
    def linear_full_kl(hidden: Tensor, head: Tensor | None, *arguments: Any) -> Any:
        loss, values, *gradients = _full_rows(hidden, head, *arguments)
        return loss, values, *_or_empty(hidden, head, *gradients)

    @linear_full_kl.register_fake
    def _(hidden: Tensor, head: Tensor | None, *args: Any) -> Any:
        dtype, rows = row_dtype(hidden), hidden.shape[0]
        return (
            hidden.new_empty((), dtype=dtype),
            hidden.new_empty(rows, dtype=dtype),
            *_fake_gradients(hidden, head, *args[-2:]),
        )


def _fake_gradients(
    hidden: Tensor, head: Tensor | None, need_hidden: bool, need_head: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(0) if head is None or not need_head else head.new_empty(head.shape),
    )


if LOADED:
    _register()
