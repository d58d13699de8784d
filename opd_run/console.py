"""Errors with one line for the user, and printing that nothing can garble."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


class RunError(Exception):
    """A failure with one line for the user; exit code `code` (1 run failure, 2 usage)."""

    said = False  # by another of several processes

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class ServerLost(RunError):
    """A server that the run needs has not answered for as long as it may."""


def rank() -> int:
    """Which of the processes that `torchrun` started this is; 0 prints and writes.

    An environment that is no number is refused by `ranks.check`; until then this one speaks.
    """
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


# Control characters, marks that change the direction of text, half surrogates: what could move a
# cursor, recolour a terminal or hide a word, if a model or a data set wrote it.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with control characters, direction marks and surrogates written as escapes."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(error: object, limit: int = 400) -> str:
    """`str(error)` with white space folded, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def say(*lines: str) -> None:
    """Print lines above any progress bar, at once; of several processes rank 0 does."""
    from tqdm import tqdm

    for line in lines if rank() == 0 else ():
        _print(partial(tqdm.write, file=sys.stdout), sys.stdout, printable(line))


def say_error(line: str) -> None:
    """Print a line on stderr, from any process."""
    _print(partial(print, file=sys.stderr), sys.stderr, printable(line))


def _print(write: Callable[[str], None], stream: Any, text: str) -> None:
    """Nobody may read any more (`| head`, a terminal that is gone, a full disk): that ends no run,
    and what is printed from then on is lost. What cannot be encoded is escaped."""
    if stream is None:  # closed before the start
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # so that Python's own flush at the end succeeds
            os.close(null)


def optional(module: str, purpose: str) -> Any:
    """Import an optional package, or say how to install it.

    Raises:
        RunError: it is not there, or does not load.
    """
    package = module.replace("_", "-")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(f"{purpose} needs {package}: pip install {package} ({error})") from None
