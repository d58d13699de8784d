"""Builds the compiled ops: `opd_ops/libopd_ops.so` and the module `opd_ops/_build_info`.

The op library uses torch's stable ABI and no Python symbol; Python loads it with
`torch.ops.load_library`. Everything is compiled by one ninja file. Environment:

    CXX                   the C++ compiler (default: c++, g++ or clang++, the first found)
    MAX_JOBS              compile jobs at once (default: ninja's)
    OPD_OPS_ISA           at run time: portable, avx2 or avx512 forces a lower instruction set
    OPD_OPS_SKIP_BUILD=1  install without compiled ops; the reference ops in plain PyTorch run
    OPD_OPS_CUDA          1: CUDA kernels or an error; 0: none; default: if torch has CUDA and there
                          is an nvcc. No GPU is asked for, so a machine without one can build.
    OPD_OPS_CUDA_TARGETS  default "80 90"; the last one also as PTX, for later devices
    CUDA_HOME             where to look for nvcc first; then PATH, /usr/local/cuda, Python packages
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
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "opd_ops.libopd_ops"
TINY = ("student", "teacher", "prompts")  # of assets/tiny: what a method runs without arguments
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest that the library runs in
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
KERNEL_FLAGS = ["-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CUDA_KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_HELP = (
    "python -m pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime, "
    "each of the CUDA version of torch"
)


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


def find_nvcc() -> str | None:
    places = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    candidates = [Path(place) / "bin" / "nvcc" for place in places]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    wheels = importlib.util.find_spec("nvidia")
    for root in wheels.submodule_search_locations or [] if wheels else []:
        candidates += sorted(Path(root).glob("*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if path.exists()), None)


def cuda_targets() -> list[str]:
    """Compute capabilities without the dot, in ascending order."""
    wanted = os.environ.get("OPD_OPS_CUDA_TARGETS", "80 90")
    targets = wanted.replace(",", " ").replace(";", " ").replace("sm_", "").split()
    if not targets or not all(target.rstrip("af").isdigit() for target in targets):
        fail(f"OPD_OPS_CUDA_TARGETS: expected numbers like '80 90', got {wanted!r}")
    return sorted(targets, key=lambda target: int(target.rstrip("af")))


def target_flags(targets: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


def choose_cuda(torch_cuda: str | None) -> tuple[str | None, str]:
    """nvcc, or None and why there are no CUDA kernels."""
    wanted = os.environ.get("OPD_OPS_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"OPD_OPS_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None, "OPD_OPS_CUDA=0"
    if wanted == "" and torch_cuda is None:
        return None, "this torch has no CUDA"
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        fail(f"OPD_OPS_CUDA=1, but no nvcc was found (CUDA_HOME names its place): {NVCC_HELP}")
    return nvcc, "" if nvcc else f"no nvcc: {NVCC_HELP}"


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0] or "of unknown version"


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
        nvcc, why_not = choose_cuda(torch.version.cuda)
        targets = cuda_targets() if nvcc else []
        described = {
            "OPD_COMPILER": compiler_name,
            "OPD_FLAGS": " ".join(FLAGS),
            "OPD_TORCH": torch.__version__,
            "OPD_CUDA_TARGETS": " ".join(f"sm_{target}" for target in targets),
        }
        python = [sysconfig.get_path("include"), pybind11.get_include()]
        units = [  # source, flags
            ("csrc/bindings.cpp", [*stable, "-DOPD_CUDA"] if nvcc else stable),
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
        cuda = f"none ({why_not})"
        if nvcc:
            version = nvcc_version(nvcc)
            cuda = f"{described['OPD_CUDA_TARGETS']} by nvcc {version}"
            if (torch.version.cuda or version).split(".")[0] != version.split(".")[0]:
                cuda += f" (torch has CUDA {torch.version.cuda}: the driver must know both)"
            units.append(("csrc/cuda/ops.cpp", stable))
            flags = [f"-ccbin={compiler[0]}", *NVCC_FLAGS, *target_flags(targets)]
            units += [(source, flags) for source in CUDA_KERNELS]
        print(
            f"opd_ops: building {len(units)} translation units with {compiler_name} against torch "
            f"{torch.__version__}; CPU kernels: portable{', avx2, avx512' if x86 else ''}; "
            f"CUDA kernels: {cuda}",
            flush=True,
        )

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {escape(shlex.join(compiler))}",
            f"nvcc = {escape(shlex.join([nvcc or 'nvcc']))}",
            "rule compile\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            "rule cuda\n  command = $nvcc -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            "rule cudalink\n  command = $nvcc -shared -cudart=static $in -o $out $libs\n"
            "  description = link $out",
            "rule link\n  command = $cxx -shared -pthread $in -o $out $libs\n"
            "  description = link $out",
        ]
        objects = {}
        for source, flags in units:
            path = Path(source)
            objects[source] = build / f"{path.parent.name}_{path.stem}.o"
            rule = "cuda" if path.suffix == ".cu" else "compile"
            flags = flags if rule == "cuda" else [*FLAGS, *flags]
            lines.append(
                f"build {escape(objects[source])}: {rule} {escape(ROOT / source)}\n"
                f"  flags = {escape(shlex.join(flags))}"
            )
        outputs = {
            ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        parts = {name: [] for name in outputs}
        for source, path in objects.items():
            owner = "opd_ops._build_info" if source == "csrc/build_info.cpp" else LIBRARY
            parts[owner].append(escape(path))
        libs = {
            LIBRARY: f"{shlex.quote(f'-L{torch_root}/lib')} -ltorch_cpu -lc10",
            "opd_ops._build_info": "-undefined dynamic_lookup" if sys.platform == "darwin" else "",
        }
        for name, path in outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            rule = "cudalink" if nvcc and name == LIBRARY else "link"
            cuda = [f"-ccbin={compiler[0]}", f"-L{Path(nvcc).parents[1] / 'lib'}"] if nvcc else []
            more = " " + shlex.join(cuda) if cuda else ""
            lines.append(
                f"build {escape(path)}: {rule} {' '.join(parts[name])}\n"
                f"  libs = {escape(libs[name] + (more if rule == 'cudalink' else ''))}"
            )
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja, "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            fail("the compiler failed, see above")


class WithTinyModels(build_py):
    """Copies the embedded pair into a wheel; an editable install finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in TINY:
                to = Path(self.build_lib) / "opd_run" / "tiny" / name
                shutil.copytree(ROOT / "assets" / "tiny" / name, to, dirs_exist_ok=True)


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def escape(value: object) -> str:
    """For a ninja file."""
    return (
        str(value).replace("$", "$$").replace(":", "$:")
        if not isinstance(value, Path)
        else str(value).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")
    )


def main() -> None:
    if os.environ.get("OPD_OPS_SKIP_BUILD") == "1":
        print(
            "opd_ops: OPD_OPS_SKIP_BUILD=1, NOTHING IS COMPILED: the ops run as plain PyTorch, "
            "correct but slow",
            file=sys.stderr,
            flush=True,
        )
        setup(cmdclass={"build_py": WithTinyModels})
    else:
        setup(
            ext_modules=[Extension(LIBRARY, []), Extension("opd_ops._build_info", [])],
            cmdclass={"build_ext": NinjaBuild, "build_py": WithTinyModels},
        )


if __name__ == "__main__":  # tests import the functions above
    main()
