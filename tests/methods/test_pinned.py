"""Nothing moved: twenty updates on stored rollouts against the committed trajectory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/pinned"))
import trajectory  # noqa: E402

METHODS = sorted(path.stem for path in (ROOT / "tests/pinned").glob("*.json"))


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_is_the_recorded_one(method):
    """The largest difference (relative above 1) is below 1e-4 and, against drift, the mean 2e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = trajectory.trajectory(method)
    finally:
        torch.set_num_threads(threads)
    recorded = json.loads((ROOT / f"tests/pinned/{method}.json").read_text())
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        want = np.array(values)
        difference = np.abs(np.array(found[name]) - want) / np.maximum(np.abs(want), 1.0)
        assert difference.max() < 1e-4, (name, difference.max())
        assert difference.mean() < 2e-5, (name, difference.mean())
