"""benchmarks/bench_ops.py at a size where nothing can be timed: that it runs, what it covers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import opd_ops

ROOT = Path(__file__).resolve().parents[2]
TINY = "--rows 4 --vocab 301 --k 8 --width 16 --threads 1 --repeats 1 --no-compile --no-save"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_public_op_is_timed_beside_a_baseline(dtype):
    command = [sys.executable, "benchmarks/bench_ops.py", *TINY.split(), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "ours x" in line]
    ops = {line[0] for line in lines} - {"memory"}
    wanted = set(opd_ops.__all__) - {"info"}
    assert ops == wanted
    for op in ops:
        assert any("opd_ops" in line for line in lines if line[0] == op)
        assert any("opd_ops" not in line for line in lines if line[0] == op), f"{op} stands alone"


def test_ops_are_chosen_by_how_their_names_start():
    command = [sys.executable, "benchmarks/bench_ops.py", *TINY.split(), "--ops", "ga"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    ops = {line.split()[0] for line in done.stdout.splitlines() if "ours x" in line}
    assert ops == {"memory", "gather_logp", "gated_kl"}
