"""Rows of a data set in, from files, generators and the hub: docs/data.md has a table of the forms.

What becomes of a row is decided in the method file.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from opd_run import ranks
from opd_run.compat import time_limit
from opd_run.console import RunError, one_line, optional, say

Made = TypeVar("Made")
Row = dict[str, Any]
PROMPT_FIELDS = ("prompt", "messages", "conversations", "question", "problem")
FORMS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
EXPECTED = (
    "a .jsonl, .json, .csv, .tsv, .parquet or .arrow file (also .gz, .zst), a data set folder, "
    "reasoning_gym:TASK[:SIZE] or a hub name NAME[:CONFIG][:SPLIT]"
)
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"},
}
"""What ShareGPT's `from` says, as a role; in any case."""
SYSTEM = ("system", "developer")  # roles of a message that stands before all


class NoField(RunError):
    """A template names a field that the row does not have."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready for the models; made in the method file.

    Attributes:
        ids: token ids, chat format included.  text: the user's last message.
        answer: what the verifier compares with, as it stands in the row; None if it has none.
        domain: metrics are split by it.  row: all that the data set says.
        messages: what `ids` were made of.
        views: token ids that the models of a role read in place of `ids`.
    """

    ids: tuple[int, ...]
    text: str
    answer: Any
    domain: str
    row: Row
    messages: Sequence[dict[str, Any]] = ()
    views: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def read_by(self, role: str) -> tuple[int, ...]:
        """What the models of a role read."""
        return self.views.get(role, self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest of `ids` and `views`."""
        return max(map(len, (self.ids, *self.views.values())))


@dataclass
class Source:
    """A data set, and which fields of its rows are read.

    Attributes:
        spec: see `read_rows`.  seed: of the reasoning-gym generator.
        prompt_field: a dotted path; None: the first of `PROMPT_FIELDS` that the first row has.
        answer_field: a dotted path.  split: of a folder or hub name with several.
        num_cut: how many rows have lost a final assistant turn.
        num_without: how many test rows lack a field of `--teacher-prompt`.
    """

    spec: str | None
    seed: int
    prompt_field: str | None
    answer_field: str
    split: str = "train"
    num_cut: int = field(default=0, init=False)
    num_without: int = field(default=0, init=False)


def test_sets(args: Any) -> dict[str, str]:
    """The test sets of `--test-prompts [NAME=]SPEC` by name; the unnamed one is "".

    Raises:
        RunError: exit code 2; a name is used twice, or a field is given for a name without a set.
    """
    found = _named(args.test_prompts, "--test-prompts")
    for flag in ("--test-prompt-field", "--test-answer-field"):
        given = _named(getattr(args, flag[2:].replace("-", "_")), flag)
        if unknown := sorted(set(given) - set(found)):
            raise RunError(f"{flag}: there is no --test-prompts {unknown[0]}=...", 2)
    for flag, given in (("--eval-only", args.eval_only), ("--eval-teacher", args.eval_teacher)):
        if given and not found:
            raise RunError(f"{flag}: needs --test-prompts", 2)
    if not found and args.eval_every:
        say("! no --test-prompts: nothing is evaluated (--eval-every 0 ends this line)")
    return found


def source_of(spec: str | None, seed: int, args: Any, test: str | None = None) -> Source:
    """A data set with the fields that the flags give for it: for the test set `test`, or, if that
    is None, for training."""
    if test is None:
        return Source(spec, seed, args.prompt_field, args.answer_field)
    seed += 10**6  # reasoning_gym numbers its rows from the seed on: far from the training set
    fields = (
        _named(values, "").get(test, default)
        for values, default in (
            (args.test_prompt_field, args.prompt_field),
            (args.test_answer_field, args.answer_field),
        )
    )
    prompt_field, answer_field = fields
    return Source(spec, seed, prompt_field, answer_field or "", "test")


def load_prompts(
    spec: str | None,
    make: Callable[[Row, Source], Prompt],
    num_positions: float,
    args: Any,
    test: str | None = None,
) -> list[Prompt]:
    """The prompts of one data set that fit (`check_prompts`). `test`: the name of a test set.

    Where a function says what a teacher reads, one process asks it, and all have its answers.
    """
    source = source_of(spec, args.seed, args, test)
    every = ranks.first(load, source, make) if asks_functions(args) else load(source, make)
    if args.prompt_template is None and not asks_functions(args):
        _say_dropped(source, every, make, args.system is not None)
    return check_prompts(source, every, num_positions, args)


def _say_dropped(
    source: Source, prompts: Sequence[Prompt], make: Callable[[Row, Source], Prompt], same: bool
) -> None:
    """Say which parts of the rows the chat template leaves out: the first prompt that has such a
    part is the same without it, or with another. `same`: all have the system message of a flag."""
    import jinja2

    if (here := source.prompt_field) is None:
        return

    def other(prompt: Prompt, messages: Sequence[dict[str, Any]], **more: Any) -> Prompt:
        own = {"system": None, here: list(messages)[same:]}
        return make(prompt.row | own | more, replace(source))

    parts: dict[str, tuple[Callable[[Prompt], bool], Callable[[Prompt], Prompt]]] = {
        "tools": (
            lambda each: bool(each.row.get("tools")),
            lambda each: other(each, each.messages, tools=None),
        ),
        "calls of tools": (
            lambda each: any("tool_calls" in one for one in each.messages),
            lambda each: other(each, [
                {key: value for key, value in one.items() if key != "tool_calls"}
                for one in each.messages
            ]),
        ),
        "a system message": (
            lambda each: not same and each.messages[0]["role"] in SYSTEM,
            lambda each: other(each, [  # a template may have one of its own
                {**each.messages[0], "content": f"{each.messages[0]['content']} 12 + 34"},
                *each.messages[1:],
            ]),
        ),
    }  # fmt: skip
    for what, (has, changed) in parts.items():
        found = [each for each in prompts if has(each)]
        if not found or here not in found[0].row:
            continue
        # a template that refuses what is left looks at it
        with contextlib.suppress(RunError, jinja2.TemplateError, TypeError, ValueError):
            if changed(found[0]).ids == found[0].ids:
                say(f"! data: {source.spec}: {len(found)} prompts have {what}, which the chat "
                    "template leaves out: no model reads that")  # fmt: skip


def load_sets(
    make: Callable[[Row, Source], Prompt], num_positions: float, args: Any
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """The training prompts (none with `--eval-only`), and the test prompts by the set's name."""
    sets = test_sets(args)
    train = load_prompts(None if args.eval_only else args.prompts, make, num_positions, args)
    tests = {
        name: load_prompts(spec, make, num_positions, args, name) for name, spec in sets.items()
    }
    say_overlap(train, [prompt for test in tests.values() for prompt in test])
    return train, tests


def _named(values: Sequence[str] | None, flag: str) -> dict[str, str]:
    """`NAME=VALUE` by name; without one, the name is empty. A name has no `/`, `.` or `:`."""
    found: dict[str, str] = {}
    for each in values or ():
        named = re.fullmatch(r"([^/.:=\[\]]+)=(.+)", each, re.S)
        name, value = named.groups() if named else ("", each)
        if name in found:
            raise RunError(f"{flag}: given twice for {name or 'the unnamed test set'}", 2)
        found[name] = value
    return found


def load(source: Source, make: Callable[[Row, Source], Made]) -> list[Made]:
    """`make(row, source)` of every row of a data set, in order, none without a source.

    `prompt_field` is found on the first row, if it was not given, and the choice is said.

    Raises:
        RunError: `read_rows` or `make` has an objection; that of `make` with the row's number.
    """
    import jinja2

    made = []
    rows = [] if source.spec is None else read_rows(source.spec, source.seed, source.split)
    if rows and source.prompt_field is None:
        source.prompt_field = next((each for each in PROMPT_FIELDS if each in rows[0]), None)
        if source.prompt_field is not None:
            say(f"data: {source.spec}: --prompt-field {source.prompt_field}, as in the first row")
    for number, row in enumerate(rows, 1):
        try:
            if "tools" in row:
                row = row | {"tools": _tools(row["tools"])}
            with time_limit("its chat template, --teacher-prompt's function or its tokenizer"):
                made.append(make(row, source))
        except RunError as error:
            raise RunError(f"{source.spec}: row {number}: {error}", error.code) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # on these messages, tools
            raise RunError(
                f"{source.spec}: row {number}: the chat template refuses it: {one_line(error)}"
            ) from error
    return made


# ------------------------------------------------------------------------------- fields of a row
def field_of(row: Any, path: str | None) -> Any:
    """What stands at a dotted path in a row, such as `reward_model.ground_truth` or `choices.-1`.

    Raises:
        KeyError: nothing does; the message says what is there.
    """
    if path is None:
        raise KeyError(f"expected one of the fields {list(PROMPT_FIELDS)} (--prompt-field); "
                       f"the row has {sorted(row)}")  # fmt: skip
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"-?[0-9]{1,9}", part):
            if not -len(value) <= int(part) < len(value):
                raise KeyError(f"expected a field {path!r}; the list has {len(value)} entries")
            value = value[int(part)]
        else:
            raise KeyError(f"expected a field {path!r}; the row has {sorted(row)}")
    return value


