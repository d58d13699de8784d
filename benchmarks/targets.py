"""Published cells that a reader with a GPU can run: commands, numbers, memory, and what came out.

    python benchmarks/targets.py --commands           # what to run, seed by seed
    python benchmarks/targets.py --memory             # the estimate of --dry-run, without a network
    python benchmarks/targets.py --add TARGET RUN     # rows of a run into results/targets.csv
    python benchmarks/targets.py                      # the table

The memory needs configurations alone: SHAPES are those of the models, written into empty folders.
Nothing of this has been run here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "methods")]
from rows import RESULTS, append, markdown, read, spread  # noqa: E402

from opd_run import memory  # noqa: E402
from opd_run.files import read_metrics  # noqa: E402

FILE = RESULTS / "targets.csv"
FIELDS = "target,seed,step,accuracy,minutes,peak_gib,device,commit,dirty,date,command"
SCORE = "eval/student/avg@1"


@dataclass(frozen=True)
class Target:
    """A published cell.

    Attributes:
        flags: of `script`, without seed and folder.  published: accuracy after so many steps.
        longest_prompt: tokens, for the estimate.  minutes: what to expect, and whose word it is.
    """

    source: str
    script: str
    flags: str
    published: dict[str, float]
    longest_prompt: int
    minutes: str
    num_seeds: int = 1

    def command(self, name: str, seed: int) -> str:
        """The whole command."""
        folder = f"--seed {seed} --run-dir runs/targets/{name}-{seed}"
        return f"python {self.script} {self.flags} {folder}"


THINKING = """--chat-template-args '{"enable_thinking": false}'"""
MATH = (
    "--student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-4B-Instruct-2507 "
    "--prompts nvidia/Nemotron-Cascade-RL-Math --test-prompts HuggingFaceH4/MATH-500 "
    "--prompt-template \"{problem} Let's think step by step and output the final answer within "
    r'\boxed{}." '
    f"--verifier math {THINKING} "
    "--prompts-per-step 128 --rollouts-per-prompt 1 --max-completion-tokens 8192 --lr 1e-6 "
    "--weight-decay 0.01 --adam-beta2 0.999 --steps 250 --eval-every 25 --eval-samples 1 "
    "--eval-temperature 0 --sampler vllm --gradient-checkpointing --save-every 25"
)
SIMOPD = "SimOPD@d7eb7a7, the cell of arXiv:2607.13399"
TARGETS = {
    "math-opd": Target(
        SIMOPD, "methods/opd.py", MATH, {"0": 0.468, "25": 0.604, "50": 0.636, "250": 0.506}, 1024,
        "to step 50: 120 to 180, inferred from 82 s a step on two A100",
    ),
    "math-topk_opd": Target(
        SIMOPD, "methods/topk_opd.py", f"{MATH} --support-size 32 --top-p 1",
        {"0": 0.468, "not said": 0.598}, 1024, "to step 50: 240 to 360, inferred likewise",
    ),
    "gsm8k-context": Target(
        "agentscope-ai/TuFT@102eefd, examples/on_policy_distillation",
        "methods/opd.py",
        "--student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-1.7B "
        "--prompts 'openai/gsm8k:main:train[:256]' --test-prompts openai/gsm8k:main:test "
        "--teacher-prompt benchmarks/targets.py:tuft_teacher "
        "--system 'You are a helpful assistant. Solve the math problem.' "
        f"--verifier math {THINKING} --lora-rank 16 --lr 1e-4 "
        "--prompts-per-step 8 --rollouts-per-prompt 4 --max-completion-tokens 256 "
        "--max-grad-norm inf --adam-beta2 0.999 --steps 16 --eval-every 16 --eval-samples 1 "
        "--eval-temperature 0 --eval-teacher --sampler vllm "
        "--gradient-checkpointing --micro-batch-tokens 4096",
        {"0": 0.63, "16": 0.72}, 512, "some; \"$1 on an A100\"", 3,
    ),
}  # fmt: skip
SHAPES = {  # of the published configurations
    f"Qwen/Qwen3-{name}": {"hidden_size": width, "intermediate_size": inner,
                           "num_hidden_layers": layers, "num_attention_heads": heads,
                           "tie_word_embeddings": tied}
    for name, width, inner, layers, heads, tied in (
        ("0.6B", 1024, 3072, 28, 16, True), ("1.7B", 2048, 6144, 28, 16, True),
        ("4B", 2560, 9728, 36, 32, True), ("8B", 4096, 12288, 36, 32, False),
    )
}  # fmt: skip
SHAPES["Qwen/Qwen3-1.7B-Base"] = SHAPES["Qwen/Qwen3-1.7B"]
SHAPES["Qwen/Qwen3-4B-Instruct-2507"] = SHAPES["Qwen/Qwen3-4B"]


@functools.cache
def tuft_texts() -> dict[str, Any]:
    """The teacher's system message and examples, out of a clone of TuFT beside the command."""
    path = Path("TuFT/examples/on_policy_distillation/dataset.py")
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (each.id for each in targets if isinstance(each, ast.Name)):
            if name in ("TEACHER_SYSTEM", "FEWSHOT") and isinstance(
                node, ast.Assign | ast.AnnAssign
            ):
                found[name] = ast.literal_eval(node.value or ast.Constant(None))
    return found


