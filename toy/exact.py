"""Exact expectation and covariance of the estimators, by backward dynamic programming.

No sampling and no list of rollouts: with G and X as in `estimators.py`, the moments
(E G, E G^2, E X, E[G X], E |X|^2) given the state at step t follow from those at step t + 1,
so a horizon of T costs T small array products. Scores of different steps are orthogonal when each
step has parameters of its own; then the vector moments drop out.

Gradients are [S, A] for shared parameters, else [T, S, A]. Costs are in nats, so second moments and
variances are in nats squared (logits have no unit). `trace_cov` is E |X - E X|^2, for one rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from toy.estimators import Estimator, discounted, full_vocabulary
from toy.mdp import Array, BoolArray, Process


def occupancy(process: Process) -> Array:
    """P(state_t = s) under the student, [T, S]."""
    result = np.empty((process.horizon, process.num_states))
    result[0] = process.start
    for t in range(process.horizon - 1):
        policy = process.student_probs[t % len(process.student_probs)]
        result[t + 1] = np.einsum("i,ia,iaj->j", result[t], policy, process.transition)
    return result


def sequence_kl(process: Process) -> float:
    """KL(student || teacher) of whole rollouts, nats; inf if a reachable cost is infinite."""
    visits = occupancy(process)
    total = 0.0
    for t in range(process.horizon):
        policy = process.student_probs[t % len(process.student_probs)]
        cost = process.log_ratio[t % len(process.log_ratio)]
        weight = visits[t][:, None] * policy
        total += float((weight[weight > 0] * cost[weight > 0]).sum())
    return total


def _meets_infinity(process: Process, estimator: Estimator) -> bool:
    """Whether a rollout of positive probability has a term of infinite size."""
    visits = occupancy(process)
    for t in range(process.horizon):
        policy = process.student_probs[t % len(process.student_probs)]
        infinite = ~np.isfinite(estimator.local[t % len(estimator.local)]).all(axis=-1)
        if estimator.discount > 0 and t > 0:  # the first cost reaches no earlier step
            infinite |= ~np.isfinite(estimator.cost[t % len(estimator.cost)])
        if np.any(infinite & (visits[t][:, None] * policy > 0)):
            return True
    return False


def _finite(table: Array) -> Array:
    """Zero where infinite: used where `_meets_infinity` has shown that nothing reaches there."""
    return np.where(np.isfinite(table), table, 0.0)


def values(process: Process, estimator: Estimator) -> Array:
    """E[G_t | state_t], [T + 1, S], nats; row T is zero. Infinite costs count as zero here."""
    cost = _finite(estimator.cost)
    result = np.zeros((process.horizon + 1, process.num_states))
    for t in range(process.horizon - 1, -1, -1):
        policy = process.student_probs[t % len(process.student_probs)]
        future = process.transition @ result[t + 1]
        result[t] = (policy * (cost[t % len(cost)] + estimator.discount * future)).sum(axis=1)
    return result


def expectation(process: Process, estimator: Estimator) -> Array:
    """E X, [S, A] or [T, S, A]; all entries inf if a rollout can meet an infinite term.

    The sequence-level form has the expectation of its causal form: past costs add nothing.
    """
    shape = (process.horizon, process.num_states, process.num_actions)
    if _meets_infinity(process, estimator):
        return np.full(shape[1:] if process.shared else shape, np.inf)
    visits, value, local = occupancy(process), values(process, estimator), _finite(estimator.local)
    result = np.empty(shape)
    for t in range(process.horizon):
        policy = process.student_probs[t % len(process.student_probs)]
        score = process.score[t % len(process.score)]
        future = estimator.discount * (process.transition @ value[t + 1])
        step = local[t % len(local)] + future[..., None] * score
        result[t] = visits[t][:, None] * (policy[..., None] * step).sum(axis=1)
    return result.sum(axis=0) if process.shared else result


def sequence_kl_gradient(process: Process) -> Array:
    """Gradient of `sequence_kl` in the student's logits."""
    return expectation(process, discounted(process, 1.0))


def prefix_kl_gradient(process: Process) -> Array:
    """Gradient of the sum of per-prefix KLs, with the law of the prefixes held fixed."""
    return expectation(process, full_vocabulary(process))


@dataclass(frozen=True)
class Moments:
    """Of an estimator, for one rollout: `mean` = E X (a gradient) and `second` = E |X|^2."""

    mean: Array
    second: float

    @property
    def trace_cov(self) -> float:
        """Trace of the covariance, E |X - E X|^2; rounding error about 1e-15 of `second`."""
        if not np.isfinite(self.second):
            return float("inf")
        return max(0.0, self.second - float((self.mean**2).sum()))


