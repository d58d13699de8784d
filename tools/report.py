"""Runs as one page that opens from disk: numbers, curves, alarms, and rollouts token by token.

    python tools/report.py runs/demo --out report.html
    python tools/report.py RUN [RUN ...] --out report.html --max-tokens 30000

The page is one file: styles, script and data are in it, and its security policy forbids it to fetch
anything. Text of models and data sets is data in it, never markup. Runs that differ in nothing but
the seed are drawn as thin lines with their mean; a run has its folder's name, or that of --label.
"""

from __future__ import annotations

import argparse
import html
import importlib
import json
import math
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import compare_runs  # noqa: E402
from compare_runs import Group, RunData, number, show, spread  # noqa: E402

from opd_run import console, files  # noqa: E402
from opd_run.command import command  # noqa: E402

TEMPLATE = Path(__file__).resolve().parent / "report_page.html"
MOST_POINTS = 1000  # of a curve; a longer one keeps every n-th row
HINTS = {
    "reverse_kl": "exact KL(student to teacher), nats",
    "eval/student/reverse_kl": "exact KL(student to teacher), nats",
    "log_ratio_mean": "log student - log teacher of sampled tokens",
    "verifier_pass_rate": "share of verified training rollouts that are right",
    "length_mean": "tokens of a completion",
    "truncated_share": "completions cut at the limit",
    "grad_norm": "before clipping",
    "student_entropy": "nats",
    "teacher_entropy": "nats, on the student's prefixes",
    "overlap": "of the teacher's and the student's top 32",
    "teacher_mass": "the teacher's probability on its top 32",
    "student_mass": "the student's probability on the teacher's top 32",
    "repetition_share": "4-grams that stood in the completion before",
    "policy_log_ratio_mean": "0 where the sampler has the trained weights",
    "unverified_share": "rollouts without a verdict",
    "gate_mean": "the sign gate",
    "accepted_mean": "share of tokens inside the trust region",
}
HEALTH = (
    "length_mean", "grad_norm", "log_ratio_mean", "student_entropy", "teacher_entropy", "overlap",
    "teacher_mass", "student_mass", "truncated_share", "repetition_share", "policy_log_ratio_mean",
    "gate_mean", "accepted_mean", "divergence_mean", "unverified_share",
)  # fmt: skip
PHASES = ("generate", "teacher", "diagnose", "student", "eval")


# ----------------------------------------------------------------------------------------- data
def table_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as columns of numbers (text where JSON has none), every n-th where they are many."""
    stride = max(1, math.ceil(len(rows) / MOST_POINTS))
    last = len(rows) - 1
    rows = [row for place, row in enumerate(rows) if place % stride == 0 or place == last]
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    columns = {
        key: [_plain(row.get(key)) for row in rows] for key in keys if not key.startswith("alarm/")
    }
    return {"steps": [row["step"] for row in rows], "columns": columns}


def _plain(value: Any) -> Any:
    """What JSON has no number for as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def labelled(groups: Sequence[Group]) -> list[tuple[str, RunData]]:
    """Every run with its name on the page, in the order of the groups."""
    return [
        (each.name if len(each.runs) == 1 else f"{each.name}, seed {run.seed}", run)
        for each in groups
        for run in each.runs
    ]


def alarms_of(run: RunData) -> list[dict[str, Any]]:
    """What went off, with what the package says of it."""
    try:
        known = {each.name: each for each in importlib.import_module("opd_run.alarms").ALARMS}
    except ImportError:
        known = {}
    found = []
    for row in run.metrics:
        for key in row:
            name = key.removeprefix("alarm/")
            if name != key:
                rule = known.get(name)
                texts = {k: getattr(rule, k, "") for k in ("rule", "cause", "advice")}
                found.append({"step": row["step"], "name": name} | texts)
        if number(row.get("bad_step")) > 0:
            texts = {"rule": "loss or gradient was not finite", "cause": "", "advice": ""}
            found.append({"step": row["step"], "name": "bad_step"} | texts)
    return found


