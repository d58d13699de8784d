"""The planning table of docs/scaling.md: calculated, nothing in it has been run.

    python benchmarks/plan.py

Memory by `opd_ops.memory`; time from operations and bytes at an assumed share of a device's data
sheet: 989e12 bfloat16 operations/s and 3.35e12 bytes/s (one H100 SXM), of which 40 % and 60 %.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import opd  # noqa: E402
from opd_ops.models import num_parameters  # noqa: E402

from opd_ops import memory, ranks  # noqa: E402

FLOPS, BANDWIDTH = 0.4 * 989e12, 0.6 * 3.35e12
PROMPT, COMPLETION, ROLLOUTS = 200, 4096, 512


def qwen3(
    layers: int, hidden: int, inner: int, heads: int, kv: int, tied: bool, **more: Any
) -> Any:
    kind = transformers.Qwen3MoeConfig if "num_experts" in more else transformers.Qwen3Config
    return kind(
        vocab_size=151936, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40960, **more,
    )  # fmt: skip


MODELS = {
    "Qwen3-0.6B": qwen3(28, 1024, 3072, 16, 8, True),
    "Qwen3-4B": qwen3(36, 2560, 9728, 32, 8, True),
    "7B": qwen3(28, 3584, 18944, 28, 4, False),
    "Qwen3-32B": qwen3(64, 5120, 25600, 64, 8, False),
    "Qwen3-235B-A22B": qwen3(
        94, 4096, 12288, 64, 4, False, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=1536, norm_topk_prob=True,
    ),
}  # fmt: skip
ACTIVE = {"Qwen3-235B-A22B": 22e9}
PLANS = [  # student, teacher, devices, flags
    ("Qwen3-0.6B", "Qwen3-4B", 1, ""),
    ("Qwen3-0.6B", "Qwen3-4B", 8, ""),
    ("7B", "Qwen3-32B", 8, "--shard fsdp --shard-frozen"),
    ("Qwen3-32B", "Qwen3-235B-A22B", 64, "--shard fsdp --shard-frozen"),
]


def main() -> None:
    """Print the table."""
    print("| student <- teacher | devices | flags | weights, gradients, optimizer | teacher |"
          " phase | peak | tokens/s a device | slowest phase |")  # fmt: skip
    print("|" + "---|" * 9)
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            config.save_pretrained(f"{folder}/{name}")
        for student, teacher, world, flags in PLANS:
            ranks.world = lambda world=world: world
            size = f"--max-completion-tokens {COMPLETION} --prompts-per-step {ROLLOUTS // 4}"
            size += " --sampler-batch-size 64 --gradient-checkpointing"
            args = opd.parse_args([
                "--student", f"{folder}/{student}", "--teacher", f"{folder}/{teacher}",
                "--dtype", "bfloat16", "--teacher-dtype", "bfloat16", *size.split(), *flags.split(),
            ])  # fmt: skip
            found = memory.estimate(opd.model_paths(args), PROMPT, args)
            gib = {key: value / 2**30 for key, value in found.items()}
            resident = gib["student weights"] + gib["gradients"] + gib["optimizer"]
            peak = memory.peak(found) / 2**30
            phase = peak - resident - gib["teacher weights"]
            P, Q = num_parameters(MODELS[student]), num_parameters(MODELS[teacher])
            rows = min(64, -(-ROLLOUTS // world))
            context = PROMPT + COMPLETION / 2
            text = MODELS[student]
            cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * 128 * context
            seconds = {  # for one token, on one device
                "generate": max((2 * P / rows + cache) / BANDWIDTH, 2 * P / FLOPS),
                "teacher": 2 * ACTIVE.get(teacher, Q) / FLOPS,
                "student": 8 * P / FLOPS,  # a forward pass more than 6: checkpointing
            }
            slowest = max(seconds, key=seconds.__getitem__)
            share = seconds[slowest] / sum(seconds.values())
            print(
                f"| {student} <- {teacher} | {world} | `{flags or 'none'}` | {resident:.1f} GiB | "
                f"{gib['teacher weights']:.1f} GiB | {phase:.1f} GiB | {peak:.1f} GiB | "
                f"{1 / sum(seconds.values()):,.0f} | {slowest} ({share:.0%}) |"
            )


if __name__ == "__main__":
    main()
