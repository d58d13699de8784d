"""The mathematics of opd_ops.reference, in float64, against definitions and identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import INF, random_ids

from opd_ops import reference as ops

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
seeds = st.integers(0, 2**31)
sizes = st.integers(2, 12)


def pair(seed, vocab, rows=3, gap=1.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    teacher = student + gap * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def laws(student, teacher):
    return student.log_softmax(-1), teacher.log_softmax(-1)


def close(a, b, tolerance=1e-10):
    return torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ==== definitions ====


@given(seed=seeds, vocab=sizes, temperature=st.sampled_from([1.0, 0.5, 3.0]))
def test_token_logp_is_log_softmax(seed, vocab, temperature):
    z, _ = pair(seed, vocab)
    ids = random_ids(seed, 3, 1, vocab)[:, 0]
    logp, lse, entropy = ops.token_logp(z, ids, with_entropy=True, temperature=temperature)
    expected = (z / temperature).log_softmax(-1)
    close(logp, expected[torch.arange(3), ids])
    close(lse, (z / temperature).logsumexp(-1))
    close(entropy, -(expected.exp() * expected).sum(-1))
    (grad,) = torch.autograd.grad(logp.sum(), z)
    one_hot = F.one_hot(ids, vocab).double()
    close(grad, (one_hot - expected.exp().detach()) / temperature)


@given(
    seed=seeds, vocab=sizes, kind=st.sampled_from(KINDS), temperature=st.sampled_from([1.0, 0.7])
)
def test_full_kl_is_its_definition(seed, vocab, kind, temperature):
    z, t = pair(seed, vocab)
    p, q = laws(z.detach() / temperature, t / temperature)
    divergence, beta = kind
    m = torch.log((1 - beta) * p.exp() + beta * q.exp())
    expected = {
        "reverse": (p.exp() * (p - q)).sum(-1),
        "forward": (q.exp() * (q - p)).sum(-1),
        "jsd": (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1),
    }[divergence]
    value = ops.full_kl(z, t, divergence=divergence, beta=beta, temperature=temperature)
    close(value, expected)
    assert (value >= -1e-12).all()


@given(seed=seeds, vocab=st.integers(1, 300), data=st.data())
def test_topk_is_a_stable_sort(seed, vocab, data):
    k = data.draw(st.integers(1, vocab))
    z = pair(seed, vocab)[1].round()  # many ties
    token = random_ids(seed, 3, 1, vocab)[:, 0]
    ids, logp, _lse, tail, token_logp, rank = ops.topk_logp(z, k, token_ids=token)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids, order[:, :k])
    close(logp, z.log_softmax(-1).gather(1, ids))
    close(logp.exp().sum(-1) + tail.exp(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(order.gather(1, rank[:, None])[:, 0], token)
    close(token_logp, z.log_softmax(-1).gather(1, token[:, None])[:, 0])
    assert (tail == -INF).all() == (k == vocab)


def test_topk_ignores_nan_and_takes_what_is_possible_first():
    z = torch.tensor([[float("nan"), 1.0, -INF, 2.0], [-INF, -INF, -INF, -INF]])
    ids, logp, _lse, _tail = ops.topk_logp(z, 3)
    assert ids.tolist() == [[3, 1, 0], [0, 1, 2]]
    assert logp[0].isnan().all() and (logp[1] == -INF).all()


# ==== identities 1 to 8 of on-policy distillation ====


@given(seed=seeds, vocab=sizes)
def test_identity_1_gradient_of_the_reverse_kl(seed, vocab):
    """p_v * ((log p_v - log q_v) - KL(p || q))."""
    z, t = pair(seed, vocab)
    value = ops.full_kl(z, t)
    (grad,) = torch.autograd.grad(value.sum(), z)
    p, q = laws(z.detach(), t)
    close(grad, p.exp() * ((p - q) - value.detach()[:, None]))


@given(seed=seeds, vocab=sizes)
def test_identity_2_policy_gradient_is_unbiased(seed, vocab):
    """E over the student of the policy gradient is the exact gradient of the reverse KL."""
    z, t = pair(seed, vocab, rows=1)
    exact = torch.autograd.grad(ops.full_kl(z, t).sum(), z)[0]
    ids = torch.arange(vocab)
    teacher_logp = t.log_softmax(-1)[0]
    probability = z.detach().softmax(-1)[0]
    loss, *_ = ops.gated_kl(
        *(z.expand(vocab, vocab), ids, teacher_logp, torch.zeros(vocab, dtype=torch.float64)),
        extrapolation=1.8,
        interpolation=0.5,
        token_weight=probability,
    )
    close(torch.autograd.grad(loss.sum(), z)[0], exact)


@given(seed=seeds, vocab=sizes)
def test_identity_3_estimators_as_losses(seed, vocab):
    """k1 has expected gradient 0, k2 the reverse KL's, k3 the forward KL's (traps 1 and 2)."""
    z, t = pair(seed, vocab, rows=1)
    p, q = laws(z, t)
    weight = p.detach().exp()

    def expected_gradient(loss):
        return torch.autograd.grad((weight * loss).sum(), z, retain_graph=True)[0]

    d = p - q
    reverse = torch.autograd.grad(ops.full_kl(z, t).sum(), z)[0]
    forward = torch.autograd.grad(ops.full_kl(z, t, divergence="forward").sum(), z)[0]
    close(expected_gradient(d), torch.zeros_like(z))
    close(expected_gradient(d**2 / 2), reverse)
    close(expected_gradient(torch.exp(-d) - 1 + d), forward)


@given(seed=seeds, vocab=sizes)
def test_identity_4_gradient_of_the_forward_kl(seed, vocab):
    z, t = pair(seed, vocab)
    (grad,) = torch.autograd.grad(ops.full_kl(z, t, divergence="forward").sum(), z)
    close(grad, z.detach().softmax(-1) - t.softmax(-1))


@given(seed=seeds, vocab=sizes, beta=st.floats(0.01, 0.99))
def test_identity_5_gradient_of_the_jsd(seed, vocab, beta):
    z, t = pair(seed, vocab)
    (grad,) = torch.autograd.grad(ops.full_kl(z, t, divergence="jsd", beta=beta).sum(), z)
    p, q = laws(z.detach(), t)
    m = torch.log((1 - beta) * p.exp() + beta * q.exp())
    h = (1 - beta) * (p - m)
    close(grad, p.exp() * (h - (p.exp() * h).sum(-1, keepdim=True)))


def support(seed, vocab, k, gap=1.0):
    z, t = pair(seed, vocab, gap=gap)
    ids, teacher_logp, _, tail = ops.topk_logp(t, k)
    return z, t, ids, teacher_logp, tail


@given(seed=seeds, vocab=st.integers(4, 12), k=st.integers(2, 4))
def test_identity_6_gradient_on_a_renormalised_support(seed, vocab, k):
    z, _t, ids, teacher_logp, _ = support(seed, vocab, k)
    value, mass = ops.support_kl(z, ids, teacher_logp, with_student_mass=True)
    (grad,) = torch.autograd.grad(value.sum(), z)
    p = z.detach().gather(1, ids).log_softmax(-1)
    q = teacher_logp.log_softmax(-1)
    expected = torch.zeros_like(z).scatter(1, ids, p.exp() * ((p - q) - value.detach()[:, None]))
    close(grad, expected)
    close(mass, z.detach().softmax(-1).gather(1, ids).sum(-1))
    assert not mass.requires_grad


@given(seed=seeds, vocab=st.integers(5, 12), k=st.integers(2, 4))
def test_identity_7_chain_rule(seed, vocab, k):
    """KL = m KL(on S) + (1 - m) KL(on the rest) + Bernoulli KL of the masses."""
    z, t, ids, teacher_logp, tail = support(seed, vocab, k)
    rest = torch.ones(3, vocab).scatter(1, ids, 0.0).nonzero()[:, 1].view(3, -1)
    rest_logp = t.log_softmax(-1).gather(1, rest)
    inside, mass = ops.support_kl(z, ids, teacher_logp, with_student_mass=True)
    if rest.shape[1] > 1:
        outside, _ = ops.support_kl(z, rest, rest_logp)
    else:
        outside = torch.zeros_like(inside)
    bucket, _ = ops.support_kl(
        z, ids, teacher_logp, renormalise=False, tail="bucket", teacher_tail_logp=tail
    )
    close(ops.full_kl(z, t), bucket + (1 - mass) * outside)
    teacher_mass = teacher_logp.exp().sum(-1)
    bernoulli = mass * (mass / teacher_mass).log()
    bernoulli = bernoulli + (1 - mass) * (1 - mass).log() - (1 - mass) * tail
    close(bucket, mass * inside + bernoulli)


@given(seed=seeds, vocab=st.integers(4, 12), k=st.integers(1, 4))
def test_identity_8_truncated_sum_is_no_divergence(seed, vocab, k):
    """Trap 5: its gradient has an extra term, and p = q / e beats p = q."""
    z, t, ids, teacher_logp, _ = support(seed, vocab, k)
    value, _ = ops.support_kl(z, ids, teacher_logp, renormalise=False)
    (grad,) = torch.autograd.grad(value.sum(), z)
    p, q = laws(z.detach(), t)
    on = torch.zeros_like(p).scatter(1, ids, 1.0)
    score = on * (p - q + 1)
    close(grad, p.exp() * (score - (p.exp() * score).sum(-1, keepdim=True)))
    at_teacher, _ = ops.support_kl(t, ids, teacher_logp, renormalise=False)
    close(at_teacher, torch.zeros_like(at_teacher))
    if k < vocab:  # a student with q / e on S, and the lost mass outside
        thinned = torch.where(on.bool(), q - 1, q)
        lost = 1 - thinned.exp().sum(-1, keepdim=True)
        outside = (q.exp() * (1 - on)).sum(-1, keepdim=True)
        spread = torch.where(on.bool(), thinned, q + torch.log1p(lost / outside))
        lower, _ = ops.support_kl(spread, ids, teacher_logp, renormalise=False)
        close(lower, -teacher_logp.exp().sum(-1) / math.e)


# ==== traps ====


@given(seed=seeds, vocab=sizes, kind=st.sampled_from(KINDS))
def test_whole_vocabulary_as_support_is_the_full_divergence(seed, vocab, kind):
    """Trap 24, renormalised and with an empty bucket; in values and gradients."""
    divergence, beta = kind
    z, t, ids, teacher_logp, tail = support(seed, vocab, vocab)
    expected = ops.full_kl(z, t, divergence=divergence, beta=beta)
    exact = torch.autograd.grad(expected.sum(), z)[0]
    for extra in (
        {},
        {"renormalise": False},
        {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail},
    ):
        value, _ = ops.support_kl(z, ids, teacher_logp, divergence=divergence, beta=beta, **extra)
        close(value, expected)
        close(torch.autograd.grad(value.sum(), z)[0], exact)


def test_trap_4_support_of_one_token_is_refused():
    z = torch.randn(2, 5)
    with pytest.raises(ValueError, match="one token"):
        ops.support_kl(z, torch.tensor([[1], [2]]), torch.zeros(2, 1))
    value, _ = ops.support_kl(z, torch.tensor([[1], [2]]), -torch.ones(2, 1), renormalise=False)
    assert (value != 0).all()


def test_trap_7_small_tails_keep_their_digits():
    """A bucket of 1e-8: log(1 - P) in float32 would be off by tens of percent."""
    z = torch.full((1, 1001), -25.0)
    z[0, 0] = 0.0
    truth = math.log(1000) - 25 - math.log1p(1000 * math.exp(-25))
    _, _, _, tail = ops.topk_logp(z, 1)
    assert abs(tail.item() - truth) < 1e-5
    student = z.clone().requires_grad_()
    # forward KL with all teacher mass in the bucket is exactly -log of the student's bucket
    value, _ = ops.support_kl(
        student, torch.tensor([[0]]), torch.tensor([[-INF]]), divergence="forward",
        renormalise=False, tail="bucket", teacher_tail_logp=torch.zeros(1),
    )  # fmt: skip
    assert abs(value.item() + truth) < 1e-5
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert abs(grad[0, 1:].sum().item() + 1) < 1e-5 and abs(grad[0, 0].item() - 1) < 1e-5


@given(
    seed=seeds, vocab=sizes, kind=st.sampled_from(KINDS), temperature=st.sampled_from([0.7, 2.0])
)
def test_trap_14_both_sides_use_the_temperature(seed, vocab, kind, temperature):
    z, _ = pair(seed, vocab)
    divergence, beta = kind
    same = ops.full_kl(z, z.detach(), divergence=divergence, beta=beta, temperature=temperature)
    close(same, torch.zeros_like(same))


def test_trap_16_padding_of_the_vocabulary():
    """Student and teacher padded to different sizes: whatever the padding holds, same results."""
    z, t = pair(0, 9)
    t = t[:, :8]
    head = torch.randn(9, 4, dtype=torch.float64)
    hidden = torch.randn(3, 4, dtype=torch.float64)
    seen = []
    for padding in (0.0, 1e4, INF, float("nan")):
        student, teacher = z.detach().clone(), t.clone()
        student[:, 6:], teacher[:, 6:] = padding, padding
        student.requires_grad_()
        ids = torch.tensor([[0, 5], [1, 2], [3, 4]])
        logp = teacher.gather(1, ids)
        outs = [
            ops.full_kl(student, teacher, valid_vocab=6),
            *ops.gather_logp(student, ids, valid_vocab=6),
            *ops.support_kl(student, ids, logp, valid_vocab=6, with_student_mass=True),
            *ops.topk_logp(student, 3, valid_vocab=6),
        ]
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outs if o.requires_grad), student)
        assert (grad[:, 6:] == 0).all()
        padded = head.clone()
        padded[6:] = padding
        outs += ops.linear_topk_logp(hidden, padded, 3, valid_vocab=6)
        seen.append(torch.cat([o.detach().double().flatten() for o in [*outs, grad]]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    with pytest.raises(ValueError, match="valid_vocab"):
        ops.full_kl(z, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_19_teacher_that_excludes_tokens(dtype):
    z = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[1.0, -INF, 0.0, -INF]], dtype=dtype)
    p, q = z.detach().softmax(-1), t.softmax(-1)
    assert ops.full_kl(z, t).item() == INF
    forward = ops.full_kl(z, t, divergence="forward")
    on = [0, 2]
    close(forward, (q[:, on] * (q[:, on] / p[:, on]).log()).sum(-1), 1e-6)
    close(torch.autograd.grad(forward.sum(), z)[0], p - q, 1e-6)
    jsd = ops.full_kl(z, t, divergence="jsd", beta=0.3)
    m = 0.7 * p + 0.3 * q
    expected = 0.7 * (p * (p / m).log()).sum(-1)
    expected = expected + 0.3 * (q[:, on] * (q[:, on] / m[:, on]).log()).sum(-1)
    close(jsd, expected, 1e-6)
    assert torch.autograd.grad(jsd.sum(), z)[0].isfinite().all()
    # a student that excludes the same tokens: everything is finite
    both = z.detach().masked_fill(t == -INF, -INF).requires_grad_()
    for divergence, beta in KINDS:
        value = ops.full_kl(both, t, divergence=divergence, beta=beta)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), both)[0].isfinite().all()


def test_trap_21_low_precision_is_exact_inside():
    """The value of bfloat16 logits is that of the same numbers in float64."""
    z = (torch.randn(50, 1000) * 3).bfloat16()
    ids = random_ids(0, 50, 1, 1000)[:, 0]
    logp, _ = ops.token_logp(z, ids)
    truth = z.double().log_softmax(-1)[torch.arange(50), ids]
    assert logp.dtype == torch.float32 and (logp - truth).abs().max() < 1e-5
    rounded = z.log_softmax(-1)[torch.arange(50), ids]
    assert (rounded - truth).abs().max() > 1e-3


def test_offset_of_the_logits_costs_nothing():
    z = torch.randn(20, 1000)
    ids = random_ids(0, 20, 1, 1000)[:, 0]
    truth = (z + 1e4).double().log_softmax(-1)[torch.arange(20), ids]
    assert (ops.token_logp(z + 1e4, ids)[0] - truth).abs().max() < 2e-6


# ==== supports with masks, gates ====


@given(seed=seeds, vocab=st.integers(6, 12), kind=st.sampled_from(KINDS), data=st.data())
def test_support_mask_removes_entries(seed, vocab, kind, data):
    """A masked entry is the same as one that is not there, whatever it holds."""
    divergence, beta = kind
    z, _t, ids, teacher_logp, _ = support(seed, vocab, 5)
    keep = torch.tensor([[True, True, False, True, False]]).expand(3, 5)
    bucket = data.draw(st.booleans())
    few, few_logp = ids[:, [0, 1, 3]], teacher_logp[:, [0, 1, 3]]
    tail = torch.log(1 - few_logp.exp().sum(-1))
    extra = {"renormalise": True}
    if bucket:
        extra = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail}
    extra |= {"divergence": divergence, "beta": beta, "with_student_mass": True}
    expected, expected_mass = ops.support_kl(z, few, few_logp, **extra)
    exact = torch.autograd.grad(expected.sum(), z)[0]
    for junk_id, junk_logp in ((0, 0.0), (-5, float("nan")), (10**6, INF), (int(ids[0, 0]), -1.0)):
        junk_ids = ids.masked_fill(~keep, junk_id)
        junk = teacher_logp.masked_fill(~keep, junk_logp)
        value, mass = ops.support_kl(z, junk_ids, junk, support_mask=keep, **extra)
        close(value, expected)
        close(mass, expected_mass)
        close(torch.autograd.grad(value.sum(), z)[0], exact)


def test_row_without_support_counts_nothing():
    z = torch.randn(2, 5, requires_grad=True)
    mask = torch.tensor([[False, False], [True, True]])
    value, _ = ops.support_kl(
        z, torch.tensor([[0, 1], [0, 1]]), torch.zeros(2, 2), support_mask=mask
    )
    assert value[0] == 0 and value[1] > 0
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert (grad[0] == 0).all() and (grad[1, :2] != 0).all()


def test_gate_and_advantage():
    logits = torch.tensor([[2.0, 0.0]] * 6, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(6, dtype=torch.int64)
    student = logits.detach().log_softmax(-1)[:, 0]
    teacher = student + torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    verdict = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    gates = torch.tensor([1.8, 1.0, 0.25, 0.25, 1.0, 1.8], dtype=torch.float64)
    settings = {"extrapolation": 1.8, "interpolation": 0.25}
    loss, student_logp, log_ratio, gate = ops.gated_kl(logits, ids, teacher, verdict, **settings)
    close(gate, gates)
    close(log_ratio, student - teacher)
    assert not (student_logp.requires_grad or log_ratio.requires_grad or gate.requires_grad)
    advantage = gates * (teacher - student)
    close(loss, -advantage * student)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    close(grad[:, 0], -advantage * (1 - student.exp()))

    reference_logp = teacher - 0.3
    loss, *_ = ops.gated_kl(
        logits, ids, teacher, verdict, reference_logp=reference_logp, **settings
    )
    close(loss, -((teacher - student) + (gates - 1) * 0.3) * student)

    weight = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    broken = teacher.masked_fill(weight == 0, float("nan"))
    loss, *_ = ops.gated_kl(logits, ids, broken, verdict, token_weight=weight, **settings)
    close(loss, -weight * advantage * student)
    (weighted,) = torch.autograd.grad(loss.sum(), logits)
    close(weighted, weight[:, None] * grad)


def test_trap_22_open_gates_are_plain_distillation():
    z, t = pair(0, 7)
    ids = torch.tensor([1, 2, 3])
    teacher_logp = t.log_softmax(-1)[torch.arange(3), ids]
    losses = [
        ops.gated_kl(z, ids, teacher_logp, verdict, extrapolation=1.0, interpolation=1.0)[0]
        for verdict in torch.tensor([[1.0] * 3, [-1.0] * 3, [0.0] * 3], dtype=torch.float64)
    ]
    student_logp = ops.token_logp(z, ids)[0]
    plain = -(teacher_logp - student_logp.detach()) * student_logp
    assert all(torch.equal(loss, plain) for loss in losses)


# ==== linear ops ====

LINEAR_ARGUMENTS = ("valid_vocab", "temperature")


@pytest.mark.parametrize("workspace_mib", [256, 1e-5])
def test_linear_ops_are_row_ops_on_the_product(workspace_mib):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    teacher_head = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    ids = random_ids(0, 6, 3, 10, distinct=True)
    _, teacher_logp, _, _ = ops.topk_logp(teacher_logits, 3, valid_vocab=10)
    tail = torch.log1p(-teacher_logp.exp().sum(-1))
    verdict = torch.tensor([1.0, -1, 0, 1, -1, 0], dtype=torch.float64)
    gates = {"extrapolation": 1.8, "interpolation": 0.5}
    bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail}
    mask = torch.rand(6, 3, generator=generator) > 0.3
    masked = {"support_mask": mask, "with_student_mass": True}
    both = {"valid_vocab": 10, "temperature": 0.7}
    cases = [
        (ops.token_logp, ops.linear_token_logp, (ids[:, 0],), {"with_entropy": True}),
        (ops.topk_logp, ops.linear_topk_logp, (4,), {"token_ids": ids[:, 0]}),
        (ops.gather_logp, ops.linear_gather_logp, (ids,), {}),
        (ops.support_kl, ops.linear_support_kl, (ids, teacher_logp), {}),
        (ops.support_kl, ops.linear_support_kl, (ids, teacher_logp), masked),
        (ops.support_kl, ops.linear_support_kl, (ids, teacher_logp), bucket | masked),
        (ops.gated_kl, ops.linear_gated_kl, (ids[:, 0], teacher_logp[:, 0], verdict), gates),
    ]
    for row_op, linear_op, args, kwargs in cases:
        expected = row_op(logits, *args, **kwargs, **both)
        for first in ((hidden, head), (logits, None)):
            got = linear_op(*first, *args, **kwargs, **both, workspace_mib=workspace_mib)
            compare(got, expected, hidden, head)
    for kind, beta in KINDS:
        settings = {**both, "divergence": kind, "beta": beta}
        expected = ops.full_kl(logits, teacher_logits, **settings)
        for student in ((hidden, head), (logits, None)):
            for teacher in ((teacher_hidden, teacher_head), (teacher_logits, None)):
                got = ops.linear_full_kl(
                    *student, *teacher, **settings, workspace_mib=workspace_mib
                )
                compare([got], [expected], hidden, head)
    got = ops.linear_gather_logits(hidden, head, ids, temperature=0.7, workspace_mib=workspace_mib)
    compare([got], [logits.gather(1, ids) / 0.7], hidden, head)


def compare(got, expected, hidden, head):
    for a, b in zip(got, expected):
        if a is None or b is None:
            assert a is b
            continue
        close(a.double(), b.double())
        assert a.requires_grad == b.requires_grad
    gradients = [
        torch.autograd.grad(
            sum((o**2).sum() for o in outs if o is not None and o.requires_grad),
            (hidden, head),
            retain_graph=True,
        )
        for outs in (got, expected)
        if any(o is not None and o.requires_grad for o in outs)
    ]
    for a, b in zip(*gradients) if gradients else ():
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [256, 1e-5])
def test_forms_of_the_heads_gradient(dtype, workspace_mib):
    """Dense, sparse rows, and a buffer that is added to, agree; repeated ids add up."""
    hidden = torch.randn(6, 4).to(dtype).requires_grad_()
    head = torch.randn(12, 4).to(dtype).requires_grad_()
    ids = random_ids(0, 6, 3, 4)
    weight = torch.randn(6, 3)

    def gradient(form):
        head.grad = hidden.grad = None
        logits = ops.linear_gather_logits(
            hidden, head, ids, grad_head=form, workspace_mib=workspace_mib
        )
        (logits * weight).sum().backward()
        return head.grad, hidden.grad

    dense, dense_hidden = gradient("dense")
    rows, rows_hidden = gradient("rows")
    buffer = torch.ones(12, 4, dtype=torch.float64)
    nothing, buffer_hidden = gradient(buffer)
    assert dense.dtype == rows.dtype == dtype and nothing is None and rows.is_sparse
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rows.to_dense(), dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(buffer - 1, dense.double(), rtol=tolerance, atol=tolerance)
    assert torch.equal(rows_hidden, dense_hidden) and torch.equal(buffer_hidden, dense_hidden)
    assert set(rows.coalesce().indices().flatten().tolist()) == set(ids.flatten().tolist())


def test_empty_batches():
    """Trap 12: no rows, finite zero loss, zero gradients with a graph."""
    z = torch.randn(0, 5, requires_grad=True)
    hidden, head = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    logp = torch.zeros(0, 2)
    outs = [
        ops.token_logp(z, ids[:, 0], with_entropy=True)[2],
        ops.gather_logp(z, ids)[0],
        ops.support_kl(z, ids, logp)[0],
        ops.full_kl(z, z.detach()),
        ops.linear_token_logp(hidden, head, ids[:, 0])[0],
        ops.linear_support_kl(hidden, head, ids, logp)[0],
        ops.linear_gather_logits(hidden, head, ids),
        ops.linear_full_kl(hidden, head, hidden, head),
    ]
    loss = sum(o.sum() for o in outs)
    assert loss.item() == 0
    loss.backward()
    assert z.grad.shape == (0, 5) and hidden.grad.shape == (0, 3)
    assert head.grad.abs().max() == 0
    assert [o.shape[0] for o in ops.topk_logp(z, 2)] == [0, 0, 0, 0]
