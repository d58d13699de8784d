"""The public ops: choice of the implementation, argument checks, autograd and fake kernels.

The documentation of each op is in `opd_ops.reference`. The compiled library registers row kernels
with torch (csrc/bindings.cpp); here they get gradients, shapes for `torch.compile`, and the loop
over chunks of rows that turns them into `linear_*` ops.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from opd_ops import reference
from opd_ops.reference import Divergence, GradHead, Tail

__all__ = [
    "full_kl",
    "gated_kl",
    "gather_logp",
    "info",
    "linear_full_kl",
    "linear_gated_kl",
    "linear_gather_logits",
    "linear_gather_logp",
    "linear_support_kl",
    "linear_token_logp",
    "linear_topk_logp",
    "support_kl",
    "token_logp",
    "topk_logp",
]


# ==== which implementation ====

_IMPL = os.environ.get("OPD_OPS_IMPL", "auto")
_REQUIRED = os.environ.get("OPD_OPS_REQUIRE", "")
_LIBRARY = Path(__file__).with_name("libopd_ops.so")
_error: str | None = None  # why nothing compiled runs

# Devices whose kernels know neither float64 nor a larger K: the reference takes those calls.
_LIMITED: tuple[str, ...] = ("cuda",)
_LIMITED_K = 1024


def _build_info() -> Any:
    return importlib.import_module("opd_ops._build_info")


def _load() -> bool:
    """Load the compiled ops if they are wanted and there; else say why not in `_error`."""
    global _error
    if _IMPL not in ("auto", "reference", "cpp"):
        raise ImportError(f"OPD_OPS_IMPL: expected auto, reference or cpp, got {_IMPL!r}")
    if _REQUIRED not in ("", "cpp"):
        raise ImportError(f"OPD_OPS_REQUIRE: expected cpp or nothing, got {_REQUIRED!r}")
    if _IMPL == "reference":
        _error = "OPD_OPS_IMPL=reference"
    elif not _LIBRARY.exists():
        _error = f"{_LIBRARY.name} was not built"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
            _build_info().isa()  # refuses a wrong OPD_OPS_ISA
            return True
        except (OSError, ImportError, RuntimeError) as error:
            _error = f"{_LIBRARY.name} does not load: {error}"
    if _REQUIRED == "cpp" or _IMPL == "cpp":
        raise ImportError(
            f"the compiled ops of opd_ops are required, but {_error}; "
            "build them with: python -m pip install -e . --no-build-isolation"
        )
    return False


_LOADED = _load()


# All ops are compiled for the same devices.
_DEVICES: tuple[str, ...] = ()
if _LOADED:
    _DEVICES = ("cpu", "cuda") if _build_info().cuda_targets else ("cpu",)


def info() -> dict[str, Any]:
    """What runs, for the first log line and `args.json`.

    `ops` gives the implementation ("cpp" or "reference") of each op per device; `notice` is a
    sentence that a program should show loudly, or None.
    """
    ops = {
        name: {device: "cpp" if device in _DEVICES else "reference" for device in ("cpu", "cuda")}
        for name in __all__
        if name != "info"
    }
    result: dict[str, Any] = {
        "version": __import__("opd_ops").__version__,
        "torch": torch.__version__,
        "OPD_OPS_IMPL": _IMPL,
        "OPD_OPS_REQUIRE": _REQUIRED,
        "compiled": _LOADED,
        "isa": None,
        "best_isa": None,
        "compiler": None,
        "flags": None,
        "built_with_torch": None,
        "cuda_targets": None,
        "threads": torch.get_num_threads(),
        "notice": None if _LOADED else f"opd_ops runs as plain PyTorch, slowly: {_error}",
        "ops": ops,
    }
    if _LOADED:
        build = _build_info()
        result["isa"], result["best_isa"] = build.isa(), build.best_isa()
        for key in ("compiler", "flags", "built_with_torch", "cuda_targets"):
            result[key] = getattr(build, key)
    return result


def _compiled(name: str, tensor: Tensor, k: int = 0) -> bool:
    device, limited = tensor.device.type, ""
    if device not in _DEVICES:
        if _IMPL == "cpp":
            raise RuntimeError(
                f"{name}: OPD_OPS_IMPL=cpp, but it is not compiled for {device} tensors"
            )
        return False
    if device in _LIMITED and tensor.dtype == torch.float64:
        limited = "float64"
    elif device in _LIMITED and isinstance(k, int) and k > _LIMITED_K:
        limited = f"k = {k} > {_LIMITED_K}"
    if limited and not torch.compiler.is_compiling():
        warnings.warn(
            f"{name}: the compiled op for {device} does not take {limited}; the reference runs",
            stacklevel=3,
        )
    return not limited


_F = TypeVar("_F", bound=Callable[..., Any])


def _documented(function: _F) -> _F:
    """Take the documentation from the reference op of the same name."""
    function.__doc__ = getattr(reference, function.__name__).__doc__
    return function


# ==== row ops: shapes, gradients ====


class _Rows(NamedTuple):
    """What gather_logp returns (empty tensors for what was not asked for), or its gradients."""

    logp: Tensor | None  # [N, K]; -inf where the id is -1
    lse: Tensor | None  # [N]
    entropy: Tensor | None  # [N] or [0]
    tail: Tensor | None  # [N] or [0]: log of the mass outside the ids
    stats: Tensor | None  # [N, 2]: shift and log_sum of the row
    tail_stats: Tensor | None  # [N, 2] or [0, 2]: the same of the complement of the ids


_Gradient = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _empty_rows(ids: Tensor, dtype: torch.dtype, with_entropy: bool, with_tail: bool) -> _Rows:
    rows, like = ids.shape[0], functools.partial(ids.new_empty, dtype=dtype)
    tails = rows if with_tail else 0
    return _Rows(
        like(ids.shape),
        like(rows),
        like(rows if with_entropy else 0),
        like(tails),
        like(rows, 2),
        like(tails, 2),
    )


def _wanted(grads: tuple[Any, ...], with_entropy: bool, with_tail: bool) -> _Rows:
    """Gradients of outputs that were not asked for do not count."""
    logp, lse, entropy, tail, *_ = grads
    return _Rows(
        logp, lse, entropy if with_entropy else None, tail if with_tail else None, None, None
    )


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _logp_gradient(ids: Tensor, outputs: _Rows, grads: _Rows) -> _Gradient | None:
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
    dense, slope, tail_stats, tail_dense = -grad.sum(-1), None, None, None
    if grads.lse is not None:
        dense = dense + grads.lse
    if grads.entropy is not None:
        dense, slope = dense - grads.entropy * entropy, -grads.entropy
    if grads.tail is not None:
        grad_tail = grads.tail.masked_fill(tail == -torch.inf, 0.0)
        dense = dense - grad_tail
        tail_stats, tail_dense = outputs.tail_stats, grad_tail + dense * tail.exp()
    return grad, stats, dense, slope, tail_stats, tail_dense


def _empty_topk(like: Tensor, k: int, token_ids: Tensor | None) -> tuple[Tensor, ...]:
    rows, dtype = like.shape[0], _row_dtype(like)
    tokens = 0 if token_ids is None else rows
    return (
        like.new_empty(rows, k, dtype=torch.int64),
        like.new_empty(rows, k, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(tokens, dtype=dtype),
        like.new_empty(tokens, dtype=torch.int64),
    )


def _no_double_backward(name: str) -> None:
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
    def _(
        logits: Tensor,
        ids: Tensor,
        valid: int,
        temperature: float,
        with_entropy: bool,
        with_tail: bool,
    ) -> Any:
        return tuple(_empty_rows(ids, _row_dtype(logits), with_entropy, with_tail))

    def gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
        logits, ids, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, ids, *output)

    def gather_backward(ctx: Any, *grads: Any) -> Any:
        logits, ids, *outputs = ctx.saved_tensors
        valid, temperature, *asked = ctx.settings
        gradient = _logp_gradient(ids, _Rows(*outputs), _wanted(grads, *asked))
        if gradient is None:
            return (None,) * 6
        result = torch.ops.opd_ops.gather_logp_backward(logits, ids, *gradient, valid, temperature)
        return result, None, None, None, None, None

    torch.library.register_autograd(
        "opd_ops::gather_logp", gather_backward, setup_context=gather_setup
    )

    @_fake("opd_ops::topk_logp")
    def _(logits: Tensor, k: int, token_ids: Tensor | None, valid: int, temperature: float) -> Any:
        return _empty_topk(logits, k, token_ids)

    @_fake("opd_ops::gather_linear")
    def _(hidden: Tensor, head: Tensor, ids: Tensor, scale: float) -> Tensor:
        return hidden.new_empty(ids.shape, dtype=_row_dtype(hidden))

    @_fake("opd_ops::gather_linear_backward_hidden")
    def _(hidden: Tensor, head: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
        return hidden.new_empty(hidden.shape)

    @_fake("opd_ops::gather_linear_backward_head_")
    def _(buffer: Tensor, hidden: Tensor, ids: Tensor, grad: Tensor) -> None:
        return None

    @_fake("opd_ops::gather_logp_backward")
    def _(logits: Tensor, *args: Any) -> Tensor:
        return logits.new_empty(logits.shape)

    @_fake("opd_ops::gather_logp_backward_")
    def _(logits: Tensor, *args: Any) -> None:
        return None

    @_fake("opd_ops::full_kl")
    def _(
        student: Tensor, teacher: Tensor, valid: int, temperature: float, kind: int, beta: float
    ) -> Any:
        rows, dtype = student.shape[0], _row_dtype(student)
        return student.new_empty(rows, dtype=dtype), student.new_empty(rows, 5, dtype=dtype)

    def full_setup(ctx: Any, inputs: Any, output: Any) -> None:
        student, teacher, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, output[1])

    def full_backward(ctx: Any, grad: Any, stats: Any) -> Any:
        student, teacher, row_stats = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None, None
        result = torch.ops.opd_ops.full_kl_backward(
            student, teacher, row_stats, grad, *ctx.settings
        )
        return result, None, None, None, None, None

    torch.library.register_autograd("opd_ops::full_kl", full_backward, setup_context=full_setup)

    @_fake("opd_ops::full_kl_backward")
    def _(student: Tensor, *args: Any) -> Tensor:
        return student.new_empty(student.shape)

    @_fake("opd_ops::full_kl_backward_")
    def _(student: Tensor, *args: Any) -> None:
        return None

    _no_double_backward("opd_ops::gather_logp_backward")
    _no_double_backward("opd_ops::full_kl_backward")


def _mark_written(logits: Tensor) -> None:
    """Autograd then refuses to use the old logits again."""
    torch.autograd.graph.increment_version(logits)


_SECOND_BACKWARD = (
    "inplace=True: the gradient has already been written over the logits; a second backward "
    "needs inplace=False"
)


class _GatherInplace(torch.autograd.Function):
    """gather_logp, whose backward leaves the gradient in the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, *settings: Any) -> Any:
        outputs = torch.ops.opd_ops.gather_logp(logits, ids, *settings)
        ctx.settings, ctx.used = settings, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.save_for_backward(logits, ids, *outputs)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.used:
            raise RuntimeError(_SECOND_BACKWARD)
        valid, temperature, *asked = ctx.settings
        wanted = _wanted(grads, *asked)
        if all(grad is None for grad in wanted):
            return (None,) * 6
        logits, ids, *outputs = ctx.saved_tensors
        ctx.used = True
        gradient = _logp_gradient(ids, _Rows(*outputs), wanted)
        assert gradient is not None
        torch.ops.opd_ops.gather_logp_backward_(logits, ids, *gradient, valid, temperature)
        _mark_written(logits)
        return logits.detach(), None, None, None, None, None


