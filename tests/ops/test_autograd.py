"""Gradients by finite differences, torch's own checks of custom ops, in-place forms, compile."""

import pytest
import torch
from strategies import INF, random_ids

import opd_ops

CPP = torch.ops.opd_ops
KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)]


def double(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_of_every_output(temperature):
    """The whole tuple of outputs, in float64, at repeated ids and with padding."""
    z, ids = double(3, 11), random_ids(1, 3, 4, 9)
    options = {"valid_vocab": 9, "temperature": temperature}
    check = torch.autograd.gradcheck

    assert check(lambda z: opd_ops.token_logp(z, ids[:, 0], with_entropy=True, **options), (z,))
    assert check(lambda z: opd_ops.gather_logp(z, ids, **options), (z,))
    teacher = double(3, 10, seed=1).detach()
    distinct = random_ids(2, 3, 4, 9, distinct=True)
    teacher_logp = (teacher[:, :9] / temperature).log_softmax(-1).gather(1, distinct)
    tail = torch.log1p(-teacher_logp.exp().sum(-1))
    bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail}
    for divergence, beta in KINDS:
        for form in ({}, {"renormalise": False}, bucket):
            assert check(
                lambda z, d=divergence, b=beta, f=form: opd_ops.support_kl(
                    z, distinct, teacher_logp, divergence=d, beta=b, **f, **options
                )[0],
                (z,),
            )
        assert check(
            lambda z, d=divergence, b=beta: opd_ops.full_kl(
                z, teacher, divergence=d, beta=b, **options
            ),
            (z,),
        )


@pytest.mark.parametrize("workspace_mib", [256, 1e-4])
def test_gradcheck_of_linear_ops(workspace_mib):
    hidden, head, ids = double(5, 3), double(11, 3, seed=1), random_ids(1, 5, 4, 9)
    options = {"valid_vocab": 9, "temperature": 0.7, "workspace_mib": workspace_mib}
    check = torch.autograd.gradcheck
    assert check(
        lambda h, w: opd_ops.linear_token_logp(h, w, ids[:, 0], with_entropy=True, **options),
        (hidden, head),
    )
    assert check(lambda h, w: opd_ops.linear_gather_logp(h, w, ids, **options), (hidden, head))
    assert check(lambda h, w: opd_ops.linear_gather_logits(h, w, ids, **options), (hidden, head))
    distinct, teacher_logp = random_ids(2, 5, 3, 9, distinct=True), -1 - double(5, 3).detach() ** 2
    for form in ({}, {"renormalise": False}, {"renormalise": False, "tail": "bucket"}):
        if "tail" in form:
            form["teacher_tail_logp"] = torch.full((5,), -2.0, dtype=torch.float64)
        assert check(
            lambda h, w, f=form: opd_ops.linear_support_kl(
                h, w, distinct, teacher_logp, divergence="jsd", **f, **options
            )[0],
            (hidden, head),
        )
    teacher_hidden, teacher_head = double(5, 2, seed=2).detach(), double(10, 2, seed=3).detach()
    logits, teacher_logits = double(5, 12, seed=4), double(5, 9, seed=5).detach()
    for divergence, beta in KINDS:
        settings = {**options, "divergence": divergence, "beta": beta}
        for teacher in ((teacher_hidden, teacher_head), (teacher_logits, None)):
            assert check(
                lambda h, w, t=teacher, s=settings: opd_ops.linear_full_kl(h, w, *t, **s),
                (hidden, head),
            )
            assert check(
                lambda z, t=teacher, s=settings: opd_ops.linear_full_kl(z, None, *t, **s),
                (logits,),
            )


