"""How noisy is one batch's gradient? Every method on the tiny pair, before any training.

    python benchmarks/gradient_variance.py            # 6 arms, 3 sets of prompts, 8 batches of each

The same 32 prompts are answered again and again by the same weights (128 rollouts a batch), so what
varies is sampling alone. With gradients g_1 ... g_M of the loss, g their mean:

    variance  = 1/(M-1) sum |g_m - g|^2          (trace of the covariance)
    signal    = |g|^2 - variance / M             (unbiased for the square of the true gradient)
    noise     = variance / signal                (1: one batch is as much noise as signal)
    cosine    = of g with the g of `opd --objective full`, the exact reverse KL at the same prompts

Losses differ in scale, so that `noise` compares and `variance` does not. Rows go to
benchmarks/results/gradient_variance.csv.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
from rows import RESULTS as FOLDER  # noqa: E402
from rows import append, environment, markdown, read, spread  # noqa: E402

from opd_run import ranks, retry, setup, verifier  # noqa: E402

RESULTS = FOLDER / "gradient_variance.csv"
FIELDS = "arm,seed,batches,variance,signal,noise,cosine,commit,torch,date,command,device,dirty"
ARMS = {  # without rollouts or prefixes of the teacher: the losses, at prefixes of the student
    "opd --objective full": ("opd", "--objective full"),
    "opd": ("opd", ""),
    "sg_opd": ("sg_opd", "--teacher-phase-steps 0"),
    "exopd": ("exopd", ""),
    "topk_opd": ("topk_opd", ""),
    "tropd": ("tropd", "--no-guidance"),
}


def gradients(name: str, flags: str, seed: int, batches: int) -> torch.Tensor:
    """[batches, parameters]: the gradient of each batch, divided by its trained tokens."""
    method = importlib.import_module(name)
    args = method.parse_args([*flags.split(), "--device", "cpu", "--seed", str(seed)])
    ranks.start(args)
    loaded, tokenizer, facts = setup.models_of(method, args)
    prompts = setup.prompts_of(method, args.prompts, tokenizer, facts, args)
    child = verifier.Verifier(args.verifier, args.verifier_timeout_s)
    chosen = method.prompts_of_step(prompts, 0, args)
    found = []
    for each in range(batches):
        args.seed = 1000 * (seed + 1) + each  # of sampling; the prompts are chosen
        rollout, _ = method.collect(loaded, tokenizer, child, chosen, args, 0)
        batch = [(m, method.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
        tokens = sum(int(rollout.trained_mask.sum()) for rollout, _ in batch)
        loaded["student"].train()
        method.accumulate(loaded["student"], tokens, args, batch)
        grads = [w.grad for w in loaded["student"].parameters() if w.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    child.close()
    return torch.stack(found).double()


def main() -> None:
    """Measure, append rows, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="sets of prompts")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    seen, rows = environment(), []
    for seed in range(args.seeds):
        exact = None
        for arm, (name, flags) in ARMS.items():
            each = gradients(name, flags, seed, args.batches)
            mean = each.mean(0)
            exact = mean if exact is None else exact
            variance = float((each - mean).square().sum() / (args.batches - 1))
            signal = float(mean.square().sum()) - variance / args.batches
            cosine = float(torch.cosine_similarity(mean, exact, dim=0))
            rows.append(seen | {
                "arm": arm, "seed": seed, "batches": args.batches, "variance": f"{variance:.4g}",
                "signal": f"{signal:.4g}", "noise": f"{variance / signal:.4f}",
                "cosine": f"{cosine:.4f}",
            })  # fmt: skip
            print(f"seed {seed}  {arm:22s} noise {variance / signal:8.3f}  cosine {cosine:.3f}")
    append(RESULTS, rows, FIELDS)
    print(table())


def table() -> str:
    """A Markdown table of the rows: means over sets of prompts with 95 % intervals."""
    rows = read(RESULTS)
    titles = "arm", "sets of prompts", "noise / signal", "cosine with the exact reverse KL"
    lines = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        shown = [spread([float(row[key]) for row in mine]) for key in ("noise", "cosine")]
        lines.append([f"`{arm}`", f"{len(mine)}", *shown])
    return markdown(titles, lines)


if __name__ == "__main__":
    main()
