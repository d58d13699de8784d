"""Gradients by finite differences, torch's own checks of custom ops, compile."""

import pytest
import torch
from strategies import INF, policy_gradient, random_ids

import opd_ops

CPP = torch.ops.opd_ops
KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)]


def double(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def convex(student_logp, teacher_logp):
    return (student_logp - teacher_logp).square() / 2, {}


class Again(torch.autograd.Function):
    """A loss that is computed again for each backward: gradcheck asks several times."""

    @staticmethod
    def forward(ctx, function, *given):
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    def backward(ctx, grad):
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.function(*given) * grad
        return None, *torch.autograd.grad(loss, given)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("workspace_mib", [256, 1e-4])
@pytest.mark.parametrize("with_head", [False, True])
def test_gradcheck_of_every_output(temperature, workspace_mib, with_head):
    """In float64, at repeated ids and with padding, from logits and from hidden states."""
    ids = random_ids(1, 5, 4, 9)
    options = {"valid_vocab": 9, "temperature": temperature, "workspace_mib": workspace_mib}
    hidden = double(5, 3 if with_head else 11)
    given = (hidden, double(11, 3, seed=1)) if with_head else (hidden,)

    def check(op, *args, **kwargs):
        def outputs(hidden, head=None):
            found = op(hidden, head, *args, **options, **kwargs)
            if hasattr(found, "loss"):
                return found.loss
            return tuple(t for t in found if t is not None)

        loss = op in (opd_ops.gated_kl, opd_ops.support_kl, opd_ops.full_kl)
        again = (lambda *given: Again.apply(outputs, *given)) if loss else outputs
        assert torch.autograd.gradcheck(again, given)

    check(opd_ops.token_logp, ids[:, 0], with_entropy=True)
    check(opd_ops.gather_logp, ids)
    distinct = random_ids(2, 5, 4, 9, distinct=True)
    teacher = double(5, 10, seed=3).detach()
    teacher_hidden, teacher_head = double(5, 2, seed=2).detach(), double(10, 2, seed=3).detach()
    teacher_logp = (teacher[:, :9] / temperature).log_softmax(-1).gather(1, distinct)
    tail = torch.log1p(-teacher_logp.exp().sum(-1))
    check(opd_ops.gated_kl, ids[:, 0], convex, [teacher_logp[:, 0]])
    several = [teacher_logp]
    check(opd_ops.gated_kl, ids, lambda s, t: ((s.exp() * (s - t)).sum(-1), {}), several)
    weight = double(5, seed=7).detach()
    weight[2] = 0.0
    bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail}
    for divergence, beta in KINDS:
        more = {"divergence": divergence, "beta": beta, "token_weight": weight}
        for form in ({}, {"renormalise": False}, bucket):
            check(opd_ops.support_kl, distinct, teacher_logp, **form, **more)
        for other in ((teacher, None), (teacher_hidden, teacher_head)):
            check(opd_ops.full_kl, *other, **more)


