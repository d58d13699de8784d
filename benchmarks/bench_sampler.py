"""The sampler of the method files against `model.generate`: same model, prompts and law.

    python benchmarks/bench_sampler.py --model assets/tiny/student --repeats 7

Both are run in turn within one process; a row holds the median, 20th and 80th percentile of the
tokens per second of each, and the row `ratio` the quotients pair by pair. `generate` is called with
top_k 0 and top_p 1, so that it samples from the full softmax as ours does. Ours also records two
log-probs per token, and drops finished rows from the batch.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import opd  # noqa: E402

from opd_ops import data, models, runs  # noqa: E402


def generate(model: models.CausalLM, prompts: list[opd.Prompt], args: argparse.Namespace) -> int:
    """Tokens that `model.generate` made, EOS included."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=args.eos_ids,
        pad_token_id=0, max_new_tokens=args.max_completion_tokens,
    )  # fmt: skip
    total = 0
    for part, part_mask in zip(
        ids.split(args.sampler_batch_size), mask.split(args.sampler_batch_size), strict=True
    ):
        made = model.lm.generate(part, attention_mask=part_mask, generation_config=config)
        ends = torch.isin(made[:, width:], torch.tensor(args.eos_ids)).cumsum(1)
        total += int((ends == 0).sum() + (ends.max(1).values > 0).sum())
    return total


def ours(model: models.CausalLM, prompts: list[opd.Prompt], args: argparse.Namespace) -> int:
    """Tokens that the method files' sampler made, EOS included."""
    uniform = opd.uniforms(len(prompts), 2, 0, args)
    return int(opd.sample(model, prompts, uniform, args, 1.0).completion_mask.sum())


def main() -> None:
    """Time both and append three rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(runs.TINY / "student"))
    parser.add_argument("--prompts", default=str(runs.TINY / "prompts/test.jsonl"))
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-completion-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sampler.csv")
    own = parser.parse_args()
    args = opd.parse_args(
        [
            "--student",
            own.model,
            "--prompts",
            own.prompts,
            "--max-completion-tokens",
            str(own.max_completion_tokens),
        ]
    )
    tokenizer = models.prepare({"student": own.model}, args)
    model = models.load_lm(own.model, False, args)
    chosen = data.load_prompts(tokenizer, args)[0][: own.num_prompts]
    kinds = {"opd.sample": ours, "transformers.generate": generate}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(own.repeats + 1):
        for name, function in kinds.items():
            start = time.perf_counter()
            rate = function(model, chosen, args) / (time.perf_counter() - start)
            if repeat:  # the first is a warm-up
                rates[name].append(rate)
    pairs = np.array(rates["opd.sample"]) / np.array(rates["transformers.generate"])
    found = {name: np.array(values) for name, values in rates.items()} | {"ratio": pairs}
    seen = runs.environment()
    own.out.parent.mkdir(parents=True, exist_ok=True)
    new = not own.out.exists()
    with own.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                "implementation,unit,model,num_prompts,max_completion_tokens,median,p20,p80,repeats,"
                "device,num_threads,torch,transformers,commit,dirty,date".split(",")
            )
        for name, values in found.items():
            low, mid, high = np.percentile(values, [20, 50, 80])
            print(f"{name:24s} {mid:10.2f}  [{low:.2f}, {high:.2f}]")
            writer.writerow(
                [name, "" if name == "ratio" else "tokens/s", Path(own.model).name, len(chosen),
                 own.max_completion_tokens, f"{mid:.3f}", f"{low:.3f}", f"{high:.3f}", own.repeats,
                 seen["device"], seen["num_threads"], seen["torch"], seen["transformers"],
                 seen["commit"][:10], seen["dirty"], datetime.date.today().isoformat()]
            )  # fmt: skip


if __name__ == "__main__":
    main()
