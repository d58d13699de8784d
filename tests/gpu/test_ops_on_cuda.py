"""The compiled ops on a CUDA device against the float64 reference on the CPU.

Run by `make test-gpu`, and once under `compute-sanitizer`. Only what differs from the CPU is here:
the kernels, the device, the stream, the size. Shapes and gradients of the Python side are the same
code that tests/ops runs, and the kernels' arithmetic runs there under the emulation too.
"""

import opd
import pytest
import tinylm
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    INF,
    assert_budget,
    logits,
    make_logits,
    policy_gradient,
    random_ids,
    temperatures,
    valid_vocabs,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

import opd_ops
from opd_ops import reference
from opd_run import models

pytestmark = pytest.mark.gpu
OPS = torch.ops.opd_ops
DIVERGENCES = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def on_cuda(z):
    """With the same strides and the same offset in its storage: `.cuda()` would tidy it up."""
    if not isinstance(z, torch.Tensor):
        return z
    flat = z.detach().new_empty(0)
    flat.set_(z.untyped_storage(), 0, (z.untyped_storage().nbytes() // z.element_size(),), (1,))
    return flat.cuda().as_strided(z.shape, z.stride(), z.storage_offset())


def three_ways(name, first, *others, weights, **settings):
    """(outputs, gradient) of the op on CUDA, and of the reference in float32 and float64."""
    results = []
    for kind in (None, torch.float32, torch.float64):
        if kind is None:
            leaf, rest, module = on_cuda(first).requires_grad_(), map(on_cuda, others), opd_ops
            extra = {key: on_cuda(value) for key, value in settings.items()}
        else:
            leaf, module, extra = first.detach().to(kind).requires_grad_(), reference, settings
            rest = [t.to(kind) if t.is_floating_point() else t for t in others]
        rest = [*rest, None] if name == "full_kl" else list(rest)
        op = getattr(module, name)
        if name in ("full_kl", "support_kl"):  # the loss of the rows that have a finite divergence
            out = (op(leaf.detach(), None, *rest, **extra).values,)
            weight = weights[0].to(out[0]).masked_fill(~out[0].isfinite(), 0.0)
            loss = op(leaf, None, *rest, **extra, token_weight=weight).loss
        else:
            out = op(leaf, None, *rest, **extra)
            out = tuple(o for o in out if o is not None)
            finite = [o.masked_fill(~o.detach().isfinite(), 0.0) for o in out]
            loss = sum((o * w.to(o)).sum() for o, w in zip(finite, weights))
        (grad,) = torch.autograd.grad(loss, leaf)
        if kind is None:
            assert all(o.is_cuda and o.dtype == torch.float32 for o in out)
            assert grad.is_cuda and grad.dtype == first.dtype
        results.append(([o.detach().cpu() for o in out], grad.cpu()))
    return results


def assert_close(results, dtype, floor=1e-6, gradient_floor=1e-5, rows=slice(None)):
    (values, grad), (rough_values, rough_grad), (exact_values, exact_grad) = results
    for got, rough, exact in zip(values, rough_values, exact_values):
        assert_budget(got, rough, exact, floor=floor)
    relative = ROUNDING[dtype]
    assert_budget(
        *(part[rows] for part in (grad, rough_grad, exact_grad)), gradient_floor, relative
    )


def test_the_kernels_are_there():
    info = opd_ops.info()
    assert info["ops"]["token_logp"]["cuda"] == "cpp", info["notice"]
    capability = torch.cuda.get_device_capability()
    targets = [
        int(target.removeprefix("sm_").rstrip("af")) for target in info["cuda_targets"].split()
    ]
    assert min(targets) <= 10 * capability[0] + capability[1]


@given(z=logits(), seed=st.integers(0, 2**31), temperature=temperatures, data=st.data())
def test_token_logp(z, seed, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    n, ids = z.shape[0], random_ids(seed, z.shape[0], 1, valid or z.shape[1])[:, 0]
    settings = {"with_entropy": True, "valid_vocab": valid, "temperature": temperature}
    results = three_ways("token_logp", z, ids, weights=weights(seed, n, n, n), **settings)
    assert_close(results, z.dtype, floor=1e-5 if z.dtype != torch.float32 else 1e-6)


@given(
    z=logits(),
    k=st.sampled_from([0, 1, 2, 5, 40]),
    seed=st.integers(0, 2**31),
    temperature=temperatures,
    data=st.data(),
)
def test_gather_logp(z, k, seed, temperature, data):
    valid = data.draw(valid_vocabs(z.shape[1]))
    n, ids = z.shape[0], random_ids(seed, z.shape[0], k, valid or z.shape[1])
    settings = {"valid_vocab": valid, "temperature": temperature}
    results = three_ways("gather_logp", z, ids, weights=weights(seed, (n, k), n), **settings)
    assert_close(results, z.dtype)


@given(
    z=logits(max_vocab=3000),
    k=st.sampled_from([1, 2, 8, 32, 128]),
    seed=st.integers(0, 2**31),
    temperature=temperatures,
)
def test_topk_logp(z, k, seed, temperature):
    k = min(k, z.shape[1])
    ids = random_ids(seed, z.shape[0], 1, z.shape[1])[:, 0]
    settings = {"temperature": temperature}
    got = opd_ops.topk_logp(on_cuda(z), None, k, token_ids=ids.cuda(), **settings)
    rough = reference.topk_logp(z.float(), None, k, token_ids=ids, **settings)
    exact = reference.topk_logp(z.double(), None, k, token_ids=ids, **settings)
    assert torch.equal(got.ids.cpu(), exact.ids)
    for i in (1, 2, 3, 4):
        assert_budget(got[i].cpu(), rough[i], exact[i])


@pytest.mark.parametrize("vocab", [6001, 151_936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_adversarial_rows(vocab, dtype):
    column = torch.arange(vocab, dtype=torch.float32)
    rows = [torch.zeros(vocab), -column, column % 7, torch.where(column < 3, 1.0, -INF)]
    rows.append(torch.where(column % 2 == 0, float("nan"), column))
    z, token = torch.stack(rows).to(dtype), torch.tensor([0, vocab - 1, 3, 5, 1])
    for k in (1, 32, 128, 1024):
        got = opd_ops.topk_logp(z.cuda(), None, k, token_ids=token.cuda())
        spec = reference.topk_logp(z, None, k, token_ids=token)
        assert torch.equal(got.ids.cpu(), spec.ids)
        for a, b in zip(got[1:], spec[1:]):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(z=logits(), seed=st.integers(0, 2**31), temperature=temperatures, data=st.data())
def test_full_kl(kind, z, seed, temperature, data):
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    teacher = (z.float() + noise).to(data.draw(st.sampled_from(DTYPES)))
    settings = {"divergence": kind[0], "beta": kind[1], "temperature": temperature}
    valid = data.draw(valid_vocabs(z.shape[1]))
    results = three_ways(
        "full_kl", z, teacher, weights=weights(seed, z.shape[0]), valid_vocab=valid, **settings
    )
    gap = (z.double() - teacher.double()).abs()
    gap = float(gap[gap.isfinite()].max()) if gap.isfinite().any() else 0.0
    floor = 1e-6 + 4e-7 * gap / temperature
    rows = results[2][0][0].isfinite()
    assert_close(results, z.dtype, floor, 4 * floor + 4e-6, rows)


@pytest.mark.parametrize("form", ["renormalised", "truncated", "bucket"])
@pytest.mark.parametrize("kind", DIVERGENCES)
@given(
    z=logits(patterns=["normal", "ties", "peaked", "masked"]), seed=st.integers(0, 2**31)
)  # fmt: skip
def test_support_kl(form, kind, z, seed):
    n, vocab = z.shape
    k = min(8, vocab)
    if k < 2:
        return
    ids = random_ids(seed, n, k, vocab, distinct=True)
    teacher = make_logits(seed + 1, n, vocab, torch.float64, "normal").log_softmax(-1)
    settings = {"divergence": kind[0], "beta": kind[1]}
    if form != "renormalised":
        settings["renormalise"] = False
    if form == "bucket":
        outside = teacher.scatter(1, ids, -INF)
        settings |= {"tail": "bucket", "teacher_tail_logp": outside.logsumexp(-1)}
    results = three_ways(
        "support_kl", z, ids, teacher.gather(1, ids), weights=weights(seed, n), **settings
    )
    rows = results[2][0][0].isfinite()
    assert_close(results, z.dtype, 4e-5, 2e-4, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_the_head(dtype):
    hidden, head = (
        make_logits(0, 33, 100, dtype, "normal"),
        make_logits(1, 500, 100, dtype, "normal"),
    )
    ids, teacher_logp = random_ids(2, 33, 9, 20, distinct=True), -torch.rand(33, 9)
    results = []
    for left, right, *rest in (
        *((hidden.cuda(), head.cuda(), ids.cuda(), teacher_logp.cuda()),) * 2,
        (hidden.double(), head.double(), ids, teacher_logp),
    ):
        leaves = left.requires_grad_(), right.requires_grad_()
        loss = opd_ops.support_kl(*leaves, *rest).loss
        results.append([t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, leaves))])
    for first, again, exact in zip(*results):
        assert torch.equal(first, again)  # the same bits, repeated ids and all
        scale = float(exact.abs().max())
        torch.testing.assert_close(
            first.double(), exact.double(), rtol=2 * ROUNDING[dtype] + 1e-5, atol=1e-4 * scale
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["token", "gather", "topk", "full", "support", "gated"])
def test_ops_in_chunks(name, dtype):
    """Several chunks through a small workspace, with padded rows (3,001 columns).

    Products without TF32; of bfloat16 operands with float32 results, so that values are as exact
    as those of float32 operands, and gradients are rounded once.
    """
    assert not torch.backends.cuda.matmul.allow_tf32
    hidden, head = torch.randn(70, 64).to(dtype), (torch.randn(3001, 64) / 8).to(dtype)
    ids = random_ids(0, 70, 5, 3001, distinct=True)
    teacher_logp = -1 - torch.rand(70, 5)

    def call(module, h, w, i, t):
        options = {"workspace_mib": 0.25}
        if name == "token":
            return module.token_logp(h, w, i[:, 0], with_entropy=True, **options)
        if name == "gather":
            return module.gather_logp(h, w, i, **options)
        if name == "topk":
            return module.topk_logp(h, w, 7, **options)[1:4]
        if name == "gated":
            return module.gated_kl(h, w, i[:, 0], policy_gradient, [t[:, 0]], **options)[:2]
        if name == "support":
            return module.support_kl(h, w, i, t, renormalise=False, **options)
        return module.full_kl(h, w, h.detach().flip(0), w.detach(), **options)

    got = [hidden.cuda().requires_grad_(), head.cuda().requires_grad_()]
    exact = [hidden.double().detach().requires_grad_(), head.double().detach().requires_grad_()]
    outputs = [
        call(opd_ops, *got, ids.cuda(), teacher_logp.cuda()),
        call(reference, *exact, ids, teacher_logp),
    ]
    for a, b in zip(*outputs):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-4, atol=1e-4)
    if name == "topk":
        return
    for out in outputs:
        sum(o.sum() for o in out if o.requires_grad).backward()
    for a, b in zip(got, exact):
        assert a.grad.dtype == dtype
        error = (a.grad.cpu().double() - b.grad).norm() / b.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2.0**-7)


def test_more_than_2_to_the_31_elements():
    """14,200 x 151,936 in bfloat16: the last row begins after element 2^31."""
    rows, vocab = 14_200, 151_936
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    z[-1, -1] = 5.0
    ids = torch.full((rows, 1), vocab - 1, device="cuda")
    truth = 5.0 - z[-1].double().logsumexp(-1).item()
    logp, _, _, tail, stats, _ = OPS.gather_logp(z, ids, vocab, 1.0, False, True)
    assert abs(logp[-1].item() - truth) < 1e-5
    assert abs(tail[-1].exp().item() + logp[-1].exp().item() - 1) < 1e-5
    top = opd_ops.topk_logp(z, None, 32, token_ids=ids[:, 0])
    assert top.ids[-1].tolist() == [vocab - 1, *range(31)]
    assert top.ids[0].tolist() == list(range(32)) and top.token_logp[-1] == top.logp[-1, 0]
    value = OPS.full_kl(z, z, vocab, 1.0, 0, 0.5)[0]
    assert value.abs().max() < 1e-6
    weight = torch.zeros(rows, 1, device="cuda")
    weight[-1] = 1.0
    arguments = (z, ids, weight, stats, -weight[:, 0], None, None, None, vocab, 1.0)
    OPS.gather_logp_backward_out(*arguments, z)
    assert abs(z[-1, -1].item() - (1 - torch.tensor(truth).exp().item())) < 1e-2
    assert z[-1, 0].item() < 0 and (z[-2] == 0).all() and (z[0] == 0).all()


def test_two_streams():
    """Each op runs in the current stream: its input is written there, late."""
    z = torch.randn(512, 50_257, device="cuda")
    ids = torch.zeros(512, dtype=torch.int64, device="cuda")
    expected = opd_ops.token_logp(z, None, ids).logp
    torch.cuda.synchronize()
    inputs = [torch.full_like(z, float("nan")) for _ in range(2)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for stream, late in zip(streams, inputs):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            late.copy_(z)
            arguments = (late, ids[:, None], 50_257, 1.0, False, False)
            results.append(OPS.gather_logp(*arguments)[0][:, 0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_capture_in_a_graph():
    """The launchers neither wait for the device nor ask it anything."""
    z, ids = (
        torch.randn(64, 5000, device="cuda"),
        torch.zeros(64, 4, dtype=torch.int64, device="cuda"),
    )
    expected = OPS.gather_logp(z, ids, 5000, 1.0, False, True)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp = OPS.gather_logp(z, ids, 5000, 1.0, False, True)[0]
        top = OPS.topk_logp(z, 8, None, 5000, 1.0)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(logp, expected) and torch.equal(top, opd_ops.topk_logp(z, None, 8).ids)


def test_a_loss_does_not_wait_for_the_device():
    """Not for its ids either: they are looked at while the first product runs."""
    hidden = torch.randn(70, 64, device="cuda").bfloat16().requires_grad_()
    head = torch.randn(3001, 64, device="cuda").bfloat16().requires_grad_()
    ids, teacher_logp = torch.arange(70, device="cuda"), -torch.rand(70, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        arguments = (hidden, head, ids, policy_gradient, [teacher_logp])
        opd_ops.gated_kl(*arguments, workspace_mib=0.25).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all() and head.grad.isfinite().all()


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        z = torch.randn(8, 3000, device="cuda:1")
        ids = torch.zeros(8, dtype=torch.int64, device="cuda:1")
        logp = opd_ops.token_logp(z, None, ids).logp
        top = opd_ops.topk_logp(z, None, 5).ids
        assert torch.cuda.current_device() == 0 and logp.device == z.device
        assert torch.randn(1, device="cuda").device.index == 0
    torch.testing.assert_close(logp.cpu(), z.cpu().log_softmax(-1)[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(top.cpu(), opd_ops.topk_logp(z.cpu(), None, 5).ids)


def test_mixed_devices_are_refused():
    z, ids = torch.randn(2, 9, device="cuda"), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a tensor on cuda"):
        opd_ops.token_logp(z, None, ids[:, 0])
    with pytest.raises(RuntimeError, match="ids: expected a tensor on the device"):
        OPS.gather_logp(z, ids, 9, 1.0, False, False)
    with pytest.raises(RuntimeError, match="teacher_logits: expected a tensor on the device"):
        OPS.full_kl(z, z.cpu(), 9, 1.0, 0, 0.5)


def test_unknown_ids_give_nan_and_are_not_read():
    z, ids = torch.randn(2, 300, device="cuda"), torch.tensor([[5, 10**12], [300, -1]]).cuda()
    logp = OPS.gather_logp(z, ids, 300, 1.0, False, False)[0]
    torch.cuda.synchronize()
    assert logp.isnan().tolist() == [[False, True], [True, False]]
    with pytest.raises(IndexError):
        opd_ops.gather_logp(z, None, ids)


def test_a_loss_of_unknown_ids_raises_before_it_is_returned():
    """The GPU is waited for at the end; a function that stumbles over NaN is not the reason."""
    hidden, head = torch.randn(9, 64, device="cuda"), torch.randn(300, 64, device="cuda")
    ids, teacher_logp = torch.arange(9, device="cuda") + 292, torch.zeros(9, 1, device="cuda")

    def stumbles(logp):
        assert logp.isfinite().all()
        return -logp, {}

    for loss_of in (lambda logp: (-logp, {}), stumbles):
        with pytest.raises(IndexError, match=r"token_ids: .* got 292 to 300"):
            opd_ops.gated_kl(hidden, head, ids, loss_of, workspace_mib=1e-3)
    with pytest.raises(IndexError, match=r"support_ids: .* got 292 to 300"):
        opd_ops.support_kl(hidden, head, ids[:, None], teacher_logp, renormalise=False)


def test_what_the_kernels_do_not_take_runs_as_plain_pytorch():
    z = torch.randn(3, 3000, device="cuda")
    with pytest.warns(UserWarning, match="does not take float64"):
        ids = torch.zeros(3, dtype=torch.int64).cuda()
        assert opd_ops.token_logp(z.double(), None, ids).logp.dtype == torch.float64
    with pytest.warns(UserWarning, match="k = 2000"):
        found = opd_ops.topk_logp(z, None, 2000)
    assert torch.equal(found.ids.cpu(), reference.topk_logp(z.cpu(), None, 2000).ids)


def test_opcheck_and_compile():
    z = torch.randn(3, 11, device="cuda", requires_grad=True)
    ids = random_ids(0, 3, 4, 9).cuda()
    torch.library.opcheck(OPS.gather_logp.default, (z, ids, 9, 0.7, True, False))
    torch.library.opcheck(OPS.topk_logp.default, (z.detach(), 3, ids[:, 0], 9, 0.7))
    torch.library.opcheck(OPS.full_kl.default, (z.detach(), z.detach() + 1, 9, 0.7, 2, 0.3))

    def loss(z):
        full = opd_ops.full_kl(z, None, z.detach() * 2, None).loss
        return opd_ops.gather_logp(z, None, ids).logp.sum() + full

    (expected,) = torch.autograd.grad(loss(z), z)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("vocab", [1000, 1003])
def test_the_sampler_multiplies_into_float32(vocab):
    hidden, head = torch.randn(4, 256, device="cuda").bfloat16(), torch.randn(vocab, 256).cuda()
    want = hidden.double() @ head.bfloat16().double().T
    cache = models._TypedCache(torch.bfloat16)
    for kept in (head, head.bfloat16()):
        with torch.autocast("cuda", torch.bfloat16, enabled=kept is head):
            found = cache.to_logits(hidden, kept)
        assert found.dtype == torch.float32 and (found - want).abs().max() < 1e-3  # bfloat16: 0.2


def test_the_sampler_waits_for_the_device_every_8_tokens(tmp_path):
    """To look which rollouts have ended is to wait."""
    tinylm.save_model(tmp_path / "student", 0)
    flags = ["--student", f"{tmp_path}/student", "--device", "cuda", "--dtype", "float32"]
    args = opd.parse_args([*flags, "--max-completion-tokens", "32"])
    loaded, _ = tinylm.load(opd, args, student=args.student)
    looks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, given=(), named=None):
            looks.extend([op] if op is torch.ops.aten.nonzero.default else [])
            return op(*given, **(named or {}))

    prompts = [opd.Prompt((4, 5), "", "", "", {})] * 3
    with Watch():
        opd.sample(
            tinylm.endless(loaded)["student"], prompts, opd.uniforms(3, "rollouts", 0, args), args
        )
    assert 4 <= len(looks) <= 4 + 3  # of 32 tokens, and what comes before and after them


def test_no_rows_and_rows_of_weight_zero():
    empty = torch.empty(0, 9, device="cuda", requires_grad=True)
    ids = torch.empty(0, dtype=torch.int64, device="cuda")
    logp, lse, _ = opd_ops.token_logp(empty, None, ids)
    (logp.sum() + lse.sum()).backward()
    assert opd_ops.topk_logp(empty, None, 3).ids.shape == (0, 3) and empty.grad.shape == (0, 9)
    z = torch.randn(3, 500, device="cuda", requires_grad=True)
    with torch.no_grad():
        z[1] = float("nan")
    logp = opd_ops.token_logp(z, None, torch.tensor([1, 2, 3]).cuda()).logp
    logp.backward(torch.tensor([1.0, 0.0, 1.0]).cuda())
    assert (z.grad[1] == 0).all() and z.grad.isfinite().all()
