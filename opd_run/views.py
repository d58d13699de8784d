"""What a model reads in place of the student's prompt: `--teacher-prompt` and its like.

Which messages it reads, by templates and functions of the user. How they become token ids, and
which model reads which prompt, is in the method file.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from opd_run import compat, data, ranks, verdicts
from opd_run.console import RunError, one_line

Attempts = tuple[Sequence[str], Sequence[float], "int | None"]
"""Completions of a prompt, their verdicts, the place of one of them; ([], [], None): none yet."""


@dataclass(frozen=True)
class View:
    """How the models of a role read a prompt.

    Attributes:
        role: `teacher` or `reference`.
        spec: a template (`data.fill`) or a function, in place of the user's last message.
        system: in place of the system message, or before all.
        template_args: more arguments of the chat template.
    """

    role: str
    spec: str | None
    system: str | None
    template_args: dict[str, Any]

    def messages(
        self, prompt: data.Prompt, attempts: Attempts, source: data.Source | None = None
    ) -> list[dict[str, Any]]:
        """The chat messages that are read in place of `prompt.messages`.

        Args:
            attempts: what a function is told of the prompt's rollouts.
            source: where a prompt has just been read from. A row of a test set that lacks a field
                of the template is read as the student reads it, and counted there.

        Raises:
            RunError: exit code 2, the row lacks a field of the template; the function raises
                something, or returns neither text, messages nor None.
        """
        messages = [dict(each) for each in prompt.messages]
        said: Any = None
        if self.spec is not None and data.is_function(self.spec):
            said = self._ask(prompt, attempts)
        elif self.spec is not None:
            try:
                said = data.fill(self.spec, prompt.row, prompt.text)
            except data.NoField:
                if source is None or source.split != "test":
                    raise
                source.num_without += 1
                return messages
        if isinstance(said, list):
            messages = said
        elif said is not None:
            last = max(place for place, each in enumerate(messages) if each["role"] == "user")
            messages[last]["content"] = data.whole(said)
        if self.system is not None:
            rest = [each for each in messages if each["role"] != "system"]
            messages = [{"role": "system", "content": self.system}, *rest]
        return messages

    def _ask(self, prompt: data.Prompt, attempts: Attempts) -> Any:
        assert self.spec is not None
        flag = f"--{self.role}-prompt {self.spec}"
        try:
            said = function_of(self.spec, self.role)(dict(prompt.row), *attempts)
        except RunError:
            raise
        except (Exception, SystemExit) as error:  # an exit would end the run without a word
            raise RunError(f"{flag}: {type(error).__name__}: {one_line(error)}") from error
        try:
            if said is None or isinstance(said, str):
                return said and data.whole(said)
            if isinstance(said, list) and all(isinstance(each, dict) for each in said):
                messages = [data.message(each) for each in said]
                if messages and messages[-1]["role"] != "assistant":
                    return messages
        except RunError as error:
            raise RunError(f"{flag}: {error}") from None
        raise RunError(
            f"{flag}: expected text, a list of chat messages that ends before an answer, or None; "
            f"got {said!r:.80}"
        )


def of(args: argparse.Namespace) -> list[View]:
    """The views that the flags ask for: one for each role that has its own."""
    found = []
    for role in ("teacher", "reference"):
        spec, system, options = (
            getattr(args, f"{role}_{name}", None) for name in ("prompt", "system", "template_args")
        )
        if spec is not None or system is not None or options:
            found.append(View(role, spec, system, options or {}))
    return found


def attempts(
    prompts: Sequence[data.Prompt], texts: Sequence[str], of_text: Sequence[float]
) -> list[Attempts]:
    """For each rollout, what its prompt's group has written, the verdicts, and its place in it.

    Args:
        prompts, texts, of_text: of each rollout; `of_text` has the verdicts. A group has one
            prompt object.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(id(prompt), []).append(row)
    found: dict[int, Attempts] = {}
    for rows in groups.values():
        for place, row in enumerate(rows):
            found[row] = [texts[each] for each in rows], [of_text[each] for each in rows], place
    return [found[row] for row in range(len(prompts))]


