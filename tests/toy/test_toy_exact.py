"""The exact moments of toy/exact.py against enumeration, autograd and sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toy import estimators as es
from toy import exact, mdp
from toy.mdp import Process

TOLERANCE = 1e-10

SMALL: dict[str, Callable[[], Process]] = {
    "independent": lambda: mdp.independent(3, num_states=2, num_actions=3),
    "persistent": lambda: mdp.persistent(4, num_states=3, num_actions=3),
    "correlated": lambda: mdp.correlated(4, num_states=2, num_actions=2, stay=0.6),
    "random": lambda: mdp.random_mdp(4, num_states=2, num_actions=3, gap=2.0),
    "random, untied": lambda: mdp.random_mdp(4, num_states=2, num_actions=3, gap=2.0).untied(),
    "moving tables": lambda: moving_tables(4),
    "moving teacher": lambda: moving_tables(4, shared=True),
    "prefix chain": lambda: mdp.prefix_chain(4, vocabulary=3),
    "trap": lambda: mdp.trap(6),
}


def moving_tables(horizon: int, shared: bool = False) -> Process:
    """Teacher (and student, unless shared) different at each step."""
    rng = np.random.default_rng(5)
    base = mdp.random_mdp(horizon, num_states=3, num_actions=2, seed=3)
    logits = rng.normal(size=(3, 2) if shared else (horizon, 3, 2))
    teacher = rng.dirichlet(np.ones(2), size=(horizon, 3))
    return Process("moving", base.start, base.transition, logits, teacher, horizon)


def all_estimators(process: Process) -> list[es.Estimator]:
    """One of every kind that the study uses."""
    actions = process.num_actions
    keep = np.ones((process.num_states, actions), dtype=bool)
    keep[:, 0] = False
    baseline = exact.values(process, es.discounted(process, 0.5))[:-1]
    found = [es.discounted(process, gamma) for gamma in (0.0, 0.3, 0.9, 1.0)]
    found += [
        es.token_level(process),
        es.causal_sequence_level(process),
        es.sequence_level(process),
        es.discounted(process, 0.5, baseline=baseline),
        es.discounted(process, 1.0, baseline=np.arange(process.num_states) * 0.1),
        es.discounted(process, 0.7, clip=0.4),
        es.discounted(process, 0.7, keep_mask=keep),
        es.full_vocabulary(process),
        es.full_vocabulary(process, 0.8),
    ]
    for k in range(1, actions + 1):
        for outside in ("renormalise", "bucket", "score", "score_without_one", "drop"):
            found.append(es.top_k(process, k, outside))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("case", SMALL)
def test_moments_equal_enumeration(case: str) -> None:
    process = SMALL[case]()
    rollouts, weight = mdp.enumerate_rollouts(process)
    assert abs(weight.sum() - 1) < 1e-12
    for estimator in all_estimators(process):
        flat = es.rollout_gradients(process, rollouts, estimator).reshape(len(rollouts), -1)
        mean, second = weight @ flat, weight @ (flat**2).sum(axis=1)
        moment = exact.moments(process, estimator)
        assert moment.mean.shape == process.student_logits.shape
        np.testing.assert_allclose(moment.mean.ravel(), mean, atol=TOLERANCE, rtol=0)
        assert moment.second == pytest.approx(second, abs=TOLERANCE, rel=TOLERANCE)
        forward = exact.expectation(process, estimator)  # occupancy times value, another route
        np.testing.assert_allclose(forward.ravel(), mean, atol=TOLERANCE, rtol=0)
        centred = float(weight @ ((flat - mean) ** 2).sum(axis=1))
        assert moment.trace_cov == pytest.approx(centred, abs=TOLERANCE, rel=TOLERANCE)


@given(
    horizon=st.integers(1, 3),
    states=st.integers(1, 3),
    actions=st.integers(1, 3),
    gap=st.floats(0.0, 4.0),
    gamma=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    shared=st.booleans(),
)
def test_any_process_equals_enumeration_and_keeps_its_bound(
    horizon: int, states: int, actions: int, gap: float, gamma: float, seed: int, shared: bool
) -> None:
    process = mdp.random_mdp(horizon, states, actions, gap, concentration=1.0, seed=seed)
    process = process if shared else process.untied()
    rollouts, weight = mdp.enumerate_rollouts(process)
    for estimator in (es.discounted(process, gamma), es.sequence_level(process)):
        flat = es.rollout_gradients(process, rollouts, estimator).reshape(len(rollouts), -1)
        moment = exact.moments(process, estimator)
        np.testing.assert_allclose(moment.mean.ravel(), weight @ flat, atol=TOLERANCE, rtol=0)
        second = float(weight @ (flat**2).sum(axis=1))
        assert moment.second == pytest.approx(second, abs=TOLERANCE, rel=TOLERANCE)
        bound = exact.second_moment_bound(process, estimator.discount, estimator.causal)
        assert moment.second <= bound * (1 + 1e-12)


def sequence_kl_by_torch(process: Process, logits: torch.Tensor, hold_law: bool) -> torch.Tensor:
    """Value recursion in torch; `hold_law` stops the gradient through the law of the prefixes."""
    transition = torch.as_tensor(process.transition)
    teacher = torch.as_tensor(process.teacher_logp)
    value = torch.zeros(process.num_states, dtype=torch.float64)
    for t in range(process.horizon - 1, -1, -1):
        logp = torch.log_softmax(logits if logits.ndim == 2 else logits[t], dim=-1)
        log_ratio = logp - teacher[t % len(teacher)]
        law = logp.exp().detach() if hold_law else logp.exp()
        value = (logp.exp() * log_ratio).sum(-1) + (law * (transition @ value)).sum(-1)
    return torch.as_tensor(process.start) @ value


@pytest.mark.parametrize("case", SMALL)
def test_gradients_equal_autograd(case: str) -> None:
    process = SMALL[case]()
    for hold_law, ours in (
        (False, exact.sequence_kl_gradient(process)),
        (True, exact.prefix_kl_gradient(process)),
    ):
        logits = torch.tensor(process.student_logits, requires_grad=True)
        value = sequence_kl_by_torch(process, logits, hold_law)
        (gradient,) = torch.autograd.grad(value, logits)
        np.testing.assert_allclose(ours, gradient.numpy(), atol=TOLERANCE, rtol=0)
        assert value.item() == pytest.approx(exact.sequence_kl(process), abs=TOLERANCE)


def test_sequence_forms_are_unbiased_and_token_level_only_for_prefixes() -> None:
    process = mdp.random_mdp(12, num_states=5, num_actions=4)
    for unbiased in (es.causal_sequence_level(process), es.sequence_level(process)):
        assert exact.report(process, unbiased).bias_sequence < 1e-10
    token = exact.report(process, es.token_level(process))
    assert token.bias_prefix < 1e-12 < 0.1 < token.bias_sequence


def test_actions_without_consequences_make_token_level_unbiased() -> None:
    process = mdp.correlated(12, num_states=5, num_actions=4)
    assert exact.report(process, es.token_level(process)).bias_sequence < 1e-12


@pytest.mark.parametrize("horizon", [64, 1024])
def test_the_value_baseline_lowers_the_variance_and_moves_no_mean(horizon: int) -> None:
    process = mdp.random_mdp(horizon, num_states=8, num_actions=8)
    plain = es.causal_sequence_level(process)
    baseline = exact.values(process, plain)[:-1]
    better = exact.moments(process, es.discounted(process, 1.0, baseline=baseline))
    before = exact.moments(process, plain)
    np.testing.assert_allclose(better.mean, before.mean, rtol=1e-8, atol=1e-8)
    assert better.trace_cov < before.trace_cov / 5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["persistent", "random MDP", "random MDP, untied", "trap"])
def test_moments_equal_sampling_within_its_own_interval(case: str) -> None:
    """|average - exact| within 4.5 standard errors, for each entry of the mean and for E |X|^2."""
    process = {
        "persistent": lambda: mdp.persistent(16),
        "random MDP": lambda: mdp.random_mdp(16, num_states=6, num_actions=5),
        "random MDP, untied": lambda: mdp.random_mdp(8, num_states=4, num_actions=3).untied(),
        "trap": lambda: mdp.trap(16),
    }[case]()
    num = 40_000
    rollouts = mdp.sample(process, num, np.random.default_rng(11))
    for estimator in (
        es.token_level(process),
        es.discounted(process, 0.9),
        es.causal_sequence_level(process),
        es.sequence_level(process),
        es.top_k(process, 1, "score"),
    ):
        gradient = es.rollout_gradients(process, rollouts, estimator).reshape(num, -1)
        moment = exact.moments(process, estimator)
        error = np.abs(gradient.mean(axis=0) - moment.mean.ravel())
        standard_error = gradient.std(axis=0, ddof=1) / np.sqrt(num)
        assert np.all(error <= 4.5 * standard_error + 1e-12)
        square = (gradient**2).sum(axis=1)
        error_second = abs(square.mean() - moment.second)
        assert error_second <= 4.5 * square.std(ddof=1) / np.sqrt(num) + 1e-12
        if case == "trap":  # rare actions of large cost: the interval is honest, and wide
            continue
        # elsewhere it is worth something: 40,000 rollouts know E |X|^2 to a few per cent
        assert square.std(ddof=1) / np.sqrt(num) < 0.05 * moment.second