def opcheck_cases():
    z = torch.randn(3, 11, requires_grad=True)
    other, ids = torch.randn(3, 11), random_ids(0, 3, 4, 9)
    stats, dense, grad = torch.randn(3, 2).abs(), torch.randn(3), torch.randn(3, 4)
    five, one = torch.randn(3, 5).abs(), torch.randn(3)
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    f32 = torch.float32
    return {
        "gather_logp": (z, ids, 9, 0.7, True, False),
        "gather_logp with tail": (z, ids, 9, 0.7, False, True),
        "topk_logp": (z.detach(), 3, ids[:, 0], 9, 0.7),
        "gather_linear": (hidden.detach(), head.detach(), ids, 2.0),
        "gather_linear_backward_hidden": (hidden.detach(), head.detach(), ids, grad),
        "gather_linear_backward_head_": (torch.zeros(11, 4), hidden.detach(), ids, grad),
        "gather_logp_backward": (z.detach(), ids, grad, stats, dense, one, None, None, 9, 0.7),
        "gather_logp_backward_": (z.detach(), ids, grad, stats, dense, None, stats, one, 9, 0.7),
        "full_kl": (z, other, 9, 0.7, 2, 0.3),
        "full_kl_backward": (z.detach(), other, five, one, 9, 0.7, 2, 0.3),
        "full_kl_backward_": (z.detach(), other, five, one, 9, 0.7, 1, 0.3),
        "linear_gather_logp": (hidden, head, ids, 9, 0.7, False, True, f32, 1.0),
        "linear_topk_logp": (hidden.detach(), head.detach(), 3, None, 9, 0.7, f32, 1.0),
        "linear_gather_logp_backward": (
            *(hidden.detach(), head.detach(), ids, grad, stats, dense, None, None, None),
            *(9, 0.7, f32, 1.0, True, True),
        ),
        "linear_full_kl": (hidden, head, other, None, 9, 0.7, 0, 0.5, f32, f32, 1.0),
        "linear_full_kl_backward": (
            *(hidden.detach(), head.detach(), other, None, five, one),
            *(9, 0.7, 0, 0.5, f32, f32, 1.0, True, True),
        ),
    }


@pytest.mark.parametrize("name", list(opcheck_cases()))
def test_opcheck(name):
    torch.library.opcheck(getattr(CPP, name.split()[0]).default, opcheck_cases()[name])


def test_every_registered_op_is_opchecked():
    registered = {
        name.removeprefix("opd_ops::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("opd_ops::")
    }
    assert registered == {name.split()[0] for name in opcheck_cases()}


def inplace_ops():
    ids, teacher = random_ids(0, 4, 3, 50), torch.randn(4, 50)
    distinct, teacher_logp = random_ids(0, 4, 3, 50, distinct=True), -2 - torch.rand(4, 3)
    bucket = {"tail": "bucket", "teacher_tail_logp": torch.full((4,), -1.0)}
    return {
        "support_kl": lambda z, **kw: opd_ops.support_kl(z, distinct, teacher_logp, **kw)[0],
        "support_kl bucket": lambda z, **kw: opd_ops.support_kl(
            z, distinct, teacher_logp, renormalise=False, with_student_mass=True, **bucket, **kw
        )[0],
        "token_logp": lambda z, **kw: opd_ops.token_logp(z, ids[:, 0], with_entropy=True, **kw)[0],
        "gather_logp": lambda z, **kw: opd_ops.gather_logp(z, ids, **kw)[0],
        "full_kl": lambda z, **kw: opd_ops.full_kl(z, teacher, **kw),
        "gated_kl": lambda z, **kw: opd_ops.gated_kl(
            *(z, ids[:, 0], teacher[:, 0] - 5, torch.tensor([1.0, -1.0, 0.0, 1.0])),
            **{"extrapolation": 1.8, "interpolation": 0.5, **kw},
        )[0],
    }


@pytest.mark.parametrize("name", list(inplace_ops()))
def test_inplace_gives_the_same_gradient_in_the_memory_of_the_logits(name):
    op = inplace_ops()[name]
    hidden = torch.randn(4, 6, requires_grad=True)
    head = torch.randn(50, 6, requires_grad=True)
    expected = torch.autograd.grad(op(hidden @ head.T).sum(), (hidden, head))

    logits = hidden @ head.T
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = op(logits, inplace=True).sum()
    got = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="a second backward"):
        torch.autograd.grad(loss, hidden)


