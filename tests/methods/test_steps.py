"""Steps that cannot be made: memory that runs out, numbers that are not finite. Nothing is lost."""

from __future__ import annotations

import importlib
import json

import opd
import pytest
import tinylm
import torch
import transformers
import tropd
from tinylm import weights

from opd_run import diagnose, files

METHODS = ["opd", "sg_opd", "exopd", "topk_opd", "tropd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("steps"), eos_token_id=[1, 7])


def flags(folder, run: str, *more: str) -> list[str]:
    argv = f"--student {folder}/student --teacher {folder}/teacher --prompts {folder}/prompts.jsonl"
    argv += f" --run-dir {folder}/{run} --max-completion-tokens 8 --prompts-per-step 3 --steps 3"
    argv += " --rollouts-per-prompt 2 --save-every 0 --eval-every 0 --device cpu --lr 1e-2"
    return [*argv.split(), *more]


def same(one: dict, two: dict, atol: float = 0.0) -> bool:
    return all(torch.allclose(one[name], two[name], rtol=0.0, atol=atol) for name in one)


def last_line(capsys, code: int, argv: list[str], module=opd) -> str:
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == code, captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith(("error:", "usage:"))]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def short_of_memory(monkeypatch, module, most: int) -> list[int]:
    """`token_loss` that runs out of memory with more than `most` rollouts, as CUDA would say it."""
    whole, tried = module.token_loss, []

    def poor(student, rollout, scores, args):
        if not torch.is_grad_enabled():  # the trace of tokens asks too
            return whole(student, rollout, scores, args)
        tried.append(len(rollout.prompts))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")
        return whole(student, rollout, scores, args)

    monkeypatch.setattr(module, "token_loss", poor)
    return tried


# --------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    folder, method, monkeypatch, capsys
):
    """6 rollouts, room for 2: 6, 3, 2 at a time; every method's scores are cut along with them.
    The weights are those of a run that never ran out, up to the order of a sum."""
    module = importlib.import_module(method)
    module.main(flags(folder, f"rich_{method}", "--lr", "1e-4"))
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    tried = short_of_memory(monkeypatch, module, 2)
    module.main(flags(folder, f"poor_{method}", "--lr", "1e-4"))
    assert tried[:3] == [6, 3, 2] and max(tried[4:]) <= 3  # it stays smaller
    output = capsys.readouterr().out
    assert "out of memory: the update is repeated with micro-batches of at most 3" in output
    assert "7.00 GiB" in output and "--micro-batch-tokens" in output
    rich, poor = weights(folder, f"rich_{method}"), weights(folder, f"poor_{method}")
    assert same(rich, poor, atol=2e-5) and not same(start, rich, atol=1e-4)
    logged = [files.read_metrics(folder / f"{run}_{method}") for run in ("rich", "poor")]
    names = ("loss", "grad_norm", "num_trained_tokens", "log_ratio_mean", "log_ratio_decile_9")
    for one, two in zip(*logged, strict=True):
        assert [one[k] for k in names] == pytest.approx([two[k] for k in names], abs=1e-4)


def test_several_updates_of_a_batch_stay_halved(folder, monkeypatch):
    """The second update starts with the pieces that fitted in the first."""
    tried = short_of_memory(monkeypatch, opd, 3)
    opd.main(flags(folder, "updates", "--updates-per-rollout", "2", "--steps", "1"))
    assert tried == [6, 3, 3, 3, 3]