def _logits_gradient(ids: Tensor, grad: Tensor) -> _Gradient:
    """The gradient of logits[n, ids] / temperature: zero but for the ids."""
    return grad, grad.new_zeros(ids.shape[0], 2), grad.new_zeros(ids.shape[0]), None, None, None


class _GatherLogits(torch.autograd.Function):
    """logits.gather(1, ids) / temperature in full precision; ids of -1 give 0.

    The gradient is rounded once, after repeated ids have added up.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, inplace: bool) -> Tensor:
        ctx.settings, ctx.used = (temperature, inplace), False
        ctx.save_for_backward(logits, ids)
        values = logits.gather(1, ids.clamp_min(0)).to(_row_dtype(logits)) / temperature
        return values.masked_fill_(ids < 0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.used:
            raise RuntimeError(_SECOND_BACKWARD)
        logits, ids = ctx.saved_tensors
        temperature, inplace = ctx.settings
        arguments = (ids, *_logits_gradient(ids, grad), logits.shape[1], temperature)
        if not inplace:
            result = torch.ops.opd_ops.gather_logp_backward(logits, *arguments)
            return result, None, None, None
        ctx.used = True
        torch.ops.opd_ops.gather_logp_backward_(logits, *arguments)
        _mark_written(logits)
        return logits.detach(), None, None, None


class _GatherLinear(torch.autograd.Function):
    """<hidden[n], head[ids[n, k]]> * scale, and the three forms of the head's gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, scale: float, form: str, buffer: Any
    ) -> Tensor:
        ctx.save_for_backward(hidden, head, ids)
        ctx.settings = scale, form, buffer
        logits: Tensor = torch.ops.opd_ops.gather_linear(hidden, head, ids, scale)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, head, ids = ctx.saved_tensors
        scale, form, buffer = ctx.settings
        grad, ops = grad * scale, torch.ops.opd_ops
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0]:
            grad_hidden = ops.gather_linear_backward_hidden(hidden, head, ids, grad)
        if ctx.needs_input_grad[1]:
            if form == "buffer":
                ops.gather_linear_backward_head_(buffer, hidden, ids, grad)
            elif form == "rows":
                unique, position = ids.unique(return_inverse=True)
                rows = head.new_zeros(unique.shape[0], head.shape[1])
                ops.gather_linear_backward_head_(rows, hidden, position, grad)
                grad_head = torch.sparse_coo_tensor(
                    unique[None], rows, head.shape, check_invariants=False, is_coalesced=True
                )
            else:
                grad_head = torch.zeros_like(head)
                ops.gather_linear_backward_head_(grad_head, hidden, ids, grad)
        return grad_hidden, grad_head, None, None, None, None


