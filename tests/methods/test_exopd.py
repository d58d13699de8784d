"""exopd.py: its gradient, where it comes to rest, who scores what; lambda 1 is opd."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import exopd
import opd
import pytest
import tinylm
import torch
from tablelm import TableLM, all_completions, expected_gradient, rollout_of
from tinylm import equal, weights

from opd_run import models, retry, rollouts, setup

VOCAB, LENGTH = 3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exopd")
    for seed, name in enumerate(("student", "teacher", "other", "base")):
        tinylm.save_model(folder / name, seed)
    tinylm.save_prompts(folder / "prompts.jsonl")
    return folder


def flags(folder, run: str, *more: str, teacher: bool = True) -> list[str]:
    paths = {"--student": "student", "--prompts": "prompts.jsonl", "--run-dir": run}
    paths |= {"--teacher": "teacher"} if teacher else {}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 3"
    return [*named, *sizes.split(), *"--save-every 2 --eval-every 0 --device cpu".split(), *more]


def named(folder, **teachers: str) -> list[str]:
    return [x for k, v in teachers.items() for x in ("--teacher", f"{k}={folder / v}")]


def prepared(folder, *more: str, teacher: bool = True):
    """(models, args, rollout of 6 completions in the domains a and b)."""
    args = exopd.parse_args(flags(folder, "unused", *more, teacher=teacher))
    loaded, tokenizer = tinylm.load(exopd, args)
    texts = ["1+2=", "a", "12+345=", "hello", "9", "7-7="]
    chosen = [
        opd.Prompt(tuple(tokenizer.encode(text)), text, "", "aabbab"[i], {})
        for i, text in enumerate(texts)
    ]
    uniform = exopd.uniforms(6, "rollouts", 0, args)
    return loaded, args, exopd.sample(loaded["student"], chosen, uniform, args)


# ------------------------------------------------------------------------------------- collapse
def test_reward_scale_one_is_opd_bit_for_bit(folder):
    """lambda 1, 3 steps, any reference: the weights of opd.py."""
    opd.main(flags(folder, "opd"))
    exopd.main(flags(folder, "one", "--reward-scale", "1", "--reference", str(folder / "base")))
    exopd.main(flags(folder, "more"))
    want = weights(folder, "opd")
    assert equal(want, weights(folder, "one"))
    assert not equal(want, weights(folder, "more"))


def test_resume_equals_an_uninterrupted_run(folder):
    """2 + kill + 2 steps are 4: the reference is the initial student after a resume, too."""
    sizes = ["--steps", "4", "--max-completion-tokens", "6"]
    exopd.main(flags(folder, "whole", *sizes))
    exopd.main(flags(folder, "parts", *sizes))
    for path in (folder / "parts/checkpoints/step_4").rglob("*"):
        path.unlink() if path.is_file() else None
    exopd.main(flags(folder, "parts", *sizes, "--resume"))
    assert equal(weights(folder, "whole", 4), weights(folder, "parts", 4))


# ---------------------------------------------------------------------------------- enumeration
def arguments(*more: str):
    args = exopd.parse_args(list(more))
    return args


def exact_rollout(completions: torch.Tensor, **changes):
    """On-policy, in float64."""
    zeros = torch.zeros(completions.shape, dtype=torch.float64)
    return rollout_of(exopd, completions, **({"behaviour_logp": zeros} | changes))


def estimate(student, teacher, reference, args, length: int = LENGTH) -> torch.Tensor:
    """Exact expectation of the gradient that `token_loss` has on one completion at a time."""
    completions = all_completions(VOCAB, length)
    probs = student.token_logp(completions).sum(1).exp()

    def loss(i: int):
        rollout = exact_rollout(completions[i : i + 1])
        frozen = {"teacher": teacher, "reference": reference}
        return exopd.token_loss(student, rollout, exopd.score(frozen, rollout, args), args)[0]

    return expected_gradient(student, probs, loss)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_gradient_is_that_of_the_extrapolated_reverse_kl(scale):
    """E[gradient] = gradient of KL(student || teacher^lambda reference^(1-lambda)) at each prefix.

    The normaliser of the target does not depend on the student.
    """
    student, teacher, reference = (TableLM(VOCAB, LENGTH, seed) for seed in (1, 2, 3))
    completions = all_completions(VOCAB, LENGTH)
    p, q, r = (each.logp(completions) for each in (student, teacher, reference))
    target = (scale * q + (1 - scale) * r).log_softmax(-1).detach()
    visits = student.token_logp(completions).sum(1).exp().detach()
    value = (visits[:, None] * (p.exp() * (p - target)).sum(-1)).sum()
    want = torch.autograd.grad(value, student.table)[0]
    found = estimate(student, teacher, reference, arguments("--reward-scale", str(scale)))
    assert torch.allclose(found, want, atol=1e-10), (found - want).abs().max()
    plain = estimate(student, teacher, reference, arguments("--reward-scale", "1"))
    assert torch.allclose(found, plain, atol=1e-3) == (scale == 1.0)


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_one_position_comes_to_rest_at_the_extrapolated_law(scale):
    """Paper's Eq. (12): teacher^lambda reference^(1-lambda), normalised, by exact descent."""
    student, teacher, reference = (TableLM(VOCAB, 1, seed, 2.0) for seed in (4, 5, 6))
    args = arguments("--reward-scale", str(scale))
    logits = scale * teacher.table + (1 - scale) * reference.table
    want = logits.detach().softmax(-1)
    assert (student.table.softmax(-1) - want).abs().max() > 0.1
    for _ in range(400):
        gradient = estimate(student, teacher, reference, args, 1)
        student.table.data -= 2.0 * gradient
    assert torch.allclose(student.table.softmax(-1), want, atol=1e-4)


