"""Compiled row ops against float64, with the float32 reference as the measure of what is fair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    INF,
    assert_budget,
    logits,
    make_logits,
    random_ids,
    temperatures,
    valid_vocabs,
    weights,
)

import opd_ops
from opd_ops import reference

CPP = torch.ops.opd_ops
DIVERGENCES = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.05), ("jsd", 0.9)]


def three_ways(name, tensors, *args, dtype, grad_weights, **kwargs):
    """(values, gradient) of the op, of the float32 reference and of the float64 truth.

    `tensors` are logits and what follows the head's None. The divergences of `full_kl` are
    differentiated through their loss, where they are finite.
    """
    results = []
    for module, kind in ((opd_ops, dtype), (reference, torch.float32), (reference, torch.float64)):
        first = tensors[0].detach()
        if kind != first.dtype:
            first = first.to(kind)
        first.requires_grad_()
        others = list(tensors[1:])
        if module is reference:
            others = [t.to(kind) if t.is_floating_point() else t for t in others]
        if name == "full_kl":
            others.append(None)
            values = module.full_kl(first.detach(), None, *others, **kwargs).values
            weight = grad_weights[0].to(values.dtype).masked_fill(~values.isfinite(), 0.0)
            loss = module.full_kl(first, None, *others, **kwargs, token_weight=weight).loss
            results.append(((values,), torch.autograd.grad(loss, first)[0]))
            continue
        out = getattr(module, name)(first, None, *others, *args, **kwargs)
        finite = [o.masked_fill(~o.detach().isfinite(), 0.0) for o in out]
        loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(finite, grad_weights))
        (gradient,) = torch.autograd.grad(loss, first)
        results.append((out, gradient))
    return results


def assert_gradient(got, reference32, truth, dtype, floor=4e-6):
    assert got.dtype == dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert_budget(got, reference32, truth, floor=floor, relative=rounding)


@given(z=logits(), seed=st.integers(0, 2**31), temperature=temperatures, data=st.data())
def test_token_logp(z, seed, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    ids = random_ids(seed, z.shape[0], 1, valid or z.shape[1])[:, 0]
    n = z.shape[0]
    op, fp32, truth = three_ways(
        "token_logp",
        (z, ids),
        dtype=z.dtype,
        grad_weights=weights(seed, n, n, n),
        with_entropy=True,
        valid_vocab=valid,
        temperature=temperature,
    )
    for got, rough, exact in zip(op[0], fp32[0], truth[0]):
        assert got.dtype == torch.float32
        if z.dtype == torch.float32:
            assert_budget(got, rough, exact)
        else:  # the budget of low precision does not depend on the reference
            assert_budget(got, exact, exact, floor=1e-5, relative=4 * 2.0**-24)
    assert (op[0][0] <= 0).logical_or(op[0][0].isnan()).all()
    assert_gradient(op[1], fp32[1], truth[1], z.dtype, floor=4e-6 / min(1.0, temperature))


@given(
    z=logits(),
    k=st.sampled_from([0, 1, 2, 5, 40]),
    seed=st.integers(0, 2**31),
    temperature=temperatures,
    data=st.data(),
)
def test_gather_logp(z, k, seed, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    n = z.shape[0]
    ids = random_ids(seed, n, k, valid or z.shape[1])  # repeated ids occur
    op, fp32, truth = three_ways(
        "gather_logp",
        (z, ids),
        dtype=z.dtype,
        grad_weights=weights(seed, (n, k), n),
        valid_vocab=valid,
        temperature=temperature,
    )
    for got, rough, exact in zip(op[0], fp32[0], truth[0]):
        assert_budget(got, rough, exact)
    assert_gradient(op[1], fp32[1], truth[1], z.dtype, floor=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(
    z=logits(),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 0.0, 1e-3, 10.0]),
    temperature=temperatures,
    data=st.data(),
)
def test_full_kl(kind, z, seed, scale, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    n, vocab = z.shape
    teacher_dtype = data.draw(st.sampled_from(DTYPES))
    noise = scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))
    teacher = (z.float() + noise).to(teacher_dtype)
    if data.draw(st.booleans()) and n > 0:  # tokens that only one side excludes
        teacher = teacher.masked_fill(torch.rand(n, vocab) < 0.1, -INF)
    divergence, beta = kind
    op, fp32, truth = three_ways(
        "full_kl",
        (z, teacher),
        dtype=z.dtype,
        grad_weights=weights(seed, n),
        divergence=divergence,
        beta=beta,
        valid_vocab=valid,
        temperature=temperature,
    )
    # a divergence is a sum of log-ratios, so its rounding grows with them
    size = (z.double() - teacher.double()).abs()
    size = float(size[size.isfinite()].max()) if size.isfinite().any() else 0.0
    floor = 1e-6 + 4e-7 * size / temperature
    assert_budget(op[0][0], fp32[0][0], truth[0][0], floor=floor)
    finite = truth[0][0].isfinite()
    assert_gradient(
        op[1][finite], fp32[1][finite], truth[1][finite], z.dtype, floor=4 * floor + 4e-6
    )


@given(
    z=logits(max_vocab=2000),
    k=st.sampled_from([1, 2, 5, 8, 32]),
    seed=st.integers(0, 2**31),
    temperature=temperatures,
    data=st.data(),
)
def test_topk_logp(z, k, seed, temperature, data):
    """Ids are those of the reference exactly: they depend on values, not on sums."""
    valid = data.draw(valid_vocabs(z.shape[1]))
    k = data.draw(st.sampled_from([min(k, valid or z.shape[1]), valid or z.shape[1]]))
    ids = random_ids(seed, z.shape[0], 1, valid or z.shape[1])[:, 0]
    settings = {"token_ids": ids, "valid_vocab": valid, "temperature": temperature}
    op = opd_ops.topk_logp(z, None, k, **settings)
    rough = reference.topk_logp(z.float(), None, k, **settings)
    truth = reference.topk_logp(z.double(), None, k, **settings)
    assert torch.equal(op.ids, truth.ids)
    for i in (1, 2, 3, 4):
        assert op[i].dtype == torch.float32
        # a tail may be one exp far below the maximum, whose error grows with its argument
        assert_budget(op[i], rough[i], truth[i], relative=1e-7 if i == 3 else 0.0)
    without = opd_ops.topk_logp(z, None, k, valid_vocab=valid, temperature=temperature)
    assert without.token_logp is None
    assert all(torch.equal(a, b) for a, b in zip(without[:4], op))


@pytest.mark.parametrize("pattern", ["ascending", "descending", "constant", "steps", "nan"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocab", [37, 128, 3000])
def test_topk_of_adversarial_rows(pattern, dtype, vocab):
    """Rows that defeat a running threshold, or that have more ties than any buffer."""
    z = torch.arange(vocab, dtype=torch.float64).repeat(3, 1)
    z = {
        "ascending": z,
        "descending": -z,
        "constant": 0 * z,
        "steps": (z / 1000).floor(),
        "nan": torch.where(z % 3 == 0, float("nan"), -z),
    }[pattern].to(dtype)
    z[1, ::2] = -INF
    z[2, : vocab // 2] = -0.0  # equal to 0
    for k in (1, 7, 33, vocab):
        if k > vocab:
            continue
        token = torch.tensor([0, vocab - 1, vocab // 2])
        op = opd_ops.topk_logp(z, None, k, token_ids=token)
        spec = reference.topk_logp(z, None, k, token_ids=token)
        assert torch.equal(op.ids, spec.ids)
        for a, b in zip(op[1:], spec[1:]):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_small_tails_keep_their_digits():
    """Trap 7, and masses too small to be seen beside the row's maximum."""
    for gap in (10.0, 25.0, 60.0, 95.0, 1e4):
        for first in (0, 700):
            z = torch.full((1, 1001), -gap)
            z[0, first] = 0.0
            truth = math.log(1000.0) - gap - math.log1p(1000 * math.exp(-gap))
            tail = opd_ops.topk_logp(z, None, 1).tail_logp
            assert abs(tail.item() - truth) < 2e-6 * gap
            value, _ = opd_ops.support_kl(  # of one row: the loss is its value
                z, None, torch.tensor([[first]]), torch.tensor([[-INF]]), divergence="forward",
                renormalise=False, tail="bucket", teacher_tail_logp=torch.zeros(1),
            )  # fmt: skip
            assert abs(value.item() + truth) < 2e-6 * gap


