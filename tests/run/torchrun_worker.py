"""Runs several commands one after the other in the processes that torchrun has started.

torchrun --nproc-per-node 2 torchrun_worker.py JOBS.json    # [[method, [flag, ...], FILE?], ...]
"""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]

import torch  # noqa: E402

from opd_run import ranks  # noqa: E402


def run(method: str, flags: list[str], stored: str | None = None) -> None:
    """A run; where rollouts are `stored`, one for each step, of these instead of new ones."""
    module = importlib.import_module(method)
    collect = module.collect
    if stored:
        replayed = torch.load(stored, weights_only=False)
        module.collect = lambda *inputs: (replayed[inputs[-1]], {})
    module.main(flags)
    module.collect = collect


if __name__ == "__main__":
    end, start = ranks.end, ranks.start
    ranks.end = lambda: None  # the processes stay together for all of the jobs
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        ranks.start = (lambda args: None) if number else start
        run(*job)
    end()
