"""Ops from hidden states and head: any number of chunks, in bounded memory."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_budget, policy_gradient, random_ids, temperatures

import opd_ops
from opd_ops import reference

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)]


def operands(seed, rows, vocab, width, dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def call(module, name, seed, hidden, head, valid, temperature, **kwargs):
    """Outputs of an op with arguments made from the seed; of a loss, the loss comes first."""
    rows = hidden.shape[0]
    ids = random_ids(seed, rows, 3, valid)
    kwargs |= {"valid_vocab": valid, "temperature": temperature}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, generator=generator, dtype=torch.float64).float()
    if name == "token_logp":
        return module.token_logp(hidden, head, ids[:, 0], with_entropy=True, **kwargs)
    if name == "gather_logp":
        return module.gather_logp(hidden, head, ids, **kwargs)
    if name == "gated_kl":
        values = [-3 * noise[:, 0].float(), weight]
        found = module.gated_kl(hidden, head, ids[:, 0], policy_gradient, values, **kwargs)
        return found.loss, found.student_logp, found.logged["log_ratio"]
    if name == "gated_kl of several":
        several = random_ids(seed, rows, 3, valid, distinct=True)
        loss_of = lambda s, t: ((s.exp() * (s - t)).sum(-1), {})  # noqa: E731
        values = [-1 - noise[:, : several.shape[1]].float()]
        return module.gated_kl(hidden, head, several, loss_of, values, **kwargs)[:2]
    if name.startswith("support"):
        ids = random_ids(seed, rows, 2, valid, distinct=True)
        mask, teacher_logp = noise[:, 1:] > 0.2, -1 - noise[:, :2]
        tail = torch.log1p(-teacher_logp.exp().sum(-1)).to(teacher_logp.dtype)
        kwargs |= {
            "support": {},
            "support-truncated": {"renormalise": False},
            "support-bucket": {"renormalise": False, "tail": "bucket", "teacher_tail_logp": tail},
        }[name]
        return module.support_kl(
            hidden, head, ids, teacher_logp, support_mask=mask, token_weight=weight, **kwargs
        )
    if name == "topk_logp":
        return module.topk_logp(hidden, head, min(3, valid), token_ids=ids[:, 0], **kwargs)[1:]
    divergence, beta = KINDS[int(name[-1])]
    teacher_hidden, teacher_head = operands(seed + 1, rows, valid + 3, 5, hidden.dtype)
    return module.full_kl(
        *(hidden, head, teacher_hidden, teacher_head),
        **{"divergence": divergence, "beta": beta, "token_weight": weight, **kwargs},
    )


NAMES = [
    *("token_logp", "gather_logp", "gated_kl", "gated_kl of several", "full0", "full1", "full2"),
    *("support", "support-truncated", "support-bucket"),
]


@pytest.mark.parametrize("name", [*NAMES, "topk_logp"])
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
        grads = torch.autograd.grad(loss, (hidden, head)) if name != "topk_logp" else ()
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
        grads = torch.autograd.grad(sum(o.sum() for o in out if o.requires_grad), (hidden, head))
        assert {t.dtype for t in (*out, *grads)} == {torch.float32}
        results.append((*out, *grads))
        plain = call(module, name, 0, hidden, head, 45, 1.0)
        lowered = any(not torch.equal(a, b) for a, b in zip(plain, out))
        assert lowered == (name != "support")
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=3e-2)


def test_head_gradient_adds_up_in_float32_over_chunks():
    """bfloat16 has 8 bits: 512 rows of gradient 1 added one by one would stop at 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    for module in (opd_ops, reference):
        head.grad = None
        ids = torch.zeros(512, dtype=torch.int64)
        module.token_logp(hidden, head, ids, workspace_mib=1e-6).logp.sum().backward()
        assert head.grad.flatten().tolist() == [256.0, -256.0]
        head.grad = None
        of_itself = lambda student_logp: (student_logp, {})  # noqa: E731
        module.gated_kl(hidden, head, ids, of_itself, workspace_mib=1e-6).loss.backward()
        assert head.grad.flatten().tolist() == [256.0, -256.0]


def test_head_none_means_logits():
    logits = torch.randn(5, 40, requires_grad=True)
    for name in NAMES:
        results = []
        for module in (opd_ops, reference):
            out = call(module, name, 3, logits, None, 30, 0.7)
            loss = sum(o.sum() for o in out if o.requires_grad)
            results.append((*out, *torch.autograd.grad(loss, logits)))
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_only_wanted_gradients(frozen):
    hidden, head = operands(0, 6, 50, 8, torch.float32)
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    for name in NAMES:
        hidden.grad = head.grad = None
        loss = sum(o.sum() for o in call(opd_ops, name, 0, hidden, head, 45, 1.0)[:1])
        assert loss.requires_grad == (frozen != "both")
        if loss.requires_grad:
            loss.backward()
        assert (hidden.grad is not None) == (frozen == "head")
        assert (head.grad is not None) == (frozen == "hidden")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_some_rows_of_the_head(dtype):
    """The same bits for any number of threads; repeated ids are rounded once."""
    hidden, head = operands(0, 40, 30, 200, dtype)
    ids, teacher_logp = random_ids(0, 40, 7, 25, distinct=True), -torch.rand(40, 7)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            loss = opd_ops.support_kl(hidden, head, ids, teacher_logp).loss
            seen.append(torch.autograd.grad(loss, (hidden, head)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    loss = reference.support_kl(*exact, ids, teacher_logp.double()).loss
    low = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    for got, expected in zip(seen[0], torch.autograd.grad(loss, exact)):
        assert got.dtype == dtype
        assert_budget(got, expected, expected, floor=2e-4, relative=low)


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
        loss, _ = opd_ops.support_kl(hidden, weights, ids, teacher_logp)
        values.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weights))))
    assert all(torch.equal(a, b) for a, b in zip(*values))


MEMORY = """
import resource, sys, torch
import opd_ops
torch.set_num_threads(1)
rows, vocab, width = 2048, 32_000, 16     # [N, V] in float32: 250 MiB
hidden, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width)
head.requires_grad_("head" in sys.argv[1])
ids, teacher = torch.randint(0, vocab, (rows, 4)), torch.randn(rows, width)
logp = torch.full((rows, 4), -3.0)
def run(n, mib):
    name, *form = sys.argv[1].split()
    more = {
        "token_logp": (ids[:n, 0],),
        "topk_logp": (4,),
        "gather_logp": (ids[:n],),
        "support_kl": (ids[:n], logp[:n]),
        "gated_kl": (ids[:n, 0], lambda s, t: ((s - t).square(), {}), [logp[:n, 0]]),
        "full_kl": (teacher[:n], head.detach()),
    }[name]
    options = {"renormalise": False} if name == "support_kl" else {}
    out = getattr(opd_ops, name)(hidden[:n], head, *more, workspace_mib=mib, **options)
    loss = out.loss if hasattr(out, "loss") else out.logp.sum()
    if loss.requires_grad:
        loss.backward()
run(16, 1)  # libraries and thread pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    "op", [*(name for name in opd_ops.__all__ if name != "info"), "gated_kl head", "full_kl head"]
)
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
        opd_ops.token_logp(hidden, head, random_ids(0, 64, 1, 1000)[:, 0])
    assert kept and all(shape != (64, 1000) for shape in kept)


def test_no_grad_and_inference_mode():
    hidden, head = operands(0, 6, 50, 8, torch.float32)
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with mode():
            for name in NAMES:
                assert len(call(opd_ops, name, 0, hidden, head, 45, 1.0)[1]) == 6
