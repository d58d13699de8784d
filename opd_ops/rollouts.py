"""Moving rollouts about: padding and columns, never a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F


def join(rollouts: Sequence[Any]) -> Any:
    """One rollout with the rows of all: prompts are padded on the left, the rest on the right."""
    length = max(each.prompt_ids.shape[1] for each in rollouts)
    width = max(each.completion_ids.shape[1] for each in rollouts)
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(rollouts[0])):
        values = [getattr(each, name) for each in rollouts]
        if name == "prompts":
            joined[name] = [prompt for each in values for prompt in each]
            continue
        if values[0].dim() == 2 and name.startswith("prompt"):
            values = [F.pad(value, (length - value.shape[1], 0)) for value in values]
        elif values[0].dim() == 2:
            values = [F.pad(value, (0, width - value.shape[1])) for value in values]
        joined[name] = torch.cat(values)
    return type(rollouts[0])(**joined)
