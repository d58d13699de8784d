"""What came of the rows of `evidence.py`: verdicts, tables, sentences, figures.

Rows are compared within one `numerics` alone, which `same_numerics` chooses.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from claims import (  # noqa: E402
    ARMS,
    CLAIMS,
    DECIDED,
    END,
    ENDS,
    FEWEST,
    FIRST_SEED,
    HALF_WIDTH,
    LADDER,
    MOST,
    RATES,
    START,
    STUDIES,
    SUPPORT,
    SWEPT,
    TEACHER,
    TEACHERS,
    VOCABULARY,
    Comparison,
    Sweep,
)
from rows import RESULTS, Row, half_width, markdown, spread, student_t  # noqa: E402

NOT_RUN = "not run"
FIRST_ROWS = dict.fromkeys(  # from before that column: their changes are of several processes,
    # vLLM and frozen models off the device; the last one's second run has the digits of the first
    (
        *("327ce54006", "00e2a3f3b2", "cc762e8cae", "f159ec1230", "2a765ce940", "cfd741aef5"),
        "16c68452b4",
    ),
    "2026-11-21",
)


def best_rates(rows: list[dict[str, str]]) -> dict[str, str]:
    """The learning rate with the best accuracy in a complete sweep of an arm."""
    swept: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "sweep":
            arm, _, rate = row["arm"].partition("@")
            swept.setdefault(arm, {})[rate] = float(row["avg_after"])
    whole = {a: of for a, of in swept.items() if a in SWEPT and {*SWEPT[a].rates} <= {*of}}
    return {arm: max(of, key=of.__getitem__) for arm, of in whole.items()}


def rate_of(arm: str, best: dict[str, str]) -> str | None:
    """The learning rate of an arm: its own, the best of a sweep, or None without a whole sweep."""
    named = ARMS[arm].rate
    return best.get(named) if named in SWEPT else named


def numerics_of(row: Row) -> str:
    """That of a row; "" if the row may be compared with no other."""
    first = "" if row["dirty"] == "True" else FIRST_ROWS.get(row["commit"], "")
    return row.get("numerics") or first


# ==== Tables ======================================================================================


def same_numerics(rows: list[Row], *arms: str) -> list[Row]:
    """The rows of the numerics with the most seeds that all `arms` have, the newest of equals."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == "run" and numerics_of(row):
            groups.setdefault(numerics_of(row), []).append(row)
    best: list[Row] = []
    most = 0
    for group in groups.values():
        seeds = [{row["seed"] for row in group if row["arm"] == arm} for arm in arms]
        if (num_common := len(set.intersection(*seeds))) >= most:
            best, most = group, num_common
    return best if most else []


def of_arm(rows: list[Row], arm: str, column: str) -> dict[str, float]:
    """Seed to value; `gain_per_min` is accuracy gained in a minute of training on a quiet core."""
    mine = {row["seed"]: row for row in rows if row["suite"] == "run" and row["arm"] == arm}
    if column != "gain_per_min":
        return {seed: float(row[column]) for seed, row in mine.items() if row[column]}
    starts = of_arm(rows, "opd", "avg_before").values()  # the same student in all
    if not starts:
        return {}
    start = statistics.mean(starts)
    return {
        seed: 60 * (float(row["avg_after"]) - start) / float(row["train_s"])
        for seed, row in mine.items() if row["train_s"]
    }  # fmt: skip


def table(rows: list[Row], arms: Iterable[str], gains: bool = True) -> str:
    """A Markdown table: arms, seeds, means with intervals; the gain over opd is paired by seed."""
    titles = {
        "avg_after": "accuracy", "pass8_after": "pass@8", "kl_after": "reverse KL to its teacher",
        "length": "length", "truncated": "cut", "grad_norm": "gradient norm",
        "train_s": "training, s",
    }  # fmt: skip
    if gains:
        titles["gain"] = "accuracy minus opd's"
    lines = []
    for arm in arms:
        same = same_numerics(rows, arm)
        mine = of_arm(same, arm, "avg_after")
        if not mine:
            lines.append([arm, NOT_RUN, *["-"] * len(titles)])
            continue
        found = []
        for key in titles:
            values = list(of_arm(same, arm, key).values()) if key != "gain" else []
            if key == "gain" and arm != "opd":
                values = find(rows, Comparison("", arm, "opd")).gains
            missing = f", {len(values)} seeds" if 0 < len(values) < len(mine) else ""
            found.append(spread(values) + missing)
        lines.append([arm, f"{len(mine)}", *found])
    return markdown(["arm", "seeds", *titles.values()], lines)