def test_advantage_is_detached_and_signed():
    """Trap 22: (teacher - student) + (lambda - 1)(teacher - reference), a constant."""
    student, teacher, reference = (TableLM(VOCAB, LENGTH, seed) for seed in (1, 2, 3))
    completions = all_completions(VOCAB, LENGTH)
    p, q, r = (each.token_logp(completions) for each in (student, teacher, reference))
    rollout, args = exact_rollout(completions), arguments("--reward-scale", "1.5")
    scores = exopd.score({"teacher": teacher, "reference": reference}, rollout, args)
    loss, logged = exopd.token_loss(student, rollout, scores, args)
    advantage = (q - p + 0.5 * (q - r)).detach()
    assert torch.allclose(logged["advantage"].double(), advantage, atol=1e-10)
    assert torch.allclose(logged["teacher_shift"].double(), (q - r).detach(), atol=1e-10)
    assert not any(grid.requires_grad for grid in logged.values())
    found = torch.autograd.grad(loss, student.table)[0]
    want = torch.autograd.grad(-(advantage * p).sum(), student.table)[0]
    assert torch.allclose(found, want, atol=1e-10)
    assert teacher.table.grad is None and reference.table.grad is None


def test_importance_weight_only_with_several_updates_and_capped():
    student, teacher, reference = (TableLM(VOCAB, 1, seed) for seed in (1, 2, 3))
    completions = all_completions(VOCAB, 1)
    p = student.token_logp(completions)
    behaviour_logp = p.detach() - torch.tensor([[-1.0], [0.5], [9.0]])
    losses = []
    for more in (["1"], ["2"], ["2", "--importance-cap", "3"]):
        args = arguments("--updates-per-rollout", *more)
        rollout = exact_rollout(completions, behaviour_logp=behaviour_logp)
        scores = exopd.score({"teacher": teacher, "reference": reference}, rollout, args)
        loss, logged = exopd.token_loss(student, rollout, scores, args)
        assert torch.allclose(logged["policy_log_ratio"].double(), p.detach() - behaviour_logp)
        cap = {1: 5.0, 2: 5.0, 3: 3.0}[len(losses) + 1]
        raw = torch.tensor([[-1.0], [0.5], [9.0]], dtype=torch.float64).exp().clamp(max=cap)
        weight = raw if losses else 1.0
        want = -(weight * logged["advantage"].double() * p).sum()
        assert torch.allclose(loss.double(), want, atol=1e-5)
        losses.append(float(loss.detach()))
    assert len(set(losses)) == 3


