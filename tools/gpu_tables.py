"""What docs/benchmarks.md and README.md say of the rows that `make gpu` has written."""

from __future__ import annotations

import rows  # of benchmarks/, which render_docs.py puts on the path
from rows import NOT_MEASURED, RESULTS, Row, markdown

BOTH = "forward+backward"
HEAD = {  # op of the stage "head" -> what it is called
    "token_logp": "log-prob of a token",
    "full_kl jsd": "JSD",
    "support_kl": "reverse KL on 32 tokens, renormalised",
}
SIZES = (("8192", "1024"), ("8192", "2560"), ("8192", "4096"), ("16384", "2560"))  # rows, width
ON_ROWS = [  # op, direction, our implementation
    ("token_logp", "forward", "opd_ops"),
    ("token_logp", BOTH, "opd_ops"),
    ("topk_logp", "forward", "opd_ops"),
    ("gather_logp", "forward", "opd_ops"),
    ("gather_logp", BOTH, "opd_ops"),
    ("support_kl bucket", BOTH, "opd_ops"),
    ("full_kl reverse", BOTH, "opd_ops"),
    ("full_kl jsd", BOTH, "opd_ops"),
]
TRAINERS = ("opd.py", "DistillationTrainer", "GKDTrainer")
SAMPLERS = ("opd.sample", "transformers.generate")


def measured(table: str) -> list[Row]:
    """Rows of a table, of GPUs alone; none before a GPU has run them."""
    return [row for row in rows.read(RESULTS / f"gpu_{table}.csv") if row["driver"]]


def tables() -> dict[str, str]:
    """What stands between the markers, by name; one line where a table would have no row."""
    of = {name: measured(name) for name in ("stages", "checks", "ops", "steps")}
    made = {
        "gpu stages": (stages, of["stages"]),
        "gpu checks": (checks, of["checks"]),
        "gpu head": (head, [row for row in of["ops"] if row["stage"] == "head"]),
        "gpu rows": (on_rows, [row for row in of["ops"] if row["stage"] == "rows"]),
        "gpu steps": (steps, of["steps"]),
        "gpu in short": (in_short, of["stages"]),
    }
    nothing = "Not measured: no GPU has run this yet."
    return {name: table() if found else nothing for name, (table, found) in made.items()}


def stages() -> str:
    """The newest run of each stage, but where it was skipped."""
    ran = [row for row in measured("stages") if not row["result"].startswith("skipped")]
    found = rows.newest(ran, ["stage"])
    names = ["facts", "build", "correct", "train", "head", "rows", "step", "sample"]
    lines = []
    for name in names:
        row = found.get((name,))
        if row is None:
            lines.append([name, NOT_MEASURED, *["-"] * 4])
            continue
        code = row["commit"] + ", changed" * (row["dirty"] == "True")
        lines.append([name, row["seconds"], row["result"], row["device"], row["torch"], code])
    return str(markdown(["stage", "seconds", "result", "device", "torch", "commit"], lines))


def checks() -> str:
    """What was measured or proved once, by the newest run of each stage."""
    everything = measured("checks")
    newest = {row["stage"]: (row["commit"], row["command"]) for row in everything}
    found = [row for row in everything if newest[row["stage"]] == (row["commit"], row["command"])]
    lines = [
        [row["stage"], row["name"], f"{row['value']} {row['unit']}".strip(), row["expected"] or "-",
         "yes" if row["ok"] == "True" else "**no**"]
        for row in found
    ]  # fmt: skip
    return str(markdown(["stage", "what", "found", "expected", "as it should be"], lines))


def cell(row: Row | None) -> str:
    """Milliseconds, over the floor, memory."""
    if row is None:
        return str(NOT_MEASURED)
    if row["failed"]:
        return str(row["failed"].partition(":")[0])
    parts = [f"{float(row['median_ms']):.3g} ms"]
    if row["x_floor"]:
        parts.append(f"{float(row['x_floor']):.2f} of floor")
    return ", ".join([*parts, f"{int(row['peak_mib']):,} MiB"] if row["peak_mib"] else parts)


