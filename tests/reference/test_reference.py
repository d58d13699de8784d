"""The mathematics of opd_ops.reference, in float64, against definitions and identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import INF, policy_gradient, random_ids

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
    logp, lse, entropy = ops.token_logp(z, None, ids, with_entropy=True, temperature=temperature)
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
    found = ops.full_kl(z, None, t, None, divergence=divergence, beta=beta, temperature=temperature)
    close(found.values, expected)
    assert (found.values >= -1e-12).all() and not found.values.requires_grad
    close(found.loss, expected.sum())
    weight = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    weighted = ops.full_kl(
        *(z, None, t, None),
        **{"divergence": divergence, "beta": beta, "temperature": temperature},
        token_weight=weight,
    )
    close(weighted.loss, (weight * expected).sum())
    close(weighted.values, expected)
    (grad,) = torch.autograd.grad(found.loss, z)
    close(torch.autograd.grad(weighted.loss, z)[0], weight[:, None] * grad)


@given(seed=seeds, vocab=st.integers(1, 300), data=st.data())
def test_topk_is_a_stable_sort(seed, vocab, data):
    k = data.draw(st.integers(1, vocab))
    z = pair(seed, vocab)[1].round()  # many ties
    token = random_ids(seed, 3, 1, vocab)[:, 0]
    ids, logp, _lse, tail, token_logp = ops.topk_logp(z, None, k, token_ids=token)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids, order[:, :k])
    close(logp, z.log_softmax(-1).gather(1, ids))
    close(logp.exp().sum(-1) + tail.exp(), torch.ones(3, dtype=torch.float64))
    close(token_logp, z.log_softmax(-1).gather(1, token[:, None])[:, 0])
    assert (tail == -INF).all() == (k == vocab)


def test_topk_ignores_nan_and_takes_what_is_possible_first():
    z = torch.tensor([[float("nan"), 1.0, -INF, 2.0], [-INF, -INF, -INF, -INF]])
    ids, logp, *_ = ops.topk_logp(z, None, 3)
    assert ids.tolist() == [[3, 1, 0], [0, 1, 2]]
    assert logp[0].isnan().all() and (logp[1] == -INF).all()


# ==== identities 1 to 8 of on-policy distillation ====


@given(seed=seeds, vocab=sizes)
def test_identity_1_gradient_of_the_reverse_kl(seed, vocab):
    """p_v * ((log p_v - log q_v) - KL(p || q))."""
    z, t = pair(seed, vocab)
    loss, values = ops.full_kl(z, None, t, None)
    (grad,) = torch.autograd.grad(loss, z)
    p, q = laws(z.detach(), t)
    close(grad, p.exp() * ((p - q) - values[:, None]))


@given(seed=seeds, vocab=sizes)
def test_identity_2_policy_gradient_is_unbiased(seed, vocab):
    """E over the student of the policy gradient is the exact gradient of the reverse KL."""
    z, t = pair(seed, vocab, rows=1)
    exact = torch.autograd.grad(ops.full_kl(z, None, t, None).loss, z)[0]
    ids = torch.arange(vocab)
    teacher_logp = t.log_softmax(-1)[0]
    probability = z.detach().softmax(-1)[0]
    found = ops.gated_kl(
        *(z.expand(vocab, vocab), None, ids, policy_gradient, [teacher_logp, probability])
    )
    close(torch.autograd.grad(found.loss, z)[0], exact)


@given(seed=seeds, vocab=sizes)
def test_identity_3_estimators_as_losses(seed, vocab):
    """k1 has expected gradient 0, k2 the reverse KL's, k3 the forward KL's (traps 1 and 2)."""
    z, t = pair(seed, vocab, rows=1)
    p, q = laws(z, t)
    weight = p.detach().exp()

    def expected_gradient(loss):
        return torch.autograd.grad((weight * loss).sum(), z, retain_graph=True)[0]

    d = p - q
    reverse = torch.autograd.grad(ops.full_kl(z, None, t, None).loss, z)[0]
    forward = torch.autograd.grad(ops.full_kl(z, None, t, None, divergence="forward").loss, z)[0]
    close(expected_gradient(d), torch.zeros_like(z))
    close(expected_gradient(d**2 / 2), reverse)
    close(expected_gradient(torch.exp(-d) - 1 + d), forward)


@given(seed=seeds, vocab=sizes)
def test_identity_4_gradient_of_the_forward_kl(seed, vocab):
    z, t = pair(seed, vocab)
    (grad,) = torch.autograd.grad(ops.full_kl(z, None, t, None, divergence="forward").loss, z)
    close(grad, z.detach().softmax(-1) - t.softmax(-1))


@given(seed=seeds, vocab=sizes, beta=st.floats(0.01, 0.99))
def test_identity_5_gradient_of_the_jsd(seed, vocab, beta):
    z, t = pair(seed, vocab)
    (grad,) = torch.autograd.grad(
        ops.full_kl(z, None, t, None, divergence="jsd", beta=beta).loss, z
    )
    p, q = laws(z.detach(), t)
    m = torch.log((1 - beta) * p.exp() + beta * q.exp())
    h = (1 - beta) * (p - m)
    close(grad, p.exp() * (h - (p.exp() * h).sum(-1, keepdim=True)))


def support(seed, vocab, k, gap=1.0):
    z, t = pair(seed, vocab, gap=gap)
    top = ops.topk_logp(t, None, k)
    return z, t, top.ids, top.logp, top.tail_logp


@given(seed=seeds, vocab=st.integers(4, 12), k=st.integers(2, 4))
def test_identity_6_gradient_on_a_renormalised_support(seed, vocab, k):
    z, _t, ids, teacher_logp, _ = support(seed, vocab, k)
    loss, values = ops.support_kl(z, None, ids, teacher_logp)
    (grad,) = torch.autograd.grad(loss, z)
    p = z.detach().gather(1, ids).log_softmax(-1)
    q = teacher_logp.log_softmax(-1)
    expected = torch.zeros_like(z).scatter(1, ids, p.exp() * ((p - q) - values[:, None]))
    close(grad, expected)
    weight = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    weighted = ops.support_kl(z, None, ids, teacher_logp, token_weight=weight)
    close(weighted.loss, (weight * values).sum())
    close(weighted.values, values)
    close(torch.autograd.grad(weighted.loss, z)[0], weight[:, None] * expected)
    assert not values.requires_grad


@given(seed=seeds, vocab=st.integers(5, 12), k=st.integers(2, 4))
def test_identity_7_chain_rule(seed, vocab, k):
    """KL = m KL(on S) + (1 - m) KL(on the rest) + Bernoulli KL of the masses."""
    z, t, ids, teacher_logp, tail = support(seed, vocab, k)
    rest = torch.ones(3, vocab).scatter(1, ids, 0.0).nonzero()[:, 1].view(3, -1)
    rest_logp = t.log_softmax(-1).gather(1, rest)
    inside = ops.support_kl(z, None, ids, teacher_logp).values
    mass = z.detach().softmax(-1).gather(1, ids).sum(-1)
    if rest.shape[1] > 1:
        outside = ops.support_kl(z, None, rest, rest_logp).values
    else:
        outside = torch.zeros_like(inside)
    bucket = ops.support_kl(
        z, None, ids, teacher_logp, renormalise=False, tail="bucket", teacher_tail_logp=tail
    ).values
    close(ops.full_kl(z, None, t, None).values, bucket + (1 - mass) * outside)
    teacher_mass = teacher_logp.exp().sum(-1)
    bernoulli = mass * (mass / teacher_mass).log()
    bernoulli = bernoulli + (1 - mass) * (1 - mass).log() - (1 - mass) * tail
    close(bucket, mass * inside + bernoulli)


@given(seed=seeds, vocab=st.integers(4, 12), k=st.integers(1, 4))
def test_identity_8_truncated_sum_is_no_divergence(seed, vocab, k):
    """Trap 5: its gradient has an extra term, and p = q / e beats p = q."""
    z, t, ids, teacher_logp, _ = support(seed, vocab, k)
    loss, _ = ops.support_kl(z, None, ids, teacher_logp, renormalise=False)
    (grad,) = torch.autograd.grad(loss, z)
    p, q = laws(z.detach(), t)
    on = torch.zeros_like(p).scatter(1, ids, 1.0)
    score = on * (p - q + 1)
    close(grad, p.exp() * (score - (p.exp() * score).sum(-1, keepdim=True)))
    at_teacher = ops.support_kl(t, None, ids, teacher_logp, renormalise=False).values
    close(at_teacher, torch.zeros_like(at_teacher))
    if k < vocab:  # a student with q / e on S, and the lost mass outside
        thinned = torch.where(on.bool(), q - 1, q)
        lost = 1 - thinned.exp().sum(-1, keepdim=True)
        outside = (q.exp() * (1 - on)).sum(-1, keepdim=True)
        spread = torch.where(on.bool(), thinned, q + torch.log1p(lost / outside))
        lower = ops.support_kl(spread, None, ids, teacher_logp, renormalise=False).values
        close(lower, -teacher_logp.exp().sum(-1) / math.e)


# ==== traps ====


@given(seed=seeds, vocab=sizes, kind=st.sampled_from(KINDS))
def test_whole_vocabulary_as_support_is_the_full_divergence(seed, vocab, kind):
    """Trap 24, renormalised and with an empty bucket; in values and gradients."""
    divergence, beta = kind
    z, t, ids, teacher_logp, tail = support(seed, vocab, vocab)
    expected = ops.full_kl(z, None, t, None, divergence=divergence, beta=beta)
    exact = torch.autograd.grad(expected.loss, z)[0]
    for extra in (
        {},
        {"renormalise": False},
        {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail},
    ):
        found = ops.support_kl(
            z, None, ids, teacher_logp, divergence=divergence, beta=beta, **extra
        )
        close(found.values, expected.values)
        close(torch.autograd.grad(found.loss, z)[0], exact)


def test_trap_4_support_of_one_token_is_refused():
    z = torch.randn(2, 5)
    with pytest.raises(ValueError, match="one token"):
        ops.support_kl(z, None, torch.tensor([[1], [2]]), torch.zeros(2, 1))
    found = ops.support_kl(z, None, torch.tensor([[1], [2]]), -torch.ones(2, 1), renormalise=False)
    assert (found.values != 0).all()


def test_trap_7_small_tails_keep_their_digits():
    """A bucket of 1e-8: log(1 - P) in float32 would be off by tens of percent."""
    z = torch.full((1, 1001), -25.0)
    z[0, 0] = 0.0
    truth = math.log(1000) - 25 - math.log1p(1000 * math.exp(-25))
    assert abs(ops.topk_logp(z, None, 1).tail_logp.item() - truth) < 1e-5
    student = z.clone().requires_grad_()
    # forward KL with all teacher mass in the bucket is exactly -log of the student's bucket
    value, _ = ops.support_kl(
        student, None, torch.tensor([[0]]), torch.tensor([[-INF]]), divergence="forward",
        renormalise=False, tail="bucket", teacher_tail_logp=torch.zeros(1),
    )  # fmt: skip
    assert abs(value.item() + truth) < 1e-5
    (grad,) = torch.autograd.grad(value, student)
    assert abs(grad[0, 1:].sum().item() + 1) < 1e-5 and abs(grad[0, 0].item() - 1) < 1e-5


@given(
    seed=seeds, vocab=sizes, kind=st.sampled_from(KINDS), temperature=st.sampled_from([0.7, 2.0])
)
def test_trap_14_both_sides_use_the_temperature(seed, vocab, kind, temperature):
    z, _ = pair(seed, vocab)
    divergence, beta = kind
    settings = {"divergence": divergence, "beta": beta, "temperature": temperature}
    same = ops.full_kl(z, None, z.detach(), None, **settings).values
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
            *ops.full_kl(student, None, teacher, None, valid_vocab=6),
            *ops.gather_logp(student, None, ids, valid_vocab=6),
            *ops.support_kl(student, None, ids, logp, valid_vocab=6),
            *ops.topk_logp(student, None, 3, valid_vocab=6)[:4],
        ]
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outs if o.requires_grad), student)
        assert (grad[:, 6:] == 0).all()
        padded = head.clone()
        padded[6:] = padding
        outs += ops.topk_logp(hidden, padded, 3, valid_vocab=6)[:4]
        seen.append(torch.cat([o.detach().double().flatten() for o in [*outs, grad]]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    with pytest.raises(ValueError, match="valid_vocab"):
        ops.full_kl(z, None, t, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_19_teacher_that_excludes_tokens(dtype):
    z = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[1.0, -INF, 0.0, -INF]], dtype=dtype)
    p, q = z.detach().softmax(-1), t.softmax(-1)
    assert ops.full_kl(z, None, t, None).loss.item() == INF
    forward = ops.full_kl(z, None, t, None, divergence="forward").loss
    on = [0, 2]
    close(forward, (q[:, on] * (q[:, on] / p[:, on]).log()).sum(), 1e-6)
    close(torch.autograd.grad(forward, z)[0], p - q, 1e-6)
    jsd = ops.full_kl(z, None, t, None, divergence="jsd", beta=0.3).loss
    m = 0.7 * p + 0.3 * q
    expected = 0.7 * (p * (p / m).log()).sum()
    expected = expected + 0.3 * (q[:, on] * (q[:, on] / m[:, on]).log()).sum()
    close(jsd, expected, 1e-6)
    assert torch.autograd.grad(jsd, z)[0].isfinite().all()
    # a student that excludes the same tokens: everything is finite
    both = z.detach().masked_fill(t == -INF, -INF).requires_grad_()
    for divergence, beta in KINDS:
        loss = ops.full_kl(both, None, t, None, divergence=divergence, beta=beta).loss
        assert loss.isfinite()
        assert torch.autograd.grad(loss, both)[0].isfinite().all()


def test_trap_21_low_precision_is_exact_inside():
    """The value of bfloat16 logits is that of the same numbers in float64."""
    z = (torch.randn(50, 1000) * 3).bfloat16()
    ids = random_ids(0, 50, 1, 1000)[:, 0]
    logp = ops.token_logp(z, None, ids).logp
    truth = z.double().log_softmax(-1)[torch.arange(50), ids]
    assert logp.dtype == torch.float32 and (logp - truth).abs().max() < 1e-5
    rounded = z.log_softmax(-1)[torch.arange(50), ids]
    assert (rounded - truth).abs().max() > 1e-3


def test_offset_of_the_logits_costs_nothing():
    z = torch.randn(20, 1000)
    ids = random_ids(0, 20, 1, 1000)[:, 0]
    truth = (z + 1e4).double().log_softmax(-1)[torch.arange(20), ids]
    assert (ops.token_logp(z + 1e4, None, ids)[0] - truth).abs().max() < 2e-6


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
    extra |= {"divergence": divergence, "beta": beta}
    expected = ops.support_kl(z, None, few, few_logp, **extra)
    exact = torch.autograd.grad(expected.loss, z)[0]
    for junk_id, junk_logp in ((0, 0.0), (-5, float("nan")), (10**6, INF), (int(ids[0, 0]), -1.0)):
        junk_ids = ids.masked_fill(~keep, junk_id)
        junk = teacher_logp.masked_fill(~keep, junk_logp)
        found = ops.support_kl(z, None, junk_ids, junk, support_mask=keep, **extra)
        close(found.values, expected.values)
        close(torch.autograd.grad(found.loss, z)[0], exact)


def test_row_without_support_counts_nothing():
    z = torch.randn(2, 5, requires_grad=True)
    mask = torch.tensor([[False, False], [True, True]])
    loss, values = ops.support_kl(
        z, None, torch.tensor([[0, 1], [0, 1]]), torch.zeros(2, 2), support_mask=mask
    )
    assert values[0] == 0 and values[1] > 0
    (grad,) = torch.autograd.grad(loss, z)
    assert (grad[0] == 0).all() and (grad[1, :2] != 0).all()


def test_rows_of_weight_zero_are_silent():
    """Even where their divergence is infinite."""
    z = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 0.0], [1.0, 2.0, 3.0]])
    weight = torch.tensor([0.0, 2.0])
    full = ops.full_kl(z, None, teacher, None, token_weight=weight)
    ids, logp = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[-1.0, -INF], [-1.0, -2.0]])
    some = ops.support_kl(z, None, ids, logp, token_weight=weight)
    for loss, values in (full, some):
        assert values[0] == INF and values[1] > 0
        close(loss, 2 * values[1])


def gated_policy_gradient(student_logp, teacher_logp, verdict):
    log_ratio = (student_logp - teacher_logp).detach()
    gate = torch.full_like(log_ratio, 0.25).masked_fill(verdict * -log_ratio > 0, 1.8)
    gate = gate.masked_fill(verdict == 0, 1.0)
    return gate * log_ratio * student_logp, {"log_ratio": log_ratio, "gate": gate}


@pytest.mark.parametrize("workspace_mib", [256, 1e-5])
def test_loss_of_the_caller(workspace_mib):
    """Sign-gated policy gradient; a row sees its own values in chunks of any size."""
    logits = torch.tensor([[2.0, 0.0]] * 6, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(6, dtype=torch.int64)
    student = logits.detach().log_softmax(-1)[:, 0]
    teacher = student + torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    verdict = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    gates = torch.tensor([1.8, 1.0, 0.25, 0.25, 1.0, 1.8], dtype=torch.float64)
    found = ops.gated_kl(
        logits, None, ids, gated_policy_gradient, [teacher, verdict], workspace_mib=workspace_mib
    )
    close(found.logged["gate"], gates)
    close(found.logged["log_ratio"], student - teacher)
    close(found.student_logp, student)
    assert not any(t.requires_grad for t in (found.student_logp, *found.logged.values()))
    advantage = gates * (teacher - student)
    close(found.loss, -(advantage * student).sum())
    (grad,) = torch.autograd.grad(found.loss, logits)
    close(grad[:, 0], -advantage * (1 - student.exp()))


def test_loss_of_several_tokens_per_row():
    z, t = pair(0, 7)
    ids = torch.tensor([[1, 2], [0, 6], [3, 3]])

    def loss_of(student_logp, teacher_logp):
        assert student_logp.shape == teacher_logp.shape == (3, 2)
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1), {}

    found = ops.gated_kl(z, None, ids, loss_of, [t.log_softmax(-1).gather(1, ids)])
    expected = ops.gather_logp(z, None, ids).logp
    expected = (expected.exp() * (expected - t.log_softmax(-1).gather(1, ids))).sum()
    close(found.loss, expected)
    close(*(torch.autograd.grad(each, z)[0] for each in (found.loss, expected)))


def test_trap_22_open_gates_are_plain_distillation():
    z, t = pair(0, 7)
    ids = torch.tensor([1, 2, 3])
    teacher_logp = t.log_softmax(-1)[torch.arange(3), ids]
    gated = ops.gated_kl(
        *(z, None, ids, gated_policy_gradient, [teacher_logp, torch.zeros(3, dtype=z.dtype)])
    ).loss
    student_logp = ops.token_logp(z, None, ids).logp
    plain = -(teacher_logp - student_logp.detach()) * student_logp
    assert torch.equal(gated, plain.sum())


# ==== from hidden states and head ====


@pytest.mark.parametrize("workspace_mib", [256, 1e-5])
def test_from_hidden_states_as_from_their_product(workspace_mib):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    teacher_head = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    ids = random_ids(0, 6, 3, 10, distinct=True)
    teacher_logp = ops.topk_logp(teacher_logits, None, 3, valid_vocab=10).logp
    tail = torch.log1p(-teacher_logp.exp().sum(-1))
    verdict = torch.tensor([1.0, -1, 0, 1, -1, 0], dtype=torch.float64)
    bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail}
    masked = {"support_mask": torch.rand(6, 3, generator=generator) > 0.3}
    masked["token_weight"] = torch.rand(6, generator=generator)
    both = {"valid_vocab": 10, "temperature": 0.7}
    gated = gated_policy_gradient, [teacher_logp[:, 0], verdict]
    cases = [
        (ops.token_logp, (ids[:, 0],), {"with_entropy": True}),
        (ops.topk_logp, (4,), {"token_ids": ids[:, 0]}),
        (ops.gather_logp, (ids,), {}),
        (ops.support_kl, (ids, teacher_logp), {}),
        (ops.support_kl, (ids, teacher_logp), masked),
        (ops.support_kl, (ids, teacher_logp), bucket | masked),
        (ops.gated_kl, (ids[:, 0], *gated), {}),
    ]
    for op, args, kwargs in cases:
        expected = op(logits, None, *args, **kwargs, **both)
        for first in ((hidden, head), (logits, None)):
            got = op(*first, *args, **kwargs, **both, workspace_mib=workspace_mib)
            compare(got, expected, hidden, head)
    for kind, beta in KINDS:
        settings = {**both, "divergence": kind, "beta": beta}
        expected = ops.full_kl(logits, None, teacher_logits, None, **settings)
        for student in ((hidden, head), (logits, None)):
            for teacher in ((teacher_hidden, teacher_head), (teacher_logits, None)):
                got = ops.full_kl(*student, *teacher, **settings, workspace_mib=workspace_mib)
                compare(got, expected, hidden, head)


def compare(got, expected, hidden, head):
    got, expected = ([t for t in out if isinstance(t, torch.Tensor)] for out in (got, expected))
    for a, b in zip(got, expected, strict=True):
        close(a.double(), b.double())
        assert a.requires_grad == b.requires_grad
    gradients = [
        torch.autograd.grad(
            sum((o**2).sum() for o in outs if o.requires_grad), (hidden, head), retain_graph=True
        )
        for outs in (got, expected)
        if any(o.requires_grad for o in outs)
    ]
    for a, b in zip(*gradients) if gradients else ():
        close(a, b)


def test_autocast_does_not_lower_a_teacher_in_float32():
    hidden, head, teacher_hidden, teacher_head = (torch.randn(n, 8) for n in (4, 50, 4, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.full_kl(hidden, head, teacher_hidden, teacher_head).values
        logits = hidden @ head.T
        lowered = teacher_hidden @ teacher_head.T
    teacher_logits = teacher_hidden @ teacher_head.T
    exact = ops.full_kl(logits, None, teacher_logits, None).values
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert (ops.full_kl(logits, None, lowered, None).values - exact).abs().max() > 1e-3


def test_empty_batches():
    """Trap 12: no rows, finite zero loss, zero gradients with a graph."""
    z = torch.randn(0, 5, requires_grad=True)
    hidden, head = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    logp = torch.zeros(0, 2)
    outs = [
        ops.token_logp(z, None, ids[:, 0], with_entropy=True).entropy,
        ops.gather_logp(z, None, ids).logp,
        ops.support_kl(z, None, ids, logp).loss,
        ops.full_kl(z, None, z.detach(), None).loss,
        ops.gated_kl(z, None, ids[:, 0], lambda student_logp: (student_logp, {})).loss,
        ops.token_logp(hidden, head, ids[:, 0]).logp,
        ops.support_kl(hidden, head, ids, logp).loss,
        ops.full_kl(hidden, head, hidden, head).loss,
        ops.gated_kl(hidden, head, ids[:, 0], lambda student_logp: (student_logp, {})).loss,
    ]
    loss = sum(o.sum() for o in outs)
    assert loss.item() == 0
    loss.backward()
    assert z.grad.shape == (0, 5) and hidden.grad.shape == (0, 3)
    assert head.grad.abs().max() == 0
    assert [o.shape[0] for o in ops.topk_logp(z, None, 2)[:4]] == [0, 0, 0, 0]
