"""The specification of every op of `opd_ops`, in plain PyTorch.

Each function here has the name, the signature and the meaning of the public op; the compiled ops
are tested against these, and take their documentation from here. Readability and numerical care
come first, speed second. Shared conventions:

- `logits` are [N, V] float32, bfloat16, float16 or float64; `hidden` [N, D] and `head` [V, D] share
  one dtype. N may be 0; leading dimensions are flattened by the caller.
- Arithmetic is float32 inside and the results are float32 for every input type, except that
  float64 stays float64. Log-probs are natural logarithms (nats). Gradients have the input's dtype.
- `valid_vocab`: ids from there on are padding of the vocabulary; they never enter a softmax or a
  top-K, and their gradient is 0. Default: the whole row.
- `temperature`: every softmax is over `logits / temperature`.
- A log-prob is `(z - max) - log(sum)`, so a common offset of the logits costs no precision.
- -inf logits are allowed (masks). A row of only -inf gives -inf log-probs and gradient 0. +inf and
  NaN propagate: every value of that row becomes NaN. Ties go to the lowest id.
- ids are int64 inside [0, valid_vocab); anything else raises `IndexError` before a logit is read.
- `linear_*` ops take the hidden states and the head in place of logits, and walk over the rows in
  chunks, so that they need `workspace_mib` of memory instead of [N, V]. `head=None` says that
  `hidden` already holds the logits [N, V], for models whose head is more than a matrix product.
  Under `torch.autocast`, hidden and head are cast to the autocast dtype for the product, as
  `torch.nn.functional.linear` does. The product has the dtype of its inputs.
- `inplace=True` allows an op to leave the gradient in the memory of `logits` (which must not be a
  leaf): a second backward through it is refused, and so is double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "full_kl",
    "gated_kl",
    "gather_logp",
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

Divergence = Literal["reverse", "forward", "jsd"]
Tail = Literal["none", "bucket"]
GradHead = Literal["dense", "rows"] | Tensor

INF = float("inf")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ==== argument checks, shared with the compiled ops ====


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: expected a float32, bfloat16, float16 or float64 tensor [N, V], "
            f"got {_describe(logits)}"
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
    if not values or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= valid:
        raise IndexError(f"{name}: expected ids in [0, {valid}), got {low} to {high}")


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
    name: str,
    hidden: Tensor,
    head_name: str,
    head: Tensor | None,
    valid_vocab: int | None,
    temperature: float,
) -> int:
    """Check hidden states and head, or logits and None; the number of ids that count."""
    if head is None:
        _check_logits(name, hidden)
        return _check_vocab(valid_vocab, hidden.shape[1], temperature)
    _check_hidden(name, hidden, head_name, head)
    return _check_vocab(valid_vocab, head.shape[0], temperature)


def _check_workspace(workspace_mib: float) -> None:
    if not workspace_mib > 0:
        raise ValueError(f"workspace_mib: expected a number > 0, got {workspace_mib!r}")


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


def _check_inplace(name: str, logits: Tensor, inplace: bool) -> None:
    if not inplace:
        return
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(f"{name}: inplace=True needs logits that are not a leaf, got a leaf")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"{name}: inplace=True needs rows without gaps, got strides {logits.stride()}"
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
) -> Tensor:
    """Check the arguments of `support_kl`; the support ids with masked ones replaced by 0."""
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
    if teacher_tail_logp is not None:
        _check_float("teacher_tail_logp", teacher_tail_logp, shape[:1], like)
    if support_mask is not None:
        _check_shape("support_mask", support_mask, shape, like)
        if support_mask.dtype != torch.bool:
            raise ValueError(f"support_mask: expected bool, got {_describe(support_mask)}")
        _check_ids("support_ids", support_ids, shape, like, valid, values=False)
        support_ids = support_ids.masked_fill(~support_mask, 0)
    _check_ids("support_ids", support_ids, shape, like, valid)
    return support_ids


def _check_gated(
    teacher_logp: Tensor,
    verdict: Tensor,
    reference_logp: Tensor | None,
    token_weight: Tensor | None,
    like: Tensor,
) -> None:
    shape = (like.shape[0],)
    _check_float("teacher_logp", teacher_logp, shape, like)
    _check_float("verdict", verdict, shape, like)
    if reference_logp is not None:
        _check_float("reference_logp", reference_logp, shape, like)
    if token_weight is not None:
        _check_float("token_weight", token_weight, shape, like)


def _check_grad_head(grad_head: object, head: Tensor) -> None:
    if isinstance(grad_head, Tensor):
        _check_float("grad_head", grad_head, tuple(head.shape), head)
    elif not isinstance(grad_head, str) or grad_head not in ("dense", "rows"):
        raise ValueError(f"grad_head: expected 'dense', 'rows' or a buffer, got {grad_head!r}")


def _check_support_grad_head(grad_head: object, head: Tensor, renormalise: bool) -> None:
    _check_grad_head(grad_head, head)
    if not renormalise and isinstance(grad_head, str) and grad_head == "rows":
        raise ValueError("grad_head: 'rows' needs renormalise=True, else every row has a gradient")


def _common_vocab(
    student_name: str, student: int, teacher_name: str, teacher: int, valid_vocab: int | None
) -> int | None:
    """Rows of different length need a `valid_vocab` that both have."""
    if valid_vocab is None and student != teacher:
        raise ValueError(
            f"valid_vocab: {student_name} has {student} ids and {teacher_name} {teacher}; "
            "say how many of them both share"
        )
    if valid_vocab is not None and valid_vocab > min(student, teacher):
        raise ValueError(
            f"valid_vocab: expected at most {min(student, teacher)} "
            f"({student_name} has {student} ids, {teacher_name} {teacher}), got {valid_vocab}"
        )
    return valid_vocab


def _check_full(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    beta: float,
    valid_vocab: int | None,
    temperature: float,
    inplace: bool,
) -> int:
    _check_logits("student_logits", student_logits)
    _check_logits("teacher_logits", teacher_logits)
    _check_divergence(divergence, beta)
    valid_vocab = _common_vocab(
        "student_logits",
        student_logits.shape[1],
        "teacher_logits",
        teacher_logits.shape[1],
        valid_vocab,
    )
    valid = _check_vocab(valid_vocab, student_logits.shape[1], temperature)
    _check_shape(
        "teacher_logits",
        teacher_logits,
        (student_logits.shape[0], teacher_logits.shape[1]),
        student_logits,
    )
    _check_inplace("student_logits", student_logits, inplace)
    return valid


def _check_linear_full(
    student_hidden: Tensor,
    student_head: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    divergence: str,
    beta: float,
    valid_vocab: int | None,
    temperature: float,
) -> int:
    _check_divergence(divergence, beta)
    vocabs = [
        hidden.shape[-1] if head is None else head.shape[0]
        for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
    ]
    valid_vocab = _common_vocab("the student", vocabs[0], "the teacher", vocabs[1], valid_vocab)
    _check_product(
        "teacher_hidden", teacher_hidden, "teacher_head", teacher_head, valid_vocab, temperature
    )
    shape = (student_hidden.shape[0], teacher_hidden.shape[1])
    _check_shape("teacher_hidden", teacher_hidden, shape, student_hidden)
    return _check_product(
        "student_hidden", student_hidden, "student_head", student_head, valid_vocab, temperature
    )


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


# ==== rows in chunks: hidden states and head instead of logits ====


def _autocast(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.autocast would do to the operands of a matrix product."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head.to(dtype)


def _in_chunks(
    function: Callable[..., Any], num_rows: int, bytes_per_row: int, workspace_mib: float
) -> list[tuple[Any, ...]]:
    """Call `function(slice)` on slices of rows that fit the workspace; recompute in backward."""
    _check_workspace(workspace_mib)
    step = max(1, int(workspace_mib * 2**20) // max(1, bytes_per_row))
    if num_rows <= step:
        return [function(slice(0, num_rows))]
    pieces = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    if not torch.is_grad_enabled():
        return [function(piece) for piece in pieces]
    return [
        checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False)
        for piece in pieces
    ]


def _joined(chunks: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    if len(chunks) == 1:
        return chunks[0]
    columns = zip(*chunks, strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)


class _Product:
    """`rows(slice)`: logits of a slice of rows, from hidden states and a head or as they are."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor | None,
        valid_vocab: int | None,
        temperature: float,
        name: str = "hidden",
        head_name: str = "head",
    ) -> None:
        self.hidden, self.head = hidden, head
        self.valid = _check_product(name, hidden, head_name, head, valid_vocab, temperature)
        if head is None:
            return
        self.hidden, self.head = _autocast(hidden, head[: self.valid])
        self.dtype = self.head.dtype
        if self.head.requires_grad and self.dtype != torch.float64:
            self.head = self.head.float()  # chunks then add up their gradients in float32

    def rows(self, piece: slice) -> Tensor:
        if self.head is None:
            return self.hidden[piece]
        return F.linear(self.hidden[piece], self.head.to(self.dtype))

    def bytes_per_row(self) -> int:
        return 4 * 4 * self.valid  # about four float32 rows live at once


