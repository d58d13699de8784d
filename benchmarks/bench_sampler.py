"""The sampler of the method files against others: same model, prompts, law and process.

    python benchmarks/bench_sampler.py --model assets/tiny/student --repeats 7
    .venv-engines/bin/python benchmarks/bench_sampler.py    # with vLLM, after make test-engines

All are run in turn within one process: `opd.sample`, `model.generate`, `model.generate_batch`
(transformers' continuous batching) and, where it is installed, vLLM as `--sampler vllm` calls it. A
row holds the median, 20th and 80th percentile of the tokens per second, or of our rate over
another's, turn by turn. The others are called with top_k 0 and top_p 1, so that they sample from
the full softmax as ours does. Ours records two log-probs per token, vLLM one, the others none.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import opd  # noqa: E402
from rows import RESULTS, append, environment  # noqa: E402

from opd_run import setup, vllm_sampler  # noqa: E402
from opd_run.files import TINY  # noqa: E402
from opd_run.models import CausalLM  # noqa: E402

COLUMNS = (
    "implementation,unit,model,num_prompts,max_completion_tokens,median,p20,p80,repeats,"
    "device,num_threads,torch,transformers,commit,dirty,date,command"
)
PAGE = 32  # tokens; of the cache of `generate_batch`


def law(model: CausalLM, args: argparse.Namespace) -> transformers.GenerationConfig:
    """The full softmax at temperature 1."""
    return transformers.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=opd.stop_ids(model.facts),
        pad_token_id=0, max_new_tokens=args.max_completion_tokens,
    )  # fmt: skip


def generate(model: CausalLM, prompts: list[opd.Prompt], args: argparse.Namespace) -> int:
    """Tokens that `model.generate` made, EOS included."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    total = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    for part, part_mask in zip(
        ids.split(args.sampler_batch_size), mask.split(args.sampler_batch_size), strict=True
    ):
        with model.autocast():
            made = model.lm.generate(
                part, attention_mask=part_mask, generation_config=law(model, args)
            )
        ends = torch.isin(made[:, width:], made.new_tensor(opd.stop_ids(model.facts))).cumsum(1)
        total += int((ends == 0).sum() + (ends.max(1).values > 0).sum())
    return total


def generate_batch(model: CausalLM, prompts: list[opd.Prompt], args: argparse.Namespace) -> int:
    """Tokens that continuous batching made; its cache is just large enough for all at once."""
    ids = [list(prompt.ids) for prompt in prompts]
    pages = sum(-(-(len(each) + args.max_completion_tokens) // PAGE) for each in ids)
    how = transformers.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages + 1, max_batch_tokens=max(256, len(ids))
    )
    found = model.lm.generate_batch(ids, law(model, args), how, warmup=False).values()
    if len(found) < len(ids) or any(each.error for each in found):
        raise SystemExit(f"generate_batch: {[each.error for each in found]}")
    return sum(len(each.generated_tokens) for each in found)


TURN = itertools.count()  # so that ours draws anew in every turn, as the others do


def ours(model: CausalLM, prompts: list[opd.Prompt], args: argparse.Namespace) -> int:
    """Tokens that the method files' sampler made, EOS included; or the model's engine for it."""
    uniform = opd.uniforms(len(prompts), "rollouts", next(TURN), args)
    return int(opd.sample(model, prompts, uniform, args).completion_mask.sum())


def vllm_version() -> str:
    """Of the package that is installed: its CPU build has another name."""
    package = importlib.metadata.packages_distributions()["vllm"][0]
    return importlib.metadata.version(package)


def main() -> None:
    """Time them and append their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(TINY / "student"))
    parser.add_argument("--prompts", default=str(TINY / "prompts/test.jsonl"))
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-completion-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "sampler.csv")
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
    loaded, tokenizer, facts = setup.models_of(opd, args, {"student": own.model})
    model = loaded["student"]
    prompts = setup.prompts_of(opd, own.prompts, tokenizer, facts, args)
    chosen = prompts[: own.num_prompts]
    kinds = {
        "opd.sample": (ours, model),
        "transformers.generate": (generate, model),
        "transformers.generate_batch": (generate_batch, model),
    }
    if importlib.util.find_spec("vllm"):
        driven = copy.copy(model)
        driven.engine = vllm_sampler.VllmSampler(own.model, facts, args)
        kinds[f"vllm {vllm_version()}"] = (ours, driven)
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(own.repeats + 1):
        for name, (function, which) in kinds.items():
            some = chosen if repeat else chosen[:4]  # the first turn is a warm-up
            start = time.perf_counter()
            rate = function(which, some, args) / (time.perf_counter() - start)
            if repeat:
                rates[name].append(rate)
                print(f"{repeat} {name}: {rate:.1f} tokens/s", flush=True)
    found = {name: np.array(values) for name, values in rates.items()}
    for name in list(kinds)[1:]:
        found[f"opd.sample / {name}"] = found["opd.sample"] / found[name]
    seen, rows = environment(), []
    for name, values in found.items():
        low, mid, high = np.percentile(values, [20, 50, 80])
        print(f"{name:44s} {mid:10.2f}  [{low:.2f}, {high:.2f}]")
        rows.append(seen | {
            "implementation": name, "unit": "" if "/" in name else "tokens/s",
            "model": Path(own.model).name, "num_prompts": len(chosen),
            "max_completion_tokens": own.max_completion_tokens, "median": f"{mid:.3f}",
            "p20": f"{low:.3f}", "p80": f"{high:.3f}", "repeats": own.repeats,
        })  # fmt: skip
    append(own.out, rows, COLUMNS)


if __name__ == "__main__":
    main()
