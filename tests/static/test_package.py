"""What is installed: an sdist that builds, and a wheel with which a copied method file runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOOK = "from setuptools import build_meta; build_meta.{}({!r})"


def run(command: list[str], folder: Path, **more: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment | more, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def checkout(folder: Path) -> Path:
    """The files that git tracks, in a folder whose name has a space."""
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_a_wheel_from_an_sdist_runs_a_copied_method_file(tmp_path):
    """Neither sees the checkout; the environment has the wheel and what it depends on."""
    out, source = str(tmp_path / "dist"), checkout(tmp_path / "a checkout")
    run([sys.executable, "-c", HOOK.format("build_sdist", out)], source)
    (archive,) = Path(out).glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "an unpacked", filter="data")
    shutil.rmtree(source)
    (unpacked,) = (tmp_path / "an unpacked").iterdir()
    run([sys.executable, "-c", HOOK.format("build_wheel", out)], unpacked, MAX_JOBS="2")
    shutil.rmtree(unpacked)
    (wheel,) = Path(out).glob("*.whl")

    run([sys.executable, "-m", "venv", str(tmp_path / "env")], tmp_path)
    python = str(tmp_path / "env/bin/python")
    run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], tmp_path)
    # On the path, a .pth file (that of an editable install) is not read: only packages are found.
    needed = {"PYTHONPATH": sysconfig.get_path("purelib"), "OPD_OPS_REQUIRE": "cpp"}
    where = run([python, "-c", "import opd_run; print(opd_run.__file__)"], tmp_path, **needed)
    assert Path(where.strip()).is_relative_to(tmp_path)
    shutil.copy(ROOT / "methods/opd.py", tmp_path / "mine.py")
    small = "--steps 1 --prompts-per-step 2 --rollouts-per-prompt 2 --eval-every 0 --device cpu"
    output = run([python, "mine.py", *small.split()], tmp_path, **needed)
    assert "step 1/1" in output and "opd_run/tiny/student" in output
    assert "ops: compiled for cpu" in output
