"""The specification of every op of `opd_ops`, in plain PyTorch.

Each function here has the name, the signature and the meaning of the public op; the compiled ops
are tested against these, and take their documentation from here. Readability and numerical care
come first, speed second. Shared conventions:

- Every op takes hidden states [N, D] and the head [V, D] of one dtype (float32, bfloat16, float16
  or float64), and walks over the rows in chunks, so that it needs `workspace_mib` of memory instead
  of [N, V]. `head=None` says that `hidden` holds the logits [N, V] themselves, for models whose
  head is more than a matrix product. N may be 0; leading dimensions are flattened by the caller.
- Arithmetic is float32 inside and the results are float32 for every input type, except that
  float64 stays float64. Log-probs are natural logarithms (nats). Gradients have the input's dtype.
- Under `torch.autocast`, hidden and head are cast to the autocast dtype for the product, as
  `torch.nn.functional.linear` does. The product has the dtype of its operands.
- `valid_vocab`: ids from there on are padding of the vocabulary; they never enter a softmax or a
  top-K, and their gradient is 0. Default: the whole row.
- `temperature`: every softmax is over `logits / temperature`.
- A log-prob is `(z - max) - log(sum)`, so a common offset of the logits costs no precision.
- -inf logits are allowed (masks). A row of only -inf gives -inf log-probs and gradient 0. +inf and
  NaN propagate: every value of that row becomes NaN. Ties go to the lowest id.
- ids are int64 inside [0, valid_vocab); anything else raises `IndexError` before a logit is read
  (but for `check_ids=False`).
- Results are named tuples; what was not asked for is None in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["full_kl", "gated_kl", "gather_logp", "support_kl", "token_logp", "topk_logp"]

Divergence = Literal["reverse", "forward", "jsd"]
Tail = Literal["none", "bucket"]
LossOf = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Look = Callable[[], Callable[[], None]]  # of `_range_check`

INF = float("inf")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ==== what the ops return ====


class TokenLogp(NamedTuple):
    """Of `token_logp`."""

    logp: Tensor  # [N] nats
    lse: Tensor  # [N]
    entropy: Tensor | None  # [N] nats, where asked for


class TopK(NamedTuple):
    """Of `topk_logp`."""

    ids: Tensor  # [N, K] int64
    logp: Tensor  # [N, K] nats
    lse: Tensor  # [N]
    tail_logp: Tensor  # [N] nats: the log of the mass outside
    token_logp: Tensor | None  # [N] nats, of `token_ids`


class GatherLogp(NamedTuple):
    """Of `gather_logp`."""

    logp: Tensor  # [N, K] nats
    lse: Tensor  # [N]


class SupportKL(NamedTuple):
    """Of `support_kl`."""

    loss: Tensor  # [] nats, differentiable
    values: Tensor  # [N] nats, detached


class GatedKL(NamedTuple):
    """Of `gated_kl`."""

    loss: Tensor  # [], differentiable
    student_logp: Tensor  # [N] or [N, M] nats, detached
    logged: dict[str, Tensor]  # [N, ...] each, detached


class FullKL(NamedTuple):
    """Of `full_kl`."""

    loss: Tensor  # [] nats, differentiable
    values: Tensor  # [N] nats, detached


# ==== argument checks, shared with the compiled ops ====


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: expected logits [N, V] of float32, bfloat16, float16 or float64 without a "
            f"head, got {_describe(logits)}"
        )
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got {_describe(logits)}")


def _check_vocab(valid_vocab: int | None, vocab: int, temperature: float) -> int:
    """The number of ids that count."""
    if not temperature > 0 or temperature == INF:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if valid_vocab is None:
        return vocab
    if not 1 <= valid_vocab <= vocab:
        raise ValueError(
            f"valid_vocab: expected 1 to {vocab} (the row's length), got {valid_vocab}"
        )
    return valid_vocab


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {_describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {_describe(tensor)}")


def _check_float(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check_shape(name, tensor, shape, like)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {_describe(tensor)}")


def _check_ids(
    name: str, ids: Tensor, shape: tuple[int, ...], like: Tensor, valid: int, values: bool = True
) -> None:
    _check_shape(name, ids, shape, like)
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {_describe(ids)}")
    if values:
        _range_check(name, ids, valid)()()


def _range_check(name: str, ids: Tensor, valid: int) -> Look:
    """A function that begins to look at ids; what it returns raises if one is out of range.

    Ids on a CPU are looked at here. On a GPU the look takes its turn behind what has been queued,
    and only what raises waits for it.
    """

    def begin() -> Callable[[], None]:
        found = torch.stack(torch.aminmax(ids)).to("cpu", non_blocking=ids.is_cuda)
        ready = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None

        def check() -> None:
            if ready is not None:
                ready.synchronize()
            low, high = found.tolist()
            if low < 0 or high >= valid:
                raise IndexError(f"{name}: expected ids in [0, {valid}), got {low} to {high}")

        return check

    if ids.numel() and not torch.compiler.is_compiling():
        if ids.is_cuda:
            return begin
        begin()()
    return lambda: lambda: None


def _check_id_rows(name: str, ids: Tensor, like: Tensor, valid: int) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{name}: expected int64 [N, K], got {_describe(ids)}")
    _check_ids(name, ids, (like.shape[0], ids.shape[1]), like, valid)


def _check_hidden(name: str, hidden: Tensor, head_name: str, head: Tensor) -> None:
    if not isinstance(hidden, Tensor) or hidden.dim() != 2 or hidden.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: expected a float32, bfloat16, float16 or float64 tensor [N, D], "
            f"got {_describe(hidden)}"
        )
    if not isinstance(head, Tensor) or head.dim() != 2 or head.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{head_name}: expected a float tensor [V, D] or None, got {_describe(head)}"
        )
    if head.shape[1] != hidden.shape[1] or head.shape[0] == 0:
        raise ValueError(
            f"{head_name}: expected [V, {hidden.shape[1]}] to match {name}, got {_describe(head)}"
        )
    if head.device != hidden.device:
        raise ValueError(
            f"{head_name}: expected a tensor on {hidden.device}, got {_describe(head)}"
        )
    if head.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"{head_name}: expected {name}'s dtype {hidden.dtype}, got {_describe(head)}"
        )


def _check_product(
    hidden: Tensor,
    head: Tensor | None,
    valid_vocab: int | None,
    temperature: float,
    whose: str = "",
) -> int:
    """Check hidden states and head, or logits and None; the number of ids that count."""
    if head is None:
        _check_logits(f"{whose}hidden", hidden)
        return _check_vocab(valid_vocab, hidden.shape[1], temperature)
    _check_hidden(f"{whose}hidden", hidden, f"{whose}head", head)
    return _check_vocab(valid_vocab, head.shape[0], temperature)


def default_workspace_mib(device: str) -> float:
    """What `workspace_mib=None` is on a kind of device: more on a GPU, where few rows are slow."""
    return 256.0 if device == "cpu" else 3600.0


def _workspace(workspace_mib: float | None, device: torch.device) -> float:
    if workspace_mib is None:
        return default_workspace_mib(device.type)
    if not workspace_mib > 0:
        raise ValueError(f"workspace_mib: expected a number > 0, got {workspace_mib!r}")
    return float(workspace_mib)


def _check_k(k: int, valid: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= valid:
        raise ValueError(f"k: expected 1 to {valid} (the valid vocabulary), got {k!r}")


def _check_divergence(divergence: str, beta: float) -> None:
    if divergence not in ("reverse", "forward", "jsd"):
        raise ValueError(f"divergence: expected 'reverse', 'forward' or 'jsd', got {divergence!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta: expected a number strictly inside (0, 1), got {beta!r}; "
            "at the ends use divergence='forward' or 'reverse'"
        )


def _check_support(
    support_ids: Tensor,
    teacher_logp: Tensor,
    like: Tensor,
    valid: int,
    divergence: str,
    beta: float,
    renormalise: bool,
    tail: str,
    teacher_tail_logp: Tensor | None,
    support_mask: Tensor | None,
    token_weight: Tensor | None,
) -> tuple[Tensor, Look]:
    """Check the arguments of `support_kl`, on a GPU but for the range of the ids.

    Returns the support ids with masked ones replaced by 0, and `_range_check` of them.
    """
    _check_divergence(divergence, beta)
    if tail not in ("none", "bucket"):
        raise ValueError(f"tail: expected 'none' or 'bucket', got {tail!r}")
    if renormalise and tail == "bucket":
        raise ValueError("tail: 'bucket' needs renormalise=False; a renormalised law has no tail")
    if (tail == "bucket") != (teacher_tail_logp is not None):
        raise ValueError("teacher_tail_logp: expected a tensor with tail='bucket' and only then")
    if not isinstance(support_ids, Tensor) or support_ids.dim() != 2 or support_ids.shape[1] == 0:
        raise ValueError(f"support_ids: expected int64 [N, K], got {_describe(support_ids)}")
    shape = (like.shape[0], support_ids.shape[1])
    if renormalise and shape[1] == 1:
        raise ValueError(
            "renormalise: a law renormalised on a support of one token is constant, its loss and "
            "gradient are 0; use renormalise=False, or a larger support"
        )
    _check_float("teacher_logp", teacher_logp, shape, like)
    if token_weight is not None:
        _check_float("token_weight", token_weight, shape[:1], like)
    if teacher_tail_logp is not None:
        _check_float("teacher_tail_logp", teacher_tail_logp, shape[:1], like)
    if support_mask is not None:
        _check_shape("support_mask", support_mask, shape, like)
        if support_mask.dtype != torch.bool:
            raise ValueError(f"support_mask: expected bool, got {_describe(support_mask)}")
    _check_ids("support_ids", support_ids, shape, like, valid, values=False)
    if support_mask is not None:
        support_ids = support_ids.masked_fill(~support_mask, 0)
    return support_ids, _range_check("support_ids", support_ids, valid)


def _check_gated(
    token_ids: Tensor, loss_of: LossOf, values: Sequence[Tensor], like: Tensor, valid: int
) -> Look:
    """Check the arguments of `gated_kl`, on a GPU but for the range of the ids: `_range_check`."""
    if not isinstance(token_ids, Tensor) or token_ids.dim() not in (1, 2):
        raise ValueError(f"token_ids: expected int64 [N] or [N, M], got {_describe(token_ids)}")
    shape = (like.shape[0], *token_ids.shape[1:])
    _check_ids("token_ids", token_ids, shape, like, valid, values=False)
    if not callable(loss_of):
        raise ValueError(f"loss_of: expected a function, got {_describe(loss_of)}")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != like.shape[0]:
            raise ValueError(
                f"values[{i}]: expected a tensor [{like.shape[0]}, ...], got {_describe(value)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"values[{i}]: expected a tensor on {like.device}, got {_describe(value)}"
            )
    return _range_check("token_ids", token_ids, valid)


def _check_full(
    hidden: Tensor,
    head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    token_weight: Tensor | None,
    divergence: str,
    beta: float,
    valid_vocab: int | None,
    temperature: float,
) -> int:
    """Check the arguments of `full_kl`; the number of ids that count."""
    _check_divergence(divergence, beta)
    student = _check_product(hidden, head, None, temperature)
    teacher = _check_product(teacher_hidden, teacher_head, None, temperature, "teacher_")
    if valid_vocab is None and student != teacher:
        raise ValueError(
            f"valid_vocab: the student has {student} ids and the teacher {teacher}; "
            "say how many of them both share"
        )
    if valid_vocab is not None and not 1 <= valid_vocab <= min(student, teacher):
        raise ValueError(
            f"valid_vocab: expected 1 to {min(student, teacher)} (the student has {student} ids, "
            f"the teacher {teacher}), got {valid_vocab}"
        )
    shape = (hidden.shape[0], teacher_hidden.shape[1])
    _check_shape("teacher_hidden", teacher_hidden, shape, hidden)
    if token_weight is not None:
        _check_float("token_weight", token_weight, shape[:1], hidden)
    return student if valid_vocab is None else valid_vocab


# ==== the mathematics of one row ====


def _work(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Rows:
    """Softmax statistics of `logits[:, :valid] / temperature`, in float32 or float64."""

    def __init__(self, logits: Tensor, valid: int, temperature: float) -> None:
        self.logits = _work(logits[:, :valid])
        self.temperature = temperature
        peak = self.logits.detach().amax(-1, keepdim=True)  # [N, 1]; NaN if the row has one
        self.dead = peak == -INF  # rows without a single possible token
        self.shift = peak.masked_fill(self.dead, 0.0)
        total = self.scaled(self.logits).exp().sum(-1, keepdim=True)
        self.log_sum = total.masked_fill(self.dead, 1.0).log()  # [N, 1]

    def scaled(self, values: Tensor) -> Tensor:
        return (values - self.shift) / self.temperature

    def logp(self, values: Tensor) -> Tensor:
        """Log-probs of logits of these rows, [N, any]."""
        return (self.scaled(values) - self.log_sum).masked_fill(self.dead, -INF)

    def lse(self) -> Tensor:
        lse = self.shift / self.temperature + self.log_sum
        return lse.masked_fill(self.dead, -INF).squeeze(-1)

    def outside(self, inside: Tensor) -> Tensor:
        """Log of the mass where `inside` [N, V] is False, summed there; -inf if nothing is."""
        rest = _Rows(self.logits.masked_fill(inside, -INF), self.logits.shape[1], self.temperature)
        gap = (rest.shift - self.shift) / self.temperature
        tail = gap + rest.log_sum - self.log_sum
        return tail.masked_fill(rest.dead & ~self.log_sum.isnan(), -INF).squeeze(-1)


def _log_softmax(logp: Tensor) -> Tensor:
    """Renormalise log-probs [N, K]; rows of only -inf stay -inf, with gradient 0."""
    return _Rows(logp, logp.shape[1], 1.0).logp(_work(logp))


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a * log(a / b), elementwise from logarithms: 0 where a is 0, +inf where only b is 0."""
    empty = log_a == -INF
    log_a, log_b = log_a.masked_fill(empty, 0.0), log_b.masked_fill(empty, 0.0)
    terms = log_a.exp() * (log_a - log_b)
    return terms.masked_fill(log_b == -INF, INF).masked_fill(empty, 0.0)


