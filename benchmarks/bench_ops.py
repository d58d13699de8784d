"""Time the ops of opd_ops beside plain PyTorch and torch.compile, and beside what memory allows.

    python benchmarks/bench_ops.py                      the goals: 256 x 151,936, float32
    python benchmarks/bench_ops.py --rows 64 1024 --vocab 32000 50257 --dtype bfloat16 --k 8 128
    python benchmarks/bench_ops.py --ops gated --no-heads
    make bench-short                                    the rows of the README's table
    python benchmarks/bench_ops.py --no-logits --ops gated_kl --dtype float32 autocast
    python benchmarks/bench_ops.py --allocator reuse    buffers recycled: fairest to the baselines
    python benchmarks/bench_ops.py --device cuda        8,192 x 151,936, bfloat16, width 4,096

All implementations of a case run in turn, `--repeats` times, in one process, together with two
measurements of the memory itself: a read (torch.sum over the same tensor) and a pass that reads
and writes in place (torch.neg_). `x_floor` is the best time over the time that the case's
unavoidable traffic takes at these speeds; `speedup` is over the first implementation of the case.
On a machine that does other work, wall-clock times of several threads measure its scheduler: there,
`--threads 1 --clock cpu` compares, and the load is recorded in each row. `peak_mib` is what a call
takes at most beyond what was there before it: inputs do not count, gradients do. On a CPU that is
the rise of the process' resident memory, on Linux. On a CUDA device, times are those of events in
the stream, and Liger-Kernel takes part if it is installed. Rows are appended to
benchmarks/results/ops.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rows as results
import torch
import torch.nn.functional as F
from rows import markdown, quantile
from torch import Tensor

import opd_ops
from opd_ops import reference

ROOT = Path(__file__).resolve().parents[1]
RESULTS = results.RESULTS / "ops.csv"
COLUMNS = [
    *("op", "implementation", "direction", "dtype", "rows", "vocab", "k", "width", "threads"),
    *(
        "allocator",
        "clock",
        "best_ms",
        "p20_ms",
        "median_ms",
        "p80_ms",
        "floor_ms",
        "x_floor",
        "speedup",
    ),
    *("gb_per_s", "load", "device", "isa", "torch", "cuda", "commit", "dirty", "date", "command"),
    *("peak_mib", "driver"),
]
ALLOCATORS = {  # environment of the process
    "default": {},
    "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
    "reuse": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1099511627776"},
    "return": results.RETURN,
}
GATE = {"extrapolation": 1.8, "interpolation": 1.0}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

Call = Callable[[], Any]


class Attach(torch.autograd.Function):
    """A tensor that takes part in a graph without being a leaf; its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def train(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Call:
    """Forward and backward of a sum, up to the gradient of the logits."""
    root = torch.zeros(1, requires_grad=True, device=logits.device)
    return lambda: loss(Attach.apply(logits, root)).sum().backward()


def torch_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.logsumexp(logits, -1)
    values, ids = torch.topk(logits, k)
    return ids, values.float() - lse[:, None], lse


def torch_gather_logp(logits: Tensor, ids: Tensor) -> list[Tensor]:
    return [F.log_softmax(logits.float(), -1).gather(1, ids)]


def torch_token_logp(logits: Tensor, ids: Tensor) -> Tensor:
    return torch_gather_logp(logits, ids[:, None])[0][:, 0]


def torch_support_kl(logits: Tensor, ids: Tensor, teacher_logp: Tensor) -> Tensor:
    """[N]: reverse KL on K tokens, the student's law scaled to sum to 1 there."""
    student = logits.gather(1, ids).float().log_softmax(-1)
    return (student.exp() * (student - teacher_logp)).sum(-1)


def torch_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: the Jensen-Shannon divergence of two laws, by its definition, in float32."""
    one, two = (z.float().log_softmax(-1) for z in (student, teacher))
    middle = torch.logaddexp(one, two) - math.log(2)
    return 0.5 * ((one.exp() * (one - middle)).sum(-1) + (two.exp() * (two - middle)).sum(-1))


def lowered(call: Call, device: str) -> Call:
    """The call under autocast, whose cache of cast weights is its own."""

    def run() -> Any:
        with torch.autocast(device, torch.bfloat16):
            return call()

    return run


def liger(name: str) -> Any:
    """A class of Liger-Kernel, made without arguments, or None where it is not installed."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers"), name)()
    except ImportError:
        return None


