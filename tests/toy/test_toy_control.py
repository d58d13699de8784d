"""The control task of toy/control.py: the batched program is the study that it says it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from toy import control
from toy.control import Settings
from toy.study import RESULTS
from toy.tables import read_csv

TINY = Settings(iterations=4, teacher_iterations=3, horizon=5, hidden=6, batch=8, micro_batches=4)


def test_the_network_has_about_four_thousand_parameters() -> None:
    params = control.init_params([1], Settings().hidden)
    assert sum(p[0].numel() for p in params) == 4_022


def test_log_prob_is_the_normal_density() -> None:
    mean, log_std, action = torch.randn(3, 50, dtype=torch.float64).unbind(0)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action)
    torch.testing.assert_close(control.log_prob(action, mean, log_std), expected)


def test_returns_are_discounted_sums_of_the_future() -> None:
    cost = torch.randn(2, 3, 6, dtype=torch.float64)
    discount = torch.tensor([0.0, 0.7], dtype=torch.float64)
    got = control.returns(cost, discount)
    for run, gamma in enumerate(discount.tolist()):
        for t in range(6):
            expected = sum(gamma ** (u - t) * cost[run, :, u] for u in range(t, 6))
            torch.testing.assert_close(got[run, :, t], expected)


def test_sampled_actions_follow_the_stated_policy() -> None:
    """Actions undo to the noise that made them, and positions are their running sum."""
    params = control.init_params([3, 4], TINY.hidden)
    task = torch.tensor([0, 1])
    noise = torch.randn(2, 8, 5, dtype=torch.float64)
    positions, actions = control.sample(params, task, noise, TINY)
    assert positions[:, :, 0].unique(dim=1).squeeze().tolist() == [2.0, -2.0]
    torch.testing.assert_close(positions[:, :, 1:], positions[:, :, :1] + actions.cumsum(-1))
    _, _, raw = control.scored(params, task, positions, actions, TINY)
    mean, log_std = control.mean_and_log_std(raw.view(2, 8, 5, 2), TINY)
    torch.testing.assert_close((actions - mean) / log_std.exp(), noise)


def test_a_batch_of_runs_is_each_run_alone() -> None:
    settings = replace(TINY, discounts=(0.0, 0.5, 1.0), seeds=(42, 43))
    teachers = control.train_teachers(settings, progress=False)
    together = control.distil(settings, teachers, progress=False)
    for i, (gamma, seed) in enumerate(together.runs):
        single = replace(settings, discounts=(gamma,), seeds=(seed,))
        own = control.train_teachers(single, progress=False)
        alone = control.distil(single, own, progress=False)
        torch.testing.assert_close(together.variance[:, i], alone.variance[:, 0])
        for a, b in zip(together.params, alone.params):
            torch.testing.assert_close(a[i], b[0])


def test_the_proxy_is_the_variance_of_micro_batch_gradients() -> None:
    """1/M sum_m |g_m - mean|^2 with every g_m by its own backward pass."""
    torch.manual_seed(0)
    params = control.init_params([5, 6], TINY.hidden)
    task = torch.tensor([0, 1])
    positions, actions = control.sample(params, task, torch.randn(2, 8, 5).double(), TINY)
    weight = torch.randn(2, 8, 5, dtype=torch.float64)
    leaves = [p.requires_grad_() for p in params]
    logp, hidden, raw = control.scored(leaves, task, positions, actions, TINY)
    (raw_gradient,) = torch.autograd.grad((weight * logp).sum() / 8, raw)
    got = control.output_layer_variance(hidden.detach(), raw_gradient.view(2, 8, 5, 2), 4)
    for run in range(2):
        gradients = []
        for m in range(4):
            rows = slice(2 * m, 2 * m + 2)
            logp, _, _ = control.scored(leaves, task, positions[:, rows], actions[:, rows], TINY)
            loss = (weight[run, rows] * logp[run]).sum() / 2
            both = torch.autograd.grad(loss, leaves[4:])  # the output layer: weight and bias
            gradients.append(torch.cat([g[run].flatten() for g in both]))
        stacked = torch.stack(gradients)
        expected = ((stacked - stacked.mean(0)) ** 2).sum(1).mean()
        torch.testing.assert_close(got[run], expected)


def test_a_run_that_is_not_finite_stops_and_leaves_the_others_alone() -> None:
    params = control.init_params([1, 2], 4)
    before = [p.clone() for p in params]
    optimiser = control.Optimiser(params, 0.1, "adam")
    gradients = [torch.ones_like(p) for p in params]
    gradients[2][0] = math.nan
    optimiser.step(gradients)
    assert optimiser.alive.tolist() == [False, True]
    for old, new in zip(before, params):
        assert torch.equal(old[0], new[0])
        torch.testing.assert_close(new[1], old[1] - 0.1, atol=1e-6, rtol=0)


def test_adam_is_torch_adam() -> None:
    params = control.init_params([1], 4)
    copies = [p.clone().requires_grad_() for p in params]
    ours = control.Optimiser(params, 1e-2, "adam")
    theirs = torch.optim.Adam(copies, lr=1e-2)
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in params]
        ours.step(gradients)
        for copy, gradient in zip(copies, gradients):
            copy.grad = gradient.clone()
        theirs.step()
    for p, copy in zip(params, copies):
        torch.testing.assert_close(p, copy.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": 7}, "micro_batches: expected a divisor of batch = 64, got 7"),
        ({"discounts": (1.5,)}, "gamma in [0, 1], got 1.5"),
        ({"seeds": ()}, "expected at least one"),
        ({"horizon": 0}, "horizon: expected >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected > 0"),
        ({"std_floor": -0.1}, "std_floor: expected >= 0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Settings(**change)
    assert message in str(error.value)


@pytest.mark.slow
def test_the_committed_curves_start_as_the_program_starts() -> None:
    """Real teachers of one seed, three student iterations: to 0.3 of log10, as rounding grows."""
    settings = replace(Settings(), iterations=3, seeds=(42,))
    result = control.distil(settings, control.train_teachers(settings, progress=False), False)
    committed = read_csv(RESULTS / "control_curves.csv")
    for step in range(3):
        for i, (gamma, seed) in enumerate(result.runs):
            expected = committed[step][f"log10_variance gamma {gamma:g} seed {seed}"]
            assert float(result.variance[step, i].log10()) == pytest.approx(expected, abs=0.3)


def runs_of(seed: int) -> dict[float, dict[str, Any]]:
    rows = read_csv(RESULTS / "control_runs.csv")
    return {row["gamma"]: row for row in rows if row["seed"] == seed}


def test_all_fifteen_runs_are_committed() -> None:
    rows = read_csv(RESULTS / "control_runs.csv")
    assert {(r["gamma"], r["seed"]) for r in rows} == {
        (g, s) for g in Settings().discounts for s in Settings().seeds
    }
    assert all(np.isfinite(r["log10_variance_max"]) for r in rows)