# ==== the ops ====


def token_logp(
    logits: Tensor,
    token_ids: Tensor,
    *,
    with_entropy: bool = False,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, ...]:
    """Log-prob of one token per row under the full softmax.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64.
        token_ids: [N] int64 in [0, valid_vocab).
        with_entropy: also return the entropy of each row.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the softmax is over logits / temperature.
        inplace: the gradient may take the memory of `logits`; see the module's conventions.

    Returns:
        logp [N] nats, <= 0; lse [N], the log of the sum of exp(logits / temperature); with
        `with_entropy` also entropy [N] nats, >= 0. All are float32 (float64 for float64 logits).

    Gradient: to `logits` through all returned tensors, in the dtype of `logits`.
    Cost: one read of the logits, in backward one read and one write; no other [N, V] memory in
    the compiled op. Error: within 2x that of float32 PyTorch against float64, plus 1e-6 nats.
    Deterministic for any number of threads. Raises ValueError or IndexError naming the argument.

    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 9.0]])
    >>> logp, lse, entropy = token_logp(logits, torch.tensor([1, 0]), with_entropy=True)
    >>> logp.exp()
    tensor([0.2500, 0.0009])
    >>> entropy[0].exp().item()
    4.0
    >>> logp, lse = token_logp(logits, torch.tensor([1, 0]), valid_vocab=3)
    >>> logp.exp()
    tensor([0.3333, 0.6652])
    """
    _check_logits("logits", logits)
    valid = _check_vocab(valid_vocab, logits.shape[1], temperature)
    _check_ids("token_ids", token_ids, (logits.shape[0],), logits, valid)
    _check_inplace("logits", logits, inplace)
    rows = _Rows(logits, valid, temperature)
    logp = rows.logp(rows.logits.gather(1, token_ids[:, None])).squeeze(-1)
    if not with_entropy:
        return logp, rows.lse()
    every = rows.logp(rows.logits)
    empty = every == -INF
    entropy = -(every.exp() * every.masked_fill(empty, 0.0)).sum(-1)
    return logp, rows.lse(), entropy


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
    """`token_logp(hidden @ head.T, token_ids)` without ever holding [N, V].

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        token_ids: [N] int64 in [0, valid_vocab).
        with_entropy: also return the entropy of each row.
        valid_vocab: ids from here on are padding; their rows of `head` are not multiplied.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients.

    Returns:
        logp [N], lse [N][, entropy [N]] as `token_logp`.

    Gradient: to `hidden` and `head` in their dtypes; the head's is accumulated over chunks in
    float32. Backward multiplies a second time instead of keeping the logits. Error budget: that
    of `token_logp` on the product, which has the operands' dtype (under autocast: that of it).

    >>> hidden, head = torch.eye(2, 3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    >>> logp, lse = linear_token_logp(hidden, head, torch.tensor([0, 3]))
    >>> torch.allclose(logp, token_logp(hidden @ head.T, torch.tensor([0, 3]))[0])
    True
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, product.valid)

    def chunk(piece: slice) -> tuple[Tensor, ...]:
        return token_logp(
            product.rows(piece),
            token_ids[piece],
            with_entropy=with_entropy,
            valid_vocab=product.valid,
            temperature=temperature,
        )

    return _joined(_in_chunks(chunk, hidden.shape[0], product.bytes_per_row(), workspace_mib))


@torch.no_grad()
def topk_logp(
    logits: Tensor,
    k: int,
    *,
    token_ids: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """The K likeliest tokens of each row with their log-probs under the full softmax.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64.
        k: 1 to valid_vocab.
        token_ids: [N] int64; also report the log-prob and the rank of this token.
        valid_vocab: ids from here on are padding and never selected.
        temperature: > 0; the softmax is over logits / temperature.

    Returns:
        ids [N, K] int64, likeliest first, ties by the lower id; logp [N, K] nats; lse [N];
        tail_logp [N], the log of the mass outside the K tokens, summed over those outside (-inf
        when K is the whole vocabulary); with `token_ids` also token_logp [N] and token_rank [N]
        int64, counted from 0, so that `ids[n, token_rank[n]] == token_ids[n]` below K.

    Gradient: none; all outputs are detached. NaN is never selected before a number.
    Cost: one read of the logits in the compiled op. The ids are the same on every device.

    >>> logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    >>> ids, logp, lse, tail_logp, token_logp, token_rank = topk_logp(
    ...     logits, 2, token_ids=torch.tensor([0]))
    >>> ids, token_rank
    (tensor([[1, 2]]), tensor([2]))
    >>> logp.exp().sum() + tail_logp.exp()
    tensor([1.0000])
    """
    _check_logits("logits", logits)
    valid = _check_vocab(valid_vocab, logits.shape[1], temperature)
    _check_k(k, valid)
    if token_ids is not None:
        _check_ids("token_ids", token_ids, (logits.shape[0],), logits, valid)
    rows = _Rows(logits, valid, temperature)
    values = rows.logits.masked_fill(rows.logits.isnan(), -INF)
    threshold = values.topk(k, sorted=True).values[:, -1:]  # torch.topk leaves ties open
    above, level = values > threshold, values == threshold
    wanted = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= wanted))  # [N, V], K True in each row
    ids = chosen.nonzero()[:, 1].view(-1, k)  # ascending ids
    order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    logp = rows.logp(rows.logits.gather(1, ids))
    result = (ids, logp, rows.lse(), rows.outside(chosen))
    if token_ids is None:
        return result
    token = token_ids[:, None]
    value = values.gather(1, token)
    earlier = torch.arange(valid, device=logits.device) < token
    rank = ((values > value) | ((values == value) & earlier)).sum(-1)
    return *result, rows.logp(rows.logits.gather(1, token)).squeeze(-1), rank


@torch.no_grad()
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
    """`topk_logp(hidden @ head.T, k)` without ever holding [N, V].

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        k: 1 to valid_vocab.
        token_ids: [N] int64; also report the log-prob and the rank of this token.
        valid_vocab: ids from here on are padding and never selected.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory.

    Returns:
        ids [N, K], logp [N, K], lse [N], tail_logp [N][, token_logp [N], token_rank [N]] as
        `topk_logp`. No gradient.

    >>> ids, logp, lse, tail_logp = linear_topk_logp(torch.eye(2), torch.eye(3, 2), 1)
    >>> ids.tolist()
    [[0], [1]]
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_k(k, product.valid)
    if token_ids is not None:
        _check_ids("token_ids", token_ids, (hidden.shape[0],), hidden, product.valid)

    def chunk(piece: slice) -> tuple[Tensor, ...]:
        return topk_logp(
            product.rows(piece),
            k,
            token_ids=None if token_ids is None else token_ids[piece],
            valid_vocab=product.valid,
            temperature=temperature,
        )

    return _joined(_in_chunks(chunk, hidden.shape[0], product.bytes_per_row(), workspace_mib))


