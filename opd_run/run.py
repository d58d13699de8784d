"""The run folder, checkpoints, signals, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import opd_ops
from opd_run import files, ranks, retry
from opd_run.adapters import export
from opd_run.alarms import Alarms
from opd_run.compat import Facts
from opd_run.console import RunError, ServerLost, one_line, optional, say, say_error
from opd_run.files import append_row, each_metrics, write_atomically
from opd_run.retry import OutOfMemory, is_out_of_memory

LOGS = (
    *("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "evaluations.jsonl", "offending.jsonl"),
)
UNDONE = ("generate", "teacher", "diagnose", "eval")
"""Phases whose work can be thrown away: the weights in them are those of the step boundary."""
_held: list[Any] = []  # open lock files of runs that have not ended


class _Stopped(KeyboardInterrupt):
    """A signal asks for an end, as Python's own KeyboardInterrupt does for SIGINT."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = signal.Signals(number)


def _stop_signals() -> list[int]:
    """Those that ask for an end: also of a connection that drops (unless `nohup` had it ignored),
    and what schedulers send before they kill."""
    asked = [signal.SIGHUP, signal.SIGUSR1]
    kept = [number for number in asked if signal.getsignal(number) != signal.SIG_IGN]
    return [signal.SIGINT, signal.SIGTERM, *kept]


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator for `main(argv)`: turns an error into one line on stderr and an exit code.

    Codes: 0 ok, 1 run failure, 2 usage, 128 + number after a signal (SIGINT 130, SIGTERM 143).
    `--debug` in `argv` shows the traceback; without it the line names the error.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> None:
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: it is
        _open_streams()
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
            number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
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
        finally:
            while _held:
                _held.pop().close()

    return guarded


def _open_streams() -> None:
    """Where stdin, stdout or stderr is closed, the next file would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _leave(line: str, code: int) -> None:
    """End with a line on stderr; one of several processes does not wait for what the others do."""
    if line and ranks.rank():
        line = f"rank {ranks.rank()}: {line}"
    if line:
        say_error(" ".join(line.split()))
    if ranks.world() > 1:
        os._exit(code)
    raise SystemExit(code) from None


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Signals stop a start as Ctrl-C does; a `Run` takes them over; then all is as before."""
    if threading.current_thread() is not threading.main_thread():  # the caller handles them
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in _stop_signals()}
    for number in before:
        if number != signal.SIGINT:
            signal.signal(number, stop)
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
        "num_processes": ranks.world(),
        "num_threads": torch.get_num_threads(),
        "opd_ops": opd_ops.info(),
    }


