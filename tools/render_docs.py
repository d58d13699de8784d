"""Rewrite the generated parts of the documentation: what stands between `<!-- NAME -->` markers.

    python tools/render_docs.py            # rewrite
    python tools/render_docs.py --check    # 1 if something would change

`equations` is the table from equation to code, made from the `# Eq. (n)` tags of a method file;
`diff` is the golden diff against opd.py; `sentences`, `verdicts`, `smoke`, `sweep`, `claim N` and
`study NAME` are from benchmarks/results/evidence.csv, in a method's page only its rows and those of
opd; `ops ...`, `gradient ...`, `plurals`, `targets`, `step ...` and `gpu ...` come from the other
files there; `size NAME` is the number of lines that a file changes in opd.py, `seen NAME` how its
accuracy compares with opd's. `this is opd` are lines of methods/opd.py, `this is exopd` those in
which methods/exopd.py differs.
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
import bench_decode  # noqa: E402
import bench_lines  # noqa: E402
import bench_ops  # noqa: E402
import claims  # noqa: E402
import findings  # noqa: E402
import gpu_tables  # noqa: E402
import gradient_variance  # noqa: E402
import plurals  # noqa: E402
import step_tables  # noqa: E402
import sync_methods  # noqa: E402
import targets  # noqa: E402
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


def loss_of(method: str) -> list[str]:
    """The lines of `loss_of` in a method file."""
    source = (ROOT / f"methods/{method}.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = next(node for node in functions if node.name == "loss_of")
    lines = source.splitlines()[found.lineno - 1 : found.end_lineno]
    return textwrap.dedent("\n".join(lines)).splitlines()


FIRST = "    log_ratio = student_logp.detach() - teacher_logp  # Eq. (1)"


def loss_in_the_readme() -> dict[str, str]:
    """Fenced code: what opd is, and what exopd changes in it."""
    opd = loss_of("opd")
    old, new = (lines[lines.index(FIRST) :] for lines in (opd, loss_of("exopd")))
    changed = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    changed = [line for line in changed if not line.startswith("@@")]
    return {
        "this is opd": "\n".join(["```python", *opd, "```"]),
        "this is exopd": "```diff\n" + "\n".join(changed) + "\n```",
    }


OPS = {  # in the README: op with a head, direction, K -> what calls it, the plain implementation
    ("gated_kl", "forward+backward", ""): (
        "loss of sampled tokens: opd, sg_opd, exopd, tropd",
        "torch head + gate",
    ),
    ("support_kl", "forward+backward", "32"): (
        "loss on a renormalised support: topk_opd",
        "torch head + gather",
    ),
    ("full_kl jsd", "forward+backward", ""): ("`opd.py --objective full`", "torch heads + jsd"),
    ("token_logp", "forward", ""): ("scores of a frozen model", "torch head + log_softmax"),
    ("topk_logp", "forward", "32"): (
        "its likeliest tokens: topk_opd, tropd",
        "torch head + topk",
    ),
}
OPS_SIZE = {"rows": "256", "vocab": "151936", "dtype": "float32", "width": "1024", "threads": "2"}


def ops_table(rows: list[Row]) -> str:
    """Time and memory of the ops with a head, as methods call them, beside plain PyTorch."""
    case = OPS_SIZE | {"allocator": "default", "clock": "wall", "cuda": ""}
    mine = [row for row in rows if all(row[key] == value for key, value in case.items())]
    found = newest(mine, ["op", "direction", "k", "implementation"])
    lines = []
    for (op, direction, k), (used, plain) in OPS.items():
        own, other = (found.get((op, direction, k, name)) for name in ("opd_ops", plain))
        cells = [NOT_MEASURED] * 4
        if own is not None and other is not None:
            speed = float(other["median_ms"]) / float(own["median_ms"])
            cells[0] = f"{float(own['median_ms']):,.0f} ms"
            cells[1] = f"{float(other['median_ms']):,.0f} ms ({speed:.3g}x)"
            for at, row in ((2, own), (3, other)):
                if row["peak_mib"]:
                    cells[at] = f"{float(row['peak_mib']):,.0f} MiB"
        name, _, divergence = op.partition(" ")
        lines.append([f"`{name}`" + f", {divergence}" * bool(divergence), used, *cells])
    titles = ["op", "used for", "time", "plain PyTorch", "memory", "plain PyTorch"]
    return str(markdown(titles, lines))


def seen(method: str, rows: list[Row]) -> str:
    """A symbol and the difference in accuracy: to opd, or of opd to the untrained student."""
    than = claims.START if method == "opd" else "opd"
    gains = findings.find(rows, claims.Comparison("", method, than)).gains
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
        f"{float(row['steps']):.0f} steps in {float(row['seconds']):.0f} s on two cores: the "
        f"student's accuracy goes from {before} to {after} (teacher {teacher}: "
        f"{100 * float(row['gap closed']):.0f} % of the gap), its held-out reverse KL from {first} "
        f"to {last}; one seed ([docs/reproducing.md](docs/reproducing.md))."
    )


def forks_table() -> str:
    """All forks at the size of `make demo`, from the rows of `tools/compare_runs.py --csv`."""
    shown = {"avg@8 after": ".3f", "reverse_kl after": ".3f", "grad norm median": ".3f",
             "length after": ".1f", "sampled tokens": ",.0f", "seconds": ".0f"}  # fmt: skip
    lines = [
        [row["group"], *(format(float(row[key]), how) if row[key] else "-"
                         for key, how in shown.items())]
        for row in read(RESULTS / "forks.csv")
    ]  # fmt: skip
    titles = "file,accuracy,reverse KL,gradient norm,length,sampled tokens,seconds".split(",")
    return str(markdown(titles, lines))


def result_tables(method: str) -> dict[str, str]:
    """Markdown tables of what has been run; in the page of a method its arms and opd alone."""
    rows = read(RESULTS / "evidence.csv")
    if not method:
        tables: dict[str, str] = bench_ops.grid_tables()
        tables |= {f"claim {key}": findings.claim_table(rows, key) for key in claims.CLAIMS}
        tables["again 1"] = findings.again_table(rows, "1")
        tables["moved 1"] = findings.moved_table(rows, "1")
        tables["gradient variance"] = gradient_variance.table()
        tables["gradient tokens"] = gradient_variance.token_table()
        places = gradient_variance.place_tables()
        tables["gradient places"], tables["places left"] = places
        tables |= step_tables.tables() | gpu_tables.tables()
        tables["plurals"] = plurals.table(read(RESULTS / "plurals.csv"))
        tables["decode"] = bench_decode.decode_table()
        tables["lines"] = bench_lines.lines_table()
        tables["targets"] = targets.table()
        tables["forks"] = forks_table()
        tables["demo"], tables["verdicts"] = demo_line(), findings.in_short(rows)
        tables |= loss_in_the_readme()
        tables["ops in short"] = ops_table(read(RESULTS / "ops.csv"))
        tables["sentences"] = findings.sentences(rows)
        tables |= {f"study {key}": text for key, text in findings.study_tables(rows).items()}
        tables["failures"] = findings.failure_table(rows)
        tables["smoke"] = findings.table(rows, claims.SMOKE)
        return tables | {"sweep": findings.sweep_table(rows)}
    arms = [arm for arm in claims.SMOKE if arm == "opd" or arm.split("-")[0] == method]
    return {"smoke": findings.table(rows, arms)}


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
        paths = {path.stem: path for path in sync_methods.method_files(ROOT)}
        reference = (ROOT / "methods/opd.py").read_text()
        size = sync_methods.num_changed(reference, paths[found[1]].read_text())
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
    names = ("evidence", "benchmarks", "forks", "forking", "reproducing")
    pages += [ROOT / f"docs/{name}.md" for name in names]
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
