"""Runs to a table: mean and spread over seeds, and a plot.

    python tools/compare_runs.py runs/opd/* runs/tropd/*
    python tools/compare_runs.py RUN RUN --label before --label after
    python tools/compare_runs.py RUN [RUN ...] --csv compare.csv --plot compare.png --key grad_norm

Runs that differ in nothing but the seed (same script, same flags) are one group, a row. A cell is
the mean over its runs and, from two runs on, the sample standard deviation. A group is named after
its run folder, or by --label; the flags in which groups differ have a table of their own.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from opd_run import console
from opd_run.command import command

OWN_FLAGS = ("seed", "run_dir", "resume", "overwrite", "debug", "dry_run", "report_to")
"""Flags that are a run's own: they name it, or change nothing that it computes."""


@dataclass
class RunData:
    """What is in a run folder. `metrics` holds training rows and evaluation rows, as logged."""

    path: Path
    method: str
    args: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    script: str = ""  # hash of the copy of the method file
    argv: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def seed(self) -> int:
        return int(self.args.get("seed", 0))

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) where `key` is a finite number."""
        pairs = ((row["step"], number(row.get(key))) for row in self.metrics)
        return [(int(step), value) for step, value in pairs if math.isfinite(value)]

    def training(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.metrics if "loss" in row]

    def evaluations(self, who: str = "student") -> list[dict[str, Any]]:
        """Evaluations without their prefix, `step` included; those of all test sets are one."""
        prefix = f"eval/{who}/"
        found: dict[int, dict[str, Any]] = {}
        for row in self.metrics:
            part = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            if part:
                found.setdefault(row["step"], {"step": row["step"]}).update(part)
        return list(found.values())


def number(value: Any) -> float:
    """A logged value as a float; NaN where there is none ("nan" and "inf" are logged as text)."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a kill cut short is left out.

    Raises:
        RunError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("expected an object with a step")
        except ValueError as error:
            raise console.RunError(
                f"{path}: line {place}: {console.one_line(error, 120)}", 2
            ) from None
        rows.append(row)
    return rows


