"""Short runs of every fork, of what moves tensors between devices, and of every type of model.

    python tests/gpu/each_run.py --device cuda                   # every case
    python tests/gpu/each_run.py --device cuda --only forks types
    python tests/gpu/each_run.py --device cpu --case "opd full jsd" --folder DIR

A case is a run of two steps, a model type one of one step, on the device and on the CPU, in
float32: their first losses and gradient norms have to agree, since the sampled tokens are the same.
Model types run in bfloat16 on the device as well. A case is a process of its own and prints one
line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "methods", "forks", "tests")]
import modelzoo  # noqa: E402
import tinylm  # noqa: E402
import torch  # noqa: E402

from opd_run import command  # noqa: E402
from opd_run.console import RunError  # noqa: E402

TOLERANCE = 2e-3  # of loss and gradient norm, relative above 1
WITHOUT_TEACHER = ("grpo", "opsa")
VERIFIER = (
    "def odd(completion, answer, row, ended):\n    return sum(map(ord, completion)) % 2 == 0\n"
)
OTHER_PROMPT = "--teacher-prompt {{prompt}}{{answer}}?"
FORKS = {
    "agent_opd": "--max-turns 2 --max-turn-tokens 8",
    "drift_gate": "--block-tokens 2",
    "eopd": "--uncertain-above 0.5 --support-size 8",
    "grpo": "", "opsa": "", "power_opd": "",
    "reopold": "--floor-weight 0.45",
    "reward_opd": "", "supervised": "",
}  # fmt: skip
FLAGS = {
    "opd": "",
    "opd full reverse": "--objective full",
    "opd full forward": "--objective full --divergence forward",
    "opd full jsd": "--objective full --divergence jsd --jsd-beta 0.3",
    "opd discount": "--discount 0.9 --loss-temperature 2",
    "opd updates": "--updates-per-rollout 2",
    "opd adapters": "--lora-rank 4",
    "opd teaches itself": f"--teacher live {OTHER_PROMPT}",
    "opd average": f"--teacher ema:0.9 {OTHER_PROMPT}",
    "opd adapters teach": f"--teacher live --lora-rank 4 {OTHER_PROMPT}",
    "opd offload": "--teacher-offload",
    "opd teacher elsewhere": "--teacher-device cpu",
    "opd full elsewhere": "--objective full --teacher-device cpu",
    "opd checkpointing": "--gradient-checkpointing",
    "opd sampler": "--top-p 0.8 --top-k 10 --temperature 0.7 --eval-temperature 0",
    "opd greedy": "--top-k 1",
    "opd small batches": "--sampler-batch-size 3 --micro-batch-tokens 64",
    "opd evaluates teacher": "--eval-teacher",
    "sg_opd": "--teacher-phase-steps 1 --teacher-share 0.5",
    "sg_opd reference": "--gate-target reference --reference {folder}/other",
    "exopd": "--reference {folder}/other --reward-scale 1.25",
    "exopd offload": "--reference {folder}/other --teacher-offload",
    "topk_opd": "--support-size 8",
    "topk_opd bucket": "--support-size 8 --tail bucket --divergence jsd",
    "topk_opd student": "--support-size 8 --support student --no-renormalise",
    "topk_opd special": "--support-size 8 --mask-special-tokens paper",
    "tropd": "--outlier-support 8",
    "tropd clip": "--outlier clip --no-guidance",
    "tropd scalar": "--outlier-support 8 --outlier-form scalar --guidance-form scalar",
}
"""Name -> flags; its first word is the method."""


def cases() -> dict[str, list[str]]:
    """Group -> names."""
    return {
        "flags": list(FLAGS), "forks": list(FORKS), "other": ["resume", "fsdp"],
        "types": [f"type {name}" for name in modelzoo.TYPES],
    }  # fmt: skip


def first_step(folder: Path) -> dict[str, float]:
    """What a run has logged of its first step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if "loss" in row)


def compared(one: Path, two: Path) -> str:
    """Loss and gradient norm of two runs, in words; raises where they differ."""
    words = []
    for name in ("loss", "grad_norm"):
        a, b = first_step(one)[name], first_step(two)[name]
        if not abs(a - b) <= TOLERANCE * max(1.0, abs(b)):
            raise RuntimeError(f"{name} {a} there, {b} on the CPU")
        words.append(f"{name} {a:.5g}")
    return ", ".join(words)


def run(module: str, folder: Path, name: str, device: str, kind: str, more: list[str]) -> Path:
    """A run of a method or fork, whose errors are raised; its folder."""
    plainly(module, [*flags_of(folder, name, device, kind), *more])
    return folder / name


def flags_of(folder: Path, name: str, device: str, kind: str) -> list[str]:
    """That every run has."""
    flags = f"--prompts {folder}/prompts.jsonl --device {device} --dtype {kind} "
    flags += f"--teacher-dtype {kind} --save-every 0 --run-dir {folder}/{name} --overwrite"
    return flags.split()


def plainly(module: str, flags: list[str]) -> None:
    """`main` of a method or fork, without the end of the process that an error is."""
    try:
        importlib.import_module(module).main.__wrapped__(flags)
    finally:
        while command.held:
            command.held.pop().close()


