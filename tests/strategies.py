"""Hypothesis strategies: logits with everything that real ones have, and the error budget."""

import torch
from hypothesis import strategies as st
from torch import Tensor

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["normal", "ties", "flat", "huge", "offset", "masked", "peaked"]
LAYOUTS = ["contiguous", "row_strided", "transposed", "expanded", "unaligned"]


def make_logits(
    seed: int, rows: int, vocab: int, dtype: torch.dtype, pattern: str, layout: str = "contiguous"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    if pattern == "ties":
        z = (2 * z).round()
    elif pattern == "flat":
        z = z * 0
    elif pattern == "huge":
        z = (z * 1e4).clamp(-1e4, 1e4)
    elif pattern == "offset":
        z = z + 1000
    elif pattern == "masked":
        z = z.masked_fill(torch.rand(rows, vocab, generator=generator) < 0.4, -INF)
        if rows > 1:
            z[seed % rows] = -INF  # a row without a possible token
    elif pattern == "peaked":
        z = z * 15
    z = z.to(dtype)
    if layout == "row_strided":
        wide = torch.full((rows, vocab + 5), float("nan"), dtype=dtype)
        wide[:, 2 : vocab + 2] = z
        return wide[:, 2 : vocab + 2]
    if layout == "transposed":
        return z.t().contiguous().t()
    if layout == "expanded" and rows > 0:
        return z[:1].expand(rows, vocab)
    if layout == "unaligned":
        flat = torch.empty(rows * vocab + 3, dtype=dtype)
        flat[3:] = z.reshape(-1)
        return flat[3:].view(rows, vocab)
    return z


@st.composite
def logits(draw, dtypes=DTYPES, max_vocab=700, patterns=PATTERNS, min_rows=0):
    """A tensor [N, V]; V around the chunk size of the kernels (128) as often as elsewhere."""
    vocab = draw(
        st.one_of(
            st.integers(1, 40), st.sampled_from([127, 128, 129, 255, 256, 257]),
            st.integers(1, max_vocab),
        )
    )  # fmt: skip
    return make_logits(
        draw(st.integers(0, 2**31)),
        draw(st.integers(min_rows, 4)),
        vocab,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(patterns)),
        draw(st.sampled_from(LAYOUTS)),
    )


temperatures = st.sampled_from([1.0, 1.0, 0.7, 2.5])


@st.composite
def valid_vocabs(draw, vocab: int):
    """None, or a bound that leaves padding."""
    return draw(st.one_of(st.none(), st.integers(max(1, vocab // 2), vocab)))


def random_ids(seed: int, rows: int, columns: int, valid: int, distinct: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.rand(rows, valid, generator=generator).argsort(-1)[:, :columns]
    ids = torch.randint(0, valid, (rows, columns), generator=generator)
    if ids.numel() > 1:  # both edges of the vocabulary
        ids.view(-1)[0], ids.view(-1)[-1] = 0, valid - 1
    return ids


def weights(seed: int, *shapes: int | tuple[int, ...]) -> list[Tensor]:
    """A float64 tensor of each shape: gradients of outputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def policy_gradient(
    student_logp: Tensor, teacher_logp: Tensor, weight: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a token that opd.py has at its defaults, times a weight; and what is logged."""
    log_ratio = (student_logp - teacher_logp).detach()
    return weight * log_ratio * student_logp, {"log_ratio": log_ratio}


def assert_budget(
    got: Tensor, reference32: Tensor, truth: Tensor, floor: float = 1e-6, relative: float = 0.0
) -> None:
    """Infinities and NaN as in the truth; else at most twice the float32 reference's largest error.

    plus `floor`, plus `relative` times the value.
    """
    got, reference32, truth = (t.detach().double() for t in (got, reference32, truth))
    assert got.shape == truth.shape
    assert torch.equal(got.isnan(), truth.isnan()), (got, truth)
    special = ~truth.isfinite()
    assert torch.equal(got[special & ~truth.isnan()], truth[special & ~truth.isnan()]), (got, truth)
    error = (got - truth)[~special].abs()
    allowed = (reference32 - truth)[~special].abs()
    allowed = allowed[allowed.isfinite()].max() if allowed.isfinite().any() else torch.tensor(0.0)
    excess = error - 2 * allowed - relative * truth[~special].abs()
    if excess.numel():
        assert excess.max() <= floor, f"{excess.max():.3e} over {2 * allowed:.3e} + {floor:.0e}"