class _FullInplace(torch.autograd.Function):
    """full_kl, whose backward leaves the gradient in the memory of the student's logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *settings: Any) -> Any:
        value, stats = torch.ops.opd_ops.full_kl(student, teacher, *settings)
        ctx.settings, ctx.used = settings, False
        ctx.save_for_backward(student, teacher, stats)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.used:
            raise RuntimeError(_SECOND_BACKWARD)
        student, teacher, stats = ctx.saved_tensors
        ctx.used = True
        torch.ops.opd_ops.full_kl_backward_(student, teacher, stats, grad, *ctx.settings)
        _mark_written(student)
        return student.detach(), None, None, None, None, None


def _gather(
    logits: Tensor,
    ids: Tensor,
    valid: int,
    temperature: float,
    *,
    entropy: bool = False,
    tail: bool = False,
    inplace: bool = False,
) -> _Rows:
    settings = (logits, ids, valid, float(temperature), entropy, tail)
    if inplace and not torch.compiler.is_compiling():
        return _Rows(*_GatherInplace.apply(*settings))  # type: ignore[no-untyped-call]
    return _Rows(*torch.ops.opd_ops.gather_logp(*settings))


_KINDS = {"reverse": 0, "forward": 1, "jsd": 2}


def _same_precision(student: Tensor, teacher: Tensor) -> Tensor:
    """float64 goes with float64; the other types may be mixed."""
    if (student.dtype == torch.float64) == (teacher.dtype == torch.float64):
        return teacher
    return teacher.to(_row_dtype(student))


# ==== linear ops: chunks of rows through one workspace ====


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of `hidden @ head.T`: that of the operands, or what autocast makes of them."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class _Workspace:
    """Chunks of `hidden @ head[:valid].T` in one reused buffer of bounded size."""

    def __init__(
        self, hidden: Tensor, head: Tensor, valid: int, dtype: torch.dtype, rows: int
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.head = head[:valid].to(dtype)
        self.buffer = hidden.new_empty(min(rows, hidden.shape[0]), valid, dtype=dtype)

    def rows(self, piece: slice) -> Tensor:
        hidden = self.hidden[piece].to(self.dtype)
        return torch.mm(hidden, self.head.t(), out=self.buffer[: hidden.shape[0]])

    def add_gradients(
        self, piece: slice, logits: Tensor, grad_hidden: Tensor, grad_head: Tensor
    ) -> None:
        """From d loss / d logits of a chunk; an empty gradient is not wanted."""
        if grad_hidden.numel():
            if grad_hidden.dtype == self.dtype:
                torch.mm(logits, self.head, out=grad_hidden[piece])
            else:
                grad_hidden[piece] = torch.mm(logits, self.head)
        if not grad_head.numel():
            return
        hidden = self.hidden[piece].to(self.dtype)
        if grad_head.dtype == self.dtype:
            grad_head[: logits.shape[1]].addmm_(logits.t(), hidden)
            return
        step = max(1, 2**24 // max(1, hidden.shape[1] * hidden.element_size()))  # 16 MiB pieces
        for start in range(0, logits.shape[1], step):
            block = logits[:, start : start + step]
            grad_head[start : start + block.shape[1]] += torch.mm(block.t(), hidden)


def _pieces(num_rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _rows_per_chunk(valid: int, dtype: torch.dtype, workspace_mib: float) -> int:
    return max(1, int(workspace_mib * 2**20) // (valid * dtype.itemsize))


def _new_gradients(
    hidden: Tensor, head: Tensor, dtype: torch.dtype, chunks: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Empty tensors for what is not wanted. The head's adds up in float32 over chunks."""
    grad_hidden = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
    low = dtype.itemsize < 4 and chunks > 1
    accumulate = torch.float32 if low else dtype
    if not wanted[1]:
        return grad_hidden, head.new_empty(0)
    return grad_hidden, head.new_zeros(head.shape, dtype=accumulate)


