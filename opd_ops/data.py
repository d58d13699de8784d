"""Prompts and verifiers: rows of a data set in, tokenized prompts and verdicts out."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opd_ops import compat, runs

Function = Callable[[str, str, dict[str, Any]], bool]


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        ids: token ids, chat template included.  text: the user message.
        answer: what the verifier compares with.  domain: metrics (and teachers) go by it.
        row: the whole row of the data set, for the verifier.
    """

    ids: tuple[int, ...]
    text: str
    answer: str
    domain: str
    row: dict[str, Any]


def load_prompts(tokenizer: Any, args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and test prompts (empty without `--test-prompts`); overlap is reported."""
    # reasoning-gym items are numbered from the seed on, so a test set starts far away from it.
    train = _load(args.prompts, args.seed, tokenizer, args)
    test = _load(args.test_prompts, args.seed + 10**6, tokenizer, args) if args.test_prompts else []
    both = {prompt.text for prompt in train} & {prompt.text for prompt in test}
    if both:
        runs.say(f"! {len(both)} of the test prompts are training prompts: not held out")
    return train, test


def _load(source: str, seed: int, tokenizer: Any, args: argparse.Namespace) -> list[Prompt]:
    """Read, render and tokenize; too long prompts are left out and counted, never cut."""
    prompts, num_long, num_unanswered = [], 0, 0
    for number, row in enumerate(read_rows(source, seed), 1):
        text = row.get(args.prompt_field)
        if not isinstance(text, str) or not text:
            found = f"got {text!r}" if args.prompt_field in row else f"the row has {sorted(row)}"
            raise runs.RunError(
                f"{source}: row {number}: expected text in the field {args.prompt_field!r}; {found}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
            raise runs.RunError(
                f"{source}: row {number}: expected text, got half a character: {text!r:.60}"
            ) from None
        templated = args.chat_template and tokenizer.chat_template is not None
        shown = compat.render(tokenizer, text, args.chat_template_args) if templated else text
        ids = tuple(tokenizer.encode(shown, add_special_tokens=not templated))  # template has BOS
        if len(ids) > args.max_prompt_tokens:
            num_long += 1
            continue
        answer, domain = row.get(args.answer_field), row.get(args.domain_field)
        num_unanswered += answer is None
        answer, domain = ("" if value is None else str(value) for value in (answer, domain))
        prompts.append(Prompt(ids, text, answer, domain, row))
    if not prompts:
        why = f"all {num_long} are longer than --max-prompt-tokens" if num_long else "it is empty"
        raise runs.RunError(f"{source}: no prompt to use: {why}")
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + args.max_completion_tokens > args.num_positions:
        raise runs.RunError(
            f"{source}: the longest prompt ({longest} tokens) + --max-completion-tokens "
            f"{args.max_completion_tokens} is beyond the models' {args.num_positions} positions"
        )
    runs.say(f"data: {source}: {len(prompts)} prompts; {num_long} left out as too long")
    if num_unanswered:
        runs.say(
            f"! {source}: {num_unanswered} rows have no field {args.answer_field!r} "
            f"(--answer-field; they have {sorted(row)}): their verdict is 0, unverified"
        )
    return prompts


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
        raise runs.RunError(f"no file {spec} (expected a .jsonl, reasoning_gym:TASK or a hub name)")
    datasets = runs.optional("datasets", "data", f"data set {spec}")
    name, *rest = spec.split(":")
    try:
        split = rest[-1] if rest else "train"
        return [dict(row) for row in datasets.load_dataset(name, *rest[:-1], split=split)]
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise runs.RunError(f"data set {spec}: {runs.one_line(error)}") from error


def _read_gym(spec: str, seed: int) -> list[dict[str, Any]]:
    gym = runs.optional("reasoning_gym", "tasks", f"data {spec}")
    _, task, *size = spec.split(":")
    try:
        items = list(gym.create_dataset(task, size=int(size[0]) if size else 1000, seed=seed))
    except Exception as error:  # each task checks its settings in its own way
        raise runs.RunError(
            f"{spec}: expected reasoning_gym:TASK[:SIZE]: {runs.one_line(error)}"
        ) from error
    return [{"prompt": item["question"], "domain": task} | item for item in items]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        # Only a line feed ends a row: U+2028 and its like may stand in a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise runs.RunError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise runs.RunError(f"{path}: cannot be read: {runs.one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits
                why = getattr(error, "msg", "") or runs.one_line(error, 80)
                raise runs.RunError(
                    f"{path}:{number}: expected a JSON object, not JSON: {why}: {line:.60}"
                ) from None
            if not isinstance(row, dict):
                raise runs.RunError(f"{path}:{number}: expected a JSON object, got {line:.60}")
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------ verifiers
def final_answer(text: str) -> str:
    """What stands after the last `####` (the GSM8K convention), else the whole text."""
    return text.rsplit("####", 1)[-1].strip()


def verify_exact(text: str, answer: str, row: dict[str, Any]) -> bool:
    """The final answer is the right one, character by character."""
    if not answer.strip():
        raise ValueError("there is no right answer to compare with")
    return final_answer(text) == answer.strip()


def verify_math(text: str, answer: str, row: dict[str, Any]) -> bool:
    """Both are equal as mathematics (math-verify); time is bounded by `runs.Verifier`."""
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
            runs.optional("math_verify", "math", "--verifier math")
        return {"exact": verify_exact, "math": verify_math}[spec]
    module, _, name = spec.partition(":")
    if module == "reasoning_gym" and name:
        gym = runs.optional("reasoning_gym", "tasks", f"--verifier {spec}")
        try:
            gym.get_score_answer_fn(name)
        except ValueError as error:
            raise runs.RunError(f"--verifier {spec}: {runs.one_line(error)}", 2) from None
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
        raise runs.RunError(
            f"--verifier: expected exact, math, reasoning_gym:TASK, module:function or "
            f"file.py:function, got {spec!r} ({type(error).__name__}: {runs.one_line(error)})",
            code=2,
        ) from error
    return function
