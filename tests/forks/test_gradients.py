"""What each fork estimates, by enumeration of every completion, against its formula."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tablelm import TableLM, all_completions, expected_gradient, rollout_of

VOCAB, LENGTH = 3, 3
STUDENT, TEACHER = TableLM(VOCAB, LENGTH, 1), TableLM(VOCAB, LENGTH, 2)
COMPLETIONS = all_completions(VOCAB, LENGTH)
LOGP, TEACHER_LOGP = STUDENT.logp(COMPLETIONS), TEACHER.logp(COMPLETIONS).detach()  # [27, 3, 3]
PROBS = STUDENT.token_logp(COMPLETIONS).sum(1).exp().detach()  # [27]
GROUP = torch.randn(27, generator=torch.Generator().manual_seed(3))


def estimate(fork: str, *flags: str, weights: torch.Tensor = PROBS, **changes: torch.Tensor):
    """The expectation of the gradient of `token_loss`, one completion at a time."""
    module = importlib.import_module(fork)
    args = module.parse_args(list(flags))

    def loss(i: int) -> torch.Tensor:
        mine = {name: value[i : i + 1] for name, value in changes.items()}
        extra = {"group_advantage": GROUP[i : i + 1]}
        rollout = rollout_of(module, COMPLETIONS[i : i + 1], extra=extra, **mine)
        scores = module.score({"student": STUDENT, "teacher": TEACHER}, rollout, args)
        return module.token_loss(STUDENT, rollout, scores, args)[0]

    return expected_gradient(STUDENT, weights, loss)


def exact(value: torch.Tensor) -> torch.Tensor:
    """The gradient of `value` with respect to the student's table."""
    return torch.autograd.grad(value, STUDENT.table, retain_graph=True)[0]


def visited(values: torch.Tensor) -> torch.Tensor:
    """[27, 3], a value at each prefix, summed over prefixes by how likely they are visited."""
    return (PROBS[:, None] * values).sum()


def reverse_kl() -> torch.Tensor:
    return visited((LOGP.exp() * (LOGP - TEACHER_LOGP)).sum(-1))