VERDICTS = ("reproduced", "no difference seen", "not reproduced here")
OURS = ("holds", VERDICTS[1], "does not hold here")


@dataclass(frozen=True)
class Finding:
    """What came of a comparison: both arms and their difference, over the seeds of both."""

    own: list[float]
    other: list[float]

    @property
    def gains(self) -> list[float]:
        """The difference of each seed."""
        return [one - two for one, two in zip(self.own, self.other)]

    @property
    def far_end(self) -> float:
        """Of the interval of the difference, of two seeds or more, without its sign."""
        return abs(statistics.mean(self.gains)) + half_width(self.gains)

    def verdict(self, comparison: Comparison) -> str:
        """One of VERDICTS or OURS: on which side of 0 the interval of the difference lies."""
        if len(self.own) < 2:
            return "too few seeds" if self.own else NOT_RUN
        mean, words = statistics.mean(self.gains), OURS if comparison.ours else VERDICTS
        if half_width(self.gains) >= abs(mean):
            return words[1]
        return words[0] if (mean > 0) == comparison.more else words[2]

    def shown(self, comparison: Comparison) -> str:
        """The verdict; where no difference is seen, with the interval's far end."""
        verdict = self.verdict(comparison)
        if verdict == VERDICTS[1]:
            verdict += f", at most {self.far_end:.3f}"
        return verdict


def find(rows: list[Row], comparison: Comparison) -> Finding:
    """The finding of a comparison, over the seeds that both arms have in one numerics."""
    than = comparison.than
    arms = [arm for arm in (comparison.arm, than) if arm in ARMS]
    same = same_numerics(rows, *map(str, arms))
    own = of_arm(same, comparison.arm, comparison.column)
    if than in (START, TEACHER):
        column = "avg_before" if than == START else "avg_teacher"
        other = of_arm(same, comparison.arm, column)
    elif isinstance(than, str):
        other = of_arm(same, than, comparison.column)
    else:
        other = dict.fromkeys(own, than)
    seeds = [seed for seed in own if seed in other]
    return Finding([own[seed] for seed in seeds], [other[seed] for seed in seeds])


def claim_table(rows: list[dict[str, str]], key: str) -> str:
    """Comparisons of a claim with their verdicts, then its arms."""
    claim = CLAIMS[key]
    titles = "here", "arm", "against", "of the one", "of the other", "difference", "verdict"
    lines = []
    for each in claim.comparisons:
        found = find(rows, each)
        than = f"`{each.than}`" if each.than in ARMS else "a recorded score"
        than = {START: "itself untrained", TEACHER: "its teacher"}.get(str(each.than), than)
        shown = [each.text, f"`{each.arm}`", than]
        shown += [spread(found.own), spread(found.other), spread(found.gains)]
        verdict = f"**{found.shown(each)}**"
        verdict += f", {len(found.own)} seeds" if found.own else ""
        shown.append(f"ours: {verdict}" if each.ours else verdict)
        lines.append(shown)
    parts = [f"Paper: {claim.paper}.", markdown(titles, lines), table(rows, claim.arms, False)]
    run = [
        row for arm in claim.arms for row in same_numerics(rows, arm) if row["arm"] == arm
    ]  # fmt: skip
    if run:
        seconds = [float(row["wall_s"]) for row in run]
        by = Counter(flag_of(row, key) for row in run)
        cells = ", ".join(f"{num} cells of `{flag}`" for flag, num in sorted(by.items()))
        parts.append(
            f"Run, as `python benchmarks/evidence.py --jobs 2` and: {cells}; "
            f"{statistics.median(seconds):.0f} s of wall-clock time each (median; "
            f"{min(seconds):.0f} to {max(seconds):.0f}), "
            f"commits {', '.join(sorted({row['commit'] for row in run}))}."
        )
    return "\n\n".join(parts)


