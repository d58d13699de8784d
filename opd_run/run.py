"""The run folder, checkpoints, signals, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException  # no Exception of Python's
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import opd_ops
from opd_run import files, ranks, retry
from opd_run.adapters import export
from opd_run.alarms import Alarms
from opd_run.compat import Facts
from opd_run.console import RunError, ServerLost, one_line, optional, printable, say
from opd_run.files import append_row, read_metrics, write_atomically
from opd_run.retry import OutOfMemory, is_out_of_memory


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as Python's own KeyboardInterrupt is SIGINT."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator for `main(argv)`: turns an error into one line on stderr and an exit code.

    Codes: 0 ok, 1 run failure, 2 usage, 130 after SIGINT, 143 after SIGTERM. `--debug` in `argv`
    shows the traceback of anything that is not a `RunError`; without it the line names the error.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> None:
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: it is
        try:
            with _signals():
                main(argv)
                ranks.end()
        except RunError as error:
            if debug:
                traceback.print_exc()
            kind = "usage" if error.code == 2 else "error"
            _leave("" if error.said else f"{kind}: {error}", error.code)
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
            _leave(f"error: stopped by {number.name} before the run had started", 128 + number)
        except (Exception, CheckpointException) as error:
            if getattr(error, "said", False):
                _leave("", 1)
            if ranks.lost(error):
                if debug:
                    traceback.print_exc()
                _leave(f"error: another process has ended or hangs: {one_line(error, 160)}", 1)
            if debug:
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            _leave(
                f"error: {type(error).__name__}: {one_line(_root(error))} "
                f"[{Path(where.filename).name}:{where.lineno}; --debug shows the traceback]",
                1,
            )

    return guarded


def _leave(line: str, code: int) -> None:
    """End with a line on stderr; one of several processes does not wait for what the others do."""
    if line and ranks.rank():
        line = f"rank {ranks.rank()}: {line}"
    if line:
        print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
    if ranks.world() > 1:
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code) from None


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops a start as Ctrl-C does; a `Run` takes both over; then all is as before."""
    if threading.current_thread() is not threading.main_thread():  # the caller handles them
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment() -> dict[str, Any]:
    """Versions, commit, hardware and op implementation: what a reader needs to repeat a run."""
    import numpy
    import transformers

    def git(*command: str) -> str:
        try:
            root = Path(__file__).resolve().parents[1]
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    cuda = torch.cuda.is_available()
    rows = ":!benchmarks/results"  # what a benchmark writes is no change of the code
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", rows)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": changed != "",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "num_devices": torch.cuda.device_count() if cuda else 0,
        "num_threads": torch.get_num_threads(),
        "opd_ops": opd_ops.info(),
    }