def moments(process: Process, estimator: Estimator) -> Moments:
    """Exact moments. Time O(T S^2 A (S + A)) with shared parameters, O(T S^2 A) without."""
    if _meets_infinity(process, estimator):
        return Moments(expectation(process, estimator), float("inf"))
    return _additive(process, estimator) if estimator.causal else _product(process, estimator)


def _own_row(transition: Array, vector: Array) -> Array:
    """E over the next state of row s (the current state) of vector [S', S, A] -> [S, A, A]."""
    result: Array = np.einsum("iaj,jib->iab", transition, vector, optimize=True)
    return result


def _backed_up(move: Array, vector: Array) -> Array:
    """move [S, S'] applied to the first axis of vector [S', S, A]."""
    result: Array = (move @ vector.reshape(len(vector), -1)).reshape(vector.shape)
    return result


def _additive(process: Process, estimator: Estimator) -> Moments:
    """The recursion for X_t = local + gamma G_{t+1} s_t + X_{t+1}, G_t = r_t + gamma G_{t+1}."""
    states, actions, gamma = process.num_states, process.num_actions, estimator.discount
    transition, row = process.transition, np.arange(states)
    mean_g, mean_g2, mean_xx = np.zeros(states), np.zeros(states), np.zeros(states)
    mean_x = np.zeros((states, states, actions))  # given the state, a gradient [S, A]
    mean_gx = np.zeros_like(mean_x)
    all_local, all_cost = _finite(estimator.local), _finite(estimator.cost)
    for t in range(process.horizon - 1, -1, -1):
        policy = process.student_probs[t % len(process.student_probs)]
        score = process.score[t % len(process.score)]
        local, cost = all_local[t % len(all_local)], all_cost[t % len(all_cost)]
        # expectations of the future given state and action, [S, A]
        next_g, next_g2, next_xx = transition @ mean_g, transition @ mean_g2, transition @ mean_xx
        second = (
            (local**2).sum(axis=-1)
            + 2 * gamma * next_g * (local * score).sum(axis=-1)
            + gamma**2 * next_g2 * (score**2).sum(axis=-1)
            + next_xx
        )
        if process.shared:  # else s_t is orthogonal to X_{t+1}
            second += 2 * (local * _own_row(transition, mean_x)).sum(axis=-1)
            second += 2 * gamma * (score * _own_row(transition, mean_gx)).sum(axis=-1)
            # E[G X] and E X: terms of this step lie in the row of the current state
            here = (cost + gamma * next_g)[..., None] * local
            here += (gamma * cost * next_g + gamma**2 * next_g2)[..., None] * score
            costed = np.einsum("ia,ia,iaj->ij", policy, cost, transition)
            move = np.einsum("ia,iaj->ij", policy, transition)
            mean_gx = _backed_up(costed, mean_x) + gamma * _backed_up(move, mean_gx)
            mean_gx[row, row] += (policy[..., None] * here).sum(axis=1)
            mean_x = _backed_up(move, mean_x)
            now = local + (gamma * next_g)[..., None] * score
            mean_x[row, row] += (policy[..., None] * now).sum(axis=1)
        mean_xx = (policy * second).sum(axis=1)
        mean_g2 = (policy * (cost**2 + 2 * gamma * cost * next_g + gamma**2 * next_g2)).sum(axis=1)
        mean_g = (policy * (cost + gamma * next_g)).sum(axis=1)
    if process.shared:
        mean: Array = np.einsum("i,iab->ab", process.start, mean_x)
    else:
        mean = expectation(process, estimator)
    return Moments(mean, float(process.start @ mean_xx))


