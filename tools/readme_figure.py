"""The learning curve of the README, from the committed curves and rows of the evidence.

    python tools/readme_figure.py --out docs/images/learning_curve.png

Both objectives of opd.py on the embedded pair, 5 seeds: the share of the student's rollouts that
the verifier calls right, step by step (thin: each seed; thick: their mean over a window of three
steps), and accuracy on the test prompts before and after, with the teacher's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from rows import RESULTS, read  # noqa: E402

ARMS = {  # of the evidence: what it is called, and its colour
    "opd": ("loss on the sampled tokens (--objective sampled)", "tab:blue"),
    "opd-full": ("exact divergence at each token (--objective full)", "tab:orange"),
}


def pass_rates(arm: str) -> list[list[float]]:
    """Of each seed: the share of right rollouts, step by step."""
    paths = sorted((RESULTS / "evidence").glob(f"run-{arm}-[0-9].jsonl"))
    curves = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
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
    ends = [row for row in read(RESULTS / "evidence.csv") if row["suite"] == "run"]
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


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/learning_curve.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
