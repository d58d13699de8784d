"""The embedded pair, as `python methods/opd.py` runs it."""

from __future__ import annotations

import opd
import pytest

from opd_ops import runs


@pytest.mark.slow
def test_opd_without_arguments_improves_the_tiny_student(tmp_path):
    """Twelve steps of the defaults: held-out accuracy rises, the reverse KL falls."""
    flags = "--steps 12 --eval-every 12 --eval-samples 2 --device cpu"
    opd.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    rows = [row for row in runs.read_metrics(tmp_path / "run") if "eval/student/avg@2" in row]
    assert [row["step"] for row in rows] == [0, 12]
    first, last = rows
    assert last["eval/student/avg@2"] > first["eval/student/avg@2"]
    assert last["eval/student/reverse_kl"] < 0.9 * first["eval/student/reverse_kl"]
    assert last["eval/student/truncated_share"] < 0.1
