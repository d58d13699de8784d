"""Gradient estimators of on-policy distillation: rollouts in, one gradient a rollout out.

All but one are additive. With the score s_t and a cost r_t (nats), they are

    X = sum_t [ local(state_t, action_t) + gamma * G_{t+1} * s_t ],    G_t = r_t + gamma * G_{t+1},

so an estimator is two tables and a discount: `local`, the part of the gradient known at step t, and
`cost`, what is handed back to earlier steps. `exact.py` needs no more than this for its moments.

Source of the equations: arXiv:2603.25562v2 (rollout estimators section 3, top-K Eq. (7)-(8)).
Gradients are of a cost: descend along them. L is 1 when no table depends on the step, else T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from toy.mdp import Array, BoolArray, Process, Rollouts

Outside = Literal["renormalise", "bucket", "score", "score_without_one", "drop"]


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator of the reverse KL, as tables over (step, state, action).

    name       for tables and figures
    discount   gamma in [0, 1]: how much of the future cost multiplies the score of a step
    cost       [L, S, A], nats; the r_t in the return G_t
    local      [L, S, A, A]; row of the logits of the visited state, gradient known at this step
    causal     False only for the sequence-level form (sum_t r_t)(sum_t s_t), which is not additive;
               it uses `cost` alone
    Entries are +inf where the cost is infinite (a gradient of infinite size, without direction).
    """

    name: str
    discount: float
    cost: Array
    local: Array
    causal: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount: expected gamma in [0, 1], got {self.discount}")
        for name, table in (("cost", self.cost), ("local", self.local)):
            if np.isnan(table).any():
                raise ValueError(f"{name}: {self.name} has NaN entries")


def _times_score(process: Process, weight: Array) -> Array:
    """weight [L, S, A] times the score -> [L, S, A, A]; +inf where the weight is infinite."""
    finite = np.isfinite(weight)[..., None]
    product = np.where(finite, weight[..., None], 0.0) * process.score
    return np.where(finite, product, np.inf)


# ---- Sampled tokens ------------------------------------------------------------------------------


def discounted(
    process: Process,
    discount: float,
    *,
    baseline: Array | None = None,
    clip: float | None = None,
    keep_mask: BoolArray | None = None,
    name: str | None = None,
) -> Estimator:
    """g_gamma = sum_t (sum_{t'>=t} gamma^(t'-t) r_t') s_t, arXiv:2603.25562v2 section 3.

    discount   gamma in [0, 1]; 0 is token-level, 1 is causal sequence-level
    baseline   [S] or [T, S], nats; b_t(s) subtracted from the return, changes no expectation
    clip       c > 0, nats; r_t is clamped to [-c, c] (changes the expectation)
    keep_mask  [S, A]; False drops an action's own term and its share of earlier returns
    Raises ValueError outside these ranges, or for a mask that keeps nothing.
    """
    cost = process.log_ratio
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip: expected a bound > 0 nats, got {clip}")
        cost = np.clip(cost, -clip, clip)
    weight = cost
    if baseline is not None:
        table = np.asarray(baseline, dtype=np.float64)
        if table.shape not in ((process.num_states,), (process.horizon, process.num_states)):
            raise ValueError(f"baseline: expected shape [S] or [T, S], got {list(table.shape)}")
        if not np.all(np.isfinite(table)):
            raise ValueError("baseline: expected finite values")
        weight = cost - np.atleast_2d(table)[:, :, None]
    if keep_mask is not None:
        if keep_mask.shape != cost.shape[1:]:
            raise ValueError(f"keep_mask: expected shape [S, A], got {list(keep_mask.shape)}")
        if not keep_mask.any():
            raise ValueError("keep_mask: empty support, it keeps no action in any state")
        cost, weight = np.where(keep_mask, cost, 0.0), np.where(keep_mask, weight, 0.0)
    label = name if name is not None else f"gamma {discount:g}"
    return Estimator(label, discount, cost, _times_score(process, weight))


