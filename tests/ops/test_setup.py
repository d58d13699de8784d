"""What setup.py says when something is missing, and how it chooses about CUDA."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(monkeypatch):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "OPD_OPS_CUDA", "OPD_OPS_CUDA_TARGETS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("opd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide(monkeypatch, *names):
    """As if these modules and programs were not installed."""
    find_spec, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in names else find_spec(name, *a)
    )
    monkeypatch.setattr(
        shutil, "which", lambda name, *a: None if name in names else which(name, *a)
    )


def refusal(function, *arguments):
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "OPD_OPS_SKIP_BUILD=1 installs without compiled ops" in text
    return text


def test_missing_torch_is_answered_with_the_command(build, monkeypatch):
    hide(monkeypatch, "torch")
    text = refusal(build.NinjaBuild(Distribution()).build_extensions)
    assert "torch not found in" in text and "pip install 'torch>=2.11'" in text
    assert "pip install -e . --no-build-isolation" in text


def test_missing_ninja(build, monkeypatch):
    hide(monkeypatch, "ninja")
    assert "ninja not found; install it with: python -m pip install" in refusal(build.find_ninja)


def test_missing_compiler(build, monkeypatch):
    hide(monkeypatch, "c++", "g++", "clang++")
    assert "no C++ compiler found (looked for c++, g++ and clang++" in refusal(build.find_compiler)
    monkeypatch.setenv("CXX", "nowhere++")
    assert "CXX=nowhere++: not found" in refusal(build.find_compiler)


def test_cuda_is_chosen_by_torch_and_nvcc_never_by_a_device(build, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/some/nvcc")
    assert build.choose_cuda("13.0") == ("/some/nvcc", "")
    assert build.choose_cuda(None) == (None, "this torch has no CUDA")
    monkeypatch.setenv("OPD_OPS_CUDA", "1")
    assert build.choose_cuda(None) == ("/some/nvcc", "")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    text = refusal(build.choose_cuda, None)
    assert "OPD_OPS_CUDA=1, but no nvcc" in text and "pip install nvidia-cuda-nvcc" in text
    monkeypatch.delenv("OPD_OPS_CUDA")
    nvcc, why = build.choose_cuda("13.0")
    assert nvcc is None and why.startswith("no nvcc")
    monkeypatch.setenv("OPD_OPS_CUDA", "0")
    assert build.choose_cuda("13.0") == (None, "OPD_OPS_CUDA=0")
    monkeypatch.setenv("OPD_OPS_CUDA", "yes")
    assert "OPD_OPS_CUDA: expected 0, 1" in refusal(build.choose_cuda, None)
    assert "cuda.is_available" not in (ROOT / "setup.py").read_text()


def test_cuda_targets(build, monkeypatch):
    assert build.cuda_targets() == ["80", "90"]
    monkeypatch.setenv("OPD_OPS_CUDA_TARGETS", "sm_90a;86")
    assert build.cuda_targets() == ["86", "90a"]
    assert build.target_flags(["86", "90a"])[-1] == "-gencode=arch=compute_90a,code=compute_90a"
    monkeypatch.setenv("OPD_OPS_CUDA_TARGETS", "hopper")
    assert "OPD_OPS_CUDA_TARGETS: expected" in refusal(build.cuda_targets)


def test_nvcc_is_found_where_it_is(build, monkeypatch, tmp_path):
    for place in ("home/bin", "wheels/nvidia/cu13/bin"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "nvcc").touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda path: path.is_relative_to(tmp_path))
    wheels = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheels/nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: wheels)
    assert build.find_nvcc() == str(tmp_path / "wheels/nvidia/cu13/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(tmp_path / "home/bin/nvcc")
