"""Builds the compiled ops: `opd_ops/libopd_ops.so` and the module `opd_ops/_build_info`.

The op library uses torch's stable ABI and no Python symbol; Python loads it with
`torch.ops.load_library`. Everything is compiled by one ninja file. Environment:

    CXX                   the C++ compiler (default: c++, g++ or clang++, the first found)
    MAX_JOBS              compile jobs at once (default: ninja's)
    OPD_OPS_ISA           at run time: portable, avx2 or avx512 forces a lower instruction set
    OPD_OPS_SKIP_BUILD=1  install without compiled ops; the reference ops in plain PyTorch run
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "opd_ops.libopd_ops"
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest that the library runs in
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
KERNEL_FLAGS = ["-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


def fail(reason: str) -> None:
    raise SystemExit(f"opd_ops: {reason}\nOPD_OPS_SKIP_BUILD=1 installs without compiled ops.")


def find_compiler() -> list[str]:
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            fail(f"CXX={os.environ['CXX']}: not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    fail("no C++ compiler found (looked for c++, g++ and clang++; CXX names another one)")
    raise AssertionError


def find_ninja() -> str:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.exists():
            return str(path)
    found = shutil.which("ninja")
    if found is None:
        fail("ninja not found; install it with: python -m pip install ninja")
    return found


class NinjaBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libopd_ops"):  # asked for by full name and by last part
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extensions(self) -> None:
        missing = [name for name in ("torch", "pybind11") if not importlib.util.find_spec(name)]
        if missing:
            fail(
                f"{' and '.join(missing)} not found in {sys.executable}; run: "
                f"python -m pip install 'torch>=2.11' 'pybind11>=2.13' ninja 'setuptools>=77' "
                "wheel && python -m pip install -e . --no-build-isolation"
            )
        import pybind11
        import torch

        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
            fail(f"needs torch >= 2.11, found {torch.__version__}")
        compiler, ninja = find_compiler(), find_ninja()
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
        compiler_name = version.stdout.splitlines()[0] if version.stdout else " ".join(compiler)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        torch_root = Path(torch.__file__).parent
        torch_include = ["-isystem", str(torch_root / "include")]
        stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *torch_include]
        described = {
            "OPD_COMPILER": compiler_name,
            "OPD_FLAGS": " ".join(FLAGS),
            "OPD_TORCH": torch.__version__,
            "OPD_CUDA_TARGETS": "",
        }
        python = [sysconfig.get_path("include"), pybind11.get_include()]
        units = [  # source, flags
            ("csrc/bindings.cpp", stable),
            ("csrc/cpu/ops.cpp", stable),
            ("csrc/cpu/k_portable.cpp", [*KERNEL_FLAGS, *torch_include]),
            (
                "csrc/build_info.cpp",
                [
                    *(flag for path in python for flag in ("-isystem", path)),
                    *(f"-D{key}={quoted(value)}" for key, value in described.items()),
                ],
            ),
        ]
        if x86:
            units.append(("csrc/cpu/k_avx2.cpp", [*KERNEL_FLAGS, *AVX2]))
            units.append(("csrc/cpu/k_avx512.cpp", [*KERNEL_FLAGS, *AVX512]))
        print(
            f"opd_ops: building {len(units)} translation units with {compiler_name} against torch "
            f"{torch.__version__}; CPU kernels: portable{', avx2, avx512' if x86 else ''}; "
            "CUDA kernels: none",
            flush=True,
        )

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {escape(shlex.join(compiler))}",
            "rule compile\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            "rule link\n  command = $cxx -shared -pthread $in -o $out $libs\n"
            "  description = link $out",
        ]
        objects = {}
        for source, flags in units:
            objects[source] = build / (Path(source).stem + ".o")
            lines.append(
                f"build {escape(objects[source])}: compile {escape(ROOT / source)}\n"
                f"  flags = {escape(shlex.join([*FLAGS, *flags]))}"
            )
        outputs = {
            ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        parts = {name: [] for name in outputs}
        for source, path in objects.items():
            owner = "opd_ops._build_info" if source == "csrc/build_info.cpp" else LIBRARY
            parts[owner].append(escape(path))
        libs = {
            LIBRARY: f"-L{torch_root / 'lib'} -ltorch_cpu -lc10",
            "opd_ops._build_info": "-undefined dynamic_lookup" if sys.platform == "darwin" else "",
        }
        for name, path in outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines.append(
                f"build {escape(path)}: link {' '.join(parts[name])}\n  libs = {escape(libs[name])}"
            )
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja, "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            fail("the compiler failed, see above")


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def escape(value: object) -> str:
    """For a ninja file."""
    return (
        str(value).replace("$", "$$").replace(":", "$:")
        if not isinstance(value, Path)
        else str(value).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")
    )


if os.environ.get("OPD_OPS_SKIP_BUILD") == "1":
    print(
        "opd_ops: OPD_OPS_SKIP_BUILD=1, NOTHING IS COMPILED: the ops run as plain PyTorch, "
        "correct but slow",
        file=sys.stderr,
        flush=True,
    )
    setup()
else:
    setup(
        ext_modules=[Extension(LIBRARY, []), Extension("opd_ops._build_info", [])],
        cmdclass={"build_ext": NinjaBuild},
    )