class Run:
    """The run folder: `args.json`, `metrics.jsonl`, `samples.jsonl`, `tokens.jsonl`,
    `evaluations.jsonl`, `checkpoints/`, the script.

    Args:
        args: the parsed flags; `run_dir`, `resume`, `overwrite`, `keep_checkpoints`, `report_to`,
            `stop_on_alarm` are used here.
        facts: what is known of all models, for `args.json`.
        script: the method file, copied into the folder: the file is the experiment.
        prompts: lists of prompts by what they are for; a later `--resume` says if they differ.

    Raises:
        RunError: `check_folder` has an objection; another process runs in the folder; or `--resume`
            finds no complete checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        facts: Facts,
        script: str,
        prompts: dict[str, Sequence[Any]] | None = None,
    ) -> None:
        self.path = Path(args.run_dir)
        self.keep, self.steps, self.eval_only = args.keep_checkpoints, args.steps, args.eval_only
        self.eval_samples, self.eval_teacher = args.eval_samples, args.eval_teacher
        self.stop_signal = 0
        self.phases: dict[str, float] = {}
        self.checkpoints = self.path / "checkpoints"
        self.updates_per_rollout, self.max_bad_steps = args.updates_per_rollout, args.max_bad_steps
        self.stop_on_alarm, self.stop_alarm = args.stop_on_alarm, ""
        self._step, self._save, self._undone = 0, self.newest_checkpoint, False
        self._record = {"args": vars(args), "facts": asdict(facts), "argv": sys.argv}
        self._record["resolved"] = getattr(args, "resolved", [])  # by this machine
        self._record["cwd"] = str(Path.cwd())
        self._asked = args.resume if isinstance(args.resume, str) else ""
        self._script, self._text = Path(script), Path(script).read_bytes()
        self._record["hashes"] = {
            "script": f"{self._script.name} {_hash(self._text)}",
            **_hashes_of_files(args),
            **{name: _hash_of_prompts(each) for name, each in (prompts or {}).items()},
        }
        self.resume_from = ranks.first(self._open, args)
        self._ours = {self.resume_from}  # the checkpoints that count; others are leftovers
        retry.start()
        self.alarms = Alarms([])
        kind = args.report_to if ranks.rank() == 0 else "none"
        self._report, self._num_unseen = _reporter(kind, self.path, vars(args)), 0
        for number in _stop_signals():
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles them
                signal.signal(number, self._on_signal)

    def _open(self, args: argparse.Namespace) -> Path | None:
        """Make the folder ready; which checkpoint to go on from."""
        check_folder(args)
        mine = self.path / self._script.name
        if mine.is_file() and not is_run(self.path) and mine.read_bytes() != self._text:
            raise RunError(f"run folder {self.path}: {mine.name} in it is another file", 2)
        with self._writing("the run folder"):
            self._hold()
            if args.overwrite and not args.resume:
                _remove_run(self.path, self._script.name)
        resume_from = self._checkpoint_to_resume() if args.resume else None
        self._record["environment"] = environment()
        with self._writing("the run folder"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".writing-*"):
                files.remove(leftover)
            files.probe(self.checkpoints)
        if resume_from:
            say(f"resume: from {resume_from}", *self._changed_flags(args))
        else:
            self._write_record(None)
        return resume_from

    def _checkpoint_to_resume(self) -> Path:
        if self._asked:
            asked = self.checkpoints / self._asked
            if problem := files.check_manifest(asked):
                raise RunError(f"--resume: checkpoint {asked} is damaged ({problem})")
            return asked
        newest = self.newest_checkpoint()
        if newest is None:
            raise RunError(f"--resume: no complete checkpoint in {self.checkpoints}")
        return newest

    def _set_aside(self, step: int) -> None:
        """Rename the checkpoints after an earlier one that was asked for: they are of another
        course of the run, and the next `--resume` would take the newest of them."""
        later = [path for path in self._complete() if files.step_of(path) > step]
        for path in later if self._asked else ():
            number, aside = 1, path.with_name(f"dropped_{path.name}")
            while aside.exists():
                number += 1
                aside = path.with_name(f"dropped_{path.name}.{number}")
            path.rename(aside)
            say(f"! {path} is later than the checkpoint to go on from: renamed to {aside.name}")

    def _write_record(self, resume_from: Path | None) -> None:
        """The script and `args.json`; what the run was started with stays beside them."""
        names, text = (self._script.name, "args.json"), self._text.decode()
        with self._writing("the run folder"):
            if resume_from:
                number, kept = 1, f"before_{resume_from.name}"
                while any((self.path / f"{kept}_{name}").exists() for name in names):
                    number, kept = number + 1, f"before_{resume_from.name}.{number + 1}"
                for name in names:
                    if (self.path / name).is_file():
                        old = (self.path / name).read_text(encoding="utf-8", errors="replace")
                        write_atomically(self.path / f"{kept}_{name}", old)
            write_atomically(self.path / names[0], text)
            record = json.dumps(self._record, indent=1, default=str) + "\n"
            write_atomically(self.path / names[1], record)

    def _hold(self) -> None:
        """Lock the folder until the run ends: two of them in one folder would mix their rows."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a")
        try:
            # Not lockf: that lock is lost as soon as this process closes any copy of the file.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held.append(self._lock)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(f"run folder {self.path}: another process runs in it", 2) from error
        except OSError as error:  # a file system without locks
            say(f"! run folder {self.path}: not locked ({error}); start no second run in it")

    def _on_signal(self, number: int, frame: Any) -> None:
        again, self.stop_signal = self.stop_signal, number
        if again and ranks.world() == 1:  # torchrun itself hands signals on twice
            raise SystemExit(128 + number)
        when = "now" if self._undone else "after this step"
        say(f"! {signal.Signals(number).name}: will save and stop {when} (again: at once)")
        if self._undone:
            raise _Stopped(number)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to `phases[name]`; synchronises the device.

        Outside of the update the weights are those of the step boundary. There, in one process, an
        error saves the run before it ends it, and a signal stops it in the middle: what the step
        had done so far is thrown away, and done again by `--resume`. Several processes look for a
        signal at the end of the block.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start, alone = time.perf_counter(), ranks.world() == 1
        try:
            try:
                self._undone = alone and name in UNDONE and not self.stop_signal
                yield
            finally:
                self._undone = False
        except _Stopped:
            self.stop_if_asked(self._step, self._save)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(name, error) from None
            self._save_before(error, name)
            raise
        except ServerLost as error:
            if not alone:  # to save, all ranks would have to know
                raise
            raise RunError(f"{error}; saved {self._save()}; go on with --resume") from error
        except SystemExit as error:
            if self.stop_signal:  # the second one: at once
                raise
            self._save_before(error, name)
            raise RunError(f"phase {name} ended in SystemExit: {error}") from error
        except Exception as error:
            self._save_before(error, name)
            raise
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
        if name in UNDONE:
            self.stop_if_asked(self._step, self._save)

    def _save_before(self, error: BaseException, phase: str) -> None:
        """Save what an error that is on its way out would lose; its own line comes after."""
        if phase in UNDONE and ranks.world() == 1:
            say(f"! {type(error).__name__} in phase {phase}: saved {self._save()}")

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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to `metrics.jsonl` (NaN and infinity as strings) and to the live view.

        An alarm that goes off for the first time is said, and is a key of the row.
        """
        fired = self.alarms.check(metrics)
        metrics = metrics | {f"alarm/{alarm.name}": 1.0 for alarm, _ in fired}
        row = {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}
        self._append("metrics.jsonl", step, [row])
        self._show(step, metrics)
        for alarm, found in fired:
            say(f"! alarm {alarm.name} at step {step}: {found}. {alarm.cause} Try: {alarm.advice}")
            self.stop_alarm = alarm.name if self.stop_on_alarm else ""

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        try:
            self._report(step, metrics)
        except Exception as error:  # of another package, or of its server: no reason to end a run
            self._num_unseen += 1
            if self._num_unseen <= 3:
                say(f"! live view: step {step} is not shown: {one_line(error, 160)}")

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
        self._append("samples.jsonl", step, samples)

    def evaluate(
        self,
        step: int,
        tests: dict[str, Any],
        evaluate: Callable[[str, Any], tuple[dict[str, float], dict[str, list[dict[str, Any]]]]],
    ) -> None:
        """Log `evaluate(name, test)` of each model and test set, where a resumed run has not yet.

        The models are the student, and with `--eval-teacher` at step 0 the teacher.

        It returns metrics, whose keys become `eval/MODEL/KEY`, of a test set with a name
        `eval/MODEL/TEST/KEY`, and rows of other log files, by the file's name.
        """
        names = ("teacher", "student") if step == 0 and self.eval_teacher else ("student",)
        for name, (each, test) in itertools.product(names, tests.items()):
            prefix = f"eval/{name}/{each}/" if each else f"eval/{name}/"
            if not self.has(step, f"{prefix}length_mean"):
                with self.phase("eval"):
                    metrics, logs = evaluate(name, test)
                self.log(step, {prefix + key: value for key, value in metrics.items()})
                for file, rows in logs.items():
                    whose = {"model": name, "test": each}
                    self._append(file, step, [whose | row for row in rows])
        if "teacher" in names:
            ranks.first(self._say_gap, step, tests)

    def _say_gap(self, step: int, tests: dict[str, Any]) -> None:
        """What the student can gain from the teacher, each under its own prompt."""
        found: dict[str, Any] = {}
        for _, row in files.rows_from_end(self.path / "metrics.jsonl"):
            found |= row if row and row["step"] == step else {}
        for name, test in tests.items():
            key = "/".join([*([name] if name else []), f"avg@{self.eval_samples}"])
            one, two = (found.get(f"eval/{who}/{key}") for who in ("teacher", "student"))
            if not test or not isinstance(one, float) or not isinstance(two, float):
                continue  # NaN is written as text
            gap, error = one - two, math.sqrt((one * (1 - one) + two * (1 - two)) / len(test))
            text = (
                f"gap: {name or 'test'}: teacher {one:.3f}, student {two:.3f}: {gap:+.3f} "
                f"(standard error at most {error:.3f})"
            )
            little = "; there is little to learn: gains are about proportional to the gap"
            say(f"! {text}{little}" if gap <= error else text)

    def trace(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Append rollouts, token by token, to `tokens.jsonl`: what `tools/report.py` shows."""
        self._append("tokens.jsonl", step, rows)

    def _append(self, name: str, step: int, rows: Sequence[dict[str, Any]]) -> None:
        with self._writing(name):
            for row in rows:
                append_row(self.path / name, {"step": step} | row)

    def has(self, step: int, key: str) -> bool:
        """Whether `key` is logged at `step` (a resumed run does not evaluate twice)."""
        return ranks.first(self._has, step, key)

    def _has(self, step: int, key: str) -> bool:
        for _, row in files.rows_from_end(self.path / "metrics.jsonl"):
            if row is not None and (row["step"] < step or key in row):
                return bool(row["step"] == step)
        return False

    # ------------------------------------------------------------------------------ checkpoints
    def save(self, step: int, write: Callable[..., None], *args: Any) -> Path:
        """Write a checkpoint so that it is complete or absent, then drop the oldest.

        `write(folder, *args)` fills a temporary folder; its files are hashed into `manifest.json`,
        synced and renamed to `step_<step>`. An error touches nothing that was saved before. A
        `step_<step>` that is there counts only if this run wrote it or goes on from it.
        """
        if self.eval_only:  # nothing has changed
            return self.path
        target, folder = self.checkpoints / f"step_{step}", self.checkpoints / f".writing-{step}"
        try:
            if ranks.first(files.is_complete, target, target in self._ours):
                return target
            ranks.first(self._sync_logs)
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
            why = one_line(error)
            if ranks.rank() == 0:
                if shutil.disk_usage(self.checkpoints).free < 2**20:  # writers say what they like
                    why = f"No space left on device: {why}"
                shutil.rmtree(folder, ignore_errors=True)
            refused = RunError(
                f"checkpoint at step {step} could not be written: {why}; "
                f"last good checkpoint: {self.newest_checkpoint()}"
            )
            refused.said = getattr(error, "said", False)
            raise refused from error
        self._ours.add(target)
        # Only those up to this one count: later ones, from before a --resume, may be damaged.
        complete = [path for path in self._complete() if files.step_of(path) <= step]
        for old in complete[: -self.keep] if self.keep and ranks.rank() == 0 else []:
            doomed = old.with_name(f".writing-old-{old.name}")  # half deleted, it is no checkpoint
            old.rename(doomed)
            files.drop(doomed)
        return target

    def _sync_logs(self) -> None:
        """A checkpoint is never on the disk without the rows that lead to it."""
        for name in LOGS:
            if (self.path / name).is_file():
                files.sync(self.path / name)

    def _complete(self) -> list[Path]:
        found = self.checkpoints.glob("step_*")
        return sorted((path for path in found if path.name[5:].isdigit()), key=files.step_of)

    def load(self, read: Callable[..., dict[str, int]], *args: Any) -> dict[str, int]:
        """`read(folder, *args)` of the checkpoint to resume from; drops what was logged after it.

        Raises:
            RunError: it is whole, but of another model or optimizer, or of another step.
        """
        try:
            state = read(self.resume_from, *args)
        except (Exception, CheckpointException) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise RunError(
                f"checkpoint {self.resume_from} does not fit --student: {one_line(_root(error))}"
            ) from error
        if self.resume_from and state["step"] != files.step_of(self.resume_from):
            raise RunError(f"checkpoint {self.resume_from} is of step {state['step']}: rename it")
        with self._writing("checkpoints"):
            ranks.first(self._set_aside, state["step"])
        self.rewind(state["step"])
        if state["step"] > self.steps:
            say(f"! the checkpoint is of step {state['step']}, beyond --steps {self.steps}")
        ranks.first(self._write_record, self.resume_from)
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
        self.alarms = Alarms(each_metrics(self.path) if ranks.rank() == 0 else [])

    def _rewind(self, step: int) -> None:
        # Two of the logs have rows of every step; those of evaluations do not count.
        every_step = {"metrics.jsonl": "loss", "samples.jsonl": ""}
        for name in LOGS:
            of = every_step.get(name)
            with self._writing(name):
                files.cut_log(self.path / name, step)
                gaps = files.missing_steps(self.path / name, step, of) if of is not None else ()
            if gaps:
                lost = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in gaps[:5])
                lost += f" and {len(gaps) - 5} more gaps" if len(gaps) > 5 else ""
                say(f"! {name} has no rows of steps {lost}; the checkpoint is of step {step}")

    def stop_if_asked(self, step: int, save: Callable[[], Path | None]) -> None:
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
        student, teacher = "eval/student/", "eval/teacher/"
        rows = [row for row in each_metrics(self.path) if any("eval/" in key for key in row)]
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
        """A line for each thing that is not as it was when the run was last started."""
        try:
            old = json.loads((self.path / "args.json").read_bytes())
            flags, environ, hashes = old["args"], old["environment"], old.get("hashes", {})
            new = json.loads(json.dumps(self._record, default=str))
            harmless = {"resume", "overwrite", "run_dir", "debug", "report_to"}
            changed = {
                f"--{key.replace('_', '-')}": (flags.get(key), value)
                for key, value in new["args"].items()
                if key not in harmless
            }
            for key in ("python", "torch", "transformers", "commit", "device", "num_devices",
                        "num_processes"):  # fmt: skip
                changed[key] = environ.get(key), new["environment"][key]
            lines = [
                f"! {name} was {was!r} and is now {now!r}"
                for name, (was, now) in changed.items()
                if was != now
            ]
            for name, now in new["hashes"].items():
                if hashes.get(name, now) != now:
                    lines.append(f"! the {name} was {hashes[name]} and is now {now} (name, sha256)")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"! {self.path / 'args.json'} cannot be read: {one_line(error, 80)}"]
        return lines


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hashes_of_files(args: argparse.Namespace) -> dict[str, str]:
    """Of the files that flags name, FILE or FILE.py:NAME, but for models and prompts."""
    found = {}
    for name in ("verifier", "teacher_prompt", "reference_prompt", "teacher_rollouts"):
        text = str(getattr(args, name, None) or "")
        path = text.rpartition(":")[0] if ".py:" in text else text
        if os.path.isfile(path):
            hashed = _hash(Path(path).read_bytes())
            found[f"file of --{name.replace('_', '-')}"] = f"{Path(path).name} {hashed}"
    return found


