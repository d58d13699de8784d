"""The learning curves of the README, from the committed curves and rows of the evidence.

    python tools/readme_figure.py --out docs/images/learning_curve.png
    python tools/readme_figure.py --plurals runs/plurals-demo --out plurals.png

Without `--plurals`: both objectives of opd.py on the embedded pair, 5 seeds: the share of the
student's rollouts that the verifier calls right, step by step (thin: each seed; thick: their mean
over a window of three steps), and accuracy on the test prompts before and after, with the
teacher's. With it: the same of runs on `assets/plurals`, each [NAME=]a run folder or a file of its
metrics; runs of one name have one colour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import findings  # noqa: E402
from rows import RESULTS, read  # noqa: E402

ARMS = {  # of the evidence: what it is called, and its colour
    "opd": ("loss on the sampled tokens (--objective sampled)", "tab:blue"),
    "opd-full": ("exact divergence at each token (--objective full)", "tab:orange"),
}


def pass_rates(arm: str) -> list[list[float]]:
    """Of each seed: the share of right rollouts, step by step."""
    curves = findings.curves_of(read(RESULTS / "evidence.csv"), arm, *ARMS)
    return [[row["verifier_pass_rate"] for row in curve] for curve in curves]


def smooth(values: list[float]) -> list[float]:
    """Means over a window of three, two at the ends."""
    return [statistics.mean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def draw(out: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.1), layout="constrained")
    ends = findings.same_numerics(read(RESULTS / "evidence.csv"), *ARMS)
    for arm, (name, colour) in ARMS.items():
        curves = pass_rates(arm)
        steps = range(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.3)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(steps, smooth(mean), color=colour, linewidth=2.2, label=name)
        for column, step in (("avg_before", 0), ("avg_after", len(steps))):
            held_out = [float(row[column]) for row in ends if row["arm"] == arm]
            axes.plot([step] * len(held_out), held_out, "o", color=colour, mec="white", zorder=3)
    axes.plot([], [], "o", color="grey", label="test prompts, before and after")
    teacher = float(read(RESULTS / "demo.csv")[0]["avg@8 teacher"])
    axes.axhline(teacher, color="black", linestyle=":", label="teacher, test prompts")
    axes.set(xlabel="step, of 128 rollouts", ylabel="share of right answers", ylim=(0.2, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, metadata={"Software": None})


def draw_plurals(runs: list[str], out: Path) -> None:
    """Write the picture of runs that taught themselves plurals, `[NAME=]PATH` each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    colours: dict[str, str] = {}
    held_out, teachers = "eval/student/avg@1", set()
    for run in runs:
        name, _, place = run.rpartition("=")
        path = Path(place) if Path(place).is_file() else Path(place) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        first = name not in colours
        colour = colours.setdefault(name, f"C{len(colours)}")
        steps = [row for row in rows if "verifier_pass_rate" in row]
        of_step = [row["verifier_pass_rate"] for row in steps]
        label = f"{name + ': ' * bool(name)}rollouts of the step" if first else None
        axes.plot([row["step"] for row in steps], of_step, color=colour, lw=1, label=label)
        beside = 0.3 * int(colour[1:])  # names side by side, not one over the other
        points = [(row["step"] + beside, row[held_out]) for row in rows if held_out in row]
        label = f"{name + ': ' * bool(name)}held-out words, greedy" if first else None
        axes.plot(*zip(*points), "o", color=colour, mec="white", ms=8, zorder=3, label=label)
        teachers |= {row["eval/teacher/avg@1"] for row in rows if "eval/teacher/avg@1" in row}
    for teacher in teachers:
        axes.axhline(teacher, color="black", linestyle=":")
    axes.plot([], [], ":", color="black", label="teacher: the same model behind six examples")
    axes.set(xlabel="step, of 32 rollouts", ylabel="share of right answers", ylim=(-0.03, 1.0))
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, metadata={"Software": None})


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/learning_curve.png")
    parser.add_argument("--plurals", nargs="+", metavar="[NAME=]RUN", help="draw these runs")
    args = parser.parse_args()
    if args.plurals:
        draw_plurals(args.plurals, args.out)
    else:
        draw(args.out)


if __name__ == "__main__":
    main()
