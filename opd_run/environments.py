"""What a model talks to for several turns (`forks/agent_opd.py`), and a small example.

An environment is a class without arguments:

    reset(row) -> str                  what it says before the first turn; "": the prompt is all
    step(text) -> (str, bool, bool)    its answer to a turn, whether it is over, success

One is made for each rollout. Every process of a run plays all of them, so that what an environment
says must follow from the row and the turns alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opd_run import verdicts
from opd_run.console import RunError, one_line


def of(spec: str) -> Callable[[], Any]:
    """The class that `--environment` names, `module:Class` or `file.py:Class`.

    Raises:
        RunError: there is none, or it lacks a method (exit code 2), or a package.
    """
    module, _, name = spec.rpartition(":")
    try:
        found: Callable[[], Any] = getattr(verdicts.imported(module), name)
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
    return found


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
