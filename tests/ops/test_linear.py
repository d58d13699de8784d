"""linear_* ops: hidden states and head in place of logits, in bounded memory."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_budget, random_ids, temperatures

import opd_ops
from opd_ops import reference

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)]


def operands(seed, rows, vocab, width, dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def call(module, name, seed, hidden, head, valid, temperature, **kwargs):
    """Outputs of a linear op with arguments made from the seed."""
    rows = hidden.shape[0]
    ids = random_ids(seed, rows, 3, valid)
    kwargs |= {"valid_vocab": valid, "temperature": temperature}
    if name == "linear_token_logp":
        return module.linear_token_logp(hidden, head, ids[:, 0], with_entropy=True, **kwargs)
    if name == "linear_gather_logp":
        return module.linear_gather_logp(hidden, head, ids, **kwargs)
    if name == "linear_gated_kl":
        generator = torch.Generator().manual_seed(seed)
        teacher_logp = -3 * torch.rand(rows, generator=generator, dtype=torch.float64)
        verdict = torch.randint(-1, 2, (rows,), generator=generator).double()
        return module.linear_gated_kl(
            *(hidden, head, ids[:, 0], teacher_logp.float(), verdict.float()),
            **{"extrapolation": 1.8, "interpolation": 0.5, **kwargs},
        )[:1]
    if name == "linear_gather_logits":
        return (module.linear_gather_logits(hidden, head, ids, **kwargs),)
    if name.startswith("support"):
        generator = torch.Generator().manual_seed(seed)
        ids = random_ids(seed, rows, 2, valid, distinct=True)
        teacher_logp = -1 - torch.rand(rows, 2, generator=generator, dtype=torch.float64)
        mask = torch.rand(rows, 2, generator=generator) > 0.2
        tail = torch.log1p(-teacher_logp.exp().sum(-1)).to(teacher_logp.dtype)
        kwargs |= {
            "support": {},
            "support-truncated": {"renormalise": False},
            "support-bucket": {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail},
        }[name]
        return module.linear_support_kl(
            hidden, head, ids, teacher_logp, support_mask=mask, with_student_mass=True, **kwargs
        )
    if name == "linear_topk_logp":
        return module.linear_topk_logp(hidden, head, min(3, valid), token_ids=ids[:, 0], **kwargs)[
            1:5
        ]
    divergence, beta = KINDS[int(name[-1])]
    teacher_hidden, teacher_head = operands(seed + 1, rows, valid + 3, 5, hidden.dtype)
    return (
        module.linear_full_kl(
            *(hidden, head, teacher_hidden, teacher_head),
            **{"divergence": divergence, "beta": beta, **kwargs},
        ),
    )


NAMES = [
    *("linear_token_logp", "linear_gather_logp", "linear_gated_kl", "full0", "full1", "full2"),
    *("linear_gather_logits", "support", "support-truncated", "support-bucket"),
]


@pytest.mark.parametrize("name", [*NAMES, "linear_topk_logp"])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    vocab=st.integers(2, 300),
    padding=st.integers(0, 3),
    width=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    temperature=temperatures,
    workspace_mib=st.sampled_from([256, 0.002, 1e-6]),
)
def test_against_the_reference(
    name, seed, rows, vocab, padding, width, dtype, temperature, workspace_mib
):
    """Values, and gradients to hidden and head, for any number of chunks and with padding."""
    results = []
    for module, kind in ((opd_ops, dtype), (reference, dtype), (reference, torch.float64)):
        hidden, head = operands(seed, rows, vocab + padding, width, dtype)
        hidden, head = (t.detach().to(kind).requires_grad_() for t in (hidden, head))
        mib = workspace_mib if module is opd_ops else 256
        out = call(module, name, seed, hidden, head, vocab, temperature, workspace_mib=mib)
        loss = sum((o.double().sum() for o in out if o.requires_grad), 0.0)
        grads = torch.autograd.grad(loss, (hidden, head)) if name != "linear_topk_logp" else ()
        results.append((out, grads))
    (op, op_grads), (rough, rough_grads), (truth, true_grads) = results
    scale = 1 + float(max([t.abs().max() for t in true_grads if t.numel()] or [0.0]))
    for got, near, exact in zip((*op, *op_grads), (*rough, *rough_grads), (*truth, *true_grads)):
        assert got.dtype == near.dtype and got.shape == near.shape
        # in bfloat16 the product itself is rounded, in both; chunks of it add up in float32
        floor = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]
        assert_budget(got, near, exact, floor=floor * scale)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """hidden and head are cast for the product, and get their gradients in their own dtype.

    The K-row product is not lowered: it gains no speed from it, and loses digits.
    """
    results = []
    for module in (opd_ops, reference):
        hidden, head = operands(0, 6, 50, 8, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(module, name, 0, hidden, head, 45, 1.0)
        grads = torch.autograd.grad(sum(o.sum() for o in out), (hidden, head))
        assert {t.dtype for t in (*out, *grads)} == {torch.float32}
        results.append((*out, *grads))
        plain = call(module, name, 0, hidden, head, 45, 1.0)
        lowered = any(not torch.equal(a, b) for a, b in zip(plain, out))
        assert lowered == (name != "linear_gather_logits")
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=2e-2)


def test_head_gradient_adds_up_in_float32_over_chunks():
    """bfloat16 has 8 bits: 512 rows of gradient 1 added one by one would stop at 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    for module in (opd_ops, reference):
        head.grad = None
        logp, _ = module.linear_token_logp(
            hidden, head, torch.zeros(512, dtype=torch.int64), workspace_mib=1e-6
        )
        logp.sum().backward()
        assert head.grad.flatten().tolist() == [256.0, -256.0]