def token_level(process: Process) -> Estimator:
    """g_tok = sum_t r_t s_t, arXiv:2603.25562v2 section 3: each token answers for itself only."""
    return discounted(process, 0.0, name="token-level")


def causal_sequence_level(process: Process) -> Estimator:
    """sum_t (sum_{t'>=t} r_t') s_t, arXiv:2603.25562v2 section 3: unbiased for the sequence KL."""
    return discounted(process, 1.0, name="causal sequence-level")


def sequence_level(process: Process) -> Estimator:
    """g_seq = (sum_t r_t)(sum_t s_t), arXiv:2603.25562v2 section 3: unbiased, and noisier."""
    cost = process.log_ratio
    return Estimator("sequence-level", 1.0, cost, _times_score(process, cost), causal=False)


# ---- More than the sampled token of each step ----------------------------------------------------


def _expect(probs: Array, values: Array) -> Array:
    """Sum over the last axis of probs * values, with 0 * inf = 0; +inf stays +inf."""
    terms = np.where(probs > 0, probs, 0.0) * np.where(probs > 0, values, 0.0)
    result: Array = terms.sum(axis=-1)
    return result


def _kl_gradient(probs: Array, log_ratio: Array) -> Array:
    """Gradient of KL(student || teacher) in the logits, p_v (log_ratio_v - KL), [L, S, A].

    All entries of a row are +inf where that KL is infinite.
    """
    value = _expect(probs, log_ratio)[..., None]
    finite = np.isfinite(value)
    safe = np.where(finite & np.isfinite(log_ratio), log_ratio, 0.0)
    gradient: Array = np.where(finite, probs * (safe - np.where(finite, value, 0.0)), np.inf)
    return gradient


def _every_action(row: Array) -> Array:
    """A gradient [L, S, A] that does not depend on the sampled action, as [L, S, A, A]."""
    length, states, actions = row.shape
    return np.broadcast_to(row[:, :, None, :], (length, states, actions, actions))


def full_vocabulary(process: Process, discount: float = 0.0) -> Estimator:
    """sum_t grad KL_t over the full vocabulary; with gamma > 0, plus discounted future KLs.

    Each r_t of `discounted` is replaced by its expectation given the state, KL_t, so the
    expectation is that of `discounted` at the same gamma: gamma = 0 is the full-vocabulary loss of
    arXiv:2306.13649 with reverse KL, gamma = 1 the decomposition of arXiv:2306.08543.
    """
    value = _expect(process.student_probs, process.log_ratio)  # KL_t, [L, S]
    cost = np.repeat(value[:, :, None], process.num_actions, axis=2)
    local = _every_action(_kl_gradient(process.student_probs, process.log_ratio))
    return Estimator(f"full, gamma {discount:g}", discount, cost, local)


def teacher_support(process: Process, k: int) -> BoolArray:
    """The teacher's K most likely actions in each state, [L, S, A]; ties to the lowest index."""
    if not 1 <= k <= process.num_actions:
        raise ValueError(f"k: expected 1 <= K <= A = {process.num_actions}, got {k}")
    order = np.argsort(-process.teacher_logp, axis=-1, kind="stable")
    support = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(support, order[..., :k], True, axis=-1)
    return np.broadcast_to(support, process.log_ratio.shape)


def _log_sum(logp: Array, mask: BoolArray) -> Array:
    """Log of the mass on `mask` (never empty) along the last axis, [L, S, 1]; -inf for no mass."""
    inside = np.where(mask, logp, -np.inf)
    largest = inside.max(axis=-1, keepdims=True)  # shifted: tiny masses do not underflow
    largest = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        result: Array = largest + np.log(np.exp(inside - largest).sum(axis=-1, keepdims=True))
    return result