def head() -> str:
    """Losses from hidden states."""
    keys = ["op", "rows", "width", "implementation"]
    found = rows.newest([row for row in measured("ops") if row["stage"] == "head"], keys)
    lines = []
    for size in SIZES:
        for op, name in HEAD.items():
            bare = "four products" if op == "full_kl jsd" else "three products"
            of = [found.get((op, *size, who)) for who in (bare, "opd_ops", "torch", "Liger")]
            shown = [cell(row) for row in of]
            if op == "support_kl":
                shown[3] = "-"
            lines.append([*(f"{int(number):,}" for number in size), name, *shown])
    titles = ["rows", "D", "loss", "bare products", "opd_ops", "plain PyTorch", "Liger"]
    return str(markdown(titles, lines))


def on_rows() -> str:
    """Ops on logits: ours, and how many times longer the others take."""
    keys = ["op", "direction", "dtype", "implementation", "command"]
    everything = [row for row in measured("ops") if row["stage"] == "rows"]
    found = rows.newest(everything, keys)
    ours = rows.newest(everything, keys[:-1])
    lines = []
    for dtype in ("bfloat16", "float32"):
        for op, direction, who in ON_ROWS:
            own = ours.get((op, direction, dtype, who))
            others = []
            for names in (["torch", "plain"], ["compile(torch)"], ["torch.topk alone"],
                          ["Liger"]):  # fmt: skip
                row = None
                if own is not None:
                    cases = [(op, direction, dtype, name, own["command"]) for name in names]
                    row = next((found[case] for case in cases if case in found), None)
                others.append(times(row, own))
            lines.append([f"`{op}`, {direction}", dtype, cell(own), *others])
    titles = ["op", "type", "opd_ops", "eager", "`torch.compile`", "`torch.topk` alone", "Liger"]
    return str(markdown(titles, lines))


def times(row: Row | None, own: Row | None) -> str:
    """How many times as long as ours."""
    if row is None or own is None or own["failed"]:
        return str(NOT_MEASURED) if own is None else "-"
    if row["failed"]:
        return str(row["failed"].partition(":")[0])
    return f"{float(row['median_ms']) / float(own['median_ms']):.3g}x"


def steps() -> str:
    """Whole steps, and samplers."""
    found = rows.newest(measured("steps"), ["stage", "implementation", "rollouts"])
    lines = []
    cases = [("step", who, "256") for who in TRAINERS]
    cases += [("sample", who, rollouts) for rollouts in ("64", "256") for who in SAMPLERS]
    for case in cases:
        row = found.get(case)
        stage, who, rollouts = case
        shown = [stage, f"`{who}`", rollouts]
        if row is None or row["failed"]:
            lines.append([*shown, row["failed"] if row else NOT_MEASURED, *["-"] * 5])
            continue
        seconds = [row[f"{name}_s"] for name in ("total", "generate", "teacher", "student")]
        shown += [f"{float(value):.2f}" if value else "-" for value in seconds]
        peak = f"{int(row['peak_mib']):,}" if row["peak_mib"] else "-"
        estimate = f" ({int(row['estimated_mib']):,})" if row["estimated_mib"] else ""
        lines.append([*shown, f"{float(row['tokens_per_s']):,.0f}", peak + estimate])
    titles = ["stage", "implementation", "rollouts", "step, s", "generate, s", "teacher, s"]
    titles += ["student, s", "tokens/s sampled", "peak, MiB (estimated)"]
    return str(markdown(titles, lines))


def in_short() -> str:
    """For README.md: correct, trained, and the main numbers, or that nothing was measured."""
    found = rows.newest(measured("stages"), ["stage"])
    lines = []
    for name, text in (("correct", "the tests marked gpu, compute-sanitizer on each kernel"),
                       ("train", "five methods; one update of each equals the CPU's")):  # fmt: skip
        row = found.get((name,))
        lines.append([text, f"{row['result']} ({row['device']})" if row else NOT_MEASURED])
    ops = rows.newest([row for row in measured("ops") if row["stage"] == "head"],
                      ["op", "width", "implementation"])  # fmt: skip
    for who in ("opd_ops", "torch", "Liger"):
        row = ops.get(("token_logp", "4096", who))
        lines.append([f"loss from hidden states, D = 4,096, {who}", cell(row)])
    whole = rows.newest(measured("steps"), ["stage", "implementation"])
    for who in TRAINERS:
        row = whole.get(("step", who))
        text = NOT_MEASURED
        if row is not None:
            text = row["failed"] or f"{float(row['total_s']):.1f} s, {int(row['peak_mib']):,} MiB"
        lines.append([f"a step of 256 rollouts of 96 tokens after 32, `{who}`", text])
    return str(markdown(["on a GPU", "found"], lines))
