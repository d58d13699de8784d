"""Real faults on real runs: kill -9, signals, damaged checkpoints, full disks. Behind test-faults.

    python tests/faults/runner.py                            # the table on stdout; 1 if one is lost
    python tests/faults/runner.py --write docs/reproducing.md    # between its <!-- faults --> marks

A fault is survived if the run that goes on with `--resume` ends with the weights of a run that was
never disturbed, byte for byte, and with the same logged numbers. Each run is a process of its own,
forked from one that has imported torch, so that twenty of them do not take an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
import tinylm  # noqa: E402

from opd_run import files  # noqa: E402
from opd_run import run as runs  # noqa: E402
from opd_run import verifier as verifiers  # noqa: E402

METHODS = {
    "opd": ["--updates-per-rollout", "2"],
    "sg_opd": ["--teacher-share", "0.5", "--gate-control", "random"],
    "exopd": [],
    "topk_opd": ["--support-size", "8"],
    "tropd": [],
}
PHASES = {
    "generate": "generating",
    "student": "in an update",
    "checkpoint": "writing a checkpoint",
    "eval": "evaluating",
}
CLOCKS = ("_s", "_mib", "_per_s")
SECTIONS = ("signals", "ranks", "folders", "damage", "disk")


class Process:
    """A forked run of `METHOD.main(argv)`; where it is stands in a file, whatever ends it."""

    def __init__(self, method: str, argv: list[str], folder: Path, real: bool = False) -> None:
        """`real`: with the verifier's processes, too."""
        folder.mkdir(exist_ok=True)
        self.real = real
        self.status, self.errors = folder / "status", folder / "stderr"
        self.status.write_text("start")
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = self._child(method, argv)
            finally:
                os._exit(code)

    def _child(self, method: str, argv: list[str]) -> int:
        sys.stderr = self.errors.open("w")  # type: ignore[assignment]
        sys.stdout = (self.errors.parent / "stdout").open("w")  # type: ignore[assignment]
        module: Any = importlib.import_module(method)
        place, phase, save = os.open(self.status, os.O_WRONLY), runs.Run.phase, runs.Run.save

        def say(text: str) -> None:
            os.pwrite(place, text.ljust(24).encode(), 0)

        @contextlib.contextmanager
        def told_phase(run: runs.Run, name: str) -> Iterator[None]:
            with phase(run, name):
                say(name)
                yield
            say("between")

        def told_save(run: runs.Run, *args: Any) -> Path:
            say("checkpoint")
            path = save(run, *args)
            say("between")
            return path

        runs.Run.phase, runs.Run.save = told_phase, told_save  # type: ignore[method-assign]
        if not self.real:
            module.Verifier = _InProcess
        try:
            module.main(argv)
        except SystemExit as stop:
            sys.stderr.flush()
            return int(stop.code or 0)
        return 0

    def where(self) -> str:
        return self.status.read_text().strip()

    def ended(self, options: int = os.WNOHANG) -> int | None:
        """Exit code (negative: the signal), or None while it runs or is halted."""
        if self.code is None:
            pid, state = os.waitpid(self.pid, options)
            if pid and not os.WIFSTOPPED(state):
                self.code = os.waitstatus_to_exitcode(state)
        return self.code

    def wait(self) -> int:
        code = self.ended(0)
        assert code is not None
        return code

    def stop_in(self, phase: str, within_s: float, after: Path | None = None) -> bool:
        """Halt it (SIGSTOP) at a random moment of a phase, once `after` exists; False if it ended
        before."""
        while self.ended() is None:
            if self.where() != phase or (after is not None and not after.exists()):
                time.sleep(0.0005)
                continue
            time.sleep(random.uniform(0.0, within_s))
            os.kill(self.pid, signal.SIGSTOP)
            if self.ended(os.WUNTRACED) is None and self.where() == phase:
                return True
            os.kill(self.pid, signal.SIGCONT)
        return False

    def holds(self) -> tuple[int, int, int]:
        """Resident MiB, open files, and processes below it, at this moment."""
        place = Path(f"/proc/{self.pid}")
        memory = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        everyone = [each for each in Path("/proc").glob("[0-9]*/stat")]
        parents = {}
        for each in everyone:
            with contextlib.suppress(OSError):
                pid, _, rest = each.read_text().partition(" (")
                parents[int(pid)] = int(rest.rpartition(") ")[2].split()[1])
        below, old = {self.pid}, set[int]()
        while below != old:
            old = set(below)
            below |= {pid for pid, parent in parents.items() if parent in below}
        return memory, len([*(place / "fd").iterdir()]), len(below) - 1

    def error_line(self) -> str:
        lines = self.errors.read_text().splitlines()
        found = [line for line in lines if line.startswith(("error:", "usage:"))]
        traces = [line for line in lines if "Traceback" in line]
        return found[0] if len(found) == 1 and not traces else f"NOT ONE LINE: {lines[-5:]}"


