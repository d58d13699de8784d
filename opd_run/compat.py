"""Can this teacher score this student's tokens? The report that every run prints before it trains.

Two models distil token by token only if an id means the same token to both. That is checked here,
with what else goes wrong in practice: different EOS sets, chat templates, vocabulary padding.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_run.console import RunError, one_line, say

TEMPLATE_LIMIT_S = 10.0  # for one prompt; an honest template takes a millisecond


@contextlib.contextmanager
def time_limit(what: str) -> Iterator[None]:
    """End the block after `TEMPLATE_LIMIT_S`: a chat template is a program, and may never end.

    By a signal that comes again each second, as the compiler of templates catches the first one.
    Signals reach the main thread only; in another one there is no limit.

    Raises:
        RunError: it took longer; `what` did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise RunError(f"{what} takes more than {TEMPLATE_LIMIT_S:g} s")

    handler = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, TEMPLATE_LIMIT_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@dataclass(frozen=True)
class Facts:
    """What is known of all models of a run together, before their weights are read.

    Attributes:
        valid_vocab: ids from here on belong to no token that all tokenizers have; they are masked.
        eos_ids: of each model, the ids that it calls end of sequence, in order.
        num_positions: longest sequence, in tokens, that every model has positions for.
        num_embeddings: of each model, how many ids it has rows for.
        num_tokens: of each model, how many ids its tokenizer has.
        renamed_ids: special tokens that are others to some teacher (`--allow-renamed-tokens`).
    """

    valid_vocab: int
    eos_ids: dict[str, tuple[int, ...]]
    num_positions: float
    num_embeddings: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    renamed_ids: tuple[int, ...] = ()


@dataclass
class Report:
    """Outcome of `check_pair`.

    Attributes:
        valid_vocab: ids from here on belong to no token of both tokenizers and are masked.
        num_positions: longest sequence that every model has positions for.
        eos_ids: of each model, the ids that it calls end of sequence.
        num_embeddings, num_tokens: of each model, rows of its embedding, ids of its tokenizer.
        renamed_ids: special tokens with another name in some teacher's tokenizer.
        errors: reasons to refuse the pair.  warnings: what will probably hurt, with advice.
        facts: what was found, for the log.
    """

    valid_vocab: int = 0
    num_positions: float = math.inf
    eos_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_embeddings: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    renamed_ids: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        marked = [("", self.facts), ("! ", self.warnings), ("!! ", self.errors)]
        return [f"compat: {mark}{text}" for mark, texts in marked for text in texts]

    def all_facts(self) -> Facts:
        """What the run has to know."""
        sizes, renamed = (self.num_embeddings, self.num_tokens), tuple(sorted(self.renamed_ids))
        return Facts(self.valid_vocab, self.eos_ids, self.num_positions, *sizes, renamed)


def eos_ids(tokenizer: Any, config: Any, generation_config: Any) -> set[int]:
    """Every id that the tokenizer, the model's or the generation config calls end of sequence.

    The configuration of the text part is asked only where that of the whole has none: what stands
    there may be a default of its class.
    """
    found: set[int] = set()
    if getattr(config, "eos_token_id", None) is None:
        config = config.get_text_config()
    for owner in (tokenizer, config, generation_config):
        value = getattr(owner, "eos_token_id", None)
        values = value if isinstance(value, (list, tuple)) else [value]
        if wrong := [each for each in values if each is not None and not isinstance(each, int)]:
            where = "generation_config.json" if owner is generation_config else "config.json"
            raise RunError(f"{where}: expected eos_token_id to be a number or several, got {wrong}")
        found |= {each for each in values if each is not None and each >= 0}  # -1: none
    return found


def rope_laws(config: Any) -> list[dict[str, Any]]:
    """How a model scales rotary positions: one law, or one for each kind of layer."""
    law = getattr(config, "rope_parameters", None) or {}
    return [each for each in law.values() if isinstance(each, dict)] or [law]


def num_positions(config: Any) -> float:
    """The longest sequence that a model takes: of YaRN, linear and dynamic scaling the product of
    factor and original length, where `max_position_embeddings` was left at the latter."""
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    limit = next(filter(None, (getattr(config, name, None) for name in names)), math.inf)
    for each in rope_laws(config):
        if each.get("rope_type") in ("yarn", "linear", "dynamic") and limit != math.inf:
            original = each.get("original_max_position_embeddings") or limit
            limit = max(limit, int(each.get("factor") or 1) * original)
    return limit


