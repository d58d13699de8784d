"""Can this teacher score this student's tokens? The report that every run prints before it trains.

Two models distil token by token only if an id means the same token to both. That is checked here,
with what else goes wrong in practice: different EOS sets, chat templates, vocabulary padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What is known of all models of a run together, before their weights are read.

    Attributes:
        valid_vocab: ids from here on belong to no token that all tokenizers have; they are masked.
        eos_ids: of each model, the ids that it calls end of sequence, in order.
        num_positions: longest sequence, in tokens, that every model has positions for.
    """

    valid_vocab: int
    eos_ids: dict[str, tuple[int, ...]]
    num_positions: float


@dataclass
class Report:
    """Outcome of `check_pair`.

    Attributes:
        valid_vocab: ids from here on belong to no token of both tokenizers and are masked.
        num_positions: longest sequence that every model has positions for.
        eos_ids: of each model, the ids that it calls end of sequence.
        errors: reasons to refuse the pair.  warnings: what will probably hurt, with advice.
        facts: what was found, for the log.
    """

    valid_vocab: int = 0
    num_positions: float = math.inf
    eos_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        marked = [("", self.facts), ("! ", self.warnings), ("!! ", self.errors)]
        return [f"compat: {mark}{text}" for mark, texts in marked for text in texts]

    def all_facts(self) -> Facts:
        """What the run has to know."""
        return Facts(self.valid_vocab, self.eos_ids, self.num_positions)


def eos_ids(tokenizer: Any, config: Any, generation_config: Any) -> set[int]:
    """Every id that the tokenizer, the model's or the generation config calls end of sequence."""
    found: set[int] = set()
    for owner in (tokenizer, config, generation_config):
        value = getattr(owner, "eos_token_id", None)
        values = value if isinstance(value, (list, tuple)) else [value]
        found |= {int(each) for each in values if each is not None}
    return found


def check_pair(
    tokenizers: dict[str, Any],
    configs: dict[str, Any],
    generation_configs: dict[str, Any],
    render: Callable[[Any, str], str] | None,
    template_from: str = "student",
) -> Report:
    """Compare the student with every other model.

    Args:
        tokenizers, configs, generation_configs: by model name; `student` is one of them.
        render: `render(tokenizer, text)` is a prompt in that tokenizer's chat format; None: prompts
            do not go through a template.
        template_from: whose template is used, `student` or `teacher`.
    """
    report, sample_prompt = Report(), "What is 12 + 34?"
    tokenizer = tokenizers["student"]
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    sizes = {"student's tokenizer": max(names) + 1}
    ends: dict[str, set[int]] = {}
    for model, config in configs.items():
        text_config = config.get_text_config()
        sizes[f"{model}'s head"] = text_config.vocab_size
        limit = getattr(text_config, "max_position_embeddings", None) or math.inf
        report.num_positions = min(report.num_positions, limit)
        ends[model] = eos_ids(tokenizers[model], text_config, generation_configs[model])
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
    for model, other in tokenizers.items():
        if model != "student":
            _compare(report, tokenizer, names, model, other, sample_prompt)
            if render is not None:
                mine, theirs = (
                    render(each, sample_prompt) if each.chat_template is not None else sample_prompt
                    for each in (tokenizer, other)
                )
                _compare_templates(report, model, mine, theirs, template_from)
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
) -> None:
    other_names = {index: token for token, index in other.get_vocab().items()}
    shared = min(report.valid_vocab, max(other_names) + 1)
    unlike = [i for i in range(shared) if names.get(i) != other_names.get(i)]
    if unlike:
        first = unlike[0]
        report.errors.append(
            f"the tokenizers of student and {model} differ on {len(unlike)} of {shared} ids "
            f"(id {first}: {names.get(first)!r} and {other_names.get(first)!r}); token-level "
            "distillation needs one token-to-id map"
        )
        return
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


def _compare_templates(report: Report, model: str, mine: str, theirs: str, used: str) -> None:
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