class Run:
    """The run folder: `args.json`, `metrics.jsonl`, `samples.jsonl`, `tokens.jsonl`,
    `checkpoints/`, the script.

    Args:
        args: the parsed flags; `run_dir`, `resume`, `overwrite`, `keep_checkpoints`, `report_to`,
            `stop_on_alarm` are used here.
        facts: what is known of all models, for `args.json`.
        script: the method file, copied into the folder: the file is the experiment.

    Raises:
        RunError: `check_folder` has an objection; another process runs in the folder; or `--resume`
            finds no complete checkpoint.
    """

    def __init__(self, args: argparse.Namespace, facts: Facts, script: str) -> None:
        self.path = Path(args.run_dir)
        self.keep, self.steps = args.keep_checkpoints, args.steps
        self.stop_signal = 0
        self.phases: dict[str, float] = {}
        self.checkpoints = self.path / "checkpoints"
        self.updates_per_rollout, self.max_bad_steps = args.updates_per_rollout, args.max_bad_steps
        self.stop_on_alarm, self.stop_alarm = args.stop_on_alarm, ""
        self._step, self._save = 0, self.newest_checkpoint
        self.resume_from = ranks.first(self._open, args, facts, script)
        retry.start()
        self.alarms = Alarms([])
        kind = args.report_to if ranks.rank() == 0 else "none"
        self._report = _reporter(kind, self.path, vars(args))
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles them
                signal.signal(number, self._on_signal)

    def _open(self, args: argparse.Namespace, facts: Facts, script: str) -> Path | None:
        """Make the folder ready; which checkpoint to go on from."""
        text = Path(script).read_text(encoding="utf-8")
        check_folder(args)
        with self._writing("the run folder"):
            self._hold()
        if args.overwrite and not args.resume:
            _remove_run(self.path, Path(script).name)
        resume_from = self.newest_checkpoint() if args.resume else None
        if args.resume and resume_from is None:
            raise RunError(f"--resume: no complete checkpoint in {self.checkpoints}")
        if resume_from:
            say(f"resume: from {resume_from}", *self._changed_flags(args))
        record: dict[str, Any] = {"args": vars(args), "facts": asdict(facts)}
        record |= {"environment": environment(), "argv": sys.argv}
        with self._writing("the run folder"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".writing-*"):
                shutil.rmtree(leftover)
            if resume_from:  # what the run was started with stays beside what goes on with it
                for name in (Path(script).name, "args.json"):
                    if (self.path / name).is_file():
                        kept = (self.path / name).read_text(encoding="utf-8")
                        write_atomically(self.path / f"before_{resume_from.name}_{name}", kept)
            write_atomically(self.path / Path(script).name, text)
            record_text = json.dumps(record, indent=1, default=str) + "\n"
            write_atomically(self.path / "args.json", record_text)
        return resume_from

    def _hold(self) -> None:
        """Lock the folder until the run ends: two of them in one folder would mix their rows."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(f"run folder {self.path}: another process runs in it", 2) from error
        except OSError as error:  # a file system without locks
            say(f"! run folder {self.path}: not locked ({error}); start no second run in it")

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stop_signal and ranks.world() == 1:  # torchrun itself hands signals on twice
            raise SystemExit(128 + number)
        self.stop_signal = number
        say(f"! {signal.Signals(number).name}: will save and stop after this step (again: at once)")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to `phases[name]`; synchronises the device.

        Where the server of a teacher is lost in it, the run is saved before it ends.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(name, error) from None
        except ServerLost as error:
            if ranks.world() > 1:  # to save, all ranks would have to know
                raise
            raise RunError(f"{error}; saved {self._save()}; go on with --resume") from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def _out_of_memory(self, phase: str, error: RuntimeError) -> RunError:
        """The error for memory that ran out in a phase; saves, where the weights are those of the
        last step boundary: not in the middle of updates."""
        flags = {
            "generate": "--sampler-batch-size or --max-completion-tokens",
            "eval": "--sampler-batch-size or --micro-batch-tokens",
            "diagnose": "--diagnostic-tokens",
            "student": "--micro-batch-tokens, or give --gradient-checkpointing",
        }.get(phase, "--micro-batch-tokens")
        whole = isinstance(error, OutOfMemory) and self.updates_per_rollout == 1
        alone = ranks.world() == 1  # other processes would not take part in a checkpoint
        safe = alone and (phase != "student" or whole)
        kept = "saved" if safe else "last good checkpoint:"
        path = self._save() if kept == "saved" else self.newest_checkpoint()
        return RunError(
            f"out of memory at step {self._step + 1}, phase {phase}: {one_line(error, 160)}; lower "
            f"{flags}; {kept} {path}; go on with --resume"
        )

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{what} could not be written: {one_line(error)}; last good checkpoint: "
                f"{self.newest_checkpoint()}"
            ) from error

    def log(
        self, step: int, metrics: dict[str, float], tokens: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Append one row to `metrics.jsonl` (NaN and infinity as strings) and to the live view,
        and `tokens` to `tokens.jsonl`.

        An alarm that goes off for the first time is said, and is a key of the row.
        """
        fired = self.alarms.check(metrics)
        metrics = metrics | {f"alarm/{alarm.name}": 1.0 for alarm, _ in fired}
        row = {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}
        with self._writing("metrics.jsonl"):
            append_row(self.path / "metrics.jsonl", {"step": step} | row)
        self.trace(step, tokens)
        self._report(step, metrics)
        for alarm, found in fired:
            say(f"! alarm {alarm.name} at step {step}: {found}. {alarm.cause} Try: {alarm.advice}")
            self.stop_alarm = alarm.name if self.stop_on_alarm else ""

    def log_step(
        self, step: int, metrics: dict[str, float], samples: Sequence[dict[str, Any]]
    ) -> None:
        """Log a training step, with the seconds of each phase, and print its line."""
        phases, self.phases = self.phases, {}
        metrics = metrics | {f"{name}_s": seconds for name, seconds in phases.items()}
        metrics["step_s"] = sum(seconds for name, seconds in phases.items() if name != "eval")
        metrics["tokens_per_s"] = metrics["num_trained_tokens"] / metrics["step_s"]
        metrics["peak_memory_mib"] = peak_memory_mib()
        say(step_line(step, self.steps, metrics))
        self.log(step, metrics)
        with self._writing("samples.jsonl"):
            for sample in samples:
                append_row(self.path / "samples.jsonl", {"step": step} | sample)

    def trace(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Append rollouts, token by token, to `tokens.jsonl`: what `tools/report.py` shows."""
        with self._writing("tokens.jsonl"):
            for row in rows:
                append_row(self.path / "tokens.jsonl", {"step": step} | row)

    def has(self, step: int, key: str) -> bool:
        """Whether `key` is logged at `step` (a resumed run does not evaluate twice)."""
        rows = ranks.first(read_metrics, self.path)
        return any(row["step"] == step and key in row for row in rows)

    # ------------------------------------------------------------------------------ checkpoints
    def save(self, step: int, write: Callable[..., None], *args: Any) -> Path:
        """Write a checkpoint so that it is complete or absent, then drop the oldest.

        `write(folder, *args)` fills a temporary folder; its files are hashed into `manifest.json`,
        synced and renamed to `step_<step>`. An error touches nothing that was saved before.
        """
        target, folder = self.checkpoints / f"step_{step}", self.checkpoints / f".writing-{step}"
        if ranks.first(files.is_complete, target):
            return target
        try:
            ranks.first(files.make_empty, folder)
            failed: Exception | None = None
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                    write(folder, *args)
            except (Exception, CheckpointException) as error:
                root = _root(error)
                failed = root if isinstance(root, Exception) else RuntimeError(one_line(root))
            ranks.together(failed)
            ranks.first(files.seal, folder, target)
        except Exception as error:
            if ranks.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            refused = RunError(
                f"checkpoint at step {step} could not be written: {one_line(error)}; "
                f"last good checkpoint: {self.newest_checkpoint()}"
            )
            refused.said = getattr(error, "said", False)
            raise refused from error
        # Only those up to this one count: later ones, from before a --resume, may be damaged.
        complete = [path for path in self._complete() if files.step_of(path) <= step]
        for old in complete[: -self.keep] if self.keep and ranks.rank() == 0 else []:
            doomed = old.with_name(f".writing-old-{old.name}")  # half deleted, it is no checkpoint
            old.rename(doomed)
            shutil.rmtree(doomed)
        return target

    def _complete(self) -> list[Path]:
        found = self.checkpoints.glob("step_*")
        return sorted((path for path in found if path.name[5:].isdigit()), key=files.step_of)

    def load(self, read: Callable[..., dict[str, int]], *args: Any) -> dict[str, int]:
        """`read(folder, *args)` of the checkpoint to resume from; drops what was logged after it.

        Raises:
            RunError: it is whole, but of another model or optimizer.
        """
        try:
            state = read(self.resume_from, *args)
        except (Exception, CheckpointException) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise RunError(
                f"checkpoint {self.resume_from} does not fit --student: {one_line(_root(error))}"
            ) from error
        self.rewind(state["step"])
        return state

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; damaged ones are named, skipped."""
        for path in reversed(self._complete()):
            problem = files.check_manifest(path)
            if problem is None:
                return path
            say(f"! checkpoint {path} is damaged ({problem}): skipped")
        return None

    def rewind(self, step: int) -> None:
        """Drop logged rows after `step`, which a resumed run will write again."""
        ranks.first(self._rewind, step)
        self.alarms = Alarms(ranks.first(read_metrics, self.path))

    def _rewind(self, step: int) -> None:
        for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "offending.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = []
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                    with contextlib.suppress(ValueError):  # cut short by a kill or a full disk
                        if json.loads(line)["step"] <= step:
                            kept.append(line + "\n")
                with self._writing(name):
                    write_atomically(path, "".join(kept))

    def stop_if_asked(self, step: int, save: Callable[[], Path]) -> None:
        """After SIGINT, SIGTERM or an alarm: save, then end with exit code 130, 143 or 1.

        Called at a step boundary; what runs out of memory before the next one saves by `save`, too.
        """
        self._step, self._save = step, save
        asked = ranks.gather((self.stop_signal, self.stop_alarm))
        number, alarm = max(number for number, _ in asked), asked[0][1]
        if number or alarm:
            reason = f"alarm {alarm} (--stop-on-alarm)"
            reason = signal.Signals(number).name if number else reason
            stopped = RunError(
                f"stopped by {reason}; saved {save()}; go on with --resume",
                128 + number if number else 1,
            )
            stopped.said = ranks.rank() != 0
            raise stopped

    def bad_step(
        self,
        step: int,
        metrics: dict[str, float],
        num_before: int,
        offending: Sequence[dict[str, Any]],
        save: Callable[[], Path],
    ) -> None:
        """Keep what made loss, gradient or a log-ratio not finite; with no more allowed, stop.

        `num_before` is the number of bad steps before this one. The update was skipped, so the
        weights are those of the step before, and are saved.
        """
        path, alone = self.path / "offending.jsonl", sum(row["offending"] for row in offending)
        with self._writing(path.name):
            for row in offending:
                append_row(path, {"step": step} | row)
        what = (
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
            f"{metrics['num_bad_log_ratios']:.0f} log-ratios not finite: "
        )
        where = f"{alone} of its {len(offending)} rollouts are not finite alone: {path}"
        if num_before < self.max_bad_steps:
            left = self.max_bad_steps - num_before - 1
            say(f"! {what}skipped; {left} more allowed (--max-bad-steps); {where}")
            return
        error = RunError(
            f"{what}more bad steps than --max-bad-steps; {where}; the weights before it, which are "
            f"good, are in {save()}"
        )
        error.said = ranks.rank() != 0
        raise error

    def finish(self) -> None:
        """Print the evaluations (before, after, teacher) and the folder."""
        ranks.first(self._finish)

    def _finish(self) -> None:
        self._lock.close()
        rows, student, teacher = read_metrics(self.path), "eval/student/", "eval/teacher/"
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith(student)):
            name = key.removeprefix(student)
            if "avg@" in name or name.split("/")[-1] == "reverse_kl":
                own = [row[key] for row in rows if key in row]
                of_teacher = [row[teacher + name] for row in rows if teacher + name in row]
                line = f"{name}: before {own[0]:.6}, after {own[-1]:.6}"
                line = line if len(own) > 1 else f"{name}: {own[0]:.6}"
                say(line + "".join(f", teacher {value:.6}" for value in of_teacher))
        say(f"run folder: {self.path}")

    def _changed_flags(self, args: argparse.Namespace) -> list[str]:
        try:
            old = json.loads((self.path / "args.json").read_text())["args"]
        except (OSError, ValueError, KeyError) as error:
            return [f"! {self.path / 'args.json'} cannot be read: {one_line(error, 80)}"]
        new = json.loads(json.dumps(vars(args), default=str))
        harmless = {"resume", "overwrite", "run_dir", "debug", "report_to"}
        return [
            f"! --{key.replace('_', '-')} was {old.get(key)!r} and is now {new[key]!r}"
            for key in new
            if key not in harmless and old.get(key) != new[key]
        ]


