"""The CUDA kernels, their launchers and their gradients, run on the CPU by csrc/cuda/emulation.

The library is built with the launchers of CUDA registered for CPU tensors, put into a copy of the
package, and the tests of the row ops run again with it, in a process of their own.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["bindings.cpp", *(f"cuda/{path.name}" for path in ROOT.glob("csrc/cuda/*.c*[!h]"))]
RUN = """
import sys; sys.path.insert(0, sys.argv[1])
import opd_ops, pytest
assert opd_ops.__file__.startswith(sys.argv[1]) and opd_ops.info()["compiled"]
opd_ops._dispatch._LIMITED = ("cpu",)  # the kernels here are those of CUDA
sys.exit(pytest.main(sys.argv[2:]))
"""


def builder():
    spec = importlib.util.spec_from_file_location("opd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_all(sources, folder, output, flags, link):
    """Two compilers at once; raises with the compiler's words. No compiler is an error, no skip."""
    compiler = builder().find_compiler()

    def one(source):
        target = folder / (source.name + ".o")
        command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", *flags]
        command += ["-isystem", f"{Path(torch.__file__).parent}/include", "-x", "c++"]
        done = subprocess.run(
            [*command, "-c", source, "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, sources))
    done = subprocess.run(
        [*compiler, *objects, "-o", output, *link], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    copy = folder / "opd_ops"
    copy.mkdir()
    for path in ROOT.glob("opd_ops/*"):
        if path.suffix == ".py" or path.name.startswith("_build_info"):
            shutil.copy(path, copy)
    flags = ["-DOPD_EMULATION", f"-DTORCH_TARGET_VERSION={builder().TORCH_TARGET}", "-Wall"]
    link = ["-shared", f"-L{Path(torch.__file__).parent}/lib", "-ltorch_cpu", "-lc10"]
    sources = [ROOT / "csrc" / source for source in SOURCES]
    compile_all(sources, folder, copy / "libopd_ops.so", [*flags, "-Wno-unknown-pragmas"], link)
    return folder


def run(package, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(package), "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OPD_OPS_REQUIRE": "cpp", "OPD_OPS_IMPL": "auto",
             "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "dev", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    return done.stdout


def test_every_source_is_built():
    assert {Path(source).stem for source in SOURCES} == {
        *("bindings", "ops", "gather_logp", "topk_logp", "full_kl", "gather_linear", "scale")
    }


def test_kernels(package):
    """What only the CUDA kernels have: fallbacks, buffers, order of threads, foreign memory."""
    run(package, "tests/ops/emulated_cases.py")


def test_row_ops(package):
    """All tests of the row ops, full vocabulary in three types included, last thread first."""
    wanted = "not slow"
    tests = "not number_of_threads and not (adversarial and 3000)"
    run(package, "-m", wanted, "-k", tests, "tests/ops/test_rows.py", OPD_EMULATION_ORDER="reverse")


def test_scale(package):
    run(package, "-k", "test_scale", "tests/ops/test_losses.py")


def test_gradients_and_the_head(package):
    tests = "undefined or double_backward or support or token_logp or gated"
    files = ["tests/ops/test_autograd.py", "tests/ops/test_head.py"]
    run(package, "-m", "not slow", "-k", f"({tests}) and not memory and not gradcheck", *files)


BROKEN = r"""
#include "device.cuh"
using namespace opd::cuda;
void neighbour(int* out, int how) {
  __shared__ int value[kThreads];
  if (how == 2 && threadIdx.x == 7) return;
  value[threadIdx.x] = threadIdx.x;
  if (how > 0) __syncthreads();
  out[threadIdx.x] = value[threadIdx.x ^ 1];
  __syncthreads();
  value[threadIdx.x] = -1;
}
int main(int, char** argv) {
  static int result[kThreads], wrong = 0;
  int* out = result;
  for (int turn = 0; turn < 2; ++turn)
    OPD_LAUNCH(neighbour, dim3(1), kThreads, 0, nullptr, out, atoi(argv[1]));
  for (int i = 0; i < kThreads; ++i) wrong += out[i] != (i ^ 1);
  return wrong > 0;
}
"""


def test_the_emulator_sees_missing_barriers(tmp_path):
    """A kernel with its barrier is right; without it wrong; one that not all reach ends it."""
    source = tmp_path / "broken.cpp"
    source.write_text(BROKEN)
    flags = ["-DOPD_EMULATION", f"-I{ROOT}/csrc/cuda"]
    compile_all([source], tmp_path, tmp_path / "broken", flags, [])
    codes = {}
    for how in "102":
        done = subprocess.run([tmp_path / "broken", how], capture_output=True, text=True)
        codes[how] = (done.returncode, done.stderr.strip())
    assert codes["1"] == (0, "") and codes["0"][0] == 1
    assert codes["2"][0] < 0 and "never reach a barrier" in codes["2"][1]
