"""Figures of the toy study, drawn from its CSV files (needs matplotlib).

Colours are colour-blind safe: the Okabe-Ito set for kinds, cividis for the ordered gammas; every
line has a marker or a dash pattern of its own besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from toy.tables import Rows, read_csv

OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 13,
    "axes.titlesize": 13,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
}


def ordered(count: int) -> Any:
    """`count` colours of cividis, without its palest end."""
    return [plt.get_cmap("cividis")(0.9 * i / max(1, count - 1)) for i in range(count)]


def unique(rows: Rows, key: str) -> list[Any]:
    """Values of a column, in order of first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def save(figure: Any, path: Path) -> None:
    """Write a PNG and close the figure."""
    figure.savefig(path)
    plt.close(figure)


def draw_horizon(out: Path) -> None:
    """Variance against T for every gamma, with the bounds and the sampled estimates."""
    rows = read_csv(out / "horizon.csv")
    cases, names = unique(rows, "process"), unique(rows, "estimator")
    colours = [*ordered(len(names) - 1), OKABE_ITO[1]]
    figure, grid = plt.subplots(2, 2, figsize=(12, 10.4), sharex=True, sharey=True)
    for axis, case in zip(grid.flat, cases):
        for name, colour, marker in zip(names, colours, MARKERS):
            mine = [r for r in rows if r["process"] == case and r["estimator"] == name]
            horizon = np.array([r["horizon"] for r in mine])
            axis.plot(
                horizon, [r["trace_cov"] for r in mine], color=colour, marker=marker, label=name
            )
            sampled = [r for r in mine if r["sampled_trace_cov"] != ""]
            axis.errorbar(
                [r["horizon"] for r in sampled],
                [r["sampled_trace_cov"] for r in sampled],
                [2 * r["sampled_standard_error"] for r in sampled],
                fmt="o",
                ms=11,
                mfc="none",
                color=OKABE_ITO[0],
                mew=1.2,
                elinewidth=1.2,
                zorder=5,
                label="sampled, 2 standard errors" if name == names[-1] else None,
            )
        bound = {
            r["horizon"]: r["bound"]
            for r in rows
            if r["process"] == case and r["estimator"] == "gamma 0"
        }
        size = [bound[t] / t**2 for t in horizon]  # B_r^2 B_s^2
        for power, dashes in ((2, (1, 1.5)), (3, (5, 2)), (4, (8, 2, 1, 2))):
            axis.plot(horizon, size * horizon**power, color="0.35", dashes=dashes, lw=1.4)
            axis.annotate(
                f"$B^2T^{power}$",
                (horizon[-1], size[-1] * horizon[-1] ** power),
                textcoords="offset points",
                xytext=(8, -5),
                color="0.25",
            )
        axis.set(xscale="log", yscale="log", title=case)
        axis.set_xscale("log", base=2)
        axis.set_xlim(3.2, 3 * horizon[-1])
    for axis in grid[-1]:
        axis.set_xlabel("horizon T, steps")
    for axis in grid[:, 0]:
        axis.set_ylabel("variance of one rollout, nats²")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    save(figure, out / "horizon.png")


def draw_frontier(out: Path) -> None:
    """Bias against variance, over gamma and over K."""
    rows = [row for row in read_csv(out / "frontier.csv") if row["process"] == "random MDP"]
    panels = [
        (
            "bias_sequence",
            "over gamma (numbers: gamma)",
            ["sampled token", "sampled token, value baseline", "full vocabulary", "sequence-level"],
            "bias against the sequence-KL gradient, share of its norm",
        ),
        (
            "bias_prefix",
            "over K (numbers: K of 16), gamma 0",
            [
                "top-K, renormalise",
                "top-K, bucket",
                "top-K, score",
                "top-K, score_without_one",
                "top-K, drop",
            ],
            "bias against the prefix-KL gradient, share of its norm",
        ),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2))
    for axis, (key, title, families, label) in zip(axes, panels):
        for family, colour, marker in zip(families, OKABE_ITO, MARKERS):
            # K = 1 renormalised is a loss of zero: no variance, and no place on a log axis
            mine = [r for r in rows if r["family"] == family and r["variance"] > 1e-12]
            bias = [r[key] if r[key] > 1e-10 else 0.0 for r in mine]
            axis.plot(
                bias, [r["variance"] for r in mine], color=colour, marker=marker, label=family
            )
            for r, b in zip(mine, bias):
                if family in ("sampled token", "top-K, renormalise", "top-K, score"):
                    axis.annotate(
                        f"{r['knob']:g}",
                        (b, r["variance"]),
                        textcoords="offset points",
                        xytext=(6, 5),
                        fontsize=10,
                        color=colour,
                    )
        axis.set(yscale="log", title=title, xlabel=label)
        axis.legend()
    axes[0].set_ylabel("variance of one rollout / |sequence-KL gradient|²")
    save(figure, out / "frontier.png")


