"""The embedded pair, as `python methods/<m>.py` runs it: every method improves the student."""

from __future__ import annotations

import importlib

import pytest

from opd_run import files

METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_arguments_improves_the_tiny_student(tmp_path, name):
    """Ten steps of the defaults: held-out accuracy rises, the reverse KL falls."""
    lines = (files.TINY / "prompts/test.jsonl").read_text().splitlines(keepends=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(lines[::3]))
    flags = f"--steps 10 --eval-every 10 --eval-samples 3 --device cpu --test-prompts {few}"
    importlib.import_module(name).main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    rows = [row for row in files.read_metrics(tmp_path / "run") if "eval/student/avg@3" in row]
    assert [row["step"] for row in rows] == [0, 10]
    first, last = rows
    assert last["eval/student/avg@3"] > first["eval/student/avg@3"]
    assert last["eval/student/reverse_kl"] < 0.9 * first["eval/student/reverse_kl"]
    assert last["eval/student/truncated_share"] < 0.1
