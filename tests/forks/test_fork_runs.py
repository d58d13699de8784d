"""Forks run: equal to opd.py at neutral parameters, and without a teacher."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import opd
import pytest
import tinylm
import torch
import transformers

from opd_run.console import RunError

NEUTRAL = {  # with what these forks are opd, but for rounding
    "reward_opd": "--verdict-weight 0",
    "eopd": "--uncertain-above inf",
    "reopold": "--floor-weight 0 --entropy-share 1",
    "drift_gate": "--drift-rate 0",
}
CHANGED = {  # the same forks, not neutral
    "reward_opd": "--verdict-weight 5 --verifier {verifier}:odd",
    "eopd": "--uncertain-above 0",
    "reopold": "--floor-weight 0.45",
    "drift_gate": "--drift-rate 50 --block-tokens 2",
}
WITHOUT_TEACHER = ("grpo", "opsa")
VERIFIER = (
    "def odd(completion, answer, row, ended):\n    return sum(map(ord, completion)) % 2 == 0\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tinylm.save_family(tmp_path_factory.mktemp("forks"))
    (folder / "verifier.py").write_text(VERIFIER)
    return folder


def flags(folder: Path, run: str, *more: str, teacher: bool = True) -> list[str]:
    paths = {"--student": "student", "--prompts": "prompts.jsonl", "--run-dir": run}
    paths |= {"--teacher": "teacher"} if teacher else {}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 3"
    few = "--eval-every 0 --save-every 0 --device cpu --no-check-models --updates-per-rollout 2"
    return [*named, *sizes.split(), *few.split(), *more]


def differ(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def opds(folder):
    """The weights of opd.py after the run with which forks are compared."""
    opd.main(flags(folder, "opd"))
    return tinylm.weights(folder, "opd")


@pytest.mark.parametrize("fork", NEUTRAL)
def test_neutral_parameters_are_opd(folder, opds, fork):
    """Three steps of two updates each: the weights of opd.py, and others by other flags."""
    module = importlib.import_module(fork)
    module.main(flags(folder, fork, *NEUTRAL[fork].split()))
    changed = CHANGED[fork].format(verifier=folder / "verifier.py")
    module.main(flags(folder, f"{fork}-changed", *changed.split()))
    assert differ(tinylm.weights(folder, fork), opds) < 2e-5
    assert differ(tinylm.weights(folder, f"{fork}-changed"), opds) > 1e-4


@pytest.mark.parametrize("fork", [*WITHOUT_TEACHER, "supervised", "power_opd"])
def test_two_steps_with_evaluation(folder, fork):
    """Where there is no teacher there is no reverse KL; all else is logged."""
    more = ["--steps", "2", "--eval-every", "2", "--eval-samples", "2", "--overwrite"]
    more += ["--test-prompts", str(folder / "prompts.jsonl")]
    more += ["--verifier", f"{folder / 'verifier.py'}:odd"]
    teacher = fork not in WITHOUT_TEACHER
    importlib.import_module(fork).main(flags(folder, fork, *more, teacher=teacher))
    lines = (folder / fork / "metrics.jsonl").read_text().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        found |= json.loads(line)
    assert found["step"] == 2 and {"loss", "length_mean", "eval/student/avg@2"} <= found.keys()
    assert ("eval/student/reverse_kl" in found) == teacher
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert differ(tinylm.weights(folder, fork, 2), before) > 1e-5


@pytest.mark.parametrize("fork", WITHOUT_TEACHER)
@pytest.mark.parametrize(
    "more", ["--teacher x", "--eval-teacher", "--teacher-url http://localhost:1", "--teacher live"]
)
def test_flags_of_a_teacher_are_refused_where_there_is_none(fork, more):
    with pytest.raises(RunError, match="this method has no teacher") as stop:
        importlib.import_module(fork).parse_args(more.split())
    assert stop.value.code == 2 and "\n" not in str(stop.value)


@pytest.mark.parametrize("fork", WITHOUT_TEACHER)
def test_a_dry_run_counts_no_teacher(folder, fork, capsys):
    importlib.import_module(fork).main(flags(folder, "dry", "--dry-run", teacher=False))
    said = capsys.readouterr().out
    lines = [x for x in said.splitlines() if x.startswith(("compat:", "memory:"))]
    assert "memory: student weights" in said and not any("teacher" in x for x in lines)


def test_supervised_trains_on_the_teachers_right_completions_alone(folder):
    supervised = importlib.import_module("supervised")
    args = supervised.parse_args(flags(folder, "x", "--right-only"))
    models, tokenizer = tinylm.load(supervised, args)
    prompts = [supervised.Prompt(tuple(tokenizer.encode("1+2=")), "1+2=", "3", "", {})] * 4
    verifier = tinylm.Verdicts(lambda items: [(-1.0, 1.0)[i % 2] for i in range(len(items))])
    rollout, _ = supervised.collect(models, tokenizer, verifier, prompts, args, 0)
    assert (rollout.source == 1).all()
    right = rollout.verdict > 0
    assert 0 < right.sum() < len(right)
    assert torch.equal(rollout.response_mask, rollout.completion_mask & right[:, None])
    said = supervised.token_logp(models["teacher"], rollout, args)
    mask = rollout.response_mask
    assert torch.allclose(said[mask], rollout.behaviour_logp[mask], atol=1e-4)


def test_reopold_trains_a_share_of_the_batch_after_the_switch(folder):
    more = ["--steps", "4", "--switch-step", "2", "--floor-weight", "0.45", "--overwrite"]
    importlib.import_module("reopold").main(flags(folder, "masks", *more))
    rows = [json.loads(x) for x in (folder / "masks/metrics.jsonl").read_text().splitlines()]
    shares = [(row["kept_share"], row["num_trained_tokens"]) for row in rows if "loss" in row]
    assert len(shares) == 4
    for share, num in shares[2:]:
        assert 0.2 <= share < 0.2 + 1 / (num / share)
    assert shares[0][0] != shares[2][0]
