"""Alarms: rules over logged metrics, each with its likely cause and what to try.

`now` is the mean of the last 3 logged values of a metric, `start` that of its first 3, both once
there are 6; NaN is not counted. An alarm goes off once in a run, resumed or not. Thresholds are
chosen so that a run which learns sets off none; the table in docs/metrics.md is made from `ALARMS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

WINDOW = 3


@dataclass
class Series:
    """Of one metric what the rules look at: its size does not grow with the run."""

    num: int = 0
    first: list[float] = field(default_factory=list)  # the first 3
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))
    lowest: float = math.nan
    num_negative: int = 0  # so many of the last ones in a row

    def add(self, value: float) -> None:
        """Take in the next value."""
        self.num += 1
        self.recent.append(value)
        self.num_negative = self.num_negative + 1 if value < 0.0 else 0
        if self.num <= WINDOW:
            self.first.append(value)
        if self.num >= 2 * WINDOW:  # the older half has ended before the last 3 began
            mean = sum(list(self.recent)[:WINDOW]) / WINDOW
            self.lowest = mean if math.isnan(self.lowest) else min(self.lowest, mean)


class History:
    """What is left of every metric so far, and its short means."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Take in one row; infinities may be spelt out, as in `metrics.jsonl`."""
        for key, value in row.items():
            number = float(value) if isinstance(value, (int, float)) or value in _INF else math.nan
            if not math.isnan(number):
                self.series.setdefault(key, Series()).add(number)

    def last(self, key: str, num: int = 1) -> list[float]:
        """The last `num` values, 6 at most; none if there are fewer."""
        values = self.series.get(key, Series()).recent
        return list(values)[-num:] if len(values) >= num else []

    def mean(self, key: str, num: int = WINDOW) -> float:
        """Mean of the last `num` values; NaN (so that every comparison is false) without them."""
        values = self.last(key, num)
        return sum(values) / num if values else math.nan

    def start(self, key: str) -> float:
        """Mean of the first 3 values, NaN before there are 6."""
        series = self.series.get(key, Series())
        return sum(series.first) / WINDOW if series.num >= 2 * WINDOW else math.nan

    def lowest(self, key: str) -> float:
        """The lowest mean of 3 values in a row that ended before the last 3 began."""
        return self.series.get(key, Series()).lowest


_INF = ("inf", "-inf")


@dataclass(frozen=True)
class Alarm:
    """One rule.

    Attributes:
        name: `alarm/NAME` is its key in `metrics.jsonl`.  rule: what has to hold, in words.
        found: what was found, or None.  cause: the likely one.  advice: what to try.
    """

    name: str
    rule: str
    found: Callable[[History], str | None]
    cause: str
    advice: str


def _says(condition: bool, text: str) -> str | None:
    return text if condition else None


def _entropy_collapse(seen: History) -> str | None:
    now, start = seen.mean("student_entropy"), seen.start("student_entropy")
    teacher = seen.mean("teacher_entropy")
    return _says(
        now < 0.25 * start and now < 0.5 * teacher,
        f"student_entropy fell from {start:.3g} to {now:.3g}, the teacher has {teacher:.3g}",
    )


def _length_explosion(seen: History) -> str | None:
    length, before = seen.mean("length_mean"), seen.start("length_mean")
    cut, before_cut = seen.mean("truncated_share"), seen.start("truncated_share")
    return _says(
        length > 1.5 * before and cut > before_cut + 0.2,
        f"length_mean rose from {before:.3g} to {length:.3g}, truncated_share from "
        f"{before_cut:.2f} to {cut:.2f}",
    )


def _kl_spike(seen: History) -> str | None:
    now, lowest = seen.mean("reverse_kl"), seen.lowest("reverse_kl")
    return _says(
        now > 3.0 * lowest + 0.3, f"reverse_kl is {now:.3g}; its lowest mean of 3 was {lowest:.3g}"
    )


def _eos_mismatch(seen: History) -> str | None:
    now, others = seen.mean("eos_log_ratio_mean"), seen.mean("log_ratio_mean")
    return _says(
        now > others + 4.0,
        f"where the student ends, log_ratio is {now:.2f} on average; over all tokens {others:.2f}",
    )