def gather_logp(
    logits: Tensor,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of K tokens per row under the full softmax.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64.
        ids: [N, K] int64 in [0, valid_vocab); may repeat.
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the softmax is over logits / temperature.
        inplace: the gradient may take the memory of `logits`; see the module's conventions.

    Returns:
        logp [N, K] nats, lse [N].

    Gradient: to `logits` through both: scatter(g) - (sum of g) * softmax, where repeated ids add
    up in float32. Cost: one read; in backward one read and one write.

    >>> logp, lse = gather_logp(torch.zeros(1, 4), torch.tensor([[2, 2, 0]]))
    >>> logp.exp()
    tensor([[0.2500, 0.2500, 0.2500]])
    """
    _check_logits("logits", logits)
    valid = _check_vocab(valid_vocab, logits.shape[1], temperature)
    _check_id_rows("ids", ids, logits, valid)
    _check_inplace("logits", logits, inplace)
    rows = _Rows(logits, valid, temperature)
    return rows.logp(rows.logits.gather(1, ids)), rows.lse()


def linear_gather_logp(
    hidden: Tensor,
    head: Tensor | None,
    ids: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> tuple[Tensor, Tensor]:
    """`gather_logp(hidden @ head.T, ids)` without ever holding [N, V].

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        ids: [N, K] int64 in [0, valid_vocab); may repeat.
        valid_vocab: ids from here on are padding; their rows of `head` are not multiplied.
        temperature: > 0; the softmax is over logits / temperature.
        workspace_mib: bound on extra memory besides the returned gradients.

    Returns:
        logp [N, K] nats, lse [N].

    Gradient: to `hidden` and `head` in their dtypes, the head's accumulated in float32.

    >>> logp, lse = linear_gather_logp(torch.zeros(1, 2), torch.eye(4, 2), torch.tensor([[0, 3]]))
    >>> logp.exp()
    tensor([[0.2500, 0.2500]])
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    _check_id_rows("ids", ids, hidden, product.valid)

    def chunk(piece: slice) -> tuple[Tensor, ...]:
        logits = product.rows(piece)
        return gather_logp(logits, ids[piece], valid_vocab=product.valid, temperature=temperature)

    logp, lse = _joined(_in_chunks(chunk, hidden.shape[0], product.bytes_per_row(), workspace_mib))
    return logp, lse


class _HeadRows(torch.autograd.Function):
    """head[ids] [n, K, D], whose gradient is a sparse tensor, or is added to a buffer."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, ids: Tensor, buffer: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.buffer = head.shape, head.dtype, buffer
        return head[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        unique, position = ids.flatten().unique(return_inverse=True)
        rows = _work(grad.flatten(0, 1))
        rows = rows.new_zeros(len(unique), rows.shape[1]).index_add_(0, position, rows)
        if ctx.buffer is not None:
            ctx.buffer.index_add_(0, unique, rows.to(ctx.buffer.dtype))
            return None, None, None
        sparse = torch.sparse_coo_tensor(
            unique[None], rows.to(ctx.dtype), ctx.shape, check_invariants=False, is_coalesced=True
        )
        return sparse, None, None


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
    """`(hidden @ head.T).gather(1, ids) / temperature` from K rows of the head per token.

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        ids: [N, K] int64 in [0, valid_vocab); may repeat.
        grad_head: how the head's gradient comes back: "dense" [V, D]; "rows", a sparse COO
            tensor with only the rows that occur; or a float buffer [V, D] to which backward
            adds it while `head.grad` stays as it is.
        valid_vocab: bound on the ids.
        temperature: > 0; divides the result.
        workspace_mib: bound on extra memory besides the returned gradients.

    Returns:
        [N, K] float32 (float64 for float64), summed over D in float32: for low-precision operands
        closer to the exact product than the full matrix product, whose output is rounded. Autocast
        does not lower it: the operands are taken as they are.

    Gradient: to `hidden` and `head`; rows of repeated ids are added in float32, in the order of
    (row, column), so the compiled op is bitwise reproducible. Cost: N * K * D instead of
    N * V * D; the head's other rows are not read.

    >>> hidden, head = torch.ones(1, 2), torch.arange(8.0).view(4, 2).requires_grad_()
    >>> linear_gather_logits(hidden, head, torch.tensor([[3, 0]]), grad_head="rows")
    tensor([[13.,  1.]], grad_fn=<...>)
    """
    valid = _check_product("hidden", hidden, "head", head, valid_vocab, temperature)
    _check_id_rows("ids", ids, hidden, valid)
    if head is None:
        return _work(hidden.gather(1, ids)) / temperature
    _check_grad_head(grad_head, head)
    hidden = _work(hidden)
    if head.requires_grad and isinstance(grad_head, str) and grad_head == "dense":
        head = _work(head)  # repeated ids add up in float32

    def chunk(piece: slice) -> tuple[Tensor, ...]:
        assert head is not None
        if isinstance(grad_head, str) and grad_head == "dense":
            rows = F.embedding(ids[piece], head)  # [n, K, D]
        else:
            buffer = grad_head if isinstance(grad_head, Tensor) else None
            rows = _HeadRows.apply(head, ids[piece], buffer)  # type: ignore[no-untyped-call]
        rows = _work(rows)
        return ((hidden[piece, None, :] * rows).sum(-1) / temperature,)

    bytes_per_row = 4 * 4 * ids.shape[1] * head.shape[1]
    (logits,) = _joined(_in_chunks(chunk, hidden.shape[0], bytes_per_row, workspace_mib))
    return cast(Tensor, logits)


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
    """Divergence of student and teacher on K tokens per row.

    Args:
        student_logits: [N, V], float32, bfloat16, float16 or float64.
        support_ids: [N, K] int64 in [0, valid_vocab), distinct within a row.
        teacher_logp: [N, K] nats, the teacher's full-softmax log-probs of these tokens at the
            same temperature; a constant.
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
        with_student_mass: also return the student's mass on the support (reads the whole row).
        valid_vocab: ids from here on are padding; they take no part and get gradient 0.
        temperature: > 0; the student's softmax is over student_logits / temperature.
        inplace: the gradient may take the memory of `student_logits`.

    Returns:
        divergence [N] nats, +inf where it is infinite; student_mass [N] in [0, 1], detached, or
        None. A row without any unmasked token gives 0.

    Gradient: to `student_logits` through the divergence; unspecified in rows where it is
    infinite. With renormalisation only the K logits matter: the rest of the row is neither read
    nor moved. The student's bucket is summed over the complement, precise to 1e-6 relative even
    when it holds 1e-8.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    >>> ids, teacher_logp, _, tail = topk_logp(logits, 2)
    >>> divergence, mass = support_kl(logits, ids, teacher_logp, with_student_mass=True)
    >>> divergence.item(), round(mass.item(), 4)
    (0.0, 0.8808)
    >>> support_kl(logits, ids, torch.tensor([[0.5, 0.2]]).log(), renormalise=False, tail="bucket",
    ...            teacher_tail_logp=torch.tensor([0.3]).log())[0]
    tensor([0.0930])
    """
    _check_logits("student_logits", student_logits)
    valid = _check_vocab(valid_vocab, student_logits.shape[1], temperature)
    support_ids = _check_support(
        support_ids,
        teacher_logp,
        student_logits,
        valid,
        divergence,
        beta,
        renormalise,
        tail,
        teacher_tail_logp,
        support_mask,
    )
    _check_inplace("student_logits", student_logits, inplace)
    if renormalise:
        values = _work(student_logits.gather(1, support_ids)) / temperature
        student_tail = None
    if not renormalise or with_student_mass:
        rows = _Rows(student_logits, valid, temperature)
        logp = rows.logp(rows.logits.gather(1, support_ids))
    if not renormalise:
        values = logp
        inside = _members(support_ids, support_mask, valid)
        student_tail = rows.outside(inside) if tail == "bucket" else None
    result = _support_divergence(
        values,
        teacher_logp,
        support_mask,
        renormalise,
        student_tail,
        teacher_tail_logp,
        divergence,
        beta,
    )
    if not with_student_mass:
        return result, None
    mass = logp.detach().exp()
    if support_mask is not None:
        mass = mass.masked_fill(~support_mask, 0.0)
    return result, mass.sum(-1)


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
    """`support_kl(hidden @ head.T, ...)`; with renormalisation from K rows of the head only.

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        grad_head: "dense", "rows" or a buffer, as in `linear_gather_logits`; without
            renormalisation every row of the head has a gradient, and "rows" is refused.
        workspace_mib: bound on extra memory besides the returned gradients.
        support_ids, teacher_logp, divergence, beta, renormalise, tail, teacher_tail_logp,
        support_mask, with_student_mass, valid_vocab, temperature: as in `support_kl`.

    Returns:
        divergence [N] nats; student_mass [N] or None. The mass needs the full product: asking
        for it costs N * V * D, without gradient.

    Gradient: to `hidden` and `head`.

    >>> hidden, head = torch.ones(1, 2), torch.eye(4, 2)
    >>> ids, teacher_logp = torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]).log()
    >>> linear_support_kl(hidden, head, ids, teacher_logp)[0]
    tensor([0.1109])
    """
    product = _Product(hidden, head, valid_vocab, temperature)
    support_ids = _check_support(
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
    )
    if head is not None:
        _check_support_grad_head(grad_head, head, renormalise)

    def part(tensor: Tensor | None, piece: slice) -> Tensor | None:
        return None if tensor is None else tensor[piece]

    def chunk(piece: slice) -> tuple[Any, ...]:
        logits = product.rows(piece)
        return support_kl(
            logits,
            support_ids[piece],
            teacher_logp[piece],
            divergence=divergence,
            beta=beta,
            renormalise=renormalise,
            tail=tail,
            teacher_tail_logp=part(teacher_tail_logp, piece),
            support_mask=part(support_mask, piece),
            with_student_mass=with_student_mass,
            valid_vocab=product.valid,
            temperature=temperature,
        )

    def full(product: _Product) -> tuple[Any, ...]:
        return _joined(_in_chunks(chunk, hidden.shape[0], product.bytes_per_row(), workspace_mib))

    if head is None:
        result, mass = full(product)
        return result, mass
    if not renormalise:
        if isinstance(grad_head, Tensor):
            product.head = _IntoBuffer.apply(head, grad_head)[: product.valid]  # type: ignore[no-untyped-call]
            product.hidden, product.head = _autocast(hidden, product.head)
        result, mass = full(product)
        return result, mass
    mass = None
    if with_student_mass:
        with torch.no_grad():
            mass = full(product)[1]
    values = linear_gather_logits(
        hidden,
        head,
        support_ids,
        grad_head=grad_head,
        valid_vocab=valid_vocab,
        temperature=temperature,
        workspace_mib=workspace_mib,
    )
    result = _support_divergence(
        values, teacher_logp, support_mask, True, None, None, divergence, beta
    )
    return result, mass


class _IntoBuffer(torch.autograd.Function):
    """head itself, whose gradient is added to a buffer instead of going to `head.grad`."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return head.view_as(head)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.buffer.add_(grad)
        return None, None


