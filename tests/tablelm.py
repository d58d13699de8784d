"""A language model that is a table: one row of logits for every prefix, so that sums over *all*
completions are exact. V <= 5, T <= 3, prompt of one token (id 0)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opd_run.compat import Facts


class TableLM(torch.nn.Module):
    """Stands in for `opd_run.models.CausalLM`: hidden states are the logits, the head is None."""

    def __init__(self, vocab: int, length: int, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        self.vocab, self.length, self.head = vocab, length, None
        self.lm = SimpleNamespace(config=None)
        self.device, self.role = torch.device("cpu"), "student"
        self.facts = Facts(valid_vocab=vocab, eos_ids={}, num_positions=1000)
        num_prefixes = sum(vocab**t for t in range(length))
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(num_prefixes, vocab, generator=generator, dtype=torch.float64) * scale
        self.table = torch.nn.Parameter(table)

    def prefix_index(self, completions: Tensor) -> Tensor:
        """[B, T] ids -> [B, T] index of the table row that predicts each of them."""
        index = torch.zeros(completions.shape, dtype=torch.int64)
        offset, code = 0, torch.zeros(len(completions), dtype=torch.int64)
        for t in range(completions.shape[1]):
            index[:, t] = offset + code
            offset, code = offset + self.vocab**t, code * self.vocab + completions[:, t]
        return index

    def logp(self, completions: Tensor) -> Tensor:
        """[B, T, V] log-probs at every position."""
        return self.table.log_softmax(-1)[self.prefix_index(completions)]

    def token_logp(self, completions: Tensor) -> Tensor:
        """[B, T] log-probs of the tokens."""
        return self.logp(completions).gather(2, completions[:, :, None])[:, :, 0]

    def head_on(self, device: torch.device) -> None:
        """There is none."""

    def forward(self, read: Callable[..., Any], where: Tensor, input_ids: Tensor, **_: Any) -> Any:
        completions = input_ids[:, 1:]
        rows = self.table[self.prefix_index(completions)]  # [B, T, V]; row t predicts token t
        return read(rows[where[:, :-1]], None)


def all_completions(vocab: int, length: int) -> Tensor:
    """[V^T, T] every completion."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def rollout_of(module: Any, completions: Tensor, **changes: Any) -> Any:
    """A `module.Rollout` of the given completions, everything trained."""
    num, width = completions.shape
    ones = torch.ones(num, width, dtype=torch.bool)
    prompt = module.Prompt((0,), "", "", "", {})
    values = {
        "prompts": [prompt] * num,
        "prompt_ids": torch.zeros(num, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(num, 1, dtype=torch.bool),
        "completion_ids": completions,
        "completion_mask": ones.clone(),
        "response_mask": ones.clone(),
        "prefix_mask": ~ones,
        "rollout_logp": torch.zeros(num, width),
        "behaviour_logp": torch.zeros(num, width),
        "ended": torch.ones(num, dtype=torch.bool),
        "source": torch.zeros(num, dtype=torch.int64),
        "verdict": torch.zeros(num),
    }
    extra = {"coin": changes.pop("coin", torch.zeros(num, width))}  # drawn in `collect`
    return module.Rollout(**(values | {"extra": extra} | changes))


def expected_gradient(
    student: TableLM, weights: Tensor, loss_of: Callable[[int], Tensor]
) -> Tensor:
    """sum_i weights_i d loss_of(i) / d table, the exact expectation over completions."""
    total = torch.zeros_like(student.table)
    for i, weight in enumerate(weights.detach()):
        (gradient,) = torch.autograd.grad(loss_of(i), student.table)
        total += weight * gradient
    return total
