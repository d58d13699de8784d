"""Cases of the CUDA kernels that the CPU kernels do not have. Run by test_cuda_emulation.py."""

import itertools
import os

import pytest
import torch
from strategies import DTYPES, INF, make_logits, random_ids

import opd_ops
from opd_ops import reference

OPS = torch.ops.opd_ops


def assert_topk(z, k, token):
    got = opd_ops.topk_logp(z, None, k, token_ids=token)
    spec = reference.topk_logp(z, None, k, token_ids=token)
    assert torch.equal(got.ids, spec.ids)
    for a, b in zip(got[1:], spec[1:]):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("vocab", [6001, 5999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_fallbacks(vocab, dtype):
    """More candidates than the buffer of 2,048 holds, fewer chunks than K, hardly any number."""
    column = torch.arange(vocab, dtype=torch.float32)
    rows = torch.stack(
        [
            torch.zeros(vocab),  # ties everywhere
            -column,  # the largest in few chunks
            (column % 7).floor(),
            torch.where(column < 3, 1.0, -INF),
            torch.where(column % 2 == 0, float("nan"), column.floor()),
            make_logits(0, 1, vocab, torch.float32, "normal")[0],
        ]
    ).to(dtype)
    for k in (1, 11, 13, 1024):  # there are twelve chunks
        assert_topk(rows, k, torch.tensor([0, vocab - 1, 3, 5, 1, 77]))


def test_topk_of_more_columns_than_the_buffer_but_few_numbers():
    z = torch.full((2, 3000), -INF)
    z[0, 2990:] = 1.0
    assert_topk(z, 20, torch.tensor([2995, 7]))


def test_unknown_ids_are_never_read():
    """Python refuses them; whoever calls torch.ops gets NaN for the id and nothing else."""
    z, ids = torch.randn(2, 300), torch.tensor([[5, 10**12], [300, -1]])
    logp, lse, _, tail, stats, _ = OPS.gather_logp(z, ids, 300, 1.0, False, True)
    assert logp.isnan().tolist() == [[False, True], [True, False]] and logp[1, 1] == -INF
    assert torch.allclose(lse, z.logsumexp(-1)) and tail.isfinite().all()
    grad, dense = torch.ones(2, 2), torch.zeros(2)
    out = OPS.gather_logp_backward(z, ids, grad, stats, dense, None, None, None, 300, 1.0)
    assert out[0, 5] == 1 and out.sum() == 1
    *_, token_logp = OPS.topk_logp(z, 3, ids[:, 1], 300, 1.0)
    assert token_logp.isnan().all()
    hidden, head = torch.randn(2, 9), torch.randn(300, 9)
    assert OPS.gather_linear(hidden, head, ids, 1.0).isnan().tolist() == [
        [False, True],
        [True, True],
    ]
    buffer = torch.zeros(300, 9)
    OPS.gather_linear_backward_head_(buffer, hidden, ids, grad)
    assert torch.equal(buffer[5], hidden[0]) and buffer.count_nonzero() == 9


@pytest.mark.parametrize("vocab", [1, 33, 300, 2049])
def test_tail_without_the_first_and_last_columns(vocab):
    """The ids are bits of words of 32: the edges of words and of the vocabulary, and twice."""
    z = make_logits(0, 2, vocab, torch.float32, "normal", "unaligned")
    ids = torch.tensor([[0, vocab - 1, 31, 32, 0, -1], [-1, -1, -1, -1, -1, vocab - 1]])
    ids = ids.clamp_max(vocab - 1)
    tail = OPS.gather_logp(z, ids, vocab, 1.0, False, True)[3]
    for n in range(2):
        inside = ids[n][ids[n] >= 0]
        logp = z[n].double().log_softmax(-1).index_fill(0, inside, -INF)
        torch.testing.assert_close(tail[n].double(), logp.logsumexp(-1), rtol=0, atol=2e-6)


def test_entropy_gradient_beside_impossible_tokens():
    """exp(logp) * (dense + slope * logp) is 0 there for any slope; found by 2,000 examples."""
    z = torch.tensor([[-INF, 0.5, 1.0], [0.0, -INF, -3.3e38]])
    for slope in (1e-3, 3.0, -1e6):
        leaf = z.clone().requires_grad_()
        entropy = opd_ops.token_logp(leaf, None, torch.tensor([1, 0]), with_entropy=True)[2]
        (grad,) = torch.autograd.grad(slope * entropy.sum(), leaf)
        assert (grad[z < -1e38] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_leaves_the_neighbours_alone(dtype):
    wide = torch.full((3, 1500), 7.0, dtype=dtype)
    rows = wide[:, 3:1404]  # odd number of columns, each row begins elsewhere
    rows.copy_(make_logits(1, 3, 1401, dtype, "normal"))
    ids = random_ids(0, 3, 5, 1390)
    expected = reference.gather_logp(rows.clone().requires_grad_(), None, ids, valid_vocab=1390)[1]
    _, lse, *_, stats, _ = OPS.gather_logp(rows, ids, 1390, 1.0, False, False)
    assert torch.allclose(lse, expected, atol=1e-5)
    ones = torch.ones(3, 5)
    arguments = (ids, ones, stats, -ones.sum(1), None, None, None, 1390, 1.0)
    apart = OPS.gather_logp_backward(rows, *arguments)
    OPS.gather_logp_backward_out(rows, *arguments, rows)
    assert torch.equal(apart, rows) and (rows[:, 1390:] == 0).all() and (rows[:, :1390] != 0).any()
    assert (wide[:, :3] == 7).all() and (wide[:, 1404:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 1030])
def test_products_with_k_rows(dtype, width):
    """Odd widths, unaligned and mixed operands, repeated ids, a buffer that has been used."""
    hidden = make_logits(1, 5, width, dtype, "normal", "unaligned")
    head = make_logits(2, 40, width, dtype, "normal")
    ids = random_ids(3, 5, 9, 40)
    ids[:, 4] = ids[:, 5] = 17
    grad = torch.randn(5, 9, generator=torch.Generator().manual_seed(4))
    exact = (head.double()[ids] * hidden.double()[:, None]).sum(-1)
    for left in (hidden, hidden.float()):
        got = OPS.gather_linear(left, head, ids, 0.5)
        torch.testing.assert_close(got.double(), exact / 2, rtol=1e-5, atol=2e-5)
    got = OPS.gather_linear_backward_hidden(hidden, head, ids, grad)
    exact = (grad.double()[:, :, None] * head.double()[ids]).sum(1)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=2e-5)
    for kind in (dtype, torch.float32):
        buffer = torch.ones(40, width, dtype=kind)
        OPS.gather_linear_backward_head_(buffer, hidden, ids, grad)
        terms = grad.double()[:, :, None] * hidden.double()[:, None]
        exact = torch.ones(40, width, dtype=torch.float64)
        exact.index_add_(0, ids.flatten(), terms.flatten(0, 1))
        loose = rounding if kind == dtype else 1e-6
        torch.testing.assert_close(buffer.double(), exact, rtol=loose, atol=2e-5)


def everything():
    z = make_logits(0, 3, 2777, torch.bfloat16, "ties", "unaligned")
    teacher, ids = make_logits(1, 3, 2777, torch.float32, "normal"), random_ids(0, 3, 40, 2777)
    one, grad = torch.ones(3), torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    results = list(OPS.gather_logp(z, ids, 2700, 0.7, False, True))
    results += OPS.gather_logp(z, ids, 2700, 0.7, True, False)
    stats, tail_stats = results[4], results[5]
    results += OPS.topk_logp(z, 50, ids[:, 0], 2777, 1.0)
    for more in ((one, None, None), (None, tail_stats, one), (None, None, None)):
        results.append(OPS.gather_logp_backward(z, ids, grad, stats, one, *more, 2700, 0.7))
    alike = make_logits(2, 3, 2777, torch.bfloat16, "normal", "unaligned")
    for far, kind in itertools.product((teacher, alike), range(3)):
        value, rows = OPS.full_kl(z, far, 2700, 0.7, kind, 0.3)
        gradient = z.clone()
        OPS.full_kl_backward_out(z, far, rows, one, 2700, 0.7, kind, 0.3, gradient)
        results += [value, rows, gradient]
    hidden, head = torch.randn(3, 77, generator=torch.Generator().manual_seed(1)), teacher[:, :77]
    buffer, few = torch.zeros(3, 77), ids % 3
    OPS.gather_linear_backward_head_(buffer, hidden, few, grad)
    results += [buffer, OPS.gather_linear(hidden, head, few, 2.0)]
    results.append(OPS.gather_linear_backward_hidden(hidden, head, few, grad))
    return results


def test_same_bits_in_any_order_of_the_threads(monkeypatch):
    """The emulator runs a block's threads first to last, or last to first."""
    assert os.environ.get("OPD_EMULATION_ORDER") is None
    first, again = everything(), everything()
    monkeypatch.setenv("OPD_EMULATION_ORDER", "reverse")
    reverse = everything()
    for a, b, c in zip(first, again, reverse):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        assert torch.equal(a.nan_to_num(9.0), c.nan_to_num(9.0))