def others(args: argparse.Namespace, **named: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Baselines eager, and through torch.compile."""
    if not args.compile:
        return named
    return named | {f"compile({name})": torch.compile(call) for name, call in named.items()}


def cases(args: argparse.Namespace, rows: int, vocab: int, dtype: torch.dtype) -> Any:
    """(op, direction, k, width, floor as (reads, read-writes), implementations, logits)."""
    on = args.device
    generator = torch.Generator(on).manual_seed(0)
    z = (2 * torch.randn(rows, vocab, generator=generator, device=on)).to(dtype)
    if args.logits:
        yield from logits_cases(args, z, generator)
    if dtype == torch.float16 and on == "cpu":
        return  # its matrix products have no fast path there
    if args.heads:
        yield from linear_cases(args, z, generator)


def logits_cases(args: argparse.Namespace, z: Tensor, generator: Any) -> Any:
    """The memory itself, and the ops on logits."""
    scratch = z.clone()
    words = z.view(-1).view(torch.float32)  # flat: a row of odd length is no whole number of them
    yield "memory", "read", 0, 0, (1, 0), {"torch.sum": lambda: words.sum()}, z
    yield "memory", "read+write", 0, 0, (0, 1), {"torch.neg_": lambda: scratch.neg_()}, z
    yield from row_cases(args, z, scratch, generator)


def row_cases(args: argparse.Namespace, z: Tensor, scratch: Tensor, generator: Any) -> Any:
    """The ops on logits, the first output of each; with gradients also of a loss of it."""
    (rows, vocab), on = z.shape, args.device
    ids = torch.randint(0, vocab, (rows,), generator=generator, device=on)
    both = "forward+backward"

    def forward(ours: Call, plain: Callable[[Tensor], Any], slow: Call | None = None) -> Any:
        """Ours, eager and compiled PyTorch, and the specification where it is not one of them."""
        calls = {"opd_ops": ours}
        calls |= {n: lambda f=f: f(z) for n, f in others(args, torch=plain).items()}
        return calls | ({"plain": slow} if slow and args.reference else {})

    def pair(ours: Callable[[Tensor], Tensor], **plain: Callable[[Tensor], Tensor]) -> Any:
        """Forward and backward, up to the gradient of the logits."""
        named = {"opd_ops": ours} | others(args, **plain)
        return {name: train(f, z) for name, f in named.items()}

    for k in args.k:
        yield (
            "topk_logp",
            "forward",
            k,
            0,
            (1, 0),
            forward(
                lambda k=k: opd_ops.topk_logp(z, None, k),
                lambda z, k=k: torch_topk(z, k),
                lambda k=k: reference.topk_logp(z, None, k),
            ),
            z,
        )

    plain = functools.partial(torch_token_logp, ids=ids)
    yield (
        "token_logp",
        "forward",
        0,
        0,
        (1, 0),
        forward(
            lambda: opd_ops.token_logp(z, None, ids),
            plain,
            lambda: reference.token_logp(z, None, ids),
        ),
        z,
    )
    calls = pair(lambda z: opd_ops.token_logp(z, None, ids).logp, torch=plain)
    cross_entropy = liger("LigerCrossEntropyLoss") if on == "cuda" else None
    if cross_entropy is not None:  # it writes the gradient over the logits
        calls["Liger"] = train(lambda z: cross_entropy(z, ids), scratch)
    yield "token_logp", both, 0, 0, (1, 1), calls, z

    support_ids = torch.randint(0, vocab, (rows, max(args.k)), generator=generator, device=on)
    random_logp = -3 - torch.rand(rows, max(args.k), generator=generator, device=on)
    for k in args.k:
        support = support_ids[:, :k].contiguous()
        plain = functools.partial(torch_gather_logp, ids=support)
        yield (
            "gather_logp",
            "forward",
            k,
            0,
            (1, 0),
            forward(lambda i=support: opd_ops.gather_logp(z, None, i), plain),
            z,
        )
        yield (
            "gather_logp",
            both,
            k,
            0,
            (1, 1),
            pair(
                lambda z, i=support: opd_ops.gather_logp(z, None, i).logp,
                torch=lambda z, f=plain: f(z)[0],
            ),
            z,
        )

        logp = random_logp[:, :k].log_softmax(-1) - 0.1
        outside = (-torch.expm1(logp.logsumexp(-1))).log()
        bucket = {"renormalise": False, "tail": "bucket", "teacher_tail_logp": outside}
        for name, how, floor in (
            ("support_kl", {}, None),
            ("support_kl bucket", bucket, (1, 1)),
        ):
            given = functools.partial(support_loss, ids=support, logp=logp, how=how)
            yield (
                name,
                both,
                k,
                0,
                floor,
                pair(functools.partial(given, opd_ops), plain=functools.partial(given, reference)),
                z,
            )

    values = gate_values(rows, generator, on)
    yield (
        "gated_kl",
        both,
        0,
        0,
        (1, 1),
        pair(
            lambda z: opd_ops.gated_kl(z, None, ids, gate, values).loss,
            torch=lambda z: gate(torch_token_logp(z, ids), *values)[0],
        ),
        z,
    )

    teacher = z.clone()
    for divergence in ("reverse", "jsd"):
        how = {"divergence": divergence}
        yield (
            f"full_kl {divergence}",
            "forward",
            0,
            0,
            (2, 0),
            {
                "opd_ops": lambda how=how: opd_ops.full_kl(z, None, teacher, None, **how),
                "plain": lambda how=how: reference.full_kl(z, None, teacher, None, **how),
            },
            z,
        )
        yield (
            f"full_kl {divergence}",
            both,
            0,
            0,
            (3, 1),
            pair(
                lambda z, how=how: opd_ops.full_kl(z, None, teacher, None, **how).loss,
                plain=lambda z, how=how: reference.full_kl(z, None, teacher, None, **how).loss,
            ),
            z,
        )


def support_loss(module: Any, z: Tensor, ids: Tensor, logp: Tensor, how: Any) -> Tensor:
    """Of the ops or of their specification."""
    loss: Tensor = module.support_kl(z, None, ids, logp, **how).loss
    return loss


def gate(student_logp: Tensor, teacher_logp: Tensor, verdict: Tensor) -> Any:
    """Losses of tokens as sg_opd has them: (loss, what is logged)."""
    log_ratio = (student_logp - teacher_logp).detach()
    agrees = verdict * -log_ratio > 0
    weight = torch.where(agrees, GATE["extrapolation"], GATE["interpolation"])
    weight = torch.where(verdict == 0, 1.0, weight)
    return weight * log_ratio * student_logp, {}


def gate_values(rows: int, generator: Any, device: str) -> tuple[Tensor, Tensor]:
    """The teacher's log-probs and verdicts."""
    verdict = torch.randint(-1, 2, (rows,), generator=generator, device=device).float()
    return torch.full((rows,), -3.0, device=device), verdict


def linear_cases(args: argparse.Namespace, z: Tensor, generator: Any) -> Any:
    """The ops on hidden states and a head: rows with a width."""
    (rows, vocab), on, width = z.shape, args.device, args.width
    ids = torch.randint(0, vocab, (rows,), generator=generator, device=on)
    hidden = torch.randn(rows, width, generator=generator, device=on)
    hidden = hidden.to(z.dtype).requires_grad_()
    head = torch.randn(vocab, width, generator=generator, device=on) / width**0.5
    head = head.to(z.dtype).requires_grad_()
    frozen = hidden.detach().flip(0), head.detach().clone()
    both = "forward+backward"

    def step(loss: Callable[[], Tensor]) -> Call:
        """Forward and backward of a sum."""

        def run() -> None:
            loss().sum().backward()
            hidden.grad = head.grad = None  # no part of what was there before the next call

        return run

    for k in args.k:
        support = torch.randint(0, vocab, (rows, k), generator=generator, device=on)
        logp = -3 - torch.rand(rows, k, generator=generator, device=on)
        yield (
            "support_kl",
            both,
            k,
            width,
            None,
            {
                "opd_ops": step(
                    lambda i=support, t=logp: opd_ops.support_kl(hidden, head, i, t).loss
                ),
                "torch head + gather": step(
                    lambda i=support, t=logp: torch_support_kl(F.linear(hidden, head), i, t)
                ),
            },
            z,
        )
        yield (
            "gather_logp",
            both,
            k,
            width,
            None,
            {
                "opd_ops": step(lambda i=support: opd_ops.gather_logp(hidden, head, i).logp),
                "torch head + log_softmax": step(
                    lambda i=support: torch_gather_logp(F.linear(hidden, head), i)[0]
                ),
            },
            z,
        )
        yield (
            "topk_logp",
            "forward",
            k,
            width,
            None,
            {
                "opd_ops": lambda k=k: opd_ops.topk_logp(*frozen, k),
                "torch head + topk": lambda k=k: torch_topk(F.linear(*frozen), k),
                "the product alone": lambda: F.linear(*frozen),
            },
            z,
        )

    calls = {
        "opd_ops": lambda: opd_ops.token_logp(*frozen, ids),
        "torch head + log_softmax": lambda: torch_token_logp(F.linear(*frozen), ids),
        "the product alone": lambda: F.linear(*frozen),
    }
    yield "token_logp", "forward", 0, width, None, calls, z

    calls = {
        "opd_ops": step(lambda: opd_ops.token_logp(hidden, head, ids).logp),
        "torch head + log_softmax": step(lambda: torch_token_logp(F.linear(hidden, head), ids)),
        "the three products alone": step(lambda: F.linear(hidden, head)),
    }
    fused = liger("LigerFusedLinearCrossEntropyLoss") if on == "cuda" else None
    if fused is not None:
        calls["Liger"] = step(lambda: fused(head, hidden, ids))
    yield "token_logp", both, 0, width, None, calls, z

    values = gate_values(rows, generator, on)
    yield (
        "gated_kl",
        both,
        0,
        width,
        None,
        {
            "opd_ops": step(lambda: opd_ops.gated_kl(hidden, head, ids, gate, values).loss),
            "torch head + gate": step(
                lambda: gate(torch_token_logp(F.linear(hidden, head), ids), *values)[0]
            ),
        },
        z,
    )

    jsd = {"divergence": "jsd", "beta": 0.5}
    calls = {"opd_ops": step(lambda: opd_ops.full_kl(hidden, head, *frozen, **jsd).loss)}
    if on == "cpu":  # on CUDA at 8,192 rows it does not fit
        calls["torch heads + jsd"] = step(
            lambda: torch_jsd(F.linear(hidden, head), F.linear(*frozen))
        )
    fused_jsd = liger("LigerFusedLinearJSD") if on == "cuda" else None
    if fused_jsd is not None:
        calls["Liger"] = step(lambda: fused_jsd(hidden, head, *frozen, None))
    yield "full_kl jsd", both, 0, width, None, calls, z


def seconds_on_cuda(call: Call, before: Call | None = None) -> float:
    """Of the GPU; with work `before`, which it is given first, the host's start does not count."""
    if before is not None:
        before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(calls: dict[str, Call], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call, in turn."""
    clock = CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm-up, compilation
    for _ in range(args.repeats):
        for name, call in calls.items():
            if args.device == "cuda":
                seconds[name].append(seconds_on_cuda(call))
                continue
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def peak_mib(call: Call, device: str) -> str:
    """What a call takes at most beyond what was there; "" on a CPU without /proc (no Linux)."""
    if device != "cuda":
        if not Path("/proc/self/clear_refs").exists():
            return ""
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before, and kept, would not be counted
        results.restart_peak()
        before = results.resident("VmRSS")
        call()
        return f"{(results.resident('VmHWM') - before) / 2**20:.0f}"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 256, on CUDA 8192")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151_936])
    parser.add_argument("--dtype", nargs="+", help="default: float32, on CUDA bfloat16; autocast: "
                        "bfloat16 products over float32 hidden states and head")  # fmt: skip
    parser.add_argument("--k", type=int, nargs="+", default=[32])
    parser.add_argument("--width", type=int, help="hidden size; default: 1024, on CUDA 4096")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ops", nargs="+", default=[], help="only ops whose name starts so")
    parser.add_argument("--logits", action=argparse.BooleanOptionalAction, default=True,
                        help="the ops on logits, and the speed of the memory")  # fmt: skip
    parser.add_argument("--heads", action=argparse.BooleanOptionalAction, default=True,
                        help="the ops on hidden states and a head too")  # fmt: skip
    parser.add_argument("--allocator", choices=list(ALLOCATORS), default="default")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: one thread")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.rows = args.rows or [8192 if cuda else 256]
    args.dtype = args.dtype or ["bfloat16" if cuda else "float32"]
    args.width = args.width or (4096 if cuda else 1024)
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu counts one thread; it needs --threads 1")
    environment = ALLOCATORS[args.allocator]
    if any(os.environ.get(key) != value for key, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})

    info = opd_ops.info()
    if info["notice"]:
        print(info["notice"])
    common = results.environment(args.device) | {"allocator": args.allocator, "clock": args.clock}
    table = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype_name in args.dtype:
            autocast = dtype_name == "autocast"
            dtype = torch.float32 if autocast else getattr(torch, dtype_name)
            for rows in args.rows:
                for vocab in args.vocab:
                    table += bench(args, common, threads, dtype_name, dtype, rows, vocab)
    if args.save:
        results.append(RESULTS, table, COLUMNS)
        print(f"{len(table)} rows appended to {RESULTS.relative_to(ROOT)}")


def bench(
    args: argparse.Namespace,
    common: dict[str, Any],
    threads: int,
    dtype_name: str,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
) -> list[dict[str, Any]]:
    print(f"\n{rows} x {vocab} {dtype_name}, {threads} threads, allocator {common['allocator']}")
    table, memory = [], {}
    for op, direction, k, width, floor, calls, z in cases(args, rows, vocab, dtype):
        if op != "memory" and args.ops and not op.startswith(tuple(args.ops)):
            continue
        if dtype_name == "autocast":
            calls = {name: lowered(call, args.device) for name, call in calls.items()}
        if op == "memory":
            seconds = measure(calls, args)
            memory[direction] = next(iter(calls.values()))
        else:  # the memory is measured again, in turn with the case
            probes = {f"memory {name}": call for name, call in memory.items()} if floor else {}
            seconds = measure({**calls, **probes}, args)
        best = {name: min(values) for name, values in seconds.items()}
        floor_s = None
        if floor is not None and op != "memory":
            floor_s = floor[0] * best["memory read"] + floor[1] * best["memory read+write"]
        ours = best[next(iter(calls))]
        size = z.numel() * z.element_size()
        for name in calls:
            streams = floor[0] + 2 * floor[1] if floor else 0
            row = {
                **common,
                "op": op,
                "implementation": name,
                "direction": direction,
                "dtype": dtype_name,
                "rows": rows,
                "vocab": vocab,
                "k": k or "",
                "width": width or "",
                "threads": threads,
                "best_ms": f"{1e3 * best[name]:.3f}",
                "floor_ms": "" if floor_s is None else f"{1e3 * floor_s:.3f}",
                "x_floor": "" if floor_s is None else f"{best[name] / floor_s:.2f}",
                "speedup": f"{best[name] / ours:.2f}",
                "gb_per_s": f"{streams * size / best[name] / 1e9:.1f}" if streams else "",
                "load": f"{os.getloadavg()[0]:.1f}",
                "peak_mib": peak_mib(calls[name], args.device),
            }
            for q in (20, 50, 80):
                key = "median_ms" if q == 50 else f"p{q}_ms"
                row[key] = f"{1e3 * quantile(seconds[name], q / 100):.3f}"
            table.append(row)
            print(
                f"{op:18s} {direction:17s} k={k or '-':<4} {name:28s} best {row['best_ms']:>9} ms "
                f"median {row['median_ms']:>9} ms  x floor {row['x_floor'] or '-':>6} "
                f" ours x {row['speedup']}  peak {row['peak_mib'] or '-'} MiB",
                flush=True,
            )
    return table


# ==== Tables of docs/benchmarks.md ================================================================

BOTH, PLACE = "forward+backward", "opd_ops in place"
SHOWN = {  # op, direction, K, our implementation: what it is called
    ("token_logp", "forward", "", "opd_ops"): "`token_logp`, forward",
    ("token_logp", BOTH, "", PLACE): "`token_logp` in place, both",
    ("topk_logp", "forward", "32", "opd_ops"): "`topk_logp`",
    ("gather_logp", "forward", "32", "opd_ops"): "`gather_logp`, forward",
    ("gather_logp", BOTH, "32", PLACE): "`gather_logp` in place, both",
    ("support_kl", BOTH, "32", PLACE): "`support_kl` in place, both",
    ("support_kl bucket", BOTH, "32", PLACE): '`support_kl`, `tail="bucket"`, in place, both',
    ("gated_kl", BOTH, "", PLACE): "`gated_kl` in place, both",
    ("full_kl reverse", "forward", "", "opd_ops"): "`full_kl` reverse, forward",
    ("full_kl reverse", BOTH, "", PLACE): "`full_kl` reverse in place, both",
    ("full_kl jsd", "forward", "", "opd_ops"): "`full_kl` jsd, forward",
    ("full_kl jsd", BOTH, "", PLACE): "`full_kl` jsd in place, both",
    ("linear_support_kl", BOTH, "32", "opd_ops buffer"): "`linear_support_kl`, buffer",
    ("linear_support_kl", BOTH, "32", "opd_ops rows"): "`linear_support_kl`, rows",
    ("linear_support_kl", BOTH, "32", "opd_ops dense"): "`linear_support_kl`, dense",
    ("linear_gather_logits", BOTH, "32", "opd_ops buffer"): "`linear_gather_logits`, buffer",
    ("linear_gather_logits", BOTH, "32", "opd_ops rows"): "`linear_gather_logits`, rows",
    ("linear_gather_logits", BOTH, "32", "opd_ops dense"): "`linear_gather_logits`, dense",
    ("linear_gather_logp", BOTH, "32", "opd_ops"): "`linear_gather_logp`, both",
    ("linear_topk_logp", "forward", "32", "opd_ops"): "`linear_topk_logp`",
    ("linear_token_logp", BOTH, "", "opd_ops"): "`linear_token_logp`, both",
    ("linear_gated_kl", BOTH, "", "opd_ops"): "`linear_gated_kl`, both",
    ("linear_full_kl jsd", BOTH, "", "opd_ops"): "`linear_full_kl` jsd, both",
}
EAGER = (
    *("torch", "torch head + gather", "torch head + log_softmax", "torch head + topk"),
    *("torch head + gate", "torch heads + jsd", "torch heads + full_kl", "reference"),
)


def loss_table(rows: list[dict[str, str]]) -> str:
    """`gated_kl` beside plain PyTorch: medians, spread, memory beyond inputs and gradients."""
    case = {"op": "gated_kl", "direction": BOTH, "vocab": "151936", "width": "1024"}
    case |= {"threads": "2", "clock": "wall", "cuda": ""}
    rows = [row for row in rows if all(row[key] == value for key, value in case.items())]
    by_allocator = results.newest(rows, ["allocator", "rows", "dtype", "implementation"])
    found = {key[1:]: row for key, row in by_allocator.items() if key[0] == "default"}
    lines = []
    for dtype, shown, size in (("float32", "float32", 4), ("autocast", "bfloat16 over float32", 4),
                               ("bfloat16", "bfloat16", 2)):  # fmt: skip
        for n in ("256", "2048"):
            gradients = (int(n) + 151_936) * 1024 * size / 2**20
            pair = [found.get((n, dtype, name)) for name in ("opd_ops", "torch head + gate")]
            cells = [results.NOT_MEASURED] * 6
            returned = by_allocator.get(("return", n, dtype, "opd_ops"))
            if returned is not None:
                cells[5] = f"{float(returned['peak_mib']) - gradients:,.0f} MiB"
            if pair[0] is not None and pair[1] is not None:
                for at, row in enumerate(pair):
                    low, mid, high = (float(row[f"{q}_ms"]) / 1e3 for q in ("p20", "median", "p80"))
                    cells[at] = f"{mid:.3g} s [{low:.3g}, {high:.3g}]"
                    if row["peak_mib"]:
                        cells[3 + at] = f"{float(row['peak_mib']) - gradients:,.0f} MiB"
                speed = float(pair[1]["median_ms"]) / float(pair[0]["median_ms"])
                cells[2] = f"{speed:.3g}x"
            lines.append([f"{int(n):,}", shown, *cells])
    titles = ["N", "type", "`gated_kl`", "plain PyTorch", "its time over ours"]
    return markdown([*titles, "memory", "plain PyTorch", "ours, freed memory returned"], lines)


def grid_tables() -> dict[str, str]:
    """Markdown of wall-clock rows, by the name of its place in docs/benchmarks.md.

    The grid is the newest of version 0.1; an op with a head has another name there.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    keys = "op", "direction", "k", "implementation", "dtype", "rows", "vocab", "threads"
    for row in results.read(RESULTS):
        if row["width"] and not row["op"].startswith("linear_"):
            continue
        key = (*(row[key] for key in keys), row["allocator"])
        less = "--no-compile" in row["command"] and key in found  # has fewer baselines
        if row["clock"] == "wall" and not row["cuda"] and not less:
            found[key] = row

    def cell(which: tuple[str, ...], place: tuple[str, ...]) -> str:
        """Milliseconds, x floor, and how many times slower eager torch and torch.compile are."""
        op, direction, k, _ = which
        own = found.get((*which, *place))
        if own is None:
            return "-"
        slower = {}
        for name in EAGER:
            for short, full in (("eager", name), ("compile", f"compile({name})")):
                row = found.get((op, direction, k, full, *place))
                if row is not None and short not in slower and row["command"] == own["command"]:
                    slower[short] = f"{float(row['best_ms']) / float(own['best_ms']):.3g}x"
        floor = [f"{own['x_floor']} of floor"] if own["x_floor"] else []
        return ", ".join([f"{float(own['best_ms']):.3g} ms", *floor, *slower.values()])

    def table(names: list[str], title: str, line: Callable[[Any], list[str]], of: list[Any]) -> str:
        return markdown([title, *names], map(line, of))

    big = ("float32", "256", "151936", "2")
    vocabularies = ["32000", "32003", "50257", "128256", "151936"]
    sizes = [
        (key, dtype, rows)
        for key in SHOWN
        if "linear" not in key[0] and "full" not in key[0]
        for dtype in ("float32", "bfloat16", "float16")
        for rows in ("64", "256", "1024")
        if rows == "256" or key[0] in ("token_logp", "topk_logp")
    ]
    sizes += [(key, dtype, "256") for key in SHOWN if "linear" in key[0] or "full" in key[0]
              for dtype in ("float32", "bfloat16")]  # fmt: skip
    return {
        "ops loss": loss_table(list(results.read(RESULTS))),
        "ops allocators": table(
            ["fresh pages (default)", "recycled buffers", "huge pages", "one thread, fresh pages"],
            "op",
            lambda key: [
                SHOWN[key], *(cell(key, (*big, name)) for name in ("default", "reuse", "thp")),
                cell(key, (*big[:3], "1", "default")),
            ],
            list(SHOWN),
        ),
        "ops sizes": table(
            [f"V = {int(v):,}" for v in vocabularies], "op, dtype, N",
            lambda of: [
                f"{SHOWN[of[0]]}, {of[1]}, {of[2]}",
                *(cell(of[0], (of[1], of[2], v, "2", "default")) for v in vocabularies),
            ],
            sizes,
        ),
        "ops dtypes": table(
            ["float32, 2 threads", "bfloat16, 2 threads", "float32, 1", "bfloat16, 1"], "op",
            lambda key: [SHOWN[key]] + [
                cell(key, (dtype, "256", "151936", threads, "default"))
                for threads in ("2", "1") for dtype in ("float32", "bfloat16")
            ],
            list(SHOWN),
        ),
        "ops k": table(
            [f"{dtype}, K = {k}" for dtype in ("float32", "bfloat16") for k in ("8", "32", "128")],
            "op",
            lambda key: [SHOWN[key]] + [
                cell((*key[:2], k, key[3]), (dtype, "256", "151936", "2", "default"))
                for dtype in ("float32", "bfloat16") for k in ("8", "32", "128")
            ],
            [key for key in SHOWN if key[2]],
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main()
