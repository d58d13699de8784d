"""Frozen models that wait in CPU memory (`--teacher-offload`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opd_run.compat import Facts
from opd_run.models import CausalLM


class Offloaded(CausalLM):
    """A frozen model that waits in CPU memory and is on `place` only while it computes."""

    def __init__(
        self, lm: Any, plain_head: bool, compute_dtype: torch.dtype, facts: Facts, place: str
    ) -> None:
        super().__init__(lm, plain_head, compute_dtype, facts)
        self.place, self.is_present = torch.device(place), False

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.place

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Copies of the weights on the device for the block; those that wait stay as they are."""
        if self.is_present:
            yield
            return
        waiting = [(each, each.data) for each in (*self.lm.parameters(), *self.lm.buffers())]
        try:
            for each, values in waiting:
                each.data = values.to(self.place, copy=True)
            self.is_present = True
            yield
        finally:
            self.is_present = False
            for each, values in waiting:
                each.data = values

    def forward(self, read: Callable[..., Any], where: Tensor | None, **inputs: Any) -> Any:
        """As of `CausalLM`."""
        with self.present():
            return super().forward(read, where, **inputs)
