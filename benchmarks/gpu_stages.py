"""What each stage of benchmarks/gpu.py does. `gpu.py` starts it, one process a stage.

    python benchmarks/gpu_stages.py head --device cpu --out DIR --common '{"commit": "..."}'

Sizes are small on a CPU, where this is a rehearsal; the code is the same. A stage appends its rows
as it goes and exits with 1 if something of ours failed; a baseline that fails is a row that says
so.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rows
from gpu import MARK, TABLES, path_of

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
PINNED_TOLERANCE = 1e-3  # of loss and gradient norm on another device, relative above 1
Call = Callable[[], Any]


class Task:
    """A stage that is running: its device, where its rows go, what has failed so far."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.device, self.out = name, args.device, args.out
        self.cuda = args.device == "cuda"
        self.common: dict[str, Any] = json.loads(args.common)
        self.end = time.monotonic() + args.limit_s
        self.failed: list[str] = []

    def row(self, table: str, **values: Any) -> None:
        """Append a row."""
        row = self.common | {"stage": self.name} | values
        rows.append(path_of(self.out, table), [row], TABLES[table])

    def check(self, name: str, ok: bool, value: Any, **more: Any) -> None:
        """A row of gpu_checks.csv, and a line."""
        self.row("checks", name=name, value=value, ok=ok, **more)
        if not ok:
            self.failed.append(name)
        note = " ".join(f"{more[key]}" for key in ("unit", "detail") if more.get(key))
        say(f"{'' if ok else 'FAILED '}{name}: {value} {note}")

    def seconds_left(self) -> float:
        """Before the stage is ended; a few are kept for what comes after."""
        return max(1.0, self.end - time.monotonic() - 3)


def say(line: str) -> None:
    """A line for the screen and the log."""
    print(MARK + line, flush=True)


def missing(task: Task, package: str, what: str) -> bool:
    """Whether a baseline has to be left out; says so."""
    if importlib.util.find_spec(package):
        return False
    say(f"left out, {package} is not there: {what}")
    return True


# ==== facts =======================================================================================


def facts(task: Task) -> None:
    """Card, driver, versions; what a copy and a product reach."""
    import torch

    import opd_ops

    if task.cuda and shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"
        ask = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        say(done.stdout.strip() or done.stderr.strip())
    print(opd_ops.info())
    versions = ["torch", "transformers", "triton", "trl", "liger-kernel", "datasets", "peft"]
    say(", ".join(f"{name} {rows.version(name) or 'not there'}" for name in versions))
    task.check("copy", True, f"{copy_rate(task) / 1e9:.1f}", unit="GB/s",
               detail="bytes read and written, random data")  # fmt: skip
    size = 8192 if task.cuda else 512
    for kind in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(size, size, device=task.device).to(kind) for _ in range(2))
        best = min(seconds_of(task, functools.partial(torch.mm, left, right), 10))
        task.check(f"product {str(kind).removeprefix('torch.')}", True,
                   f"{2 * size**3 / best / 1e12:.3f}", unit="TFLOP/s",
                   detail=f"{size} cubed, random data")  # fmt: skip


def seconds_of(task: Task, call: Call, repeats: int) -> list[float]:
    """Of each of some calls, after two that are not counted."""
    import bench_ops

    call(), call()
    found = []
    for _ in range(repeats):
        if task.cuda:
            found.append(bench_ops.seconds_on_cuda(call))
        else:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return found


def copy_rate(task: Task) -> float:
    """Bytes read and written in a second, by a copy of random data."""
    import torch

    source = torch.randn(2**29 if task.cuda else 2**22, device=task.device)
    target = torch.empty_like(source)
    seconds = statistics.median(seconds_of(task, lambda: target.copy_(source), 10))
    return 2 * source.numel() * source.element_size() / seconds


# ==== build =======================================================================================