# ------------------------------------------------------------------------------------ reference
def test_the_reference_never_moves(folder):
    """The student's initial weights, the same bytes after 3 steps that move the student."""
    loaded, args, rollout = prepared(folder, "--lr", "0.1")
    student, reference = loaded["student"], loaded["reference"]
    assert student is not reference and student.lm is not reference.lm
    initial = copy.deepcopy(student.lm.state_dict())
    assert equal(initial, reference.lm.state_dict())
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    optimizer = exopd.make_optimizer(student, args)
    for step in range(3):
        batch = [(rollout, exopd.score(loaded, rollout, args))]
        exopd.train_step(student, optimizer, batch, args, step)
    assert equal(initial, reference.lm.state_dict())
    now = student.lm.state_dict()
    assert not any(torch.equal(initial[name], now[name]) for name in initial)
    theirs = {id(p) for p in reference.parameters()}
    assert not theirs & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_reference_shares_memory_only_with_a_frozen_model(folder):
    loaded, _, _ = prepared(folder, "--reference", str(folder / "teacher"))
    assert loaded["reference"].lm is loaded["teacher"].lm is not loaded["student"].lm
    assert [loaded[name].role for name in ("teacher", "reference")] == ["teacher", "reference"]
    loaded, _, _ = prepared(folder, "--reference", str(folder / "student"))
    pointers = {p.data_ptr() for p in loaded["student"].parameters()}
    assert not pointers & {p.data_ptr() for p in loaded["reference"].parameters()}


def test_a_reference_can_be_chosen(folder):
    """Reward correction: the advantage is against the named model."""
    loaded, args, rollout = prepared(folder, "--reference", str(folder / "base"))
    want = exopd.token_logp(loaded["reference"], rollout, args)
    assert torch.equal(exopd.score(loaded, rollout, args)["reference_logp"], want)
    base = exopd.load("reference", str(folder / "base"), loaded["student"].facts, args)
    assert torch.equal(want, exopd.token_logp(base, rollout, args))
    assert not torch.allclose(want, exopd.token_logp(loaded["student"], rollout, args), atol=0.1)


# -------------------------------------------------------------------------------------- merging
def test_each_domain_is_scored_by_its_teacher(folder):
    """Rows of a by teacher/a, of b by teacher/b, whatever the widths; one reference for all."""
    loaded, args, rollout = prepared(folder, *named(folder, a="teacher", b="other"), teacher=False)
    assert list(loaded) == ["student", "teacher/a", "teacher/b", "reference"]
    by_name = {n: exopd.token_logp(loaded[f"teacher/{n}"], rollout, args) for n in "ab"}
    found = exopd.score(loaded, rollout, args)
    for row, prompt in enumerate(rollout.prompts):
        theirs = by_name["b" if prompt.domain == "a" else "a"][row]
        assert torch.allclose(found["teacher_logp"][row], by_name[prompt.domain][row], atol=1e-5)
        assert not torch.allclose(found["teacher_logp"][row], theirs, atol=1e-2)
    everyone = exopd.token_logp(loaded["reference"], rollout, args)
    assert torch.allclose(found["reference_logp"], everyone, atol=1e-5)
    only_b = rollouts.select(rollout, torch.tensor([2, 5]))  # no row of a in this micro-batch
    part = exopd.score(loaded, only_b, args)["teacher_logp"]
    assert torch.allclose(part, by_name["b"][[2, 5]][:, : part.shape[1]], atol=1e-5)


def test_two_names_of_one_teacher_are_one_teacher(folder):
    loaded, args, rollout = prepared(
        folder, *named(folder, a="teacher", b="teacher"), teacher=False
    )
    assert loaded["teacher/a"] is loaded["teacher/b"]
    want = exopd.token_logp(loaded["teacher/a"], rollout, args)
    assert torch.allclose(exopd.score(loaded, rollout, args)["teacher_logp"], want, atol=1e-5)


