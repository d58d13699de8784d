"""The two-task control study of arXiv:2603.25562v2, appendix E, as one batched tensor program.

A point on a line moves by a Gaussian step, position' = position + action, action ~ N(mean, std).
The left task goes from +2 to -3, the right task from -2 to +3. A three-layer network maps
(task, position, time) to the mean and the std. Teachers, one a task, are trained with REINFORCE;
then one student learns both tasks on-policy from its teachers, left on odd and right on even
iterations, from the cost r_t = student_logp - teacher_logp (nats) of its own actions.

Reported is the paper's proxy: a batch of B trajectories in M micro-batches, Var = 1/M sum_m
|g_m - mean g|^2 over the gradients of the output layer.

R runs (discounts times seeds) share every tensor: parameters are [R, in, out], batches
[R, B, T, ...]. Runs of one seed share initial parameters, teachers and noise. All float64.
What the paper does not give is in `Settings`, each with its reason in toy/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

START = (2.0, -2.0)  # by task: left, right
TARGET = (-3.0, 3.0)
TASK_INPUT = (-1.0, 1.0)
POSITION_SCALE = 3.0  # the network sees position / 3
LOG_2PI_HALF = 0.9189385332046727

Params = list[Tensor]  # three weights [R, in, out], each followed by its bias [R, 1, out]


@dataclass(frozen=True)
class Settings:
    """One configuration; the first block is the paper's, the second is chosen here."""

    iterations: int = 2_000
    batch: int = 64  # B, trajectories an iteration
    micro_batches: int = 8  # M
    discounts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: tuple[int, ...] = (42, 43, 2026)

    horizon: int = 20
    hidden: int = 60  # 3-60-60-2: 4,022 parameters
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    std: Literal["exp", "softplus"] = "exp"
    std_floor: float = 0.01  # added to the std, of students and teachers
    reward: Literal["absolute", "squared"] = "absolute"
    teacher_iterations: int = 400
    teacher_learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "micro_batches", "horizon", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.batch % self.micro_batches:
            raise ValueError(
                f"micro_batches: expected a divisor of batch = {self.batch}, "
                f"got {self.micro_batches}"
            )
        if not self.discounts or not self.seeds:
            raise ValueError("discounts, seeds: expected at least one of each")
        for gamma in self.discounts:
            if not 0.0 <= gamma <= 1.0:
                raise ValueError(f"discounts: expected gamma in [0, 1], got {gamma}")
        if not (self.learning_rate > 0 and self.teacher_learning_rate > 0):
            raise ValueError("learning_rate: expected > 0")
        if not self.std_floor >= 0:
            raise ValueError(f"std_floor: expected >= 0, got {self.std_floor}")


# ---- Policy --------------------------------------------------------------------------------------


def init_params(seeds: list[int], hidden: int) -> Params:
    """Uniform in +-1/sqrt(fan in), one generator a run: the same seed gives the same network."""
    runs = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        run = []
        for fan_in, fan_out in ((3, hidden), (hidden, hidden), (hidden, 2)):
            for rows in (fan_in, 1):
                uniform = torch.rand(rows, fan_out, generator=rng, dtype=torch.float64)
                run.append((2 * uniform - 1) / fan_in**0.5)
        runs.append(run)
    return [torch.stack(tensors) for tensors in zip(*runs)]


def features(task: Tensor, position: Tensor, time: Tensor) -> Tensor:
    """task, time (broadcast) and position [R, N] -> [R, N, 3]; task -1 or +1, time in [0, 1)."""
    zero = torch.zeros_like(position)
    return torch.stack([task + zero, position / POSITION_SCALE, time + zero], dim=-1)


