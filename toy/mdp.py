"""Tabular processes for the bias and variance study: a student, a teacher, and where actions lead.

A process has S states, A actions and a horizon of T steps. At step t the student draws an action
from a tabular softmax, pays the cost `log_ratio = student_logp - teacher_logp` (nats; arXiv:
2603.25562v2 section 3, r_t) and moves on. An action is a token, a rollout a completion; a state is
as much of the prefix as the two policies look at.

The student's parameters are its logits: one table for all steps (`[S, A]`, shared over time, as in
a language model) or one table a step (`[T, S, A]`). All arrays are float64, all logarithms natural.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MAX_ENUMERATED = 2_000_000  # rollouts; above this, enumeration is refused


def log_softmax(logits: Array) -> Array:
    """Log of the softmax over the last axis, [..., A] -> [..., A], nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def check_distribution(name: str, table: Array) -> None:
    """Raise ValueError unless every row of `table` (last axis) is a probability distribution."""
    if not np.all(np.isfinite(table)) or np.any(table < 0):
        raise ValueError(
            f"{name}: expected finite probabilities >= 0, got {table.min():.6g} as least"
        )
    worst = float(np.abs(table.sum(axis=-1) - 1.0).max())
    if worst > 1e-9:
        raise ValueError(f"{name}: rows must sum to 1, the worst is off by {worst:.3g}")


@dataclass(frozen=True)
class Process:
    """One student, one teacher, one environment.

    name            for tables and figures
    start           [S], probability of the first state
    transition      [S, A, S], probability of the next state given state and action
    student_logits  [S, A] shared over time, or [T, S, A] with parameters of their own at each step
    teacher_probs   [S, A] or [T, S, A]; zeros are allowed and make the reverse KL infinite
    horizon         T >= 1, the number of actions in a rollout

    Below, L is 1 when nothing depends on the step, else T; index such tables with `t % L`.
    Raises ValueError for wrong shapes, rows that do not sum to 1, or logits that are not finite.
    """

    name: str
    start: Array
    transition: Array
    student_logits: Array
    teacher_probs: Array
    horizon: int

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon: expected T >= 1, got {self.horizon}")
        for field in ("start", "transition", "student_logits", "teacher_probs"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=np.float64))
        if self.student_logits.ndim not in (2, 3):
            raise ValueError(
                "student_logits: expected [S, A] or [T, S, A], "
                f"got shape {list(self.student_logits.shape)}"
            )
        states, actions = self.student_logits.shape[-2:]
        if min(states, actions) < 1:
            raise ValueError(f"student_logits: empty support, {states} states, {actions} actions")
        per_step = (self.horizon, states, actions)
        allowed: dict[str, list[tuple[int, ...]]] = {
            "start": [(states,)],
            "transition": [(states, actions, states)],
            "student_logits": [(states, actions), per_step],
            "teacher_probs": [(states, actions), per_step],
        }
        for field, shapes in allowed.items():
            if getattr(self, field).shape not in shapes:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                got = list(getattr(self, field).shape)
                raise ValueError(f"{field}: expected shape {expected}, got {got}")
        if not np.all(np.isfinite(self.student_logits)):
            raise ValueError("student_logits: expected finite values")
        for field in ("start", "transition", "teacher_probs"):
            check_distribution(field, getattr(self, field))

    @property
    def num_states(self) -> int:
        """S."""
        return int(self.student_logits.shape[-2])

    @property
    def num_actions(self) -> int:
        """A."""
        return int(self.student_logits.shape[-1])

    @property
    def shared(self) -> bool:
        """True: one table of student parameters for all steps. False: one a step."""
        return self.student_logits.ndim == 2

    @cached_property
    def student_logp(self) -> Array:
        """[L, S, A], nats, finite."""
        logp = log_softmax(self.student_logits)
        return logp[None] if self.shared else logp

    @cached_property
    def student_probs(self) -> Array:
        """[L, S, A], > 0 up to underflow."""
        return np.exp(self.student_logp)

    @cached_property
    def teacher_logp(self) -> Array:
        """[L, S, A], nats, -inf where the teacher has no mass."""
        with np.errstate(divide="ignore"):
            logp = np.log(self.teacher_probs)
        return logp[None] if logp.ndim == 2 else logp

    @cached_property
    def log_ratio(self) -> Array:
        """[L, S, A], nats, the cost r_t of arXiv:2603.25562v2; +inf where the teacher has none."""
        return self.student_logp - self.teacher_logp

    @cached_property
    def score(self) -> Array:
        """[L, S, A, A]: score[l, s, a, b] = d student_logp(a | s) / d logit(s, b) = [a = b] - p_b.

        Logits of other states have derivative zero, so one row of A numbers is the whole score s_t.
        """
        return np.eye(self.num_actions) - self.student_probs[:, :, None, :]

    def with_horizon(self, horizon: int) -> Process:
        """The same process for another number of steps; only if no table depends on the step."""
        if self.student_logits.ndim == 3 or self.teacher_probs.ndim == 3:
            raise ValueError("with_horizon: the tables of this process depend on the step")
        return replace(self, horizon=horizon)

    def untied(self) -> Process:
        """The same policies, with student parameters of their own at each step."""
        if not self.shared:
            return self
        logits = np.broadcast_to(self.student_logits, (self.horizon, *self.student_logits.shape))
        return replace(self, student_logits=logits.copy())


