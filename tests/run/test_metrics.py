"""The same metrics under the same names in every method, each in docs/metrics.md and no other."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import opd
import pytest
import tinylm
import torch

from opd_run import diagnose, files

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "opd": [], "opd full": ["--objective", "full"], "sg_opd": [], "exopd": [],
    "topk_opd": ["--support-size", "8"], "topk_opd score": ["--tail", "score", "--top-p", "1"],
    "tropd": [],
}  # fmt: skip
PAGE = (ROOT / "docs/metrics.md").read_text()
CONDITIONAL = {"divergence_mean", "alarm/NAME", "eval_s", "num_teacher_prompts_too_long"}
CONDITIONAL |= {"right_minus_wrong", "right_minus_wrong_without_prompt"}  # with --teacher-prompt


def documented(section: str) -> set[str]:
    """Keys of the first column of a section's table; `..._0` ... `_9` is ten of them."""
    table = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    keys = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.M):
        names = re.findall(r"`([^`]+)`", cell)
        if "..." in cell and "_0" in cell:
            names = [names[0].replace("_0", f"_{i}") for i in range(10)]
        keys |= set(names)
    return keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("metrics"), eos_token_id=[1, 7, 8, 9])


def flags(folder, run: str, *more: str) -> list[str]:
    argv = f"--student {folder}/student --teacher {folder}/teacher --prompts {folder}/prompts.jsonl"
    argv += f" --run-dir {folder / run} --max-completion-tokens 12 --prompts-per-step 3 --steps 1"
    argv += " --rollouts-per-prompt 4 --save-every 0 --eval-every 0 --device cpu --lr 1e-3"
    return [*argv.split(), *more]


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_logs_every_documented_metric(folder, name):
    method = name.split()[0]
    module = importlib.import_module(method)
    module.main(flags(folder, name.replace(" ", "_"), *METHODS[name]))
    (row,) = files.read_metrics(folder / name.replace(" ", "_"))
    wanted = documented("Training rows") - CONDITIONAL
    assert len(wanted) > 40
    assert not wanted - row.keys()
    numbers = {key: float(row[key]) for key in wanted}
    assert not [key for key, value in numbers.items() if value != value]  # NaN
    page = (ROOT / f"docs/methods/{method}.md").read_text()
    own = {key for key in row.keys() - wanted - CONDITIONAL - {"step"} if f"`{key}" not in page}
    assert not {key for key in own if not re.match(r"(avg|pass)@\d|teacher_mass_mean", key)}


@pytest.mark.parametrize("diagnostic_tokens", [0, 512])
def test_losses_without_sampled_log_probs_measure_them_at_the_diagnostic_tokens(
    folder, diagnostic_tokens
):
    """--objective full knows no log_ratio of its own; those logged are the sampled objective's."""
    more = ["--diagnostic-tokens", str(diagnostic_tokens)]
    for objective in ("full", "sampled"):
        run = f"{objective}{diagnostic_tokens}"
        opd.main(flags(folder, run, "--objective", objective, *more))
    full, sampled = (
        files.read_metrics(folder / f"{each}{diagnostic_tokens}")[0] for each in ("full", "sampled")
    )
    names = ["log_ratio_mean", "log_ratio_p1", "log_ratio_p99", "log_ratio_decile_0"]
    names += ["log_ratio_decile_9", "eos_log_ratio_mean", "advantage_mean"]
    names += ["advantage_positive_share", "advantage_negative_share", "policy_log_ratio_mean"]
    if not diagnostic_tokens:
        assert not set(names) & full.keys()
    else:
        assert [full[k] for k in names] == pytest.approx([sampled[k] for k in names], abs=1e-4)


def test_sampled_log_ratios_of_a_few_tokens(folder):
    """Against `token_logp`, with a thinned rollout, teacher rows and staleness."""
    args = opd.parse_args(flags(folder, "unused"))
    loaded, tokenizer = tinylm.load(opd, args)
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "a", "12=")]
    rollout = opd.sample(
        loaded["student"], prompts * 8, opd.uniforms(24, "rollouts", 0, args), args
    )
    rollout.source[3] = 1
    rollout.behaviour_logp[rollout.completion_mask] -= 0.5
    few = diagnose.thin(rollout, 40, [0])
    ours = {name: getattr(opd, name) for name in ("read_tokens", "loss_law", "teacher_of")}
    found = diagnose.exact_divergences(loaded, [few], args, **ours)
    mask = few.trained_mask
    assert int(mask.sum()) == 40
    student, teacher = (opd.token_logp(loaded[name], few, args) for name in ("student", "teacher"))
    log_ratio = (student - teacher)[mask]
    assert found["log_ratio_mean"] == pytest.approx(log_ratio.mean().item(), abs=1e-4)
    assert found["log_ratio_p99"] == pytest.approx(log_ratio.max().item(), abs=1e-4)
    assert found["advantage_mean"] == pytest.approx(-log_ratio.mean().item(), abs=1e-4)
    own = (few.source == 0)[:, None].expand_as(mask)[mask]
    assert found["policy_log_ratio_mean"] == pytest.approx(
        0.5 * own.float().mean().item(), abs=1e-4
    )
    where = diagnose.places(few, few.completion_mask)
    ends = (student - teacher)[where["end"] & mask]
    assert len(ends) and found["eos_log_ratio_mean"] == pytest.approx(ends.mean().item(), abs=1e-4)


def test_places_by_hand():
    from tablelm import rollout_of

    mask = torch.tensor(
        [[True, True, True, False], [True, True, True, True], [True, False, False, False]]
    )
    rollout = rollout_of(
        opd, torch.zeros(3, 4, dtype=torch.int64), completion_mask=mask,
        response_mask=mask & torch.tensor([True, False, True, True]),
        ended=torch.tensor([True, False, True]),
    )  # fmt: skip
    found = diagnose.places(rollout)
    assert found["end"].nonzero().tolist() == [[0, 2], [2, 0]]
    assert found["decile"][0].tolist()[:3] == [0, 0, 5]  # tenths of two trained tokens
    assert diagnose.places(rollout, mask)["decile"][0].tolist()[:3] == [0, 3, 6]


def test_eos_log_ratio():
    tokens = {"log_ratio": torch.tensor([1.0, 5.0, 9.0]), "end": torch.tensor([False, True, True])}
    assert diagnose.token_metrics(tokens)["eos_log_ratio_mean"] == 7.0
    tokens = {"log_ratio": torch.tensor([1.0]), "end": torch.tensor([False])}
    found = diagnose.token_metrics(tokens)["eos_log_ratio_mean"]
    assert found != found
