"""A run: its folder, phases, logs and checkpoints, and what a signal or an error makes of them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException  # no Exception of Python's

import opd_ops
from opd_run import files, ranks, retry
from opd_run.alarms import Alarms
from opd_run.command import Stopped, held, root, stop_signals
from opd_run.compat import Facts
from opd_run.console import RunError, ServerLost, one_line, say
from opd_run.files import append_row, each_metrics, write_atomically
from opd_run.folder import (
    LOGS,
    check_folder,
    hash_of,
    hash_of_prompts,
    hashes_of_files,
    is_run,
    remove_run,
)
from opd_run.live import live_view, reporter, step_line
from opd_run.machine import environment, ops_line, peak_memory_mib
from opd_run.retry import OutOfMemory, is_out_of_memory

UNDONE = ("generate", "teacher", "diagnose", "eval")
"""Phases whose work can be thrown away: the weights in them are those of the step boundary."""


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
            "script": f"{self._script.name} {hash_of(self._text)}",
            **hashes_of_files(args),
            **{name: hash_of_prompts(each) for name, each in (prompts or {}).items()},
        }
        self.resume_from = ranks.first(self._open, args)
        self._ours = {self.resume_from}  # the checkpoints that count; others are leftovers
        retry.start()
        self.alarms = Alarms([])
        kind = args.report_to if ranks.rank() == 0 else "none"
        self._report, self._num_unseen = reporter(kind, self.path, vars(args)), 0
        for number in stop_signals():
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
                remove_run(self.path, self._script.name)
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
            held.append(self._lock)
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
            raise Stopped(number)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to `phases[name]`; synchronises the device.

        Outside of the update the weights are those of the step boundary. There, in one process, or
        if all have it (`ranks.first`), an error saves the run before it ends it, and in one process
        a signal stops it in the middle: what the step had done so far is thrown away, and done
        again by `--resume`. Several processes look for a signal at the end of the block.
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
        except Stopped:
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
        if phase in UNDONE and (ranks.world() == 1 or getattr(error, "everywhere", False)):
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
                first = root(error)
                failed = first if isinstance(first, Exception) else RuntimeError(one_line(first))
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

    def load(
        self,
        read: Callable[..., dict[str, int]],
        student: Any,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, int],
    ) -> dict[str, int]:
        """`read(folder, student, optimizer, state)` of the checkpoint to resume from.

        What was logged after it is dropped. Without `--resume`, `state` is returned as it is.

        Raises:
            RunError: it is whole, but of another model or optimizer, or of another step.
        """
        if self.resume_from is None:
            return state
        try:
            state = read(self.resume_from, student, optimizer, state)
        except (Exception, CheckpointException) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            flags = "--student and --teacher" if student.average else "--student"
            raise RunError(
                f"checkpoint {self.resume_from} does not fit {flags}: {one_line(root(error))}"
            ) from error
        if state["step"] != files.step_of(self.resume_from):
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
