"""The page docs/forking.md: its test runs, and its diffs are those of forks/power_opd.py."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/forking.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_test_of_the_page_passes():
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    names["test_the_gradient_is_that_of_the_formula"]()
    wrong: dict = {}
    exec(code.replace("q * p**a)", "q * p)"), wrong)
    try:
        wrong["test_the_gradient_is_that_of_the_formula"]()
    except AssertionError:
        return
    raise RuntimeError("it passes with another formula, too")


def test_the_diffs_of_the_page_are_lines_of_the_files():
    old = (ROOT / "methods/opd.py").read_text().splitlines()
    new = (ROOT / "forks/power_opd.py").read_text().splitlines()
    lines = [line for block in blocks("diff") for line in block.splitlines()]
    assert len([line for line in lines if line[0] == "+"]) == 4
    for line in lines:
        here, there = (new, old) if line[0] == "+" else (old, new)
        assert line[1:] in here and line[1:] not in there, line
