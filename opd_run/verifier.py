"""Verifiers: functions that say whether an answer is right, in a process that may hang or die."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_run import ranks
from opd_run.console import RunError, one_line, optional, say

Function = Callable[[str, str, dict[str, Any]], bool]


def _verify_forever(pipe: Any, function: Function) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    pipe.send("ready")  # everything is imported: from here on the time limit counts
    while True:
        try:
            text, answer, row = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        try:
            pipe.send((bool(function(text, answer, row)), ""))
        except Exception as error:  # a verifier is the user's: whatever it raises is no verdict
            pipe.send((None, f"{type(error).__name__}: {one_line(error, 200)}"))


class Verifier:
    """Runs `function(completion, answer, row) -> bool` in one long-lived child process.

    The child is killed and started anew when an answer takes longer than `timeout_s`, so that a
    verifier that hangs cannot stop a run. A process is no sandbox: do not execute model text.

    `num_unverified` counts the calls that timed out or raised since the run began; `last_error` is
    the newest message.
    """

    def __init__(self, function: Function, timeout_s: float) -> None:
        self.function, self.timeout_s = function, timeout_s
        self.num_unverified, self.last_error = 0, ""
        self._process: Any = None
        self._pipe: Any = None
        self._start()

    def _start(self) -> None:
        # A server that has imported everything forks the children: a restart takes milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "opd_run.verifier"])
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(
            target=_verify_forever, args=(child_end, self.function), daemon=True
        )
        self._process.start()
        child_end.close()
        self._ready = False

    def __call__(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[float]:
        """Verdicts of `(completion, answer, row)` items: +1 right, -1 wrong, 0 unverified.

        Each rank has all the items, and verifies its share of them.
        """
        mine = [self._verdict(item) for item in items[ranks.share(len(items))]]
        return [verdict for verdicts in ranks.gather(mine) for verdict in verdicts]

    def _verdict(self, item: tuple[str, str, dict[str, Any]]) -> float:
        try:
            if not self._ready:
                if not self._pipe.poll(120.0):
                    raise TimeoutError("its process did not start within 120 s")
                self._ready = bool(self._pipe.recv())
            self._pipe.send(item)
            if not self._pipe.poll(self.timeout_s):
                raise TimeoutError(f"no answer within {self.timeout_s} s")
            right, error = self._pipe.recv()
        except (EOFError, OSError) as lost:  # TimeoutError is an OSError
            right, error = None, str(lost) or "its process died"
            self.close()
            self._start()
        if right is not None:
            return 1.0 if right else -1.0
        self.num_unverified, self.last_error = self.num_unverified + 1, error
        if self.num_unverified <= 3:  # then only counted, in unverified_share
            say(f"! verifier failed on answer {item[1]!r:.60}: {error}; verdict 0")
        return 0.0

    def close(self) -> None:
        """End the child process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


# --------------------------------------------------------------- the functions that come with us
def final_answer(text: str) -> str:
    """What stands after the last `####` (the GSM8K convention), else the whole text."""
    return text.rsplit("####", 1)[-1].strip()


def verify_exact(text: str, answer: str, row: dict[str, Any]) -> bool:
    """The final answer is the right one, character by character."""
    if not answer.strip():
        raise ValueError("there is no right answer to compare with")
    return final_answer(text) == answer.strip()


def verify_math(text: str, answer: str, row: dict[str, Any]) -> bool:
    """Both are equal as mathematics (math-verify); time is bounded by `Verifier`."""
    import math_verify

    gold = math_verify.parse(f"${answer}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the right answer {answer!r}")
    found = math_verify.parse(text, parsing_timeout=None)
    return bool(math_verify.verify(gold, found, timeout_seconds=None))


def verify_gym(task: str, text: str, answer: str, row: dict[str, Any]) -> bool:
    """reasoning-gym gives the final answer its full score."""
    import reasoning_gym

    return bool(reasoning_gym.get_score_answer_fn(task)(final_answer(text), row) >= 1.0)


def verifier_function(spec: str) -> Function:
    """`exact`, `math`, `reasoning_gym:TASK`, `module:function` or `file.py:function`.

    A verifier is `function(completion, right_answer, row) -> bool`; an exception is verdict 0.
    """
    if spec in ("exact", "math"):
        if spec == "math":
            optional("math_verify", "--verifier math")
        return {"exact": verify_exact, "math": verify_math}[spec]
    module, _, name = spec.partition(":")
    if module == "reasoning_gym" and name:
        gym = optional("reasoning_gym", f"--verifier {spec}")
        try:
            gym.get_score_answer_fn(name)
        except ValueError as error:
            raise RunError(f"--verifier {spec}: {one_line(error)}", 2) from None
        return partial(verify_gym, name)
    path = Path(module)
    folder = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # the child process gets it too
    try:
        name_of_module = path.stem if path.suffix == ".py" else module
        function: Function = getattr(importlib.import_module(name_of_module), name)
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, no function")
    except Exception as error:  # whatever the module raises when it is imported
        raise RunError(
            f"--verifier: expected exact, math, reasoning_gym:TASK, module:function or "
            f"file.py:function, got {spec!r} ({type(error).__name__}: {one_line(error)})",
            code=2,
        ) from error
    return function
