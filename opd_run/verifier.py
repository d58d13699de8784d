"""Verifiers: functions that say whether an answer is right, in a process that may hang or die.

The run starts one helper process by its own command line (so nothing of the caller's main module is
imported, and no file or socket in a temporary folder is needed); the helper forks the children that
verify. When the run ends, however it ends, the helper sees its socket close and kills what is left.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import numbers
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch

from opd_run import ranks
from opd_run.console import RunError, one_line, optional, say

Function = Callable[[str, str, dict[str, Any]], bool]
START_LIMIT_S = 120.0  # imports may take long, an answer may not
_SECRET = re.compile(
    r"(^|_)(API_?KEY|KEYS?|TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|AUTH|PAT)(_|$)", re.I
)
_BOOT = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from opd_run import verifier
verifier._nursery(int(sys.argv[1]))
"""


# ------------------------------------------------------------- what runs in the helper process
def _nursery(descriptor: int) -> None:
    """Fork a verifying child for each connection that arrives; end with the run, and end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    control, children = socket.socket(fileno=descriptor), set[int]()
    while True:
        try:
            told, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            told = b""
        if not told:
            break
        for child in list(children):
            if os.waitpid(child, os.WNOHANG)[0]:
                children.remove(child)
        child = os.fork()
        if child == 0:
            control.close()
            try:
                os.setsid()  # what a verifier starts is of its group, and ends with it
                _verify_forever(Connection(descriptors[0]))
            finally:
                os._exit(1)
        os.close(descriptors[0])
        children.add(child)
    for child in children:
        _kill_group(child)
    os._exit(0)


def _verify_forever(pipe: Any) -> None:
    try:
        function: Function = pickle.loads(pipe.recv_bytes())
        error = ""
    except (Exception, SystemExit) as raised:  # whatever the user's module raises or does
        error = f"its module cannot be loaded: {type(raised).__name__}: {one_line(raised, 200)}"
    # Everything is imported: from here on the time limit counts.
    pipe.send_bytes(json.dumps([os.getpid(), error]).encode())
    while not error:
        try:
            text, answer, row = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the run is gone
            return
        try:
            found = [verdict_of(function(text, answer, row)), ""]
        except (Exception, SystemExit) as raised:  # a verifier is the user's: that is no verdict
            found = [None, f"{type(raised).__name__}: {one_line(raised, 200)}"]
        pipe.send_bytes(json.dumps(found).encode())


def verdict_of(answer: object) -> bool:
    """What a verifier returned, if it is a verdict: True, False, or a number equal to 1 or 0.

    Raises:
        TypeError: it is anything else. The truth of a text, a tuple or a dict is not a verdict.
    """
    if isinstance(answer, (bool, numpy.bool_)):
        return bool(answer)
    if isinstance(answer, numbers.Real) and answer in (0, 1):
        return bool(answer == 1)
    if inspect.iscoroutine(answer):
        answer.close()
    raise TypeError(f"expected True or False, got {type(answer).__name__} {answer!r:.60}")


def _kill_group(child: int) -> None:
    """Kill a child, and what it has started; both may be gone."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except OSError:
            continue