def _register_linear() -> None:
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
        step = _rows_per_chunk(valid, dtype, workspace_mib)
        product = _Workspace(hidden, head, valid, dtype, step)
        chunks = [
            torch.ops.opd_ops.gather_logp(
                product.rows(piece), ids[piece], valid, temperature, with_entropy, with_tail
            )
            for piece in _pieces(hidden.shape[0], step) or [slice(0, 0)]
        ]
        if len(chunks) == 1:
            a, b, c, d, e, f = chunks[0]
        else:
            a, b, c, d, e, f = (torch.cat(part) for part in zip(*chunks))
        return a, b, c, d, e, f

    @linear_gather_logp.register_fake
    def _(
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        valid: int,
        temperature: float,
        with_entropy: bool,
        with_tail: bool,
        dtype: torch.dtype,
        workspace_mib: float,
    ) -> Any:
        return tuple(_empty_rows(ids, _row_dtype(hidden), with_entropy, with_tail))

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
        step = _rows_per_chunk(valid, dtype, workspace_mib)
        pieces = _pieces(hidden.shape[0], step)
        product = _Workspace(hidden, head, valid, dtype, step)
        wanted = (need_hidden, need_head)
        grad_hidden, grad_head = _new_gradients(hidden, head, dtype, len(pieces), wanted)
        arguments = (ids, grad, stats, dense, slope, tail_stats, tail_dense)
        for piece in pieces:
            logits = product.rows(piece)
            parts = (None if argument is None else argument[piece] for argument in arguments)
            torch.ops.opd_ops.gather_logp_backward_(logits, *parts, valid, temperature)
            product.add_gradients(piece, logits, grad_hidden, grad_head)
        return grad_hidden, grad_head.to(head.dtype)

    @linear_gather_logp_backward.register_fake
    def _(
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
    ) -> Any:
        return (
            hidden.new_empty(hidden.shape if need_hidden else (0,)),
            head.new_empty(head.shape if need_head else (0,)),
        )

    def gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, head, ids, valid, temperature, *ctx.asked, dtype, workspace_mib = inputs
        ctx.settings = (valid, temperature, dtype, workspace_mib)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, ids, *output)

    def gather_backward(ctx: Any, *grads: Any) -> Any:
        hidden, head, ids, *outputs = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        gradient = _logp_gradient(ids, _Rows(*outputs), _wanted(grads, *ctx.asked))
        if gradient is None or not any(need):
            return (None,) * 9
        grad_hidden, grad_head = torch.ops.opd_ops.linear_gather_logp_backward(
            hidden, head, ids, *gradient, *ctx.settings, *need
        )
        return (grad_hidden if need[0] else None, grad_head if need[1] else None, *(None,) * 7)

    linear_gather_logp.register_autograd(gather_backward, setup_context=gather_setup)

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        step = _rows_per_chunk(valid, dtype, workspace_mib)
        product = _Workspace(hidden, head, valid, dtype, step)
        chunks = [
            torch.ops.opd_ops.topk_logp(
                product.rows(piece),
                k,
                None if token_ids is None else token_ids[piece],
                valid,
                temperature,
            )
            for piece in _pieces(hidden.shape[0], step) or [slice(0, 0)]
        ]
        a, b, c, d, e, f = (torch.cat(part) for part in zip(*chunks))
        return a, b, c, d, e, f

    @linear_topk_logp.register_fake
    def _(
        hidden: Tensor,
        head: Tensor,
        k: int,
        token_ids: Tensor | None,
        valid: int,
        temperature: float,
        dtype: torch.dtype,
        workspace_mib: float,
    ) -> Any:
        return _empty_topk(hidden, k, token_ids)

    def full_products(
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        valid: int,
        dtypes: list[torch.dtype],
        workspace_mib: float,
    ) -> Any:
        """Rows of student and teacher per chunk; the two share the workspace."""
        sides = [
            (student_hidden, student_head, dtypes[0]),
            (teacher_hidden, teacher_head, dtypes[1]),
        ]
        row_bytes = sum(valid * dtype.itemsize for _, head, dtype in sides if head is not None)
        step = max(1, int(workspace_mib * 2**20) // max(1, row_bytes))
        products = [
            None if head is None else _Workspace(hidden, head, valid, dtype, step)
            for hidden, head, dtype in sides
        ]
        return products, _pieces(student_hidden.shape[0], step)

    @op("opd_ops::linear_full_kl")
    def linear_full_kl(
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        valid: int,
        temperature: float,
        kind: int,
        beta: float,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        workspace_mib: float,
    ) -> tuple[Tensor, Tensor]:
        (student, teacher), pieces = full_products(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            valid,
            [student_dtype, teacher_dtype],
            workspace_mib,
        )
        chunks = []
        for piece in pieces or [slice(0, 0)]:
            near = student_hidden[piece] if student is None else student.rows(piece)
            far = teacher_hidden[piece] if teacher is None else teacher.rows(piece)
            chunks.append(
                torch.ops.opd_ops.full_kl(
                    near, _same_precision(near, far), valid, temperature, kind, beta
                )
            )
        value, stats = (torch.cat(part) for part in zip(*chunks))
        return value, stats

    @linear_full_kl.register_fake
    def _(
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        valid: int,
        temperature: float,
        kind: int,
        beta: float,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        workspace_mib: float,
    ) -> Any:
        rows, result = student_hidden.shape[0], _row_dtype(student_hidden)
        return (
            student_hidden.new_empty(rows, dtype=result),
            student_hidden.new_empty(rows, 5, dtype=result),
        )

    @op("opd_ops::linear_full_kl_backward")
    def linear_full_kl_backward(
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        stats: Tensor,
        grad: Tensor,
        valid: int,
        temperature: float,
        kind: int,
        beta: float,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        workspace_mib: float,
        need_hidden: bool,
        need_head: bool,
    ) -> tuple[Tensor, Tensor]:
        (student, teacher), pieces = full_products(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            valid,
            [student_dtype, teacher_dtype],
            workspace_mib,
        )
        if student_head is None:  # the hidden states are logits: their gradient is the kernel's
            grad_hidden = student_hidden.clone(memory_format=torch.contiguous_format)
            grad_head = student_hidden.new_empty(0)
        else:
            grad_hidden, grad_head = _new_gradients(
                student_hidden, student_head, student_dtype, len(pieces), (need_hidden, need_head)
            )
        for piece in pieces:
            near = grad_hidden[piece] if student is None else student.rows(piece)
            far = teacher_hidden[piece] if teacher is None else teacher.rows(piece)
            far = _same_precision(near, far)
            torch.ops.opd_ops.full_kl_backward_(
                near, far, stats[piece], grad[piece], valid, temperature, kind, beta
            )
            if student is not None:
                student.add_gradients(piece, near, grad_hidden, grad_head)
        if student_head is not None:
            grad_head = grad_head.to(student_head.dtype)
        return grad_hidden, grad_head

    @linear_full_kl_backward.register_fake
    def _(
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        stats: Tensor,
        grad: Tensor,
        valid: int,
        temperature: float,
        kind: int,
        beta: float,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        workspace_mib: float,
        need_hidden: bool,
        need_head: bool,
    ) -> Any:
        if student_head is None:
            return student_hidden.new_empty(student_hidden.shape), student_hidden.new_empty(0)
        return (
            student_hidden.new_empty(student_hidden.shape if need_hidden else (0,)),
            student_head.new_empty(student_head.shape if need_head else (0,)),
        )

    def full_setup(ctx: Any, inputs: Any, output: Any) -> None:
        student_hidden, student_head, teacher_hidden, teacher_head, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_hidden, student_head, teacher_hidden, teacher_head, output[1])

    def full_backward(ctx: Any, grad: Any, stats: Any) -> Any:
        *operands, row_stats = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        if grad is None or not any(need):
            return (None,) * 11
        grad_hidden, grad_head = torch.ops.opd_ops.linear_full_kl_backward(
            *operands, row_stats, grad, *ctx.settings, *need
        )
        return (grad_hidden if need[0] else None, grad_head if need[1] else None, *(None,) * 9)

    linear_full_kl.register_autograd(full_backward, setup_context=full_setup)
    _no_double_backward("opd_ops::linear_gather_logp_backward")
    _no_double_backward("opd_ops::linear_full_kl_backward")