def build(task: Task) -> None:
    """The extension, in place and for the target of the GPU; in a rehearsal for sm_90, and beside
    the one that is there, if there is one."""
    import opd_ops

    spec = importlib.util.spec_from_file_location("opd_setup", ROOT / "setup.py")
    assert spec and spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    target = "90"
    if task.cuda:
        import torch

        target = "".join(map(str, torch.cuda.get_device_capability()))
    nvcc = setup.find_nvcc()
    if nvcc is None:
        task.check("nvcc", not task.cuda, "not there", detail="no CUDA kernels are built")
    env = os.environ | {"OPD_OPS_CUDA": "1" if nvcc else "0", "OPD_OPS_CUDA_TARGETS": target}
    if shutil.which("nvcc"):
        env.pop("CUDA_HOME", None)  # the one on PATH
    command = [sys.executable, "setup.py", "build_ext"]
    package = ROOT
    if task.cuda or not opd_ops.info()["compiled"]:
        command += ["--inplace"]
    else:
        package = ROOT / "build/rehearsal"
        command += ["--build-lib", str(package), "--build-temp", str(ROOT / "build/rehearsal-temp")]
        (package / "opd_ops").mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "opd_ops").glob("*.py"):
            shutil.copy(path, package / "opd_ops")
    start = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip
    seconds = time.perf_counter() - start
    print(done.stdout)
    if done.returncode:
        reason = [line for line in done.stdout.splitlines() if "rror" in line or "opd_ops:" in line]
        task.check("compiled", False, f"exit {done.returncode}", detail=(reason or ["?"])[0][:200])
        return
    task.check("compiled", True, f"{seconds:.1f}", unit="s", detail=f"sm_{target}" if nvcc else "")
    look = "import json, opd_ops; print(opd_ops.__file__); print(json.dumps(opd_ops.info()))"
    paths = os.pathsep.join([str(package), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", look], env=env | {"PYTHONPATH": paths},
                          cwd=package, capture_output=True, text=True)  # fmt: skip
    print(done.stdout, done.stderr)
    ok, info = done.returncode == 0, {}
    if ok:
        place, text = done.stdout.splitlines()[-2:]
        info = json.loads(text)
        ok = place.startswith(str(package)) and bool(info["compiled"])
        ok = ok and info["cuda_targets"] == (f"sm_{target}" if nvcc else "")
    task.check("loaded", ok, info.get("cuda_targets", "not loaded"), expected=f"sm_{target}",
               detail=info.get("notice", done.stderr[-200:]))  # fmt: skip


# ==== correct =====================================================================================

SUMMARY = re.compile(r"(\d+) (passed|failed|error|errors|skipped|deselected)")


def find_sanitizer() -> str | None:
    """On the path, beside nvcc, or from a wheel."""
    places = [Path(path) / "compute-sanitizer" for path in os.get_exec_path()]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parent / "compute-sanitizer")
    places.append(Path("/usr/local/cuda/bin/compute-sanitizer"))
    places += [path for each in sys.path
               for path in Path(each).glob("nvidia/*/bin/compute-sanitizer")]  # fmt: skip
    return next((str(path) for path in places if os.access(path, os.X_OK)), None)


def correct(task: Task) -> None:
    """The tests marked gpu in parallel processes, beside them each kernel under memcheck."""
    python, more = [sys.executable], {"OPD_OPS_REQUIRE": "cpp", "HYPOTHESIS_PROFILE": "few"}
    quiet = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    jobs: dict[str, tuple[list[str], dict[str, str]]] = {}
    kernels = [str(ROOT / "tests/gpu/each_kernel.py"), "--device", task.device]
    if task.cuda:
        checker = find_sanitizer()
        if checker:
            memcheck = [checker, "--tool", "memcheck", "--error-exitcode", "9", *python, *kernels]
            jobs["memcheck of each kernel"] = memcheck, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        else:
            say("left out, compute-sanitizer is not there: memcheck of each kernel")
        jobs["each kernel"] = [*python, *kernels], {}
        parts = max(1, min(10, (os.cpu_count() or 1) - 3))
        for part in range(parts):
            words = [*quiet, "tests/gpu", "-m", "gpu", "--part", f"{part}/{parts}"]
            jobs[f"tests marked gpu, part {part + 1} of {parts}"] = [*python, *words], {}
    else:
        print("compute-sanitizer:", find_sanitizer() or "not there")
        jobs["each kernel"] = [*python, *kernels], {}
        jobs["tests marked gpu, collected"] = (
            [*python, *quiet, "tests/gpu", "-m", "gpu", "--collect-only", "--part", "0/1"],
            {},
        )
        emulated = [
            *quiet,
            "tests/ops/test_cuda_emulation.py",
            "-k",
            "test_kernels or every_source",
        ]
        jobs["CUDA kernels, emulated"] = [*python, *emulated], {}

    def execute(name: str) -> tuple[str, int | None, str]:
        command, environment = jobs[name]
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                       env=os.environ | more | environment)  # fmt: skip
            code: int | None
            try:
                left = task.seconds_left()
                code = process.wait(min(80.0, left) if task.cuda else left)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            out.seek(0)
            return name, code, out.read()

    with ThreadPoolExecutor(len(jobs) if task.cuda else 2) as pool:
        for future in [pool.submit(execute, name) for name in jobs]:
            name, code, output = future.result()
            print(f"---- {name}: exit {code}\n{output}", flush=True)
            lines = output.strip().splitlines() or [""]
            counts = {word: int(number) for number, word in SUMMARY.findall(lines[-1])}
            bad = [line for line in lines if line.startswith(("FAILED", "ERROR", "========= ERR"))]
            skipped = [line for line in lines if line.startswith("SKIPPED")]
            value = "cut" if code is None else counts.get("passed", lines[-1][:80])
            task.check(name, code == 0, value, unit="tests passed" if "passed" in counts else "",
                       expected="exit 0", detail="; ".join([*bad, *skipped])[:500])  # fmt: skip


