"""Verifiers of the worst kind."""

import os
import signal
import subprocess
import time
from pathlib import Path


def slow_if_asked(text, answer, row):
    """It may hang, raise, end its process, or leave others behind."""
    if text == "hang":
        time.sleep(600)
    if text == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if text == "orphan":
        child = subprocess.Popen(["sleep", "600"])
        Path(row["pid"]).write_text(str(child.pid))
        time.sleep(600)
    if text == "pid":
        Path(row["pid"]).write_text(str(os.getpid()))
        return True
    if text.startswith("noted"):
        with Path(row["note"]).open("a") as note:
            note.write(text + "\n")
        return text == "noted 1"
    if text == "key":
        return "OPD_TEST_API_KEY" in os.environ
    if text == "raise":
        raise ValueError("cannot read this")
    if text == "exit":
        raise SystemExit(3)
    if text == "die":
        os._exit(3)
    return text == answer


shortest = lambda text, answer, row: len(text) < 3  # noqa: E731


def with_ended(text, answer, row, ended):
    return ended or text == "cut but fine"


def returns(text, answer, row):
    """What the row says, spelt as Python."""
    return eval(row["value"], {})


async def coroutine(text, answer, row):
    return True


def two(text, answer):
    return True
