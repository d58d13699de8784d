"""--teacher-offload: frozen models wait in CPU memory; here the device is a CPU with copies."""

from __future__ import annotations

from functools import partial

import opd
import pytest
import tinylm
import torch

from opd_run import memory, models, offload, setup


@pytest.fixture
def prepared(tmp_path):
    """Models with the teacher offloaded, the same teacher in place, flags, and a rollout."""
    paths = [tinylm.save_model(tmp_path / name, seed) for seed, name in enumerate(("s", "t"))]
    args = opd.parse_args(
        ["--student", paths[0], "--teacher", paths[1], "--device", "cpu", "--objective", "full"]
    )
    plain, tokenizer = tinylm.load(opd, args)
    args.teacher_offload = True  # on a CPU the command line refuses it
    facts = plain["student"].facts
    loaded = setup.load_models(
        partial(opd.load, facts=facts, args=args), opd.model_paths(args), args, facts
    )
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "345+6=")]
    rollout = opd.sample(plain["student"], prompts, opd.uniforms(2, "rollouts", 0, args), args)
    return loaded["teacher"], plain["teacher"], args, rollout


def places(model: models.CausalLM) -> list[int]:
    return [each.data_ptr() for each in (*model.lm.parameters(), *model.lm.buffers())]


def test_weights_come_to_score_and_those_that_wait_are_untouched(prepared):
    offloaded, plain, _, rollout = prepared
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


def test_one_that_waits_reads_its_own_prompt(prepared):
    offloaded, plain, args, rollout = prepared
    without = opd.token_logp(plain, rollout, args)
    read = [(5, 6, 7, 8, 9, 10, 11, 12), (4,)]
    rollout.prompts = [
        opd.replace(each, views={"teacher": ids}) for each, ids in zip(rollout.prompts, read)
    ]
    found = opd.token_logp(offloaded, rollout, args)
    assert torch.equal(found, opd.token_logp(plain, rollout, args))
    assert (found - without).abs().max() > 1e-3


def out_of_memory(*inputs):
    raise RuntimeError("out of memory")


def test_to_sample_they_come_once(prepared, monkeypatch):
    offloaded, plain, args, rollout = prepared
    present, moves = offload.Offloaded.present, []

    def spy(self):
        moves.append(not self.is_present)
        return present(self)

    monkeypatch.setattr(offload.Offloaded, "present", spy)
    uniform = opd.uniforms(2, "rollouts", 1, args)
    found, want = (opd.sample(each, rollout.prompts, uniform, args) for each in (offloaded, plain))
    assert torch.equal(found.completion_ids, want.completion_ids)
    assert torch.equal(found.rollout_logp, want.rollout_logp)
    assert moves[0] and len(moves) > 5 and not any(moves[1:])


def test_pieces_of_a_batch_share_one_head(prepared):
    """The full objective keeps it for its loss: of all micro-batches one copy, and none after."""
    offloaded, plain, args, rollout = prepared
    scores = [opd.score({"teacher": offloaded}, rollout, args) for _ in range(2)]
    heads = [each["teacher_head"]() for each in scores]
    assert heads[0] is heads[1] and torch.equal(heads[0], plain.head)
    scores.clear()
    heads.clear()
    assert offloaded._copy() is None


def test_the_estimate_has_them_in_their_phase_only(prepared):
    _, plain, args, _ = prepared
    found = memory.estimate(opd.model_paths(args), 12, args)
    size = sum(each.numel() * each.element_size() for each in plain.parameters())
    assert found["teacher: largest frozen model"] == size and "teacher weights" not in found
    args.teacher_offload = False
    there = memory.estimate(opd.model_paths(args), 12, args)
    assert memory.peak(there) - memory.peak(found) == size
