"""`opd.main` in the processes that torchrun has started; fails unless all end with equal weights.

torchrun --nproc-per-node 2 vllm_worker.py [FLAG ...]
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]

import opd  # noqa: E402

from opd_run import ranks  # noqa: E402

if __name__ == "__main__":
    end, make, students = ranks.end, opd.make_optimizer, []
    ranks.end = lambda: None  # the processes stay together until the comparison
    opd.make_optimizer = lambda student, args: (students.append(student), make(student, args))[1]
    opd.main()
    weights = [ranks.whole(each).detach() for each in students[0].parameters()]
    for other in ranks.gather(weights):
        assert all(map(torch.equal, other, weights)), "ranks differ"
    end()