def check_prompts(prompts: Sequence[Any], tokenizer: Any, facts: Facts) -> None:
    """Refuse prompts with tokens that a model has no row for; say what else is odd about tokens.

    Args:
        prompts: as each model reads them (`Prompt.read_by`).  tokenizer: that made them.

    Raises:
        RunError: an id is beyond a model's embedding.
    """
    for model, size in facts.num_embeddings.items():
        role, known = model.partition("/")[0], facts.num_tokens[model]
        tops = [max(prompt.read_by(role), default=0) for prompt in prompts]
        if num := sum(top >= size for top in tops):
            first = next(top for top in tops if top >= size)
            raise RunError(
                f"{num} prompts hold {tokenizer.convert_ids_to_tokens(first)} {first}, "
                f"for which the {model} has no row: its embedding has {size}"
            )
        if num := sum(top >= known for top in tops):
            first = next(top for top in tops if top >= known)
            say(
                f"! {num} prompts hold {tokenizer.convert_ids_to_tokens(first)} {first}, "
                f"which the {model}'s tokenizer has not: the {model} reads a row that was never "
                "trained"
            )
    renamed = set(facts.renamed_ids)
    if num := sum(not renamed.isdisjoint(prompt.ids) for prompt in prompts):
        say(f"! {num} prompts hold special tokens that mean others to a teacher, which reads those")
    special = {token for token in tokenizer.all_special_tokens if token.strip()}
    num = sum(any(token in prompt.text for token in special) for prompt in prompts)
    if num:
        say(f"! {num} prompts have special tokens in their text, which are read as such")