def check_folder(args: argparse.Namespace) -> None:
    """Refuse a run folder that is in use, or whose removal would take more than a run.

    Raises:
        RunError: the folder has a run and neither `--resume` nor `--overwrite` was given; it is no
            folder; `--overwrite` would delete an input of this run, or what is no run.
    """
    path = Path(args.run_dir)
    if not args.run_dir.strip():
        raise RunError("--run-dir: expected a folder, got an empty name", 2)
    in_the_way = next((each for each in (path, *path.parents) if each.exists()), path)
    if not in_the_way.is_dir():
        raise RunError(f"--run-dir {path}: expected a folder, {in_the_way} is a file", 2)
    if not os.access(in_the_way, os.W_OK):
        raise RunError(f"--run-dir {path}: {in_the_way} is not writable", 2)
    used = (path / "metrics.jsonl").exists() or any(path.glob("checkpoints/step_*"))
    if used and not (args.resume or args.overwrite):
        raise RunError(f"run folder {path} exists: give --resume or --overwrite", 2)
    if used and args.overwrite and not (path / "args.json").is_file():
        raise RunError(f"--overwrite: {path} is not a run folder (no args.json)", 2)
    for name, value in vars(args).items() if used and args.overwrite else ():
        for each in value if isinstance(value, list) else [value]:
            inside = isinstance(each, str) and name != "run_dir" and Path(each.split("=")[-1])
            if inside and inside.exists() and path.resolve() in inside.resolve().parents:
                raise RunError(
                    f"--overwrite would delete --{name.replace('_', '-')} {each}, which is in it",
                    2,
                )