def draw_error(out: Path) -> None:
    """Mean squared error against rollouts an update."""
    rows = read_csv(out / "error.csv")
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.6), sharey=True)
    for axis, case in zip(axes, unique(rows, "process")):
        for name, colour, marker in zip(unique(rows, "estimator"), OKABE_ITO, MARKERS):
            mine = [r for r in rows if r["process"] == case and r["estimator"] == name]
            count = [r["rollouts"] for r in mine]
            error = [r["relative_squared_error"] for r in mine]
            axis.plot(count, error, color=colour, marker=marker, label=name)
        axis.axhline(1.0, color="0.35", dashes=(4, 2), label="no gradient at all")
        axis.set(xscale="log", yscale="log", xlabel="rollouts an update", title=f"{case}, T = 32")
    axes[0].set_ylabel("mean squared error / |gradient|²")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, out / "error.png")


def draw_trap(out: Path) -> None:
    """Descent along exact expectations in the trap."""
    rows = read_csv(out / "descent.csv")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.4))
    gammas = unique(rows, "gamma")
    for gamma, colour, marker in zip(gammas, OKABE_ITO, MARKERS):
        mine = [r for r in rows if r["gamma"] == gamma]
        for axis, key in zip(axes, ("sequence_kl", "fork_to_trap")):
            steps, values = [r["step"] for r in mine], [r[key] for r in mine]
            axis.plot(
                steps, values, color=colour, marker=marker, markevery=8, label=f"gamma {gamma:g}"
            )
    axes[0].set(
        xlabel="gradient step (exact expectation)",
        ylabel="sequence KL, nats",
        yscale="log",
        ylim=(0.8, 300),
    )
    axes[1].set(
        xlabel="gradient step (exact expectation)",
        ylabel="student's probability of the costly branch",
        ylim=(-0.02, 1.02),
    )
    axes[0].legend()
    save(figure, out / "trap.png")


def draw_cost(out: Path) -> None:
    """Time of the exact moments against T and of sampling against rollouts."""
    rows = read_csv(out / "cost.csv")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, method, key, label in (
        (axes[0], "exact", "horizon", "horizon T, steps (16 states, 4 actions)"),
        (axes[1], "sampling", "rollouts", "rollouts (T = 64)"),
    ):
        mine = [r for r in rows if r["method"] == method]
        milliseconds = [1e3 * r["seconds"] for r in mine]
        axis.plot([r[key] for r in mine], milliseconds, "o-", color=OKABE_ITO[0])
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="time, ms", title=method)
    save(figure, out / "cost.png")


def draw_control_variance(out: Path) -> None:
    """Output-layer variance over training on the left task, one panel a seed."""
    rows = [row for row in read_csv(out / "control_curves.csv") if row["task"] == "left"]
    runs = [key.split() for key in rows[0] if key.startswith("log10_variance")]
    gammas, seeds = list(dict.fromkeys(r[2] for r in runs)), list(dict.fromkeys(r[4] for r in runs))
    iterations = np.array([row["iteration"] for row in rows])
    figure, axes = plt.subplots(1, len(seeds), figsize=(15, 5.8), sharey=True, squeeze=False)
    window = max(1, len(rows) // 100)
    for axis, seed in zip(axes[0], seeds):
        for gamma, colour, marker in zip(gammas, ordered(len(gammas)), MARKERS):
            key = f"log10_variance gamma {gamma} seed {seed}"
            curve = np.array([float(row[key]) for row in rows])
            axis.plot(iterations, 10**curve, color=colour, lw=0.5, alpha=0.35)
            blocks = len(curve) // window * window
            smooth = np.median(curve[:blocks].reshape(-1, window), axis=1)
            middle = iterations[:blocks].reshape(-1, window).mean(axis=1)
            axis.plot(
                middle,
                10**smooth,
                color=colour,
                marker=marker,
                markevery=10,
                label=f"gamma {gamma}",
            )
        axis.set(yscale="log", xlabel="iteration", title=f"seed {seed}, left task")
    axes[0, 0].set_ylabel("output-layer gradient variance, nats²")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(gammas))
    save(figure, out / "control_variance.png")


