"""What else a step paid for in an older tree: memory and time of the lines around the ops.

    git worktree add --detach ../before 905645f  # version 0.1
    (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/bench_lines.py --before ../before

Each case is a short run of a method that isolates one line, in a process of its own; the trees
take turns. Weights are random. A time is the median of a phase over the steps but for the
first; a memory is the rise of the peak of resident memory over the loaded models, or, where the
line is about gradients, their bytes as rollouts are made. The case `ids` needs vLLM, so it is left
out unless it is named: `--cases ids` by the Python of `make test-engines`.
Rows: benchmarks/results/lines.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "case,tree,unit,median,least,most,repeats,num_threads,load,device,torch,transformers,commit,"
    "dirty,date,command"
)
FLAGS = (
    "--steps 4 --eval-every 0 --save-every 0 --diagnostic-tokens 0 --overwrite --device cpu "
    "--prompts-per-step 16 --rollouts-per-prompt 2 --max-completion-tokens 32"
)
SLOW_VERIFIER = """import time


def judge(completion, right_answer, row):
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass
    return False
"""


@dataclasses.dataclass
class Case:
    """One line of a step: the run that shows it, and by which number."""

    title: str
    unit: str  # "generate_s", "teacher_s", "student_s": of a phase; "peak", "gradients": bytes
    flags: str = ""
    kind: str = "Qwen3"  # the class of student and teacher, as transformers names it
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    processes: int = 1  # more than one: by torchrun
    padding: int = 0  # ids of the vocabulary that the tokenizer does not have
    method: str = "opd"


MANY_TOKENS = {"vocab_size": 32_000, "hidden_size": 256}
LOSS = {"vocab_size": 151_936, "hidden_size": 128}
FEW = "--dtype float32 --rollouts-per-prompt 1 --top-p 1"  # 512 tokens a step
LOSSES = {
    "sampled": ("loss of a sampled token of 151,936", "opd", ""),
    "full": ("reverse KL over 151,936 tokens", "opd", "--objective full"),
    "jsd": ("JSD over 151,936 tokens", "opd", "--objective full --divergence jsd"),
    "support": ("reverse KL on 32 of 151,936 tokens, renormalised", "topk_opd", ""),
    "truncated": (
        "reverse KL on 32 of 151,936 tokens, not renormalised",
        "topk_opd",
        "--no-renormalise",
    ),
    "bucket": ("reverse KL on 32 of 151,936 tokens and the rest", "topk_opd", "--tail bucket"),
}
EXPERTS = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
CASES = {
    "gradients": Case(
        "gradients while rollouts are made", "gradients", "--dtype float32", model=MANY_TOKENS
    ),
    "head": Case(
        "`--objective full --shard-frozen`: the teacher's head put together", "peak",
        "--dtype float32 --objective full --shard fsdp --shard-frozen --micro-batch-tokens 128",
        model=MANY_TOKENS | {"hidden_size": 512}, processes=2,
    ),
    "logits": Case(
        "`--objective full`, a head that is no plain product: logits of the teacher", "peak",
        "--dtype float32 --objective full --micro-batch-tokens 128",
        kind="Phi", model=MANY_TOKENS,
    ),
    "experts": Case(
        "experts that are trained, in bfloat16: the update", "student_s",
        "--dtype bfloat16 --max-completion-tokens 64", kind="Qwen3Moe", model=EXPERTS,
    ),
    **{
        name: Case(f"{title}: the update", "student_s",
                   f"{FEW} {flags}", model=LOSS, method=method)
        for name, (title, method, flags) in LOSSES.items()
    },
    **{
        f"{name}_memory": Case(f"{LOSSES[name][0]}: memory of a step", "peak",
                               f"{FEW} {LOSSES[name][2]}",
                               model=LOSS)
        for name in ("sampled", "full")
    },
    "topk": Case("the teacher's 32 likeliest of 151,936 tokens", "teacher_s",
                 FEW, model=LOSS, method="topk_opd"),
    "verify": Case(
        "a verifier of 20 ms an answer: generation with its verdicts", "generate_s",
        "--dtype float32 --verifier judge.py:judge --sampler-batch-size 16 "
        "--prompts-per-step 64 --rollouts-per-prompt 1 --max-completion-tokens 64",
        model={"hidden_size": 128, "num_hidden_layers": 4},
    ),
    "ids": Case(
        "vLLM, 151,669 of 151,936 ids may be sampled: generation", "generate_s",
        "--dtype float32 --sampler vllm --prompts-per-step 64 --rollouts-per-prompt 1 "
        "--max-completion-tokens 4",
        model={"vocab_size": 151_936, "hidden_size": 64}, padding=267,  # as Qwen3 has
    ),
}  # fmt: skip
BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "eos_token_id": 1,
    "pad_token_id": 0, "bos_token_id": None, "num_experts_per_tok": 2, "tie_word_embeddings": True,
}  # fmt: skip


def save_family(case: Case, folder: Path) -> None:
    """Student and teacher of unlike weights, prompts, and the slow verifier."""
    import tinylm
    import torch
    import transformers

    sizes = {"vocab_size": 512, **BASE, **case.model}
    if case.kind == "Phi":
        sizes = {**sizes, "tie_word_embeddings": False, "num_key_value_heads": 2}
    known = tinylm.WORDS
    words = [*known, *(f"w{i}" for i in range(sizes["vocab_size"] - case.padding - len(known)))]
    config = getattr(transformers, f"{case.kind}Config")(**sizes)
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{case.kind}ForCausalLM")(config)
        model.save_pretrained(folder / role)
        tinylm.tokenizer(words).save_pretrained(folder / role)
    tinylm.save_prompts(folder / "prompts.jsonl", 64)
    (folder / "judge.py").write_text(SLOW_VERIFIER)


def run(name: str, tree: Path, folder: Path) -> None:
    """Run the case in `tree`; prints the number, in seconds or bytes."""
    case = CASES[name]
    sys.path[:0] = [str(tree), str(tree / "methods"), str(tree / "tests")]
    from rows import resident, restart_peak

    method = importlib.import_module(case.method)
    collect, held, loaded = method.collect, [], []

    def watched(models: Any, *rest: Any) -> Any:
        """Before the rollouts of a step are made."""
        weights = models["student"].parameters()
        held.append(sum(w.grad.nbytes for w in weights if w.grad is not None))
        if not loaded:
            restart_peak()
            loaded.append(resident("VmRSS"))
        return collect(models, *rest)

    method.collect = watched
    os.chdir(folder)
    argv = ["--student", "student", "--teacher", "teacher", "--prompts", "prompts.jsonl"]
    method.main([*argv, *FLAGS.split(), *case.flags.split(), "--run-dir", "run"])
    if os.environ.get("RANK", "0") != "0":
        return
    if case.unit.endswith("_s"):
        text = Path("run/metrics.jsonl").read_text()
        steps = [json.loads(line) for line in text.splitlines()]
        found = statistics.median([each[case.unit] for each in steps if case.unit in each][1:])
    else:
        found = held[-1] if case.unit == "gradients" else resident("VmHWM") - loaded[0]
    print("RESULT", found, flush=True)


def main() -> None:
    """Measure the cases and append their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="an older tree, with its ops built")
    default = [name for name in CASES if name != "ids"]
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(args.child[0], *map(Path, args.child[1:]))
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import rows

    trees = {"after": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    for name in args.cases:
        case, found = CASES[name], {tree: [] for tree in trees}
        with tempfile.TemporaryDirectory() as folder:
            save_family(case, Path(folder))
            for _ in range(args.repeats):
                for which, tree in trees.items():
                    command = [sys.executable]
                    if case.processes > 1:
                        command += ["-m", "torch.distributed.run", "--standalone"]
                        command += ["--nproc-per-node", str(case.processes)]
                    command += [__file__, "--child", name, tree, folder]
                    found[which].append(float(rows.result_of(command)))
        table = []
        for which, values in found.items():
            table.append(rows.environment(commit=rows.commit_of(trees[which])) | {
                "case": name, "tree": which, "unit": "s" if case.unit.endswith("_s") else "bytes",
                "median": f"{statistics.median(values):.6g}", "least": f"{min(values):.6g}",
                "most": f"{max(values):.6g}", "repeats": args.repeats,
            })  # fmt: skip
            print(f"{name:10s} {which:7s} {shown(table[-1])}", flush=True)
        if args.save:
            rows.append(rows.RESULTS / "lines.csv", table, COLUMNS)


def shown(row: dict[str, Any]) -> str:
    """Median and range, with the unit."""
    values = [float(row[each]) for each in ("median", "least", "most")]
    if row["unit"] == "s":
        return "{:.3g} s [{:.3g}, {:.3g}]".format(*values)
    return "{:,.0f} MiB [{:,.0f}, {:,.0f}]".format(*(value / 2**20 for value in values))


def lines_table() -> str:
    """Markdown of the newest rows of both trees."""
    from rows import NOT_MEASURED, RESULTS, markdown, newest, read

    found = newest(read(RESULTS / "lines.csv"), ["case", "tree"])
    lines = []
    for name, case in CASES.items():
        pair = [found.get((name, tree)) for tree in ("before", "after")]
        lines.append([case.title, *(shown(row) if row else NOT_MEASURED for row in pair)])
    return str(markdown(["what a step paid for", "before", "after"], lines))


if __name__ == "__main__":
    main()
