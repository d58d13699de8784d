"""benchmarks/plurals.py: its commands, a cell from end to end, its table; and the example."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import opd
import pytest

from opd_run.files import TINY, read_metrics

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import plurals  # noqa: E402
import readme_figure  # noqa: E402


def test_every_arm_gets_the_same_budget(monkeypatch):
    monkeypatch.chdir(ROOT)
    for arm in plurals.ARMS:
        script, *flags = plurals.training(arm, 2, "m", plurals.STEPS)
        args = importlib.import_module(Path(script).stem).parse_args(flags)
        assert args.prompts_per_step * args.rollouts_per_prompt * args.steps == 640
        assert (args.lr, args.seed, args.student, args.teacher) == (2e-5, 2, "m", ["m"])


@pytest.mark.slow
def test_a_cell_is_a_row_and_a_curve_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(plurals, "FOLDER", str(tmp_path))
    monkeypatch.chdir(ROOT)
    model = str(TINY / "student")
    cells = [("opd", 0), (plurals.UNTOUCHED, 0)]
    rows = [plurals.run(*cell, model, 1, 1, tmp_path / "curves") for cell in cells]
    assert rows[1]["elsewhere_kl"] == 0.0 < rows[0]["elsewhere_kl"]
    assert rows[1]["elsewhere_length"] > 1 and not (tmp_path / "opd-0/checkpoints").exists()
    plurals.append(tmp_path / "rows.csv", rows, plurals.FIELDS)
    shown = plurals.table(plurals.read(tmp_path / "rows.csv"))
    assert "| opd | 1 |" in shown and "| untouched | 1 |" in shown
    readme_figure.draw_plurals([f"a={tmp_path}/curves/opd-0.jsonl"], tmp_path / "plot.png")
    readme_figure.draw_plurals([f"{tmp_path}/opd-0"], tmp_path / "same.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000 < (tmp_path / "same.png").stat().st_size


def test_the_table_says_gain_and_share_of_the_gap():
    assert plurals.table([]) == "not measured"
    rows = [
        dict.fromkeys(plurals.FIELDS.split(","), "") | {
            "arm": arm, "seed": str(seed), "teacher": "0.8", "before": "0.2", "after": after,
            "kl_after": "0.1", "elsewhere_kl": "0.05", "elsewhere_length": "50",
            "elsewhere_cut": "0.25",
        }
        for arm, accuracies in {"opd": ["0.5", "0.9"], "tropd": ["0.4"]}.items()
        for seed, after in enumerate(accuracies)
    ]  # fmt: skip
    found = [line.split(" | ") for line in plurals.table(rows).splitlines()]
    (one,) = [line for line in found if line[0] == "| tropd"]
    assert one[2:7] == ["0.200", "0.400", "0.200", "0.333", "in 0 of 1"]
    (two,) = [line for line in found if line[0] == "| opd"]
    assert two[3].startswith("0.700 ±") and two[5].startswith("0.833 ±") and two[6] == "in 1 of 2"


@pytest.mark.smollm2
def test_a_real_model_learns_from_itself(tmp_path, monkeypatch, capsys):
    """Six steps of 16 words: the gap is there, the reverse KL to the teacher falls by a third."""
    monkeypatch.chdir(ROOT)
    few = tmp_path / "few.jsonl"
    rows = (ROOT / plurals.WORDS / "test.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(rows[::3]))
    _, *flags = plurals.training("opd-full", 0, os.environ["OPD_SMOLLM2"], 6)
    run = tmp_path / "run"
    more = ["--prompts-per-step", "16", "--test-prompts", str(few), "--run-dir", str(run)]
    flags[flags.index("--test-prompts") : flags.index("--test-prompts") + 2] = []
    opd.main([*flags, *more])
    found = plurals.of_training(read_metrics(run))
    assert found["teacher"] >= found["before"] + 0.5, found
    assert found["kl_after"] < 0.67 * found["kl_before"], found
    assert "gap: test: teacher" in capsys.readouterr().out