def draw_control_visits(out: Path) -> None:
    """Where final policies go: time against position, one figure a seed."""
    rows = read_csv(out / "control_visits.csv")
    policies, tasks = unique(rows, "policy"), unique(rows, "task")
    steps = int(max(row["time"] for row in rows)) + 1
    for seed in unique(rows, "seed"):
        shape = (len(tasks), len(policies))
        figure, axes = plt.subplots(*shape, figsize=(15, 7.4), sharex=True, sharey=True)
        for axis, (task, policy) in zip(
            axes.flat, ((task, policy) for task in tasks for policy in policies)
        ):
            table = np.zeros((64, steps))
            for r in rows:
                if (r["task"], r["policy"], r["seed"]) == (task, policy, seed):
                    table[int(r["cell"]), int(r["time"])] = r["share"]
            image = axis.imshow(
                np.sqrt(table),
                origin="lower",
                aspect="auto",
                extent=(-0.5, steps - 0.5, -8, 8),
                cmap="cividis",
                vmin=0.0,
                vmax=1.0,
            )
            axis.axhline(-3.0 if task == "left" else 3.0, color="white", dashes=(3, 3), lw=1)
            axis.set_title(f"{policy}, {task} task")
            outside = 1.0 - table[:, -1].sum()
            if outside > 0.01:
                note = f"{outside:.0%} end beyond ±8"
                axis.text(0.97, 0.04, note, color="white", ha="right", transform=axis.transAxes)
            axis.grid(False)
        for axis in axes[-1]:
            axis.set_xlabel("time, steps")
        for axis in axes[:, 0]:
            axis.set_ylabel("position, units (dashed: target)")
        bar = figure.colorbar(image, ax=axes, ticks=np.sqrt([0, 0.05, 0.25, 0.5, 1.0]))
        bar.ax.set_yticklabels(["0", "0.05", "0.25", "0.5", "1"])
        bar.set_label("share of trajectories in the cell (square-root scale)")
        save(figure, out / f"control_visits_{seed:g}.png")


def draw_control_distance(out: Path) -> None:
    """Final distance to the targets by gamma, one marker a seed and task."""
    rows = read_csv(out / "control_runs.csv")
    teachers = read_csv(out / "control_teachers.csv")
    gammas, seeds = unique(rows, "gamma"), unique(rows, "seed")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), sharey=True)
    for axis, task in zip(axes, ("left", "right")):
        for i, (seed, colour, marker) in enumerate(zip(seeds, OKABE_ITO, MARKERS)):
            mine = {r["gamma"]: r[f"distance_{task}"] for r in rows if r["seed"] == seed}
            place = np.arange(len(gammas)) + 0.12 * (i - 1)
            values = [mine[gamma] for gamma in gammas]
            axis.plot(
                place, values, ls="", marker=marker, ms=9, color=colour, label=f"seed {seed:g}"
            )
            own = [r["distance"] for r in teachers if r["seed"] == seed and r["task"] == task]
            axis.plot(
                -1 + 0.12 * (i - 1), own, ls="", marker=marker, ms=9, mfc="none", color=colour
            )
        axis.axhline(5.0, color="0.35", dashes=(4, 2), lw=1.2)
        axis.annotate("a policy that stays at the start", (-1.3, 5.5), color="0.25", fontsize=11)
        axis.set_xticks(range(-1, len(gammas)), ["teacher", *(f"{gamma:g}" for gamma in gammas)])
        axis.set(yscale="log", xlabel="gamma of the student", title=f"{task} task")
    axes[0].set_ylabel("mean final distance to the target, position units")
    axes[0].legend()
    save(figure, out / "control_distance.png")


FIGURES = {
    "horizon.csv": draw_horizon,
    "frontier.csv": draw_frontier,
    "error.csv": draw_error,
    "descent.csv": draw_trap,
    "cost.csv": draw_cost,
    "control_curves.csv": draw_control_variance,
    "control_visits.csv": draw_control_visits,
    "control_runs.csv": draw_control_distance,
}


def draw_all(out: Path) -> None:
    """Draw every figure whose table is in `out`."""
    with plt.rc_context(STYLE):
        for table, draw in FIGURES.items():
            if (out / table).exists():
                draw(out)