def test_out_of_retries_saves_and_says_what_to_lower(folder, monkeypatch, capsys):
    """Not even one rollout fits, at step 2: exit code 1, a checkpoint, one line; resumed with more
    memory, the run ends bit for bit as if nothing had happened."""
    opd.main(flags(folder, "whole"))
    step, train_step = [], opd.train_step
    monkeypatch.setattr(opd, "train_step", lambda *a: (step.append(a[-1]), train_step(*a))[1])
    loss = opd.token_loss

    def poor(*args):
        if step[-1:] == [1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0")
        return loss(*args)

    monkeypatch.setattr(opd, "token_loss", poor)
    text = last_line(capsys, 1, flags(folder, "poor"))
    for word in ("step 2", "phase student", "9 GiB", "--micro-batch-tokens", "step_1", "--resume"):
        assert word in text, text
    monkeypatch.undo()
    opd.main(flags(folder, "poor", "--resume"))
    assert same(weights(folder, "whole"), weights(folder, "poor"))


@pytest.mark.parametrize(
    ("function", "phase", "advice"),
    [
        ("collect", "generate", "--sampler-batch-size"),
        ("score", "teacher", "--micro-batch-tokens"),
        ("evaluate", "eval", "--sampler-batch-size"),
    ],
)
def test_out_of_memory_elsewhere_saves_too(folder, monkeypatch, capsys, function, phase, advice):
    def poor(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(opd, function, poor)
    more = ["--eval-every", "1", "--test-prompts", f"{folder}/prompts.jsonl", "--eval-samples", "1"]
    more = more if function == "evaluate" else []
    text = last_line(capsys, 1, flags(folder, phase, *more))
    assert f"phase {phase}" in text and advice in text and "saved" in text
    assert files.check_manifest(folder / phase / "checkpoints/step_0") is None


def test_out_of_memory_in_the_optimizer_saves_nothing_that_is_half_updated(
    folder, monkeypatch, capsys
):
    """Some weights may have moved: the step is not repeated, the last good checkpoint is named."""
    calls, whole = [], torch.optim.AdamW.step

    def poor(self, *args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", poor)
    text = last_line(capsys, 1, flags(folder, "adam", "--save-every", "1"))
    assert "last good checkpoint: " in text and "step_2" in text and len(calls) == 3
    assert not (folder / "adam/checkpoints/step_3").exists()


def test_other_errors_are_not_taken_for_memory(folder, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(opd, "token_loss", broken)
    text = last_line(capsys, 1, flags(folder, "shape"))
    assert "RuntimeError: shape mismatch" in text and "--debug" in text and "memory" not in text


# ----------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("fault", ["loss", "gradient", "log_ratio"])
def test_what_is_not_finite_is_skipped_then_stops_with_the_sample(
    folder, monkeypatch, capsys, fault
):
    """Rollout 4 of every batch is broken from step 2 on: one bad step is allowed, the next stops;
    the weights that are kept are those after step 1, and the offending rollout is the one."""
    collect, loss, victims = opd.collect, opd.token_loss, []

    def marked(models, tokenizer, verifier, prompts, args, step):
        rollout, metrics = collect(models, tokenizer, verifier, prompts, args, step)
        if step >= 1:
            rollout.extra["mark"] = torch.arange(len(rollout.prompts)) == 4
            victims.append(rollout.completion_ids[4][rollout.completion_mask[4]].tolist())
        return rollout, metrics

    def broken(student, rollout, scores, args):
        rows = rollout.extra.get("mark", torch.zeros(len(rollout.prompts), dtype=torch.bool))
        if fault == "log_ratio":
            teacher_logp = scores["teacher_logp"].masked_fill(rows[:, None], -torch.inf)
            found, logged = loss(student, rollout, scores, args)  # the loss itself is finite
            return found, logged | {"log_ratio": logged["log_ratio"] - teacher_logp}
        found, logged = loss(student, rollout, scores, args)
        if not rows.any():
            return found, logged
        if fault == "loss":
            return found + torch.inf, logged
        weight = next(student.parameters()).sum()
        return found + (weight - weight.detach()).sqrt(), logged  # 0, with an infinite slope

    monkeypatch.setattr(opd, "collect", marked)
    monkeypatch.setattr(opd, "token_loss", broken)
    more = ["--max-bad-steps", "1", "--save-every", "1"]
    text = last_line(capsys, 1, flags(folder, f"bad_{fault}", *more))
    assert "step 3: loss" in text and "--max-bad-steps" in text and "step_2" in text
    assert "1 of its 6 rollouts" in text
    run = folder / f"bad_{fault}"
    assert same(weights(folder, f"bad_{fault}", 1), weights(folder, f"bad_{fault}", 2))
    logged = files.read_metrics(run)
    assert [row["bad_step"] for row in logged] == [0.0, 1.0, 1.0]
    assert (logged[1]["num_bad_log_ratios"] > 0) == (fault == "log_ratio")
    kept = [json.loads(line) for line in (run / "offending.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [2] * 6 + [3] * 6
    tokenizer = tinylm.tokenizer()
    for first, ids in zip((kept[0], kept[6]), victims, strict=True):
        assert first["offending"] and first["completion"] == tokenizer.decode(ids)
    assert not any(row["offending"] for row in kept[1:6] + kept[7:])


def test_a_skipped_step_is_said(folder, monkeypatch, capsys):
    loss = opd.token_loss
    monkeypatch.setattr(opd, "token_loss", lambda *a, **k: (loss(*a, **k)[0] * torch.nan, {}))
    opd.main(flags(folder, "skips", "--max-bad-steps", "3"))
    output = capsys.readouterr().out
    assert "! step 1: loss nan" in output and "skipped; 2 more allowed" in output
    assert "skipped; 0 more allowed" in output
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert same(weights(folder, "skips"), start)


def test_bad_steps_are_counted_over_a_resume(folder, monkeypatch, capsys):
    """The counter is in the checkpoint: one before the kill and one after are two."""
    loss = opd.token_loss
    monkeypatch.setattr(opd, "token_loss", lambda *a, **k: (loss(*a, **k)[0] * torch.nan, {}))
    more = ["--max-bad-steps", "2", "--save-every", "1"]
    opd.main(flags(folder, "counts", *more, "--steps", "2"))
    text = last_line(capsys, 1, flags(folder, "counts", *more, "--steps", "4", "--resume"))
    assert "step 3" in text


def test_an_infinite_log_ratio_is_bad_where_the_loss_hides_it(folder, monkeypatch, capsys):
    """tropd's loss is finite at a token that the teacher excludes; the step is skipped and said."""
    score = tropd.score

    def excluded(models, rollout, args):
        scores = score(models, rollout, args)
        scores["teacher_logp"][0, 0] = -torch.inf
        return scores

    monkeypatch.setattr(tropd, "score", excluded)
    text = last_line(capsys, 1, flags(folder, "excluded", "--no-guidance"), tropd)
    assert "1 log-ratios not finite" in text


def test_only_what_the_method_names_has_to_be_finite(folder, monkeypatch):
    """A metric of a fork that is called so does not decide whether a step is taken."""
    bad = torch.tensor([1.0, torch.nan, -torch.inf])
    tokens = {"log_ratio": bad, "policy_log_ratio": bad[:2], "my_log_ratio": bad}
    assert diagnose.num_not_finite(tokens, opd.MUST_BE_FINITE) == 3
    assert diagnose.num_not_finite({"my_log_ratio": bad}, opd.MUST_BE_FINITE) == 0
    loss = opd.token_loss

    def logs_more(student, rollout, scores, args):
        found, logged = loss(student, rollout, scores, args)
        return found, logged | {"my_log_ratio": torch.full_like(logged["log_ratio"], torch.inf)}

    monkeypatch.setattr(opd, "token_loss", logs_more)
    opd.main(flags(folder, "logs_more", "--steps", "1"))
    assert files.read_metrics(folder / "logs_more")[-1]["bad_step"] == 0.0
