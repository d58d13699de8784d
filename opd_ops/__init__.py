"""Ops for on-policy distillation: log-probs, top-K and divergences over large vocabularies.

Every op exists as plain PyTorch in `opd_ops.reference` (the specification, and the place of the
documentation) and, where it was built for the device, as a compiled one. `OPD_OPS_IMPL` chooses:
`auto` (default: compiled where built, else plain PyTorch), `plain` or `cpp`.
`OPD_OPS_REQUIRE=cpp` makes a missing compiled library an ImportError. `info()` tells what runs.

>>> import torch
>>> token_logp(torch.zeros(1, 4), None, torch.tensor([2])).logp.exp()
tensor([0.2500])
"""

from opd_ops._dispatch import info
from opd_ops._ops import (
    full_kl,
    gated_kl,
    gather_logp,
    support_kl,
    token_logp,
    topk_logp,
)

__version__ = "0.2.0"

__all__ = [
    "full_kl",
    "gated_kl",
    "gather_logp",
    "info",
    "support_kl",
    "token_logp",
    "topk_logp",
]