def test_head_none_means_logits():
    logits = torch.randn(5, 40, requires_grad=True)
    for name in NAMES:
        results = []
        for module in (opd_ops, reference):
            out = call(module, name, 3, logits, None, 30, 0.7)
            results.append((*out, *torch.autograd.grad(sum(o.sum() for o in out), logits)))
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_only_wanted_gradients(frozen):
    hidden, head = operands(0, 6, 50, 8, torch.float32)
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    for name in NAMES:
        hidden.grad = head.grad = None
        loss = sum(o.sum() for o in call(opd_ops, name, 0, hidden, head, 45, 1.0))
        assert loss.requires_grad == (frozen != "both")
        if loss.requires_grad:
            loss.backward()
        assert (hidden.grad is not None) == (frozen == "head")
        assert (head.grad is not None) == (frozen == "hidden")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forms_of_the_heads_gradient(dtype):
    """Dense, sparse rows and a buffer agree bit for bit, for any number of threads."""
    hidden, head = operands(0, 40, 30, 200, dtype)
    ids = random_ids(0, 40, 7, 25)
    weight = torch.randn(40, 7)

    def gradients(form):
        logits = opd_ops.linear_gather_logits(hidden, head, ids, grad_head=form)
        hidden.grad = head.grad = None
        (logits * weight.to(logits.dtype)).sum().backward()
        return hidden.grad, head.grad

    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            buffer = torch.zeros_like(head.detach())
            grad_hidden, dense = gradients("dense")
            _, rows = gradients("rows")
            assert rows.is_sparse
            assert rows._indices()[0].tolist() == sorted(set(ids.flatten().tolist()))
            assert gradients(buffer)[1] is None
            seen += [(grad_hidden, dense), (grad_hidden, rows.to_dense()), (grad_hidden, buffer)]
            accumulated = torch.full_like(buffer, 1.0)
            gradients(accumulated)
            torch.testing.assert_close(accumulated - 1, dense, rtol=2e-2, atol=4e-2)
    finally:
        torch.set_num_threads(before)
    for grad_hidden, grad_head in seen[1:]:
        assert torch.equal(grad_hidden, seen[0][0]) and torch.equal(grad_head, seen[0][1])
    exact = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = (exact[0] @ exact[1].T).gather(1, ids)
    truth = torch.autograd.grad((logits * weight).sum(), exact)
    rounding = {
        torch.float32: 0.0,
        torch.float64: 0.0,
        torch.bfloat16: 2.0**-8,
        torch.float16: 2.0**-10,
    }
    for got, expected in zip(seen[0], truth):
        assert got.dtype == dtype
        assert_budget(got, expected, expected, floor=2e-5, relative=rounding[dtype])


