"""The memory estimate of `--dry-run` against the measured peak: rise of resident memory on a CPU.

    python benchmarks/bench_memory.py                # appends to benchmarks/results/memory.csv
    python benchmarks/bench_memory.py --shapes wide

Each shape is a random model of its own as student and teacher, in a process of its own. The rise
counts from before the first weight is read (`VmHWM` after a reset, less resident memory). A fixed
`MALLOC_MMAP_THRESHOLD_` keeps the C library from holding on to memory that torch has freed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
from rows import RESULTS, append, environment, resident, restart_peak, result_of  # noqa: E402

COLUMNS = (
    "shape,calculated_mib,measured_mib,calculated_over_measured,components_mib,device,torch,date"
)
COLUMNS += ",commit,dirty,command"
MODEL = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02}
SHAPES = {
    # name: (model, vocabulary, flags)
    "wide": (
        {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 4, "head_dim": 96},
        16000,
        ["--max-completion-tokens", "24", "--micro-batch-tokens", "512"],
    ),
    "deep": (
        {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 12, "head_dim": 48},
        4000,
        ["--max-completion-tokens", "40", "--micro-batch-tokens", "2048"],
    ),
    "checkpointed": (
        {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "head_dim": 96},
        8000,
        "--max-completion-tokens 40 --micro-batch-tokens 2048 --gradient-checkpointing".split(),
    ),
}  # fmt: skip
FLAGS = [
    "--prompts-per-step",
    "16",
    "--rollouts-per-prompt",
    "2",
    "--steps",
    "2",
    "--device",
    "cpu",
]
FLAGS += ["--eval-every", "0", "--save-every", "0", "--diagnostic-tokens", "0", "--overwrite"]


def measure(name: str, folder: Path) -> None:
    """Run two steps; print estimate and measured rise in bytes."""
    import opd
    import tinylm

    from opd_run import memory, setup
    from opd_run.run import Run

    config, vocabulary, flags = SHAPES[name]
    words = tinylm.WORDS + [f"w{i}" for i in range(vocabulary - len(tinylm.WORDS))]
    for seed, role in enumerate(("student", "teacher")):
        tinylm.save_model(folder / role, seed, words=words, **MODEL, **config)
    tinylm.save_prompts(folder / "prompts.jsonl", 16)
    argv = [*FLAGS, *flags, "--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    argv += ["--prompts", f"{folder}/prompts.jsonl", "--run-dir", f"{folder}/run"]
    args = opd.parse_args(argv)
    tokenizer, facts = setup.prepare(opd.model_paths(args), args, opd.render)
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, facts, args)
    longest = max(len(prompt.ids) for prompt in prompts)
    found = memory.estimate(opd.model_paths(args), longest, args)
    load, start = setup.load_models, []

    def marked(*args):
        restart_peak()
        start.append(resident("VmRSS"))
        return load(*args)

    setup.load_models = marked
    Run.save = lambda *args: None  # a checkpoint is no part of the formula
    opd.main(argv)
    components = " ".join(f"{key}={size // 2**20}" for key, size in found.items())
    print("RESULT", memory.peak(found), resident("VmHWM") - start[0], components)


def main() -> None:
    """Each shape in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            measure(args.child, Path(folder))
        return
    for name in args.shapes:
        found = result_of([sys.executable, __file__, "--child", name], OMP_NUM_THREADS="1")
        calculated, measured, components = found.split(" ", 2)
        row = {
            "shape": name, "calculated_mib": int(calculated) // 2**20,
            "measured_mib": int(measured) // 2**20,
            "calculated_over_measured": round(int(calculated) / int(measured), 3),
            "components_mib": components,
        }  # fmt: skip
        print(row)
        append(RESULTS / "memory.csv", [environment() | row], COLUMNS)


if __name__ == "__main__":
    main()
