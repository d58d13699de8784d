"""The public ops: argument checks, choice of the implementation, autograd."""

from __future__ import annotations

from typing import Any

from opd_ops.reference import (
    full_kl,
    gated_kl,
    gather_logp,
    linear_full_kl,
    linear_gated_kl,
    linear_gather_logits,
    linear_gather_logp,
    linear_support_kl,
    linear_token_logp,
    linear_topk_logp,
    support_kl,
    token_logp,
    topk_logp,
)

__all__ = [
    "full_kl",
    "gated_kl",
    "gather_logp",
    "info",
    "linear_full_kl",
    "linear_gated_kl",
    "linear_gather_logits",
    "linear_gather_logp",
    "linear_support_kl",
    "linear_token_logp",
    "linear_topk_logp",
    "support_kl",
    "token_logp",
    "topk_logp",
]


def info() -> dict[str, Any]:
    """What runs: implementation per op and device, versions, instruction set, compiler."""
    ops = {name: {"cpu": "reference", "cuda": "reference"} for name in __all__ if name != "info"}
    return {"compiled": False, "impl": "auto", "ops": ops}
