"""Arms, budgets and verdicts of benchmarks/evidence.py."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import evidence  # noqa: E402
import findings  # noqa: E402
from claims import (  # noqa: E402
    ARMS,
    CLAIMS,
    DECIDED,
    FIRST_SEED,
    LADDER,
    RATES,
    SMOKE,
    STUDIES,
    SWEPT,
    Comparison,
)
from rows import half_width, student_t  # noqa: E402


def rows_of(numerics: str = "one", first: int = 0, **arms: list[float]) -> list[dict[str, str]]:
    """Rows of runs with these accuracies at seeds first, first + 1, ..."""
    empty = dict.fromkeys(evidence.FIELDS.split(","), "") | {"suite": "run", "avg_before": "0.4"}
    empty |= {"numerics": numerics, "dirty": "False"}
    return [
        empty | {"arm": arm, "seed": str(seed), "avg_after": str(value)}
        for arm, values in arms.items() for seed, value in enumerate(values, first)
    ]  # fmt: skip


def verdict(own: list[float], other: list[float], more: bool = True, ours: bool = False) -> str:
    comparison = Comparison("", "sg_opd", "opd", more=more, ours=ours)
    return findings.find(rows_of(sg_opd=own, opd=other), comparison).shown(comparison)


def test_the_interval_is_students():
    """scipy.stats.t.interval(0.95, 4, 3, sem) of 1..5 is (1.0368, 4.9632)."""
    assert half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.9632, abs=1e-4)


def test_quantiles_are_those_of_printed_tables():
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 31: 2.040}
    for freedom, t in printed.items():
        assert student_t(freedom) == pytest.approx(t, abs=6e-4), freedom
    assert student_t(4, 0.99) == pytest.approx(4.604, abs=6e-4)
    assert student_t(10, 0.5) == pytest.approx(0.700, abs=6e-4)


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    assert verdict([0.7, 0.71, 0.72], [0.6, 0.6, 0.62]) == "reproduced"
    assert verdict([0.7, 0.71, 0.72], [0.6, 0.6, 0.62], more=False) == "not reproduced here"
    assert verdict([0.6, 0.6, 0.62], [0.7, 0.71, 0.72]) == "not reproduced here"
    assert verdict([0.7], [0.6]) == "too few seeds"
    assert verdict([], [0.6]) == "not run"
    # 0, 0.1 and -0.1: the mean is 0, the half-width 4.303 * 0.1 / sqrt(3)
    assert verdict([0.6, 0.7, 0.5], [0.6, 0.6, 0.6]) == "no difference seen, at most 0.248"
    assert verdict([0.7, 0.71, 0.72], [0.6, 0.6, 0.62], ours=True) == "holds"
    assert verdict([0.6, 0.6, 0.62], [0.7, 0.71, 0.72], ours=True) == "does not hold here"


def test_differences_are_paired_by_seed():
    """Seeds move both arms far more than the arms differ."""
    assert verdict([0.51, 0.71, 0.92], [0.50, 0.70, 0.91]) == "reproduced"
    found = findings.find(
        rows_of(sg_opd=[0.5, 0.6, 0.7], opd=[0.4]), Comparison("", "sg_opd", "opd")
    )
    assert (found.own, found.other) == ([0.5], [0.4])


def test_rows_of_other_numerics_are_never_paired():
    """Of two numerics the one with more pairs counts, the newer of equals; none without pairs."""
    comparison = Comparison("", "sg_opd", "opd")
    old, new = rows_of(sg_opd=[0.5, 0.6]), rows_of("two", opd=[0.4, 0.4, 0.4], sg_opd=[0.9])
    assert findings.find([*old, *new[:3]], comparison).own == []
    assert findings.find([*old, *new], comparison).own == [0.9]
    assert findings.find([*old, *rows_of(opd=[0.1, 0.2]), *new], comparison).other == [0.1, 0.2]
    assert findings.find([*rows_of(opd=[0.3], sg_opd=[0.4]), *new], comparison).own == [0.9]
    line = findings.table([*old, *new], ["sg_opd"]).splitlines()[-1]
    assert line.startswith("| sg_opd | 2 | 0.550") and line.endswith("| 0.500, 1 seeds |")


def test_a_row_of_a_changed_tree_is_compared_with_nothing():
    row = {"commit": "327ce54006", "dirty": "False", "numerics": ""}
    assert findings.numerics_of(row) == findings.numerics_of(row | {"commit": "16c68452b4"}) != ""
    assert findings.numerics_of(row | {"dirty": "True"}) == ""
    assert findings.numerics_of(row | {"commit": "0123456789"}) == ""
    unknown = rows_of("", opd=[0.4, 0.4], sg_opd=[0.5, 0.6])
    assert findings.find(unknown, Comparison("", "sg_opd", "opd")).own == []


def test_the_second_run_has_the_digits_of_the_first():
    """Why the commits of FIRST_ROWS count as one numerics: four arms, five seeds, four commits."""
    rows = evidence.read(evidence.RESULTS / "evidence.csv")
    rows = [row for row in rows if not row.get("numerics")]
    first, again = (
        {(row["arm"], row["seed"]): row for row in rows if row["suite"] == suite}
        for suite in ("run", "again")
    )
    assert len(again) == 20 and {row["commit"] for row in first.values()} < {*findings.FIRST_ROWS}
    for key, row in again.items():
        for column in ("avg_after", "pass8_after", "kl_after", "grad_norm", "sampled_tokens"):
            assert row[column] == first[key][column], (key, column)


def test_numerics_follow_the_files_that_can_change_a_number(tmp_path, monkeypatch):
    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        evidence.subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True)

    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    assert evidence.numerics() == ""  # no repository
    git("init", "-q")
    for name in ("methods", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    first = evidence.numerics()
    (tmp_path / "docs/a").write_text("2")
    assert evidence.numerics() == first != ""
    (tmp_path / "methods/a").write_text("2")
    assert evidence.numerics() == ""
    git("commit", "-qam", "two")
    assert evidence.numerics() not in ("", first)


def test_seeds_follow_from_the_first_five_pairs():
    """For ± 0.010; a pair that is three half-widths from 0 stops at five; 32 at most."""
    step = [-0.02, -0.01, 0.0, 0.01, 0.02]  # sd 0.0158
    num = findings.seeds_needed(step)
    assert student_t(num - 1) * 0.015811 / math.sqrt(num) <= 0.010
    assert student_t(num - 2) * 0.015811 / math.sqrt(num - 1) > 0.010
    assert findings.seeds_needed([*step, 9.0, -9.0]) == num  # later ones do not count
    assert findings.seeds_needed([3 * value for value in step]) == 32
    assert findings.seeds_needed([value + 0.06 for value in step]) == 5
    assert findings.seeds_needed([value / 10 for value in step]) == 5
    assert findings.seeds_needed(step[:4]) == 5


def test_the_comparisons_to_decide_ask_for_the_seeds_that_they_need():
    best = dict.fromkeys(SWEPT, "3e-4")
    assert {cell.seed for cell in evidence.cells_to_decide([], best)} == {*range(5, 10)}
    rows = rows_of(first=FIRST_SEED, topk_opd=[0.6, 0.61, 0.62, 0.63, 0.64], opd=[0.62] * 5)
    found = evidence.cells_to_decide(rows, best)
    num = findings.seeds_needed([-0.02, -0.01, 0.0, 0.01, 0.02])
    for arm in ("topk_opd", "opd"):
        assert {c.seed for c in found if c.arm == arm} == {*range(5, 5 + num)}
    assert {c.seed for c in found if c.arm == "grpo"} == {*range(5, 10)}
    assert not any("ladder" in cell.arm for cell in found)  # no form of tropd is known yet
    arms = STUDIES["ladder"].arms
    scores = {arm: [0.5 + 0.1 * (arm == "ladder-clip-1.72-best")] * 3 for arm in arms}
    found = evidence.cells_to_decide(rows_of(**scores), best)
    ladder = {cell.arm for cell in found if "ladder" in cell.arm}
    assert ladder == {"ladder-clip-1.72-best", "ladder-opd-best"}
    # nor do the seeds that decide about a form change which form it is, or the ladder's table
    more = {"ladder-clip-1.72-best": [0.1] * 5, "ladder-opd-best": [0.9] * 5}
    rows = rows_of(**scores)
    both = rows + rows_of(first=FIRST_SEED, **more)
    assert findings.best_form(both) == "ladder-clip-1.72-best"
    assert findings.ladder_table(both) == findings.ladder_table(rows)
    assert "| 5 | 5 | 0.000 | -0.800 ± 0.000 |" in findings.decide_table(both)


def test_a_second_run_stands_beside_the_first():
    """It is another cell with another folder, and no table but its own takes its row."""
    first, again = (evidence.Cell("opd", 0, "3e-4", suite) for suite in ("run", "again"))
    assert first.key != again.key and first.name != again.name
    rows = rows_of(opd=[0.7, 0.71, 0.72], grpo=[0.6, 0.6, 0.62])
    more = [row | {"suite": "again"} for row in rows_of(opd=[0.6, 0.6, 0.62], grpo=[0.6] * 3)]
    assert findings.table(rows + more, ["opd"]) == findings.table(rows, ["opd"])
    line = next(x for x in findings.again_table(rows + more, "1").splitlines() if "GRPO" in x)
    assert "| 0.103 ± 0.014 | 0.007 ± 0.029 | **no difference seen, at most 0.035** |" in line
    line = next(x for x in findings.again_table(rows * 2, "1").splitlines() if "GRPO" in x)
    assert "| 0.103 ± 0.014 | - | **not run** |" in line
    newer = rows_of("two", opd=[0.9] * 3, grpo=[0.1] * 3)  # are beside neither
    assert findings.again_table(rows + more + newer, "1") == findings.again_table(rows + more, "1")


def test_what_newer_code_moved_is_shown_by_seed():
    old = [row | {"numerics": "", "commit": next(iter(findings.FIRST_ROWS))}
           for row in rows_of(grpo=[0.6, 0.62, 0.64, 0.9])]  # fmt: skip
    new = rows_of("two", grpo=[0.61, 0.62, 0.66])
    again = [row | {"suite": "again", "avg_after": "0.1"} for row in old]
    others = [row | {"seed": str(5 + place)} for place, row in
              enumerate(rows_of("three", grpo=[0.7] * 9))]  # fmt: skip
    rows = old + new + again + others  # the newest, but of none of these seeds
    line = next(x for x in findings.moved_table(rows, "1").splitlines() if "grpo" in x)
    assert line == "| grpo | 3 | 0.620 ± 0.050 | 0.630 ± 0.066 | 0.010 ± 0.025 |"
    assert "| grpo | 0 | - | - | - |" in findings.moved_table(old, "1")


def test_every_arm_is_a_command_that_its_script_takes(monkeypatch):
    """Flags parse; the arms of a claim have one budget: 30 steps of 128 completions."""
    monkeypatch.chdir(ROOT)
    studied = {arm for study in STUDIES.values() for arm in study.arms if "ladder" not in arm}
    for arm, how in ARMS.items():
        script, *flags = evidence.Cell(arm, 0, "3e-4").command()
        args = importlib.import_module(Path(script).stem).parse_args(flags)
        rollouts = args.prompts_per_step * args.rollouts_per_prompt
        assert (args.lr, args.steps) == (3e-4, how.steps)
        assert rollouts == (16 if arm.startswith("vocabulary") else 128)
        assert args.eval_every == (how.eval_every or how.steps)
        if arm not in studied:
            assert (args.steps, args.lr_schedule, args.eval_samples) == (30, "linear", 8)


def test_the_ladder_changes_one_thing_at_a_time(monkeypatch):
    """Each step differs from the one before in one flag of the method, but for its number."""
    monkeypatch.chdir(ROOT)
    flags = {arm: ARMS[arm].flags.split()[2:] for arm, _, _ in LADDER.values()}
    assert flags["ladder-opd"] == flags["ladder-tropd"] == []
    assert flags["ladder-forward_kl"] == ["--no-guidance"]
    for threshold in ("-1.72", "-0.85"):
        assert flags[f"ladder-clip{threshold}"][-1] == f"--outlier-threshold={threshold}"
        assert flags[f"ladder-clip{threshold}"][:-1] == flags["ladder-open"][:-1]
    assert [w.replace("mask", "clip") for w in flags["ladder-mask"]] == flags["ladder-clip-0.85"]
    assert ARMS["ladder-tropd"].rate == "3e-4" and ARMS["ladder-tropd-best"].rate in SWEPT


def test_every_arm_belongs_to_a_claim_or_a_study_and_has_a_rate():
    named = {arm for claim in CLAIMS.values() for arm in claim.arms}
    named |= {arm for study in STUDIES.values() for arm in study.arms}
    named |= {str(arm) for each in DECIDED for arm in (each.arm, each.than)}
    assert named == set(ARMS)
    rates = {how.rate for how in ARMS.values()}
    assert {*SWEPT} - rates == set() and all(rate in SWEPT or float(rate) for rate in rates)


def test_a_sweep_on_held_out_prompts_does_not_see_the_test_prompts():
    (cell, *others) = evidence.sweep(["end-opd"])
    words = cell.command()
    assert words[words.index("--test-prompts") + 1].endswith("prompts/held_out.jsonl")
    assert words[words.index("--prompts") + 1].endswith("prompts/rest.jsonl")
    assert words[words.index("--steps") + 1] == "100" and len(others) == 2
    assert "--test-prompts" not in evidence.Cell("end-opd", 0, "3e-4").command()


def test_prompts_are_taken_out_and_models_are_made(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(evidence, "FOLDER", str(tmp_path))
    evidence.make_inputs()
    rest, held_out, train = (
        path.read_text().splitlines()
        for path in (
            tmp_path / "prompts/rest.jsonl",
            tmp_path / "prompts/held_out.jsonl",
            evidence.TINY / "prompts/train.jsonl",
        )
    )
    assert rest + held_out == train and len(held_out) == 306 and not {*rest} & {*held_out}
    test = (tmp_path / "prompts/sub_test.jsonl").read_text().splitlines()
    assert {json.loads(line)["domain"] for line in test} == {"sub"} and len(test) > 50
    logits = {}
    for name in ("models/teacher_sure", "models/teacher_flat"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits[name] = model(torch.tensor([[1, 5, 9]])).logits
    sure, flat = logits.values()
    torch.testing.assert_close(sure, flat * evidence.SURE**2, rtol=1e-4, atol=1e-4)


def test_the_best_rate_is_taken_from_a_whole_sweep_alone():
    rows = [
        {"suite": "sweep", "arm": f"opd@{rate}", "avg_after": str(score)}
        for rate, score in zip(RATES, (0.5, 0.7, 0.6, 0.1))
    ]
    assert findings.best_rates(rows) == {"opd": RATES[1]}
    assert findings.best_rates(rows[:-1]) == {}


@pytest.mark.parametrize("arm", ["supervised", "grpo", "support-2-raw"])
def test_what_a_cell_logs_is_read(arm, tmp_path, monkeypatch):
    """Its tokens are those of its completions: two steps of four, of 4 to 128 tokens each."""
    monkeypatch.setattr(evidence, "FOLDER", str(tmp_path))
    how = evidence.replace(ARMS[arm], steps=2, eval_every=1)
    monkeypatch.setitem(evidence.ARMS, arm, how)
    few = tmp_path / "few.jsonl"
    lines = (ROOT / "assets/tiny/prompts/test.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[::20]))
    cell = evidence.Cell(arm, 0, "1e-5")
    small = f"--test-prompts {few} --prompts-per-step 2 --rollouts-per-prompt 2"
    small += " --eval-teacher" * (arm == "support-2-raw")
    wall_s, _ = evidence.execute([*cell.command(), *small.split()])
    row, seconds = evidence.read_run(cell, tmp_path / "curves")
    assert 2 * 4 * 4 <= row["sampled_tokens"] <= 2 * 4 * 128
    assert 0 < seconds < wall_s and row["device"] == evidence.processor() != "cpu"
    assert 0.2 < row["avg_after"] < 0.7  # at this rate two steps move the student by little
    assert ("kl_after" in row) == (arm != "grpo")  # grpo has no teacher
    curve = [json.loads(x) for x in (tmp_path / f"curves/{cell.name}.jsonl").open()]
    scores = [one for one in curve if "accuracy" in one]
    assert [one["tokens"] for one in scores][-1] == row["sampled_tokens"] and len(scores) == 3
    assert scores[0]["tokens"] == 0 and scores[-1]["accuracy"] == pytest.approx(
        row["avg_after"], abs=1e-3
    )
    if arm == "support-2-raw":
        assert row["avg_teacher"] > 0.8
        masses = [one for one in curve if "teacher_top" in one]
        assert len(masses) == 2 and all(0 < one["student_top"] < 1.001 for one in masses)
        # the trace has two rollouts of four; the loss logs the same mass over all tokens
        for one in masses:
            assert one["teacher_top"] == pytest.approx(one["teacher_mass_mean"], abs=0.1)


def test_the_time_to_a_score_lies_between_two_evaluations():
    curve = [{"accuracy": a, "tokens": n} for a, n in ((0.4, 0), (0.7, 100), (0.8, 200))]
    assert findings.time_to(curve, "tokens") == pytest.approx(150)
    assert findings.time_to(curve[:2], "tokens") is None


def test_curves_are_those_of_the_rows(tmp_path, monkeypatch):
    """The agreement of teacher and verifier, the mass on the support: in their tables."""
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    values = {"correct_mean": 0.5, "incorrect_mean": 0.3}
    values |= {"agree_correct_mean": 0.4, "agree_incorrect_mean": 0.2}
    values |= {"student_top": 0.3, "teacher_top": 0.9, "step": 1}
    for arm in ("sg_opd-weak", "support-4-raw"):
        path = tmp_path / f"evidence/one/run-{arm}-{FIRST_SEED}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values) + "\n")
    arms = {"sg_opd-weak": [0.6], "opd-weak": [0.5], "support-4-raw": [0.3]}
    tables = findings.study_tables(rows_of(first=FIRST_SEED, **arms))
    assert "| expert of additions | 1 | 0.750 | 0.500 | 0.100 | - |" in tables["teachers"]
    assert "| support-4-raw | 1 | 0.300 | 0.300 | 0.331 | 0.300 |" in tables["support"]
    assert "| the good one, noisy | not run | - | - | - | - |" in tables["teachers"]


def test_every_figure_is_drawn_from_its_rows(tmp_path, monkeypatch):
    """Without rows none but the comparisons; with rows and curves of every study all of them."""
    findings.draw([], tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["evidence.png"]
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    values = {"step": 1, "correct_mean": 0.5, "incorrect_mean": 0.3, "agree_correct_mean": 0.4}
    values |= {"agree_incorrect_mean": 0.2, "student_top": 0.3, "teacher_top": 0.9}
    values |= {"accuracy": 0.5, "tokens": 100, "train_s": 5.0}
    rows = []
    for study in STUDIES.values():
        rows += rows_of(first=study.seeds[0], **{arm: [0.5, 0.6] for arm in study.arms})
    for row in rows:
        path = tmp_path / f"evidence/one/run-{row['arm']}-{row['seed']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((json.dumps(values) + "\n") * 2)
    findings.draw(rows, tmp_path / "all")
    names = {path.stem for path in (tmp_path / "all").iterdir()}
    assert names == {f"evidence{end}" for end in ("", "_ladder", "_end", "_support", "_gate")}


def test_studies_without_rows_say_so():
    for name, text in findings.study_tables([]).items():
        rows = [line for line in text.splitlines()[2:]]
        assert rows and all("not run" in row for row in rows), name
    assert "reproduced:" not in findings.sentences([])
    assert " 0 are reproduced." in findings.in_short([])


def test_a_failed_cell_costs_no_other_and_old_rates_do_not_mix(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.csv"
    swept = [
        row for row in evidence.read(evidence.RESULTS / "evidence.csv") if row["suite"] == "sweep"
    ]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, evidence.FIELDS.split(","))
        writer.writeheader()
        writer.writerows(swept)

    monkeypatch.setattr(evidence, "numerics", lambda: "one")
    monkeypatch.setattr(evidence, "make_inputs", lambda: None)

    def run(cell: evidence.Cell, curves: Path) -> dict[str, object]:
        if cell.arm == "opd":
            raise RuntimeError("out of memory")
        (row,) = rows_of(**{cell.arm: [0.5]})
        return row | {"command": " ".join(cell.command()), "cpu_s": 1.0}

    monkeypatch.setattr(evidence, "run", run)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--seeds", "1", "--out", str(out)])
    with pytest.raises(SystemExit, match="1 cells failed"):
        evidence.main()
    assert "failed: out of memory" in capsys.readouterr().err
    kept = {row["arm"] for row in evidence.read(out) if row["suite"] == "run"}
    assert kept == set(SMOKE) - {"opd"}
    out.write_text(
        out.read_text().replace("--lr 1.5e-4 --eval-every 30", "--lr 9e-4 --eval-every 30")
    )
    with pytest.raises(SystemExit) as stop:
        evidence.main()
    assert stop.value.code == 2 and "was run at another rate than 1.5e-4" in capsys.readouterr().err
