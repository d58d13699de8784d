"""Every CUDA source compiles for both targets, and no kernel keeps registers in memory.

Needs nvcc, not a GPU: `make nvcc` installs it as Python packages. With OPD_REQUIRE_NVCC=1, which
CI sets, a missing nvcc is a failure.
"""

import importlib.util
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("opd_setup", ROOT / "setup.py")
BUILD = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BUILD)
NVCC, NVCC_HELP = BUILD.find_nvcc(), BUILD.NVCC_HELP
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def need_nvcc():
    if NVCC is None and os.environ.get("OPD_REQUIRE_NVCC") != "1":
        pytest.skip(f"no nvcc, so the CUDA sources were not compiled; make nvcc, or {NVCC_HELP}")
    assert NVCC is not None, f"OPD_REQUIRE_NVCC=1, but no nvcc was found: {NVCC_HELP}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Source -> (object, what ptxas says); two compilers at once."""
    need_nvcc()
    folder = tmp_path_factory.mktemp("cuda")
    flags = [*BUILD.NVCC_FLAGS, *BUILD.target_flags(["80", "90"])]

    def one(source):
        target = folder / (Path(source).stem + ".o")
        command = [NVCC, f"-ccbin={BUILD.find_compiler()[0]}", *flags, "-Xptxas=-v"]
        done = subprocess.run(
            [*command, "-c", ROOT / source, "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" not in done.stderr, done.stderr
        return source, (target, done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(one, BUILD.CUDA_KERNELS))


def test_no_kernel_spills(compiled):
    kernels = 0
    for source, (_, report) in compiled.items():
        found = list(PTXAS.finditer(report))
        targets = {match["target"] for match in found}
        assert targets == {"sm_80", "sm_90"}, (source, targets)
        for match in found:
            kernels += 1
            assert match["stores"] == match["loads"] == "0", (source, match.groupdict())
            assert int(match["registers"]) <= 64, (source, match.groupdict())  # two blocks of 512
    assert kernels >= 80


def test_launchers_link_without_cuda_libraries(compiled, tmp_path):
    """The launchers need no CUDA header, and the library no CUDA library to load."""
    torch_root = Path(torch.__file__).parent
    target, library = tmp_path / "ops.o", tmp_path / "lib.so"
    stable = [f"-DTORCH_TARGET_VERSION={BUILD.TORCH_TARGET}", "-isystem", torch_root / "include"]
    source = ROOT / "csrc" / "cuda" / "ops.cpp"
    for command in (
        [*BUILD.find_compiler(), *BUILD.FLAGS, *stable, "-c", source, "-o", target],
        [
            *(NVCC, "-shared", "-cudart=static", f"-ccbin={BUILD.find_compiler()[0]}"),
            *(target, *(built for built, _ in compiled.values()), "-o", library),
            *(f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10", "-Xlinker=-zdefs"),
            f"-L{Path(NVCC).parents[1]}/lib",
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True)
    assert "libtorch_cpu" in done.stdout and "cuda" not in done.stdout.split("RUNPATH")[0]
