"""benchmarks/bench_lines.py without an older tree: that its cases run, and what they find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import bench_lines  # noqa: E402


def test_rollouts_are_made_without_gradients_and_teacher_logits_are_not_kept():
    """32 rollouts of 32 tokens have 125 MiB of logits; a micro-batch of two has 8."""
    command = [sys.executable, str(ROOT / "benchmarks/bench_lines.py"), "--no-save"]
    command += "--cases gradients logits --repeats 1".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(re.findall(r"^(\S+) +after +([\d,]+) MiB", done.stdout, re.M))
    assert found["gradients"] == "0"
    assert 0 < int(found["logits"]) < 250, found  # 483 where all logits of the teacher were kept


def test_the_table_has_a_line_for_each_case():
    lines = bench_lines.lines_table().splitlines()[2:]
    assert len(lines) == len(bench_lines.CASES)
    assert all(line.count("|") == 4 for line in lines)
