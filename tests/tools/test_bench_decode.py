"""benchmarks/bench_decode.py at a size where nothing can be timed: that it runs, what it counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import bench_decode  # noqa: E402


def test_a_token_waits_twice_at_most_for_a_gpu():
    """For the look at ended rollouts, and with top-p for one at the candidates."""
    command = [sys.executable, str(ROOT / "benchmarks/bench_decode.py"), "--no-save"]
    command += "--cases full top-p greedy --repeats 1 --vocab 600".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^(\S+) +after +[\d.]+ s, ([\d.]+) waits a token$", done.stdout, re.M)
    assert [name for name, _ in found] == ["full", "top-p", "greedy"]
    assert all(1 <= float(waits) <= 1 + (name == "top-p") for name, waits in found), found


def test_the_table_has_a_line_for_each_case():
    lines = bench_decode.decode_table().splitlines()[2:]
    assert len(lines) == len(bench_decode.CASES)
    assert all(line.count("|") == 7 for line in lines)