def _hash_of_prompts(prompts: Sequence[Any]) -> str:
    """Of the ids (which have the template in them, and the date that it may write), answers, and
    rows, which the verifier reads."""
    digest = hashlib.sha256()
    for prompt in prompts:
        what = [prompt.ids, prompt.answer, prompt.domain, *([prompt.views] if prompt.views else [])]
        digest.update(json.dumps([*what, prompt.row], default=lambda x: str(type(x))).encode())
    return f"{len(prompts)} {digest.hexdigest()[:16]}"


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
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the writers of weights take no other
        raise RunError(f"--run-dir {path}: its name is not UTF-8 in this locale", 2) from None
    used = (path / "metrics.jsonl").exists() or any(path.glob("checkpoints/step_*"))
    found = [name for name in (*LOGS, "args.json", "checkpoints") if (path / name).exists()]
    if found and not args.resume and not is_run(path):
        raise RunError(
            f"--run-dir {path}: it is not a run folder (no args.json of a run), and has its own "
            f"{', '.join(found)}",
            2,
        )
    if used and not (args.resume or args.overwrite):
        raise RunError(f"run folder {path} exists: give --resume or --overwrite", 2)
    for name, value in vars(args).items() if found and args.overwrite else ():
        for each in value if isinstance(value, list) else [value]:
            inside = isinstance(each, str) and name != "run_dir" and Path(each.split("=")[-1])
            if inside and inside.exists() and path.resolve() in inside.resolve().parents:
                raise RunError(
                    f"--overwrite would delete --{name.replace('_', '-')} {each}, which is in it",
                    2,
                )


