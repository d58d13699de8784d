"""Twenty updates of a method on stored rollouts: no sampling, float32, CPU, one thread.

    python tests/pinned/trajectory.py rollouts          # sample and store the rollouts, once
    python tests/pinned/trajectory.py record METHOD...  # write METHOD.json; refuses a dirty tree

A change that moves a trajectory by more than 1e-4 changes numbers: it is marked [numerics] in
CHANGELOG.md with the differences, and recorded anew.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import opd  # noqa: E402

from opd_run import data, files, retry, setup, verifier  # noqa: E402

NUM_UPDATES = 20
FLAGS = ["--student", str(files.TINY / "student"), "--teacher", str(files.TINY / "teacher_base"),
         "--device", "cpu", "--lr", "3e-5", "--max-completion-tokens", "128"]  # fmt: skip


def store_rollouts() -> None:
    """16 completions of the tiny student, with verdicts and coins, into rollouts.safetensors."""
    args = opd.parse_args(FLAGS)
    loaded, tokenizer, facts = setup.models_of(opd, args)
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, facts, args)[:16]
    uniform = opd.uniforms(16, "rollouts", 0, args)
    rollout = opd.sample(loaded["student"], prompts, uniform, args)
    child = verifier.Verifier("exact", 10.0)
    opd.verify(rollout, tokenizer, child)
    child.close()
    tensors = {name: value for name, value in vars(rollout).items() if torch.is_tensor(value)}
    tensors["coin"] = opd.uniforms(16, "method", 0, args)[:, : rollout.completion_ids.shape[1]]
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "rollouts.safetensors")


def trajectory(method: str) -> dict[str, list[float]]:
    """Loss and gradient norm of each update, and the norms of all weights after the last."""
    module: Any = importlib.import_module(method)
    args = module.parse_args(FLAGS)
    loaded, _, _ = setup.models_of(module, args)
    prompt = data.Prompt((0,), "", "", "add", {})
    tensors = load_file(HERE / "rollouts.safetensors")
    extra = {"coin": tensors.pop("coin")}  # what sg_opd and tropd draw in `collect`
    prompts = [prompt] * len(tensors["verdict"])
    rollout = module.Rollout(prompts=prompts, **tensors, extra=extra)
    batch = [(m, module.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
    optimizer = module.make_optimizer(loaded["student"], args)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(NUM_UPDATES):
        metrics = module.train_step(loaded["student"], optimizer, batch, args, step)
        for name in found:
            found[name].append(metrics[name])
    found["weight_norms"] = [float(w.detach().norm()) for w in loaded["student"].parameters()]
    return found


def main() -> None:
    """Store rollouts, or record trajectories."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["rollouts"]:
        store_rollouts()
        return
    if sys.argv[1:2] != ["record"] or len(sys.argv) < 3:
        raise SystemExit(__doc__)
    sources = [f"methods/{method}.py" for method in sys.argv[2:]]
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", *sources, "opd_ops", "opd_run", "csrc"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if changed:
        raise SystemExit(f"the tree is dirty: commit what is to be recorded first\n{changed}")
    for method in sys.argv[2:]:
        text = json.dumps(trajectory(method), indent=1)
        (HERE / f"{method}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
