"""Keep the files of methods/ and forks/ equal outside of their docstring and section 4.

python tools/sync_methods.py --check     # what differs, and who imports what it may not
python tools/sync_methods.py --fix       # rewrite the shared sections from methods/opd.py
python tools/sync_methods.py --diffs     # rewrite docs/diffs/opd-<file>.diff
python tools/sync_methods.py --count     # how many lines each file changes in opd.py
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = "4. The method"
OURS = {"opd_ops", "opd_run"}
ALLOWED = OURS | {"numpy", "torch", "tqdm", "transformers"} | set(sys.stdlib_module_names)


def split(text: str) -> dict[str, str]:
    """Pieces of a method file by name: `docstring`, `head` (imports), then one per ruler."""
    pieces = re.split(r"^# ==== (\d\. .+?) =+$", text, flags=re.M)
    quote = pieces[0].index('"""', 3) + 3
    parts = {"docstring": pieces[0][:quote], "head": pieces[0][quote:]}
    return parts | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def method_files(root: Path) -> list[Path]:
    """All method files but `opd.py`, then the forks."""
    found = [p for folder in ("methods", "forks") for p in sorted((root / folder).glob("*.py"))]
    return [path for path in found if path.name != "opd.py"]


def merged(reference: str, text: str) -> str:
    """`text` with every shared piece taken from `reference`."""
    own = split(text)
    for name, piece in split(reference).items():
        if name not in ("docstring", METHOD):
            own[name] = piece
    return "".join(
        piece if name in ("docstring", "head") else f"# ==== {name} {'=' * (92 - len(name))}{piece}"
        for name, piece in own.items()
    )


def problems(reference: str, text: str, name: str) -> list[str]:
    """Why `text` is no sibling of `reference`: pieces that differ, forbidden imports."""
    found = []
    ours, theirs = split(text), split(reference)
    if list(ours) != list(theirs):
        return [f"{name}: sections are {list(ours)[2:]}, expected {list(theirs)[2:]}"]
    for piece in ours:
        if piece not in ("docstring", METHOD) and ours[piece] != theirs[piece]:
            found.append(f"{name}: section {piece!r} differs from opd.py (--fix rewrites it)")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        else:
            continue
        found += [
            f"{name}:{node.lineno}: imports {module}: a method file stands alone"
            for module in modules
            if module.split(".")[0] not in ALLOWED
        ]
    return found


def diff(reference: str, text: str, name: str) -> str:
    """The unified diff against `opd.py`, without the docstrings; `name`: its path."""
    old, new = (
        "".join(piece for key, piece in split(each).items() if key != "docstring").splitlines(True)
        for each in (reference, text)
    )
    return "".join(difflib.unified_diff(old, new, "methods/opd.py", name, n=2))


def num_changed(reference: str, text: str) -> int:
    """How many lines a method adds to `opd.py` and removes from it, without blank ones.

    Removing what `--objective full` and `--discount` own does not count: most methods have neither.
    """
    lines = diff(reference, text, "x.py").splitlines()[2:]
    changed = [line for line in lines if line[0] in "+-" and line[1:].strip()]
    free = full_objective_lines(reference)
    return sum(line[0] == "+" or line[1:] not in free for line in changed)


OF_FULL = re.compile(r"objective|discount|\bdivergence\b|jsd.beta")


def full_objective_lines(reference: str) -> set[str]:
    """Lines of `opd.py` that `--objective full` and `--discount` own: whole statements."""
    lines, owned = reference.splitlines(), set()
    for node in ast.walk(ast.parse(reference)):
        if isinstance(node, ast.If):
            named = ast.unparse(node.test)
        elif isinstance(node, ast.FunctionDef):
            named = node.name
        elif isinstance(node, (ast.Assign, ast.Expr, ast.Return)):
            named = ast.unparse(node)
        else:
            continue
        if OF_FULL.search(named) and node.end_lineno:
            owned |= set(lines[node.lineno - 1 : node.end_lineno])
    return owned


def main(argv: list[str] | None = None) -> int:
    """Check, fix, or write the diffs; 1 if something is out of sync."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("--diffs", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    reference = (args.root / "methods/opd.py").read_text()
    found = []
    for path in method_files(args.root):
        if args.fix:
            path.write_text(merged(reference, path.read_text()))
        text, golden = path.read_text(), args.root / f"docs/diffs/opd-{path.stem}.diff"
        name = f"{path.parent.name}/{path.name}"
        if args.count:
            print(f"{name:<24} {num_changed(reference, text):>4}")
        if args.diffs:
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(diff(reference, text, name))
        found += problems(reference, text, name)
        if not golden.is_file() or golden.read_text() != diff(reference, text, name):
            found.append(f"{golden.name}: is not the diff of {name} (--diffs rewrites it)")
    print("\n".join(found) or "method files are in sync")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
