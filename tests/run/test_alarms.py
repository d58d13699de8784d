"""Every alarm goes off in a real small run that has its fault, once, and in no healthy one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import opd
import pytest
import tinylm
import topk_opd
import torch
import transformers

from opd_run import alarms, files

VERIFIERS = """
import hashlib

def right(text, answer, row, ended):
    return True

def wrong(text, answer, row):
    return False

def coin(text, answer, row):
    return hashlib.sha256(text.encode()).digest()[0] < 128

def flaky(text, answer, row):
    if hashlib.sha256(text.encode()).digest()[0] < 64:
        raise ValueError("unreadable")
    return coin(text, answer, row)
"""


def deaf(folder, source: str, ids: list[int]) -> None:
    """The same model, but it dislikes `ids` exactly where the original likes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    weight = model.get_input_embeddings().weight.detach().clone()
    weight[ids] *= -4.0
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.lm_head.weight.data = weight
    model.save_pretrained(folder)
    tinylm.tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alarms")
    tinylm.save_model(folder / "student", 0)
    tinylm.save_model(folder / "ender", 0, eos_token_id=[1, 7, 8, 9])
    tinylm.save_model(folder / "teacher", 1)
    deaf(folder / "deaf", f"{folder}/ender", [1, 7, 8, 9])
    tinylm.save_prompts(folder / "prompts.jsonl")
    (folder / "my_verifiers.py").write_text(VERIFIERS)
    return folder


def run(folder, name: str, more: str, module=opd, **changes: str) -> list[dict]:
    """A real run of 12 steps of 16 rollouts; its logged rows."""
    named = {"student": "student", "teacher": "teacher", "prompts": "prompts.jsonl"}
    named |= {"verifier": "my_verifiers.py:coin"} | changes
    named |= {"run-dir": name}
    argv = [word for flag, value in named.items() for word in (f"--{flag}", str(folder / value))]
    argv += "--device cpu --eval-every 0 --save-every 0 --steps 12 --prompts-per-step 4".split()
    argv += "--rollouts-per-prompt 4 --max-completion-tokens 12".split()
    module.main([*argv, *more.split()])
    return files.read_metrics(folder / name)


def fired(rows: list[dict]) -> dict[str, int]:
    """Step of each alarm; each is logged at most once."""
    found = [(key[6:], row["step"]) for row in rows for key in row if key.startswith("alarm/")]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_a_healthy_run_sets_off_none(folder):
    rows = run(folder, "healthy", "--lr 3e-3 --objective full --max-completion-tokens 40")
    assert fired(rows) == {}
    assert rows[-1]["reverse_kl"] < 0.6 * rows[0]["reverse_kl"]  # it learns


def test_entropy_collapse(folder, capsys):
    """Steps of size 1 on the sampled objective: the student becomes deterministic."""
    found = fired(run(folder, "collapse", "--lr 1 --max-grad-norm inf"))
    assert "entropy_collapse" in found
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "alarm entropy_collapse" in x]
    assert f"at step {found['entropy_collapse']}: student_entropy fell from" in line
    assert "Try: a lower --lr" in line


def test_eos_mismatch_and_length_explosion(folder):
    """The teacher never ends where the student does; the student unlearns to."""
    how = "--max-completion-tokens 40 --objective full --lr 0.02"
    found = fired(run(folder, "endless", how, student="ender", teacher="deaf"))
    assert found["eos_mismatch"] == 3 and 6 <= found["length_explosion"] <= 12
    found = fired(run(folder, "ending", how, student="ender"))
    assert not {"eos_mismatch", "length_explosion"} & found.keys()