def study_of(row: Row) -> str | None:
    """The study that a row is of: a cell of its arms and seeds, or of the sweep of their rates."""
    arm, _, swept = row["arm"].partition("@")
    for name, study in STUDIES.items():
        if swept:
            found = arm in {ARMS[each].rate for each in study.arms}
        else:
            found = arm in study.arms and int(row["seed"]) in study.seeds
        if found:
            return name
    return None


def flag_of(row: Row, claim: str) -> str:
    """What evidence.py has to be told to run the cell of a row of a claim."""
    if name := study_of(row):
        return f"--study {name}"
    return f"--claim {claim}" if int(row["seed"]) < FIRST_SEED else "--decide"


def hours_table(rows: list[Row]) -> str:
    """A Markdown table: cells and core-hours of every study, with those of its sweep."""
    spent: dict[str, list[float]] = {}
    compared = {arm for each in DECIDED for arm in (each.arm, str(each.than))}
    for row in rows:
        if not row["cpu_s"] or row["suite"] == "again":
            continue
        name = study_of(row)
        if name is None or row["arm"] in compared:
            decides = row["suite"] == "run" and int(row["seed"]) >= FIRST_SEED
            name = "decide" if decides else "claims, and their sweep"
        spent.setdefault(name, []).append(float(row["cpu_s"]) / 3600)
    lines = [[name, f"{len(hours)}", f"{sum(hours):.1f}"] for name, hours in spent.items()]
    total = [each for hours in spent.values() for each in hours]
    lines.append(["all", f"{len(total) or NOT_RUN}", f"{sum(total):.1f}"])
    return str(markdown(["study", "cells", "core-hours"], lines))


def again_table(rows: list[dict[str, str]], key: str) -> str:
    """A Markdown table: the comparisons of a claim, as first run and as run `--again`."""
    again = [row | {"suite": "run"} for row in rows if row["suite"] == "again"]
    numerics = {numerics_of(row) for row in again}
    first = [row for row in rows if numerics_of(row) in numerics or not again]
    lines = []
    for each in CLAIMS[key].comparisons:
        one, two = find(first, each), find(again, each)
        shown = [each.text, f"`{each.arm}` - `{each.than}`", spread(one.gains), spread(two.gains)]
        same = two.verdict(each) == one.verdict(each)
        shown.append("the same" if same else f"**{two.shown(each)}**")
        lines.append(shown)
    return markdown(["here", "difference of", "first run", "second run", "verdict"], lines)


def moved_table(rows: list[Row], key: str) -> str:
    """A Markdown table: accuracies of a claim's arms in the first rows and later, seed by seed.

    These are of two numerics: the change is of the code, and no finding about a method.
    """
    old = {*FIRST_ROWS.values()}
    first = [row for row in rows if numerics_of(row) in old]
    later = [row for row in rows if numerics_of(row) not in old]
    lines = []
    for arm in CLAIMS[key].arms:
        before = of_arm(first, arm, "avg_after")
        again = [row for row in later if row["seed"] in before]
        after = of_arm(same_numerics(again, arm), arm, "avg_after")
        seeds = [seed for seed in before if seed in after]
        one, two = ([of[seed] for seed in seeds] for of in (before, after))
        change = spread([b - a for a, b in zip(one, two)])
        lines.append([arm, f"{len(seeds)}", spread(one), spread(two), change])
    return markdown(["arm", "seeds", "2026-11-21", "later", "change, by seed"], lines)


