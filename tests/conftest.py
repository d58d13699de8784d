"""Shared test set-up: hypothesis profiles, thread counts, and no silent skips of the op tier."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu`, `engines` and `browser` tests run only where asked for by marker (`-m gpu`)."""
    asked = config.option.markexpr
    away = [name for name in ("gpu", "engines", "browser") if name not in asked]
    deselected = [item for item in items if any(map(item.get_closest_marker, away))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    if "gpu" in asked and not torch.cuda.is_available():
        raise pytest.UsageError("tests marked gpu were asked for, but torch sees no CUDA device")