def test_inplace_is_refused_where_it_would_be_wrong():
    ids = torch.tensor([0, 1])
    leaf = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="not a leaf"):
        opd_ops.token_logp(leaf, ids, inplace=True)
    with pytest.raises(ValueError, match="rows without gaps"):
        opd_ops.token_logp((torch.randn(5, 2, requires_grad=True) * 1).t(), ids, inplace=True)

    # somebody else needs the logits for their own backward: autograd notices
    logits = leaf * 2
    loss = opd_ops.token_logp(logits, ids, inplace=True)[0].sum() + logits.exp().log().sum() * 0
    squared = (logits**2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()

    # double backward
    logits = leaf * 2
    value = opd_ops.token_logp(logits, ids, inplace=True)[0].sum()
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_double_backward_is_refused():
    leaf = torch.randn(2, 5, requires_grad=True)
    for value in (
        opd_ops.token_logp(leaf, torch.tensor([0, 1]))[0],
        opd_ops.full_kl(leaf, torch.randn(2, 5)),
    ):
        (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_undefined_gradients():
    """Only one of several outputs is used, or none."""
    z = torch.randn(3, 9, requires_grad=True)
    logp, lse, entropy = opd_ops.token_logp(z, torch.tensor([0, 1, 2]), with_entropy=True)
    (grad,) = torch.autograd.grad(lse.sum(), z, retain_graph=True)
    assert torch.allclose(grad, z.detach().softmax(-1), atol=1e-6)
    (grad,) = torch.autograd.grad(entropy.sum(), z, retain_graph=True)
    assert torch.allclose(grad.sum(-1), torch.zeros(3), atol=1e-6) and grad.abs().max() > 0.01
    (grad,) = torch.autograd.grad((logp.detach() * z[:, 0]).sum(), z)
    assert (grad[:, 1:] == 0).all()


def test_teacher_is_a_constant():
    """Trap 20: no gradient reaches the teacher, even if it asks for one."""
    student = torch.randn(3, 9, requires_grad=True)
    teacher = torch.randn(3, 9, requires_grad=True)
    opd_ops.full_kl(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    opd_ops.linear_full_kl(student, None, hidden, head).sum().backward()
    assert hidden.grad is None and head.grad is None


def test_compile_fullgraph():
    """A loss of every public op."""
    ids = random_ids(0, 4, 3, 50)
    teacher_logp, verdict = -2 - torch.rand(4, 3), torch.tensor([1.0, -1.0, 0.0, 1.0])
    gated = ids[:, 0], teacher_logp[:, 0].contiguous(), verdict
    gate = {"extrapolation": 1.8, "interpolation": 1.0}
    teacher = torch.randn(4, 5), torch.randn(60, 5)

    def loss(hidden, head):
        logits = hidden @ head.T
        support, logp, lse, tail = opd_ops.topk_logp(logits, 3)
        total = logp.sum() + lse.sum() + tail.sum()
        total = total + opd_ops.linear_topk_logp(hidden, head, 3)[1].sum()
        for each in opd_ops.token_logp(logits, ids[:, 0], with_entropy=True):
            total = total + each.sum()
        total = total + opd_ops.gather_logp(2 * logits, ids, inplace=True)[0].sum()
        total = total + opd_ops.support_kl(logits, support, teacher_logp)[0].sum()
        total = total + opd_ops.gated_kl(logits, *gated, **gate)[0].sum()
        total = total + opd_ops.full_kl(logits, logits.detach().flip(0), divergence="jsd").sum()
        total = total + opd_ops.linear_token_logp(hidden, head, ids[:, 0])[0].sum()
        total = total + opd_ops.linear_gather_logp(hidden, head, ids)[0].sum()
        total = total + opd_ops.linear_gather_logits(hidden, head, ids).sum()
        total = total + opd_ops.linear_support_kl(hidden, head, support, teacher_logp)[0].sum()
        total = total + opd_ops.linear_gated_kl(hidden, head, *gated, **gate)[0].sum()
        return total + opd_ops.linear_full_kl(hidden, head, *teacher, valid_vocab=50).sum()

    assert set(loss.__code__.co_names) >= set(opd_ops.__all__) - {"info"}
    hidden = torch.randn(4, 6, requires_grad=True)
    head = torch.randn(50, 6, requires_grad=True)
    expected = torch.autograd.grad(loss(hidden, head), (hidden, head))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, head), (hidden, head))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))


def test_infinite_divergence_does_not_spread():
    student = torch.zeros(2, 4, requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    value = opd_ops.full_kl(student, teacher)
    assert value[0] == INF and value[1].isfinite()
    (grad,) = torch.autograd.grad(value[1], student)
    assert grad.isfinite().all() and (grad[0] == 0).all()