def is_run(path: Path) -> bool:
    """Whether the folder has the `args.json` of a run."""
    try:
        record = json.loads((path / "args.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"args", "environment"} <= record.keys()


def _remove_run(path: Path, script: str) -> None:
    """Delete what a run writes, and nothing else that is in its folder; its `args.json`, which
    tells that it is one, stays until it is replaced.

    Raises:
        OSError: something cannot be deleted. Nothing has been trained yet.
    """
    if is_run(path):
        own = [path / name for name in ("checkpoints", "tensorboard", *LOGS, script)]
        for each in (*own, *path.glob("before_step_*")):
            files.remove(each)


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
    say(ops_line(opd_ops.info(), "cuda" if args.device.startswith("cuda") else "cpu"))
    rollouts, most = args.prompts_per_step * args.rollouts_per_prompt, args.max_completion_tokens
    budget = (
        f"{args.steps} steps x {rollouts} rollouts x at most {most} tokens = "
        f"{rollouts * most / 1e6:.3g} M tokens a step, {args.steps * rollouts * most / 1e6:.3g} M "
        "in all"
    )
    if args.eval_only:
        budget = f"each test prompt x {args.eval_samples} samples x at most {most} tokens"
    say(f"budget: {budget}")


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
    """`model/` for `from_pretrained`, `trainer/` to resume; data and samples need no state.

    Raises:
        RunError: a weight is not finite. Nothing is written, so that older checkpoints stay.
    """
    bad = [name for names in ranks.gather(_not_finite(student)) for name in names]
    if bad:
        dtype = f" in {student.export_dtype} (--export-dtype)" if student.export_dtype else ""
        raise RunError(
            f"{len(bad)} of the student's weights are not finite{dtype}, such as {bad[0]}"
        )
    export(student, tokenizer, folder / "model")
    weights, moments = get_state_dict(student, optimizer)
    state_dict_saver.save(
        {"student": weights, "optimizer": moments} | _average(student) | state,
        checkpoint_id=folder / "trainer",
    )


def _average(student: Any) -> dict[str, Any]:
    """The weights of `--teacher ema:DECAY`; nothing without it."""
    return {"average": get_model_state_dict(student.average[0])} if student.average else {}


def _not_finite(student: Any) -> list[str]:
    """Names of the weights, or of the parts that this process has, with NaN or infinity, be it
    only in the type of the export."""
    parts = {name: ranks.part(each.detach()) for name, each in student.named_parameters()}
    dtype = student.export_dtype
    cast = (part if dtype is None else part.to(dtype) for part in parts.values())
    good = torch.stack([part.isfinite().all().cpu() for part in cast])
    return [name for name, each in zip(parts, good.tolist()) if not each]


_ALLOWED = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What `trainer/.metadata` is made of: data, and nothing that could run code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads the metadata without running what it says, and files of its own folder only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(".metadata is not that of a checkpoint")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{info.relative_path} is not in the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads numbers and texts as it reads tensors: without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_checkpoint(
    folder: Path, student: Any, optimizer: torch.optim.Optimizer, state: dict[str, int]
) -> dict[str, int]:
    """Put weights and moments back; return the counters that were saved with them.

    What the flags decide (learning rate, betas, weight decay) is as the flags of this run have it.
    No file of the folder can run code.
    """
    flags = [
        {key: group[key] for key in group if key != "params"} for group in optimizer.param_groups
    ]
    weights, moments = get_state_dict(student, optimizer)
    saved: dict[str, Any] = {"student": weights, "optimizer": moments} | _average(student) | state
    state_dict_loader.load(saved, storage_reader=_Reader(folder / "trainer"), planner=_Planner())
    set_state_dict(
        student, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"]
    )
    for each in student.average:
        set_model_state_dict(each, saved["average"])
    for group, given in zip(optimizer.param_groups, flags):
        group.update(given)
    return {key: saved[key] for key in state}
