"""What docs/benchmarks.md and README.md say of the rows of benchmarks/bench_step.py."""

from __future__ import annotations

import rows  # of benchmarks/, which render_docs.py puts on the path
from rows import RESULTS, Row, markdown

OURS, TRAINERS = "opd.py", ("GKDTrainer", "DistillationTrainer")
NAMES = {"sampled": "sampled token", "reverse": "reverse KL", "jsd": "JSD", "forward": "forward KL"}
Case = tuple[str, ...]  # ends with the implementation


def newest(name: str, keys: list[str]) -> dict[Case, Row]:
    """The last row of each case, small cases first."""
    cases = rows.read(RESULTS / name)
    cases.sort(key=lambda row: (int(row["vocab"]), int(row["completion"])))
    return dict(rows.newest(cases, keys))


def of(cases: dict[Case, Row], case: Case, implementation: str) -> Row:
    """The row of another implementation in the same case."""
    other = (*case[:-1], implementation)
    return cases[other]


def spread(theirs: Row, ours: Row) -> tuple[float, float, float]:
    """The ratio of medians of a whole step, and the ends of the ratios round by round."""
    pairs = zip(theirs["every_total_s"].split(), ours["every_total_s"].split())
    ratios = [float(a) / float(b) for a, b in pairs]
    return float(theirs["total_s"]) / float(ours["total_s"]), min(ratios), max(ratios)


def mib(row: Row) -> str:
    """Peak memory; a dash where it is not known."""
    return f"{int(row['peak_mib']):,}" if row["peak_mib"] else "-"


def size(row: Row) -> list[str]:
    """The first cells of a line."""
    return [f"{int(row['vocab']):,}", f"{row['rollouts']} x {int(row['completion']):,}"]


def timed(row: Row) -> str:
    """Seconds of a step, with the shortest and the longest round."""
    seconds = sorted(map(float, row["every_total_s"].split()))
    return f"{float(row['total_s']):.2f} s [{seconds[0]:.2f}, {seconds[-1]:.2f}]"


def before_and_after() -> str:
    """A step of ours at the large vocabulary, version 0.1 and now, which took turns."""
    keys = ["vocab", "completion", "rollouts", "objective", "implementation"]
    found = newest("step_before.csv", keys)
    lines = []
    for key, after in found.items():
        if key[-1] != "after":
            continue
        before = of(found, key, "before")
        middle, low, high = spread(before, after)
        ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        shown = [size(after)[1], NAMES[after["objective"]], timed(before), timed(after), ratio]
        lines.append([*shown, mib(before), mib(after)])
    titles = ["rollouts x tokens", "objective", "before", "after", "before over after"]
    return str(markdown([*titles, "MiB before", "after"], lines))


def tables() -> dict[str, str]:
    """What stands between the markers, by name."""
    keys = ["vocab", "completion", "rollouts", "num_threads", "objective", "implementation"]
    steps = newest("step.csv", keys)
    ratios, phases = [], []
    for key, row in steps.items():
        cells = [*size(row), NAMES[row["objective"]]]
        if row["implementation"] == OURS and row["objective"] != "sampled":
            times, memory = [], [mib(row)]
            for trainer in TRAINERS:
                theirs = of(steps, key, trainer)
                if theirs["failed"]:
                    times.append(theirs["failed"])
                    memory.append("-")
                    continue
                middle, low, high = spread(theirs, row)
                ends = f" [{low:.2f}, {high:.2f}]" if high > low else ""
                times.append(f"{middle:.2f}{ends}")
                memory.append(mib(theirs))
            ratios.append([*cells, f"{float(row['total_s']):.2f}", *times, *memory])
        seconds = [row[f"{name}_s"] for name in ("generate", "teacher", "student", "total")]
        shown = [f"{float(value):.3f}" if value else "-" for value in seconds]
        divisor = f"{row['divided_by']} of {row['num_tokens']}" if row["divided_by"] else "-"
        phases.append([*cells, f"`{row['implementation']}`", *shown, divisor])
    first = ["vocabulary", "rollouts x tokens", "objective"]
    of_times = ["`opd.py`, s", *(f"`{name}`, times that" for name in TRAINERS)]
    of_memory = [f"`{name}`, MiB" for name in (OURS, *TRAINERS)]
    of_phases = [f"{name}, s" for name in ("generate", "teacher", "student", "step")]
    phase_titles = [*first, "implementation", *of_phases, "loss divided by"]
    return {
        "step": str(markdown([*first, *of_times, *of_memory], ratios)),
        "step before": before_and_after(),
        "step phases": str(markdown(phase_titles, phases)),
        "step equality": equality(),
        "step ratios": summary(steps),
    }


def equality() -> str:
    """Loss and gradient of one batch against ours, and the error of each against float64."""
    keys = ["vocab", "completion", "objective", "beta", "temperature", "implementation"]
    cases = newest("step_equality.csv", keys)
    lines = []
    for key, row in cases.items():
        if row["implementation"] != OURS:
            ours = of(cases, key, OURS)
            name = NAMES[row["objective"]]
            if row["objective"] == "jsd":
                name += f", beta {row['beta']}"
            shown = [f"{int(row['vocab']):,}", name, row["temperature"]]
            shown += [f"`{row['implementation']}`", row["loss"], row["loss_difference"]]
            shown += [row["gradient_difference"], row["gradient_error"], ours["gradient_error"]]
            lines.append(shown)
    titles = ["vocabulary", "divergence", "loss temperature", "implementation", "loss"]
    titles += ["loss minus ours", "gradient against ours", "gradient against float64"]
    return str(markdown([*titles, "ours against float64"], lines))


def summary(steps: dict[Case, Row]) -> str:
    """In short: ranges over lengths and divergences of theirs over ours, by vocabulary."""
    lines = []
    for vocab in sorted({row["vocab"] for row in steps.values()}, key=int):
        cells = [f"{int(vocab):,}"]
        for trainer in TRAINERS:
            cases = {
                key: row
                for key, row in steps.items()
                if row["implementation"] == trainer and row["vocab"] == vocab
            }
            done = {key: row for key, row in cases.items() if not row["failed"]}
            ours = {key: of(steps, key, OURS) for key in done}
            medians, lows, highs = zip(*(spread(row, ours[key]) for key, row in done.items()))
            memory = [
                float(row["peak_mib"]) / float(ours[key]["peak_mib"])
                for key, row in done.items()
                if row["peak_mib"]
            ]
            failed = len(cases) - len(done)
            more = f"; {failed} of {len(cases)} cases ran out of it" if failed else ""
            ends = f"[{min(lows):.2f}, {max(highs):.2f}]"
            cells.append(f"{min(medians):.2f} to {max(medians):.2f} {ends}")
            cells.append(f"{min(memory):.2f} to {max(memory):.2f}{more}")
        lines.append(cells)
    titles = [title for trainer in TRAINERS for title in (f"`{trainer}`, time", "memory")]
    return str(markdown(["vocabulary", *titles], lines))
