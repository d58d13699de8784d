"""--teacher-offload: frozen models wait in CPU memory; here the device is a CPU with copies."""

from __future__ import annotations

import opd
import pytest
import tinylm
import torch

from opd_ops import memory, models


@pytest.fixture
def setup(tmp_path):
    """Models with the teacher offloaded, the same teacher in place, flags, and a rollout."""
    paths = [tinylm.save_model(tmp_path / name, seed) for seed, name in enumerate(("s", "t"))]
    args = opd.parse_args(
        ["--student", paths[0], "--teacher", paths[1], "--device", "cpu", "--objective", "full"]
    )
    tokenizer = models.prepare(opd.model_paths(args), args)
    plain = models.load_models(opd.model_paths(args), args)
    args.teacher_offload = True  # on a CPU the command line refuses it
    loaded = models.load_models(opd.model_paths(args), args)
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "345+6=")]
    rollout = opd.sample(plain["student"], prompts, opd.uniforms(2, 2, 0, args), args, 1.0)
    return loaded["teacher"], plain["teacher"], args, rollout


def places(model: models.CausalLM) -> list[int]:
    return [each.data_ptr() for each in (*model.lm.parameters(), *model.lm.buffers())]


def test_weights_come_to_score_and_those_that_wait_are_untouched(setup):
    offloaded, plain, _, rollout = setup
    home, seen = places(offloaded), []
    before = [each.clone() for each in offloaded.lm.parameters()]

    def read(rows, head):
        seen.extend(places(offloaded))
        return rows @ head.T

    found = opd.read_tokens(offloaded, rollout, read)
    assert torch.equal(found, opd.read_tokens(plain, rollout, lambda rows, head: rows @ head.T))
    assert len(seen) == len(home) > 20 and not set(seen) & set(home)
    assert places(offloaded) == home
    assert all(map(torch.equal, before, offloaded.lm.parameters()))
    assert all(map(torch.equal, before, plain.lm.parameters()))
    with pytest.raises(RuntimeError, match="out of memory"):
        opd.read_tokens(offloaded, rollout, out_of_memory)
    assert places(offloaded) == home and not offloaded.is_present


def out_of_memory(*inputs):
    raise RuntimeError("out of memory")


def test_to_sample_they_come_once(setup, monkeypatch):
    offloaded, plain, args, rollout = setup
    present, moves = models.Offloaded.present, []

    def spy(self):
        moves.append(not self.is_present)
        return present(self)

    monkeypatch.setattr(models.Offloaded, "present", spy)
    uniform = opd.uniforms(2, 2, 1, args)
    found, want = (
        opd.sample(each, rollout.prompts, uniform, args, 1.0) for each in (offloaded, plain)
    )
    assert torch.equal(found.completion_ids, want.completion_ids)
    assert torch.equal(found.rollout_logp, want.rollout_logp)
    assert moves[0] and len(moves) > 5 and not any(moves[1:])


def test_pieces_of_a_batch_share_one_head(setup):
    """The full objective keeps it for its loss: of all micro-batches one copy, and none after."""
    offloaded, plain, args, rollout = setup
    scores = [opd.score({"teacher": offloaded}, rollout, args) for _ in range(2)]
    assert scores[0]["teacher_head"] is scores[1]["teacher_head"]
    assert torch.equal(scores[0]["teacher_head"], plain.head)
    assert scores[0]["teacher_head"].data_ptr() not in places(offloaded)
    scores.clear()
    assert offloaded._head() is None


def test_the_estimate_has_them_in_their_phase_only(setup):
    _, plain, args, _ = setup
    found = memory.estimate(opd.model_paths(args), 12, args)
    size = sum(each.numel() * each.element_size() for each in plain.parameters())
    assert found["teacher: largest frozen model"] == size and "teacher weights" not in found
    args.teacher_offload = False
    there = memory.estimate(opd.model_paths(args), 12, args)
    assert memory.peak(there) - memory.peak(found) == size