def sentences(rows: list[Row]) -> str:
    """A Markdown list: one sentence for each claim, what of the paper's came out how."""
    lines = []
    for key, claim in CLAIMS.items():
        came: dict[str, list[str]] = {}
        for each in claim.comparisons:
            if not each.ours:
                found = find(rows, each)
                verdict, _, far = found.shown(each).partition(", ")
                size = spread(found.gains) + f", so {far}" * bool(far)
                text = each.text + f" ({size})" * bool(found.gains)
                came.setdefault(verdict, []).append(text)
        order = [verdict for verdict in (*VERDICTS, "too few seeds") if verdict in came]
        said = [f"{verdict}: {'; '.join(came[verdict])}" for verdict in order]
        if NOT_RUN in came:
            said.append(f"{len(came[NOT_RUN])} not run")
        lines.append(
            f"{key}. {claim.title}. {'. '.join(one[0].upper() + one[1:] for one in said)}."
        )
    return "\n".join(lines)


def in_short(rows: list[Row]) -> str:
    """Three sentences: what is reproduced of the papers, what is not, where nothing is seen."""
    theirs = [each for claim in CLAIMS.values() for each in claim.comparisons if not each.ours]
    found = [(each, find(rows, each)) for each in theirs]
    came = {verdict: [one for one in found if one[1].verdict(one[0]) == verdict]
            for verdict in VERDICTS}  # fmt: skip

    def named(verdict: str) -> str:
        shown = [
            f"`{each.arm}` {each.text} {statistics.mean(one.gains):+.3f}"
            for each, one in came[verdict]
            if each.than in ARMS and each.column == "avg_after"
        ]
        return f" ({'; '.join(shown[:3])}{'; ...' * (len(shown) > 3)})" if shown else ""

    yes, open_, no = (len(came[verdict]) for verdict in VERDICTS)
    fars = [one.far_end for each, one in came[VERDICTS[1]] if each.column == "avg_after"]
    ends = f"{min(fars):.3f} to {max(fars):.3f}" if fars else ""
    far = f" (in accuracy at most {ends}, in either direction)" if fars else ""
    waiting = len(theirs) - yes - open_ - no
    return "\n".join([
        f"- Of {len(theirs)} comparisons that the papers make, rerun with the tiny pair, {yes} are "
        f"reproduced{named(VERDICTS[0])}.",
        f"- {no} are not reproduced here{named(VERDICTS[2])}; nothing is refuted at this size "
        "([docs/evidence.md](docs/evidence.md)).",
        f"- In {open_} no difference is seen{far}" + f"; {waiting} are not run yet" * bool(waiting)
        + ".",
    ])  # fmt: skip


# ==== Studies =====================================================================================


def curves_of(rows: list[Row], arm: str, *others: str) -> list[list[dict[str, Any]]]:
    """The curves of an arm's seeds, of the numerics in which it and `others` have most of them."""
    folder = RESULTS / "evidence"
    paths = [
        folder / row.get("numerics", "") / f"run-{arm}-{row['seed']}.jsonl"
        for row in same_numerics(rows, arm, *others)
        if row["arm"] == arm and row["suite"] == "run"
    ]
    lines = [path.read_text().splitlines() for path in sorted(paths) if path.is_file()]
    return [[json.loads(line) for line in each] for each in lines]


def ladder_rows(rows: list[Row]) -> list[Row]:
    """Rows of the ladder's own seeds: some of its arms have more, which decide about the best."""
    return [row for row in rows if int(row["seed"]) in STUDIES["ladder"].seeds]


def ladder_table(rows: list[Row]) -> str:
    """A Markdown table: from opd to tropd, at opd's rate and each at the best of its own sweep."""
    best, lines, rows = best_rates(rows), [], ladder_rows(rows)
    for text, (arm, _, _) in LADDER.items():
        shown = [text]
        for end in ("", "-best"):
            if arm + end not in ARMS:
                shown += ["-"] * 3
                continue
            mine = of_arm(same_numerics(rows, arm + end), arm + end, "avg_after")
            gains = find(rows, Comparison("", arm + end, f"ladder-opd{end}")).gains
            shown += [best.get(arm + end, "-")] if end else []
            shown += [spread(list(mine.values())) if mine else NOT_RUN]
            shown += ["-" if arm == "ladder-opd" else spread(gains)]
        lines.append(shown)
    titles = "outliers", "at 3e-4", "minus opd's", "best rate", "accuracy there", "minus opd's"
    return str(markdown(titles, lines))


