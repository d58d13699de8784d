"""One small case of each kernel, for compute-sanitizer; every result against float64 on the CPU.

    compute-sanitizer --error-exitcode 9 python tests/gpu/each_kernel.py --device cuda
    python tests/gpu/each_kernel.py --device cpu       # the same cases, the kernels of the CPU

Odd numbers of columns, rows that begin anywhere, more of K than there are chunks: where a kernel
would read or write beside its row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from strategies import DTYPES, make_logits, random_ids  # noqa: E402
from torch import Tensor  # noqa: E402

import opd_ops  # noqa: E402

N, V, VALID, D = 5, 2_059, 2_049, 37  # rows of the head fill its columns up to 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def cases() -> dict[str, Callable[..., Any]]:
    """Name -> op on (logits, hidden, head); the first output is differentiated."""
    ids, teacher = random_ids(0, N, 9, VALID), make_logits(7, N, V, torch.float32, "normal")
    few = random_ids(1, N, 6, VALID, distinct=True)
    logp = teacher[:, :VALID].log_softmax(-1).gather(1, few)
    law = {"valid_vocab": VALID, "temperature": 0.7}

    def on(like: Tensor, *tensors: Tensor) -> list[Tensor]:
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        return [t.to(like.device, kind if t.is_floating_point() else t.dtype) for t in tensors]

    def full(divergence: str) -> Callable[..., Any]:
        return lambda z, h, w: (
            opd_ops.full_kl(z, None, *on(z, teacher), None, divergence=divergence, **law).loss
        )

    def top(k: int) -> Callable[..., Any]:
        return lambda z, h, w: (
            opd_ops.topk_logp(z.detach(), None, k, token_ids=on(z, ids)[0][:, 0], **law).logp
        )

    def negative(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -logp, {}

    bucket = {"renormalise": False, "tail": "bucket"}
    outside = (-torch.expm1(logp.logsumexp(-1))).log()
    return {
        "token_logp": lambda z, h, w: opd_ops.token_logp(z, None, on(z, ids)[0][:, 0], **law).logp,
        "entropy": lambda z, h, w: (
            opd_ops.token_logp(z, None, on(z, ids)[0][:, 0], with_entropy=True, **law).entropy
        ),
        "gather_logp": lambda z, h, w: opd_ops.gather_logp(z, None, *on(z, ids), **law).logp,
        "support_kl": lambda z, h, w: (
            opd_ops.support_kl(
                z, None, *on(z, few, logp), teacher_tail_logp=on(z, outside)[0], **bucket, **law
            ).loss
        ),
        "topk_logp, few": top(5),
        "topk_logp, more than chunks": top(64),
        **{f"full_kl {name}": full(name) for name in ("reverse", "forward", "jsd")},
        "support_kl, from hidden states": lambda z, h, w: (
            opd_ops.support_kl(h, w, *on(h, few, logp), **law).loss
        ),
        "gated_kl, from hidden states": lambda z, h, w: (
            opd_ops.gated_kl(h, w, on(h, ids)[0][:, 0], negative, **law).loss
        ),
    }


def main() -> None:
    """Run all; exit 1 and a line each where one is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    device, wrong = parser.parse_args().device, []
    wide = {kind: make_logits(2, N, V + 4, kind, "normal") for kind in DTYPES}
    for name, op in cases().items():
        for kind in DTYPES:
            if kind == torch.float16 and "hidden" in name and device == "cpu":
                continue  # no products of it there
            results = []
            for place, of in ((device, kind), ("cpu", torch.float64)):
                z = wide[kind].to(place, of)[:, 3 : 3 + V].requires_grad_()
                h, w = (make_logits(s, r, D, kind, "normal").to(place, of).requires_grad_()
                        for s, r in ((3, N), (4, V)))  # fmt: skip
                out = op(z, h, w)
                found = [out.detach()]
                if out.requires_grad:
                    leaves = (h, w) if "hidden" in name else (z,)
                    found += torch.autograd.grad(out.double().square().sum(), leaves)
                results.append([t.cpu().double() for t in found])
            for place, (got, want) in enumerate(zip(*results)):
                error = float((got - want).abs().max() / want.abs().max().clamp(min=1.0))
                if not error < TOLERANCE[kind]:
                    wrong.append(f"{name}, {kind}, output {place}: error {error:.1e}")
    print("\n".join(wrong) or f"{len(cases())} ops in {len(DTYPES)} types are right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