def opcheck_cases():
    z = torch.randn(3, 11, requires_grad=True)
    other, ids = torch.randn(3, 11), random_ids(0, 3, 4, 9)
    stats, dense, grad = torch.randn(3, 2).abs(), torch.randn(3), torch.randn(3, 4)
    five, one = torch.randn(3, 5).abs(), torch.randn(3)
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    frozen, f32, bf16 = (hidden.detach(), head.detach()), torch.float32, torch.bfloat16
    mixed = hidden.detach(), head.detach().bfloat16()
    return {
        "gather_logp": (z, ids, 9, 0.7, True, False),
        "gather_logp with tail": (z, ids, 9, 0.7, False, True),
        "topk_logp": (z.detach(), 3, ids[:, 0], 9, 0.7),
        "gather_linear": (*frozen, ids, 2.0),
        "gather_linear_backward_hidden": (*frozen, ids, grad),
        "gather_linear_backward_head_": (torch.zeros(11, 4), hidden.detach(), ids, grad),
        "gather_logp_backward": (z.detach(), ids, grad, stats, dense, one, None, None, 9, 0.7),
        "gather_logp_backward_out": (
            *(z.detach(), ids, grad, stats, dense, None, stats, one, 9, 0.7, torch.zeros(3, 11)),
        ),
        "full_kl": (z.detach(), other, 9, 0.7, 2, 0.3),
        "full_kl_backward_out": (
            *(z.detach(), other, five, one, 9, 0.7, 1, 0.3, torch.zeros(3, 11)),
        ),
        "scale_out": (z.detach(), dense[0], torch.zeros(3, 11)),
        "linear_gather_logp": (hidden, head, ids, 9, 0.7, False, True, f32, 1.0),
        "linear_topk_logp": (*frozen, 3, None, 9, 0.7, f32, 1.0),
        "linear_gather_logp_backward": (
            *(*frozen, ids, grad, stats, dense, None, None, None),
            *(9, 0.7, f32, 1.0, True, True),
        ),
        "linear_full_kl": (*frozen, other, None, one, 9, 0.7, 0, 0.5, f32, 1.0, True, True),
        **{
            f"{name} in mixed types, {needs}": (*arguments, *needs)
            for needs in ((True, False), (False, True))
            for name, arguments in (
                ("linear_full_kl", (*mixed, other, None, one, 9, 0.7, 0, 0.5, bf16, 1e-6)),
                (
                    "linear_gather_logp_backward",
                    (*mixed, ids, grad, stats, dense, None, None, None, 9, 0.7, bf16, 1e-6),
                ),
            )
        },
        "linear_full_kl of logits": (
            *(z.detach(), None, other, None, None, 9, 0.7, 0, 0.5, f32, 1.0, True, False),
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


def test_double_backward_is_refused():
    """By an error: a second derivative of zero would be silent."""
    leaf, head = torch.randn(2, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    ids, teacher = torch.tensor([0, 1]), torch.randn(2, 5)
    for value in (
        opd_ops.token_logp(leaf, None, ids).logp.sum(),
        opd_ops.token_logp(leaf, head, ids).logp.sum(),
        opd_ops.full_kl(leaf, None, teacher, None).loss,
        opd_ops.gated_kl(leaf, head, ids, convex, [teacher[:, 0]]).loss,
        opd_ops.support_kl(leaf, head, ids[:, None], teacher[:, :1], renormalise=False).loss,
        opd_ops.support_kl(leaf, head, random_ids(0, 2, 2, 7), teacher[:, :2]).loss,
    ):
        (grad,) = torch.autograd.grad(value.square(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"double backward|differentiate twice"):
            grad.sum().backward()


def test_undefined_gradients():
    """Only one of several outputs is used, or none."""
    z = torch.randn(3, 9, requires_grad=True)
    ids = torch.tensor([0, 1, 2])
    logp, lse, entropy = opd_ops.token_logp(z, None, ids, with_entropy=True)
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
    opd_ops.full_kl(student, None, teacher, None).loss.backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    opd_ops.full_kl(student, None, hidden, head).loss.backward()
    assert hidden.grad is None and head.grad is None
    teacher_logp = torch.randn(3, requires_grad=True)
    ids = torch.tensor([0, 1, 2])
    for given in ((student, None), (torch.randn(3, 4, requires_grad=True), head)):
        opd_ops.gated_kl(*given, ids, convex, [teacher_logp]).loss.backward()
        assert teacher_logp.grad is None


IDS = random_ids(0, 4, 3, 50)


def every_op(hidden, head):
    """A loss of every op, from logits and from hidden states."""
    ids = IDS
    teacher_logp = -2 - torch.arange(12.0).view(4, 3) / 12
    total = hidden.new_zeros(())
    for given in ((hidden, head), (hidden @ head.T, None)):
        top = opd_ops.topk_logp(*given, 3)
        total = total + top.logp.sum() + top.lse.sum() + top.tail_logp.sum()
        for each in opd_ops.token_logp(*given, ids[:, 0], with_entropy=True):
            total = total + each.sum()
        total = total + opd_ops.gather_logp(*given, ids).logp.sum()
        total = total + opd_ops.support_kl(*given, top.ids, teacher_logp).loss
        bucket = {"tail": "bucket", "teacher_tail_logp": teacher_logp[:, 0]}
        total = (
            total
            + opd_ops.support_kl(*given, top.ids, teacher_logp, renormalise=False, **bucket).loss
        )
        found = opd_ops.gated_kl(*given, ids[:, 0], policy_gradient, [teacher_logp[:, 0]])
        total = total + found.loss * 2 + found.logged["log_ratio"].sum()
        teacher = hidden.detach().flip(1), torch.cat([head, head]).detach()
        full = opd_ops.full_kl(*given, *teacher, divergence="jsd", valid_vocab=50)
        total = total + full.loss + full.values.sum()
    return total


def test_compile_fullgraph():
    assert set(every_op.__code__.co_names) >= set(opd_ops.__all__) - {"info"}
    hidden = torch.randn(4, 6, requires_grad=True)
    head = torch.randn(50, 6, requires_grad=True)
    expected = torch.autograd.grad(every_op(hidden, head), (hidden, head))
    torch._dynamo.reset()
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, head), (hidden, head))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, head), every_op(hidden, head))