def best_form(rows: list[Row]) -> str | None:
    """The step of the ladder, after its first two, with the best accuracy at its own best rate."""
    found, rows = {}, ladder_rows(rows)
    for arm, _, _ in list(LADDER.values())[2:]:
        mine = of_arm(same_numerics(rows, f"{arm}-best"), f"{arm}-best", "avg_after")
        if len(mine) < len(STUDIES["ladder"].seeds):
            return None
        found[f"{arm}-best"] = statistics.mean(mine.values())
    return max(found, key=found.__getitem__)


def decided(rows: list[Row]) -> list[Comparison]:
    """DECIDED, and tropd's best form against opd as soon as the ladder says which it is."""
    form = best_form(rows)
    text = "tropd's best form above opd, noisy student, each at its best rate"
    return [*DECIDED, *([Comparison(text, form, "ladder-opd-best")] if form else [])]


def seeds_needed(gains: list[float]) -> int:
    """How many seeds a comparison needs, by the spread of its first FEWEST differences.

    So many that a 95 % interval with this standard deviation is at most HALF_WIDTH wide on either
    side, at most MOST; no more than FEWEST where the mean is three half-widths from 0 already.
    """
    first = gains[:FEWEST]
    if len(first) < FEWEST or abs(statistics.mean(first)) >= 3 * half_width(first):
        return FEWEST
    deviation = statistics.stdev(first)
    for num in range(FEWEST, MOST):
        if student_t(num - 1) * deviation / math.sqrt(num) <= HALF_WIDTH:
            return num
    return MOST


def new_rows(rows: list[Row]) -> list[Row]:
    """Rows of seeds from FIRST_SEED on, which no rate and no form was chosen on."""
    return [row for row in rows if int(row["seed"]) >= FIRST_SEED]


def decide_table(rows: list[Row]) -> str:
    """A Markdown table: the comparisons that get as many seeds as they need."""
    lines = []
    for each in decided(rows):
        found = find(new_rows(rows), each)
        shown = [each.text, f"`{each.arm}` - `{each.than}`", f"{len(found.gains)}"]
        if len(found.gains) < 2:
            lines.append([*shown, "-", "-", "-", NOT_RUN])
            continue
        whole = len(found.gains) >= FEWEST
        shown += [f"{seeds_needed(found.gains)}" if whole else f"{FEWEST} first"]
        shown += [f"{statistics.stdev(found.gains):.3f}", spread(found.gains)]
        lines.append([*shown, f"**{found.shown(each)}**"])
    if best_form(rows) is None:
        text = "tropd's best form above opd, noisy student: after the ladder"
        lines.append([text, "-", "0", "-", "-", "-", NOT_RUN])
    titles = "comparison", "difference of", "seeds", "needs", "sd of a pair", "difference"
    return str(markdown([*titles, "verdict"], lines))


SCORE = 0.75  # the time to it is asked


def time_to(curve: list[dict[str, Any]], key: str) -> float | None:
    """`tokens` or `train_s` at which the accuracy first reaches SCORE, between two evaluations."""
    points = [(row[key], row["accuracy"]) for row in curve if "accuracy" in row]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= SCORE:
            return float(x0 + (x1 - x0) * max(0.0, SCORE - y0) / (y1 - y0) if y1 > y0 else x0)
    return None


def end_table(rows: list[Row]) -> str:
    """A Markdown table: where 200 steps end, and what it takes to a given score."""
    best, lines = best_rates(rows), []
    for arm in (*END, *STUDIES["expert"].arms, *STUDIES["more_experts"].arms):
        mine = of_arm(same_numerics(rows, arm), arm, "avg_after")
        shown = [arm, rate_of(arm, best) or "-", f"{len(mine)}" if mine else NOT_RUN]
        shown += [spread(list(mine.values()))]
        for key, unit in (("tokens", 1e6), ("train_s", 60)):
            taken = [time_to(curve, key) for curve in curves_of(rows, arm)]
            reached = [one / unit for one in taken if one is not None]
            never = f", never in {len(taken) - len(reached)}" if len(reached) < len(taken) else ""
            shown.append(spread(reached) + never)
        lines.append(shown)
    to = f"to {SCORE}"
    titles = "arm", "rate", "seeds", "accuracy", f"M tokens {to}", f"minutes of a core {to}"
    return str(markdown(titles, lines))