def test_some_rows_of_the_head_are_enough():
    """The other rows may hold anything."""
    hidden, head = operands(0, 4, 30, 8, torch.float32)
    poisoned = head.detach().clone()
    poisoned[10:] = float("nan")
    poisoned.requires_grad_()
    ids = random_ids(1, 4, 3, 10, distinct=True)
    teacher_logp = -1 - torch.rand(4, 3)
    values = []
    for weights in (head, poisoned):
        value, _ = opd_ops.linear_support_kl(hidden, weights, ids, teacher_logp, grad_head="rows")
        values.append((value, *torch.autograd.grad(value.sum(), (hidden, weights))))
    assert torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])
    assert torch.equal(values[0][2].to_dense(), values[1][2].to_dense())


def test_buffer_collects_the_heads_gradient_without_renormalisation():
    hidden, head = operands(0, 4, 30, 8, torch.float32)
    ids, teacher_logp = random_ids(1, 4, 3, 30, distinct=True), -1 - torch.rand(4, 3)
    gradients = []
    for form in ("dense", torch.ones(30, 8)):
        value, _ = opd_ops.linear_support_kl(
            hidden, head, ids, teacher_logp, renormalise=False, grad_head=form
        )
        hidden.grad = head.grad = None
        value.sum().backward()
        dense = isinstance(form, str)
        gradients.append(head.grad if dense else form - 1)
        assert (head.grad is not None) == dense
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


MEMORY = """
import resource, sys, torch
import opd_ops
torch.set_num_threads(1)
rows, vocab, width = 2048, 32_000, 16     # [N, V] in float32: 250 MiB
hidden, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width)
ids, teacher = torch.randint(0, vocab, (rows, 4)), torch.randn(rows, width)
logp, verdict = torch.full((rows, 4), -3.0), torch.ones(rows)
def run(n, mib):
    more = {
        "linear_token_logp": (ids[:n, 0],),
        "linear_topk_logp": (4,),
        "linear_gather_logp": (ids[:n],),
        "linear_gather_logits": (ids[:n],),
        "linear_support_kl": (ids[:n], logp[:n]),
        "linear_gated_kl": (ids[:n, 0], logp[:n, 0], verdict[:n]),
        "linear_full_kl": (teacher[:n], head),
    }[sys.argv[1]]
    options = {
        "linear_support_kl": {"renormalise": False},
        "linear_gated_kl": {"extrapolation": 1.8, "interpolation": 1.0},
    }.get(sys.argv[1], {})
    out = getattr(opd_ops, sys.argv[1])(hidden[:n], head, *more, workspace_mib=mib, **options)
    loss = (out if isinstance(out, torch.Tensor) else out[0]).sum()
    if loss.requires_grad:
        loss.backward()
run(16, 1)  # libraries and thread pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("op", [name for name in opd_ops.__all__ if name.startswith("linear_")])
def test_memory_stays_within_the_workspace(op):
    """Peak resident memory of a fresh process: 16 MiB of workspace where [N, V] is 250."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPD_OPS_REQUIRE": "cpp"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, op],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert float(done.stdout) < 16 + 24, done.stdout  # 24: the products' own buffers, gradients


def test_nothing_is_kept_for_backward_beyond_rows():
    hidden, head = operands(0, 64, 1000, 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        opd_ops.linear_token_logp(hidden, head, random_ids(0, 64, 1, 1000)[:, 0])
    assert kept and all(shape != (64, 1000) for shape in kept)


def test_no_grad_and_inference_mode():
    hidden, head = operands(0, 6, 50, 8, torch.float32)
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with mode():
            for name in NAMES:
                assert call(opd_ops, name, 0, hidden, head, 45, 1.0)[0].shape[0] == 6