# ==== train =======================================================================================


def train(task: Task) -> None:
    """Real runs of all methods, and one update of each on stored rollouts, all at once."""
    size = [
        "--prompts-per-step",
        "8",
        "--rollouts-per-prompt",
        "2",
        "--max-completion-tokens",
        "64",
    ]
    if not task.cuda:
        size = ["--prompts-per-step", "2", "--rollouts-per-prompt", "2"]
        size += ["--max-completion-tokens", "12", "--diagnostic-tokens", "16"]
    kinds = [(method, "float32") for method in METHODS] + [("opd", "bfloat16")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPD_OPS_REQUIRE": "cpp"}
    with tempfile.TemporaryDirectory() as folder:
        jobs: dict[str, list[str]] = {}
        for method, kind in kinds:
            name = f"{method} {kind}"
            jobs[name] = [
                f"methods/{method}.py", "--device", task.device, "--dtype", kind,
                "--teacher-dtype", kind, "--steps", "3", "--eval-every", "0", "--save-every", "0",
                *size, "--run-dir", f"{folder}/{name.replace(' ', '-')}",
            ]  # fmt: skip
        for group in [[method] for method in METHODS] if task.cuda else [list(METHODS)]:
            name = "stored rollouts " + " ".join(group)
            jobs[name] = [str(Path(__file__)), "pinned", "--device", task.device, "--only", *group]
        outputs = {name: Path(folder) / f"{i}.txt" for i, name in enumerate(jobs)}
        running = {}
        for name, command in jobs.items():
            with outputs[name].open("w") as out:
                running[name] = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env,
                                                 stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
        for name, process in running.items():
            try:
                code: int | None = process.wait(task.seconds_left())
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
            text = outputs[name].read_text()
            print(f"---- {name}: exit {code}\n{text}", flush=True)
            last = (text.strip().splitlines() or ["no output"])[-1]
            if code != 0:
                task.check(name, False, f"exit {code}", expected="exit 0", detail=last[:300])
            elif name.startswith("stored"):
                for method, found in json.loads(last).items():
                    compare_pinned(task, method, found)
            else:
                path = Path(folder) / name.replace(" ", "-") / "metrics.jsonl"
                steps = [json.loads(line) for line in path.read_text().splitlines()]
                losses = [step["loss"] for step in steps if "loss" in step]
                ok = len(losses) == 3 and all(map(math.isfinite, losses))
                task.check(name, ok, " ".join(f"{loss:.4f}" for loss in losses), unit="loss",
                           expected="3 finite losses")  # fmt: skip


def pinned(device: str, methods: list[str]) -> None:
    """Print loss and gradient norm of one update on the stored rollouts, as JSON."""
    sys.path.insert(0, str(ROOT / "tests/pinned"))
    import trajectory

    flags = [device if flag == "cpu" else flag for flag in trajectory.FLAGS]
    trajectory.FLAGS = [*flags, "--dtype", "float32", "--teacher-dtype", "float32"]
    trajectory.NUM_UPDATES = 1
    found = {}
    for method in methods:
        one = trajectory.trajectory(method)
        found[method] = {name: one[name][0] for name in ("loss", "grad_norm")}
    print(json.dumps(found))


def compare_pinned(task: Task, method: str, found: dict[str, float]) -> None:
    """Against what the CPU recorded."""
    recorded = json.loads((ROOT / f"tests/pinned/{method}.json").read_text())
    for name, value in found.items():
        want = recorded[name][0]
        difference = abs(value - want) / max(abs(want), 1.0)
        task.check(f"{method} {name} on stored rollouts", difference < PINNED_TOLERANCE,
                   f"{value:.7g}", expected=f"{want:.7g}",
                   detail=f"difference {difference:.1e}, relative above 1")  # fmt: skip


# ==== head and rows ===============================================================================


def time_case(task: Task, case: dict[str, Any], calls: dict[str, Call], repeats: int,
              floor_ms: float | None = None, bare: str | None = None,
              before: Call | None = None) -> None:  # fmt: skip
    """A row for each implementation, called in turn, on a GPU that `before` keeps busy first.

    `x_floor` is the median over `floor_ms`, to which the median of the implementation `bare` adds.
    """
    import bench_ops
    import torch

    failures: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            slow = repeat > 2 and min(seconds[name], default=0.0) > 0.1  # two tell enough
            if slow or name in failures:
                continue
            try:
                if repeat == 0:  # libraries, compilation, memory
                    call()
                    peaks[name] = bench_ops.peak_mib(call, task.device)
                else:
                    seconds[name] += seconds_of_one(task, call, before)
            except Exception as error:  # a baseline may fail as it likes; the others go on
                failures[name] = rows.failure(error)
            if name in failures:  # the exception is gone, and the tensors of its frames
                gc.collect()
                torch.cuda.empty_cache()
                if name.startswith("opd_ops"):
                    task.failed.append(f"{case['op']} {name}")
    if bare in failures:
        floor_ms = None
    elif bare is not None and floor_ms is not None:
        floor_ms += 1e3 * statistics.median(seconds[bare])
    for name, values in seconds.items():
        row = {**case, "implementation": name, "failed": failures.get(name, "")}
        shown = f"FAILED {row['failed']}"
        if name not in failures:
            median_ms = 1e3 * statistics.median(values)
            row |= {"best_ms": f"{1e3 * min(values):.4f}", "median_ms": f"{median_ms:.4f}"}
            for key, share in (("p20_ms", 0.2), ("p80_ms", 0.8)):
                row[key] = f"{1e3 * rows.quantile(values, share):.4f}"
            row["peak_mib"] = peaks[name]
            shown = f"{row['median_ms']} ms, {peaks[name] or '-'} MiB"
            if floor_ms is not None and name != bare:
                row["floor_ms"] = f"{floor_ms:.4f}"
                row["x_floor"] = f"{median_ms / floor_ms:.3f}"
                shown += f", {row['x_floor']} of the floor"
        task.row("ops", **row)
        width = f" D={case['width']}" if "width" in case else ""
        say(f"{case['op']} {case['direction']} {case['dtype']}{width}, {name}: {shown}")


def seconds_of_one(task: Task, call: Call, before: Call | None) -> list[float]:
    """As a list of one."""
    import bench_ops

    if task.cuda:
        return [bench_ops.seconds_on_cuda(call, before)]
    start = time.perf_counter()
    call()
    return [time.perf_counter() - start]


# The ops as this file calls them: the only lines that know their names and order of arguments.


def our_token_loss(hidden: Any, head: Any, ids: Any, valid: int) -> Any:
    """[], the loss of sampled tokens in three products: minus the sum of their log-probs."""
    import opd_ops

    return opd_ops.gated_kl(hidden, head, ids, lambda logp: (-logp, {}), valid_vocab=valid).loss


def our_token_logp(hidden: Any, head: Any, ids: Any, valid: int) -> Any:
    """[N], differentiable, in four products."""
    import opd_ops

    return opd_ops.token_logp(hidden, head, ids, valid_vocab=valid).logp


def our_jsd(hidden: Any, head: Any, teacher: tuple[Any, Any], valid: int) -> Any:
    """[], the Jensen-Shannon divergences from the teacher, summed."""
    import opd_ops

    law = {"divergence": "jsd", "beta": 0.5, "valid_vocab": valid}
    return opd_ops.full_kl(hidden, head, *teacher, **law).loss


def our_support_kl(hidden: Any, head: Any, ids: Any, teacher_logp: Any, valid: int) -> Any:
    """[], the reverse KL on K tokens, renormalised, summed."""
    import opd_ops

    return opd_ops.support_kl(hidden, head, ids, teacher_logp, valid_vocab=valid).loss


def head(task: Task) -> None:
    """Losses from hidden states, forward and backward. The floor is what has to be multiplied and
    moved: three products and 10 bytes a logit at the measured copy rate; a teacher's head is a
    fourth product, and 8 more bytes. As in a step, the GPU is busy when the loss is called; what
    it takes from an idle one is a row of its own."""
    import torch

    vocab, valid = 151_936, 151_669
    sizes = (8192, 1024), (8192, 2560), (8192, 4096), (16_384, 2560)  # rows, width
    if not task.cuda:
        vocab, valid, sizes = 2_048, 1_999, ((64, 32), (64, 48), (128, 48))
    kind = torch.bfloat16
    rate = copy_rate(task)
    no_liger = missing(task, "liger_kernel", "fused linear cross-entropy and JSD of Liger")
    if not task.cuda:
        no_liger = True  # its kernels are for a GPU
    source = torch.ones(2**29 if task.cuda else 2**12, device=task.device)
    target = torch.empty_like(source)

    def busy() -> None:
        """For 2 ms."""
        target.copy_(source), target.copy_(source)

    for n, width in sizes:
        case = {"direction": "forward+backward", "dtype": "bfloat16", "rows": n, "vocab": vocab,
                "valid_vocab": valid, "width": width}  # fmt: skip
        hidden = torch.randn(n, width, device=task.device).to(kind).requires_grad_()
        weight = (torch.randn(vocab, width, device=task.device) / width**0.5).to(kind)
        weight.requires_grad_()
        teacher = hidden.detach().flip(0), weight.detach().clone()
        ids = torch.randint(0, valid, (n,), device=task.device)
        for op, k, calls in head_cases(task, hidden, weight, teacher, ids, valid, no_liger):
            four = op == "full_kl jsd"
            bare = "four products" if four else "three products"
            step = {bare: products(hidden, weight, *(teacher if four else ()))}
            step |= {name: backward(hidden, weight, call) for name, call in calls.items()}
            moved = {"token_logp": 10, "full_kl jsd": 18}.get(op)  # bytes a logit
            traffic_ms = None if moved is None else 1e3 * moved * n * valid / rate
            this = case | {"op": op, "k": k}
            time_case(task, this, step, 5, traffic_ms, bare, busy)
            if op == "token_logp":
                idle = {f"{name}, idle": step[name] for name in (bare, "opd_ops")}
                time_case(task, this, idle, 5, traffic_ms, f"{bare}, idle")
            del step, calls
            if n > sizes[0][0]:  # several stacks: the first loss tells
                break
        del hidden, weight, teacher
        gc.collect()
        torch.cuda.empty_cache()


def products(hidden: Any, weight: Any, *teacher: Any) -> Call:
    """Logits, a teacher's too, and gradients of hidden states and head; nothing between them."""
    import torch

    left, right = hidden.detach(), weight.detach()
    logits = torch.empty(left.shape[0], right.shape[0], dtype=left.dtype, device=left.device)
    grads = torch.empty_like(left), torch.empty_like(right)

    def call() -> None:
        if teacher:
            torch.mm(teacher[0], teacher[1].t(), out=logits)
        torch.mm(left, right.t(), out=logits)
        torch.mm(logits, right, out=grads[0])
        torch.mm(logits.t(), left, out=grads[1])

    return call


def backward(hidden: Any, weight: Any, loss: Call) -> Call:
    """Forward and backward of a sum."""

    def call() -> None:
        loss().sum().backward()
        hidden.grad = weight.grad = None  # no part of what was there before the next call

    return call


def head_cases(task: Task, hidden: Any, weight: Any, teacher: Any, ids: Any, valid: int,
               no_liger: bool) -> Iterator[tuple[str, Any, dict[str, Call]]]:  # fmt: skip
    """(op, k, implementations).

    The others take all columns: padding counts, as is usual, and their products are aligned.
    """
    import bench_ops
    import torch
    import torch.nn.functional as F

    def logits(h: Any = hidden, w: Any = weight) -> Any:
        return F.linear(h, w)

    calls = {
        "opd_ops": lambda: our_token_loss(hidden, weight, ids, valid),
        "opd_ops token_logp": lambda: our_token_logp(hidden, weight, ids, valid),
        "torch": lambda: bench_ops.torch_token_logp(logits(), ids),
        "torch, valid columns": lambda: bench_ops.torch_token_logp(logits(w=weight[:valid]), ids),
    }
    if not no_liger:
        fused = bench_ops.liger("LigerFusedLinearCrossEntropyLoss")
        calls["Liger"] = lambda: fused(weight, hidden, ids)
    yield "token_logp", "", calls

    calls = {
        "opd_ops": lambda: our_jsd(hidden, weight, teacher, valid),
        "torch": lambda: bench_ops.torch_jsd(logits(), logits(*teacher)),
    }
    if not no_liger:
        jsd = bench_ops.liger("LigerFusedLinearJSD")
        calls["Liger"] = lambda: jsd(hidden, weight, *teacher, None)
    yield "full_kl jsd", "", calls

    support = torch.randint(0, valid, (ids.shape[0], 32), device=ids.device)
    teacher_logp = torch.randn(ids.shape[0], 32, device=ids.device).log_softmax(-1)
    calls = {
        "opd_ops": lambda: our_support_kl(hidden, weight, support, teacher_logp, valid),
        "torch": lambda: bench_ops.torch_support_kl(logits(), support, teacher_logp),
    }
    yield "support_kl", 32, calls


def rows_stage(task: Task) -> None:
    """Ops on logits, by the cases of bench_ops: plain first, then those with torch.compile."""
    import bench_ops
    import torch

    n, vocab = (8192, 151_936) if task.cuda else (32, 2_003)
    if task.cuda:
        missing(task, "liger_kernel", "cross-entropy of Liger")
    wanted = ("token_logp", "topk_logp", "gather_logp", "full_kl", "support_kl")
    passes = [(kind, wanted, False) for kind in (torch.bfloat16, torch.float32)]
    passes += [(torch.bfloat16, ("token_logp", "topk_logp"), True)]
    for kind, ops, compiled in passes:
        args = argparse.Namespace(device=task.device, ops=[], k=[32], width=0, logits=True,
                                  heads=False, compile=compiled, reference=False)  # fmt: skip
        memory: dict[str, Call] = {}
        for op, direction, k, _, floor, calls, z in bench_ops.cases(args, n, vocab, kind):
            if op == "memory":
                memory[direction] = next(iter(calls.values()))
                continue
            if op.partition(" ")[0] not in ops:
                continue
            floor_ms = None
            if floor is not None:
                speeds = {
                    name: statistics.median(seconds_of(task, call, 5))
                    for name, call in memory.items()
                }
                floor_ms = 1e3 * (floor[0] * speeds["read"] + floor[1] * speeds["read+write"])
            if op == "topk_logp":
                calls = calls | {"torch.topk alone": functools.partial(torch.topk, z, k)}
            case = {"op": op, "direction": direction, "rows": n, "vocab": vocab, "k": k or "",
                    "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
            time_case(task, case, calls, 5, floor_ms)
        del memory, calls, z
        gc.collect()
        torch.cuda.empty_cache()


# ==== step and sample =============================================================================


def case_of(task: Task, rollouts: int, completion: int) -> argparse.Namespace:
    """What bench_step has to know; weights are made at random, on the device."""
    vocab, columns = (151_669, 151_936) if task.cuda else (509, 512)
    limit_s = 45.0 if task.cuda else 300.0
    return argparse.Namespace(
        device=task.device, vocab=vocab, columns=columns, rollouts=rollouts, completion=completion,
        warm_up=0, rounds=1 if task.cuda else 2, ragged=False, made_on_device=True, go_on=True,
        checkpointing=True, limit_s=limit_s, memory_limit_gib=10.0, trees={},
    )  # fmt: skip


def step(task: Task) -> None:
    """Whole steps, ours and TRL's; the peak beside the estimate of --dry-run."""
    import bench_step

    case = case_of(task, *((256, 96) if task.cuda else (4, 8)))
    case.arms = [("opd.py", "sampled")]
    if not missing(task, "trl", "DistillationTrainer of TRL"):
        case.arms += [("DistillationTrainer", "reverse")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in bench_step.measure(folder, case):
            failed = row.get("failed")
            if row["implementation"] == "opd.py":
                row["estimated_mib"] = estimated_mib(folder, case)
                if failed:
                    task.failed.append(f"opd.py: {failed}")
            if not failed:
                row["tokens_per_s"] = f"{row['num_tokens'] / float(row['generate_s']):.1f}"
            task.row("steps", **row)
            say(f"{row['implementation']} {row['objective']}: " + (failed or (
                f"{row['total_s']} s a step (generate {row['generate_s']}, teacher "
                f"{row['teacher_s']}, student {row['student_s']}), peak {row['peak_mib']} MiB"
                f", estimated {row.get('estimated_mib', '-')}")))  # fmt: skip


def estimated_mib(folder: Path, case: argparse.Namespace) -> int:
    """What `methods/opd.py --dry-run` would print as the peak."""
    import bench_step
    import opd

    from opd_run import memory

    args = bench_step.our_args(folder, case, "sampled")
    found = memory.estimate(opd.model_paths(args), bench_step.PROMPT, args)
    return memory.peak(found) // 2**20


def sample(task: Task) -> None:
    """Tokens a second of the own sampler and of `generate`, medians of three turns."""
    import bench_sampler
    import bench_step
    import opd

    from opd_run import setup

    sizes = (64, 256) if task.cuda else (4, 8)
    case = case_of(task, max(sizes), 32 if task.cuda else 8)
    with tempfile.TemporaryDirectory() as name, bench_step.random_weights(task.device):
        bench_step.make_inputs(Path(name), case)
        args = bench_step.our_args(Path(name), case, "sampled")
        model, tokenizer = bench_step.load_student(args)
        every_prompt = setup.prompts_of(opd, args.prompts, tokenizer, model.facts, args)
    calls = {"opd.sample": bench_sampler.ours, "transformers.generate": bench_sampler.generate}
    for rollouts in sizes:
        prompts = every_prompt[:rollouts]
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(4):  # in turn; the first is not counted
            for who, call in calls.items():
                start = time.perf_counter()
                tokens = call(model, prompts, args)
                times[who].append(time.perf_counter() - start)  # the tokens were counted: it ended
        for who, (_, *counted) in times.items():
            seconds = rows.quantile(counted, 0.5)
            task.row("steps", implementation=who, vocab=case.vocab, completion=case.completion,
                     rollouts=rollouts, prompt=bench_step.PROMPT, dtype=args.dtype,
                     generate_s=f"{seconds:.4f}", num_tokens=tokens,
                     tokens_per_s=f"{tokens / seconds:.1f}")  # fmt: skip
            say(f"{who}, {rollouts} rows: {tokens / seconds:.0f} tokens/s "
                f"({tokens / max(counted):.0f} to {tokens / min(counted):.0f})")  # fmt: skip


# ==== command line ================================================================================


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--common", default="{}")
    parser.add_argument("--commit")
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    if args.stage == "environment":
        print(json.dumps(rows.environment(args.device, args.commit)))
        return
    if args.stage == "pinned":
        pinned(args.device, args.only)
        return
    task = Task(args.stage, args)
    stages: dict[str, Callable[[Task], None]] = {
        "facts": facts, "build": build, "correct": correct, "train": train, "head": head,
        "rows": rows_stage, "step": step, "sample": sample,
    }  # fmt: skip
    stages[args.stage](task)
    if task.failed:
        sys.exit(f"{len(task.failed)} failed: {'; '.join(task.failed)}"[:280])


if __name__ == "__main__":
    main()
