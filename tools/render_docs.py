"""Rewrite the generated parts of the documentation: what stands between `<!-- NAME -->` markers.

    python tools/render_docs.py            # rewrite
    python tools/render_docs.py --check    # 1 if something would change

`equations` is the table from equation to code, made from the `# Eq. (n)` tags of a method file;
`diff` is the golden diff against opd.py; `smoke`, `sweep` and `claim N` are tables from
benchmarks/results/evidence.csv, in a method's page only its rows and those of opd; `ops ...`,
`gradient variance`, `step ...` and `gpu ...` come from the other files there; `size NAME` is the
number of lines of a golden diff, `seen NAME` how a method's accuracy compares with opd's.
`this is opd` are lines of methods/opd.py, `this is exopd` those in which methods/exopd.py differs.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import statistics
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import bench_ops  # noqa: E402
import claims  # noqa: E402
import evidence  # noqa: E402
import gpu_tables  # noqa: E402
import gradient_variance  # noqa: E402
import step_tables  # noqa: E402
import sync_methods  # noqa: E402
from rows import NOT_MEASURED, RESULTS, Row, half_width, markdown, newest, read  # noqa: E402


def equation_table(source: str) -> str:
    """Markdown rows: equation, the function that implements it, the line of code."""
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    statements = [node for node in nodes if isinstance(node, ast.stmt)]
    rows = []
    for number, line in enumerate(source.splitlines(), 1):
        code, _, comment = line.partition("# Eq.")
        inside = [f for f in functions if f.lineno <= number <= (f.end_lineno or 0)]
        if comment and inside:
            name = max(inside, key=lambda f: f.lineno).name
            if code.strip() == ")":  # the end of a statement: all of it
                whole = max(
                    (s for s in statements if s.end_lineno == number), key=lambda s: s.lineno
                )
                code = ast.unparse(whole)
            shown = code.strip().replace("|", "\\|") or "(the lines below)"
            rows += [(int(n), f"| ({n}) | `{name}` | `{shown}` |") for n in tags(comment)]
    body = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return "\n".join(["| equation | function | code |", "|---|---|---|", *body])


def tags(text: str) -> list[str]:
    """The equation numbers in `Eq. (1), (2)`."""
    return re.findall(r"\((\d+)\)", text)


def loss_of(method: str, with_call: bool) -> str:
    """The lines of `loss_of` in the `token_loss` of a method file; `with_call`: and of its call."""
    source = (ROOT / f"methods/{method}.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    outer = next(node for node in functions if node.name == "token_loss")
    inner = next(node for node in functions if node.name == "loss_of")
    last = outer if with_call else inner
    lines = source.splitlines()[inner.lineno - 1 : last.end_lineno]
    return textwrap.dedent("\n".join(lines))


FIRST = "    log_ratio = student_logp.detach() - teacher_logp  # Eq. (1)"


def loss_in_the_readme() -> dict[str, str]:
    """Fenced code: what opd is, and what exopd changes in it."""
    old, new = (loss_of(method, with_call=False).splitlines() for method in ("opd", "exopd"))
    old, new = (lines[lines.index(FIRST) :] for lines in (old, new))  # behind the arguments
    changed = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    changed = [line for line in changed if not line.startswith("@@")]
    return {
        "this is opd": f"```python\n{loss_of('opd', with_call=True)}\n```",
        "this is exopd": "```diff\n" + "\n".join(changed) + "\n```",
    }


OPS = {  # in the README: op, direction, who wrote the rows before version 0.2 in the same way
    "gated_kl": ("forward+backward", "", "loss of sampled tokens: opd, sg_opd, exopd, tropd"),
    "support_kl": ("forward+backward", "opd_ops dense", "loss on a renormalised support: topk_opd"),
    "full_kl jsd": ("forward+backward", "", "`opd.py --objective full`"),
    "token_logp": ("forward", "", "scores of a frozen model"),
    "topk_logp": ("forward", "opd_ops", "its likeliest tokens: topk_opd, tropd"),
}
PLAIN = (
    *("torch head + gate", "torch head + gather", "torch heads + full_kl"),
    *("torch head + log_softmax", "torch head + topk"),
)


def ops_table(rows: list[Row]) -> str:
    """Time and memory of the ops with a head as methods call them, beside plain PyTorch."""
    size = {"rows": "256", "vocab": "151936", "dtype": "float32", "threads": "2"}
    size |= {"width": "1024", "allocator": "default", "clock": "wall", "cuda": ""}
    mine = [row for row in rows if all(row[key] == value for key, value in size.items())]
    found = newest(mine, ["op", "implementation", "direction", "k"])
    lines = []
    for op, (direction, older, used) in OPS.items():
        k = "32" if op in ("support_kl", "topk_logp") else ""
        own = found.get((op, "opd_ops", direction, k))
        if own is None and older:
            own = found.get((f"linear_{op}", older, direction, k))
        cells = [NOT_MEASURED, NOT_MEASURED, NOT_MEASURED]
        if own is not None:
            cases = ((own["op"], name, direction, k) for name in PLAIN)
            plain = next((found[case] for case in cases if case in found), None)
            version = ", version 0.1" if own["op"].startswith("linear_") else ""
            cells[0] = f"{float(own['median_ms']):,.0f} ms{version}"
            if plain is not None:
                cells[1] = f"{float(plain['median_ms']) / float(own['median_ms']):.3g}x"
            if own["peak_mib"]:
                cells[2] = f"{float(own['peak_mib']):,.0f} MiB"
        lines.append([f"`{op.replace(' ', '`, ')}" + "`" * (" " not in op), used, *cells])
    return str(markdown(["op", "used for", "time", "plain PyTorch", "memory"], lines))


def verdict_line(rows: list[Row]) -> str:
    """How many of the papers' comparisons came out how."""
    comparisons = [each for claim in claims.CLAIMS.values() for each in claim.comparisons]
    theirs = [each for each in comparisons if not each.ours]
    verdicts = [evidence.find(rows, each).verdict(each).partition(",")[0] for each in theirs]
    yes, open_, no = (verdicts.count(name) for name in evidence.VERDICTS)
    return (
        f"- Of {len(theirs)} comparisons that the papers make, rerun with this pair and 5 seeds: "
        f"{yes} are reproduced, {no} come out on the other side, {open_} are not decidable (their "
        "95 % interval contains 0); at scale all of that may be otherwise "
        "([docs/evidence.md](docs/evidence.md))."
    )


