"""How a command ends: one line for an error, an exit code, signals."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException  # no Exception of Python's

from opd_run import ranks
from opd_run.console import RunError, one_line, say_error

held: list[Any] = []  # open lock files of runs that have not ended


class Stopped(KeyboardInterrupt):
    """A signal asks for an end, as Python's own KeyboardInterrupt does for SIGINT."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = signal.Signals(number)


def stop_signals() -> list[int]:
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
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
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
                f"error: {type(error).__name__}: {one_line(root(error))} "
                f"[{Path(where.filename).name}:{where.lineno}; --debug shows the traceback]",
                1,
            )
        finally:
            while held:
                held.pop().close()

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
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in stop_signals()}
    for number in before:
        if number != signal.SIGINT:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def root(error: BaseException) -> BaseException:
    """What an exception was raised from, at the bottom; `torch.distributed` wraps everything."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return root(next(iter(failures.values()))[0])
    return root(error.__cause__) if error.__cause__ else error