SUPPORT_FORMS = ["renormalised", "truncated", "bucket"]


@pytest.mark.parametrize("form", SUPPORT_FORMS)
@given(
    z=logits(patterns=["normal", "ties", "offset", "peaked", "masked"]),
    k=st.sampled_from([2, 3, 8]),
    kind=st.sampled_from(DIVERGENCES),
    seed=st.integers(0, 2**31),
    temperature=temperatures,
    data=st.data(),
)
def test_support_kl(form, z, k, kind, seed, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    n, columns = z.shape[0], valid or z.shape[1]
    k = min(k, columns)
    if form == "renormalised" and k == 1:
        return
    ids = random_ids(seed, n, k, columns, distinct=True)
    teacher = make_logits(seed + 1, n, columns, torch.float64, "normal") / temperature
    teacher_logp = teacher.log_softmax(-1)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.3
        ids = ids.masked_fill(~mask, 10**9)
    inside = ids.masked_fill(ids == 10**9, 0)
    outside = torch.ones(n, columns, dtype=torch.bool)
    for row in range(n):
        outside[row, ids[row][ids[row] < columns]] = False
    tail = teacher_logp.masked_fill(~outside, -INF).logsumexp(-1)
    extra = {
        "renormalised": {},
        "truncated": {"renormalise": False},
        "bucket": {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail},
    }[form]
    divergence, beta = kind
    results = []
    for module, dtype in (
        (opd_ops, z.dtype),
        (reference, torch.float32),
        (reference, torch.float64),
    ):
        leaf = z.detach() if module is opd_ops else z.detach().to(dtype)
        leaf.requires_grad_()

        def call(weight, module=module, leaf=leaf):
            return module.support_kl(
                leaf, None, ids, teacher_logp.gather(1, inside), support_mask=mask,
                token_weight=weight, divergence=divergence, beta=beta, valid_vocab=valid,
                temperature=temperature, **extra,
            )  # fmt: skip

        values = call(None).values
        loss = call(values.isfinite().to(values.dtype)).loss
        results.append((values, torch.autograd.grad(loss, leaf)[0]))
    op, rough, truth = results
    size = max(
        1.0,
        float(truth[0].detach()[truth[0].isfinite()].abs().max())
        if n and truth[0].isfinite().any()
        else 1.0,
    )
    assert_budget(op[0], rough[0], truth[0], floor=4e-6 * size)
    finite = truth[0].isfinite()
    assert_gradient(op[1][finite], rough[1][finite], truth[1][finite], z.dtype, floor=2e-5 * size)
    if form == "renormalised" and n:  # nothing but the support moves
        touched = torch.zeros_like(z, dtype=torch.bool)
        for row in range(n):
            touched[row, ids[row][ids[row] < columns]] = True
        assert (op[1][~touched] == 0).all()


def test_renormalised_support_does_not_read_the_rest_of_the_row():
    z = torch.full((2, 400), float("nan"))
    ids = torch.tensor([[5, 300, 7], [0, 1, 399]])
    z.scatter_(1, ids, torch.randn(2, 3))
    z.requires_grad_()
    loss, values = opd_ops.support_kl(z, None, ids, -torch.rand(2, 3))
    loss.backward()
    assert values.isfinite().all() and z.grad.isfinite().all() and (z.grad != 0).sum() == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_vocabulary(dtype):
    """The size of a real vocabulary, with an odd number of columns beside it."""
    for vocab in (151_936, 50_257):
        z = make_logits(1, 3, vocab, dtype, "normal") * 3
        ids = random_ids(2, 3, 8, vocab)
        op, fp32, truth = three_ways(
            "gather_logp", (z, ids), dtype=dtype, grad_weights=weights(3, (3, 8), 3)
        )
        for got, rough, exact in zip(op[0], fp32[0], truth[0]):
            assert_budget(got, rough, exact)
        assert_gradient(op[1], fp32[1], truth[1], dtype, floor=1e-6)
        top = opd_ops.topk_logp(z, None, 64, token_ids=ids[:, 0])
        spec = reference.topk_logp(z.double(), None, 64, token_ids=ids[:, 0])
        assert torch.equal(top.ids, spec.ids)
        torch.testing.assert_close(top.tail_logp.double(), spec.tail_logp, rtol=0, atol=2e-6)
        teacher = z + make_logits(4, 3, vocab, dtype, "normal") / 10
        for divergence, beta in DIVERGENCES:
            op, fp32, truth = three_ways(
                "full_kl",
                (z, teacher),
                dtype=dtype,
                grad_weights=weights(5, 3),
                divergence=divergence,
                beta=beta,
            )
            assert_budget(op[0][0], fp32[0][0], truth[0][0])
            assert_gradient(op[1], fp32[1], truth[1], dtype, floor=1e-7)


def test_padding_of_the_vocabulary_changes_nothing():
    """Trap 16: perturbed padded logits, in values and gradients, bit for bit."""
    z = torch.randn(4, 300)
    ids = random_ids(0, 4, 3, 260)
    outcomes = []
    for padding in (0.0, 50.0, INF, float("nan")):
        padded = z.clone()
        padded[:, 260:] = padding
        padded.requires_grad_()
        logp, lse, entropy = opd_ops.token_logp(
            padded, None, ids[:, 0], with_entropy=True, valid_vocab=260
        )
        more, _ = opd_ops.gather_logp(padded, None, ids, valid_vocab=260)
        full = opd_ops.full_kl(padded, None, padded.detach().flip(0), None, valid_vocab=260)
        loss = (logp + lse + entropy + more.sum(-1)).sum() + full.loss
        (grad,) = torch.autograd.grad(loss, padded)
        assert (grad[:, 260:] == 0).all()
        flat = [logp, lse, entropy, full.values, more.flatten(), grad.flatten()]
        outcomes.append(torch.cat(flat))
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_nan_and_infinite_logits_stay_in_their_row():
    z = torch.randn(4, 200)
    z[1, 7], z[2, 150] = float("nan"), INF
    z.requires_grad_()
    ids = torch.tensor([3, 3, 3, 3])
    logp, lse, entropy = opd_ops.token_logp(z, None, ids, with_entropy=True)
    (grad,) = torch.autograd.grad((logp + lse + entropy).nan_to_num().sum(), z)
    full = opd_ops.full_kl(z, None, z.detach().clone().nan_to_num(0, 0), None).values
    for out in (logp, lse, entropy, full):
        assert out.isnan().tolist() == [False, True, True, False]
    assert grad[[0, 3]].isfinite().all()


def test_dead_rows_have_no_gradient():
    z = torch.full((2, 130), -INF, requires_grad=True)
    logp, lse, _ = opd_ops.token_logp(z, None, torch.tensor([0, 129]))
    assert logp.tolist() == lse.tolist() == [-INF, -INF]
    (grad,) = torch.autograd.grad(logp.nan_to_num(neginf=0.0).sum() + lse.exp().sum(), z)
    assert (grad == 0).all()
    for divergence in ("reverse", "forward", "jsd"):
        found = opd_ops.full_kl(z, None, z.detach(), None, divergence=divergence)
        assert found.values.tolist() == [0.0, 0.0]


def test_teacher_without_a_possible_token():
    """No terms, no gradient; for the reverse KL the student's mass is all outside: infinite."""
    z = torch.randn(2, 130, requires_grad=True)
    nothing = torch.full((2, 130), -INF)
    for module in (opd_ops, reference):
        forward = module.full_kl(z, None, nothing, None, divergence="forward")
        assert forward.values.tolist() == [0.0, 0.0]
        assert (torch.autograd.grad(forward.loss, z)[0] == 0).all()
        assert module.full_kl(z, None, nothing, None).values.tolist() == [INF, INF]
        jsd = module.full_kl(z, None, nothing, None, divergence="jsd").loss
        assert torch.autograd.grad(jsd, z)[0].abs().max() < 1e-6


def test_rows_of_weight_zero_are_not_read():
    """Their logits may even be NaN: the gradient is 0, in the rows and nowhere else."""
    z = torch.randn(3, 500, requires_grad=True)
    with torch.no_grad():
        z[1] = float("nan")
    weight = torch.tensor([1.0, 0.0, 1.0])
    opd_ops.token_logp(z, None, torch.tensor([1, 2, 3])).logp.backward(weight)
    assert (z.grad[1] == 0).all() and (z.grad[[0, 2]] != 0).any(-1).all()
    z.grad = None
    opd_ops.full_kl(z, None, torch.randn(3, 500), None, token_weight=weight).loss.backward()
    assert (z.grad[1] == 0).all() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_is_joined_before_rounding(dtype):
    """p close to 1: the gradient p - 1 would vanish if it were patched into rounded p."""
    z = torch.zeros(1, 64, dtype=dtype)
    z[0, 5] = 12.0
    z.requires_grad_()
    opd_ops.token_logp(z, None, torch.tensor([5])).logp.sum().backward()
    exact = 1 - torch.softmax(z.detach().double(), -1)[0, 5]
    assert abs(z.grad[0, 5].item() / exact.item() - 1) < 0.01


def test_repeated_ids_add_up_before_rounding():
    z = torch.zeros(1, 1000, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((1, 300), 17)
    logp, _ = opd_ops.gather_logp(z, None, ids)
    logp.backward(torch.full((1, 300), 1.0))
    assert z.grad[0, 17].item() == torch.tensor(300 - 0.3).bfloat16().item()


def test_one_token_vocabulary():
    z = torch.tensor([[3.0], [-1e4]], requires_grad=True)
    logp, lse, entropy = opd_ops.token_logp(z, None, torch.tensor([0, 0]), with_entropy=True)
    assert logp.tolist() == entropy.tolist() == [0.0, 0.0] and lse.tolist() == [3.0, -1e4]
    (logp + entropy).sum().backward()
    assert z.grad.tolist() == [[0.0], [0.0]]


def test_same_bits_for_any_number_of_threads():
    z, teacher = torch.randn(37, 3001), torch.randn(37, 3001)
    ids = random_ids(0, 37, 4, 3001)
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            logp, lse = opd_ops.gather_logp(leaf, None, ids)
            full = opd_ops.full_kl(leaf, None, teacher, None, divergence="jsd")
            (grad,) = torch.autograd.grad(logp.sum() + full.loss, leaf)
            seen.append(torch.cat([logp.flatten(), lse, full.values, grad.flatten()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1401, 1408])
def test_gradients_are_rounded_beside_float32_logits(low, columns):
    """Written in the smaller type, rounded once: the bits of a copy of the float32 gradient."""
    z = torch.empty(3, 1472)[:, :columns].copy_(make_logits(1, 3, columns, torch.float32, "normal"))
    ids, grad = random_ids(0, 3, 5, 1390), torch.randn(3, 5)
    *_, stats, tail_stats = CPP.gather_logp(z, ids, 1390, 0.7, False, True)
    one = torch.ones(3)
    for more in ((None, None, None), (one, None, None), (None, tail_stats, one)):
        arguments = (z, ids, grad, stats, one, *more, 1390, 0.7)
        wide = torch.full((3, 1472), 7.0, dtype=low)
        CPP.gather_logp_backward_out(*arguments, wide[:, :columns])
        assert torch.equal(wide[:, :columns], CPP.gather_logp_backward(*arguments).to(low))
        assert (wide[:, columns:] == 7).all()
    teacher = torch.randn(3, columns)
    for kind in range(3):
        _, rows = CPP.full_kl(z, teacher, 1390, 0.7, kind, 0.3)
        wide = torch.full((3, 1472), 7.0, dtype=low)
        exact = torch.empty(3, columns)
        for out in (wide[:, :columns], exact):
            CPP.full_kl_backward_out(z, teacher, rows, one, 1390, 0.7, kind, 0.3, out)
        assert torch.equal(wide[:, :columns], exact.to(low)) and (wide[:, columns:] == 7).all()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """14,200 x 151,936 in bfloat16, as one real row expanded would not prove the writes."""
    rows, vocab = 14_200, 151_936
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    z[-1, -1] = 5.0
    ids = torch.full((rows, 1), vocab - 1)
    logp, _, _, _, stats, _ = CPP.gather_logp(z, ids, vocab, 1.0, False, False)
    truth = 5.0 - torch.logsumexp(z[-1:].double(), -1).item()
    assert abs(logp[-1].item() - truth) < 1e-5
    weight = torch.zeros(rows, 1)
    weight[-1] = 1.0
    arguments = ids, weight, stats, -weight[:, 0], None, None, None
    CPP.gather_logp_backward_out(z, *arguments, vocab, 1.0, z)
    assert abs(z[-1, -1].item() - (1 - torch.tensor(truth).exp().item())) < 1e-2
    assert (z[-2] == 0).all() and z[-1, 0] < 0
