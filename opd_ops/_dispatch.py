"""Which implementation of an op runs: the compiled library, or plain PyTorch."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("full_kl", "gated_kl", "gather_logp", "support_kl", "token_logp", "topk_logp")

_IMPL = os.environ.get("OPD_OPS_IMPL", "auto")
_IMPL = "plain" if _IMPL == "reference" else _IMPL  # its name until version 0.1
_REQUIRED = os.environ.get("OPD_OPS_REQUIRE", "")
_LIBRARY = Path(__file__).with_name("libopd_ops.so")
_error: str | None = None  # why nothing compiled runs

# Devices whose kernels know neither float64 nor a larger K: plain PyTorch takes those calls.
_LIMITED: tuple[str, ...] = ("cuda",)
_LIMITED_K = 1024


def _build_info() -> Any:
    return importlib.import_module("opd_ops._build_info")


def _load() -> bool:
    """Load the compiled ops if they are wanted and there; else say why not in `_error`."""
    global _error
    if _IMPL not in ("auto", "plain", "cpp"):
        raise ImportError(f"OPD_OPS_IMPL: expected auto, plain or cpp, got {_IMPL!r}")
    if _REQUIRED not in ("", "cpp"):
        raise ImportError(f"OPD_OPS_REQUIRE: expected cpp or nothing, got {_REQUIRED!r}")
    if _IMPL == "plain":
        _error = "OPD_OPS_IMPL=plain"
    elif not _LIBRARY.exists():
        _error = f"{_LIBRARY.name} was not built"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
            _build_info().isa()  # refuses a wrong OPD_OPS_ISA
            return True
        except (OSError, ImportError, RuntimeError) as error:
            _error = f"{_LIBRARY.name} does not load: {error}"
    if _REQUIRED == "cpp" or _IMPL == "cpp":
        raise ImportError(
            f"the compiled ops of opd_ops are required, but {_error}; "
            "build them with: python -m pip install -e . --no-build-isolation"
        )
    return False


LOADED = _load()


# All ops are compiled for the same devices.
_DEVICES: tuple[str, ...] = ()
if LOADED:
    _DEVICES = ("cpu", "cuda") if _build_info().cuda_targets else ("cpu",)


def info() -> dict[str, Any]:
    """What runs, for the first log line and `args.json`.

    `ops` gives the implementation ("cpp" or "plain") of each op per device; `notice` is a
    sentence that a program should show loudly, or None.
    """
    ops = {
        name: {device: "cpp" if device in _DEVICES else "plain" for device in ("cpu", "cuda")}
        for name in OPS
    }
    result: dict[str, Any] = {
        "version": __import__("opd_ops").__version__,
        "torch": torch.__version__,
        "OPD_OPS_IMPL": _IMPL,
        "OPD_OPS_REQUIRE": _REQUIRED,
        "compiled": LOADED,
        "isa": None,
        "best_isa": None,
        "compiler": None,
        "flags": None,
        "built_with_torch": None,
        "cuda_targets": None,
        "threads": torch.get_num_threads(),
        "notice": None if LOADED else f"opd_ops runs as plain PyTorch, slowly: {_error}",
        "ops": ops,
    }
    if LOADED:
        build = _build_info()
        result["isa"], result["best_isa"] = build.isa(), build.best_isa()
        for key in ("compiler", "flags", "built_with_torch", "cuda_targets"):
            result[key] = getattr(build, key)
    return result


def compiled(name: str, tensor: Tensor, k: int = 0) -> bool:
    """Whether the compiled op takes this call; plain PyTorch takes it otherwise."""
    device, limited = tensor.device.type, ""
    if device not in _DEVICES:
        if _IMPL == "cpp":
            raise RuntimeError(
                f"{name}: OPD_OPS_IMPL=cpp, but it is not compiled for {device} tensors"
            )
        return False
    if device in _LIMITED and tensor.dtype == torch.float64:
        limited = "float64"
    elif device in _LIMITED and isinstance(k, int) and k > _LIMITED_K:
        limited = f"k = {k} > {_LIMITED_K}"
    if limited and not torch.compiler.is_compiling():
        warnings.warn(
            f"{name}: the compiled op for {device} does not take {limited}; plain PyTorch runs",
            stacklevel=4 if k else 3,
        )
    return not limited
