"""Each estimator of toy/estimators.py against its definition, by autograd and by identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toy import estimators as es
from toy import exact, mdp
from toy.mdp import Process, Rollouts


def table_gradient(process: Process, estimator: es.Estimator) -> np.ndarray:
    """Expectation of the local table over the student's action, [S, A]."""
    result: np.ndarray = (process.student_probs[0][..., None] * estimator.local[0]).sum(axis=1)
    return result


def losses(process: Process, k: int) -> dict[str, np.ndarray]:
    """Gradients by autograd of the losses that the direct estimators differentiate, [S, A]."""
    logits = torch.tensor(process.student_logits, requires_grad=True)
    teacher = torch.as_tensor(process.teacher_probs)
    student = torch.softmax(logits, dim=-1)
    support = torch.topk(teacher, k, dim=-1).indices
    inside, teacher_inside = student.gather(1, support), teacher.gather(1, support)
    renormalised = inside / inside.sum(1, keepdim=True)
    teacher_renormalised = teacher_inside / teacher_inside.sum(1, keepdim=True)
    drop = (inside * (inside / teacher_inside).log()).sum()
    value = {
        "renormalise": (renormalised * (renormalised / teacher_renormalised).log()).sum(),
        "drop": drop,
        "full": (student * (student / teacher).log()).sum(),
        "mass": inside.sum(),
    }
    value["bucket"] = drop
    if k < process.num_actions:
        rest, teacher_rest = 1 - inside.sum(1), 1 - teacher_inside.sum(1)
        value["bucket"] = drop + (rest * (rest / teacher_rest).log()).sum()
    return {
        name: torch.autograd.grad(v, logits, retain_graph=True)[0].numpy()
        for name, v in value.items()
    }


@given(actions=st.integers(2, 6), gap=st.floats(0.01, 3.0), seed=st.integers(0, 10_000))
def test_top_k_tables_equal_autograd(actions: int, gap: float, seed: int) -> None:
    process = mdp.random_mdp(2, num_states=3, num_actions=actions, gap=gap, seed=seed)
    for k in range(1, actions + 1):
        expected = losses(process, k)
        for outside in ("renormalise", "bucket", "drop"):
            got = table_gradient(process, es.top_k(process, k, outside))
            np.testing.assert_allclose(got, expected[outside], atol=1e-10, rtol=0)
        full = table_gradient(process, es.full_vocabulary(process))
        np.testing.assert_allclose(full, expected["full"], atol=1e-10, rtol=0)
        unbiased = table_gradient(process, es.top_k(process, k, "score"))
        np.testing.assert_allclose(unbiased, expected["full"], atol=1e-10, rtol=0)
        # without the + 1 the expectation gains the gradient of the student's mass on the support
        biased = table_gradient(process, es.top_k(process, k, "score_without_one"))
        np.testing.assert_allclose(biased, expected["full"] + expected["mass"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_discounted_is_the_gradient_of_its_surrogate(gamma: float, shared: bool) -> None:
    """Autograd of sum_t sg[sum_{t'>=t} gamma^(t'-t) r_t'] student_logp_t, rollout by rollout."""
    process = mdp.random_mdp(5, num_states=3, num_actions=4)
    process = process if shared else process.untied()
    rollouts = mdp.sample(process, 7, np.random.default_rng(0))
    ours = es.rollout_gradients(process, rollouts, es.discounted(process, gamma))
    product = es.rollout_gradients(process, rollouts, es.sequence_level(process))
    for n in range(len(rollouts)):
        logits = torch.tensor(process.student_logits, requires_grad=True)
        steps = torch.arange(5)
        state, action = torch.as_tensor(rollouts.states[n]), torch.as_tensor(rollouts.actions[n])
        logp = torch.log_softmax(logits, dim=-1)
        logp = logp[state, action] if shared else logp[steps, state, action]
        teacher = torch.as_tensor(process.teacher_probs).log()[state, action]
        log_ratio = (logp - teacher).detach()
        lag = steps[None, :] - steps[:, None]
        weight = torch.where(lag >= 0, torch.tensor(gamma, dtype=torch.float64) ** lag, 0.0)
        surrogate = ((weight @ log_ratio) * logp).sum()
        (gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        np.testing.assert_allclose(ours[n], gradient.numpy(), atol=1e-12, rtol=0)
        (gradient,) = torch.autograd.grad(log_ratio.sum() * logp.sum(), logits)
        np.testing.assert_allclose(product[n], gradient.numpy(), atol=1e-12, rtol=0)


def test_k_equal_to_the_vocabulary_is_the_full_kl() -> None:
    process = mdp.random_mdp(4, num_states=3, num_actions=5)
    full = es.full_vocabulary(process).local
    for outside in ("renormalise", "bucket", "score"):
        got = es.top_k(process, 5, outside).local
        np.testing.assert_allclose(got - full, 0.0 * full, atol=1e-12)


def test_one_action_support_renormalised_teaches_nothing() -> None:
    """K = 1, renormalised, is a loss of zero: the reason to ask for K >= 2 in practice."""
    process = mdp.random_mdp(4, num_states=3, num_actions=5)
    assert np.abs(es.top_k(process, 1).local).max() < 1e-15


def test_full_vocabulary_keeps_the_expectation_at_every_gamma() -> None:
    process = mdp.random_mdp(10, num_states=4, num_actions=6)
    for gamma in (0.0, 0.5, 1.0):
        sampled = exact.moments(process, es.discounted(process, gamma))
        full = exact.moments(process, es.full_vocabulary(process, gamma))
        np.testing.assert_allclose(full.mean, sampled.mean, atol=1e-10, rtol=1e-10)
        assert full.trace_cov < sampled.trace_cov


def test_a_wide_clip_and_a_full_mask_change_nothing() -> None:
    process = mdp.random_mdp(4, num_states=3, num_actions=5)
    plain = es.discounted(process, 0.5).local
    keep = np.ones((3, 5), dtype=bool)
    assert np.array_equal(es.discounted(process, 0.5, clip=1e6).local, plain)
    assert np.array_equal(es.discounted(process, 0.5, keep_mask=keep).local, plain)


def test_ties_go_to_the_lowest_action() -> None:
    process = mdp.trap(3)  # state 2: the teacher has 0.5, 0.5
    assert es.teacher_support(process, 1)[0, 2].tolist() == [True, False]


def test_sampling_follows_the_process() -> None:
    process = mdp.random_mdp(6, num_states=4, num_actions=3)
    rollouts = mdp.sample(process, 20_000, np.random.default_rng(3))
    visits = np.stack([np.bincount(s, minlength=4) for s in rollouts.states.T]) / 20_000
    assert np.abs(visits - exact.occupancy(process)).max() < 4.5 * 0.5 / np.sqrt(20_000)


def test_no_rollouts_give_no_gradients() -> None:
    process = mdp.trap(3)
    empty = Rollouts(np.empty((0, 3), dtype=np.int64), np.empty((0, 3), dtype=np.int64))
    assert es.rollout_gradients(process, empty, es.token_level(process)).shape == (0, 3, 2)