def prompt_ids(tokenizer: Any, text: str, templated: bool) -> list[int]:
    """Token ids of a prompt. A chat template has its own BOS; without one the tokenizer adds it,
    not a second time where the text begins with it, and no EOS, after which nothing would come."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not templated, verbose=False)
    if templated:
        return ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    meant = ids[-2:] != [eos, eos] and text.rstrip().endswith(tokenizer.eos_token or "")
    if len(ids) > 1 and ids[-1] == eos and not meant:
        ids = ids[:-1]
    return ids


def check_pair(
    tokenizers: dict[str, Any],
    configs: dict[str, Any],
    generation_configs: dict[str, Any],
    render: Callable[[Any, str], str] | None,
    template_from: str = "student",
    allow_renamed: bool = False,
) -> Report:
    """Compare the student with every other model.

    Args:
        tokenizers, configs, generation_configs: by model name; `student` is one of them.
        render: `render(tokenizer, text)` is a prompt in that tokenizer's chat format; None: prompts
            do not go through a template.
        template_from: whose template is used, `student` or `teacher`.
        allow_renamed: ids may be unlike special tokens, which then are the report's `renamed_ids`.
    """
    report, sample_prompt = Report(), "What is 12 + 34?"
    tokenizer = tokenizers["student"]
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    sizes = {"student's tokenizer": max(names) + 1}
    ends: dict[str, set[int]] = {}
    for model, config in configs.items():
        text_config = config.get_text_config()
        sizes[f"{model}'s head"] = text_config.vocab_size
        report.num_positions = min(report.num_positions, num_positions(text_config))
        report.num_embeddings[model] = text_config.vocab_size
        report.num_tokens[model] = max(tokenizers[model].get_vocab().values()) + 1
        ends[model] = eos_ids(tokenizers[model], config, generation_configs[model])
        inherited = {
            key: value
            for key in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(generation_configs[model], key, None)) not in (None, 1.0)
        }
        if model == "student" and inherited:
            report.facts.append(f"generation_config of the student is not used: {inherited}")
    report.valid_vocab = min(sizes.values())
    report.eos_ids = {model: tuple(sorted(found)) for model, found in ends.items()}
    every_end = sorted(set().union(*ends.values()))
    shown = {
        model: _shown(report, model, each, render, template_from, sample_prompt)
        for model, each in tokenizers.items()
        if render is not None
    }
    for model, other in tokenizers.items():
        if model != "student":
            _compare(report, tokenizer, names, model, other, sample_prompt, allow_renamed)
            if render is not None:
                _compare_templates(report, model, shown["student"], shown[model], template_from)
            if ends[model] != ends["student"]:
                report.warnings.append(
                    f"EOS differs: student {_named(names, ends['student'])}, {model} "
                    f"{_named(names, ends[model])}; a completion ends at any of them. Where the "
                    f"{model} never emits the student's EOS, the student is taught not to stop: "
                    "watch truncated_share, or fine-tune the student on the chat format first"
                )
    if not every_end:
        report.warnings.append(
            "no model has an EOS id: every completion runs to --max-completion-tokens"
        )
    elif every_end[-1] >= report.valid_vocab:
        report.errors.append(
            f"EOS ids {every_end} reach beyond the {report.valid_vocab} ids that all share"
        )
    report.facts.append(
        f"ids 0..{report.valid_vocab - 1} are in use ("
        + ", ".join(f"{name} {size}" for name, size in sizes.items())
        + f"); EOS {_named(names, set(every_end))}"
    )
    return report


def _compare(
    report: Report,
    tokenizer: Any,
    names: dict[int, str],
    model: str,
    other: Any,
    sample_prompt: str,
    allow_renamed: bool,
) -> None:
    other_names = {index: token for token, index in other.get_vocab().items()}
    shared = min(report.valid_vocab, max(other_names) + 1)
    unlike = [i for i in range(shared) if names.get(i) != other_names.get(i)]
    if unlike:
        shown = ", ".join(f"{i}: {names.get(i)!r} and {other_names.get(i)!r}" for i in unlike[:3])
        what = f"{len(unlike)} of {shared} ids (id {shown}{', ...' * (len(unlike) > 3)})"
        added = tokenizer.added_tokens_decoder, other.added_tokens_decoder
        special = all(
            i in ours or i not in known
            for i in unlike
            for ours, known in zip(added, (names, other_names))
        )
        if not (special and allow_renamed):
            report.errors.append(
                f"the tokenizers of student and {model} differ on {what}; token-level "
                "distillation needs one token-to-id map"
                + "; all of these are special tokens: --allow-renamed-tokens goes on, and leaves "
                "positions with one of them out of the loss" * special
            )
            return
        ends = set(report.eos_ids["student"]) & set(report.eos_ids[model])  # these mean the same
        report.renamed_ids |= set(unlike) - ends
        report.warnings.append(
            f"student and {model} have other special tokens at {what}: positions where one of them "
            "was sampled are left out of the loss, and counted in num_untrained_tokens"
        )
    if shared < report.valid_vocab:
        report.warnings.append(
            f"the {model}'s tokenizer ends at id {shared - 1}, the student's goes on: later ids "
            "are masked for both"
        )
        report.valid_vocab = shared
    if tokenizer.encode(sample_prompt) != other.encode(sample_prompt):
        report.warnings.append(
            f"student and {model} cut a prompt differently into the same tokens (merges or BOS "
            "differ); the student's cut is used for both"
        )


def _shown(
    report: Report,
    model: str,
    tokenizer: Any,
    render: Callable[[Any, str], str] | None,
    template_from: str,
    text: str,
) -> str | None:
    """A prompt in the format of a model; None where its template, which is not used, raises."""
    if render is None or tokenizer.chat_template is None:
        return text
    used = model.partition("/")[0] == template_from
    try:
        with time_limit("it"):
            shown = render(tokenizer, text)
    except Exception as error:  # templates raise what they like
        why = f"the chat template of {model} does not render a user's message: {one_line(error)}"
        (report.errors if used else report.facts).append(why)
        return None
    if used and text not in shown:
        report.warnings.append(
            f"the question is not in what the chat template of {model} makes of it: {shown!r:.160}"
        )
    if used and "strftime_now" in str(tokenizer.chat_template):
        report.warnings.append(
            f"the chat template of {model} writes today's date: prompts change from day to day"
        )
    return shown


def _compare_templates(
    report: Report, model: str, mine: str | None, theirs: str | None, used: str
) -> None:
    if mine is None or theirs is None:
        return
    if mine == theirs:
        report.facts.append(f"a prompt, as student and {model} render it: {mine!r:.160}")
        return
    at = next(i for i in range(len(mine) + 1) if mine[: i + 1] != theirs[: i + 1])
    around = slice(max(0, at - 20), at + 60)
    who = "student" if used == "teacher" else model
    advice = "" if used == "teacher" else "; --chat-template-from teacher uses the teacher's"
    report.warnings.append(
        f"chat templates differ: student ...{mine[around]!r}, {model} ...{theirs[around]!r}; "
        f"the {who} meets text in the {used}'s format, which it may not know{advice}"
    )


def _named(names: dict[int, str], ids: set[int]) -> str:
    return "{" + ", ".join(f"{names.get(i, '?')} {i}" for i in sorted(ids)) + "}"