def spent(run: RunData) -> dict[str, list[float]]:
    """Sampled tokens, in millions, and minutes that were spent up to each evaluation."""
    found: dict[str, list[float]] = {"steps": [], "tokens": [], "minutes": []}
    for evaluated in sorted({row["step"] for row in run.evaluations()}):
        rows = [row for row in run.training() if row["step"] <= evaluated]
        tokens = [number(row.get("num_rollouts")) * number(row.get("length_mean")) for row in rows]
        seconds = [number(row.get("step_s")) for row in rows]
        found["steps"].append(evaluated)
        found["tokens"].append(round(sum(filter(math.isfinite, tokens)) / 1e6, 6))
        found["minutes"].append(round(sum(filter(math.isfinite, seconds)) / 60, 4))
    return found


def deciles(run: RunData) -> list[list[Any]]:
    """Mean log-ratio in each tenth of the completions: of the first and the last ten steps."""
    rows = run.training()
    found: list[list[Any]] = []
    for part in (rows[:10], rows[-10:]):
        means = []
        for tenth in range(10):
            values = [number(row.get(f"log_ratio_decile_{tenth}")) for row in part]
            finite = [each for each in values if math.isfinite(each)]
            means.append(statistics.fmean(finite) if finite else None)
        found.append(means)
    return found if any(each is not None for each in found[0]) else []