def _remove_run(path: Path, script: str) -> None:
    """Delete what a run writes, and nothing else that is in its folder."""
    if (path / "args.json").is_file():
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(path / name, ignore_errors=True)
        own = (
            "metrics.jsonl",
            "samples.jsonl",
            "tokens.jsonl",
            "offending.jsonl",
            "curves.png",  # of runs before version 0.2
            script,
        )
        for file in (*(path / name for name in own), *path.glob("before_step_*")):
            file.unlink(missing_ok=True)


def peak_memory_mib() -> float:
    """Peak of the process: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ops_line(info: dict[str, Any], device: str) -> str:
    """Which implementation of the ops runs on `device`; loud where it is not the compiled one."""
    plain = sorted(name for name, kinds in info["ops"].items() if kinds[device] != "cpp")
    if len(plain) == len(info["ops"]):
        why = "the extension is not built: make install"
        if info["compiled"]:
            why = (
                "OPD_OPS_IMPL"
                if info["OPD_OPS_IMPL"] in ("plain", "reference")
                else "no kernel in this build"
            )
        return f"! ops: plain PyTorch for all of them on {device} ({why})"
    isa = f" ({info['isa']})" if device == "cpu" else ""
    rest = f"; plain PyTorch: {', '.join(plain)}" if plain else ""
    return f"ops: compiled for {device}{isa}{rest}"


def say_plan(args: argparse.Namespace) -> None:
    """Print the op implementation and the token budget; with `--dry-run` the resolved flags too.

    This is the last word before models are loaded, so a run folder in use is refused here, and so
    is a live view without its package: `--overwrite` has deleted nothing yet.
    """
    if not args.dry_run:
        check_folder(args)
        live_view(args.report_to)
    else:
        say(*(f"  --{key.replace('_', '-')} {value}" for key, value in vars(args).items()))
    rollouts = args.prompts_per_step * args.rollouts_per_prompt
    budget = rollouts * args.max_completion_tokens
    say(
        ops_line(opd_ops.info(), "cuda" if args.device.startswith("cuda") else "cpu"),
        f"budget: {args.steps} steps x {rollouts} rollouts x at most {args.max_completion_tokens} "
        f"tokens = {budget / 1e6:.3g} M tokens a step, {args.steps * budget / 1e6:.3g} M in all",
    )


def _root(error: BaseException) -> BaseException:
    """What an exception was raised from, at the bottom; `torch.distributed` wraps everything."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return _root(next(iter(failures.values()))[0])
    return _root(error.__cause__) if error.__cause__ else error


