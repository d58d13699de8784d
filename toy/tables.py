"""Tables of the toy study: CSV files in and out, and the Markdown summary made from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def write_csv(path: Path, rows: Rows) -> None:
    """Write `rows` with the keys of the first as header; floats with 10 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            cells = row.values()
            writer.writerow([f"{cell:.10g}" if isinstance(cell, float) else cell for cell in cells])


def read_csv(path: Path) -> Rows:
    """The rows of a CSV file; cells that are numbers become floats."""

    def parse(cell: str) -> Any:
        try:
            return float(cell)
        except ValueError:
            return cell

    with path.open(newline="") as file:
        return [{key: parse(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# ---- Summary -------------------------------------------------------------------------------------


def summary(out: Path) -> str:
    """The Markdown tables, from whatever CSV files are in `out`."""
    parts: list[str] = []
    slopes_file, horizon_file = out / "slopes.csv", out / "horizon.csv"
    if slopes_file.exists() and horizon_file.exists():
        slopes, growth = read_csv(slopes_file), read_csv(horizon_file)
        cases = list(dict.fromkeys(row["process"] for row in slopes))
        names = list(dict.fromkeys(row["estimator"] for row in slopes))
        cell = {(r["process"], r["estimator"]): r for r in slopes}
        parts.append(
            "Slope of log variance against log T, exact: least squares over T >= 64 "
            "(last doubling in brackets)\n\n"
            + markdown(
                ["estimator", *cases],
                [
                    [name]
                    + [
                        f"{cell[c, name]['slope']:.2f} ({cell[c, name]['slope_last_doubling']:.2f})"
                        for c in cases
                    ]
                    for name in names
                ],
            )
        )
        at = {(r["process"], r["estimator"]): r for r in growth if r["horizon"] == 128}
        if at:
            parts.append(
                "Exact variance of one rollout at T = 128, nats squared, and its ratio to gamma 0"
                "\n\n"
                + markdown(
                    ["process", "gamma 0", "gamma 1", "ratio", "sequence-level", "ratio"],
                    [
                        [
                            case,
                            f"{at[case, 'gamma 0']['trace_cov']:.4g}",
                            f"{at[case, 'gamma 1']['trace_cov']:.4g}",
                            variance_ratio(at, case, "gamma 1"),
                            f"{at[case, 'sequence-level']['trace_cov']:.4g}",
                            variance_ratio(at, case, "sequence-level"),
                        ]
                        for case in cases
                    ],
                )
            )
    if (out / "frontier.csv").exists():
        wanted = [
            ("sampled token", "0"),
            ("sampled token", "0.5"),
            ("sampled token", "0.9"),
            ("sampled token", "1"),
            ("sampled token, value baseline", "1"),
            ("full vocabulary", "0"),
            ("full vocabulary", "1"),
            ("sequence-level", "1"),
            ("top-K, renormalise", "4"),
            ("top-K, bucket", "4"),
            ("top-K, score", "4"),
            ("top-K, score_without_one", "4"),
            ("top-K, drop", "4"),
        ]
        table = [row for row in read_csv(out / "frontier.csv") if row["process"] == "random MDP"]
        chosen = [r for w in wanted for r in table if (r["family"], f"{r['knob']:g}") == w]
        parts.append(
            "Random MDP, T = 32, 8 states, 16 actions: bias as a share of its target's norm, "
            "variance of one rollout over the squared norm of the sequence-KL gradient\n\n"
            + markdown(
                ["estimator", "gamma or K", "bias, sequence KL", "bias, prefix KLs", "variance"],
                [
                    [
                        row["family"],
                        f"{row['knob']:g}",
                        share(row["bias_sequence"]),
                        share(row["bias_prefix"]),
                        f"{row['variance']:.3g}",
                    ]
                    for row in chosen
                ],
            )
        )
    if (out / "crossover.csv").exists():
        parts.append(
            "Rollouts an update below which token-level has the smaller mean squared error, T = 32"
            "\n\n"
            + markdown(
                ["process", "against", "rollouts"],
                [
                    [row["process"], row["unbiased"], f"{row['rollouts']:,.0f}"]
                    for row in read_csv(out / "crossover.csv")
                ],
            )
        )
    if (out / "control_runs.csv").exists():
        parts.append(
            "Control task, left task: log10 of the output-layer variance (maximum, and median of "
            "the last fifth), sampled sequence KL (median of the last fifth), mean final distance "
            "to the target\n\n"
            + control_table(read_csv(out / "control_runs.csv"), ["seed", "gamma"])
        )
    if (out / "control_sweep.csv").exists():
        parts.append(
            "Sweep over what the paper leaves open, 500 iterations, cells are ranges over seeds: "
            "log10 of the largest variance on the left task; orders, the log10 of the variance "
            "of gamma 1 over that of gamma 0 in the last fifth; mean final distance on the worse "
            "of the two tasks; the last three of finished runs only, a run stops where its "
            "gradient overflows\n\n" + sweep_table(read_csv(out / "control_sweep.csv"))
        )
    return "\n\n".join(parts) + "\n"


def variance_ratio(at: dict[tuple[str, str], dict[str, Any]], case: str, name: str) -> str:
    """Variance of an estimator over that of gamma 0."""
    return f"{at[case, name]['trace_cov'] / at[case, 'gamma 0']['trace_cov']:.4g}"


def share(value: float) -> str:
    """A relative bias; rounding noise is shown as zero."""
    return "0" if value < 1e-10 else f"{value:.3g}"


def control_table(rows: Rows, keys: list[str]) -> str:
    """Part B, run by run."""
    columns = {
        "max": "log10_variance_max",
        "last fifth": "log10_variance_last_fifth",
        "KL, nats": "sequence_kl_last_fifth",
        "left": "distance_left",
        "right": "distance_right",
    }
    ordered = sorted(rows, key=lambda row: tuple(row[key] for key in keys))
    return markdown(
        [*keys, *columns],
        [
            [f"{row[key]:g}" for key in keys] + [f"{row[c]:.3g}" for c in columns.values()]
            for row in ordered
        ],
    )


def sweep_table(rows: Rows) -> str:
    """One line a variant; each cell the least and the largest over seeds."""

    def span(values: list[float], digits: str) -> str:
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            return "-"
        return f"{min(finite):{digits}} to {max(finite):{digits}}"

    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        low = {r["seed"]: r for r in mine if r["gamma"] == 0}
        high = {r["seed"]: r for r in mine if r["gamma"] == 1}
        orders = [
            high[s]["log10_variance_last_fifth"] - low[s]["log10_variance_last_fifth"]
            for s in low
            if low[s]["finished"] and high[s]["finished"]
        ]
        ends = [
            [max(r["distance_left"], r["distance_right"]) for r in group.values() if r["finished"]]
            for group in (low, high)
        ]
        lines.append(
            [
                str(variant),
                f"{mine[0]['teacher_distance']:.2f}",
                span([r["log10_variance_max"] for r in low.values()], ".1f"),
                span([r["log10_variance_max"] for r in high.values()], ".1f"),
                span(orders, ".1f"),
                span(ends[0], ".2g"),
                span(ends[1], ".2g"),
                f"{sum(int(r['finished']) for r in mine)} of {len(mine)}",
            ]
        )
    header = ["variant", "teacher distance", "max, gamma 0", "max, gamma 1", "orders"]
    header += ["worse task, gamma 0", "worse task, gamma 1", "runs finished"]
    return markdown(header, lines)


def include(readme: Path, text: str) -> None:
    """Put `text` between the result markers of a Markdown file."""
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    page = readme.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"{readme}: expected the markers {begin} and {end}")
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    readme.write_text(f"{before}{begin}\n{text}{end}{after}")