if _LOADED:
    _register()
    _register_linear()


# ==== the public ops ====


@_documented
def token_logp(
    logits: Tensor,
    token_ids: Tensor,
    *,
    with_entropy: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, ...]:
    if not _compiled("token_logp", logits):
        return reference.token_logp(
            logits,
            token_ids,
            with_entropy=with_entropy,
            valid_vocab=valid_vocab,
            temperature=temperature,
            inplace=inplace,
        )
    reference._check_logits("logits", logits)
    valid = reference._check_vocab(valid_vocab, logits.shape[1], temperature)
    reference._check_ids("token_ids", token_ids, (logits.shape[0],), logits, valid)
    reference._check_inplace("logits", logits, inplace)
    ids = token_ids[:, None]
    rows = _gather(logits, ids, valid, temperature, entropy=with_entropy, inplace=inplace)
    return _one_token(rows, with_entropy)


def _one_token(rows: _Rows, with_entropy: bool) -> tuple[Tensor, ...]:
    assert rows.logp is not None and rows.lse is not None and rows.entropy is not None
    logp = rows.logp[:, 0]
    return (logp, rows.lse, rows.entropy) if with_entropy else (logp, rows.lse)


@_documented
def linear_token_logp(
    hidden: Tensor,
    head: Tensor | None,
    token_ids: Tensor,
    *,
    with_entropy: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, ...]:
    if not _compiled("linear_token_logp", hidden):
        return reference.linear_token_logp(
            hidden,
            head,
            token_ids,
            with_entropy=with_entropy,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
    valid = reference._check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    reference._check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, valid)
    ids = token_ids[:, None]
    rows = _linear_gather(
        hidden, head, ids, valid, temperature, workspace_mib, entropy=with_entropy
    )
    return _one_token(rows, with_entropy)