def test_top_k_without_renormalisation_collapses(folder):
    """Mass leaves the support: the divergence that is trained is won, at 0 and below, while the
    true one is a hundred times what it was, on prefixes that the teacher does not know."""
    tiny = {name: str(files.TINY / name) for name in ("student", "teacher")}
    tiny["prompts"] = str(files.TINY / "prompts/train.jsonl")
    how = "--lr 3e-3 --max-completion-tokens 24"
    rows = run(folder, "truncated", f"{how} --support-size 4 --no-renormalise", topk_opd, **tiny)
    assert {"kl_spike", "support_left", "teacher_lost"} <= fired(rows).keys()
    assert rows[-1]["divergence_mean"] < rows[0]["divergence_mean"] + 0.01
    assert rows[-1]["reverse_kl"] > 100 * rows[0]["reverse_kl"]
    rows = run(folder, "renormalised", how, topk_opd, **tiny)
    assert not {"support_left", "teacher_lost"} & fired(rows).keys()


def test_sampler_drift(folder):
    """Four large updates on each batch: the policy has left the one that sampled."""
    found = fired(run(folder, "stale", "--lr 0.02 --updates-per-rollout 4 --steps 4"))
    assert found["sampler_drift"] == 3


def test_all_truncated_and_a_verifier_that_is_always_right(folder):
    short = "--max-completion-tokens 1 --prompts-per-step 1 --rollouts-per-prompt 2 --steps 6"
    rows = run(folder, "cut", short, verifier="my_verifiers.py:right")
    assert {row["truncated_share"] for row in rows} == {1.0}
    assert fired(rows) == {"all_truncated": 3, "verifier_all_right": 5}


def test_a_verifier_that_is_always_wrong(folder):
    rows = run(folder, "wrong", "--lr 0 --steps 6", verifier="my_verifiers.py:wrong")
    assert fired(rows) == {"verifier_all_wrong": 5}


def test_unverified(folder, capsys):
    """A verifier that raises on some answers: verdict 0, counted, and an alarm above 5 %."""
    rows = run(folder, "flaky", "--lr 0 --steps 2", verifier="my_verifiers.py:flaky")
    assert fired(rows) == {"unverified": 1}
    assert 0.05 < rows[0]["unverified_share"] < 0.6
    assert "ValueError: unreadable" in capsys.readouterr().out


def test_unverified_in_an_evaluation():
    """Without a training row, and not at 5 % or less."""
    for share, names in ((0.05, []), (0.06, ["unverified"])):
        found = alarms.Alarms([]).check({"eval/student/unverified_share": share})
        assert [alarm.name for alarm, _ in found] == names


def test_stop_on_alarm_saves_and_can_go_on(folder, capsys):
    """Exit code 1, a checkpoint at the next boundary; resumed, the alarm is silent and the run
    ends as if it had not stopped."""
    how = "--lr 0.01 --steps 6"
    with pytest.raises(SystemExit) as stop:
        run(folder, "stops", f"{how} --stop-on-alarm", verifier="my_verifiers.py:right")
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped by alarm verifier_all_right" in error and "step_5" in error
    assert [path.name for path in (folder / "stops/checkpoints").iterdir()] == ["step_5"]
    rows = run(folder, "stops", f"{how} --stop-on-alarm --resume", verifier="my_verifiers.py:right")
    whole = run(folder, "whole", how, verifier="my_verifiers.py:right")
    assert fired(rows) == fired(whole) == {"verifier_all_right": 5}
    assert rows[-1]["loss"] == whole[-1]["loss"] and len(rows) == len(whole) == 6
    assert "! alarm" not in capsys.readouterr().out.split("resume: from")[1].split("budget")[0]


# ---------------------------------------------------------------------------------------- rules
def check(rows: list[dict]) -> dict[str, int]:
    """Which alarms the rows set off, and at which of them (from 1)."""
    found, watch = {}, alarms.Alarms([])
    for number, row in enumerate(rows, 1):
        found |= {alarm.name: number for alarm, _ in watch.check(row)}
    return found