def top_k(process: Process, k: int, outside: Outside = "renormalise") -> Estimator:
    """A KL on the teacher's top K actions, 1 <= K <= A; `outside` says what becomes of the rest.

    renormalise        both policies renormalised on the support, arXiv:2603.25562v2 Eq. (7)-(8)
    bucket             the rest is one more symbol
    score              sum over the support + [y outside] (log_ratio + 1) s_t: unbiased
    score_without_one  the same without the + 1, whose expectation adds the gradient of the
                       student's mass on the support
    drop               sum over the support only, not renormalised
    """
    if outside not in get_args(Outside):
        raise ValueError(f"outside: expected one of {get_args(Outside)}, got {outside!r}")
    support = teacher_support(process, k)
    student_logp = process.student_logp
    teacher_logp = np.broadcast_to(process.teacher_logp, process.log_ratio.shape)
    probs, log_ratio = process.student_probs, process.log_ratio
    if outside == "renormalise":
        inside = student_logp - _log_sum(student_logp, support)
        log_ratio = inside - (teacher_logp - _log_sum(teacher_logp, support))
        probs = np.exp(np.where(support, inside, -np.inf))
        local = _every_action(_kl_gradient(probs, log_ratio))
    elif outside == "bucket":
        if k < process.num_actions:
            bucket = _log_sum(student_logp, ~support) - _log_sum(teacher_logp, ~support)
            log_ratio = np.where(support, log_ratio, bucket)
        local = _every_action(_kl_gradient(probs, log_ratio))
    else:  # the head sum_{v in support} p_v log_ratio_v, differentiated also through p_v
        head = _expect(probs * support, log_ratio + 1.0)[..., None]
        finite = np.isfinite(head)
        safe = np.where(support & np.isfinite(log_ratio), log_ratio + 1.0, 0.0)
        row = np.where(finite, probs * (safe - np.where(finite, head, 0.0)), np.inf)
        local = _every_action(row)
        if outside != "drop":
            one = 1.0 if outside == "score" else 0.0
            local = local + _times_score(process, np.where(support, 0.0, log_ratio + one))
    no_future = np.zeros(process.log_ratio.shape)
    return Estimator(f"top-{k} {outside}", 0.0, no_future, local)


# ---- On rollouts ---------------------------------------------------------------------------------


def rollout_gradients(process: Process, rollouts: Rollouts, estimator: Estimator) -> Array:
    """The estimator on each rollout: [N, S, A] for shared parameters, else [N, T, S, A].

    Average over N for the estimate. Time O(N T A), memory that of the result. Rollouts that meet an
    infinite cost get +inf in every entry, never NaN.
    """
    states, actions = rollouts.states, rollouts.actions
    if states.shape != actions.shape or states.ndim != 2 or states.shape[1] != process.horizon:
        raise ValueError(
            f"rollouts: expected [N, T = {process.horizon}], "
            f"got states {list(states.shape)} and actions {list(actions.shape)}"
        )
    num, horizon = states.shape
    blocks = 1 if process.shared else horizon
    gradient = np.zeros((num, blocks, process.num_states, process.num_actions))
    infinite = np.zeros(num, dtype=np.bool_)
    each = np.arange(num)
    future = np.zeros(num)  # G_{t+1}
    score_sum = np.zeros_like(gradient)  # sum_t s_t, for the form that is not causal
    for t in range(horizon - 1, -1, -1):
        state, action = states[:, t], actions[:, t]
        score = process.score[t % len(process.score), state, action]  # [N, A]
        local = estimator.local[t % len(estimator.local), state, action]
        cost = estimator.cost[t % len(estimator.cost), state, action]
        met = ~np.isfinite(local).all(axis=-1)
        if estimator.discount > 0 and t > 0:  # the first cost reaches no earlier step
            met |= ~np.isfinite(cost)
        infinite |= met
        local = np.where(met[:, None], 0.0, local)
        block = t % blocks
        gradient[each, block, state] += local + estimator.discount * future[:, None] * score
        score_sum[each, block, state] += score
        future = np.where(np.isfinite(cost), cost, 0.0) + estimator.discount * future
    if not estimator.causal:
        gradient = future[:, None, None, None] * score_sum
    gradient[infinite] = np.inf
    return gradient[:, 0] if process.shared else gradient