def close(found: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(found, want, atol=atol)


@pytest.mark.parametrize("power", [0.5, 5.0])
def test_power_opd_is_the_density_power_divergence(power):
    student, teacher = LOGP.exp(), TEACHER_LOGP.exp()
    divergence = student ** (1 + power) / (1 + power) - student * teacher**power
    found = estimate("power_opd", "--power", str(power))
    assert close(found, exact(visited(divergence.sum(-1))))
    assert not close(found, exact(reverse_kl()), 1e-2)


def test_power_opd_becomes_opd_as_the_power_vanishes():
    found = estimate("power_opd", "--power", "0.001") / 0.001
    assert close(found, exact(reverse_kl()), 2e-3)
    assert not close(estimate("power_opd", "--power", "1"), exact(reverse_kl()), 2e-3)


def expected_group() -> torch.Tensor:
    """E[group_advantage] of whole completions: its gradient is the policy gradient."""
    return (STUDENT.token_logp(COMPLETIONS).sum(1).exp() * GROUP).sum()


def test_reward_opd_adds_the_policy_gradient_of_the_verifier():
    found = estimate("reward_opd", "--verdict-weight", "0.7")
    assert close(found, exact(reverse_kl() - 0.7 * expected_group()))
    assert close(estimate("reward_opd", "--verdict-weight", "0"), exact(reverse_kl()))


def test_grpo_is_the_policy_gradient_of_the_verifier():
    assert close(estimate("grpo"), exact(-expected_group()))


@pytest.mark.parametrize("fork", ["grpo", "reward_opd"])
def test_group_advantage_by_hand(fork):
    """Two of three right; all alike; one unverified, which counts nowhere."""
    advantage = importlib.import_module(fork).group_advantage
    verdict = torch.tensor([1.0, 1, -1, -1, -1, -1, 1, -1, 0])
    a, b = 1 / math.sqrt(2), -math.sqrt(2)  # mean 1/3, deviation sqrt(8) / 3
    want = torch.tensor([a, a, b, 0, 0, 0, 1, -1, 0])
    assert torch.allclose(advantage(verdict, 3), want, atol=1e-5)


def test_opsa_lowers_the_mass_on_unlikely_tokens():
    probs = LOGP.exp()
    mass = (probs * (probs.detach() < 0.3)).sum(-1)
    found = estimate("opsa", "--unlikely-below", "0.3", "--penalty", "2")
    assert close(found, exact(2 * visited(mass)))
    assert found.abs().max() > 0.01


def test_supervised_is_the_forward_kl_of_whole_completions():
    weights = TEACHER.token_logp(COMPLETIONS).sum(1).exp().detach()
    cross = -(weights * STUDENT.token_logp(COMPLETIONS).sum(1)).sum()
    assert close(estimate("supervised", weights=weights), exact(cross))


@pytest.mark.parametrize("renormalise", [True, False])
def test_eopd_adds_the_forward_kl_where_the_teacher_is_uncertain(renormalise):
    entropy = -(TEACHER_LOGP.exp() * TEACHER_LOGP).sum(-1)
    gate = (entropy > 0.8).double()
    assert 0 < gate.mean() < 1
    top = TEACHER_LOGP.topk(2, -1)
    support = top.values.log_softmax(-1) if renormalise else top.values
    forward = (support.exp() * (support - LOGP.gather(2, top.indices))).sum(-1)
    flags = ["--support-size", "2", *["--no-renormalise"] * (not renormalise)]
    assert close(estimate("eopd", *flags), exact(reverse_kl() + visited(gate * forward)))
    off = estimate("eopd", *flags, "--uncertain-above", "inf")
    assert close(off, exact(reverse_kl()))


def test_eopd_where_the_teacher_has_ruled_out_a_token():
    """The support holds it, with probability 0: 0 log 0 is 0."""
    module, teacher = importlib.import_module("eopd"), TableLM(VOCAB, LENGTH, 2)
    with torch.no_grad():
        teacher.table[:, 2] = -math.inf
    rollout = rollout_of(module, COMPLETIONS[(COMPLETIONS != 2).all(1)])
    args = module.parse_args(["--support-size", "3", "--uncertain-above", "0"])
    scores = module.score({"teacher": teacher}, rollout, args)
    loss, logged = module.token_loss(STUDENT, rollout, scores, args)
    assert loss.isfinite() and exact(loss).isfinite().all()
    logp, teacher_logp = (each.logp(rollout.completion_ids) for each in (STUDENT, teacher))
    pairs = (teacher_logp.exp() * (teacher_logp - logp))[..., :2]
    assert torch.allclose(logged["support_forward_kl"].double(), pairs.sum(-1), atol=1e-6)


FLOORS = {"knee": math.log(0.3 / 0.7), "skew": math.log(0.3) / 0.7}


@pytest.mark.parametrize("form", FLOORS)
def test_reopold_has_a_floor_under_the_advantage(form):
    advantage = (TEACHER_LOGP - LOGP).detach().clamp(min=FLOORS[form])
    want = -visited((LOGP.exp() * advantage).sum(-1))
    found = estimate("reopold", "--floor-form", form)
    assert close(found, exact(want))
    assert not close(found, exact(reverse_kl()), 1e-3)
    assert close(estimate("reopold", "--floor-weight", "0"), exact(reverse_kl()))


def cleared(by_entropy: bool, *flags: str) -> torch.Tensor:
    """[27, 3] what REOPOLD trains of all completions."""
    module = importlib.import_module("reopold")
    rollout = rollout_of(module, COMPLETIONS)
    rollout.behaviour_logp = STUDENT.token_logp(COMPLETIONS).detach().float()
    args = module.parse_args([*flags, "--micro-batch-tokens", "20"])
    module.clear_mask({"student": STUDENT, "teacher": TEACHER}, rollout, args, by_entropy)
    return rollout.response_mask


def test_reopold_trains_what_is_above_the_floor_then_what_is_uncertain():
    advantage = (TEACHER.token_logp(COMPLETIONS) - STUDENT.token_logp(COMPLETIONS)).detach()
    want = advantage >= FLOORS["knee"]
    assert torch.equal(cleared(False), want) and 0 < want.float().mean() < 1
    assert cleared(False, "--floor-weight", "0").all()
    entropy = -(LOGP.exp() * LOGP).sum(-1).detach()  # [27, 3], equal where prefixes are
    kept = cleared(True, "--entropy-share", "0.2")
    assert kept.sum() >= math.ceil(0.2 * 81)
    assert entropy[kept].min() > entropy[~kept].max()
    assert cleared(True, "--entropy-share", "1").all()


@pytest.mark.parametrize("by_entropy", [False, True])
def test_reopold_hides_no_nan(monkeypatch, by_entropy):
    """A token that is not finite stays in the mask, where it makes the step a bad one."""
    broken = TableLM(VOCAB, LENGTH, 1)
    with torch.no_grad():
        broken.table[0] = math.nan  # of the first token
    monkeypatch.setitem(globals(), "STUDENT" if by_entropy else "TEACHER", broken)
    assert cleared(by_entropy)[:, 0].all()


def gates_by_hand(drift: torch.Tensor, rate: float) -> torch.Tensor:
    """[27, 3] with blocks of two tokens."""
    blocks = torch.stack([drift[:, :2].mean(1), drift[:, 2]], 1)
    gate = (-rate * blocks.abs()).exp()[:, [0, 0, 1]]
    return gate / gate.mean(1, keepdim=True)


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_drift_gate_scales_tokens_by_the_drift_of_their_block(rate):
    old = TableLM(VOCAB, LENGTH, 9, scale=0.5)
    old_logp = old.token_logp(COMPLETIONS).detach()
    student_logp = STUDENT.token_logp(COMPLETIONS)
    drift = (student_logp - old_logp).detach()
    advantage = (TEACHER.token_logp(COMPLETIONS) - student_logp).detach()
    signal = gates_by_hand(drift, rate) * drift.exp().clamp(max=5.0) * advantage
    weights = old_logp.sum(1).exp()
    want = exact(-(weights[:, None] * signal * student_logp).sum())
    flags = ["--drift-rate", str(rate), "--block-tokens", "2"]
    found = estimate("drift_gate", *flags, weights=weights, behaviour_logp=old_logp.float())
    assert close(found, want)


def test_drift_gate_is_opd_before_the_first_update():
    now = STUDENT.token_logp(COMPLETIONS).detach().float()
    assert close(estimate("drift_gate", behaviour_logp=now), exact(reverse_kl()))


def test_drift_gate_is_one_on_average_however_far_all_has_drifted():
    module = importlib.import_module("drift_gate")
    args = module.parse_args(["--drift-rate", "10", "--block-tokens", "2"])
    mask = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    gate = module.drift_gate(torch.full((3, 3), -20.0), mask, args)  # exp(-200) is 0 in float32
    assert torch.allclose(gate, mask.float())


@pytest.mark.parametrize("verdict", [1.0, -1.0])
def test_opdvr_is_sg_opd_with_a_hard_gate(verdict):
    """A = v ReLU(v * -log_ratio): what docs/forks.md says of the flags."""
    flags = "--gate-extrapolation 1 --gate-interpolation 0 --teacher-phase-steps 0"
    advantage = (TEACHER_LOGP - LOGP).detach()
    want = -visited((LOGP.exp() * verdict * (verdict * advantage).relu()).sum(-1))
    words = torch.full((27,), verdict)
    assert close(estimate("sg_opd", *flags.split(), verdict=words), exact(want))
