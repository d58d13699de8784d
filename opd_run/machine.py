"""What a run runs on: versions, commit, hardware, the implementation of the ops."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import opd_ops
from opd_run import ranks


def environment() -> dict[str, Any]:
    """Versions, commit, hardware and op implementation: what a reader needs to repeat a run."""
    import numpy
    import transformers

    cuda = torch.cuda.is_available()
    commit, dirty = commit_of(Path(__file__).resolve().parents[1])
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "commit": commit,
        "dirty": dirty,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "num_devices": torch.cuda.device_count() if cuda else 0,
        "num_processes": ranks.world(),
        "num_threads": torch.get_num_threads(),
        "opd_ops": opd_ops.info(),
    }


def commit_of(tree: Path) -> tuple[str, bool]:
    """The commit of a checkout, or "unknown"; whether files differ from it."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(tree), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    rows = ":!benchmarks/results"  # what a benchmark writes is no change of the code
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", rows)
    return git("rev-parse", "HEAD"), changed != ""


def peak_memory_mib() -> float:
    """Peak of the process: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ops_line(info: dict[str, Any], device: str) -> str:
    """Which implementation of the ops runs on `device`; loud where it is not the compiled one."""
    plain = sorted(name for name, kinds in info["ops"].items() if kinds[device] != "cpp")
    if len(plain) == len(info["ops"]):
        why = "the extension is not built: make install"
        if info["compiled"]:
            why = (
                "OPD_OPS_IMPL"
                if info["OPD_OPS_IMPL"] in ("plain", "reference")
                else "no kernel in this build"
            )
        return f"! ops: plain PyTorch for all of them on {device} ({why})"
    isa = f" ({info['isa']})" if device == "cpu" else ""
    rest = f"; plain PyTorch: {', '.join(plain)}" if plain else ""
    return f"ops: compiled for {device}{isa}{rest}"
