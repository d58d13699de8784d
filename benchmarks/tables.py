"""Markdown tables of the benchmarks' rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line of titles and a line for each of `rows`, all of one length."""
    rule = "|---" * len(titles) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])