def test_metrics_by_domain_add_up(folder):
    """Parts and shares are means over all tokens: their quotient is the mean of a domain."""
    loaded, args, rollout = prepared(folder, *named(folder, a="teacher", b="other"), teacher=False)
    args.micro_batch_tokens, args.lr = 1, 0.0
    batch = [(m, exopd.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
    optimizer = exopd.make_optimizer(loaded["student"], args)
    found = exopd.train_step(loaded["student"], optimizer, batch, args, 0)
    whole = found["log_ratio_a_mean"] + found["log_ratio_b_mean"]
    assert whole == pytest.approx(found["log_ratio_mean"], abs=1e-6)
    assert found["share_a_mean"] + found["share_b_mean"] == pytest.approx(1.0)
    for name in "ab":
        rows = torch.tensor([r for r, p in enumerate(rollout.prompts) if p.domain == name])
        part = rollouts.select(rollout, rows)
        teacher_logp = exopd.score(loaded, part, args)["teacher_logp"]
        log_ratio = exopd.token_logp(loaded["student"], part, args) - teacher_logp
        want = log_ratio[part.trained_mask].mean().item()
        mean = found[f"log_ratio_{name}_mean"] / found[f"share_{name}_mean"]
        assert mean == pytest.approx(want, abs=1e-5)


def test_a_merge_runs(folder, capsys):
    more = [*named(folder, a="teacher", b="other"), "--teacher-field", "domain", "--steps", "2"]
    exopd.main(flags(folder, "merge", *more, teacher=False))
    lines = (folder / "merge/metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    assert {"avg@2/a", "avg@2/b", "log_ratio_a_mean", "reverse_kl"} <= set(row)
    assert math.isfinite(row["loss"]) and row["teacher_shift_mean"] != 0


def test_offloaded_models_take_turns_on_the_device(folder, monkeypatch):
    """Never two of the frozen models there, none in between, and the same scores."""
    several = named(folder, a="teacher", b="other")
    loaded, args, rollout = prepared(folder, *several, teacher=False)
    want = exopd.score(loaded, rollout, args)
    args.teacher_offload = True
    one = partial(exopd.load, facts=loaded["student"].facts, args=args)
    loaded = setup.load_models(one, exopd.model_paths(args), args, loaded["student"].facts)
    frozen = {name: model for name, model in loaded.items() if name != "student"}
    turns, compute = [], models.CausalLM.forward

    def spy(self, *inputs, **more):
        turns.append([name for name, model in frozen.items() if model.is_present])
        return compute(self, *inputs, **more)

    monkeypatch.setattr(models.CausalLM, "forward", spy)
    found = exopd.score(loaded, rollout, args)
    assert turns == [["teacher/a"], ["teacher/b"], ["reference"]]
    assert not any(model.is_present for model in frozen.values())
    assert all(torch.equal(want[name], found[name]) for name in want)


# --------------------------------------------------------------------------------- usage errors
def refused(argv: list[str], *words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        exopd.main(argv)
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2, text
    assert all(word in text for word in words), text


def test_a_domain_without_a_teacher_is_refused_before_a_weight_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr(exopd, "load", None)
    argv = flags(folder, "no", *named(folder, a="teacher"), teacher=False)
    refused(argv, "--teacher", "['b']", capsys=capsys)
    held_out = folder / "held_out.jsonl"
    held_out.write_text('{"prompt": "1", "answer": "1", "domain": "c"}\n')
    more = [*named(folder, a="teacher", b="other"), "--test-prompts", str(held_out)]
    refused(flags(folder, "no", *more, teacher=False), "['c']", capsys=capsys)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--teacher", "x", "--teacher", "y"], "NAME="),
        (["--teacher", "a=x", "--teacher", "y"], "NAME="),
        (["--teacher", "a=x", "--teacher", "a=y"], "NAME="),
        (["--teacher", "a=x", "--teacher", "b=y", "--eval-teacher"], "--eval-teacher"),
        (["--reward-scale", "0"], "(0,inf)"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(folder, capsys, more, word):
    refused(flags(folder, "no", *more, teacher=False), word, capsys=capsys)


def test_names_of_teachers():
    assert exopd.split_name("add=runs/x") == ("add", "runs/x")
    assert exopd.split_name("org/model") == ("", "org/model")
    assert exopd.split_name("runs/lr=1e-4/model") == ("", "runs/lr=1e-4/model")
    assert exopd.split_name("add=runs/lr=1e-4") == ("add", "runs/lr=1e-4")
    args = exopd.parse_args(["--teacher", "x"])
    assert exopd.model_paths(args)["reference"] == args.student and args.domain_field == "domain"
    assert exopd.parse_args(["--teacher-field", "kind"]).domain_field == "kind"
