"""Shared test set-up: hypothesis profiles, thread counts, and no silent skips of the op tier."""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "forks")]

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("few", max_examples=5, derandomize=True, **_COMMON)
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part I/N`: so that several processes share the tests."""
    parser.addoption("--part", default="0/1", help="I/N: every Nth of the tests, from the Ith on")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests for a machine or package that few have run only where `-m` names them (`-m gpu`)."""
    named = set(re.findall(r"\w+", config.option.markexpr))
    away = {"gpu", "engines", "browser", "smollm2", "agents"} - named
    kept = [item for item in items if not any(map(item.get_closest_marker, away))]
    part, parts = map(int, config.option.part.split("/"))
    kept = kept[part::parts]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
    needs = any(item.get_closest_marker("gpu") for item in items)
    if needs and not (config.option.collectonly or torch.cuda.is_available()):
        raise pytest.UsageError("tests marked gpu were asked for, but torch sees no CUDA device")
