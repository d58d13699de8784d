"""The training step: masks, padding, normaliser, precision, frozen models (traps 8 to 28)."""

from __future__ import annotations

import copy
import dataclasses
import math

import opd
import pytest
import tinylm
import torch

from opd_run import diagnose, retry, rollouts

FLAGS = ["--max-completion-tokens", "12", "--device", "cpu", "--micro-batch-tokens", "100000"]
OBJECTIVES = [["--objective", "sampled"], ["--objective", "full"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tinylm.save_model(folder / "student", 0, eos_token_id=[1, 7, 8, 9])
    tinylm.save_model(folder / "teacher", 1)
    return folder


def prepared(folder, *flags: str):
    """(models, args, rollout of 6 completions of different lengths)."""
    args = opd.parse_args(
        [*FLAGS, "--student", f"{folder}/student", "--teacher", f"{folder}/teacher", *flags]
    )
    loaded, tokenizer = tinylm.load(opd, args)
    texts = ["1+2=", "a", "12+345=", "hello", "9", "7-7="]
    chosen = [opd.Prompt(tuple(tokenizer.encode(text)), text, "", "", {}) for text in texts]
    rollout = opd.sample(loaded["student"], chosen, opd.uniforms(6, "rollouts", 0, args), args)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    return loaded, args, rollout


def gradient(loaded, args, rollout) -> tuple[float, torch.Tensor]:
    """Loss and flattened gradient of one whole step, as `train_step` accumulates them."""
    student = copy.deepcopy(loaded["student"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    args.max_grad_norm = math.inf
    batch = [(m, opd.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
    metrics = opd.train_step(student, optimizer, batch, args, 0)
    return metrics["loss"], torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_change_the_step(folder, objective):
    """Trap 13: 1x6 = 6x1 with ragged lengths, and the divisor is the generated tokens."""
    loaded, args, rollout = prepared(folder, *objective)
    loss, whole = gradient(loaded, args, rollout)
    args.micro_batch_tokens = 1
    assert len(list(retry.micro_batches(rollout, args))) == 6
    split_loss, split = gradient(loaded, args, rollout)
    assert split_loss == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(whole, split, atol=1e-5 * float(whole.abs().max()))
    args.micro_batch_tokens = 100000
    scores = opd.score(loaded, rollout, args)
    loss_sum = opd.token_loss(loaded["student"], rollout, scores, args)[0].item()
    assert loss == pytest.approx(loss_sum / int(rollout.completion_mask.sum()), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_and_order_change_nothing(folder, objective):
    """Trap 9: more padding on either side, filled with any ids, and another order of the rows."""
    loaded, args, rollout = prepared(folder, *objective)
    loss, want = gradient(loaded, args, rollout)
    wide = rollouts.join([rollout, rollout])  # as wide as it was: pad by hand
    wide = rollouts.select(wide, torch.tensor([5, 3, 1, 0, 2, 4]))
    pad = torch.nn.functional.pad
    for name in (f.name for f in dataclasses.fields(opd.Rollout) if f.name != "prompts"):
        value = getattr(wide, name)
        if torch.is_tensor(value) and value.dim() == 2:
            value = pad(value, (5, 0)) if name.startswith("prompt") else pad(value, (0, 4))
        setattr(wide, name, value)
    wide.prompt_ids[~wide.prompt_mask] = 11
    wide.completion_ids[~wide.completion_mask] = 12
    args.micro_batch_tokens = 10**6
    student = copy.deepcopy(loaded["student"])
    scores = opd.score(loaded, wide, args)
    loss_sum, _ = opd.token_loss(student, wide, scores, args)
    num = int(wide.trained_mask.sum())
    (loss_sum / num).backward()
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert loss_sum.item() / num == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(found, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_reaches_the_positions_that_predict_trained_tokens_and_no_others(
    folder, objective
):
    """Traps 10, 11: the last prompt position and the one before EOS learn, no others."""
    loaded, args, rollout = prepared(folder, *objective)
    student, seen = loaded["student"], []
    decoder = student.lm.get_decoder()
    hook = decoder.norm.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), seen.append(output))[1] and None
    )
    scores = opd.score({"teacher": loaded["teacher"]}, rollout, args)
    opd.token_loss(student, rollout, scores, args)[0].backward()
    hook.remove()
    reached = seen[-1].grad.abs().sum(-1) > 0  # [B, P+T]
    prompt_width = rollout.prompt_ids.shape[1]
    want = torch.nn.functional.pad(rollout.completion_mask, (prompt_width - 1, 1))
    assert torch.equal(reached, want)
    assert want[:, prompt_width - 1].all() and not want[:, : prompt_width - 1].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_to_train_gives_zero_and_finite_gradients(folder, objective):
    """Trap 12: a fully masked batch."""
    loaded, args, rollout = prepared(folder, *objective)
    rollout.response_mask[:] = False
    loss, found = gradient(loaded, args, rollout)
    assert loss == 0.0 and (found == 0).all()


def test_one_token_completions_keep_their_signal(folder):
    """Trap 28."""
    loaded, args, rollout = prepared(folder)
    rollout.completion_mask[:, 1:] = False
    rollout.response_mask &= rollout.completion_mask
    loss, found = gradient(loaded, args, rollouts.select(rollout, torch.arange(6)))
    assert loss != 0.0 and found.abs().max() > 1e-4


def test_teacher_equal_to_student_has_no_gradient(folder):
    """Trap 8: equal models, equal log-probs at every position, so no loss and no gradient."""
    loaded, args, rollout = prepared(folder)
    loaded["teacher"] = loaded["student"]
    for objective in ("sampled", "full"):
        args.objective = objective
        loss, found = gradient(loaded, args, rollout)
        assert abs(loss) < 1e-6 and found.abs().max() < 1e-6


def test_teacher_is_frozen(folder):
    """Trap 20: eval mode, no gradient, not in the optimizer, the same bytes after five steps."""
    loaded, args, rollout = prepared(folder, "--lr", "0.1")
    teacher, student = loaded["teacher"], loaded["student"]
    before = [p.clone() for p in teacher.parameters()]
    start = [p.detach().clone() for p in student.parameters()]
    optimizer = opd.make_optimizer(student, args)
    for step in range(5):
        opd.train_step(
            student, optimizer, [(rollout, opd.score(loaded, rollout, args))], args, step
        )
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.parameters()))
    assert not any(torch.equal(old, new) for old, new in zip(start, student.parameters()))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_impossible_teacher_tokens_give_no_nan(folder, divergence):
    """Trap 19: teacher logits of -inf on ids that the student can emit."""
    loaded, args, rollout = prepared(folder, "--objective", "full", "--divergence", divergence)
    scores = opd.score(loaded, rollout, args)
    logits = scores["teacher_hidden"] @ scores["teacher_head"]().T
    logits[..., 20:] = -torch.inf
    logits[~rollout.trained_mask] = 0.0
    scores = {"teacher_hidden": logits, "teacher_head": lambda: None}
    loss, _ = opd.token_loss(loaded["student"], rollout, scores, args)
    assert not loss.isnan() and (divergence == "reverse") == bool(loss.isinf())


def test_bfloat16_logits_give_float32_log_probs(folder):
    """Trap 21: only the rounding of the hidden states is left, not that of a bf16 softmax."""
    loaded, args, rollout = prepared(folder)
    model = loaded["student"]
    exact = opd.token_logp(model, rollout, args)
    model.compute_dtype = torch.bfloat16
    found = opd.token_logp(model, rollout, args)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.2


def test_metrics_ignore_padding(folder):
    """Trap 27: a hundred more padded columns change no metric."""
    loaded, args, rollout = prepared(folder)
    args.lr, rollout.verdict = 0.0, torch.tensor([1.0, -1, 0, 1, -1, -1])
    wide = copy.copy(rollout)
    for name in (f.name for f in dataclasses.fields(opd.Rollout) if f.name != "prompts"):
        value = getattr(wide, name)
        if torch.is_tensor(value) and value.dim() == 2 and not name.startswith("prompt"):
            setattr(wide, name, torch.nn.functional.pad(value, (0, 100)))

    def metrics(each):
        scores = opd.score(loaded, each, args)
        optimizer = torch.optim.SGD(loaded["student"].parameters(), lr=0.0)
        found = opd.train_step(loaded["student"], optimizer, [(each, scores)], args, 0)
        ours = {name: getattr(opd, name) for name in ("read_tokens", "loss_law", "teacher_of")}
        exact = diagnose.exact_divergences(loaded, [each], args, **ours)
        return found | exact | diagnose.rollout_metrics(each)

    one, two = metrics(rollout), metrics(wide)
    assert one.keys() == two.keys() and len(one) > 30
    differ = {k: (one[k], two[k]) for k in one if one[k] != pytest.approx(two[k], abs=1e-5)}
    assert not differ


def test_a_step_that_is_not_finite_is_skipped(folder):
    loaded, args, rollout = prepared(folder)
    student = loaded["student"]
    optimizer = opd.make_optimizer(student, args)
    before = [p.detach().clone() for p in student.parameters()]
    scores = opd.score(loaded, rollout, args)
    scores["teacher_logp"][0, 0] = -torch.inf
    metrics = opd.train_step(student, optimizer, [(rollout, scores)], args, 0)
    assert metrics["bad_step"] == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, student.parameters()))


def test_gradient_checkpointing_changes_nothing(folder):
    loaded, args, rollout = prepared(folder)
    loss, want = gradient(loaded, args, rollout)
    loaded, args, rollout = prepared(folder, "--gradient-checkpointing")
    layer = loaded["student"].lm.get_decoder().layers[0]
    assert layer.gradient_checkpointing
    found_loss, found = gradient(loaded, args, rollout)
    assert found_loss == pytest.approx(loss, abs=1e-6) and torch.allclose(found, want, atol=1e-6)


def test_learning_rate_schedules():
    args = opd.parse_args(["--lr", "1", "--warmup-steps", "4", "--steps", "12"])
    assert [opd.learning_rate(step, args) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    args.lr_schedule = "linear"
    assert [opd.learning_rate(step, args) for step in (4, 8, 12)] == [1.0, 0.5, 0.0]
    args.lr_schedule = "cosine"
    assert opd.learning_rate(8, args) == pytest.approx(0.5)


def test_the_head_that_is_no_product_takes_the_logits(tmp_path):
    """Soft-capping, bias: same log-probs through full logits, and said."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=46, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        final_logit_softcapping=2.0, eos_token_id=[1, 7, 8, 9], pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "student")
    tinylm.tokenizer().save_pretrained(tmp_path / "student")
    tinylm.save_model(tmp_path / "teacher", 1)
    loaded, args, rollout = prepared(tmp_path)
    student = loaded["student"]
    assert not student.plain_head and loaded["teacher"].plain_head
    found = opd.token_logp(student, rollout, args)
    assert torch.allclose(found, rollout.behaviour_logp, atol=1e-4)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)[2:3]
    row = rollout.completion_mask[2]
    logits = student.lm(ids).logits.log_softmax(-1)[0, rollout.prompt_ids.shape[1] - 1 : -1]
    want = logits.gather(1, rollout.completion_ids[2][:, None])[:, 0]
    assert torch.allclose(found[2][row], want[row], atol=1e-4)
    for objective in ("sampled", "full"):
        args.objective = objective
        assert math.isfinite(gradient(loaded, args, rollout)[0])
    capped, other = {"teacher": student}, loaded["teacher"]  # of a teacher they are not kept either
    scores = opd.score(capped, rollout, args)
    kept = {"teacher_hidden": scores["teacher_hidden"](rollout), "teacher_head": lambda: None}
    whole = opd.token_loss(other, rollout, kept, args)[0]
    assert not kept["teacher_hidden"].requires_grad and whole > 0
    halves = list(opd.rollouts.cut(rollout, scores, 2))  # as where memory runs out
    assert len(halves) > 1
    parts = [opd.token_loss(other, *half, args)[0] for half in halves]
    assert torch.allclose(sum(parts), whole, rtol=1e-5)