def seen(method: str, rows: list[Row]) -> str:
    """A symbol and the difference in accuracy: to opd, or of opd to the untrained student."""
    own = evidence.of_arm(rows, method, "avg_after")
    than = evidence.of_arm(rows, "opd", "avg_before" if method == "opd" else "avg_after")
    gains = [own[seed] - than[seed] for seed in own if seed in than]
    mean = statistics.mean(gains)
    symbol = "≈" if half_width(gains) >= abs(mean) else "▲" if mean > 0 else "▼"
    return f"{symbol}&nbsp;{mean:+.3f}"


def demo_line() -> str:
    """What `make demo` did, from the row that `tools/compare_runs.py --csv` wrote of it."""
    row = read(RESULTS / "demo.csv")[0]
    before, after, teacher, first, last = (
        f"{float(row[key]):.3f}"
        for key in (
            "avg@8 before",
            "avg@8 after",
            "avg@8 teacher",
            "reverse_kl before",
            "reverse_kl after",
        )
    )
    return (
        f"- `make demo`, {float(row['steps']):.0f} steps on two CPU cores in "
        f"{float(row['seconds']):.0f} s: the tiny student's accuracy goes from {before} to {after} "
        f"(teacher {teacher}: {100 * float(row['gap closed']):.0f} % of the gap), its held-out "
        f"reverse KL from {first} to {last}; one seed ([docs/reproducing.md](docs/reproducing.md))."
    )


def result_tables(method: str) -> dict[str, str]:
    """Markdown tables of what has been run; in the page of a method its arms and opd alone."""
    rows = read(RESULTS / "evidence.csv")
    if not method:
        tables: dict[str, str] = bench_ops.grid_tables()
        tables |= {f"claim {key}": evidence.claim_table(rows, key) for key in evidence.CLAIMS}
        tables["again 1"] = evidence.again_table(rows, "1")
        tables["gradient variance"] = gradient_variance.table()
        tables |= step_tables.tables() | gpu_tables.tables()
        tables["demo"], tables["verdicts"] = demo_line(), verdict_line(rows)
        tables |= loss_in_the_readme()
        tables["ops in short"] = ops_table(read(RESULTS / "ops.csv"))
        tables["summary"] = evidence.summary_table(rows)
        tables["failures"] = evidence.failure_table()
        tables["smoke"] = evidence.table(rows, list(evidence.SMOKE))
        return tables | {"sweep": evidence.sweep_table(rows)}
    arms = [arm for arm in evidence.SMOKE if arm == "opd" or arm.split("-")[0] == method]
    return {"smoke": evidence.table(rows, arms)}


def render(page: str, parts: dict[str, str]) -> str:
    """`page` with the text between each pair of markers replaced."""
    for name, text in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start in page:
            head, rest = page.split(start)
            page = f"{head}{start}{text}\n{end}{rest.split(end)[1]}"
    return page


def with_numbers(page: str) -> str:
    """`page` with what stands between inline markers: sizes of diffs, and what was seen."""
    rows = read(RESULTS / "evidence.csv")

    def size(found: re.Match[str]) -> str:
        old, new = ((ROOT / f"methods/{name}.py").read_text() for name in ("opd", found[1]))
        size = sync_methods.num_changed(old, new)
        return f"<!-- size {found[1]} -->{size}<!-- /size -->"

    def symbol(found: re.Match[str]) -> str:
        return f"<!-- seen {found[1]} -->{seen(found[1], rows)}<!-- /seen -->"

    page = re.sub(r"<!-- size (\w+) -->.*?<!-- /size -->", size, page)
    return re.sub(r"<!-- seen (\w+) -->.*?<!-- /seen -->", symbol, page)


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check every method page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = []
    pages = [*sorted((ROOT / "docs/methods").glob("*.md"))]
    pages += [ROOT / "docs/evidence.md", ROOT / "docs/benchmarks.md"]
    for path in [*pages, ROOT / "README.md"]:
        method = path.stem if path.parent.name == "methods" else ""
        parts = result_tables(method)
        if method:
            parts["equations"] = equation_table((ROOT / f"methods/{method}.py").read_text())
        golden = ROOT / f"docs/diffs/opd-{method}.diff"
        if golden.is_file():
            parts["diff"] = f"```diff\n{golden.read_text()}```"
        old, new = path.read_text(), with_numbers(render(path.read_text(), parts))
        if old != new:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print(("stale: " if args.check else "rewritten: ") + (", ".join(stale) or "none"))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