def ends_table(rows: list[Row]) -> str:
    """A Markdown table: ENDS with their verdicts."""
    lines = []
    for each in ENDS:
        found = find(rows, each)
        shown = [spread(found.gains), f"**{found.shown(each)}**"]
        lines.append([each.text, f"`{each.arm}` - `{each.than}`", f"{len(found.own)}", *shown])
    titles = "at the end", "difference of", "seeds", "difference", "verdict"
    return str(markdown(titles, lines))


def support_table(rows: list[Row]) -> str:
    """A Markdown table: mass on the teacher's top K beside the teacher's, divided by e."""
    lines = []
    for arm in SUPPORT:
        ends = [
            [statistics.mean(row[key] for row in part if key in row)
             for part in (curve[:3], curve[-3:])
             for key in ("student_top", "teacher_top")]
            for curve in curves_of(rows, arm)
        ]  # fmt: skip
        mine = of_arm(same_numerics(rows, arm), arm, "avg_after")
        shown = [arm, f"{len(mine)}" if mine else NOT_RUN, spread([end[0] for end in ends])]
        shown += [spread([end[2] for end in ends]), spread([end[3] / math.e for end in ends])]
        lines.append([*shown, spread(list(mine.values()))])
    titles = "arm", "seeds", "mass, first 3 steps", "mass, last 3", "predicted: teacher's / e"
    return str(markdown([*titles, "accuracy"], lines))


def agreement(rows: list[Row], arm: str) -> list[float]:
    """Of each seed: the share of tokens where teacher and verifier agree, in the first 3 steps."""
    found = []
    for curve in curves_of(rows, arm):
        first = [row for row in curve if "correct_mean" in row][:3]
        sums = [
            sum(row[f"{name}correct_mean"] + row[f"{name}incorrect_mean"] for row in first)
            for name in ("agree_", "")
        ]
        found += [sums[0] / sums[1]] if sums[1] else []
    return found


def gate_gains(rows: list[Row]) -> dict[str, tuple[list[float], Finding, Finding]]:
    """Teacher to agreement, sg_opd against opd, and against its random gate."""
    return {
        name: (
            agreement(new_rows(rows), gated),
            find(new_rows(rows), Comparison("", gated, plain)),
            find(new_rows(rows), Comparison("", gated, random)),
        )
        for name, (_, plain, gated, random) in TEACHERS.items()
    }


def gate_table(rows: list[Row]) -> str:
    """A Markdown table: what the gate gains under teachers of every quality."""
    titles = "teacher", "seeds", "agrees with the verifier", "opd", "sg_opd minus opd"
    return str(markdown([*titles, "sg_opd minus random gate"], [
        [name, f"{len(over.own)}" if over.own else NOT_RUN, spread(agree), spread(over.other),
         spread(over.gains), spread(random.gains)]
        for name, (agree, over, random) in gate_gains(rows).items()
    ]))  # fmt: skip


def study_tables(rows: list[Row]) -> dict[str, str]:
    """Every study's Markdown table, by name."""
    return {
        "ladder": ladder_table(rows),
        "decide": decide_table(rows),
        "end": end_table(rows),
        "ends": ends_table(rows),
        "support": support_table(rows),
        "teachers": gate_table(rows),
        "vocabulary": table(rows, VOCABULARY, False),
        "hours": hours_table(rows),
    }


# ==== Figures =====================================================================================