def _teacher_lost(seen: History) -> str | None:
    now, start = seen.mean("teacher_mass"), seen.start("teacher_mass")
    return _says(
        1.0 - now > 1.5 * (1.0 - start) + 0.01,
        f"the teacher's mass on its own top tokens fell from {start:.3f} to {now:.3f}",
    )


def _support_left(seen: History) -> str | None:
    student, teacher = seen.mean("student_mass"), seen.mean("teacher_mass")
    start = seen.start("student_mass")
    return _says(
        student < 0.75 * teacher and student < start - 0.1,
        f"student_mass on the teacher's top tokens fell from {start:.3f} to {student:.3f}; the "
        f"teacher has {teacher:.3f} there",
    )


def _sampler_drift(seen: History) -> str | None:
    now = seen.mean("policy_log_ratio_mean")
    return _says(abs(now) > 0.1, f"policy_log_ratio_mean is {now:+.3f} over 3 steps")


def _all_truncated(seen: History) -> str | None:
    shares = seen.last("truncated_share", WINDOW)
    return _says(
        bool(shares) and min(shares) == 1.0, "no completion ended by itself in the last 3 steps"
    )


def _constant_verifier(value: float) -> Callable[[History], str | None]:
    def found(seen: History) -> str | None:
        rates = seen.last("verifier_pass_rate", 5)
        return _says(
            bool(rates) and set(rates) == {value}, f"verifier_pass_rate was {value:.0f} for 5 steps"
        )

    return found


def _prompt_too_long(seen: History) -> str | None:
    long, num = seen.mean("num_teacher_prompts_too_long", 1), seen.mean("num_rollouts", 1)
    return _says(long > 0.05 * num, f"{long:.0f} of {num:.0f} rollouts do not fit behind a prompt")


def _unverified(seen: History) -> str | None:
    shares = [seen.mean(key, 1) for key in ("unverified_share", "eval/student/unverified_share")]
    worst = max((share for share in shares if share > 0.05), default=math.nan)
    return _says(worst > 0.05, f"{worst:.0%} of the rollouts have no verdict")


def _prompt_misleads(seen: History) -> str | None:
    num = seen.series.get("right_minus_wrong", Series()).num_negative
    now, without = seen.mean("right_minus_wrong"), seen.mean("right_minus_wrong_without_prompt")
    return _says(
        num >= 10 and now < without,
        f"right_minus_wrong was negative in {num} steps in a row, {now:.3g} now; with the "
        f"student's prompt it would be {without:.3g}",
    )


