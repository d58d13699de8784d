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
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import opd  # noqa: E402

from opd_ops import models, runs  # noqa: E402

NUM_UPDATES = 20
FLAGS = ["--student", str(runs.TINY / "student"), "--teacher", str(runs.TINY / "teacher_base"),
         "--device", "cpu", "--lr", "3e-5", "--max-completion-tokens", "128"]  # fmt: skip


def store_rollouts() -> None:
    """16 completions of the tiny student, with verdicts and coins, into rollouts.safetensors."""
    args = opd.parse_args(FLAGS)
    tokenizer = models.prepare(opd.model_paths(args), args)
    prompts = opd.load_prompts(tokenizer, args)[0][:16]
    student = models.load_lm(args.student, True, args)
    rollout = opd.sample(student, prompts, opd.uniforms(16, 2, 0, args), args, 1.0)
    rollout.coin = opd.uniforms(16, 5, 0, args)[:, : rollout.coin.shape[1]].contiguous()
    verifier = runs.Verifier(opd.verifier_function("exact"), 10.0)
    opd.verify(rollout, tokenizer, verifier)
    verifier.close()
    tensors = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "prompts"}
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "rollouts.safetensors")


def trajectory(method: str) -> dict[str, list[float]]:
    """Loss and gradient norm of each update, and the norms of all weights after the last."""
    module: Any = importlib.import_module(method)
    args = module.parse_args(FLAGS)
    paths = module.model_paths(args)
    models.prepare(paths, args)
    loaded = models.load_models(paths, args)
    prompt = module.Prompt((0,), "", "", "add", {})
    tensors = load_file(HERE / "rollouts.safetensors")
    rollout = module.Rollout(prompts=[prompt] * len(tensors["verdict"]), **tensors)
    batch = [(m, module.score(loaded, m, args)) for m in module.micro_batches(rollout, args)]
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
        ["git", "-C", str(ROOT), "status", "--porcelain", *sources, "opd_ops", "csrc"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if changed:
        raise SystemExit(f"the tree is dirty: commit what is to be recorded first\n{changed}")
    for method in sys.argv[2:]:
        text = json.dumps(trajectory(method), indent=1)
        (HERE / f"{method}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