@pytest.mark.parametrize("form", ["renormalised", "bucket", "gated", "full"])
@pytest.mark.parametrize("with_head", [False, True])
def test_compiled_gradients_one_by_one(form, with_head):
    """A compiled backward of its own: in a sum of many losses, one of zero could hide."""
    ids, teacher_logp = random_ids(0, 4, 3, 50, distinct=True), -2 - torch.rand(4, 3)
    teacher = torch.randn(4, 50)

    def loss(hidden, head=None):
        if form == "gated":
            return opd_ops.gated_kl(hidden, head, ids[:, 0], convex, [teacher_logp[:, 0]]).loss
        if form == "full":
            return opd_ops.full_kl(hidden, head, teacher, None).loss
        bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": teacher_logp[:, 0]}
        more = bucket if form == "bucket" else {}
        return opd_ops.support_kl(hidden, head, ids, teacher_logp, **more).loss

    given = [torch.randn(4, 6), torch.randn(50, 6)] if with_head else [torch.randn(4, 50)]
    given = [tensor.requires_grad_() for tensor in given]
    expected = torch.autograd.grad(loss(*given) * 3, given)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*given) * 3, given)
    for a, b in zip(got, expected):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_infinite_divergence_does_not_spread():
    student = torch.zeros(2, 4, requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    values = opd_ops.full_kl(student, None, teacher, None).values
    assert values[0] == INF and values[1].isfinite()
    found = opd_ops.full_kl(student, None, teacher, None, token_weight=torch.tensor([0.0, 1.0]))
    assert found.loss == values[1]
    (grad,) = torch.autograd.grad(found.loss, student)
    assert grad.isfinite().all() and (grad[0] == 0).all() and (grad[1] != 0).any()


HIDDEN, HEAD = torch.randn(5, 8), torch.randn(11, 8)
TOKENS, OTHER = torch.arange(5), torch.randn(5, 8)
FORWARD = {
    "token_logp": lambda h, w: opd_ops.token_logp(h, w, TOKENS).logp,
    "topk_logp": lambda h, w: opd_ops.topk_logp(h, w, 3).logp,
    "gather_logp": lambda h, w: opd_ops.gather_logp(h, w, TOKENS[:, None]).logp,
    "support_kl": lambda h, w: (
        opd_ops.support_kl(h, w, TOKENS[:, None], -torch.ones(5, 1), renormalise=False).loss
    ),
    "gated_kl": lambda h, w: opd_ops.gated_kl(h, w, TOKENS, convex, [torch.zeros(5)]).loss,
    "full_kl": lambda h, w: opd_ops.full_kl(h, w, OTHER, HEAD).loss,
}


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("through", ["hidden", "head"])
def test_forward_mode_is_refused_not_zero(name, through):
    """torch takes an op without a forward rule for a constant."""

    def of(x):
        return FORWARD[name](x, HEAD) if through == "hidden" else FORWARD[name](HIDDEN, x)

    x = HIDDEN if through == "hidden" else HEAD
    of(x)
    with pytest.raises(NotImplementedError, match=f"{name}: no forward-mode"):
        torch.func.jvp(of, (x,), (torch.ones_like(x),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"{name}: no forward-mode"),
    ):
        of(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