def load_all(folders: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[RunData]:
    """Run folders, with `labels` in their order, else named after their folders.

    Raises:
        RunError: see `load`; or the number of labels is another one.
    """
    if labels and len(labels) != len(folders):
        raise console.RunError(f"--label: {len(folders)} runs, {len(labels)} labels", 2)
    loaded = [load(folder) for folder in folders]
    for run, label in zip(loaded, labels or ()):
        run.label = label
    return loaded


def load(folder: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        RunError: it is missing, is no run folder, or has not logged anything (exit code 2).
    """
    path = Path(folder)
    if not path.is_dir():
        raise console.RunError(f"{path}: no such folder", 2)
    try:
        record = json.loads((path / "args.json").read_text(encoding="utf-8"))
        args, environment = record["args"], record["environment"]
    except FileNotFoundError:
        raise console.RunError(f"{path}: not a run folder (no args.json)", 2) from None
    except (ValueError, KeyError, TypeError) as error:
        raise console.RunError(f"{path}/args.json: {console.one_line(error, 120)}", 2) from None
    metrics = read_jsonl(path / "metrics.jsonl")
    if not metrics:
        raise console.RunError(f"{path}: no rows in metrics.jsonl: nothing has been logged", 2)
    scripts = [each for each in sorted(path.glob("*.py")) if not each.name.startswith("before_")]
    text = scripts[0].read_bytes() if scripts else b""
    return RunData(
        path=path,
        method=scripts[0].stem if scripts else "run",
        args=args,
        environment=environment,
        metrics=metrics,
        script=hashlib.sha256(text).hexdigest(),
        argv=[str(each) for each in record.get("argv") or ()],
    )


@dataclass
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[RunData]

    def curve(self, key: str) -> list[tuple[int, float]]:
        """The mean at the steps that all runs with the key have: others would make it jump."""
        every = [dict(run.series(key)) for run in self.runs]
        every = [each for each in every if each]
        steps = sorted(set.intersection(*map(set, every))) if every else []
        return [(step, statistics.fmean(each[step] for each in every)) for step in steps]


def group(loaded: Sequence[RunData]) -> list[Group]:
    """Runs by script and flags, in the order given; named by their labels or folders."""
    places: dict[str, list[RunData]] = {}
    for run in loaded:
        flags = {key: value for key, value in run.args.items() if key not in OWN_FLAGS}
        key = json.dumps([run.script, run.method, flags], sort_keys=True)
        places.setdefault(key, []).append(run)
    found = list(places.values())
    names = [_name(members) for members in found]
    for num in range(2, 9):  # as much of the path as tells them apart
        twice = {name for name in names if names.count(name) > 1}
        for place, members in enumerate(found):
            if names[place] in twice and not members[0].label:
                names[place] = "/".join(members[0].path.absolute().parts[-num:])
    return [Group(name, members) for name, members in zip(names, found)]


def _name(members: Sequence[RunData]) -> str:
    """The label or folder of a run; what those of several seeds begin with."""
    names = [run.label or run.path.absolute().name for run in members]
    if len(names) == 1:
        return names[0]
    start = re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", _common_start(names))
    return start or members[0].method


def _common_start(names: Sequence[str]) -> str:
    same = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*names))
    return "".join(each[0] for each in same)


def differences(groups: Sequence[Group]) -> list[list[str]]:
    """A row for each flag in which groups differ: its name, then its value in each."""
    if len(groups) < 2:
        return []
    firsts = [each.runs[0] for each in groups]
    rows = [["method", *(run.method for run in firsts)]]
    keys = dict.fromkeys(key for run in firsts for key in run.args if key not in OWN_FLAGS)
    for key in keys:
        values = [run.args.get(key, "-") for run in firsts]
        shown = [short(value) for value in values]
        whole = [str(value) for value in values]
        rows.append([f"--{key.replace('_', '-')}", *(shown if len(set(shown)) > 1 else whole)])
    return [row for row in rows if len(set(row[1:])) > 1]


def short(value: Any) -> str:
    """A flag's value for a table: of a path its last part."""
    if isinstance(value, list):
        return ",".join(short(each) for each in value)
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


OF_A_TEST_SET = [
    re.compile(f"([^/]+/)?{name}")
    for name in (r"avg@\d+", "reverse_kl", "length_mean", "truncated_share")
]
"""Keys of an evaluation that the summary has, in its order; `NAME/` before them is a test set's."""


def summary(run: RunData) -> dict[str, float]:
    """One number each: accuracy and divergence before and after, lengths, tokens, seconds."""
    student, teacher = run.evaluations(), run.evaluations("teacher")
    rows, found = run.training(), {}
    every = dict.fromkeys(key for row in student for key in row)
    for key in [key for wanted in OF_A_TEST_SET for key in every if wanted.fullmatch(key)]:
        test, name = key.rpartition("/")[::2]
        first, last = number(student[0].get(key)), number(student[-1].get(key))
        key = key.replace("length_mean", "length").replace("truncated_share", "cut")
        if len(student) == 1:  # --eval-only: nothing came after
            found[key] = first
        elif name in ("length_mean", "truncated_share"):
            found[f"{key} after"] = last
        else:
            found |= {f"{key} before": first, f"{key} after": last}
        if teacher and name.startswith("avg@"):
            found[f"{key} teacher"] = of_teacher = number(teacher[0].get(key))
            if len(student) > 1 and of_teacher > first:
                closed = (last - first) / (of_teacher - first)
                found[f"{test}/gap closed".lstrip("/")] = closed
    found["steps"] = float(max((row["step"] for row in run.metrics), default=0))
    if rows:
        norms = [number(row.get("grad_norm")) for row in rows]
        finite = [each for each in norms if math.isfinite(each)]
        found["grad norm median"] = statistics.median(finite) if finite else math.nan
        found["bad steps"] = sum(number(row.get("bad_step", 0.0)) for row in rows)
        found["sampled tokens"] = sum(
            number(row.get("num_rollouts")) * number(row.get("length_mean")) for row in rows
        )
        seconds = [number(row.get("step_s")) + number(row.get("eval_s", 0.0)) for row in rows]
        found["seconds"] = sum(each for each in seconds if math.isfinite(each))
    return found


COUNTS = ("steps", "bad steps", "sampled tokens", "seconds")
OF_THE_RUN = (*COUNTS, "grad norm median")


def show(value: float, key: str = "") -> str:
    """The number under `key` for a table; '-' where there is none."""
    if not math.isfinite(value):
        return "-"
    if key in COUNTS or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{4 - len(str(int(abs(value)))) + (abs(value) < 1)}f}"  # four digits


def spread(values: Sequence[float], key: str = "") -> str:
    """Mean and, from two values on, the sample standard deviation; '-' without a number."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    mean = show(statistics.fmean(finite), key)
    if len(finite) == 1 or (key in COUNTS and len(set(finite)) == 1):
        return mean
    return f"{mean} ± {show(statistics.stdev(finite), key)}"


def columns(groups: Sequence[Group]) -> list[str]:
    """The keys of `summary` that any run has, in its order: those of evaluations come first."""
    found = dict.fromkeys(key for each in groups for run in each.runs for key in summary(run))
    return sorted(found, key=lambda key: key in OF_THE_RUN)


def warnings(groups: Sequence[Group]) -> list[str]:
    """What a reader should know before trusting a mean."""
    found = []
    for each in groups:
        seeds = [run.seed for run in each.runs]
        if len(set(seeds)) < len(seeds):
            found.append(f"{each.name}: a seed is there twice ({sorted(seeds)})")
        for what in ("commit", "torch", "device"):
            values = {str(run.environment.get(what)) for run in each.runs}
            if len(values) > 1:
                found.append(f"{each.name}: {what} differs: {', '.join(sorted(values))}")
        ends = {run.metrics[-1]["step"] for run in each.runs}
        if len(ends) > 1:
            found.append(f"{each.name}: runs end at different steps: {sorted(ends)}")
    return found


def text_table(groups: Sequence[Group]) -> str:
    """Plain text: a row per number, a column per group, and the seeds."""
    cells = [["", *[each.name for each in groups]]]
    cells.append(["seeds", *[",".join(str(run.seed) for run in each.runs) for each in groups]])
    for key in columns(groups):
        values = [[summary(run).get(key, math.nan) for run in each.runs] for each in groups]
        cells.append([key, *[spread(each, key) for each in values]])
    return aligned(cells)


WIDEST = 28  # characters of a cell in the terminal


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Cells as columns; a long one keeps its beginning and its end."""
    cells = [
        [c if len(c) <= WIDEST else c[: WIDEST // 2 - 1] + ".." + c[1 - WIDEST // 2 :] for c in row]
        for row in cells
    ]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = []
    for row in cells:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        lines.append(f"{row[0]:<{widths[0]}}  {rest}".rstrip())
    return "\n".join(lines)


def write_csv(path: Path, groups: Sequence[Group]) -> None:
    """A row per run with every number of the summary in full."""
    keys = columns(groups)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "run", "seed", *keys])
        for each in groups:
            for run in each.runs:
                found = summary(run)
                writer.writerow([each.name, run.path, run.seed, *[found.get(k, "") for k in keys]])


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", ":", "-.")


def plot(path: Path, groups: Sequence[Group], keys: Sequence[str]) -> None:
    """One panel per key: a thin line per run, a thick one for the mean of a group."""
    matplotlib = console.optional("matplotlib", "--plot")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [key for key in keys if any(run.series(key) for each in groups for run in each.runs)]
    if not shown:
        raise console.RunError(f"--key: no run has a number under {', '.join(keys)}", 2)
    figure, axes = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.6), squeeze=False)
    for axis, key in zip(axes[0], shown):
        for place, each in enumerate(groups):
            colour = COLOURS[place % len(COLOURS)]
            dash = DASHES[place // len(COLOURS) % len(DASHES)]
            for run in each.runs if len(each.runs) > 1 else ():
                axis.plot(
                    *zip(*(run.series(key) or [(0, math.nan)])), color=colour, lw=0.7, alpha=0.5
                )
            curve = each.curve(key) or [(0, math.nan)]
            marker = "o" if len(curve) < 12 else None
            axis.plot(*zip(*curve), color=colour, lw=2, ls=dash, marker=marker, label=each.name)
        axis.set_xlabel("step")
        axis.set_title(key, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    handles, names = axes[0][0].get_legend_handles_labels()  # below: it covers no curve there
    figure.legend(
        handles,
        [name[:60] for name in names],
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(4, len(names)),
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def default_keys(groups: Sequence[Group]) -> list[str]:
    """Held-out accuracy and divergence, and the two training curves that every method has."""
    keys = [key for each in groups for run in each.runs for row in run.metrics for key in row]
    score = [key for key in keys if re.fullmatch(r"eval/student/([^/]+/)?avg@\d+", key)]
    first = score[0].rpartition("@")[0] if score else ""  # of one test set; runs may differ in n
    score = [key for key in dict.fromkeys(score) if key.rpartition("@")[0] == first]
    return [*score, "eval/student/reverse_kl", "reverse_kl", "length_mean"]


def add_label(parser: argparse.ArgumentParser) -> None:
    """The flag that names runs."""
    parser.add_argument(
        "--label", action="append", metavar="NAME", help="a run's name; one for each [its folder's]"
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the CSV and the plot that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--csv", metavar="FILE", help="a row per run, numbers in full")
    parser.add_argument("--plot", metavar="FILE", help="learning curves (.png, .svg, .pdf)")
    parser.add_argument("--key", action="append", metavar="KEY", help="what to plot; repeatable")
    add_label(parser)
    args = parser.parse_args(argv)
    groups = group(load_all(args.runs, args.label))
    files = []
    for name, write in (("csv", write_csv), ("plot", plot)):
        if (to := getattr(args, name)) is not None:
            try:
                keys = ([args.key or default_keys(groups)]) if name == "plot" else []
                write(Path(to), groups, *keys)
            except OSError as error:
                raise console.RunError(f"--{name} {to}: {console.one_line(error)}", 2) from None
            files.append(f"{name}: {to}")
    print(text_table(groups))  # what reads this may end early (`| head`): the files are there
    if differ := differences(groups):
        print(aligned([["differences", *[each.name for each in groups]], *differ]))
    print("± is the sample standard deviation over runs")
    for line in [*(f"! {warning}" for warning in warnings(groups)), *files]:
        print(line)


if __name__ == "__main__":
    main()
