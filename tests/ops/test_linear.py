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
    divergence, beta = KINDS[int(name[-1])]
    teacher_hidden, teacher_head = operands(seed + 1, rows, valid + 3, 5, hidden.dtype)
    return (
        module.linear_full_kl(
            *(hidden, head, teacher_hidden, teacher_head),
            **{"divergence": divergence, "beta": beta, **kwargs},
        ),
    )


NAMES = ["linear_token_logp", "linear_gather_logp", "linear_gated_kl", "full0", "full1", "full2"]


@pytest.mark.parametrize("name", NAMES)
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
        loss = sum(o.double().sum() for o in out)
        results.append((out, torch.autograd.grad(loss, (hidden, head))))
    (op, op_grads), (rough, rough_grads), (truth, true_grads) = results
    scale = 1 + float(max([t.abs().max() for t in true_grads if t.numel()] or [0.0]))
    for got, near, exact in zip((*op, *op_grads), (*rough, *rough_grads), (*truth, *true_grads)):
        assert got.dtype == near.dtype and got.shape == near.shape
        # in bfloat16 the product itself is rounded, in both; chunks of it add up in float32
        floor = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]
        assert_budget(got, near, exact, floor=floor * scale)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """hidden and head are cast for the product, and get their gradients in their own dtype."""
    results = []
    for module in (opd_ops, reference):
        hidden, head = operands(0, 6, 50, 8, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(module, name, 0, hidden, head, 45, 1.0)
        grads = torch.autograd.grad(sum(o.sum() for o in out), (hidden, head))
        assert {t.dtype for t in (*out, *grads)} == {torch.float32}
        results.append((*out, *grads))
        plain = call(module, name, 0, hidden, head, 45, 1.0)
        assert any(not torch.equal(a, b) for a, b in zip(plain, out))
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


MEMORY = """
import resource, sys, torch
import opd_ops
torch.set_num_threads(1)
rows, vocab, width = 2048, 32_000, 16     # [N, V] in float32: 250 MiB
hidden, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width)
ids, teacher = torch.randint(0, vocab, (rows,)), torch.randn(rows, width)
def run(n, mib):
    h = hidden[:n]
    if sys.argv[1] == "token":
        opd_ops.linear_token_logp(h, head, ids[:n], workspace_mib=mib)[0].sum().backward()
    else:
        opd_ops.linear_full_kl(h, head, teacher[:n], head, workspace_mib=mib).sum().backward()
run(16, 1)  # libraries and thread pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("op", ["token", "full"])
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