def forward(params: Params, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """inputs [R, N, 3] -> (last hidden layer [R, N, H], raw output [R, N, 2])."""
    w1, b1, w2, b2, w3, b3 = params
    hidden = torch.tanh(torch.baddbmm(b1, inputs, w1))
    hidden = torch.tanh(torch.baddbmm(b2, hidden, w2))
    return hidden, torch.baddbmm(b3, hidden, w3)


def mean_and_log_std(raw: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Raw output [..., 2] -> mean and log of the std, [...] each; a floor and no ceiling."""
    mean, scale = raw.unbind(-1)
    std = torch.exp(scale) if settings.std == "exp" else torch.nn.functional.softplus(scale)
    return mean, torch.log(std + settings.std_floor)


def action_logp(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of N(mean, std) at action, nats."""
    return -0.5 * ((action - mean) * torch.exp(-log_std)) ** 2 - log_std - LOG_2PI_HALF


@torch.no_grad()
def sample(
    params: Params, task: Tensor, noise: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Roll out. task [R] in {0, 1}, noise [R, B, T] -> positions [R, B, T + 1], actions."""
    runs, batch, horizon = noise.shape
    start, code = torch.tensor(START).double()[task], torch.tensor(TASK_INPUT).double()[task]
    positions = [start[:, None].expand(runs, batch)]
    actions = []
    for t in range(horizon):
        time = torch.tensor(t / horizon, dtype=torch.float64)
        _, raw = forward(params, features(code[:, None], positions[-1], time))
        mean, log_std = mean_and_log_std(raw, settings)
        actions.append(mean + torch.exp(log_std) * noise[:, :, t])
        positions.append(positions[-1] + actions[-1])
    return torch.stack(positions, dim=-1), torch.stack(actions, dim=-1)


def scored(
    params: Params, task: Tensor, positions: Tensor, actions: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the actions [R, B, T], with the hidden layer and raw output of each step."""
    runs, batch, horizon = actions.shape
    code = torch.tensor(TASK_INPUT).double()[task]
    time = torch.arange(horizon, dtype=torch.float64) / horizon
    inputs = features(code[:, None, None], positions[:, :, :-1], time)
    hidden, raw = forward(params, inputs.reshape(runs, batch * horizon, 3))
    mean, log_std = mean_and_log_std(raw.view(runs, batch, horizon, 2), settings)
    return action_logp(actions, mean, log_std), hidden.view(runs, batch, horizon, -1), raw


def returns(cost: Tensor, discount: Tensor) -> Tensor:
    """G_t = r_t + gamma G_{t+1} along the last axis; cost [R, B, T], discount [R]."""
    result = torch.empty_like(cost)
    future = torch.zeros_like(cost[..., 0])
    for t in range(cost.shape[-1] - 1, -1, -1):
        future = cost[..., t] + discount[:, None] * future
        result[..., t] = future
    return result


# ---- Optimiser -----------------------------------------------------------------------------------


class Optimiser:
    """Adam (0.9, 0.999, 1e-8) or plain gradient descent, elementwise, so runs do not mix.

    A run whose gradient is not finite is left as it is from then on: `alive` [R] says which go on.
    """

    def __init__(self, params: Params, learning_rate: float, kind: str) -> None:
        self.params, self.learning_rate, self.kind, self.step_count = params, learning_rate, kind, 0
        self.first = [torch.zeros_like(tensor) for tensor in params]
        self.second = [torch.zeros_like(tensor) for tensor in params]
        self.alive = torch.ones(len(params[0]), dtype=torch.bool)

    def step(self, gradients: list[Tensor]) -> None:
        """One update, in place, of the runs that are alive."""
        self.step_count += 1
        for gradient in gradients:
            self.alive &= torch.isfinite(gradient).flatten(1).all(dim=1)
        on = self.alive[:, None, None]
        correction_1 = 1 - 0.9**self.step_count
        correction_2 = 1 - 0.999**self.step_count
        with torch.no_grad():
            for tensor, g, m, v in zip(self.params, gradients, self.first, self.second):
                update = g
                if self.kind == "adam":
                    m.mul_(0.9).add_(g, alpha=0.1)
                    v.mul_(0.999).addcmul_(g, g, value=0.001)
                    update = (m / correction_1) / ((v / correction_2).sqrt() + 1e-8)
                tensor.sub_(torch.where(on, self.learning_rate * update, 0.0))


# ---- Training ------------------------------------------------------------------------------------


def _noise(generators: list[torch.Generator], batch: int, horizon: int) -> Tensor:
    """Standard normal noise, one generator a seed, [seeds, B, T]."""
    draws = [torch.randn(batch, horizon, generator=rng, dtype=torch.float64) for rng in generators]
    return torch.stack(draws)


def train_teachers(settings: Settings, progress: bool = True) -> Params:
    """REINFORCE on reward-to-go, a teacher a (task, seed): parameters [2 * seeds, ...], left first.

    Reward of a step: minus the distance to the target after it (or its square). Advantage: return
    minus the batch mean of the same step, divided by the batch standard deviation of the run.
    """
    seeds = list(settings.seeds)
    params = init_params(
        [1_000 * (task + 1) + seed for task in (0, 1) for seed in seeds], settings.hidden
    )
    task = torch.tensor([0] * len(seeds) + [1] * len(seeds))
    target = torch.tensor(TARGET).double()[task]
    generators = [
        torch.Generator().manual_seed(7_000 * (task_id + 1) + seed)
        for task_id in (0, 1)
        for seed in seeds
    ]
    optimiser = Optimiser(params, settings.teacher_learning_rate, "adam")
    one = torch.ones(len(params[0]), dtype=torch.float64)
    steps = range(settings.teacher_iterations)
    for _ in tqdm(steps, desc="teachers", disable=not progress, mininterval=1.0):
        noise = _noise(generators, settings.batch, settings.horizon)
        positions, actions = sample(params, task, noise, settings)
        distance = (positions[:, :, 1:] - target[:, None, None]).abs()
        reward = -(distance if settings.reward == "absolute" else distance**2)
        future = returns(reward, one)
        advantage = future - future.mean(dim=1, keepdim=True)
        advantage = advantage / (advantage.flatten(1).std(dim=1)[:, None, None] + 1e-8)
        leaves = [tensor.requires_grad_() for tensor in params]
        student_logp, _, _ = scored(leaves, task, positions, actions, settings)
        loss = -(advantage * student_logp).sum() / settings.batch
        gradients = torch.autograd.grad(loss, leaves)
        for tensor in params:
            tensor.requires_grad_(False)
        optimiser.step(list(gradients))
    if not optimiser.alive.all():
        raise RuntimeError(
            "train_teachers: a teacher's gradient is not finite; lower its step size"
        )
    return params


def output_layer_variance(hidden: Tensor, raw_gradient: Tensor, micro_batches: int) -> Tensor:
    """The paper's proxy, 1/M sum_m |g_m - mean g|^2, [R].

    hidden [R, B, T, H] and the gradient of the mean loss in the raw output [R, B, T, 2] give the
    gradient of the output layer (weights and biases) of each micro-batch of B / M trajectories.
    """
    runs, batch, horizon, width = hidden.shape
    shape = (runs, micro_batches, batch // micro_batches * horizon)
    raw_gradient = raw_gradient.reshape(*shape, 2) * micro_batches  # mean over B/M, not over B
    weights = hidden.reshape(*shape, width).transpose(-1, -2) @ raw_gradient
    each = torch.cat([weights, raw_gradient.sum(dim=2, keepdim=True)], dim=2).flatten(2)
    return ((each - each.mean(dim=1, keepdim=True)) ** 2).sum(dim=-1).mean(dim=1)


@dataclass(frozen=True)
class Distilled:
    """What `distil` leaves: R = discounts times seeds runs, in that order (discount-major).

    variance   [iterations, R], the proxy; nan from the iteration on where a run stopped
    sequence   [iterations, R], mean over the batch of sum_t r_t, nats: the sampled sequence KL
    alive      [R], False for a run that met a gradient that is not finite
    """

    settings: Settings
    runs: list[tuple[float, int]]
    params: Params
    teachers: Params
    variance: Tensor
    sequence: Tensor
    alive: Tensor


def distil(settings: Settings, teachers: Params, progress: bool = True) -> Distilled:
    """Train one student a (discount, seed) by g_gamma (arXiv:2603.25562v2 section 3)."""
    seeds, num_seeds = list(settings.seeds), len(settings.seeds)
    runs = [(gamma, seed) for gamma in settings.discounts for seed in seeds]
    copies = len(settings.discounts)
    params = init_params([seed for _, seed in runs], settings.hidden)
    discount = torch.tensor([gamma for gamma, _ in runs], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(9_000 + seed) for seed in seeds]
    optimiser = Optimiser(params, settings.learning_rate, settings.optimiser)
    of_task = [  # the teacher of each run, by task
        [
            tensor[task * num_seeds : (task + 1) * num_seeds].repeat(copies, 1, 1)
            for tensor in teachers
        ]
        for task in (0, 1)
    ]
    variance = torch.full((settings.iterations, len(runs)), float("nan"), dtype=torch.float64)
    sequence = variance.clone()
    steps = range(settings.iterations)
    for step in tqdm(steps, desc="students", disable=not progress, mininterval=1.0):
        which = step % 2  # counted from 1: left on odd, right on even iterations
        task = torch.full((len(runs),), which)
        noise = _noise(generators, settings.batch, settings.horizon).repeat(copies, 1, 1)
        positions, actions = sample(params, task, noise, settings)
        with torch.no_grad():
            teacher_logp, _, _ = scored(of_task[which], task, positions, actions, settings)
        leaves = [tensor.requires_grad_() for tensor in params]
        student_logp, hidden, raw = scored(leaves, task, positions, actions, settings)
        log_ratio = student_logp.detach() - teacher_logp
        loss = (returns(log_ratio, discount) * student_logp).sum() / settings.batch
        *gradients, raw_gradient = torch.autograd.grad(loss, [*leaves, raw])
        for tensor in params:
            tensor.requires_grad_(False)
        optimiser.step(gradients)
        raw_gradient = raw_gradient.view(*actions.shape, 2)
        spread = output_layer_variance(hidden.detach(), raw_gradient, settings.micro_batches)
        variance[step] = torch.where(optimiser.alive, spread, torch.nan)
        sequence[step] = torch.where(optimiser.alive, log_ratio.sum(-1).mean(-1), torch.nan)
    return Distilled(settings, runs, params, teachers, variance, sequence, optimiser.alive)


def evaluate(
    params: Params, seeds: list[int], task: int, settings: Settings, num: int = 512
) -> Tensor:
    """Positions [R, num, T + 1] of fresh trajectories; noise by seed, the same for every policy."""
    generators = [torch.Generator().manual_seed(11_000 + seed) for seed in seeds]
    noise = _noise(generators, num, settings.horizon)
    positions, _ = sample(params, torch.full((len(seeds),), task), noise, settings)
    return positions


def final_distance(positions: Tensor, task: int) -> Tensor:
    """Mean over trajectories of |last position - target|, [R]."""
    return (positions[:, :, -1] - TARGET[task]).abs().mean(dim=1)
