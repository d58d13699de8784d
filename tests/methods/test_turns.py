"""Several assistant turns in one rollout: every method trains the spans of the mask, no more."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tinylm
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = [*(ROOT / "methods").glob("*.py"), *(ROOT / "forks").glob("*.py")]
# A gate of drift_gate depends on the other tokens of its rollout: spans do not add up there.
METHODS = sorted(path.stem for path in FILES if path.stem != "drift_gate")
WITHOUT_TEACHER = ("grpo", "opsa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    tinylm.save_model(folder / "student", 0, eos_token_id=[])
    tinylm.save_model(folder / "teacher", 1, eos_token_id=[])
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_turns_are_two_spans_of_the_mask(folder, method):
    """Loss and gradient of two spans are the sums of theirs, and nothing between them is trained.

    The tokens of the environment between the turns are in the completion, so both turns after them
    are conditioned on them; they have no loss and predict none but the first token of a span.
    """
    module = importlib.import_module(method)
    paths = ["--student", str(folder / "student")]
    if method not in WITHOUT_TEACHER:
        paths += ["--teacher", str(folder / "teacher")]
    paths += ["--unlikely-below", "1"] * (method == "opsa")  # every token is
    args = module.parse_args([*paths, "--max-completion-tokens", "12", "--device", "cpu"])
    loaded, tokenizer = tinylm.load(module, args)
    student = tinylm.endless(loaded)["student"]
    prompts = [module.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "hello")]
    rollout = module.sample(student, prompts, module.uniforms(2, "rollouts", 0, args), args)
    rollout.verdict[:] = torch.tensor([1.0, -1.0])
    rollout.extra["coin"] = torch.zeros(2, 12)  # sg_opd and tropd draw one
    rollout.extra["group_advantage"] = torch.tensor([1.0, -1.0])
    rollout.extra["turn"] = torch.zeros(2, 12)  # of agent_opd
    columns = torch.arange(12).expand(2, 12)
    turns = (columns < 4, (columns >= 7) & (columns < 11))
    decoder, found = student.lm.get_decoder(), {}
    for name, mask in (("one", turns[0]), ("two", turns[1]), ("both", turns[0] | turns[1])):
        rollout.response_mask = mask.clone()
        seen: list[torch.Tensor] = []
        hook = decoder.norm.register_forward_hook(
            lambda module, inputs, output, seen=seen: (output.retain_grad(), seen.append(output))[1]
        )
        scores = module.score({k: v for k, v in loaded.items()}, rollout, args)
        seen.clear()
        student.zero_grad()
        loss, logged = module.token_loss(student, rollout, scores, args)
        loss.backward()
        hook.remove()
        gradient = torch.cat([w.grad.flatten() for w in student.parameters()])
        found[name] = loss.item(), gradient
        reached = seen[-1].grad.abs().sum(-1) > 0  # [B, P+T]
        width = rollout.prompt_ids.shape[1]
        assert torch.equal(reached, torch.nn.functional.pad(mask, (width - 1, 1)))
        assert all(values.shape == mask.shape for values in logged.values())
    assert found["both"][0] == pytest.approx(found["one"][0] + found["two"][0], abs=1e-4)
    total = found["one"][1] + found["two"][1]
    assert torch.allclose(found["both"][1], total, atol=1e-4 * float(total.abs().max()))
    assert found["one"][0] != 0 != found["two"][0]
    batch = [(rollout, scores)]
    rollout.response_mask = turns[0] | turns[1]
    args.lr = 0.0
    metrics = module.train_step(student, module.make_optimizer(student, args), batch, args, 0)
    assert metrics["loss"] == pytest.approx(found["both"][0] / 16, abs=1e-4)  # 2 rows x 8 tokens