def _linear_gather(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    valid: int,
    temperature: float,
    workspace_mib: float,
    *,
    entropy: bool = False,
    tail: bool = False,
) -> _Rows:
    reference._check_workspace(workspace_mib)
    if head is None:
        return _gather(hidden, ids, valid, temperature, entropy=entropy, tail=tail)
    dtype = _product_dtype(hidden)
    settings = (valid, float(temperature), entropy, tail, dtype, float(workspace_mib))
    return _Rows(*torch.ops.opd_ops.linear_gather_logp(hidden, head, ids, *settings))


@_documented
def topk_logp(
    logits: Tensor,
    k: int,
    *,
    token_ids: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    if not _compiled("topk_logp", logits, k):
        return reference.topk_logp(
            logits, k, token_ids=token_ids, valid_vocab=valid_vocab, temperature=temperature
        )
    reference._check_logits("logits", logits)
    valid = reference._check_vocab(valid_vocab, logits.shape[1], temperature)
    reference._check_k(k, valid)
    if token_ids is not None:
        reference._check_ids("token_ids", token_ids, (logits.shape[0],), logits, valid)
    outputs: tuple[Tensor, ...] = torch.ops.opd_ops.topk_logp(
        logits.detach(), k, token_ids, valid, float(temperature)
    )
    return outputs if token_ids is not None else outputs[:4]


@_documented
def linear_topk_logp(
    hidden: Tensor,
    head: Tensor | None,
    k: int,
    *,
    token_ids: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, ...]:
    if not _compiled("linear_topk_logp", hidden, k):
        return reference.linear_topk_logp(
            hidden,
            head,
            k,
            token_ids=token_ids,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
    valid = reference._check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    reference._check_k(k, valid)
    reference._check_workspace(workspace_mib)
    if token_ids is not None:
        reference._check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, valid)
    outputs: tuple[Tensor, ...]
    hidden, settings = hidden.detach(), (k, token_ids, valid, float(temperature))
    if head is None:
        outputs = torch.ops.opd_ops.topk_logp(hidden, *settings)
    else:
        outputs = torch.ops.opd_ops.linear_topk_logp(
            hidden, head.detach(), *settings, _product_dtype(hidden), float(workspace_mib)
        )
    return outputs if token_ids is not None else outputs[:4]


@_documented
def gather_logp(
    logits: Tensor,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    if not _compiled("gather_logp", logits):
        return reference.gather_logp(
            logits, ids, valid_vocab=valid_vocab, temperature=temperature, inplace=inplace
        )
    reference._check_logits("logits", logits)
    valid = reference._check_vocab(valid_vocab, logits.shape[1], temperature)
    reference._check_id_rows("ids", ids, logits, valid)
    reference._check_inplace("logits", logits, inplace)
    rows = _gather(logits, ids, valid, temperature, inplace=inplace)
    assert rows.logp is not None and rows.lse is not None
    return rows.logp, rows.lse


@_documented
def linear_gather_logp(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, Tensor]:
    if not _compiled("linear_gather_logp", hidden):
        return reference.linear_gather_logp(
            hidden,
            head,
            ids,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
    valid = reference._check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    reference._check_id_rows("ids", ids, hidden, valid)
    rows = _linear_gather(hidden, head, ids, valid, temperature, workspace_mib)
    assert rows.logp is not None and rows.lse is not None
    return rows.logp, rows.lse


@_documented
def linear_gather_logits(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    *,
    grad_head: GradHead = "dense",
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> Tensor:
    if not _compiled("linear_gather_logits", hidden):
        return reference.linear_gather_logits(
            hidden,
            head,
            ids,
            grad_head=grad_head,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
    valid = reference._check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    reference._check_id_rows("ids", ids, hidden, valid)
    if head is not None:
        reference._check_grad_head(grad_head, head)
    return _some_logits(hidden, head, ids, grad_head, temperature)


def _some_logits(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    grad_head: GradHead,
    temperature: float,
    inplace: bool = False,
) -> Tensor:
    """Logits / temperature at ids [N, K], of K rows of the head or of given logits."""
    result: Tensor
    if head is None:
        result = _GatherLogits.apply(hidden, ids, float(temperature), inplace)  # type: ignore[no-untyped-call]
        return result
    form, buffer = ("buffer", grad_head) if isinstance(grad_head, Tensor) else (grad_head, None)
    ids = ids.clamp_min(0)
    result = _GatherLinear.apply(hidden, head, ids, 1.0 / temperature, form, buffer)  # type: ignore[no-untyped-call]
    return result


@_documented
def support_kl(
    student_logits: Tensor,
    support_ids: Tensor,
    teacher_logp: Tensor,
    *,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    renormalise: bool = True,
    tail: Tail = "none",
    teacher_tail_logp: Tensor | None = None,
    support_mask: Tensor | None = None,
    with_student_mass: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    settings = dict(
        divergence=divergence,
        beta=beta,
        renormalise=renormalise,
        tail=tail,
        teacher_tail_logp=teacher_tail_logp,
        support_mask=support_mask,
    )
    if not _compiled("support_kl", student_logits):
        return reference.support_kl(
            student_logits,
            support_ids,
            teacher_logp,
            with_student_mass=with_student_mass,
            valid_vocab=valid_vocab,
            temperature=temperature,
            inplace=inplace,
            **settings,  # type: ignore[arg-type]
        )
    reference._check_logits("student_logits", student_logits)
    valid = reference._check_vocab(valid_vocab, student_logits.shape[1], temperature)
    arguments = (support_ids, teacher_logp, student_logits, valid, *settings.values())
    ids = _masked(reference._check_support(*arguments), support_mask)  # type: ignore[arg-type]
    reference._check_inplace("student_logits", student_logits, inplace)
    mass = None
    if renormalise:
        if with_student_mass:
            mass = _mass(_gather(student_logits.detach(), ids, valid, temperature))
        values = _some_logits(student_logits, None, ids, "dense", temperature, inplace)
        rows = None
    else:
        bucket = tail == "bucket"
        rows = _gather(student_logits, ids, valid, temperature, tail=bucket, inplace=inplace)
        assert rows.logp is not None
        values = rows.logp
        mass = _mass(rows) if with_student_mass else None
    result = reference._support_divergence(
        values,
        teacher_logp,
        support_mask,
        renormalise,
        rows.tail if rows is not None and tail == "bucket" else None,
        teacher_tail_logp,
        divergence,
        beta,
    )
    return result, mass


def _masked(ids: Tensor, mask: Tensor | None) -> Tensor:
    """-1 for entries that do not exist."""
    return ids if mask is None else ids.masked_fill(~mask, -1)


def _mass(rows: _Rows) -> Tensor:
    assert rows.logp is not None
    return rows.logp.detach().exp().sum(-1)


@_documented
def linear_support_kl(
    hidden: Tensor,
    head: Tensor | None,
    support_ids: Tensor,
    teacher_logp: Tensor,
    *,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    renormalise: bool = True,
    tail: Tail = "none",
    teacher_tail_logp: Tensor | None = None,
    support_mask: Tensor | None = None,
    with_student_mass: bool = False,
    grad_head: GradHead = "dense",
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, Tensor | None]:
    settings = dict(
        divergence=divergence,
        beta=beta,
        renormalise=renormalise,
        tail=tail,
        teacher_tail_logp=teacher_tail_logp,
        support_mask=support_mask,
    )
    if not _compiled("linear_support_kl", hidden):
        return reference.linear_support_kl(
            hidden,
            head,
            support_ids,
            teacher_logp,
            with_student_mass=with_student_mass,
            grad_head=grad_head,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
            **settings,  # type: ignore[arg-type]
        )
    valid = reference._check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    arguments = (support_ids, teacher_logp, hidden, valid, *settings.values())
    ids = _masked(reference._check_support(*arguments), support_mask)  # type: ignore[arg-type]
    if head is not None:
        reference._check_support_grad_head(grad_head, head, renormalise)
    full = (valid, temperature, workspace_mib)
    reference._check_workspace(workspace_mib)
    mass = None
    if renormalise:
        if with_student_mass:
            frozen = None if head is None else head.detach()
            mass = _mass(_linear_gather(hidden.detach(), frozen, ids, *full))
        values = _some_logits(hidden, head, ids, grad_head, temperature)
        rows = None
    else:
        if head is not None and isinstance(grad_head, Tensor):
            head = reference._IntoBuffer.apply(head, grad_head)  # type: ignore[no-untyped-call]
        rows = _linear_gather(hidden, head, ids, *full, tail=tail == "bucket")
        assert rows.logp is not None
        values = rows.logp
        mass = _mass(rows) if with_student_mass else None
    result = reference._support_divergence(
        values,
        teacher_logp,
        support_mask,
        renormalise,
        rows.tail if rows is not None and tail == "bucket" else None,
        teacher_tail_logp,
        divergence,
        beta,
    )
    return result, mass


@_documented
def gated_kl(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_logp: Tensor,
    verdict: Tensor,
    *,
    extrapolation: float,
    interpolation: float,
    reference_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference._check_logits("student_logits", student_logits)
    reference._check_gated(teacher_logp, verdict, reference_logp, token_weight, student_logits)
    logp = token_logp(
        student_logits,
        token_ids,
        valid_vocab=valid_vocab,
        temperature=temperature,
        inplace=inplace,
    )[0]
    return reference._gated(
        logp, teacher_logp, verdict, extrapolation, interpolation, reference_logp, token_weight
    )


@_documented
def linear_gated_kl(
    hidden: Tensor,
    head: Tensor | None,
    token_ids: Tensor,
    teacher_logp: Tensor,
    verdict: Tensor,
    *,
    extrapolation: float,
    interpolation: float,
    reference_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference._check_gated(teacher_logp, verdict, reference_logp, token_weight, hidden)
    logp = linear_token_logp(
        hidden,
        head,
        token_ids,
        valid_vocab=valid_vocab,
        temperature=temperature,
        workspace_mib=workspace_mib,
    )[0]
    return reference._gated(
        logp, teacher_logp, verdict, extrapolation, interpolation, reference_logp, token_weight
    )


@_documented
def full_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    if not _compiled("full_kl", student_logits):
        return reference.full_kl(
            student_logits,
            teacher_logits,
            divergence=divergence,
            beta=beta,
            valid_vocab=valid_vocab,
            temperature=temperature,
            inplace=inplace,
        )
    valid = reference._check_full(
        student_logits, teacher_logits, divergence, beta, valid_vocab, temperature, inplace
    )
    teacher = _same_precision(student_logits, teacher_logits.detach())
    settings = (valid, float(temperature), _KINDS[divergence], float(beta))
    result: Tensor
    if inplace and not torch.compiler.is_compiling():
        result = _FullInplace.apply(student_logits, teacher, *settings)  # type: ignore[no-untyped-call]
    else:
        result = torch.ops.opd_ops.full_kl(student_logits, teacher, *settings)[0]
    return result


@_documented
def linear_full_kl(
    student_hidden: Tensor,
    student_head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    *,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> Tensor:
    if not _compiled("linear_full_kl", student_hidden):
        return reference.linear_full_kl(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            divergence=divergence,
            beta=beta,
            valid_vocab=valid_vocab,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
    valid = reference._check_linear_full(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence,
        beta,
        valid_vocab,
        temperature,
    )
    reference._check_workspace(workspace_mib)
    result: Tensor = torch.ops.opd_ops.linear_full_kl(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detach(),
        valid,
        float(temperature),
        _KINDS[divergence],
        float(beta),
        student_hidden.dtype if student_head is None else _product_dtype(student_hidden),
        teacher_hidden.dtype if teacher_head is None else _product_dtype(teacher_hidden),
        float(workspace_mib),
    )[0]
    return result