def _product(process: Process, estimator: Estimator) -> Moments:
    """The recursion for X = R Z, R = sum_t r_t, Z = sum_t s_t: moments of R^i (1, Z, |Z|^2)."""
    states, actions, transition = process.num_states, process.num_actions, process.transition
    row, orders = np.arange(states), range(3)
    mean_r = [np.ones(states), np.zeros(states), np.zeros(states)]  # E R^i
    mean_zz = [np.zeros(states) for _ in orders]  # E R^i |Z|^2
    mean_z = [np.zeros((states, states, actions)) for _ in orders]  # E R^i Z
    all_cost = _finite(estimator.cost)
    for t in range(process.horizon - 1, -1, -1):
        policy = process.student_probs[t % len(process.student_probs)]
        score = process.score[t % len(process.score)]
        cost = all_cost[t % len(all_cost)]
        next_r = [transition @ m for m in mean_r]
        next_zz = [  # E R'^j |s + Z'|^2 given state and action
            next_r[j] * (score**2).sum(axis=-1) + transition @ mean_zz[j] for j in orders
        ]
        if process.shared:
            for j in orders:
                next_zz[j] += 2 * (score * _own_row(transition, mean_z[j])).sum(axis=-1)
        new_r, new_zz, new_z = [], [], []
        for i in orders:  # (r + R')^i = sum_j C(i, j) r^(i - j) R'^j
            power = [comb(i, j) * policy * cost ** (i - j) for j in range(i + 1)]
            new_r.append(sum((power[j] * next_r[j]).sum(axis=1) for j in range(i + 1)))
            new_zz.append(sum((power[j] * next_zz[j]).sum(axis=1) for j in range(i + 1)))
            vector = np.zeros((states, states, actions))
            if process.shared:
                for j in range(i + 1):
                    move = np.einsum("ia,iaj->ij", power[j], transition)
                    vector += _backed_up(move, mean_z[j])
                    here = ((power[j] * next_r[j])[..., None] * score).sum(axis=1)
                    vector[row, row] += here
            new_z.append(vector)
        mean_r, mean_zz, mean_z = new_r, new_zz, new_z
    if process.shared:
        mean: Array = np.einsum("i,iab->ab", process.start, mean_z[1])
    else:
        mean = expectation(process, estimator)
    return Moments(mean, float(process.start @ mean_zz[2]))


# ---- What the study reports ----------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Errors of one estimator, per rollout; norms in nats, variance in nats squared.

    bias_sequence  |E X - gradient of the sequence KL|
    bias_prefix    |E X - gradient of the sum of per-prefix KLs|
    cosine         of E X with the gradient of the sequence KL; 0 where one is zero or infinite
    """

    bias_sequence: float
    bias_prefix: float
    cosine: float
    trace_cov: float

    def mean_squared_error(self, num_rollouts: int) -> float:
        """E |average over N rollouts - gradient of the sequence KL|^2 = bias^2 + variance / N."""
        if num_rollouts < 1:
            raise ValueError(f"num_rollouts: expected >= 1, got {num_rollouts}")
        return self.bias_sequence**2 + self.trace_cov / num_rollouts


def report(process: Process, estimator: Estimator) -> Report:
    """Exact bias against both targets, and variance; infinite values are reported as inf."""
    moment = moments(process, estimator)

    def distance(target: Array) -> float:
        if not (np.isfinite(moment.mean).all() and np.isfinite(target).all()):
            return float("inf")
        return float(np.linalg.norm(moment.mean - target))

    sequence = sequence_kl_gradient(process)
    cosine = 0.0
    if np.isfinite(moment.mean).all() and np.isfinite(sequence).all():
        size = float(np.linalg.norm(moment.mean) * np.linalg.norm(sequence))
        cosine = float((moment.mean * sequence).sum()) / size if size > 0 else 0.0
    prefix = prefix_kl_gradient(process)
    return Report(distance(sequence), distance(prefix), cosine, moment.trace_cov)


def bound_sizes(process: Process) -> tuple[float, float]:
    """(B_r in nats, B_s): the largest |r_t| and |s_t| over states and actions of positive mass."""
    seen: BoolArray = np.broadcast_to(process.student_probs > 0, process.log_ratio.shape)
    largest_cost = float(np.abs(process.log_ratio[seen]).max())
    norms = np.linalg.norm(process.score, axis=-1)
    return largest_cost, float(norms[process.student_probs > 0].max())


def second_moment_bound(process: Process, discount: float, causal: bool = True) -> float:
    """Upper bound of E |X|^2, from scores being martingale differences (proof: toy/README.md).

    Causal, gamma: B_r^2 B_s^2 T sum_{t=1..T} (1 + gamma^2 + ... + gamma^(2 t - 2)): T^2 at gamma 0,
    T^2 (T + 1) / 2 at gamma 1. Sequence-level, not causal: B_r^2 B_s^2 T^3.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount: expected gamma in [0, 1], got {discount}")
    largest_cost, largest_score = bound_sizes(process)
    steps = process.horizon
    if causal:
        growth = steps * float(np.cumsum(discount ** (2.0 * np.arange(steps))).sum())
    else:
        growth = float(steps) ** 3
    return largest_cost**2 * largest_score**2 * growth
