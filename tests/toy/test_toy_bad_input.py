"""Bad input to the toy study: one clear error; an infinite KL is infinite, never NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from toy import estimators as es
from toy import exact, mdp
from toy.mdp import Process, Rollouts

GOOD = mdp.random_mdp(3, num_states=2, num_actions=3)
KEEP_NONE = np.zeros((2, 3), dtype=bool)

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "teacher not normalised": (
        lambda: replace(GOOD, teacher_probs=GOOD.teacher_probs * 1.01),
        "teacher_probs: rows must sum to 1",
    ),
    "negative probability": (
        lambda: replace(GOOD, teacher_probs=np.array([[1.5, -0.5, 0.0]] * 2)),
        "teacher_probs: expected finite probabilities",
    ),
    "start not normalised": (lambda: replace(GOOD, start=np.ones(2)), "start: rows must sum"),
    "transition of nan": (
        lambda: replace(GOOD, transition=GOOD.transition * np.nan),
        "transition: expected finite",
    ),
    "infinite logits": (
        lambda: replace(GOOD, student_logits=np.array([[0.0, np.inf, 0.0]] * 2)),
        "student_logits: expected finite",
    ),
    "logits of one axis": (
        lambda: replace(GOOD, student_logits=np.zeros(3)),
        "student_logits: expected [S, A] or [T, S, A], got shape [3]",
    ),
    "no actions": (lambda: replace(GOOD, student_logits=np.zeros((2, 0))), "empty support"),
    "wrong shape": (
        lambda: replace(GOOD, transition=np.ones((2, 2, 2)) / 2),
        "transition: expected shape [2, 3, 2], got [2, 2, 2]",
    ),
    "T = 0": (lambda: replace(GOOD, horizon=0), "horizon: expected T >= 1, got 0"),
    "no states": (lambda: mdp.independent(3, num_states=0), "empty support"),
    "stay": (lambda: mdp.correlated(3, stay=1.5), "stay: expected a probability"),
    "concentration": (lambda: mdp.random_mdp(3, concentration=0.0), "concentration: expected > 0"),
    "prefix chain": (lambda: mdp.prefix_chain(20), "prefixes"),
    "trap": (lambda: mdp.trap(3, teacher_pull=1.0), "teacher_pull: expected a probability"),
    "horizon of moving tables": (lambda: GOOD.untied().with_horizon(9), "depend on the step"),
    "no rollouts": (
        lambda: mdp.sample(GOOD, 0, np.random.default_rng(0)),
        "num_rollouts: expected >= 1, got 0",
    ),
    "too many to enumerate": (
        lambda: mdp.enumerate_rollouts(mdp.random_mdp(30)),
        "more than 2000000 rollouts",
    ),
    "gamma < 0": (lambda: es.discounted(GOOD, -0.1), "gamma in [0, 1], got -0.1"),
    "gamma > 1": (lambda: es.discounted(GOOD, 1.1), "gamma in [0, 1], got 1.1"),
    "gamma nan": (lambda: es.full_vocabulary(GOOD, float("nan")), "gamma in [0, 1], got nan"),
    "gamma of the bound": (lambda: exact.second_moment_bound(GOOD, 2.0), "gamma in [0, 1]"),
    "K = 0": (lambda: es.top_k(GOOD, 0), "expected 1 <= K <= A = 3, got 0"),
    "K > A": (lambda: es.top_k(GOOD, 4), "expected 1 <= K <= A = 3, got 4"),
    "outside": (lambda: es.top_k(GOOD, 2, "tail"), "outside: expected one of"),  # type: ignore[arg-type]
    "clip": (lambda: es.discounted(GOOD, 0.0, clip=0.0), "clip: expected a bound > 0"),
    "empty mask": (lambda: es.discounted(GOOD, 0.0, keep_mask=KEEP_NONE), "empty support"),
    "mask shape": (
        lambda: es.discounted(GOOD, 0.0, keep_mask=KEEP_NONE[0]),
        "keep_mask: expected shape [S, A], got [3]",
    ),
    "baseline shape": (lambda: es.discounted(GOOD, 0.0, baseline=np.zeros(5)), "baseline"),
    "baseline nan": (
        lambda: es.discounted(GOOD, 0.0, baseline=np.full(2, np.nan)),
        "baseline: expected finite",
    ),
    "rollouts of another horizon": (
        lambda: es.rollout_gradients(
            GOOD,
            Rollouts(np.zeros((1, 2), dtype=np.int64), np.zeros((1, 2), dtype=np.int64)),
            es.token_level(GOOD),
        ),
        "rollouts: expected [N, T = 3]",
    ),
    "N = 0": (
        lambda: exact.report(GOOD, es.token_level(GOOD)).mean_squared_error(0),
        "num_rollouts: expected >= 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_one_clear_error(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def teacher_without(action: int, start: tuple[float, float] = (0.5, 0.5)) -> Process:
    """A teacher that has no mass on one action in state 1."""
    teacher = GOOD.teacher_probs.copy()
    teacher[1, action] = 0.0
    teacher[1] /= teacher[1].sum()
    stay = np.repeat(np.eye(2)[:, None, :], 3, axis=1)
    return replace(GOOD, teacher_probs=teacher, start=np.array(start), transition=stay)


def every_kind(process: Process) -> list[es.Estimator]:
    kinds = [es.discounted(process, g) for g in (0.0, 0.5, 1.0)]
    kinds += [es.sequence_level(process), es.full_vocabulary(process)]
    kinds += [es.full_vocabulary(process, 1.0), es.discounted(process, 1.0, clip=3.0)]
    kinds += [
        es.top_k(process, k, o)  # type: ignore[arg-type]
        for k in (1, 2, 3)
        for o in ("renormalise", "bucket", "score", "score_without_one", "drop")
    ]
    return kinds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("action", [0, 1, 2])
def test_zero_teacher_probability_is_infinite_and_never_nan(action: int, shared: bool) -> None:
    process = teacher_without(action)
    process = process if shared else process.untied()
    assert exact.sequence_kl(process) == np.inf
    rollouts, _ = mdp.enumerate_rollouts(process)
    for estimator in every_kind(process):
        moment = exact.moments(process, estimator)
        found = exact.report(process, estimator)
        assert not np.isnan(moment.mean).any() and not np.isnan(moment.second)
        assert found.bias_sequence == np.inf and not np.isnan(found.trace_cov)
        assert not np.isnan(es.rollout_gradients(process, rollouts, estimator)).any()
    for infinite in (es.token_level(process), es.causal_sequence_level(process)):
        assert exact.moments(process, infinite).second == np.inf
        assert np.isinf(es.rollout_gradients(process, rollouts, infinite)).any()
    # what never looks at the missing action, or bounds its cost, stays finite
    for finite in (es.discounted(process, 1.0, clip=3.0), es.top_k(process, 2)):
        assert np.isfinite(exact.moments(process, finite).second)


@pytest.mark.filterwarnings("error")
def test_an_infinite_cost_that_no_rollout_reaches_does_not_matter() -> None:
    process = teacher_without(1, start=(1.0, 0.0))
    assert np.isfinite(exact.sequence_kl(process))
    rollouts, weight = mdp.enumerate_rollouts(process)
    for estimator in every_kind(process):
        flat = es.rollout_gradients(process, rollouts, estimator).reshape(len(rollouts), -1)
        moment = exact.moments(process, estimator)
        np.testing.assert_allclose(moment.mean.ravel(), weight @ flat, atol=1e-10)
        assert moment.second == pytest.approx(float(weight @ (flat**2).sum(axis=1)), abs=1e-10)


@pytest.mark.filterwarnings("error")
def test_extreme_but_finite_students_give_no_nan() -> None:
    logits = np.array([[800.0, 0.0, -800.0], [0.0, 0.0, 0.0]])
    process = replace(GOOD, student_logits=logits)
    for estimator in every_kind(process):
        moment = exact.moments(process, estimator)
        assert np.isfinite(moment.mean).all() and np.isfinite(moment.second), estimator.name