@dataclass(frozen=True)
class Rollouts:
    """N sampled or enumerated rollouts: states and actions, each [N, T] int64."""

    states: IntArray
    actions: IntArray

    def __len__(self) -> int:
        return len(self.states)


def _draw(cumulative: Array, rng: np.random.Generator) -> IntArray:
    """One index a row by the inverse of the cumulative distribution, [N, M] -> [N]."""
    uniform = rng.random((len(cumulative), 1))
    # the last bound is 1 up to rounding: leaving it out keeps the index in range
    index: IntArray = (uniform >= cumulative[:, :-1]).sum(axis=1, dtype=np.int64)
    return index


def sample(process: Process, num_rollouts: int, rng: np.random.Generator) -> Rollouts:
    """Draw `num_rollouts` >= 1 rollouts of the student. Time O(N T (S + A)), memory O(N T)."""
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts: expected >= 1, got {num_rollouts}")
    first, then = process.start.cumsum(), process.transition.cumsum(axis=-1)
    policy = process.student_probs.cumsum(axis=-1)
    states = np.empty((num_rollouts, process.horizon), dtype=np.int64)
    actions = np.empty_like(states)
    state = _draw(np.broadcast_to(first, (num_rollouts, len(first))), rng)
    for t in range(process.horizon):
        states[:, t] = state
        actions[:, t] = _draw(policy[t % len(policy), state], rng)
        state = _draw(then[state, actions[:, t]], rng)
    return Rollouts(states, actions)


def enumerate_rollouts(process: Process) -> tuple[Rollouts, Array]:
    """Every rollout of positive probability, with its probability [N] under the student.

    For small cases only: raises ValueError above MAX_ENUMERATED rollouts.
    """
    states = np.flatnonzero(process.start)[:, None].astype(np.int64)
    actions = np.empty((len(states), 0), dtype=np.int64)
    weight = process.start[states[:, 0]]
    for t in range(process.horizon):
        policy = process.student_probs[t % len(process.student_probs)]
        if len(states) * process.num_actions > MAX_ENUMERATED:
            raise ValueError(f"enumerate_rollouts: more than {MAX_ENUMERATED} rollouts")
        rows, action = np.nonzero(policy[states[:, t]] > 0)
        states, actions, weight = states[rows], actions[rows], weight[rows]
        weight = weight * policy[states[:, t], action]
        actions = np.column_stack([actions, action])
        if t + 1 < process.horizon:
            rows, state = np.nonzero(process.transition[states[:, t], action] > 0)
            if len(rows) > MAX_ENUMERATED:
                raise ValueError(f"enumerate_rollouts: more than {MAX_ENUMERATED} rollouts")
            weight = weight[rows] * process.transition[states[rows, t], action[rows], state]
            states, actions = np.column_stack([states[rows], state]), actions[rows]
    return Rollouts(states, actions), weight


# ---- Builders: teacher logits are normal, the student's are the teacher's plus a normal gap -----


def _policies(num_states: int, num_actions: int, gap: float, seed: int) -> dict[str, Array]:
    """Student logits and teacher probabilities, both [S, A]; `gap` >= 0 is a standard deviation."""
    if min(num_states, num_actions) < 1:
        raise ValueError(f"empty support: {num_states} states, {num_actions} actions")
    rng = np.random.default_rng(seed)
    teacher_logits = rng.normal(size=(num_states, num_actions))
    student_logits = teacher_logits + gap * rng.normal(size=(num_states, num_actions))
    return {"student_logits": student_logits, "teacher_probs": np.exp(log_softmax(teacher_logits))}


