"""How noisy is one batch's gradient, and which tokens carry it? Before any training.

    python benchmarks/gradient_variance.py                # 6 arms, 3 sets of prompts, 8 batches
    python benchmarks/gradient_variance.py --pair noisy   # the student with noise on its weights
    python benchmarks/gradient_variance.py --pair smol    # SmolLM2-135M and its noisy copy
    python benchmarks/gradient_variance.py --figure docs/images/evidence_tokens.png
    python benchmarks/gradient_variance.py --pair noisy --after ladder-opd ladder-mask --batches 2

The same prompts are answered again and again by the same weights (128 rollouts a batch of the tiny
pair), so what varies is sampling alone. With gradients g_1 ... g_M of the loss, g their mean:

    variance  = 1/(M-1) sum |g_m - g|^2          (trace of the covariance)
    signal    = |g|^2 - variance / M             (unbiased for the square of the true gradient)
    noise     = variance / signal                (1: one batch is as much noise as signal)
    cosine    = of g with the g of `opd --objective full`, the exact reverse KL at the same prompts

Losses differ in scale, so that `noise` compares and `variance` does not. What a token carries is
the squared length of the gradient at the hidden state that its loss is computed from: `worst` is
the share of the 1 % of tokens with the most, `share_i` that of the tokens whose log_ratio lies in
the i-th of BINS, `tokens_i` how many they are. Whatever was sampled, a position has a `stray` mass:
what the student puts on tokens that the teacher gives less than RARE; `carried_i` is the share of
the positions whose stray mass lies in the i-th of STRAY, `places_i` how many they are. Rows go to
benchmarks/results/gradient_variance.csv; those of `--pair` to gradient_tokens.csv there. What has a
row of the same pair, arm, seed and number of batches is not measured again.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import claims  # noqa: E402
import evidence  # noqa: E402
from rows import RESULTS as FOLDER  # noqa: E402
from rows import append, environment, markdown, read, spread  # noqa: E402

import opd_ops  # noqa: E402
from opd_run import ranks, retry, setup, verifier  # noqa: E402

RESULTS, TOKENS = FOLDER / "gradient_variance.csv", FOLDER / "gradient_tokens.csv"
FIELDS = "arm,seed,batches,variance,signal,noise,cosine,commit,torch,date,command,device,dirty"
ARMS = {  # without rollouts or prefixes of the teacher: the losses, at prefixes of the student
    "opd --objective full": ("opd", "--objective full"),
    "opd": ("opd", ""),
    "sg_opd": ("sg_opd", "--teacher-phase-steps 0"),
    "exopd": ("exopd", ""),
    "topk_opd": ("topk_opd", ""),
    "tropd": ("tropd", "--no-guidance"),
}
OF_TOKENS = {
    "opd --objective full": ("opd", "--objective full"),
    "opd --objective full --divergence forward": ("opd", "--objective full --divergence forward"),
    **{name: ARMS[name] for name in ("opd", "topk_opd", "tropd")},
    "tropd --outlier clip": ("tropd", "--no-guidance --outlier clip"),
}
PAIRS = {"tiny": "", "noisy": claims.NOISY, "smol": claims.SMOL}
SMALL = "--prompts-per-step 16 --rollouts-per-prompt 1"  # of a pair that is not tiny
BINS = (0.0, 1.0, 3.0, 6.0)  # nats of log_ratio: below the first, between them, above the last
STRAY, RARE = (0.01, 0.1, 0.5), 0.01  # the student's mass on tokens of less than RARE
TOP = 32
OF_BINS = [f"{name}_{i}" for name in ("share", "tokens") for i in range(len(BINS) + 1)]
OF_BINS += [f"{name}_{i}" for name in ("carried", "places") for i in range(len(STRAY) + 1)]
TOKEN_FIELDS = f"pair,{FIELDS},num_tokens,worst,p99_first,p99_last,top_mass,accepted,stray,"
TOKEN_FIELDS += ",".join(OF_BINS)


@dataclass
class Found:
    """Of one arm and one set of prompts, over batches: gradients, and numbers of each token."""

    total: torch.Tensor  # [parameters], float64: the sum of the gradients
    squares: list[float]  # of each batch: the squared length of its gradient
    carried: torch.Tensor  # [N] squared length of the gradient at the token's hidden state
    log_ratio: torch.Tensor  # [N] nats
    place: torch.Tensor  # [N] of the token in its completion, from 0 to 1
    top_mass: torch.Tensor  # [N] the teacher's probability of its TOP likeliest tokens
    stray: torch.Tensor  # [N] the student's probability of what the teacher gives less than RARE

    @property
    def variance(self) -> float:
        """Trace of the covariance of a batch's gradient."""
        num = len(self.squares)
        return (sum(self.squares) - float(self.total.square().sum()) / num) / (num - 1)

    @property
    def signal(self) -> float:
        """The squared length of the true gradient, without bias."""
        num = len(self.squares)
        return float(self.total.square().sum()) / num**2 - self.variance / num

    def of_tokens(self) -> dict[str, str]:
        """Columns of TOKEN_FIELDS."""
        carried, order = self.carried / self.carried.sum(), self.carried.argsort(descending=True)
        few = max(1, len(carried) // 100)
        found = {"worst": float(carried[order[:few]].sum())}
        for share, num, values, edges in (
            ("share", "tokens", self.log_ratio, BINS),
            ("carried", "places", self.stray, STRAY),
        ):
            bins = torch.bucketize(values, torch.tensor(edges))
            for i in range(len(edges) + 1):
                found[f"{share}_{i}"] = float(carried[bins == i].sum())
                found[f"{num}_{i}"] = float((bins == i).float().mean())
        for name, mine in (("first", self.place < 0.1), ("last", self.place >= 0.9)):
            found[f"p99_{name}"] = float(self.log_ratio[mine].quantile(0.99))
        found["top_mass"] = float(self.top_mass.mean())
        found["stray"] = float(self.stray.mean())
        found["accepted"] = float((-self.log_ratio).clamp(max=0).exp().mean())
        return {name: f"{value:.4g}" for name, value in found.items()} | {
            "num_tokens": str(len(carried))
        }


def gradients(name: str, flags: str, seed: int, batches: int) -> Found:
    """The gradients of an arm, each divided by its trained tokens."""
    method = importlib.import_module(name)
    args = method.parse_args([*flags.split(), "--device", "cpu", "--seed", str(seed)])
    ranks.start(args)
    loaded, tokenizer, facts = setup.models_of(method, args)
    prompts = setup.prompts_of(method, args.prompts, tokenizer, facts, args)
    child = verifier.Verifier(args.verifier, args.verifier_timeout_s)
    chosen = method.prompts_of_step(prompts, 0, args)
    kept: list[torch.Tensor] = []  # hidden states [N, D] of the micro-batches of a batch
    plain = method.read_tokens

    def read_tokens(model: Any, rollout: Any, read: Any) -> Any:
        def noted(hidden: torch.Tensor, head: torch.Tensor | None) -> Any:
            if hidden.requires_grad:
                hidden.retain_grad()
                kept.append(hidden)
            return read(hidden, head)

        return plain(model, rollout, noted)

    total, squares, pieces = torch.zeros(()), [], []
    for each in range(batches):
        args.seed = 1000 * (seed + 1) + each  # of sampling; the prompts are chosen
        rollout, _ = method.collect(loaded, tokenizer, child, chosen, args, 0)
        batch = [(m, method.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
        tokens = sum(int(rollout.trained_mask.sum()) for rollout, _ in batch)
        loaded["student"].train()
        kept.clear()
        with mock.patch.object(method, "read_tokens", read_tokens):
            method.accumulate(loaded["student"], tokens, args, batch)
        grads = [w.grad for w in loaded["student"].parameters() if w.grad is not None]
        grad = torch.cat([each.flatten() for each in grads]).double()
        total = total + grad
        squares.append(float(grad.square().sum()))
        at_hidden = [hidden.grad for hidden in kept if hidden.grad is not None]
        pieces += [
            (each.square().sum(-1), *of_batch(method, loaded, part, args))
            for each, (part, _) in zip(at_hidden, batch, strict=True)
        ]
    child.close()
    return Found(total, squares, *(torch.cat(each) for each in zip(*pieces)))


@torch.no_grad()
def of_batch(method: Any, loaded: Any, rollout: Any, args: Any) -> tuple[torch.Tensor, ...]:
    """log_ratio, place, the teacher's top mass and the stray mass of N trained tokens."""
    mask, teacher, student = rollout.trained_mask, loaded["teacher"], loaded["student"]
    lengths = mask.sum(-1, keepdim=True)
    place = ((mask.cumsum(-1) - 1) / lengths)[mask]
    tokens, likely = rollout.completion_ids[mask], int(1 / RARE)  # no more tokens have RARE

    def of_teacher(hidden: torch.Tensor, head: torch.Tensor | None) -> tuple[Any, ...]:
        law = method.loss_law(teacher, args)
        top = opd_ops.topk_logp(hidden, head, likely, token_ids=tokens, **law)
        return top.ids, top.logp, top.token_logp

    def of_student(hidden: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
        asked = torch.cat([tokens[:, None], ids], 1)
        return opd_ops.gather_logp(hidden, head, asked, **method.loss_law(student, args)).logp

    ids, top, teacher_logp = (
        each[mask] for each in method.read_tokens(teacher, rollout, of_teacher)
    )
    student_logp = method.read_tokens(student, rollout, of_student)[mask]  # [N, 1 + likely]
    supported = (student_logp[:, 1:].exp() * (top.exp() >= RARE)).sum(-1)
    return student_logp[:, 0] - teacher_logp, place, top[:, :TOP].exp().sum(-1), 1 - supported


def main() -> None:
    """Measure, append rows, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="sets of prompts")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--pair", choices=list(PAIRS), help="of students and teachers, for tokens")
    parser.add_argument("--after", nargs="+", default=[], metavar="ARM", help="of the student that "
                        "a cell of evidence.py has made")  # fmt: skip
    parser.add_argument("--flags", default="", help="more flags of the methods, for a try")
    parser.add_argument("--figure", type=Path, help="draw the rows of the noisy pair, run nothing")
    parser.add_argument("--out", type=Path, help="another file for the rows")
    args = parser.parse_args()
    if args.figure:
        draw(args.figure)
        return
    if args.pair == "noisy":
        evidence.make_inputs()
    if args.after and args.pair != "noisy":
        parser.error("--after: its students began as that of --pair noisy")
    if args.flags and not args.out:
        parser.error("--flags: a try goes to a file of its own, --out")
    pair = f"{PAIRS[args.pair or 'tiny']} {SMALL if args.pair == 'smol' else ''} {args.flags}"
    out = args.out or (TOKENS if args.pair else RESULTS)
    seen, keys = environment(), ("pair", "arm", "seed", "batches")
    done = {tuple(row.get(key, "") for key in keys) for row in read(out)}
    for seed in range(args.seeds):
        arms, exact = OF_TOKENS if args.pair else ARMS, None
        if args.after:
            arms = {f"after {arm}": ("opd", trained(arm, seed)) for arm in args.after}
        missing = [arm for arm in arms
                   if (args.pair or "", arm, f"{seed}", f"{args.batches}") not in done]  # fmt: skip
        for arm, (name, flags) in arms.items():
            first = exact is None and not args.after  # what cosines are with
            if arm not in missing and not (first and missing):
                continue
            found = gradients(name, f"{pair} {flags}", seed, args.batches)
            exact = found.total if exact is None else exact
            noise = found.variance / found.signal
            cosine = float(torch.cosine_similarity(found.total, exact, dim=0))
            row = {
                "arm": arm, "seed": seed, "batches": args.batches, "noise": f"{noise:.4f}",
                "variance": f"{found.variance:.4g}", "signal": f"{found.signal:.4g}",
                "cosine": "" if args.after else f"{cosine:.4f}", "pair": args.pair or "",
            }  # fmt: skip
            if arm in missing:
                append(out, [seen | row | found.of_tokens()], TOKEN_FIELDS if args.pair else FIELDS)
            print(f"seed {seed}  {arm:42s} noise {noise:8.3f}  cosine {cosine:.3f}")
    print(token_table() if args.pair else table())


def trained(arm: str, seed: int) -> str:
    """Flags: the student that the cell of this arm has made, and the exact divergence."""
    run = Path(claims.FOLDER, evidence.Cell(arm, seed, "").name)
    return f"--objective full --student {run}/checkpoints/step_{claims.ARMS[arm].steps}/model"


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


def token_table() -> str:
    """A Markdown table: which tokens carry the gradient; means over sets of prompts."""
    rows, lines = read(TOKENS), []
    columns = ("noise", "worst", "share_4", "tokens_4", "p99_first", "p99_last", "top_mass")
    for pair in PAIRS:
        for arm in OF_TOKENS:
            mine = [row for row in rows if (row["pair"], row["arm"]) == (pair, arm)]
            if mine:
                shown = [spread([float(row[key]) for row in mine]) for key in columns]
                accepted = spread([float(row["accepted"]) for row in mine])
                lines.append([pair, f"`{arm}`", f"{len(mine)}", *shown, accepted])
    far = f"{BINS[-1]:.0f} nats"
    titles = ("pair", "loss", "sets of prompts", "noise / signal", "worst 1 % of tokens carry",
              f"log_ratio above {far}: carry", "are", "99 %: first tenth", "last tenth",
              f"teacher's top {TOP}", "acceptance")  # fmt: skip
    return markdown(titles, lines) if lines else "not run"


def place_tables() -> tuple[str, str]:
    """Markdown tables: the share of the gradient by the student's stray mass at a position, and how
    many such positions the arms of the ladder have left."""
    rows, carried, left = read(TOKENS), [], []

    def shown(name: str, mine: list[dict[str, str]]) -> list[str]:
        columns = [f"{name}_{i}" for i in range(len(STRAY) + 1)]
        return [spread([float(row[column]) for row in mine]) for column in columns]

    for pair in PAIRS:
        by_arm = {arm: [row for row in rows if (row["pair"], row["arm"]) == (pair, arm)]
                  for arm in OF_TOKENS}  # fmt: skip
        if by_arm["opd"]:  # one row a set of prompts; the positions are the same in most arms
            carried.append([pair, "how many positions", *shown("places", by_arm["opd"])])
        carried += [[pair, f"`{arm}`", *shown("carried", mine)]
                    for arm, mine in by_arm.items() if mine]  # fmt: skip
    trained = dict.fromkeys(row["arm"] for row in rows if row["arm"].startswith("after "))
    before = [row for row in rows if (row["pair"], row["arm"]) == ("noisy", "opd")]
    for arm in ["before", *trained] if trained else []:
        mine = [row for row in rows if row["arm"] == arm] or before
        stray = spread([float(row["stray"]) for row in mine])
        left.append([arm.replace("after ", ""), f"{len(mine)}", *shown("places", mine), stray])
    ends = [f"below {STRAY[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(STRAY))]
    ends.append(f"above {STRAY[-1]:g}")
    shares = markdown(("pair", "share of the squared gradient", *ends), carried)
    places = markdown(("student after", "seeds", *ends, "mean stray mass"), left)
    return shares if carried else "not run", places if left else "not run"


def draw(path: Path) -> None:
    """Which log_ratios the gradient of each loss comes from, in the noisy pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read(TOKENS) if row["pair"] == "noisy" and row["arm"] in OF_TOKENS]
    if not rows:
        raise SystemExit("no rows yet: run --pair noisy first")
    figure, both = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, edges, share, num, label in (
        (both[0], BINS, "share", "tokens", "log_ratio of the sampled token, nats"),
        (both[1], STRAY, "carried", "places", "student's mass where the teacher has under 1 %"),
    ):
        between = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
        ends = [f"< {edges[0]:g}", *between, f"> {edges[-1]:g}"]
        bars = dict.fromkeys(OF_TOKENS, share) | {"how many of all": num}
        for at, (arm, name) in enumerate(bars.items()):
            mine = [row for row in rows if row["arm"] == arm or name == num]
            means = [
                sum(float(row[f"{name}_{i}"]) for row in mine) / len(mine) for i in range(len(ends))
            ]
            places = [i + at / (len(bars) + 1) for i in range(len(ends))]
            colour = "black" if name == num else f"C{at}"
            axes.bar(places, means, 1 / (len(bars) + 1), color=colour, label=arm)
        axes.set_xticks([i + 0.4 for i in range(len(ends))], ends)
        axes.set_xlabel(label)
    both[0].set_ylabel("share of the squared gradient")
    bars_of = both[1].get_legend_handles_labels()
    figure.legend(*bars_of, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