class _InProcess:
    """Verdicts by a coin of the text; the child process of `runs.Verifier` has its own tests."""

    judges_cut = True

    def __init__(self, spec: str, timeout_s: float, num_workers: int) -> None:
        pass

    def ahead(self, items: list[verifiers.Item]) -> None:
        pass

    def __call__(self, items: list[verifiers.Item]) -> list[float]:
        return [1.0 if sum(text.encode()) % 2 else -1.0 for text, *_ in items]

    def try_out(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Faults:
    """All faults, one after the other, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, dict[str, list[int]]()
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        if (folder / "prompts.jsonl").is_file():
            return
        pid = os.fork()  # this process stays one that has imported torch and done nothing with it
        if pid == 0:
            with contextlib.redirect_stderr(io.StringIO()):
                tinylm.save_model(folder / "student", 0, eos_token_id=[1, 7, 8])
                tinylm.save_model(folder / "teacher", 1)
                tinylm.save_prompts(folder / "prompts.jsonl")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    def argv(self, method: str, run: str, *more: str) -> list[str]:
        argv = f"--student {self.folder}/student --teacher {self.folder}/teacher --device cpu"
        argv += f" --prompts {self.folder}/prompts.jsonl --test-prompts {self.folder}/prompts.jsonl"
        argv += f" --run-dir {self.folder / run} --max-completion-tokens 24 --prompts-per-step 6"
        argv += " --rollouts-per-prompt 4 --steps 6 --save-every 1 --eval-every 2 --eval-samples 2"
        argv += " --keep-checkpoints 0 --lr 1e-2 --lr-schedule cosine --warmup-steps 2"
        return [*argv.split(), *METHODS[method], *more]

    def start(self, method: str, run: str, *more: str) -> Process:
        return Process(method, self.argv(method, run, *more), self.folder / f"process_{run}")

    def whole(self, method: str) -> Path:
        """An undisturbed run, made once; it also says how long each phase takes."""
        run = self.folder / f"whole_{method}"
        if not run.is_dir():
            process = self.start(method, run.name)
            assert process.wait() == 0, process.errors.read_text()[-500:]
            rows = files.read_metrics(run)
            for name in PHASES:
                found = [row[f"{name}_s"] for row in rows if f"{name}_s" in row]
                self.seconds[name] = sum(found) / len(found) if found else 0.05
        return run

    def equal(self, method: str, run: str) -> str:
        """What is not as in the undisturbed run, or nothing."""
        one, two = self.whole(method), self.folder / run
        model = "checkpoints/step_6/model/model.safetensors"
        if not (two / model).is_file() or not filecmp.cmp(one / model, two / model, shallow=False):
            return "final weights differ"
        for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
            logs = [
                [
                    {k: v for k, v in json.loads(line).items() if not k.endswith(CLOCKS)}
                    for line in (each / name).read_text().splitlines()
                ]
                for each in (one, two)
            ]
            if logs[0] != logs[1]:
                return f"{name} differs"
        left = [path.name for path in (two / "checkpoints").glob(".writing*")]
        return f"{left} left behind" if left else ""

    def note(self, fault: str, problem: str) -> None:
        tried, survived = self.rows.setdefault(fault, [0, 0])
        self.rows[fault] = [tried + 1, survived + (not problem)]
        print(
            f"{'LOST' if problem else 'ok  '}  {fault}{': ' + problem if problem else ''}",
            flush=True,
        )
        if problem:
            self.problems.append(f"{fault}: {problem}")

    def resumed(self, method: str, run: str, *more: str) -> str:
        process = self.start(method, run, *more, "--resume")
        code = process.wait()
        return (
            f"resume ended with {code}: {process.error_line()}" if code else self.equal(method, run)
        )

    # -------------------------------------------------------------------------------- the faults
    def kills(self, method: str) -> None:
        """kill -9 in four phases of one run, which is resumed after each and goes on to the end."""
        self.whole(method)
        for phase in PHASES.values():  # rows of the table, in this order
            self.rows.setdefault(f"kill -9 while {phase}", [0, 0])
        run, phases = f"killed_{method}", list(PHASES)
        random.shuffle(phases)
        killed = []
        for number, phase in enumerate(phases, 1):
            saved = any((self.folder / run / "checkpoints").glob("step_*"))
            process = self.start(method, run, "--resume" if saved else "--overwrite")
            if not process.stop_in(
                phase, self.seconds[phase], self.folder / run / f"checkpoints/step_{number}"
            ):
                self.note(f"kill -9 while {PHASES[phase]}", "the run was over before")
                continue
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            killed.append(phase)
        problem = self.resumed(method, run)
        for phase in killed:
            self.note(f"kill -9 while {PHASES[phase]}", problem and f"{method}: {problem}")

    def signals(self) -> None:
        """In an update, after which the run stops; while generating, when it stops at once."""
        asked = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
        for number, phase in itertools.product(asked, ("student", "generate")):
            run, code = f"signal_{number.name}_{phase}", 128 + number
            process = self.start("opd", run)
            checkpoint = self.folder / run / "checkpoints/step_1"
            stopped = process.stop_in(phase, self.seconds[phase], checkpoint)
            os.kill(process.pid, number)
            os.kill(process.pid, signal.SIGCONT)
            found = process.wait()
            problem = "" if stopped and found == code else f"exit code {found}"
            if "--resume" not in process.error_line():
                problem = process.error_line()
            fault = f"{number.name} while {PHASES[phase]}: exit code {code}"
            self.note(fault, problem or self.resumed("opd", run))

    def folders(self) -> None:
        """`--resume RUN` and nothing else, from another folder; from a checkpoint that is not the
        newest; and rows that are missing."""
        self.copied("named")
        shutil.rmtree(self.folder / "named/checkpoints/step_6")
        path = str(self.folder / "named")
        code = self.wait_in(Path("/"), "opd", ["--resume", path])
        fault = "--resume RUN alone, in another working directory"
        self.note(fault, f"exit code {code}" if code else self.equal("opd", "named"))
        self.copied("earlier")
        path = str(self.folder / "earlier/checkpoints/step_3")
        code = self.wait_in(Path("/"), "opd", ["--resume", path])
        kept = len([*(self.folder / "earlier/checkpoints").glob("dropped_step_*")])
        problem = f"exit code {code}, {kept} later ones kept" if (code, kept) != (0, 3) else ""
        fault = "--resume RUN/checkpoints/step_3 of 6"
        self.note(fault, problem or self.equal("opd", "earlier"))
        for name in ("metrics.jsonl", "samples.jsonl"):
            run = f"gap_{name}"
            self.copied(run)
            shutil.rmtree(self.folder / run / "checkpoints/step_6")
            whole = (self.folder / run / name).read_text()
            lines = [line for line in whole.splitlines(True) if json.loads(line)["step"] != 3]
            (self.folder / run / name).write_text("".join(lines))
            self.resumed("opd", run)
            said = f"{name} has no rows of steps 3; the checkpoint is of step 5"
            good = said in (self.folder / f"process_{run}/stdout").read_text()
            (self.folder / run / name).write_text(whole)  # but for the row that was cut out
            problem = self.equal("opd", run) if good else "not said"
            self.note(f"rows of a step cut out of {name}: said", problem)

    def copied(self, run: str) -> None:
        """A copy of the undisturbed run, whose record speaks of the copy."""
        shutil.copytree(self.whole("opd"), self.folder / run)

    def wait_in(self, folder: Path, method: str, argv: list[str]) -> int:
        """The exit code of a command that runs in another working directory."""
        here = Path.cwd()
        os.chdir(folder)
        try:
            return Process(method, argv, self.folder / "process_elsewhere").wait()
        finally:
            os.chdir(here)

    def long(self) -> None:
        """A thousand small steps in a process with its verifier's: what it holds does not grow."""
        argv = self.argv("opd", "long", "--steps", "1000", "--save-every", "100")
        argv += "--keep-checkpoints 2 --eval-every 0 --prompts-per-step 2".split()
        argv += "--rollouts-per-prompt 2 --max-completion-tokens 8 --diagnostic-tokens 16".split()
        process, run = Process("opd", argv, self.folder / "process_long", real=True), "long"
        found: dict[int, tuple[int, int, int]] = {}
        path = self.folder / run / "metrics.jsonl"
        for step in (100, 500, 1000):
            while process.ended() is None:
                last = next(files.rows_from_end(path), (0, None))[1]
                if last is not None and last["step"] >= step:
                    break
                time.sleep(0.01)
            if process.ended() is None:
                found[step] = process.holds()
        code = process.wait()
        print("\n| step | resident memory, MiB | open files | child processes |")
        print("|---|---|---|---|")
        for step, (memory, open_files, children) in found.items():
            print(f"| {step} | {memory} | {open_files} | {children} |")
        grown = ""
        if code or len(found) < 3:
            grown = f"exit code {code}, seen at {list(found)}: {process.error_line()}"
        elif found[1000][0] > 1.03 * found[100][0] or found[1000][2] != found[100][2]:
            grown = f"{found}"
        elif found[1000][1] > found[100][1] + 2:  # a log or a checkpoint may be open just then
            grown = f"{found}"
        self.note("1,000 steps: memory, open files and children stay", grown)

    def damage(self) -> None:
        """The newest checkpoint is damaged in every way we know; the one before is taken."""

        def cut(path: Path) -> None:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        def flip(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            path.write_bytes(bytes(data))

        def replace(text: str) -> Callable[[Path], None]:
            return lambda path: path.write_text(text) and None

        ways: dict[str, tuple[str, Callable[[Path], object]]] = {
            "model file cut in half": ("model/model.safetensors", cut),
            "one bit of the model flipped": ("model/model.safetensors", flip),
            "trainer file cut in half": ("trainer/*.distcp", cut),
            "one bit of the trainer flipped": ("trainer/*.distcp", flip),
            "trainer metadata gone": ("trainer/.metadata", Path.unlink),
            "model folder gone": ("model", shutil.rmtree),
            "manifest cut in half": ("manifest.json", cut),
            "manifest gone": ("manifest.json", Path.unlink),
            "manifest empty": ("manifest.json", replace("{}")),
            "manifest of another kind": ("manifest.json", replace('{"model": 1, "trainer": []}')),
        }
        for number, (name, (pattern, harm)) in enumerate(ways.items()):
            run = f"damaged_{number}"
            shutil.copytree(self.whole("opd"), self.folder / run)
            newest = self.folder / run / "checkpoints/step_6"
            harm(next(newest.glob(pattern)))
            problem = self.resumed("opd", run)
            said = (self.folder / f"process_{run}/stdout").read_text()
            if "step_6 is damaged (" not in said or "resume: from" not in said:
                problem = problem or f"not said: {said[-200:]}"
            self.note(f"damaged checkpoint: {name}", problem)
        run = "damaged_all"
        shutil.copytree(self.whole("opd"), self.folder / run)
        for path in (self.folder / run).glob("checkpoints/step_*/model/model.safetensors"):
            cut(path)
        before = sorted(self.folder.joinpath(run).rglob("*"))
        process = self.start("opd", run, "--resume")
        code, line = process.wait(), process.error_line()
        fine = code == 1 and "no complete checkpoint" in line
        fine = fine and sorted(self.folder.joinpath(run).rglob("*")) == before
        self.note("all checkpoints damaged: one line, nothing deleted", "" if fine else line)
        for name in ("metrics.jsonl", "samples.jsonl"):
            run = f"cut_{name}"
            shutil.copytree(self.whole("opd"), self.folder / run)
            shutil.rmtree(self.folder / run / "checkpoints/step_6")
            path = self.folder / run / name
            path.write_bytes(path.read_bytes()[:-40])
            self.note(f"last line of {name} cut", self.resumed("opd", run))

    def two(self, run: str, *more: str) -> subprocess.Popen[str]:
        """The run on two processes, which torchrun starts."""
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        argv += ["--nproc-per-node", "2", f"{ROOT}/methods/opd.py", *more]
        place = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        if "--resume" not in more:
            argv += self.argv("opd", run)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, env=os.environ | place, text=True, **pipes)

    def resumed_two(self, run: str) -> str:
        """What is not as in an undisturbed run on two processes, after `--resume RUN`."""
        if not (self.folder / "whole_two").is_dir():
            process = self.two("whole_two")
            errors = process.communicate()[1]
            assert process.returncode == 0, errors[-500:]
        process = self.two(run, "--resume", str(self.folder / run))
        errors = process.communicate()[1]
        if process.returncode:
            return f"resume ended with {process.returncode}: {errors[-300:]}"
        model = "checkpoints/step_6/model/model.safetensors"
        one, two = self.folder / "whole_two" / model, self.folder / run / model
        return "" if filecmp.cmp(one, two, shallow=False) else "final weights differ"

    def ranks(self) -> None:
        """SIGTERM to torchrun, which hands it on to two processes: both save, once."""
        run = "two_stopped"
        process = self.two(run)
        while not (self.folder / run / "checkpoints/step_2").exists():
            assert process.poll() is None, process.communicate()[1][-500:]
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
        lines = [line for line in errors.splitlines() if line.startswith(("error:", "rank 1:"))]
        good = len(lines) == 1 and "stopped by SIGTERM; saved" in lines[0]
        done = (self.folder / run / "checkpoints/step_6").exists()
        problem = "" if good and not done else f"{lines}, {'at the end' if done else errors[-300:]}"
        self.note("SIGTERM to two processes", problem or self.resumed_two(run))

    def disk(self) -> None:
        """A full disk, in a file system of its own that only this process and its runs see."""
        me = [sys.executable, __file__, "--inside", str(self.folder)]
        done = subprocess.run(["unshare", "-rm", *me], capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("disk: ")]
        for line in found:
            fault, _, problem = line.removeprefix("disk: ").partition(" | ")
            self.note(fault, problem)
        if done.returncode or len(found) != 3:
            self.note("full disk (needs unshare -rm)", done.stderr.strip()[-300:] or "no answer")

    def inside(self) -> None:
        """Three full disks; runs in the namespace of `unshare -rm`."""
        found = (self.whole("opd") / "checkpoints/step_6").rglob("*")
        size = sum(path.stat().st_size for path in found if path.is_file())

        def mount(run: str, num_bytes: int) -> Path:
            path = self.folder / run
            path.mkdir()
            how = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
            subprocess.run(how, check=True)
            return path

        def roomy(run: str) -> None:
            how = ["mount", "-o", "remount,size=256m", str(self.folder / run)]
            subprocess.run(how, check=True)

        def judge(fault: str, run: str, process: Process) -> None:
            code, line = process.wait(), process.error_line()
            good = files.check_manifest(self.folder / run / "checkpoints/step_1") is None
            problem = "" if code == 1 and "No space left" in line else f"exit {code}: {line}"
            if not problem and not good:
                problem = "the checkpoint before it is gone"
            roomy(run)
            print(f"disk: {fault} | {problem or self.resumed('opd', run)}", flush=True)

        mount("disk_save", int(1.7 * size) + 200_000)
        judge("disk full while writing a checkpoint", "disk_save",
              self.start("opd", "disk_save", "--keep-checkpoints", "0"))  # fmt: skip
        mount("disk_two", int(1.7 * size) + 200_000)
        two = self.two("disk_two")
        errors = two.communicate()[1]
        lines = [line for line in errors.splitlines() if line.startswith(("error:", "rank 1:"))]
        good = lines and all("No space left" in line for line in lines) and two.returncode
        if files.check_manifest(self.folder / "disk_two/checkpoints/step_1") is not None:
            good = False
        roomy("disk_two")
        problem = "" if good else f"exit {two.returncode}: {lines or errors[-300:]}"
        fault = "disk full while two processes write a checkpoint"
        print(f"disk: {fault} | {problem or self.resumed_two('disk_two')}", flush=True)
        path = mount("disk_log", 64 * size)
        process = self.start("opd", "disk_log", "--keep-checkpoints", "0")
        while not files.read_metrics(path) or files.read_metrics(path)[-1]["step"] < 2:
            assert process.ended() is None, process.error_line()
            time.sleep(0.001)
        assert process.stop_in("generate", 0.0)
        with contextlib.suppress(OSError), (path / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        os.kill(process.pid, signal.SIGCONT)
        done = process.wait()
        (path / "ballast").unlink()
        line = process.error_line()
        fine = done == 1 and "No space left" in line and "step_" in line
        problem = "" if fine else f"exit {done}: {line}"
        print(
            f"disk: disk full while logging | {problem or self.resumed('opd', 'disk_log')}",
            flush=True,
        )

    def table(self) -> str:
        rows = [f"| {fault} | {tried} | {kept} |" for fault, (tried, kept) in self.rows.items()]
        total = [sum(counts[i] for counts in self.rows.values()) for i in (0, 1)]
        head = ["| fault | tried | survived |", "|---|---|---|"]
        return "\n".join([*head, *rows, f"| **all** | **{total[0]}** | **{total[1]}** |"])


def main() -> int:
    """Try all faults; 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="file with <!-- faults --> marks")
    parser.add_argument("--only", choices=["kills", *SECTIONS, "long"])
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for method in METHODS:
        importlib.import_module(method)
    if args.inside:
        Faults(args.inside).inside()
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        for method in METHODS if args.only in (None, "kills") else ():
            faults.kills(method)
        for name in (*SECTIONS, *["long"] * (args.only == "long")):
            if args.only in (None, name):
                faults.whole("opd")
                getattr(faults, name)()
    print(f"\n{faults.table()}\n\n{time.monotonic() - start:.0f} s")
    print(*faults.problems, sep="\n")
    if args.write and not faults.problems and args.only is None:
        text = args.write.read_text()
        head, rest = text.split("<!-- faults -->\n")
        args.write.write_text(
            f"{head}<!-- faults -->\n{faults.table()}\n<!-- /faults -->"
            + rest.split("<!-- /faults -->")[1]
        )
    return int(bool(faults.problems))


if __name__ == "__main__":
    sys.exit(main())