ALARMS = (
    Alarm(
        "entropy_collapse",
        "`student_entropy` now < 0.25 of its start, and < 0.5 of `teacher_entropy`",
        _entropy_collapse,
        "The student becomes sharper than its teacher: too high a learning rate, or a loss that "
        "rewards few tokens.",
        "a lower --lr or --max-grad-norm, more rollouts a step, --temperature 1 and --top-p 1; "
        "top-K losses with --renormalise or --tail bucket",
    ),
    Alarm(
        "length_explosion",
        "`length_mean` now > 1.5 of its start, and `truncated_share` now > its start + 0.2",
        _length_explosion,
        "The student unlearns to stop: the teacher does not know the student's EOS, or writes "
        "longer than --max-completion-tokens.",
        "comparing both EOS sets in the compat lines, --chat-template-from teacher, a larger "
        "--max-completion-tokens, fine-tuning the student on the chat format first",
    ),
    Alarm(
        "kl_spike",
        "`reverse_kl` now > 3 times its lowest mean of 3 + 0.3 nats",
        _kl_spike,
        "The updates overshoot, or the loss that is trained is no divergence to the teacher.",
        "a lower --lr, --warmup-steps, a lower --max-grad-norm, more rollouts a step; top-K losses "
        "with --renormalise or --tail bucket; going back to the last checkpoint before it",
    ),
    Alarm(
        "eos_mismatch",
        "`eos_log_ratio_mean` now > `log_ratio_mean` now + 4 nats",
        _eos_mismatch,
        "Student and teacher end a turn by different tokens, so each step teaches the student not "
        "to stop.",
        "the EOS of both in the compat lines, a teacher of the same chat format, "
        "--chat-template-from teacher; topk_opd has --map-eos",
    ),
    Alarm(
        "teacher_lost",
        "1 - `teacher_mass` now > 1.5 of its start + 0.01",
        _teacher_lost,
        "The student writes prefixes that the teacher does not know, where its advice is noise.",
        "a lower --lr, shorter --max-completion-tokens, a student that starts nearer to the "
        "teacher (fine-tuned on its completions), prefixes of the teacher (tropd)",
    ),
    Alarm(
        "support_left",
        "`student_mass` now < 0.75 of `teacher_mass`, and < its start - 0.1",
        _support_left,
        "The student moves probability to tokens outside of the teacher's top ones, as a top-K "
        "loss without renormalisation or tail makes it.",
        "--renormalise, --tail bucket or --tail score, a larger --support-size, a lower --lr",
    ),
    Alarm(
        "sampler_drift",
        "absolute `policy_log_ratio_mean` now > 0.1 nats",
        _sampler_drift,
        "The weights or the engine that sample are not those that are trained.",
        "fewer --updates-per-rollout, a lower --lr, the same --dtype on both sides; with one "
        "update and the own sampler it is a bug: please report it",
    ),
    Alarm(
        "all_truncated",
        "`truncated_share` = 1 in 3 steps in a row",
        _all_truncated,
        "Completions are cut before they can end, or the student knows no EOS.",
        "a larger --max-completion-tokens (or --max-turns), the EOS and the chat template in the "
        "compat lines",
    ),
    Alarm(
        "verifier_all_wrong",
        "`verifier_pass_rate` = 0 in 5 steps in a row",
        _constant_verifier(0.0),
        "The verifier does not read the student's format, the prompts are too hard, or the answers "
        "are in another field.",
        "--verifier, --answer-field, samples.jsonl: is a right completion called wrong?",
    ),
    Alarm(
        "verifier_all_right",
        "`verifier_pass_rate` = 1 in 5 steps in a row",
        _constant_verifier(1.0),
        "The prompts are too easy, or the verifier accepts anything.",
        "harder --prompts, another --verifier, samples.jsonl: is a wrong completion called right?",
    ),
    Alarm(
        "unverified",
        "`unverified_share` of a step or of an evaluation > 0.05",
        _unverified,
        "The verifier throws or runs into its time limit, or rows have no right answer.",
        "the first failures in the log above, --verifier-timeout-s, --answer-field",
    ),
    Alarm(
        "prompt_too_long",
        "`num_teacher_prompts_too_long` of a step > 0.05 of its `num_rollouts`",
        _prompt_too_long,
        "What a function of --teacher-prompt returns grows with what was written, beyond what the "
        "models' positions leave beside a completion: nothing of these rollouts is trained.",
        "a function that cuts what it quotes, a lower --max-completion-tokens",
    ),
    Alarm(
        "prompt_misleads",
        "`right_minus_wrong` < 0 in 10 steps in a row, and now < "
        "`right_minus_wrong_without_prompt`",
        _prompt_misleads,
        "Under its own prompt the teacher likes wrong rollouts more than right ones: it copies "
        "what it was told, or expects another form of answer.",
        "another --teacher-prompt, --eval-teacher for the gap, samples.jsonl with both prompts",
    ),
)


class Alarms:
    """The alarms of one run.

    Args:
        rows: what is logged already (a resumed run), so that nothing goes off twice.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.seen, self.fired = History(), set[str]()
        for row in rows:
            self.seen.add(row)
            self.fired |= {key.removeprefix("alarm/") for key in row if key.startswith("alarm/")}

    def check(self, row: dict[str, float]) -> list[tuple[Alarm, str]]:
        """Take in one row; the alarms that it sets off for the first time, with what was found."""
        self.seen.add(row)
        found = [
            (alarm, alarm.found(self.seen)) for alarm in ALARMS if alarm.name not in self.fired
        ]
        new = [(alarm, text) for alarm, text in found if text is not None]
        self.fired |= {alarm.name for alarm, _ in new}
        return new


def markdown() -> str:
    """The table of docs/metrics.md: `python -m opd_run.alarms` prints it."""
    rows = [f"| `{a.name}` | {a.rule} | {a.cause} | {a.advice} |" for a in ALARMS]
    return "\n".join(["| alarm | rule | likely cause | try |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
