"""Attacks by verifiers, and on the process that they run in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import opd
import pytest

from opd_run.verifier import Verifier

ROOT = Path(__file__).resolve().parents[2]
ATTACKS = """
import os, signal, subprocess, sys, time

def stubborn(text, answer, row):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return True

def parent(text, answer, row):
    child = subprocess.Popen(["sleep", "1000"])
    open(row["pid"], "w").write(str(child.pid))
    time.sleep(1000)

def exits(text, answer, row):
    sys.exit(0)

def keys(text, answer, row):
    return not [name for name in os.environ if name in row["names"]]


right = lambda text, answer, row: True
"""


@pytest.fixture(scope="module")
def attacks(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifiers") / "attacks.py"
    path.write_text(ATTACKS)
    return path


@pytest.fixture
def start():
    begun = []

    def started(spec, timeout_s=20.0):
        begun.append(Verifier(spec, timeout_s, 1))
        return begun[-1]

    yield started
    for each in begun:
        each.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, within_s: float = 30.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("leaves", ["import sys; sys.exit(0)", "raise SystemExit", "exit()"])
def test_a_module_that_exits_at_import_is_refused(tmp_path, leaves):
    (tmp_path / "leaves.py").write_text(f"{leaves}\ndef f(*_):\n    return True\n")
    with pytest.raises(SystemExit) as stop:
        opd.main(["--verifier", f"{tmp_path}/leaves.py:f", "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()


def test_a_lambda_serves_by_its_name(start, attacks):
    assert start(f"{attacks}:right")([("a", "", {}, True)]) == [1]


def test_what_an_answer_starts_ends_with_its_time(start, attacks, tmp_path):
    pool = start(f"{attacks}:parent", 3.0)
    assert pool([("a", "", {"pid": str(tmp_path / "pid")}, True)]) == [0]
    assert gone(int((tmp_path / "pid").read_text()))


def test_exit_in_an_answer(start, attacks):
    pool = start(f"{attacks}:exits")
    assert pool([("a", "", {}, True)] * 2) == [0, 0] and "SystemExit" in pool.last_error


def test_keys_and_tokens_stay_with_the_run(start, attacks, monkeypatch):
    names = ["OPD_TEACHER_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_token"]
    for name in names:
        monkeypatch.setenv(name, "secret")
    pool = start(f"{attacks}:keys")
    assert pool([("a", "", {"names": names}, True)]) == [1]
    assert pool([("a", "", {"names": ["PATH"]}, True)]) == [-1]


def test_no_folder_for_temporary_files_is_needed(attacks, tmp_path):
    """A TMPDIR that is too long for a socket, and then a cleaner that deletes it."""
    place = tmp_path / ("x" * 130)
    place.mkdir()
    script = f"""
import shutil
from opd_run.verifier import Verifier
pool = Verifier({f"{attacks}:right"!r}, 20.0, 1)
assert pool([("a", "", {{}}, True)]) == [1]
shutil.rmtree({str(place)!r})
pool._drop(pool._workers[0])
assert pool([("a", "", {{}}, True)]) == [1]
pool.close()
"""
    assert run(script, tmp_path, TMPDIR=str(place)) == ""


def test_a_run_ends_that_does_not_close_a_stubborn_verifier(attacks, tmp_path):
    script = f"""
from opd_run.verifier import Verifier
pool = Verifier({f"{attacks}:stubborn"!r}, 20.0, 1)
assert pool([("a", "", {{}}, True)]) == [1]
print(pool._workers[0].pid, file=open({str(tmp_path / "pids")!r}, "w"))
"""
    run(script, tmp_path)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def run(script: str, tmp_path: Path, **environment: str) -> str:
    """What a script that has to end well says on stderr."""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