def show_attempts(
    rollout: Any, texts: Sequence[str], tell: Callable[..., data.Prompt], facts: compat.Facts
) -> dict[str, float]:
    """Ask the functions of `--teacher-prompt` again, with the group's attempts; `leave_out_long`.

    Args:
        texts: of the completions.  tell: `tell(prompt, attempts=...)`, the prompt with what others
            read in its place then.
    """
    every = attempts(rollout.prompts, texts, rollout.verdict.tolist())

    def asked() -> list[data.Prompt]:
        return [tell(each, attempts=of_group) for each, of_group in zip(rollout.prompts, every)]

    rollout.prompts = ranks.first(asked)
    return leave_out_long(rollout, facts.num_positions)


def leave_out_long(rollout: Any, num_positions: float) -> dict[str, float]:
    """Train nothing of rollouts that a teacher cannot read behind its prompt; their number."""
    completions = rollout.completion_mask.sum(1).cpu()
    long = torch.tensor([prompt.longest for prompt in rollout.prompts]) + completions
    fits = (long <= num_positions).to(rollout.response_mask.device)
    for mask in (rollout.response_mask, rollout.prefix_mask):
        mask &= fits[:, None]
    return {"num_teacher_prompts_too_long": float((~fits).sum())}


@cache
def function_of(spec: str, role: str) -> Callable[..., Any]:
    """`f(row, completions, verdicts, index)`, text, chat messages or None.

    Raises:
        RunError: exit code 2; there is no such function, or it cannot be called so.
    """
    module, _, name = spec.rpartition(":")
    try:
        function: Callable[..., Any] = getattr(verdicts.imported(module), name)
        inspect.signature(function).bind({}, [], [], None)
    except Exception as error:  # whatever the module raises when it is imported
        raise RunError(
            f"--{role}-prompt {spec}: expected a template, or module:function or file.py:function "
            f"of (row, completions, verdicts, index): {type(error).__name__}: {one_line(error)}",
            2,
        ) from error
    return function


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of another prompt, and of a student that teaches itself."""
    errors = []
    names = args.teacher or []
    own = [name for name in names if is_student(name)]
    errors += [
        f"--teacher {name}: a student that teaches itself has no name; a folder is NAME=./..."
        for name in names if re.fullmatch(r"[^/=]+=(live|ema:.*)", name)
    ]  # fmt: skip
    if own and len(names) > 1:
        errors.append(f"--teacher {own[0]}: one teacher is expected then")
    if own and args.teacher_url:
        errors.append(f"--teacher {own[0]}: leave --teacher-url out")
    if own and args.teacher_offload:
        errors.append(f"--teacher {own[0]}: leave --teacher-offload out")
    if "live" in own and not any(view.role == "teacher" for view in of(args)):
        errors.append(
            "--teacher live: the student under its own prompt has nothing to teach (the gradient "
            "is zero): give --teacher-prompt, --teacher-system or --teacher-template-args; a "
            "folder of that name is ./live"
        )
    if any(name.startswith("ema:") for name in own):
        try:
            decay_of(args)
        except ValueError:
            errors.append("--teacher ema:DECAY: expected a number in (0, 1), such as ema:0.99; a "
                          "folder of that name is ./ema:...")  # fmt: skip
    return errors


def is_student(path: str) -> bool:
    """Whether `--teacher` means the student itself: `live`, or `ema:DECAY`, its average."""
    return path == "live" or path.startswith("ema:")


def decay_of(args: argparse.Namespace) -> float | None:
    """Of `--teacher ema:DECAY`; None: the teacher is another.

    Raises:
        ValueError: it is no number between 0 and 1.
    """
    kind, average, text = (args.teacher or [""])[0].partition("ema:")
    if kind or not average:
        return None
    decay = float(text)
    if not 0.0 < decay < 1.0:
        raise ValueError(text)
    return decay