def draw(rows: list[Row], folder: Path) -> None:
    """Draw every comparison, and the studies that have curves, into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})

    save(draw_comparisons(rows, plt), "evidence")
    steps = list(LADDER.values())[1:]
    mine = ladder_rows(rows)
    gains = [
        (place + shift, colour, find(mine, Comparison("", arm + end, f"ladder-opd{end}")).gains)
        for end, colour, shift in (("", "C0", 0.0), ("-best", "C1", 0.2))
        for place, (arm, _, _) in enumerate(steps)
        if arm + end in ARMS
    ]
    if any(len(values) > 1 for _, _, values in gains):
        figure, one = plt.subplots(figsize=(8, 3.4), layout="constrained")
        for place, colour, values in gains:
            if len(values) > 1:
                one.errorbar(
                    statistics.mean(values),
                    place,
                    xerr=half_width(values),
                    fmt="o",
                    color=colour,
                    capsize=3,
                )
        one.axvline(0, color="black", linewidth=0.8)
        one.set_yticks(range(len(steps)), list(LADDER)[1:])
        one.invert_yaxis()
        one.set_xlabel("accuracy minus opd's")
        one.set_title("at opd's rate, 3e-4 (blue), and each at its best (orange); three seeds, "
                      "95 % intervals", fontsize=9)  # fmt: skip
        save(figure, "evidence_ladder")
    drawn = {arm: curves_of(rows, arm) for arm in (*END, *SUPPORT)}
    if any(drawn[arm] for arm in END):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
        for each, key, unit in zip(axes, ("tokens", "train_s"), (1e6, 60)):
            for number, arm in enumerate(END):
                for at, curve in enumerate(drawn[arm]):
                    points = [(r[key] / unit, r["accuracy"]) for r in curve if "accuracy" in r]
                    label = None if at else arm.removeprefix("end-")
                    each.plot(*zip(*points), color=f"C{number}", linewidth=1, label=label)
        axes[0].set(xlabel="sampled tokens, millions", ylabel="accuracy")
        axes[1].set(xlabel="training, minutes of a core")
        axes[1].legend(fontsize=8)
        save(figure, "evidence_end")
    if any(drawn[arm] for arm in SUPPORT):
        figure, one = plt.subplots(figsize=(8, 3.6), layout="constrained")
        for number, arm in enumerate(SUPPORT):
            for at, curve in enumerate(drawn[arm]):
                kept = [row for row in curve if "student_top" in row]
                steps, label = [row["step"] for row in kept], None if at else arm
                one.plot(steps, [r["student_top"] for r in kept], color=f"C{number}", label=label)
                predicted = [row["teacher_top"] / math.e for row in kept]
                one.plot(steps, predicted, ":", color=f"C{number}")
        one.set(xlabel="step", ylabel="the student's mass on the top K")
        one.set_title("dots: predicted, the teacher's mass / e", fontsize=9)
        one.legend(fontsize=8)
        save(figure, "evidence_support")
    gated = {name: each for name, each in gate_gains(rows).items() if len(each[1].own) > 1}
    if gated:
        figure, one = plt.subplots(figsize=(7, 3.8), layout="constrained")
        places = {name: statistics.mean(agree) for name, (agree, _, _) in gated.items()}
        for number, name in enumerate(sorted(gated, key=lambda name: places[name])):
            ends = []
            for found, colour, shift in zip(gated[name][1:], ("C0", "C1"), (0.0, 0.002)):
                if len(found.own) > 1:
                    mean, width = statistics.mean(found.gains), half_width(found.gains)
                    at = places[name] + shift
                    one.errorbar(at, mean, yerr=width, fmt="o", color=colour, capsize=3)
                    ends += [mean - width, mean + width]
            side = 1 - number % 2 * 2  # neighbours have their names at different ends
            end = max(side * each for each in ends) * side
            one.annotate(name, (places[name], end), (0, 5 * side), textcoords="offset points",
                         ha="center", va="bottom" if side > 0 else "top", fontsize=8)  # fmt: skip
        one.margins(0.12)
        one.axhline(0, color="black", linewidth=0.8)
        one.set_xlabel("share of tokens where teacher and verifier agree, first three steps")
        one.set_ylabel("gain in accuracy")
        one.set_title("sg_opd minus opd (blue), minus its random gate (orange, drawn 0.002 to the "
                      "right); 95 % intervals", fontsize=9)  # fmt: skip
        save(figure, "evidence_gate")


def draw_comparisons(rows: list[Row], plt: Any) -> Any:
    """A figure of every comparison: difference and interval, colour by verdict."""
    measures = {"avg_after": "", "grad_norm": " [gradient norm]", "truncated": " [share cut]",
                "pass8_after": "", "gain_per_min": " [accuracy a minute]"}  # fmt: skip
    colours = dict(zip((*VERDICTS, *OURS), ("#2a7d4f", "#8a8a8a", "#b5382f") * 2))
    bars = []
    compared = [(key, each, rows) for key, claim in CLAIMS.items() for each in claim.comparisons]
    compared += [("9", each, new_rows(rows)) for each in decided(rows)[len(DECIDED) :]]
    compared += [("10", each, rows) for each in ENDS]
    for key, each, of_rows in compared:
        found = find(of_rows, each)
        if len(found.own) > 1:
            arm = "" if int(key) > len(CLAIMS) else f" {each.arm}:"  # whose texts have it
            label = f"{key}.{arm} {each.text}{measures[each.column]}"
            bars.append((label, found, each))
    figure, axes = plt.subplots(figsize=(11, 0.26 * len(bars) + 1.2), layout="constrained")
    for place, (_, found, each) in enumerate(reversed(bars)):
        colour = colours[found.verdict(each)]
        how = {"fmt": "o", "color": colour, "capsize": 3, "mfc": "white" if each.ours else colour}
        axes.errorbar(statistics.mean(found.gains), place, xerr=half_width(found.gains), **how)
    for name in VERDICTS:
        axes.plot([], [], "o", color=colours[name], label=name)
    for name in (OURS[0], OURS[2]):
        axes.plot([], [], "o", color=colours[name], mfc="white", label=f"ours: {name}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)], fontsize=8)
    axes.margins(y=0.01)
    axes.set_xscale("symlog", linthresh=0.05, linscale=1)
    ticks = [-0.6, -0.3, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.3]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("difference, in accuracy or as [ ] says; logarithmic beyond 0.05", loc="right")
    figure.legend(loc="outside upper center", ncols=5)
    return figure


FAILURES = {  # arXiv:2603.25562v2: what goes wrong, the arm that shows it, by which metric
    "share of tokens with a negative advantage": ("opd", "advantage_negative_share"),
    "1st percentile of log_ratio, nats": ("opd", "log_ratio_p1"),
    "99th percentile of log_ratio, nats": ("opd", "log_ratio_p99"),
    "log_ratio in the first tenth of a completion": ("opd-noisy", "log_ratio_decile_0"),
    "log_ratio in the last tenth": ("opd-noisy", "log_ratio_decile_9"),
    "log_ratio at the end token": ("opd-other_end", "eos_log_ratio_mean"),
    "log_ratio of all tokens": ("opd-other_end", "log_ratio_mean"),
    "share of cut completions": ("opd-other_end", "truncated_share"),
}


def failure_table(rows: list[Row]) -> str:
    """A Markdown table of the metrics of FAILURES in the curves: their first and last 3 steps."""
    lines = []
    for text, (arm, key) in FAILURES.items():
        curves = []
        for curve in curves_of(rows, arm):
            found = [row.get(key) for row in curve]
            values = [value for value in found if value is not None and not math.isnan(value)]
            curves += [values] if len(values) >= 6 else []
        ends = [[statistics.mean(v[:3]) for v in curves], [statistics.mean(v[-3:]) for v in curves]]
        lines.append([text, f"`{arm}`", f"{len(curves)}", *map(spread, ends)])
    return markdown(["metric", "arm", "runs", "first 3 steps", "last 3 steps"], lines)


def sweep_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: arms against learning rates, accuracy, the best one in bold."""
    found = {
        tuple(row["arm"].split("@")): float(row["avg_after"])
        for row in rows
        if row["suite"] == "sweep"
    }
    lines = []
    for arm in (arm for arm, how in SWEPT.items() if how == Sweep()):  # of one budget
        scores = [found.get((arm, rate)) for rate in RATES]
        best = max((score for score in scores if score is not None), default=None)
        shown = ["-" if s is None else f"**{s:.3f}**" if s == best else f"{s:.3f}" for s in scores]
        lines.append([arm, *shown])
    return markdown(["arm", *RATES], lines)
