"""bench_decode.py and bench_lines.py without an older tree, where nothing can be timed: that they
run, what they count."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import bench_decode  # noqa: E402
import bench_lines  # noqa: E402


def printed(script: str, flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--no-save", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_token_waits_twice_at_most_for_a_gpu():
    """For the look at ended rollouts, and with top-p for one at the candidates."""
    said = printed("bench_decode.py", "--cases full top-p greedy --repeats 1 --vocab 600")
    found = re.findall(r"^(\S+) +after +[\d.]+ s, ([\d.]+) waits a token$", said, re.M)
    assert [name for name, _ in found] == ["full", "top-p", "greedy"]
    assert all(1 <= float(waits) <= 1 + (name == "top-p") for name, waits in found), found


def test_rollouts_are_made_without_gradients_and_teacher_logits_are_not_kept():
    """32 rollouts of 32 tokens have 125 MiB of logits; a micro-batch of two has 8."""
    said = printed("bench_lines.py", "--cases gradients logits --repeats 1")
    found = dict(re.findall(r"^(\S+) +after +([\d,]+) MiB", said, re.M))
    assert found["gradients"] == "0"
    assert 0 < int(found["logits"]) < 250, found  # 483 where all logits of the teacher were kept


@pytest.mark.parametrize(
    ("table", "cases", "num_bars"),
    [
        (bench_decode.decode_table, bench_decode.CASES, 7),
        (bench_lines.lines_table, bench_lines.CASES, 4),
    ],
)
def test_the_table_has_a_line_for_each_case(table, cases, num_bars):
    lines = table().splitlines()[2:]
    assert len(lines) == len(cases)
    assert all(line.count("|") == num_bars for line in lines)