def tuft_teacher(
    row: dict[str, Any], completions: Any, verdicts: Any, index: Any
) -> list[dict[str, str]]:
    """For --teacher-prompt: their system message, their worked examples as turns, the question."""
    texts = tuft_texts()
    turns = [{"role": "system", "content": texts["TEACHER_SYSTEM"]}]
    for question, answer in texts["FEWSHOT"]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": row["question"]}]


def peak_gib(script: str, flags: str, longest_prompt: int) -> float:
    """What `--dry-run` counts on a GPU, from SHAPES, which an unknown teacher has of the student.

    While a vLLM engine generates, it takes `--sampler-memory` of the card, whatever it has: then
    everything but sampling.
    """
    import transformers

    method = importlib.import_module(Path(script).stem)
    words = shlex.split(flags.replace("--sampler vllm", "--sampler own"))
    args = method.parse_args([*words, "--device", "cpu", "--dtype", "bfloat16",
                              "--teacher-dtype", "bfloat16"])  # fmt: skip
    args.device = args.teacher_device = "cuda"  # no card is asked
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, path in method.model_paths(args).items():
            if path.startswith("ema:") or Path(path).is_dir():
                paths[name] = path
                continue
            paths[name] = f"{folder}/{path}"
            config = transformers.Qwen3Config(
                **SHAPES.get(path, SHAPES[args.student]), num_key_value_heads=8, head_dim=128,
                vocab_size=151936, dtype="bfloat16",
            )  # fmt: skip
            config.save_pretrained(paths[name])
        args.student = paths["student"]
        found = memory.estimate(paths, longest_prompt, args)
    sampling = ("generate", "evaluate") if "--sampler vllm" in flags else ()
    return memory.peak({k: v for k, v in found.items() if not k.startswith(sampling)}) / 2**30


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """A run of a target as rows: one for each evaluation."""
    said = json.loads((folder / "args.json").read_text())
    seen, seconds, found, peak = said["environment"], 0.0, [], 0.0
    for row in read_metrics(folder):
        seconds += row.get("step_s", 0.0)
        peak = max(peak, row.get("peak_memory_mib", 0.0) / 1024)
        if SCORE in row:
            found.append({
                "target": name, "seed": said["args"]["seed"], "step": row["step"],
                "accuracy": round(row[SCORE], 4), "minutes": round(seconds / 60, 1),
                "peak_gib": round(peak, 1), "device": seen["device"],
                "commit": seen["commit"][:10], "dirty": seen["dirty"],
                "command": TARGETS[name].command(name, said["args"]["seed"]),
            })  # fmt: skip
    return found


def table() -> str:
    """A Markdown table: published numbers, and what readers' runs gave."""
    rows, lines = read(FILE), []
    for name, target in TARGETS.items():
        mine = [row for row in rows if row["target"] == name]
        for step, score in target.published.items():
            ours = [float(row["accuracy"]) for row in mine if row["step"] == step]
            shown = f"{spread(ours)}, {len(ours)} seeds" if ours else "not run"
            lines.append([f"`{name}`", step, f"{score:.3f}", shown])
    return str(markdown(["target", "step", "published", "here"], lines))


def main() -> None:
    """Print, estimate, or add rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--add", nargs=2, metavar=("TARGET", "RUN"), help=", ".join(TARGETS))
    args = parser.parse_args()
    if args.add:
        name, folder = args.add
        if name not in TARGETS:
            parser.error(f"--add: no target {name}; there are {', '.join(TARGETS)}")
        append(FILE, rows_of(name, Path(folder)), FIELDS)
    for name, target in TARGETS.items() if args.commands or args.memory else ():
        if args.memory:
            size = peak_gib(target.script, target.flags, target.longest_prompt)
            print(f"{name}: {size:.1f} GiB; minutes: {target.minutes}")
        else:
            print("\n".join(target.command(name, seed) for seed in range(target.num_seeds)))
    if not (args.commands or args.memory):
        print(table())


if __name__ == "__main__":
    main()
