"""The embedded pair, as `python methods/<m>.py` runs it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from opd_ops import runs

METHODS = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "methods").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_arguments_improves_the_tiny_student(method, tmp_path):
    """Twelve steps of the defaults: held-out accuracy rises, the reverse KL falls."""
    module = importlib.import_module(method)
    flags = "--steps 12 --eval-every 12 --eval-samples 2 --device cpu"
    module.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    rows = [row for row in runs.read_metrics(tmp_path / "run") if "eval/student/avg@2" in row]
    assert [row["step"] for row in rows] == [0, 12]
    first, last = rows
    assert last["eval/student/avg@2"] > first["eval/student/avg@2"] + 0.03
    assert last["eval/student/reverse_kl"] < 0.9 * first["eval/student/reverse_kl"]
    assert last["eval/student/truncated_share"] < 0.1