def correlated(
    horizon: int,
    num_states: int = 16,
    num_actions: int = 4,
    stay: float = 0.5,
    gap: float = 1.0,
    seed: int = 0,
    name: str = "correlated",
) -> Process:
    """The state stays with probability `stay` in [0, 1], else is drawn anew: actions do nothing."""
    if not 0.0 <= stay <= 1.0:
        raise ValueError(f"stay: expected a probability in [0, 1], got {stay}")
    start = np.full(num_states, 1.0 / max(num_states, 1))
    policies: dict[str, Any] = _policies(num_states, num_actions, gap, seed)
    move = stay * np.eye(num_states) + (1.0 - stay) * start
    transition = np.repeat(move[:, None, :], num_actions, axis=1)
    return Process(name, start, transition, horizon=horizon, **policies)


def independent(horizon: int, **options: Any) -> Process:
    """Independent steps: a fresh state each step. Options as for `correlated`."""
    return correlated(horizon, stay=0.0, name="independent", **options)


def persistent(horizon: int, **options: Any) -> Process:
    """The start decides the regime of the whole rollout, as a prompt or a topic does."""
    return correlated(horizon, stay=1.0, name="persistent", **options)


def random_mdp(
    horizon: int,
    num_states: int = 8,
    num_actions: int = 16,
    gap: float = 1.0,
    concentration: float = 0.1,
    seed: int = 0,
) -> Process:
    """Actions choose where to go: each next-state row is Dirichlet(`concentration` > 0)."""
    if not concentration > 0:
        raise ValueError(f"concentration: expected > 0, got {concentration}")
    policies: dict[str, Any] = _policies(num_states, num_actions, gap, seed)
    rng = np.random.default_rng([seed, 1])
    weight = rng.standard_gamma(concentration, size=(num_states, num_actions, num_states)) + 1e-12
    transition = weight / weight.sum(axis=-1, keepdims=True)
    start = np.full(num_states, 1.0 / num_states)
    return Process("random MDP", start, transition, horizon=horizon, **policies)


def prefix_chain(horizon: int, vocabulary: int = 3, gap: float = 1.0, seed: int = 0) -> Process:
    """An autoregressive chain: the state is the prefix, so there are sum_{t<T} V^t states."""
    if horizon < 1 or vocabulary < 1:
        raise ValueError(f"horizon, vocabulary: expected >= 1, got {horizon}, {vocabulary}")
    num_states = sum(vocabulary**t for t in range(horizon))
    if num_states > 1_000:
        raise ValueError(f"prefix_chain: {num_states} prefixes; it is meant for small cases")
    policies: dict[str, Any] = _policies(num_states, vocabulary, gap, seed)
    transition = np.zeros((num_states, vocabulary, num_states))
    for state in range(num_states):
        for token in range(vocabulary):
            child = state * vocabulary + token + 1  # breadth-first numbering of prefixes
            transition[state, token, child if child < num_states else 0] = 1.0
    start = np.eye(num_states)[0]
    return Process("prefix chain", start, transition, horizon=horizon, **policies)


def trap(horizon: int, teacher_pull: float = 0.7, teacher_refusal: float = 1e-3) -> Process:
    """Where the token-level gradient points the wrong way (three states, two actions).

    At the fork (state 0) the student is undecided; the teacher takes action 0 with probability
    `teacher_pull`. Action 0 leads, for the rest of the rollout, to state 1, where the student is
    almost sure of an action that the teacher takes with probability `teacher_refusal` only; action
    1 leads to state 2, where the two agree. The step-wise gradient at the fork follows the teacher
    into the costly state, the gradient of the sequence KL leaves it. In state 1 the student is so
    sure of itself that its own gradient is too small to help: a large KL with a small slope.
    """
    for name, value in (("teacher_pull", teacher_pull), ("teacher_refusal", teacher_refusal)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: expected a probability in (0, 1), got {value}")
    student_logits = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    teacher_probs = np.array(
        [
            [teacher_pull, 1.0 - teacher_pull],
            [teacher_refusal, 1.0 - teacher_refusal],
            [0.5, 0.5],
        ]
    )
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1, :, 1] = transition[2, :, 2] = 1.0
    return Process("trap", np.eye(3)[0], transition, student_logits, teacher_probs, horizon)