def _divergence(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence of two laws given as log-probs [N, any] -> [N]; the teacher is a constant."""
    teacher = teacher.detach()
    if divergence == "reverse":
        return _kl_terms(student, teacher).sum(-1)
    if divergence == "forward":
        return _kl_terms(teacher, student).sum(-1)
    beta = float(beta)
    log_beta = torch.tensor([1 - beta, beta], dtype=torch.float64).log().tolist()
    nowhere = (student == -INF) & (teacher == -INF)
    mixture = torch.logaddexp(
        student.masked_fill(nowhere, 0.0) + log_beta[0],
        teacher.masked_fill(nowhere, 0.0) + log_beta[1],
    )
    terms = beta * _kl_terms(teacher, mixture) + (1 - beta) * _kl_terms(student, mixture)
    return terms.sum(-1)


def _members(ids: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """[N, V] bool: which tokens are in the support [N, K]."""
    counted = torch.ones_like(ids) if mask is None else mask.long()
    return ids.new_zeros(ids.shape[0], vocab).scatter_add_(1, ids, counted) > 0


def _support_divergence(
    student: Tensor,
    teacher_logp: Tensor,
    mask: Tensor | None,
    renormalise: bool,
    student_tail: Tensor | None,
    teacher_tail: Tensor | None,
    divergence: str,
    beta: float,
) -> Tensor:
    """From the student's values [N, K] on the support (any common offset if renormalised)."""
    teacher = teacher_logp.detach().to(student.dtype)
    if mask is not None:
        student = student.masked_fill(~mask, -INF)
        teacher = teacher.masked_fill(~mask, -INF)
    if renormalise:
        student, teacher = _log_softmax(student), _log_softmax(teacher)
    if student_tail is not None and teacher_tail is not None:
        student = torch.cat([student, student_tail[:, None]], -1)
        teacher = torch.cat([teacher, teacher_tail.detach().to(student.dtype)[:, None]], -1)
    return _divergence(student, teacher, divergence, beta)


def _weighted(values: Tensor, token_weight: Tensor | None) -> Tensor:
    """A row of weight 0 is silent, even where its value is not finite."""
    if token_weight is None:
        return values
    weight = token_weight.detach().to(values.dtype)
    return weight * values.masked_fill(weight == 0, 0.0)


def _call_loss(
    loss_of: LossOf, student_logp: Tensor, values: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [n] and what to log of each row, from the caller's function."""
    with torch.autocast(student_logp.device.type, enabled=False):
        loss, logged = loss_of(student_logp, *values)
    num_rows = student_logp.shape[0]
    if not isinstance(loss, Tensor) or tuple(loss.shape) != (num_rows,):
        raise ValueError(f"loss_of: expected a loss [{num_rows}], got {_describe(loss)}")
    if student_logp.requires_grad and not loss.requires_grad:
        raise ValueError("loss_of: expected a loss that depends on student_logp, got a constant")
    for name, each in logged.items():
        if not isinstance(each, Tensor) or each.dim() == 0 or len(each) != num_rows:
            raise ValueError(
                f"loss_of: expected {name!r} to be [{num_rows}, ...], got {_describe(each)}"
            )
    return loss, {name: each.detach() for name, each in logged.items()}


def _gated(student_logp: Tensor, loss_of: LossOf, values: Sequence[Tensor]) -> GatedKL:
    loss, logged = _call_loss(loss_of, student_logp, [value.detach() for value in values])
    return GatedKL(loss.sum(), student_logp.detach(), logged)


# ==== rows in chunks ====


def _autocast(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.autocast would do to the operands of a matrix product."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head.to(dtype)


class _Product:
    """Slices of rows of logits, from hidden states and a head or as they are."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor | None,
        valid_vocab: int | None,
        temperature: float,
    ) -> None:
        self.valid = _check_product(hidden, head, valid_vocab, temperature)
        self.given, self.temperature = (hidden, head), temperature
        self.hidden, self.head = hidden, head
        if head is None:
            return
        self.hidden, self.head = _autocast(hidden, head[: self.valid])
        self.dtype = self.head.dtype
        if self.head.requires_grad and self.dtype != torch.float64:
            self.head = self.head.float()  # chunks then add up their gradients in float32

    def softmax(self, piece: slice) -> _Rows:
        """A slice of rows and their statistics."""
        rows = self.hidden[piece]
        if self.head is not None:
            rows = F.linear(rows, self.head.to(self.dtype))
        return _Rows(rows, self.valid, self.temperature)

    def some_logits(self, piece: slice, ids: Tensor) -> Tensor:
        """Logits / temperature at ids [n, K], summed over D in float32: of K rows of the head."""
        hidden, head = self.given
        if head is None:
            return _work(hidden[piece].gather(1, ids)) / self.temperature
        rows = F.embedding(ids, _work(head))  # [n, K, D]; repeated ids add up in float32
        return (_work(hidden[piece])[:, None, :] * rows).sum(-1) / self.temperature

    def bytes_per_row(self) -> int:
        return 4 * 4 * self.valid  # about four float32 rows live at once

    def in_chunks(
        self,
        function: Callable[[slice], tuple[Tensor | None, ...]],
        workspace_mib: float | None,
        bytes_per_row: int = 0,
    ) -> tuple[Any, ...]:
        """`function` on slices of rows that fit the workspace; computed again in backward."""
        num_rows, num_mib = self.hidden.shape[0], _workspace(workspace_mib, self.hidden.device)
        step = max(1, int(num_mib * 2**20) // (bytes_per_row or self.bytes_per_row()))
        if num_rows <= step:
            return function(slice(0, num_rows))
        pieces = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
        if torch.is_grad_enabled():
            chunks = [
                checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        else:
            chunks = [function(piece) for piece in pieces]
        columns = zip(*chunks, strict=True)
        return tuple(None if column[0] is None else torch.cat(column) for column in columns)


# ==== the ops ====


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
    """Log-prob of one token per row under the full softmax.

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        token_ids: [N] int64 in [0, valid_vocab).
        with_entropy: also return the entropy of each row.
        check_ids: look whether the ids are in range, for which a GPU has to be waited for. False
            for ids that are known to be, such as those just drawn; what others give is not defined.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients; None: 256, on a
            GPU 3600.

    Returns:
        logp [N] nats, <= 0; lse [N], the log of the sum of exp(logits / temperature); entropy [N]
        nats, >= 0, or None. All are float32 (float64 for float64).

    Gradient: to `hidden` and `head` in their dtypes, through all returned tensors; the head's is
    added up over chunks in float32. Backward multiplies a second time instead of keeping the
    logits: four matrix products in all, where `gated_kl` takes three.
    Cost: one read of the logits, in backward one read and one write. Error: within 2x that of
    float32 PyTorch against float64, plus 1e-6 nats, on the product in its dtype. Deterministic
    for any number of threads. Raises ValueError or IndexError naming the argument.

    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 9.0]])
    >>> logp, lse, entropy = token_logp(logits, None, torch.tensor([1, 0]), with_entropy=True)
    >>> logp.exp()
    tensor([0.2500, 0.0009])
    >>> entropy[0].exp().item()
    4.0
    >>> token_logp(logits, None, torch.tensor([1, 0]), valid_vocab=3).logp.exp()
    tensor([0.3333, 0.6652])
    >>> hidden, head = torch.eye(2, 3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    >>> from_head = token_logp(hidden, head, torch.tensor([0, 3])).logp
    >>> torch.allclose(from_head, token_logp(hidden @ head.T, None, torch.tensor([0, 3])).logp)
    True
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, product.valid, check_ids)

    def chunk(piece: slice) -> tuple[Tensor | None, ...]:
        rows = product.softmax(piece)
        logp = rows.logp(rows.logits.gather(1, token_ids[piece, None])).squeeze(-1)
        if not with_entropy:
            return logp, rows.lse(), None
        every = rows.logp(rows.logits)
        empty = every == -INF
        return logp, rows.lse(), -(every.exp() * every.masked_fill(empty, 0.0)).sum(-1)

    return TokenLogp(*product.in_chunks(chunk, workspace_mib))