# ------------------------------------------------------------------------ what runs in the run
class Verifier:
    """Runs `function(completion, answer, row) -> bool` in one long-lived child process.

    The child is killed and started anew when an answer takes longer than `timeout_s`, so that a
    verifier that hangs cannot stop a run. A process is no sandbox: do not execute model text. The
    child does not get those environment variables that are named like a key, token or password.

    `num_unverified` counts the calls that timed out, raised or gave no verdict since the run began;
    `last_error` is the newest message.

    Raises:
        RunError: the function cannot be handed to another process.
    """

    def __init__(self, function: Function, timeout_s: float) -> None:
        main = sys.modules["__main__"]
        if getattr(function, "__module__", "") == "__main__" and getattr(main, "__file__", None):
            function = Named(str(Path(str(main.__file__)).resolve()), function.__qualname__)
        try:
            self._function = pickle.dumps(function)
        except Exception as error:  # pickle raises what the object makes it
            raise RunError(
                f"the verifier cannot run in another process: {one_line(error)}"
            ) from None
        self.timeout_s = timeout_s
        self.num_unverified, self.last_error = 0, ""
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._pid = 0
        self._start()

    def _start(self) -> None:
        """A new child, forked by the helper in milliseconds; a new helper where that is gone."""
        ours, theirs = socket.socketpair()
        self._pipe, self._pid = Connection(ours.detach()), 0
        with theirs:
            for last in (False, True):
                if self._helper is None or self._helper.poll() is not None:
                    self._end_helper()
                    self._start_helper()
                try:
                    socket.send_fds(self._control, [b"+"], [theirs.fileno()])  # type: ignore[arg-type]
                    break
                except OSError:  # something has killed it
                    self._end_helper()
                    if last:
                        raise
        self._pipe.send_bytes(self._function)

    def _start_helper(self) -> None:
        self._control, theirs = socket.socketpair()
        environment = {key: value for key, value in os.environ.items() if not _SECRET.search(key)}
        with theirs:
            self._helper = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C and a lost terminal are the run's to handle
            )
        assert self._helper.stdin is not None
        with self._helper.stdin as stdin:
            stdin.write(pickle.dumps([str(Path(each).resolve()) for each in sys.path]))

    def __call__(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[float]:
        """Verdicts of `(completion, answer, row)` items: +1 right, -1 wrong, 0 unverified.

        Each rank has all the items, and verifies its share of them.
        """
        mine = [self._verdict(item) for item in items[ranks.share(len(items))]]
        return [verdict for verdicts in ranks.gather(mine) for verdict in verdicts]

    def _verdict(self, item: tuple[str, str, dict[str, Any]]) -> float:
        try:
            if not self._pid:
                self._await_start()
            self._pipe.send_bytes(pickle.dumps(item))
            if not self._pipe.poll(self.timeout_s):
                raise TimeoutError(f"no answer within {self.timeout_s} s")
            right, error = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError, ValueError) as lost:  # TimeoutError is an OSError
            right, error = None, str(lost) or "its process died"
            self._end_child()
            self._start()
        if right is not None:
            return 1.0 if right else -1.0
        self.num_unverified, self.last_error = self.num_unverified + 1, error
        if self.num_unverified <= 3:  # then only counted, in unverified_share
            say(f"! verifier failed on answer {item[1]!r:.60}: {error}; verdict 0")
        return 0.0

    def _await_start(self) -> None:
        if not self._pipe.poll(START_LIMIT_S):
            raise TimeoutError(f"its process did not start within {START_LIMIT_S:g} s")
        self._pid, error = json.loads(self._pipe.recv_bytes())
        if error:
            raise OSError(error)

    def _end_child(self) -> None:
        self._pipe.close()
        if self._pid:
            _kill_group(self._pid)
        else:  # it has not said who it is
            self._end_helper()

    def _end_helper(self) -> None:
        if self._control is not None and self._helper is not None:
            self._control.close()  # it kills its children, then itself
            try:
                self._helper.wait(5.0)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                self._helper.wait()
        self._control = self._helper = None

    def close(self) -> None:
        """End the child process, whatever it does."""
        self._end_child()
        self._end_helper()

    def __del__(self) -> None:
        """With the last reference; where even that is not reached, the helper sees the run end."""
        with contextlib.suppress(AttributeError, OSError):  # never started, or closed already
            self.close()


class Named:
    """A function by its place, `file.py` or a module, and its name there: read in each process, so
    that a lambda serves too, and a file is never mistaken for a module of the same name."""

    def __init__(self, place: str, name: str) -> None:
        self.place, self.name = place, name
        self._load()

    def _load(self) -> None:
        if self.place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"verifier of {self.place}", self.place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(self.place)
        found: Any = module
        for part in self.name.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{self.name} is a {type(found).__name__}, no function")
        if inspect.iscoroutinefunction(found):
            raise TypeError(f"{self.name} is async, which gives no verdict")
        self._function: Function = found

    def __call__(self, text: str, answer: str, row: dict[str, Any]) -> bool:
        return self._function(text, answer, row)

    def __reduce__(self) -> tuple[type[Named], tuple[str, str]]:
        return Named, (self.place, self.name)


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
    file = path.suffix == ".py"
    folder = str(path.resolve().parent if file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # for what the file imports; the child process gets it too
    try:
        if file and not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        return Named(str(path.resolve()) if file else module, name)
    except (Exception, SystemExit) as error:  # whatever the module raises or does at its import
        raise RunError(
            f"--verifier: expected exact, math, reasoning_gym:TASK, module:function or "
            f"file.py:function, got {spec!r} ({type(error).__name__}: {one_line(error)})",
            code=2,
        ) from error