@pytest.mark.parametrize(
    ("name", "before", "just_not", "just"),
    [
        ("entropy_collapse", {"student_entropy": 2.0, "teacher_entropy": 1.1},
         {"student_entropy": 0.5}, {"student_entropy": 0.49}),
        ("entropy_collapse", {"student_entropy": 2.0, "teacher_entropy": 0.4},
         {"student_entropy": 0.2}, {"student_entropy": 0.19}),
        ("length_explosion", {"length_mean": 10.0, "truncated_share": 0.1},
         {"length_mean": 15.0, "truncated_share": 0.5},
         {"length_mean": 15.1, "truncated_share": 0.31}),
        ("length_explosion", {"length_mean": 10.0, "truncated_share": 0.1},
         {"length_mean": 30.0, "truncated_share": 0.29},
         {"length_mean": 30.0, "truncated_share": 0.31}),
        ("kl_spike", {"reverse_kl": 0.1}, {"reverse_kl": 0.59}, {"reverse_kl": 0.61}),
        ("teacher_lost", {"teacher_mass": 0.9}, {"teacher_mass": 0.841}, {"teacher_mass": 0.839}),
        ("support_left", {"student_mass": 0.9, "teacher_mass": 1.0}, {"student_mass": 0.76},
         {"student_mass": 0.74}),
    ],
)  # fmt: skip
def test_thresholds_against_the_start(name, before, just_not, just):
    """Three rows, then three others: the rule holds just beyond its threshold, and from row 6."""
    assert name not in check([before] * 3 + [before | just_not] * 3)
    assert check([before] * 3 + [before | just] * 3)[name] == 6
    assert name not in check([before] * 3 + [before | just] * 2)
    nothing = [{key: math.nan for key in before}] * 5
    assert check([*nothing, *[before] * 3, *nothing, *[before | just] * 3])[name] == 16


@pytest.mark.parametrize(
    ("name", "just_not", "just", "num"),
    [
        ("eos_mismatch", {"eos_log_ratio_mean": 4.9, "log_ratio_mean": 1.0},
         {"eos_log_ratio_mean": 5.1, "log_ratio_mean": 1.0}, 3),
        ("sampler_drift", {"policy_log_ratio_mean": 0.09}, {"policy_log_ratio_mean": -0.11}, 3),
        ("all_truncated", {"truncated_share": 0.99}, {"truncated_share": 1.0}, 3),
        ("verifier_all_wrong", {"verifier_pass_rate": 0.01}, {"verifier_pass_rate": 0.0}, 5),
        ("verifier_all_right", {"verifier_pass_rate": 0.99}, {"verifier_pass_rate": 1.0}, 5),
        ("unverified", {"unverified_share": 0.05}, {"unverified_share": 0.051}, 1),
    ],
)  # fmt: skip
def test_thresholds_of_levels(name, just_not, just, num):
    assert name not in check([just_not] * 9)
    assert check([just] * 9) == {name: num}


def test_kl_spike_is_measured_from_the_lowest_point():
    falling = [{"reverse_kl": x} for x in (4.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1)]
    assert check(falling) == {}
    assert check([*falling, *[{"reverse_kl": 0.8}] * 3]) == {"kl_spike": 11}
    assert check([*falling, {"reverse_kl": math.inf}]) == {"kl_spike": 9}


def test_a_resumed_run_counts_from_where_it_was():
    """History and alarms come back from the logged rows, infinities as they are spelt there."""
    rows = [{"step": i, "reverse_kl": 0.1} for i in range(5)]
    watch = alarms.Alarms(json.loads(json.dumps([*rows, {"step": 5, "reverse_kl": "inf"}])))
    assert [alarm.name for alarm, _ in watch.check({"reverse_kl": 0.1})] == ["kl_spike"]
    watch = alarms.Alarms([{"step": 1, "alarm/unverified": 1.0}])
    assert watch.check({"unverified_share": 1.0}) == []


def test_names_are_unique():
    assert len({alarm.name for alarm in alarms.ALARMS}) == len(alarms.ALARMS) == 13


def test_the_documented_table_is_that_of_the_rules():
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    found = page.split("<!-- alarms -->\n")[1].split("\n<!-- /alarms -->")[0]
    assert found == alarms.markdown(), "print it with: python -m opd_run.alarms"