def a_run(module: str, folder: Path, device: str, given: str) -> str:
    """A case of FLAGS or FORKS."""
    tinylm.save_family(folder)
    tinylm.save_model(folder / "other", 2)
    (folder / "verifier.py").write_text(VERIFIER)
    more = "--max-completion-tokens 16 --prompts-per-step 4 --rollouts-per-prompt 2 --steps 2 "
    more += "--eval-every 2 --eval-samples 2 --test-prompts {folder}/prompts.jsonl "
    more += "--student {folder}/student " + given
    if module != "agent_opd":  # whose environment judges
        more += " --verifier {folder}/verifier.py:odd"
    if module not in WITHOUT_TEACHER and "--teacher " not in more:
        more += " --teacher {folder}/teacher"
    flags = more.format(folder=folder).split()
    there = run(module, folder, "there", device, "float32", flags)
    flags = [flag for flag in flags if flag != "--teacher-offload"]  # from a GPU alone
    return compared(there, run(module, folder, "here", "cpu", "float32", flags))


def a_type(name: str, folder: Path, device: str) -> str:
    """A type of model, and another one as its teacher."""
    path, teacher = (modelzoo.save(folder / f"model{seed}", name, seed) for seed in (0, 1))
    tinylm.save_prompts(folder / "prompts.jsonl")
    more = "--max-completion-tokens 12 --prompts-per-step 4 --rollouts-per-prompt 2 --steps 1 "
    more += f"--eval-every 0 --student {path} --teacher {teacher} --objective full"
    try:
        here = run("opd", folder, "here", "cpu", "float32", more.split())
        refused = ""
    except RunError as error:
        refused = str(error).partition("\n")[0]
    try:
        there = run("opd", folder, "there", device, "float32", more.split())
    except RunError as error:
        if refused:
            return f"refused, as on the CPU: {error}".partition("\n")[0][:160]
        raise
    if refused:
        raise RuntimeError(f"runs, and is refused on the CPU: {refused}")
    found = compared(there, here)
    run("opd", folder, "half", device, "bfloat16", more.split())
    return found + f"; in bfloat16 {first_step(folder / 'half')['grad_norm']:.5g}"


def resume(folder: Path, device: str) -> str:
    """A run that is resumed has the weights of one that was not interrupted."""
    tinylm.save_family(folder)
    more = "--max-completion-tokens 16 --prompts-per-step 4 --steps 3 --eval-every 0 "
    more += f"--student {folder}/student --teacher {folder}/teacher --keep-checkpoints 0 "
    run("opd", folder, "run", device, "float32", [*more.split(), "--save-every", "1"])
    whole = tinylm.weights(folder, "run")
    plainly("opd", ["--resume", f"{folder}/run/checkpoints/step_1"])
    if not tinylm.equal(whole, tinylm.weights(folder, "run")):
        raise RuntimeError("a resumed run has other weights")
    return "the same weights, bit for bit"


def fsdp(folder: Path, device: str) -> str:
    """Sharded on one process, beside a run that is not."""
    tinylm.save_family(folder)
    more = "--max-completion-tokens 16 --prompts-per-step 4 --steps 2 --eval-every 0 "
    more += f"--student {folder}/student --teacher {folder}/teacher"
    plain = run("opd", folder, "plain", device, "float32", more.split())
    flags = [*flags_of(folder, "sharded", device, "float32"), *more.split()]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    start += ["1", str(ROOT / "methods/opd.py"), *flags, "--shard", "fsdp", "--shard-frozen"]
    subprocess.run(start, check=True)
    return compared(folder / "sharded", plain)


def one(name: str, folder: Path, device: str) -> str:
    """A case, in this process."""
    first, _, rest = name.partition(" ")
    if first == "type":
        return a_type(rest, folder, device)
    if name in FORKS or name in FLAGS:
        return a_run(first, folder, device, (FORKS | FLAGS)[name])
    return {"resume": resume, "fsdp": fsdp}[name](folder, device)


def started(name: str, folder: Path, args: argparse.Namespace) -> bool:
    """A case in a process of its own; prints its line."""
    folder.mkdir(parents=True)
    call = [sys.executable, __file__, "--device", args.device, "--case", name]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run([*call, "--folder", str(folder)], capture_output=True, text=True,
                              env=env, timeout=args.limit_s)  # fmt: skip
        code, text = done.returncode, done.stderr + done.stdout * (done.returncode == 0)
    except subprocess.TimeoutExpired as error:
        code, text = 1, f"{error.stdout or b''!r}\nlonger than {args.limit_s:g} s"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name.replace(' ', '_')}.txt").write_text(text)
    last = (text.strip().splitlines() or ["no output"])[-1]
    print(f"{'ok' if code == 0 else 'FAILED'} {name}: {last[:300]}", flush=True)
    return code == 0


def main() -> int:
    """The exit code: 0 where no case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--case", help="this one alone, in this process, in --folder")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, help="a file for the output of each case")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--limit-s", type=float, default=120.0, help="of a case")
    args = parser.parse_args()
    if args.case:
        print(one(args.case, args.folder, args.device))
        return 0
    names = [name for group in args.only for name in cases()[group]]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.jobs) as pool:
        places = [Path(root) / str(i) for i in range(len(names))]
        results = list(pool.map(lambda job: started(*job, args), zip(names, places)))
    print(f"{torch.__version__}, {args.device}: {sum(results)} of {len(results)} cases are right")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