def value_of(row: Row, path: str) -> Any:
    """What stands at a dotted path; None where nothing does, or the NaN of a table's empty cell."""
    try:
        value = field_of(row, path)
    except KeyError:
        return None
    return None if isinstance(value, float) and value != value else value


def messages_of(
    row: Row, source: Source, template: str | None = None, system: str | None = None
) -> list[dict[str, Any]]:
    """The chat messages of a row, `role` and `content` each, up to the last of the user.

    The field holds text, which is one message of the user, or a list of messages (`role` and
    `content`, or ShareGPT's `from` and `value`), also one that is spelt as text, as in the cells of
    a table. A final assistant turn is cut off, and counted.
    `template`, see `fill`, becomes the last message of the user; `system` stands before all, as
    does a text in the row's field `system`, beside a list that has no such message.

    Raises:
        RunError: it is neither, it is empty, it holds half a character, which JSON can spell;
            exit code 2: there is a system message already.
    """
    messages = _messages(row, source, template, row.get("system") if system is None else None)
    if system is None:
        return messages
    if messages[0]["role"] in SYSTEM:
        raise RunError("the row has a system message of its own: leave --system out", 2)
    return [{"role": "system", "content": system}, *messages]


def _messages(row: Row, source: Source, template: str | None, system: Any) -> list[dict[str, Any]]:
    """`messages_of`; a `system` that is text stands before a list, where nothing is filled in."""
    if template is not None and source.prompt_field is None:
        return [{"role": "user", "content": _filled(template, row)}]
    try:
        value = field_of(row, source.prompt_field)
    except KeyError as error:
        raise RunError(error.args[0]) from None
    value = _spelt_messages(value) or value
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        messages = [message(each, f" in the field {source.prompt_field!r}") for each in value]
        turns = len(messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        source.num_cut += len(messages) < turns
        last = next((each for each in reversed(messages) if each["role"] == "user"), None)
        if last is None or not last["content"].strip():
            raise RunError(f"expected a turn of the user in the field {source.prompt_field!r}, "
                           f"with text; got {value!r:.80}")  # fmt: skip
        is_text = isinstance(system, str) and system.strip() and template is None
        if is_text and messages[0]["role"] not in SYSTEM:
            messages.insert(0, {"role": "system", "content": whole(system)})
    elif isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": whole(value)}]
    else:
        raise RunError(
            f"expected text or a list of messages in the field {source.prompt_field!r}; "
            f"got {value!r:.60}"
        )
    if template is not None:
        last = max(place for place, each in enumerate(messages) if each["role"] == "user")
        messages[last]["content"] = _filled(template, row, str(messages[last]["content"]))
    return messages


def _filled(template: str, row: Row, prompt: str | None = None) -> str:
    """`fill`, for a message.

    Raises:
        RunError: nothing comes out.
    """
    text = whole(fill(template, row, prompt))
    if not text.strip():
        raise RunError(f"expected text from the template {template!r:.60}; got {text!r:.20}")
    return text


def message(value: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A chat message with `role` and `content`, both text; the texts of its parts are joined.

    Args:
        value: that, or ShareGPT's `from` and `value`.  where: it stands, for what is said of it.

    Raises:
        RunError: it is neither, or holds something else than text.
    """
    role, content = value.get("role"), value.get("content", value.get("value"))
    if role is None and "from" in value:
        role = value["from"]
        if str(role).lower() not in ROLES:
            raise RunError(f"expected from to be one of {sorted(ROLES)}; got {value!r:.80}")
    role = ROLES.get(str(role).lower(), role)
    if isinstance(content, list):
        parts = [each.get("text") if isinstance(each, dict) else each for each in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise RunError(
                f"expected nothing but text in the parts of a message; got {value!r:.120}"
            )
        content = "".join(texts)
    more = {key: each for key, each in value.items()
            if each is not None and key not in ("role", "content", "from", "value")}  # fmt: skip
    if isinstance(more.get("tool_calls"), list):
        more["tool_calls"] = [_call(each) for each in more["tool_calls"]]
    if content is None and role == "assistant" and more:  # a call of a tool
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise RunError(
            f"expected messages with role and content (or from and value){where}; got {value!r:.80}"
        )
    return {"role": role, "content": whole(content)} | more


def _call(value: Any) -> Any:
    """A call of a tool; arguments that are spelt as text become the object that they spell."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return value
    arguments = _spelt(function["arguments"])
    if not isinstance(arguments, dict):
        return value
    function = function | {"arguments": arguments}
    return value | {"function": function} if "function" in value else function


def _spelt(text: str) -> Any:
    """What a text says in JSON, or as Python prints it; None if it is neither."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return None


def _spelt_messages(value: Any) -> list[Any] | None:
    """The messages that a text spells; None if it is any other text."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return None
    # numpy, whose spelling pandas leaves in the cells of a .csv, has no commas between the lines
    found = _spelt(re.sub(r"\}\s*\n\s*\{", "}, {", value.strip()))
    each_is_one = isinstance(found, list) and all(
        isinstance(each, dict) and {"role", "from"} & set(each) and {"content", "value"} & set(each)
        for each in found
    )
    return found if each_is_one else None


def _tools(value: Any) -> Any:
    """The field `tools`; what is spelt in JSON, all of it or each entry, as it is meant.

    Raises:
        RunError: it is not a list of objects.
    """
    found = _spelt(value) if isinstance(value, str) else value
    if isinstance(found, list):
        found = [_spelt(each) if isinstance(each, str) else each for each in found]
        if all(isinstance(each, dict) for each in found):
            return found
    elif not value:
        return None
    raise RunError(f"expected a list of objects in the field 'tools'; got {value!r:.80}")


def whole(text: str) -> str:
    """The text itself, if it is text that can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RunError(f"expected text, got half a character: {text!r:.60}") from None
    return text


def user_text(messages: Sequence[dict[str, Any]]) -> str:
    """The last message of the user."""
    return next((str(each["content"]) for each in reversed(messages) if each["role"] == "user"), "")


def plain(messages: Sequence[dict[str, Any]]) -> str:
    """One message of the user as text, for a model without a chat template.

    Raises:
        RunError: there are several messages, which nothing but a template can join.
    """
    if len(messages) != 1:
        raise RunError(f"{len(messages)} messages, or --system, need a chat template; "
                       "--prompt-template builds one text from fields of the row", 2)  # fmt: skip
    return str(messages[0]["content"])


# ------------------------------------------------------------------------------------- templates
@cache
def template_text(spec: str) -> str:
    r"""A template as text: that of the file for `@FILE`, else `spec` with `\n` as a line feed.

    Raises:
        RunError: exit code 2; the file cannot be read.
    """
    if not spec.startswith("@"):
        return spec.replace("\\n", "\n")
    try:
        return Path(spec[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"template {spec}: cannot be read: {one_line(error)}", 2) from None


def fill(spec: str, row: Row, prompt: str | None = None) -> str:
    r"""The one function that fills templates.

    `{name}` or `{a.b}` becomes what the row has there, once: inserted text is not looked at again;
    `{prompt}` is `prompt`. `{{name}}` is a literal `{name}`. All other braces stay as they are:
    `\\boxed{}`, `\\frac{1}{2}`.

    Args:
        spec: see `template_text`.  row: numbers are written, null is nothing, the rest is JSON.
        prompt: the student's user text.

    Raises:
        RunError: exit code 2; braces around something like a name that no field fits.
    """

    def replaced(found: re.Match[str]) -> str:
        if found[1] is not None:
            return "{" + found[1] + "}"
        name = found[2]
        if name == "prompt" and prompt is not None:
            return prompt
        try:
            value = field_of(row, name)
        except KeyError:
            if not re.fullmatch(r"\w+(\.\w+)*", name):
                return found[0]
            raise NoField(
                f"template {spec!r:.80}: no field {name!r}; the row has {sorted(row)}; "
                f"{{{{{name}}}}} is a literal {{{name}}}",
                2,
            ) from None
        if value is None or isinstance(value, str):
            return value or ""
        return json.dumps(value, ensure_ascii=False, default=str)

    return re.sub(r"\{\{([^\W\d][^{}\n]*)\}\}|\{([^\W\d][^{}\n]*)\}", replaced, template_text(spec))


def is_function(spec: str) -> bool:
    """Whether all of `--teacher-prompt` is `module:name` or `file.py:name`; else a template."""
    return re.fullmatch(r"([\w.]+|[^\n{}]+\.py):[^\W\d]\w*", spec) is not None


def asks_functions(args: Any) -> bool:
    """Whether a function says what a model reads in the student's place; it is called again when
    there are attempts."""
    specs = [getattr(args, name, None) for name in ("teacher_prompt", "reference_prompt")]
    return any(is_function(each) for each in specs if each is not None)


# ------------------------------------------------------------------------------ what is said of it
def check_prompts(
    source: Source, every: Sequence[Prompt], num_positions: float, args: Any
) -> list[Prompt]:
    """The prompts of at most `--max-prompt-tokens`, and of at most what `num_positions` leave
    beside `--max-completion-tokens`; how many those are, and what is odd, is said.

    Args:
        num_positions: of the model that has the fewest.

    Raises:
        RunError: there is none; exit code 2: the teacher is the student of this moment, and reads
            what the student reads.
    """
    spec = source.spec
    fitting = num_positions - args.max_completion_tokens  # of each model's own prompt
    longest = min(args.max_prompt_tokens, fitting)
    prompts = [each for each in every if len(each.ids) <= longest and each.longest <= fitting]
    if num_empty := sum(not each.ids for each in every):
        raise RunError(
            f"{num_empty} of {len(every)} prompts have no tokens: the template writes none"
        )
    if not spec:
        return prompts
    num_long, limit = len(every) - len(prompts), f"--max-prompt-tokens {args.max_prompt_tokens}"
    room = (
        f"{max(0, fitting)} tokens, which is what --max-completion-tokens "
        f"{args.max_completion_tokens} leaves of the models' {num_positions} positions"
    )
    if longest < args.max_prompt_tokens:
        limit = room
    elif num_told := sum(len(each.ids) <= longest for each in every) - len(prompts):
        limit += (
            f", or, {num_told} of them, as the teacher or the reference reads them, than {room}"
        )
    if not prompts:
        why = f"all {num_long} are longer than {limit}" if num_long else "it is empty"
        raise RunError(f"{spec}: no prompt to use: {why}")
    why = f": longer than {limit}" if num_long else ""
    say(f"data: {spec}: {len(prompts)} prompts; {num_long} left out as too long{why}")
    if source.num_cut:
        say(f"data: {spec}: a final assistant turn was cut off in {source.num_cut} rows")
    if source.num_without:
        say(f"data: {spec}: {source.num_without} rows lack a field of --teacher-prompt or "
            "--reference-prompt: the student's prompt is read")  # fmt: skip
    shown = re.escape(source.answer_field)
    if re.search(rf"(?<!\{{)\{{{shown}\}}", template_text(args.prompt_template or "")):
        say(f"! --prompt-template: {{{source.answer_field}}} puts the right answer into the "
            f"prompt; {{{{{source.answer_field}}}}} is literal")  # fmt: skip
    if twice := len(prompts) - len({prompt.ids for prompt in prompts}):
        say(f"data: {spec}: {twice} prompts are there more than once")
    flags = [flag for flag in ("teacher_prompt", "teacher_system", "teacher_template_args")
             if getattr(args, flag) not in (None, {})]  # fmt: skip
    alike = not any("teacher" in prompt.views for prompt in prompts)
    if flags and alike and source.split == "train" and not is_function(args.teacher_prompt or ""):
        given = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        text = f"{given}: the teacher reads what the student reads, in all prompts of {spec}"
        if args.teacher == ["live"]:
            raise RunError(f"{text}: --teacher live has nothing to teach, its gradient is zero", 2)
        say(f"! {text}")
    elif alike and source.split == "train" and (args.teacher or [""])[0].startswith("ema:"):
        say(f"! --teacher {args.teacher[0]}: it reads what the student reads, so that both stay as "
            "they are, unless something else moves the student: see --teacher-prompt")  # fmt: skip
    unanswered = [each.row for each in prompts if each.answer is None or each.answer == ""]
    if unanswered:
        say(
            f"! {spec}: {len(unanswered)} rows have no field {source.answer_field!r} "
            f"(--answer-field; they have {sorted(unanswered[-1])}): their verdict is 0, "
            "unverified; a function of yours is asked all the same"
        )
    return prompts


def say_overlap(train: Sequence[Prompt], test: Sequence[Prompt]) -> None:
    """Say how many test prompts are training prompts."""
    both = {prompt.ids for prompt in train} & {prompt.ids for prompt in test}
    if both:
        say(f"! {len(both)} of the test prompts are training prompts: not held out")


# ------------------------------------------------------------------------------------------ reading
def read_rows(spec: str, seed: int, split: str = "train") -> list[Row]:
    """Rows of a data set.

    Args:
        spec: a file: .jsonl, .json (an array, or lines), .csv, .tsv, .parquet, .arrow, each also
            .gz or .zst; a folder: of `save_to_disk`, or a data set; `NAME[:CONFIG][:SPLIT]` of the
            `datasets` hub, where SPLIT may be a slice such as `train[:100]`; or
            `reasoning_gym:TASK[:SIZE]` (rows `prompt`, `answer`, `domain`, `metadata`; SIZE
            defaults to 1000). All cells of .csv and .tsv are text.
        seed: of the reasoning-gym generator.
        split: where a folder or hub name has several and the spec names none.

    Raises:
        RunError: the file or package is missing, or a row is not an object.
    """
    if not spec:
        raise RunError(f"expected {EXPECTED}; got nothing", 2)
    if "://" in spec:
        raise RunError(f"{spec}: expected {EXPECTED}; addresses are not read", 2)
    if spec.startswith("reasoning_gym:"):
        return _read_gym(spec, seed)
    path = Path(spec)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(spec, path, split)
    name, *rest = re.split(r":(?![^\[]*\])", spec)  # colons in train[:100] do not count
    if Path(name).is_dir() and rest:
        return _read_folder(spec, Path(name), rest[-1], *rest[:-1])
    packed = re.sub(r"(\.(gz|zst))?(\[[^]]*\])?$", "", name.lower())
    if path.exists() or packed.endswith(FORMS):
        raise RunError(f"no file {spec} (expected {EXPECTED})")
    return _read_hub(spec, name, *(rest[:-1] if rest else ()), split=rest[-1] if rest else split)


def _data_package(module: str, spec: str) -> Any:
    """A module that comes with `datasets`."""
    try:
        return optional(module, spec)
    except RunError as error:
        raise RunError(f"data {spec} needs datasets: pip install datasets") from error


def _datasets(spec: str) -> Any:
    """The package, quiet: what it has to say comes as an error, in one line."""
    found = _data_package("datasets", spec)
    found.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return found


def _read_hub(spec: str, *names: str, split: str) -> list[Row]:
    datasets = _datasets(spec)
    try:
        return [_without_gaps(row) for row in datasets.load_dataset(*names, split=split)]
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise RunError(f"data set {spec}: {one_line(error)} (expected {EXPECTED})") from error


def _read_folder(spec: str, path: Path, split: str, *config: str) -> list[Row]:
    """What `save_to_disk` wrote, or a folder of data files; `split` where there are several."""
    datasets = _datasets(spec)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            builder = datasets.load_dataset_builder(str(path), *config)
            found = {str(part): list(map(Path, each))
                     for part, each in (builder.config.data_files or {}).items()}  # fmt: skip
            if not found or not all(_form_of(file) for each in found.values() for file in each):
                found = datasets.load_dataset(str(path), *config)
    except Exception as error:  # as from the hub
        raise RunError(f"data set folder {spec}: {one_line(error)}") from error
    if isinstance(found, dict):
        name, part, end = split.partition("[")
        if name not in found and len(found) == 1 and ":" not in spec.removeprefix(str(path)):
            name = next(iter(found))
        if name not in found:
            raise RunError(f"data set folder {spec}: no split {name!r}: it has {sorted(found)}")
        found, split = found[name], part + end
    if ":" in spec and "[" in split:
        raise RunError(f"data set folder {spec}: slices are for hub names")
    if not isinstance(found, list):
        return [_without_gaps(row) for row in found]
    try:  # files, as they are by themselves: a loader of tables guesses types, 079 is 79 then
        return [row for file in found for row in _read_file(file)]
    except RunError as error:
        raise RunError(f"data set folder {spec}: {error}") from None


def _read_gym(spec: str, seed: int) -> list[Row]:
    gym = optional("reasoning_gym", f"data {spec}")
    _, task, *size = spec.split(":")
    if len(size) > 1:
        raise RunError(f"{spec}: expected reasoning_gym:TASK[:SIZE]")
    try:
        items = list(gym.create_dataset(task, size=int(size[0]) if size else 1000, seed=seed))
    except Exception as error:  # each task checks its settings in its own way
        raise RunError(f"{spec}: expected reasoning_gym:TASK[:SIZE]: {one_line(error)}") from error
    return [{"prompt": item["question"], "domain": task} | item for item in items]


def _form_of(path: Path) -> tuple[str, str | None] | None:
    """The one of FORMS that a file has, and how it is packed, if it is."""
    found = re.search(rf"({'|'.join(map(re.escape, FORMS))})(?:\.(gz|zst))?$", path.name.lower())
    return (found[1], found[2]) if found else None


def _read_file(path: Path) -> list[Row]:
    if (found := _form_of(path)) is None:
        raise RunError(f"{path}: expected {EXPECTED}")
    form, packing = found
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {one_line(error)}") from None
    if packing:
        content = _unpacked(path, content, packing)
    if form in (".parquet", ".arrow"):
        return _read_table(path, content, form)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    if form in (".csv", ".tsv"):
        return _read_cells(path, text, "\t" if form == ".tsv" else ",")
    if form == ".json" and text.lstrip()[:1] == "[":
        return _objects(path, [(1, text)], array=True)
    if re.match(r"\s*\[\s*\{", text):
        raise RunError(f"{path}: expected a JSON object a line, got an array: name it .json")
    # Only a line feed ends a row: U+2028 and its like may stand in a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if form == ".json" and len(lines) > 1 and lines[0][1].strip() == "{":
        raise RunError(f"{path}: expected an array of objects, or one object a line; got "
                       "one object over several lines")  # fmt: skip
    return _objects(path, lines)


def _unpacked(path: Path, content: bytes, packing: str) -> bytes:
    if packing == "gz":
        try:
            return gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"{path}: expected a whole .gz file: {one_line(error)}") from None
    zstandard = optional("zstandard", f"data {path}")
    parts: list[bytes] = []
    try:
        while content:  # frame by frame: a stream that is cut short raises nothing
            reader = zstandard.ZstdDecompressor().decompressobj()
            parts.append(reader.decompress(content))
            if not reader.eof:
                raise RunError(f"{path}: expected a whole .zst file: it is cut short")
            content = reader.unused_data
    except zstandard.ZstdError as error:
        raise RunError(f"{path}: expected a whole .zst file: {one_line(error)}") from None
    return b"".join(parts)


def _read_table(path: Path, content: bytes, form: str) -> list[Row]:
    arrow = _data_package("pyarrow", str(path))
    parquet = _data_package("pyarrow.parquet", str(path))
    try:
        if form == ".parquet":
            table = parquet.read_table(io.BytesIO(content))
        else:  # `datasets` writes streams, others write files
            open_it = arrow.ipc.open_file if content[:6] == b"ARROW1" else arrow.ipc.open_stream
            table = open_it(content).read_all()
        rows = table.to_pylist()
        if b'"Json"' in (table.schema.metadata or {}).get(b"huggingface", b""):
            features = _datasets(str(path)).Features.from_arrow_schema(table.schema)
            rows = [features.decode_example(row) for row in rows]
        return [_without_gaps(row) for row in rows]
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path}: expected a {form} file: {one_line(error)}") from None


def _without_gaps(row: Row) -> Row:
    """A row of a table without the keys of its objects that only other rows have: they are None."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(each) for each in value]
        if isinstance(value, dict):
            return {key: of(each) for key, each in value.items() if each is not None}
        return value

    return {name: of(value) for name, value in row.items()}


def _read_cells(path: Path, text: str, delimiter: str) -> list[Row]:
    """Rows of text: a reader that guesses types turns 079 into 79, and NA into nothing.

    Where the first line has no comma, a semicolon or a tab in it separates the cells of a .csv, as
    some spreadsheets write them; blanks behind the commas of the first line are none of the cells'.
    """
    csv.field_size_limit(2**31 - 1)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    if delimiter == "," and "," not in first:
        delimiter = next((each for each in (";", "\t") if each in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        skipinitialspace=f"{delimiter} " in first)  # fmt: skip
    rows: list[Row] = []
    try:
        header = [name.strip() for name in next((cells for cells in reader if cells), [])]
        if len(set(header)) < len(header):
            raise RunError(f"{path}: expected different names in the first line, got {header}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise RunError(
                    f"{path}:{reader.line_num}: expected {len(header)} cells {header}, got "
                    f"{len(cells)}"
                )
            rows.append(dict(zip(header, cells)))
    except csv.Error as error:
        raise RunError(f"{path}:{reader.line_num}: {one_line(error)}") from None
    return rows


def _objects(path: Path, texts: Iterable[tuple[int, str]], array: bool = False) -> list[Row]:
    """The objects in numbered lines of JSON, or in one array."""
    rows: list[Row] = []
    for number, text in texts:
        expected = "an array of JSON objects" if array else "a JSON object"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits
            why = getattr(error, "msg", "") or one_line(error, 80)
            if not array and text.rstrip().endswith("},"):
                why = "a comma behind the object"
            number = getattr(error, "lineno", number) if array else number
            raise RunError(
                f"{path}:{number}: expected {expected}, not JSON: {why}: {text.strip():.60}"
            ) from None
        for place, row in enumerate(value if array else [value], 1):
            if not isinstance(row, dict):
                where = f"entry {place}: " if array else ""
                raise RunError(f"{path}:{number}: {where}expected a JSON object, got {row!r:.60}")
            rows.append(row)
    return rows


@cache
def completions_of(
    path: str, prompt_field: str | None, field: str, template: str | None = None
) -> dict[str, list[str]]:
    """The texts in `field` of a data set, by the user's text of their prompt; read once.

    A final assistant turn of a prompt does not count; `template` is filled as in a prompt.
    """
    source = Source(path, 0, prompt_field, "")

    def make(row: Row, source: Source) -> tuple[str, str]:
        text = value_of(row, field)
        if not isinstance(text, str):
            raise RunError(f"expected text in the field {field!r}; the row has {sorted(row)}")
        return user_text(messages_of(row, source, template)), text

    found: dict[str, list[str]] = {}
    for prompt, text in load(source, make):
        found.setdefault(prompt, []).append(text)
    return found