def chosen_rollouts(rows: Sequence[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of `tokens.jsonl` up to `most` tokens, and how many are left out.

    First and last evaluation come first, then training rollouts spread over the run, then the other
    evaluations. Rows that a resumed run wrote again replace the older ones.
    """
    unique = {(row["step"], row["phase"], _place(row)): row for row in rows}
    tests = [row for (_, phase, _), row in unique.items() if phase == "eval"]
    steps = sorted({row["step"] for row in tests})
    ends = steps[:1] + steps[1:][-1:]
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in tests:
        if row["step"] in ends:
            pairs.setdefault(_place(row), []).append(row)
    trained = [row for (_, phase, _), row in unique.items() if phase == "train"]
    bits = max(1, len(trained) - 1).bit_length()  # halves, then quarters, ...: always spread
    order = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(2**bits)]
    spread_out = [trained[place] for place in order if place < len(trained)]
    between = [row for row in tests if row["step"] not in ends]
    wanted = [*pairs.values(), *([row] for row in [*spread_out, *between])]
    kept: list[dict[str, Any]] = []
    used = 0
    for unit in wanted:
        size = sum(len(row["ids"]) for row in unit)
        if used + size <= most or not kept:
            kept += unit
            used += size
    kept.sort(key=lambda row: (row["phase"], row["step"], row.get("test", ""), row["row"]))
    return kept, len(unique) - len(kept)


def _place(row: dict[str, Any]) -> str:
    """Which prompt of which test set."""
    return f"{row.get('test', '')}/{row['row']}"


def rollout_data(row: dict[str, Any], place: int) -> dict[str, Any]:
    """One row of `tokens.jsonl` for the page; what it does not need stays out."""
    kept = ("step", "phase", "prompt", "answer", "verdict", "ended", "source", "num_tokens")
    data = {key: row[key] for key in kept} | {"run": place, "row": _place(row), "ids": row["ids"]}
    data["prefix"] = row["num_prefix_tokens"]
    if row["completion"] != "".join(row["pieces"].get(str(each), "") for each in row["ids"]):
        data["completion"] = row["completion"]  # what is copied is the text as it was decoded
    if "teacher_prompt" in row:  # where it is another
        data["teacher_prompt"] = row["teacher_prompt"]
    if not all(row["trained"]):
        data["trained"] = row["trained"]
    return data | {
        "student": row["student_logp"],
        "teacher": row["teacher_logp"],
        "logged": row["logged"],
        "support_ids": list(chain.from_iterable(row["support_ids"])),
        "support_student": list(chain.from_iterable(row["support_student_logp"])),
        "support_teacher": list(chain.from_iterable(row["support_teacher_logp"])),
    }


@dataclass
class Tested:
    """A test prompt in the first and in the last evaluation of a run.

    Attributes:
        first, last: rows of `evaluations.jsonl`.  before, after: share of right ones among the
            verified samples; NaN without any.
    """

    first: dict[str, Any]
    last: dict[str, Any]

    def __post_init__(self) -> None:
        self.before, self.after = (share_right(row["verdicts"]) for row in (self.first, self.last))

    def change(self) -> float:
        """By how much the share rose; 0 where one of them is unknown."""
        change = self.after - self.before
        return change if math.isfinite(change) else 0.0

    def counts(self) -> str:
        """Right ones of the verified, before and after, such as 1/4 → 3/4."""
        rows = self.first["verdicts"], self.last["verdicts"]
        return " → ".join(f"{row.count(1)}/{len(row) - row.count(0)}" for row in rows)


def share_right(verdicts: Sequence[int]) -> float:
    """Right ones of the verified samples of a prompt."""
    verified = [each > 0 for each in verdicts if each]
    return sum(verified) / len(verified) if verified else math.nan


def tested(run: RunData) -> list[Tested]:
    """The student's test prompts; none where an evaluation was not logged prompt by prompt.

    Raises:
        RunError: a row of `evaluations.jsonl` lacks something.
    """
    by_step: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}
    try:
        for row in compare_runs.read_jsonl(run.path / "evaluations.jsonl"):
            if row["model"] == "student":
                by_step.setdefault(row["step"], {})[row["test"], row["row"]] = row
        if not by_step:
            return []
        first, last = by_step[min(by_step)], by_step[max(by_step)]
        return [Tested(row, last[place]) for place, row in first.items() if place in last]
    except (KeyError, TypeError) as error:
        problem = f"{run.path}/evaluations.jsonl: a row without {error}"
        raise console.RunError(problem, 2) from None


NUM_BINS = 20  # of a histogram, at most


def histograms(every: Sequence[Sequence[Tested]]) -> dict[str, Any]:
    """Lengths of completions as shares of equal bins, which are the same for all runs.

    Returns:
        `middles` of the bins and their `width`, tokens; `shares`, of each run that of the first
        and, if there is another, of the last evaluation, [2, bins]. Empty without lengths.
    """
    ends = [[[each.first for each in found], [each.last for each in found]] for found in every]
    if all(each.first is each.last for found in every for each in found):
        ends = [found[:1] for found in ends]
    lengths = [
        [[length for row in rows for length in row["lengths"]] for rows in found] for found in ends
    ]
    flat = [length for found in lengths for part in found for length in part]
    if not flat:
        return {}
    low, num_values = min(flat), max(flat) - min(flat) + 1
    width = math.ceil(num_values / NUM_BINS)
    bins = range(math.ceil(num_values / width))
    shares = []
    for found in lengths:
        counted = [(Counter((n - low) // width for n in part), max(1, len(part))) for part in found]
        shares.append([[round(count[b] / size, 5) for b in bins] for count, size in counted])
    middles = [low + b * width + (width - 1) / 2 for b in bins]
    return {"middles": middles, "width": width, "shares": shares}


def page_data(groups: Sequence[Group], max_tokens: int) -> dict[str, Any]:
    """Everything that the script of the page draws."""
    every = labelled(groups)
    members = iter(range(len(every)))
    data: dict[str, Any] = {
        "groups": [{"name": g.name, "runs": [next(members) for _ in g.runs]} for g in groups],
        "runs": [],
        "rollouts": [],
        "left_out": 0,
        "hints": HINTS,
    }
    for place, (name, run) in enumerate(every):
        rows = compare_runs.read_jsonl(run.path / "tokens.jsonl")
        try:
            kept, left_out = chosen_rollouts(rows, max_tokens // len(every))
            data["rollouts"] += [rollout_data(row, place) for row in kept]
        except (KeyError, TypeError) as error:
            problem = f"{run.path}/tokens.jsonl: a row without {error}"
            raise console.RunError(problem, 2) from None
        data["left_out"] += left_out
        pieces: dict[str, str] = {}
        for row in kept:
            pieces |= row["pieces"]
        data["runs"].append(
            {
                "name": name,
                "train": table_of(run.training()),
                "eval": table_of([row for row in run.metrics if "loss" not in row]),
                "alarms": alarms_of(run),
                "pieces": pieces,
                "spent": spent(run),
                "deciles": deciles(run),
            }
        )
    scores = [key for key in compare_runs.default_keys(groups) if key.startswith("eval/")]
    if len(of_n := [key for key in scores if "avg@" in key]) > 1:
        joint = re.sub(r"\d+$", "n", of_n[0])  # for any n an estimate of the same number
        for run in data["runs"]:
            columns = run["eval"]["columns"]
            if own := next((key for key in of_n if key in columns), None):
                columns[joint] = columns[own]
        scores = [joint, *(key for key in scores if key not in of_n)]
        data["hints"] = HINTS | {
            joint: "n differs: " + ", ".join(each.rpartition("@")[2] for each in of_n)
        }
    keys = {
        key for run in data["runs"] for part in ("train", "eval") for key in run[part]["columns"]
    }
    learning = [*scores, "reverse_kl", "verifier_pass_rate"]
    data["learning"] = [key for key in learning if key in keys]
    data["lengths"] = histograms([tested(run) for _, run in every])
    data["scores"] = scores[:1]
    data["health"] = [key for key in HEALTH if key in keys]
    data["keys"] = sorted(keys)
    return data


# ----------------------------------------------------------------------------------------- page
def in_script(data: Any) -> str:
    """JSON that ends no script element, with no character that HTML or JavaScript reads apart.

    A surrogate without its other half, which is no text, becomes U+FFFD: browsers stumble over it.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """An HTML table of escaped cells; a row that starts with a tab is one run of the row above."""

    def cells(tag: str, row: Sequence[str]) -> str:
        found = []
        for place, cell in enumerate(row):
            which = " class=text" if place in text else ""
            shown = html.escape(cell.strip()).replace("± ", "±&nbsp;")  # breaks before, not after
            found.append(f"<{tag}{which}>{shown}</{tag}>")
        return "".join(found)

    body = "".join(
        f"<tr{' class=one' if row[0].startswith(chr(9)) else ''}>{cells('td', row)}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="card scroll"><table><thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def summary_part(groups: Sequence[Group]) -> str:
    """A row per group, and one per run where it has several; then where they are from."""
    keys = compare_runs.columns(groups)
    rows = []
    for each in groups:
        found = [compare_runs.summary(run) for run in each.runs]
        values = [spread([one.get(key, math.nan) for one in found], key) for key in keys]
        seeds = ", ".join(str(run.seed) for run in each.runs)
        rows.append([each.name, seeds, *values, str(sum(len(alarms_of(r)) for r in each.runs))])
        for run, one in zip(each.runs, found) if len(found) > 1 else ():
            shown = [show(one.get(key, math.nan), key) for key in keys]
            rows.append([f"\t{run.path.name}", str(run.seed), *shown, str(len(alarms_of(run)))])
    head = ["", "student", "teacher", "prompts", "learning rate", "steps"]
    facts = [
        [each.name, *(compare_runs.short(each.runs[0].args.get(key, "-"))
                      for key in ("student", "teacher", "prompts", "lr")),
         str(max(row["step"] for row in each.runs[0].metrics))]
        for each in groups
    ]  # fmt: skip
    differ = compare_runs.differences(groups)
    unlike = [["differences", *(each.name for each in groups)], *differ] if differ else []
    commands = "".join(
        f"<h3>{html.escape(name)}</h3><pre>{html.escape(command_of(run))}</pre>"
        for name, run in labelled(groups)
    )
    origin = [
        [str(run.path), str(run.seed), str(run.args.get("student")), _text(run.args.get("teacher")),
         str(run.environment.get("commit"))[:10] + " dirty" * bool(run.environment.get("dirty")),
         f"torch {run.environment.get('torch')}, {run.environment.get('device')}"]
        for each in groups for run in each.runs
    ]  # fmt: skip
    notes = "".join(f"<p>! {html.escape(line)}</p>" for line in compare_runs.warnings(groups))
    several = any(len(each.runs) > 1 for each in groups)
    note = '<p class="soft">± is the sample standard deviation over seeds.</p>' if several else ""
    heads = ["run", "seed", "student", "teacher", "commit", "on"]
    heads_of = [each.name for each in groups]
    numbers = turned(["", "seeds", *keys, "alarms"], rows)
    parts = [
        f'<h2 id="numbers">In numbers</h2>{numbers}{note}{notes}',
        held_out_part(groups),
        ('<h2 id="differences">Differences</h2>' + table(["flag", *heads_of], unlike[1:]))
        * bool(unlike),
        won_part(groups),
    ]
    return (
        table(head, facts, text=range(1, 4))
        + '<div class="beside">'
        + "".join(f"<section>{part}</section>" for part in parts if part)
        + "</div>"
        + f"<details><summary>the commands</summary>{commands}</details>"
        + "<details><summary>where these runs are from</summary>"
        + table(heads, origin, text=range(2, 6))
        + "</details>"
    )


def turned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a column for each of the rows: numbers are many, runs few."""
    if len(rows) > 8:  # too many columns
        return table(head, rows)
    names = [row[0].strip() for row in rows]
    return table(["", *names], [[each, *cells] for each, *cells in list(zip(head, *rows))[1:]])


def command_of(run: RunData) -> str:
    """What was typed to start a run, to copy."""
    return shlex.join(["python", *run.argv]) if run.argv else "not recorded"


def held_out_part(groups: Sequence[Group]) -> str:
    """avg@n and pass@k before and after, of each test set and domain; avg@n with its interval."""
    names: dict[str, None] = {}
    for each in groups:
        for run in each.runs:
            for row in run.evaluations():
                names |= dict.fromkeys(k for k in row if re.search(r"(^|/)(avg|pass)@\d+(/|$)", k))
    rows = []
    for name in names:
        cells = []
        for each in groups:
            ends = []
            for place in (0, -1):
                found = [[row for row in run.evaluations() if name in row] for run in each.runs]
                values = [number(some[place][name]) for some in found if some]
                text = spread(values, name)
                if len(values) == 1 and len(each.runs) == 1:
                    text += interval(values[0], name, found[0][place])
                ends.append(text)
            cells.append("\u00a0→ ".join(dict.fromkeys(ends)))
        rows.append([name, *cells])
    if not rows:
        return ""
    rows = [row for row in rows if "pass@1" not in re.split("/", row[0])]  # it is avg@n
    note = (
        "In brackets: 95 % Wilson interval for as many independent prompts as were tested; the "
        "samples of a prompt count as one."
    )
    return (
        '<h2 id="held-out">Held-out, by test set, domain and k</h2>'
        + table(["", *(each.name for each in groups)], rows)
        + f'<p class="soft">{note}</p>'
    )


MOST_SHOWN = 10  # test prompts that were won, and that were lost


def won_part(groups: Sequence[Group]) -> str:
    """How many test prompts became right or wrong between the first and the last evaluation, and
    those that changed most."""
    counts, details = [], ""
    for name, run in labelled(groups):
        found = [each for each in tested(run) if each.first is not each.last]
        for test in dict.fromkeys(each.first["test"] for each in found):
            ends = Counter(
                (each.before >= 0.5, each.after >= 0.5)
                for each in found
                if each.first["test"] == test and math.isfinite(each.before + each.after)
            )
            order = ((False, True), (True, False), (True, True), (False, False))
            counts.append([name, test, *(str(ends[each]) for each in order)])
        by_change = sorted(found, key=Tested.change)
        lost = [each for each in by_change[:MOST_SHOWN] if each.change() < 0]
        won = [each for each in by_change[::-1][:MOST_SHOWN] if each.change() > 0]
        heads = ["right", "prompt", "right answer", "first sample before, its end", "after"]
        shown = [
            [each.counts(), each.first["prompt"], _text(each.first["answer"]),
             each.first["completion_end"], each.last["completion_end"]]
            for each in won + lost
        ]  # fmt: skip
        if shown:
            summary = f"{name}: prompts that changed most, {len(won)} up and {len(lost)} down"
            details += f"<details><summary>{html.escape(summary)}</summary>"
            details += table(heads, shown, text=range(1, 5)) + "</details>"
    if not counts:
        return ""
    note = (
        "A prompt counts as right where at least half of its verified samples are. Won: wrong in "
        "the first evaluation, right in the last. The random numbers of both are the same, but "
        "samples are still a draw: some prompts change by chance."
    )
    heads = ["", "test set", "won", "lost", "right in both", "wrong in both"]
    if not any(row[1] for row in counts):
        heads, counts = [heads[0], *heads[2:]], [[row[0], *row[2:]] for row in counts]
    return (
        '<h2 id="won">Test prompts won and lost</h2>'
        + table(heads, counts)
        + f'<p class="soft">{note}</p>'
        + details
    )


def interval(mean: float, name: str, row: dict[str, Any]) -> str:
    """The Wilson interval of an avg@n over all domains; empty if prompts were not counted."""
    found = re.fullmatch(r"(.*/)?avg@(\d+)", name)
    rollouts = number(row.get(f"{found[1] or ''}num_rollouts")) if found else math.nan
    if not found or not math.isfinite(mean + rollouts) or not rollouts:
        return ""
    num, z = rollouts / int(found[2]), 1.96
    middle = (mean + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num))
    ends = f"[{max(0.0, middle - half):.2f}, {min(1.0, middle + half):.2f}]"
    return f" {ends}".replace(" ", "\u00a0")  # lines break at the arrow


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def alarms_part(groups: Sequence[Group]) -> str:
    """The table of alarms, or that there is none."""
    rows = [
        [name, str(alarm["step"]), alarm["name"], alarm["rule"],
         " ".join(filter(None, [alarm["cause"], alarm["advice"]]))]
        for name, run in labelled(groups) for alarm in alarms_of(run)
    ]  # fmt: skip
    if not rows:
        return "<p>No alarm went off.</p>"
    heads = ["alarm in", "step", "alarm", "rule", "likely cause, what to try"]
    return "<h2 id=alarms>Alarms</h2>" + table(heads, rows, text=(2, 3, 4))


def time_part(groups: Sequence[Group]) -> str:
    """Seconds by phase: a bar for each run and the numbers."""
    bars, rows = [], []
    for name, run in labelled(groups):
        seconds = {
            phase: math.fsum(
                value
                for row in run.metrics
                if math.isfinite(value := number(row.get(f"{phase}_s")))
            )
            for phase in PHASES
        }
        whole = sum(seconds.values())
        speeds = [number(row.get("tokens_per_s")) for row in run.training()]
        speeds = [each for each in speeds if math.isfinite(each)]
        peaks = [number(row.get("peak_memory_mib")) for row in run.training()]
        if whole == 0.0:
            continue
        cells = "".join(
            f'<span style="width:{100 * part / whole:.2f}%;background:var(--c{place})">'
            f"{phase if part > 0.08 * whole else ''}</span>"
            for place, (phase, part) in enumerate(seconds.items())
            if part > 0.0
        )
        bars.append(f'<h3>{html.escape(name)}</h3><div class="bar">{cells}</div>')
        parts = [f"{part:.1f} s ({part / whole:.0%})" for part in seconds.values()]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        peak = f"{max(peaks):,.0f}" if peaks else "-"
        rows.append([name, *parts, f"{whole:.1f} s", speed, peak])
    if not rows:
        return "<p>No training step was logged.</p>"
    legend = "".join(
        f'<span><span class="key" style="background:var(--c{place})"></span>{phase}</span>'
        for place, phase in enumerate(PHASES)
    )
    heads = ["", *PHASES, "all", "tokens/s (median)", "peak MiB"]
    return f'<div class="legend">{legend}</div>{"".join(bars)}{table(heads, rows)}'


def title_of(groups: Sequence[Group]) -> str:
    """One line, whatever the names are."""
    names = ", ".join(each.name for each in groups)
    return names if len(names) <= 60 else f"{len(groups)} groups of runs"


def render(groups: Sequence[Group], max_tokens: int = 30000) -> str:
    """The page."""
    every = [run for each in groups for run in each.runs]
    num = f"{len(every)} run{'s' if len(every) > 1 else ''}"
    parts = {
        "title": html.escape("OPD report: " + title_of(groups)),
        "subtitle": html.escape(f"{num}: " + ", ".join(str(run.path) for run in every)),
        "summary": summary_part(groups),
        "alarms": alarms_part(groups),
        "time": time_part(groups),
        "data": in_script(page_data(groups, max_tokens)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    # One pass: what a run says is not searched for places to fill.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    return page.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, write the page, say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="[report.html]")
    parser.add_argument(
        "--max-tokens", type=int, default=30000, metavar="N",
        help="most tokens of rollouts in the page, of all runs together [30000]: 4 MB",
    )  # fmt: skip
    compare_runs.add_label(parser)
    args = parser.parse_args(argv)
    page = render(compare_runs.group(compare_runs.load_all(args.runs, args.label)), args.max_tokens)
    out = Path(args.out)
    try:
        files.write_atomically(out, page)
    except OSError as error:
        raise console.RunError(f"--out {out}: {console.one_line(error)}", 2) from None
    print(f"report: {out} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