def _gated(
    student_logp: Tensor,
    teacher_logp: Tensor,
    verdict: Tensor,
    extrapolation: float,
    interpolation: float,
    reference_logp: Tensor | None,
    token_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    detached = student_logp.detach()
    teacher_logp = teacher_logp.detach().to(detached.dtype)
    log_ratio = detached - teacher_logp
    agrees = verdict.detach() * -log_ratio > 0
    gate = torch.full_like(detached, interpolation).masked_fill(agrees, extrapolation)
    gate = gate.masked_fill(verdict == 0, 1.0)
    if reference_logp is None:
        advantage = gate * -log_ratio
    else:
        reward = teacher_logp - reference_logp.detach().to(detached.dtype)
        advantage = -log_ratio + (gate - 1) * reward
    if token_weight is not None:
        weight = token_weight.detach().to(detached.dtype)
        unused = weight == 0  # a row of weight 0 is silent even where its log-probs are not finite
        advantage = (weight * advantage).masked_fill(unused, 0.0)
        student_logp = student_logp.masked_fill(unused, 0.0)
    return -advantage * student_logp, detached, log_ratio, gate


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
    """Sign-gated policy-gradient loss of the reverse KL, per sampled token.

    With advantage = gate * (teacher_logp - student_logp), or with `reference_logp`
    (teacher_logp - student_logp) + (gate - 1) * (teacher_logp - reference_logp), the loss is
    -token_weight * advantage * student_logp, advantage and gate held constant. gate is 1 where
    verdict is 0, `extrapolation` where verdict * (teacher_logp - student_logp) > 0, else
    `interpolation`. With both gates 1 it is plain on-policy distillation.

    Args:
        student_logits: [N, V], float32, bfloat16, float16 or float64.
        token_ids: [N] int64 in [0, valid_vocab), the sampled tokens.
        teacher_logp: [N] nats, the teacher's log-prob of them; a constant.
        verdict: [N] float, -1, 0 or +1: the verifier's word; 0 is unverified.
        extrapolation, interpolation: the gate's two values.
        reference_logp: [N] nats, or None.
        token_weight: [N] float, or None for 1; rows of weight 0 get loss 0 and gradient 0.
        valid_vocab, temperature, inplace: as in `token_logp`.

    Returns:
        loss [N]; student_logp [N], log_ratio [N] = student_logp - teacher_logp, gate [N]: these
        three are detached.

    Gradient: to `student_logits` through the loss only.

    >>> logits, teacher = torch.zeros(2, 2), torch.tensor([0.8, 0.2]).log()
    >>> loss, student_logp, log_ratio, gate = gated_kl(
    ...     logits, torch.tensor([0, 0]), teacher, torch.tensor([1.0, 1.0]),
    ...     extrapolation=1.8, interpolation=0.5)
    >>> gate
    tensor([1.8000, 0.5000])
    >>> torch.allclose(loss, -gate * -log_ratio * student_logp)
    True
    """
    _check_logits("student_logits", student_logits)
    _check_gated(teacher_logp, verdict, reference_logp, token_weight, student_logits)
    logp = token_logp(
        student_logits,
        token_ids,
        valid_vocab=valid_vocab,
        temperature=temperature,
        inplace=inplace,
    )[0]
    return _gated(
        logp, teacher_logp, verdict, extrapolation, interpolation, reference_logp, token_weight
    )


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
    """`gated_kl(hidden @ head.T, ...)` without ever holding [N, V].

    Args:
        hidden: [N, D] float; with `head=None` the logits [N, V] themselves.
        head: [V, D] of the same dtype, or None.
        workspace_mib: bound on extra memory besides the returned gradients.
        token_ids, teacher_logp, verdict, extrapolation, interpolation, reference_logp,
        token_weight, valid_vocab, temperature: as in `gated_kl`.

    Returns:
        loss [N], student_logp [N], log_ratio [N], gate [N] as `gated_kl`.

    Gradient: to `hidden` and `head` through the loss only.

    >>> loss, student_logp, log_ratio, gate = linear_gated_kl(
    ...     torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]), torch.tensor([0.5]).log(),
    ...     torch.tensor([0.0]), extrapolation=1.8, interpolation=1.0)
    >>> log_ratio
    tensor([-0.6931])
    """
    _check_gated(teacher_logp, verdict, reference_logp, token_weight, hidden)
    logp = linear_token_logp(
        hidden,
        head,
        token_ids,
        valid_vocab=valid_vocab,
        temperature=temperature,
        workspace_mib=workspace_mib,
    )[0]
    return _gated(
        logp, teacher_logp, verdict, extrapolation, interpolation, reference_logp, token_weight
    )


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
    """Exact divergence of student and teacher over the whole vocabulary.

    Args:
        student_logits: [N, V], float32, bfloat16, float16 or float64.
        teacher_logits: [N, V'], a constant; V' may differ from V when `valid_vocab` is given.
        divergence: "reverse" KL(student || teacher), "forward" KL(teacher || student), or "jsd",
            beta KL(teacher || M) + (1 - beta) KL(student || M), M = (1 - beta) student + beta
            teacher.
        beta: strictly inside (0, 1), for "jsd".
        valid_vocab: ids from here on are padding of either vocabulary.
        temperature: > 0; divides the logits of both models.
        inplace: the gradient may take the memory of `student_logits`.

    Returns:
        [N] nats, >= 0 up to rounding; +inf where mathematics says so (reverse: a token that only
        the teacher excludes; forward: one that only the student excludes). -inf on both sides
        counts 0.

    Gradient: to `student_logits` only; unspecified in rows where the divergence is infinite.
    Cost: one read of both in forward; in backward one more read of both and one write.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]])
    >>> full_kl(student, teacher), full_kl(student, teacher, divergence="forward")
    (tensor([inf]), tensor([0.6931]))
    >>> full_kl(student, teacher, divergence="jsd", beta=0.5)
    tensor([0.2158])
    """
    valid = _check_full(
        student_logits, teacher_logits, divergence, beta, valid_vocab, temperature, inplace
    )
    student = _Rows(student_logits, valid, temperature)
    teacher = _Rows(teacher_logits.detach(), valid, temperature)
    return _divergence(
        student.logp(student.logits),
        teacher.logp(teacher.logits).to(student.logits.dtype),
        divergence,
        beta,
    )


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
    """`full_kl(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T)` in chunks.

    Args:
        student_hidden: [N, D] float; with `student_head=None` the logits [N, V] themselves.
        student_head: [V, D] of the same dtype, or None.
        teacher_hidden: [N, D'] float, a constant; with `teacher_head=None` logits [N, V'].
        teacher_head: [V', D'] of the dtype of `teacher_hidden`, or None.
        divergence, beta, valid_vocab, temperature: as in `full_kl`; V and V' may differ when
            `valid_vocab` is given.
        workspace_mib: bound on extra memory besides the returned gradients.

    Returns:
        [N] nats as `full_kl`.

    Gradient: to `student_hidden` and `student_head` only.

    >>> hidden, head = torch.eye(2), torch.arange(6.0).view(3, 2)
    >>> linear_full_kl(hidden, head, hidden, head)
    tensor([0., 0.])
    """
    valid_vocab = _check_linear_full(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence,
        beta,
        valid_vocab,
        temperature,
    )
    student = _Product(
        student_hidden, student_head, valid_vocab, temperature, "student_hidden", "student_head"
    )
    teacher = _Product(
        teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detach(),
        valid_vocab,
        temperature,
        "teacher_hidden",
        "teacher_head",
    )
    num_rows = student_hidden.shape[0]

    def chunk(piece: slice) -> tuple[Tensor, ...]:
        return (
            full_kl(
                student.rows(piece),
                teacher.rows(piece),
                divergence=divergence,
                beta=beta,
                valid_vocab=student.valid,
                temperature=temperature,
            ),
        )

    bytes_per_row = student.bytes_per_row() + teacher.bytes_per_row()
    (result,) = _joined(_in_chunks(chunk, num_rows, bytes_per_row, workspace_mib))
    return cast(Tensor, result)
