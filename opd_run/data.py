"""Rows of a data set in, from files, generators and the hub. What becomes of a row is decided in
the method file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from opd_run.console import RunError, one_line, optional, say

Made = TypeVar("Made")


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready for the models; made in the method file.

    Attributes:
        ids: token ids, chat format included.  text: the user's message.
        answer: what the verifier compares with; empty if the row has none.
        domain: metrics are split by it.  row: all that the data set says.
    """

    ids: tuple[int, ...]
    text: str
    answer: str
    domain: str
    row: dict[str, Any]


def load(source: str | None, seed: int, make: Callable[[dict[str, Any]], Made]) -> list[Made]:
    """`make(row)` of every row of a data set, in order, none without a source; errors of `make`
    get the row's number.

    Raises:
        RunError: `read_rows` or `make` has an objection.
    """
    made = []
    for number, row in enumerate(read_rows(source, seed) if source else (), 1):
        try:
            made.append(make(row))
        except RunError as error:
            raise RunError(f"{source}: row {number}: {error}") from None
    return made


def text_of(row: dict[str, Any], name: str) -> str:
    """The text in the field `name` of a row.

    Raises:
        RunError: there is none, it is empty, or it is half a character, which JSON can spell.
    """
    text = row.get(name)
    if not isinstance(text, str) or not text:
        found = f"got {text!r}" if name in row else f"the row has {sorted(row)}"
        raise RunError(f"expected text in the field {name!r}; {found}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RunError(f"expected text, got half a character: {text!r:.60}") from None
    return text


def check_prompts(
    source: str | None, prompts: Sequence[Prompt], num_long: int, num_positions: float, args: Any
) -> None:
    """Say how many prompts of `source` are used, and refuse what cannot be.

    Args:
        prompts: those that are used.
        num_long: how many were left out as too long.
        num_positions: of the model that has the fewest.

    Raises:
        RunError: there is no prompt, or the longest does not fit the models' positions.
    """
    if not source:
        return
    if not prompts:
        why = f"all {num_long} are longer than --max-prompt-tokens" if num_long else "it is empty"
        raise RunError(f"{source}: no prompt to use: {why}")
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + args.max_completion_tokens > num_positions:
        raise RunError(
            f"{source}: the longest prompt ({longest} tokens) + --max-completion-tokens "
            f"{args.max_completion_tokens} is beyond the models' {num_positions} positions"
        )
    say(f"data: {source}: {len(prompts)} prompts; {num_long} left out as too long")
    unanswered = [prompt.row for prompt in prompts if prompt.row.get(args.answer_field) is None]
    if unanswered:
        say(
            f"! {source}: {len(unanswered)} rows have no field {args.answer_field!r} "
            f"(--answer-field; they have {sorted(unanswered[-1])}): their verdict is 0, unverified"
        )


def say_overlap(train: Sequence[Prompt], test: Sequence[Prompt]) -> None:
    """Say how many test prompts are training prompts."""
    both = {prompt.text for prompt in train} & {prompt.text for prompt in test}
    if both:
        say(f"! {len(both)} of the test prompts are training prompts: not held out")


def read_rows(spec: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a data set.

    Args:
        spec: a `.jsonl` file; `reasoning_gym:TASK[:SIZE]` (rows `prompt`, `answer`, `domain`,
            `metadata`; SIZE defaults to 1000); or `NAME[:CONFIG][:SPLIT]` of the `datasets` hub.
        seed: of the reasoning-gym generator.

    Raises:
        RunError: the file or package is missing, or a line is not a JSON object.
    """
    if spec.startswith("reasoning_gym:"):
        return _read_gym(spec, seed)
    path = Path(spec)
    if path.is_file():
        return _read_jsonl(path)
    if path.suffix in (".jsonl", ".json") or path.exists():
        raise RunError(f"no file {spec} (expected a .jsonl, reasoning_gym:TASK or a hub name)")
    datasets = optional("datasets", f"data set {spec}")
    name, *rest = spec.split(":")
    try:
        split = rest[-1] if rest else "train"
        return [dict(row) for row in datasets.load_dataset(name, *rest[:-1], split=split)]
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RunError(f"data set {spec}: {one_line(error)}") from error


def _read_gym(spec: str, seed: int) -> list[dict[str, Any]]:
    gym = optional("reasoning_gym", f"data {spec}")
    _, task, *size = spec.split(":")
    try:
        items = list(gym.create_dataset(task, size=int(size[0]) if size else 1000, seed=seed))
    except Exception as error:  # each task checks its settings in its own way
        raise RunError(f"{spec}: expected reasoning_gym:TASK[:SIZE]: {one_line(error)}") from error
    return [{"prompt": item["question"], "domain": task} | item for item in items]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        # Only a line feed ends a row: U+2028 and its like may stand in a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits
                why = getattr(error, "msg", "") or one_line(error, 80)
                raise RunError(
                    f"{path}:{number}: expected a JSON object, not JSON: {why}: {line:.60}"
                ) from None
            if not isinstance(row, dict):
                raise RunError(f"{path}:{number}: expected a JSON object, got {line:.60}")
            rows.append(row)
    return rows


@cache
def completions_of(path: str, prompt_field: str, field: str) -> dict[str, list[str]]:
    """The texts in `field` of a jsonl file, by the text of their prompt; read once."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path, 0), 1):
        if not all(isinstance(row.get(key), str) for key in (prompt_field, field)):
            raise RunError(
                f"{path}: row {number}: expected text in the fields {prompt_field!r} and "
                f"{field!r}; the row has {sorted(row)}"
            )
        found.setdefault(row[prompt_field], []).append(row[field])
    return found
