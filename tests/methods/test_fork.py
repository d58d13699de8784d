"""Each method file, and each fork, copied alone into an empty folder, runs from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = [*sorted((ROOT / "methods").glob("*.py")), *sorted((ROOT / "forks").glob("*.py"))]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_copied_file_runs_alone(path, tmp_path):
    shutil.copy(path, tmp_path / "mine.py")
    small = "--steps 1 --prompts-per-step 2 --rollouts-per-prompt 2 --eval-every 0 --device cpu"
    done = subprocess.run(
        [sys.executable, "mine.py", *small.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout
    assert (tmp_path / "runs/mine/default/mine.py").read_text() == path.read_text()
