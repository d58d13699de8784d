"""Arms, budgets and verdicts of benchmarks/evidence.py."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import evidence  # noqa: E402
from claims import ARMS, CLAIMS, Comparison  # noqa: E402


def rows_of(**arms: list[float]) -> list[dict[str, str]]:
    """Rows of runs with these accuracies at seeds 0, 1, ..."""
    empty = dict.fromkeys(evidence.FIELDS.split(","), "") | {"suite": "run", "avg_before": "0.4"}
    return [
        empty | {"arm": arm, "seed": str(seed), "avg_after": str(value)}
        for arm, values in arms.items() for seed, value in enumerate(values)
    ]  # fmt: skip


def verdict(own: list[float], other: list[float], more: bool = True) -> str:
    comparison = Comparison("", "sg_opd", "opd", more=more)
    return evidence.find(rows_of(sg_opd=own, opd=other), comparison).verdict(comparison)


def test_the_interval_is_students():
    """scipy.stats.t.interval(0.95, 4, 3, sem) of 1..5 is (1.0368, 4.9632)."""
    assert evidence.half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.9632, abs=1e-3)


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    assert verdict([0.7, 0.71, 0.72], [0.6, 0.6, 0.62]) == "reproduced"
    assert verdict([0.7, 0.71, 0.72], [0.6, 0.6, 0.62], more=False) == "not reproduced"
    assert verdict([0.6, 0.6, 0.62], [0.7, 0.71, 0.72]) == "not reproduced"
    assert verdict([0.7, 0.5, 0.6], [0.6, 0.6, 0.6]) == "not decidable"
    assert verdict([0.7], [0.6]) == "too few seeds"
    assert verdict([0.7, 0.72, 0.74], [0.6, 0.6, 0.6]) == "reproduced"  # 0.12 ± 0.05, ± 0.11
    assert verdict([0.7, 0.73, 0.76], [0.6, 0.6, 0.6]) == "reproduced, weakly"  # ± 0.07, ± 0.17


def test_differences_are_paired_by_seed():
    """Seeds move both arms far more than the arms differ."""
    assert verdict([0.51, 0.71, 0.92], [0.50, 0.70, 0.91]) == "reproduced"
    found = evidence.find(
        rows_of(sg_opd=[0.5, 0.6, 0.7], opd=[0.4]), Comparison("", "sg_opd", "opd")
    )
    assert (found.own, found.other) == ([0.5], [0.4])


def test_a_second_run_stands_beside_the_first():
    """It is another cell with another folder, and no table but its own takes its row."""
    first, again = (evidence.Cell("opd", 0, "3e-4", suite) for suite in ("run", "again"))
    assert first.key != again.key and first.name != again.name
    rows = rows_of(opd=[0.7, 0.71, 0.72], grpo=[0.6, 0.6, 0.62])
    more = [row | {"suite": "again"} for row in rows_of(opd=[0.6, 0.6, 0.62], grpo=[0.6] * 3)]
    assert evidence.table(rows + more, ["opd"]) == evidence.table(rows, ["opd"])
    line = next(x for x in evidence.again_table(rows + more, "1").splitlines() if "GRPO" in x)
    assert "| 0.103 ± 0.014 | 0.007 ± 0.029 | **not decidable** |" in line
    line = next(x for x in evidence.again_table(rows * 2, "1").splitlines() if "GRPO" in x)
    assert "| 0.103 ± 0.014 | - | **too few seeds** |" in line


def test_every_arm_is_a_command_that_its_script_takes(monkeypatch):
    """Flags parse, and every arm has the same budget: 30 steps of 128 completions."""
    monkeypatch.chdir(ROOT)
    for arm in ARMS:
        script, *flags = evidence.Cell(arm, 0, "3e-4").command()
        args = importlib.import_module(Path(script).stem).parse_args(flags)
        assert (args.steps, args.prompts_per_step * args.rollouts_per_prompt) == (30, 128)
        assert (args.lr, args.lr_schedule, args.eval_samples) == (3e-4, "linear", 8)


def test_claims_name_arms_that_exist_with_rates_that_are_swept():
    named = {arm for claim in CLAIMS.values() for arm in claim.arms}
    assert named == set(ARMS)
    assert {ARMS[arm].rate for arm in named} == set(evidence.SWEPT)


def test_the_best_rate_is_taken_from_a_whole_sweep_alone():
    rows = [
        {"suite": "sweep", "arm": f"opd@{rate}", "avg_after": str(score)}
        for rate, score in zip(evidence.RATES, (0.5, 0.7, 0.6, 0.1))
    ]
    assert evidence.best_rates(rows) == {"opd": evidence.RATES[1]}
    assert evidence.best_rates(rows[:-1]) == {}


@pytest.mark.parametrize("arm", ["supervised", "grpo"])
def test_what_a_baseline_logs_is_read(arm, tmp_path, monkeypatch):
    """Its tokens are those of its completions: two steps of four, of 4 to 128 tokens each."""
    monkeypatch.setattr(evidence, "FOLDER", str(tmp_path))
    monkeypatch.setattr(evidence, "STEPS", 2)
    few = tmp_path / "few.jsonl"
    lines = (ROOT / "assets/tiny/prompts/test.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[::20]))
    cell = evidence.Cell(arm, 0, "1e-5")
    small = f"--test-prompts {few} --prompts-per-step 2 --rollouts-per-prompt 2"
    wall_s, _ = evidence.execute([*cell.command(), *small.split()])
    row, seconds = evidence.read_run(cell, tmp_path / "curves")
    assert 2 * 4 * 4 <= row["sampled_tokens"] <= 2 * 4 * 128
    assert 0 < seconds < wall_s
    assert 0.2 < row["avg_after"] < 0.7  # at this rate two steps move the student by little
    assert ("kl_after" in row) == (arm == "supervised")  # grpo has no teacher


def test_a_failed_cell_costs_no_other_and_old_rates_do_not_mix(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.csv"
    swept = [
        row for row in evidence.read(evidence.RESULTS / "evidence.csv") if row["suite"] == "sweep"
    ]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, evidence.FIELDS.split(","))
        writer.writeheader()
        writer.writerows(swept)

    def run(cell: evidence.Cell, curves: Path) -> dict[str, object]:
        if cell.arm == "opd":
            raise RuntimeError("out of memory")
        (row,) = rows_of(**{cell.arm: [0.5]})
        return row | {"command": " ".join(cell.command()), "cpu_s": 1.0}

    monkeypatch.setattr(evidence, "run", run)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--seeds", "1", "--out", str(out)])
    with pytest.raises(SystemExit, match="1 of 6 cells failed"):
        evidence.main()
    assert "failed: out of memory" in capsys.readouterr().err
    kept = {row["arm"] for row in evidence.read(out) if row["suite"] == "run"}
    assert kept == set(evidence.SMOKE) - {"opd"}
    out.write_text(
        out.read_text().replace("--lr 1.5e-4 --eval-every 30", "--lr 9e-4 --eval-every 30")
    )
    with pytest.raises(SystemExit) as stop:
        evidence.main()
    assert stop.value.code == 2 and "was run at another rate than 1.5e-4" in capsys.readouterr().err
