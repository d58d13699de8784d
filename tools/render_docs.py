"""Rewrite the generated parts of the documentation: what stands between `<!-- NAME -->` markers.

    python tools/render_docs.py            # rewrite
    python tools/render_docs.py --check    # 1 if something would change

`equations` is the table from equation to code, made from the `# Eq. (n)` tags of a method file;
`diff` is the golden diff against opd.py; `smoke`, `sweep` and `claim N` are tables from
benchmarks/results/evidence.csv, in a method's page only its rows and those of opd; `ops ...`,
`gradient variance`, `step ...` and `gpu ...` come from the other files there; `size NAME` is the
number of lines of a golden diff.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import bench_ops  # noqa: E402
import evidence  # noqa: E402
import gpu_tables  # noqa: E402
import gradient_variance  # noqa: E402
import step_tables  # noqa: E402
import sync_methods  # noqa: E402
from rows import RESULTS, read  # noqa: E402


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
        tables["demo"] = demo_line()
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


def with_sizes(page: str) -> str:
    """`page` with the size of each diff, added and removed lines, between its inline markers."""

    def size(found: re.Match[str]) -> str:
        old, new = ((ROOT / f"methods/{name}.py").read_text() for name in ("opd", found[1]))
        size = sync_methods.num_changed(old, new)
        return f"<!-- size {found[1]} -->{size}<!-- /size -->"

    return re.sub(r"<!-- size (\w+) -->.*?<!-- /size -->", size, page)


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
        old, new = path.read_text(), with_sizes(render(path.read_text(), parts))
        if old != new:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print(("stale: " if args.check else "rewritten: ") + (", ".join(stale) or "none"))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
