"""Runs several commands one after the other in the processes that torchrun has started.

torchrun --nproc-per-node 2 torchrun_worker.py JOBS.json    # [[method, [flag, ...]], ...]
"""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]

from opd_ops import ranks  # noqa: E402

if __name__ == "__main__":
    end, start = ranks.end, ranks.start
    ranks.end = lambda: None  # the processes stay together for all of the jobs
    for number, (method, flags) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        ranks.start = (lambda args: None) if number else start
        importlib.import_module(method).main(flags)
    end()