def live_view(kind: str) -> Any:
    """The package of `--report-to`; None for `none`."""
    return None if kind == "none" else optional(kind, f"--report-to {kind}")


def _reporter(
    kind: str, path: Path, config: dict[str, Any]
) -> Callable[[int, dict[str, float]], None]:
    module = live_view(kind)
    if kind == "none":
        return lambda step, metrics: None
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(path / "tensorboard"))

        def write(step: int, metrics: dict[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        return write
    place = {"dir": str(path)} if kind == "wandb" else {}  # trackio has one store for all runs
    session = module.init(project="opd", name=path.name, config=config, **place)
    return lambda step, metrics: session.log(metrics, step=step)


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One aligned line for a step."""
    width = len(str(steps))
    shown = (
        ("loss", "loss", "{:+.4f}"),
        ("log_ratio_mean", "log_ratio", "{:+.4f}"),
        ("verifier_pass_rate", "pass", "{:.3f}"),
        ("length_mean", "length", "{:6.1f}"),
        ("truncated_share", "cut", "{:.2f}"),
        ("grad_norm", "grad", "{:7.3f}"),
        ("generate_s", "generate", "{:5.1f}s"),
        ("teacher_s", "teacher", "{:5.1f}s"),
        ("student_s", "student", "{:5.1f}s"),
        ("tokens_per_s", "tok/s", "{:6.0f}"),
    )
    cells = [f"{name} {form.format(metrics[key])}" for key, name, form in shown if key in metrics]
    return f"step {step:>{width}}/{steps}  " + "  ".join(cells)


# ------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(
    folder: Path,
    student: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    state: dict[str, int],
) -> None:
    """`model/` for `from_pretrained`, `trainer/` to resume; data and samples need no state."""
    export(student, tokenizer, folder / "model")
    weights, moments = get_state_dict(student, optimizer)
    state_dict_saver.save(
        {"student": weights, "optimizer": moments} | state, checkpoint_id=folder / "trainer"
    )


def load_checkpoint(
    folder: Path, student: Any, optimizer: torch.optim.Optimizer, state: dict[str, int]
) -> dict[str, int]:
    """Put weights and moments back; return the counters that were saved with them."""
    weights, moments = get_state_dict(student, optimizer)
    saved: dict[str, Any] = {"student": weights, "optimizer": moments} | state
    state_dict_loader.load(saved, checkpoint_id=folder / "trainer")
    set_state_dict(
        student, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"]
    )
    return {key: saved[key] for key in state}