@torch.no_grad()
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
    """The K likeliest tokens of each row with their log-probs under the full softmax.

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        k: 1 to valid_vocab.
        token_ids: [N] int64; also report the log-prob of this token.
        valid_vocab: ids from here on are padding and never selected.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory; None: 256, on a GPU 3600.

    Returns:
        ids [N, K] int64, likeliest first, ties by the lower id; logp [N, K] nats; lse [N];
        tail_logp [N], the log of the mass outside the K tokens, summed over those outside (-inf
        when K is the whole vocabulary); token_logp [N] with `token_ids`, else None.

    Gradient: none; all outputs are detached. NaN is never selected before a number.
    Cost: one read of the logits in the compiled op. The ids are the same on every device.

    >>> logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    >>> top = topk_logp(logits, None, 2, token_ids=torch.tensor([0]))
    >>> top.ids
    tensor([[1, 2]])
    >>> top.logp.exp().sum() + top.tail_logp.exp()
    tensor([1.0000])
    >>> topk_logp(torch.eye(2), torch.eye(3, 2), 1).ids.tolist()
    [[0], [1]]
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_k(k, product.valid)
    if token_ids is not None:
        _check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, product.valid)

    def chunk(piece: slice) -> tuple[Tensor | None, ...]:
        rows = product.softmax(piece)
        values = rows.logits.masked_fill(rows.logits.isnan(), -INF)
        threshold = values.topk(k, sorted=True).values[:, -1:]  # torch.topk leaves ties open
        above, level = values > threshold, values == threshold
        wanted = k - above.sum(-1, keepdim=True)
        chosen = above | (level & (level.cumsum(-1) <= wanted))  # [n, V], K True in each row
        ids = chosen.nonzero()[:, 1].view(-1, k)  # ascending ids
        order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
        ids = ids.gather(1, order)
        logp = rows.logp(rows.logits.gather(1, ids))
        token = None
        if token_ids is not None:
            token = rows.logp(rows.logits.gather(1, token_ids[piece, None])).squeeze(-1)
        return ids, logp, rows.lse(), rows.outside(chosen), token

    return TopK(*product.in_chunks(chunk, workspace_mib))


def gather_logp(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float | None = None,
) -> GatherLogp:
    """Log-probs of K tokens per row under the full softmax.

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        ids: [N, K] int64 in [0, valid_vocab); may repeat.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients; None: 256, on a
            GPU 3600.

    Returns:
        logp [N, K] nats, lse [N].

    Gradient: to `hidden` and `head` through both: of the logits it is scatter(g) - (sum of g) *
    softmax, where repeated ids add up in float32. Four products, as in `token_logp`.

    >>> gather_logp(torch.zeros(1, 4), None, torch.tensor([[2, 2, 0]])).logp.exp()
    tensor([[0.2500, 0.2500, 0.2500]])
    >>> gather_logp(torch.zeros(1, 2), torch.eye(4, 2), torch.tensor([[0, 3]])).logp.exp()
    tensor([[0.2500, 0.2500]])
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_id_rows("ids", ids, hidden, product.valid)

    def chunk(piece: slice) -> tuple[Tensor | None, ...]:
        rows = product.softmax(piece)
        return rows.logp(rows.logits.gather(1, ids[piece])), rows.lse()

    return GatherLogp(*product.in_chunks(chunk, workspace_mib))


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
    """Divergence of student and teacher on K tokens per row, and its weighted sum as a loss.

    Args:
        hidden: [N, D] float, the student's; with `head=None` its logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        support_ids: [N, K] int64 in [0, valid_vocab), distinct within a row.
        teacher_logp: [N, K] nats, the teacher's full-softmax log-probs of these tokens at the
            same temperature; a constant.
        token_weight: [N] float, or None for 1: a constant factor of each row's divergence in the
            loss. A row of weight 0 adds nothing, whatever its divergence is.
        divergence: "reverse" KL(student || teacher), "forward" KL(teacher || student), or "jsd",
            beta KL(teacher || M) + (1 - beta) KL(student || M), M = (1 - beta) student + beta
            teacher.
        beta: strictly inside (0, 1), for "jsd".
        renormalise: make both laws sum to 1 on the support. A support of one token is refused,
            because its loss is 0. False without a tail is the truncated sum: no divergence, it can
            be negative, and its reverse form pulls the student's mass off the support.
        tail: "bucket" adds one outcome, everything outside the support; needs renormalise=False.
        teacher_tail_logp: [N] nats, log of the teacher's mass outside, for the bucket.
        support_mask: [N, K] bool; False entries do not exist, whatever id and log-prob they hold.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the student's softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients; None: 256, on a
            GPU 3600.

    Returns:
        loss [], the sum over rows of token_weight * divergence; values [N] nats, the divergences
        without weight and detached, +inf where infinite. A row without any unmasked token gives 0.

    Gradient: to `hidden` and `head` through the loss; unspecified in rows where it is infinite.
    With renormalisation only K logits of a row matter: K rows of the head are multiplied, in
    float32 and never lowered by autocast; the others are neither read nor moved. Without it the
    loss takes three matrix products, as `gated_kl` does. The student's bucket is summed over the
    complement, precise to 1e-6 relative even when it holds 1e-8.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    >>> top = topk_logp(logits, None, 2)
    >>> support_kl(logits, None, top.ids, top.logp).loss
    tensor(0.)
    >>> teacher_logp, tail = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([0.3]).log()
    >>> support_kl(logits, None, top.ids, teacher_logp, renormalise=False, tail="bucket",
    ...            teacher_tail_logp=tail).values
    tensor([0.0930])
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    support_ids, look_at_ids = _check_support(
        support_ids,
        teacher_logp,
        hidden,
        product.valid,
        divergence,
        beta,
        renormalise,
        tail,
        teacher_tail_logp,
        support_mask,
        token_weight,
    )
    look_at_ids()()

    def part(tensor: Tensor | None, piece: slice) -> Tensor | None:
        return None if tensor is None else tensor[piece]

    def chunk(piece: slice) -> tuple[Tensor | None, ...]:
        ids, mask, student_tail = support_ids[piece], part(support_mask, piece), None
        if renormalise:  # the normaliser of the full softmax cancels
            student = product.some_logits(piece, ids)
        else:
            rows = product.softmax(piece)
            student = rows.logp(rows.logits.gather(1, ids))
            if tail == "bucket":
                student_tail = rows.outside(_members(ids, mask, product.valid))
        value = _support_divergence(
            student,
            teacher_logp[piece],
            mask,
            renormalise,
            student_tail,
            part(teacher_tail_logp, piece),
            divergence,
            beta,
        )
        return (value,)

    some = 4 * 4 * support_ids.shape[1] * hidden.shape[1] if renormalise and head is not None else 0
    (values,) = product.in_chunks(chunk, workspace_mib, some)
    return SupportKL(_weighted(values, token_weight).sum(), values.detach())


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
    """The loss of sampled tokens, in three matrix products.

    The caller's `loss_of` gives each token's loss as a function of its log-prob, so that a
    method's equation, gate and weights included, stays in the method's file:

        loss, logged = loss_of(student_logp, *values)

    is called on pieces of n rows, with `student_logp` [n] (or [n, M]) in float32 and the same rows
    of each tensor of `values`. It returns the loss [n], in which row i depends on row i only, and
    a dict of tensors [n, ...] to log. What is to be a constant has to be detached in it. Where
    the loss of a token depends on other tokens (a discounted sum, a normalisation over the
    batch), use the differentiable `token_logp` or `gather_logp` instead: four products.

    Args:
        hidden: [N, D] float, the student's; with `head=None` its logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        token_ids: [N] int64 in [0, valid_vocab), the sampled tokens; or [N, M], for losses of
            several tokens per row.
        loss_of: the function above. It runs with gradients enabled where one is wanted, else
            without, and always outside of autocast.
        values: tensors [N, ...] on the device of `hidden`; constants.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients; None: 256, on a
            GPU 3600.

    Returns:
        loss [], the sum of all tokens' losses; student_logp [N] (or [N, M]) nats, detached;
        logged, the dict with tensors [N, ...], detached.

    Gradient: to `hidden` and `head` through the loss. The forward call computes it, where
    gradients are enabled and wanted, and keeps it instead of logits and head; backward multiplies
    it by the incoming scalar, in place, so that a second backward is refused. The head's gradient
    is added up over chunks in float32. With bfloat16 products on a CPU both gradients are off by
    some 2.3e-3 (norm of the difference over the norm), as plain PyTorch's are, by other roundings
    where autocast lowers a float32 head: docs/kernels.md, Numerics. From logits, and under
    `torch.compile`, the op is `gather_logp` and the function. Raises ValueError or IndexError
    naming the argument.

    >>> def loss_of(student_logp, teacher_logp, verdict):
    ...     log_ratio = (student_logp - teacher_logp).detach()
    ...     gate = torch.where(verdict * -log_ratio > 0, 1.8, 0.5)
    ...     return gate * log_ratio * student_logp, {"log_ratio": log_ratio, "gate": gate}
    >>> teacher_logp, verdict = torch.tensor([0.8, 0.2]).log(), torch.tensor([1.0, 1.0])
    >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    >>> found = gated_kl(hidden, head, torch.tensor([0, 0]), loss_of, [teacher_logp, verdict])
    >>> found.logged["gate"]
    tensor([1.8000, 0.5000])
    >>> bool((found.logged["gate"] * found.logged["log_ratio"] * found.student_logp).sum()
    ...      == found.loss)
    True
    >>> found.loss.backward()
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_gated(token_ids, loss_of, values, hidden, product.valid)()()
    ids = token_ids if token_ids.dim() == 2 else token_ids[:, None]
    logp = gather_logp(
        hidden,
        head,
        ids,
        valid_vocab=valid_vocab,
        temperature=temperature,
        workspace_mib=workspace_mib,
    ).logp
    return _gated(logp.view(token_ids.shape), loss_of, values)


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
    """Exact divergence of student and teacher over the vocabulary, and its sum as a loss.

    Args:
        hidden: [N, D] float, the student's; with `head=None` its logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        teacher_hidden: [N, D'] float, a constant; with `teacher_head=None` logits [N, V'].
        teacher_head: [V', D'] of the dtype of `teacher_hidden`, or None. Autocast does not lower
            the teacher's product: it has the dtype of `teacher_hidden`.
        token_weight: [N] float, or None for 1: a constant factor of each row's divergence in the
            loss. A row of weight 0 adds nothing, whatever its divergence is.
        divergence: "reverse" KL(student || teacher), "forward" KL(teacher || student), or "jsd",
            beta KL(teacher || M) + (1 - beta) KL(student || M), M = (1 - beta) student + beta
            teacher.
        beta: strictly inside (0, 1), for "jsd".
        valid_vocab: ids from here on are padding of either vocabulary; V and V' may differ when it
            is given.
        temperature: > 0; divides the logits of both models.
        workspace_mib: bound on extra memory besides the returned gradients; None: 256, on a
            GPU 3600.

    Returns:
        loss [], the sum over rows of token_weight * divergence; values [N] nats, the divergences
        without weight and detached, >= 0 up to rounding; +inf where mathematics says so (reverse:
        a token that only the teacher excludes; forward: one that only the student excludes). -inf
        on both sides counts 0.

    Gradient: to `hidden` and `head` through the loss, computed by the forward call as in
    `gated_kl`; unspecified in rows where the divergence is infinite.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]])
    >>> full_kl(student, None, teacher, None).values
    tensor([inf])
    >>> full_kl(student, None, teacher, None, divergence="forward").values
    tensor([0.6931])
    >>> full_kl(student, None, teacher, None, divergence="jsd", beta=0.5).loss
    tensor(0.2158)
    >>> hidden, head = torch.eye(2), torch.arange(6.0).view(3, 2)
    >>> full_kl(hidden, head, hidden, head).values
    tensor([0., 0.])
    """
    valid = _check_full(
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
    student = _Product(hidden, head, valid, temperature)
    unlowered = torch.autocast(hidden.device.type, enabled=False)
    with unlowered:
        if teacher_head is not None:
            teacher_head = teacher_head.detach().to(teacher_hidden.dtype)
        teacher = _Product(teacher_hidden.detach(), teacher_head, valid, temperature)

    def chunk(piece: slice) -> tuple[Tensor | None, ...]:
        own = student.softmax(piece)
        with unlowered:
            other = teacher.softmax(piece)
        teacher_logp = other.logp(other.logits).to(own.logits.dtype)
        return (_divergence(own.logp(own.logits), teacher_logp, divergence, beta),)

    (values,) = student.in_chunks(chunk, workspace_mib, 2 * student.bytes_per_row())
    return FullKL(_weighted(values, token_weight).sum(), values.detach())
