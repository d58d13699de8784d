"""What a model talks to for several turns (`forks/agent_opd.py`), and a small example.

An environment is a class without arguments:

    reset(row) -> str                  what it says before the first turn; "": the prompt is all
    step(text) -> (str, bool, bool)    its answer to a turn, whether it is over, success

None is "" for an answer and False for the others. Special tokens in what it says are read as such.
One is made for each rollout. Every process of a run plays all of them, so that what an environment
says must follow from the row and the turns alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from opd_run import verdicts
from opd_run.console import RunError, one_line


@cache  # a file is executed once, as a module is
def of(spec: str) -> Callable[[], Any]:
    """What makes an environment of the class that `--environment` names, `module:Class` or
    `file.py:Class`, and checks what it says.

    Raises:
        RunError: there is none, it lacks a method or needs arguments (exit code 2), or a package.
    """
    module, _, name = spec.rpartition(":")
    try:
        found: Callable[[], Any] = getattr(verdicts.imported(module), name)
        if inspect.isclass(found):
            inspect.signature(found).bind()  # no arguments
        missing = [each for each in ("reset", "step") if not callable(getattr(found, each, None))]
    except RunError:
        raise
    except Exception as error:  # whatever the module raises when it is imported
        raise RunError(
            f"--environment {spec}: expected module:Class or file.py:Class: "
            f"{type(error).__name__}: {one_line(error)}",
            2,
        ) from error
    if missing:
        raise RunError(f"--environment {spec}: has no method {' and no '.join(missing)}", 2)
    if not inspect.isclass(found):
        raise RunError(f"--environment {spec}: is no class", 2)
    return partial(_Checked, found, spec)


class _Checked:
    """An environment whose words are of the types above: a wrong one would be read as text."""

    def __init__(self, made: Callable[[], Any], spec: str) -> None:
        self.environment, self.spec = made(), f"--environment {spec}"

    def reset(self, row: dict[str, Any]) -> str:
        return self._text("reset", self.environment.reset(row))

    def step(self, text: str) -> tuple[str, bool, bool]:
        found = self.environment.step(text)
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            raise RunError(
                f"{self.spec}: step returned {found!r:.80}; expected (observation, done, success)"
            )
        observation, *words = found
        done, success = (verdicts.word(False if word is None else word) for word in words)
        for name, (_, wrong) in (("done", done), ("success", success)):
            if wrong:
                raise RunError(f"{self.spec}: step: {name}: {wrong}")
        return self._text("step", observation), bool(done[0]), bool(success[0])

    def _text(self, method: str, said: Any) -> str:
        said = "" if said is None else said
        if not isinstance(said, str) or any("\ud800" <= each <= "\udfff" for each in said):
            raise RunError(f"{self.spec}: {method} said {said!r:.80}; expected text")
        return said


def success(completion: str, right_answer: Any, row: dict[str, Any], ended: bool) -> bool:
    """The verifier of several turns: what the environment has said, which stands in the row."""
    return bool(row.get("success"))


class TryAgain:
    """One more try for a wrong answer: rows need the field `answer`."""

    def reset(self, row: dict[str, Any]) -> str:
        self.row, self.num_left = row, 2
        return ""

    def step(self, text: str) -> tuple[str, bool, bool]:
        right = bool(verdicts.verify_exact(text, self.row["answer"], self.row))
        self.num_left -= 1
        done = right or self.num_left == 0
        return "" if done else "That is not right. Try again.", done, right
