"""Attacks by verifiers, and on the process that they run in."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy
import opd
import pytest

from opd_run import console, verifier

ROOT = Path(__file__).resolve().parents[2]
ATTACKS = """
import os, signal, subprocess, sys, time

def hang(text, answer, row):
    time.sleep(1000)

def spin(text, answer, row):
    open(row["pid"], "w").write(str(os.getpid()))
    while True:
        pass

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

def own(text, answer, row):
    return os.getpid() == os.getpgid(0) and "opd" not in sys.modules

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
        function = verifier.verifier_function(spec) if isinstance(spec, str) else spec
        begun.append(verifier.Verifier(function, timeout_s))
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


@pytest.mark.parametrize(
    ("answer", "right"),
    [(True, True), (False, False), (numpy.True_, True), (1, True), (0.0, False), (1.0, True),
     (numpy.int64(0), False), (numpy.float32(1), True), (Fraction(1), True)],
)  # fmt: skip
def test_a_verdict(answer, right):
    assert verifier.verdict_of(answer) is right


@pytest.mark.parametrize(
    "answer",
    ["False", "True", "", (False, "why"), [], {"correct": False}, -1, 2, 0.3, float("nan"), None,
     numpy.array([True]), asyncio.sleep(0)],
)  # fmt: skip
def test_no_verdict_is_said_with_its_type(answer):
    with pytest.raises(TypeError, match=f"got {type(answer).__name__} "):
        verifier.verdict_of(answer)


def test_no_verdict_is_unverified(start, tmp_path, capsys):
    (tmp_path / "text.py").write_text("def f(*_):\n    return 'False'\n")
    assert start(f"{tmp_path}/text.py:f")([("a", "7", {})]) == [0]
    assert "expected True or False, got str 'False'" in capsys.readouterr().out


def test_a_file_is_read_by_its_path(start, tmp_path):
    """json.py is not the standard library's json."""
    (tmp_path / "json.py").write_text("def loads(*_):\n    return True\n")
    assert start(f"{tmp_path}/json.py:loads")([("no json", "", {})]) == [1]
    with pytest.raises(console.RunError, match="no file"):
        verifier.verifier_function(f"{tmp_path}/re.py:match")


@pytest.mark.parametrize("leaves", ["import sys; sys.exit(0)", "raise SystemExit", "exit()"])
def test_a_module_that_exits_at_import_is_refused(tmp_path, leaves):
    (tmp_path / "leaves.py").write_text(f"{leaves}\ndef f(*_):\n    return True\n")
    with pytest.raises(SystemExit) as stop:
        opd.main(["--verifier", f"{tmp_path}/leaves.py:f", "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2


def test_async_functions_are_refused(tmp_path):
    (tmp_path / "late.py").write_text("async def f(*_):\n    return True\n")
    with pytest.raises(console.RunError, match="async"):
        verifier.verifier_function(f"{tmp_path}/late.py:f")


def test_a_lambda_serves_by_its_name_and_is_refused_without(start, attacks):
    assert start(f"{attacks}:right")([("a", "", {})]) == [1]
    with pytest.raises(console.RunError, match="another process"):
        verifier.Verifier(lambda *_: True, 1.0)


def test_what_an_answer_starts_ends_with_its_time(start, attacks, tmp_path):
    child = start(f"{attacks}:parent", 3.0)
    assert child([("a", "", {"pid": str(tmp_path / "pid")})]) == [0]
    assert gone(int((tmp_path / "pid").read_text()))


def test_exit_in_an_answer(start, attacks):
    child = start(f"{attacks}:exits")
    assert child([("a", "", {})] * 2) == [0, 0] and "SystemExit" in child.last_error


def test_keys_and_tokens_stay_with_the_run(start, attacks, monkeypatch):
    names = ["OPD_TEACHER_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_token"]
    for name in names:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    child = start(f"{attacks}:keys")
    assert child([("a", "", {"names": names})]) == [1]
    assert child([("a", "", {"names": ["TOKENIZERS_PARALLELISM"]})]) == [-1]


def test_a_helper_that_is_killed_is_started_again(start, attacks):
    child = start(f"{attacks}:right")
    assert child([("a", "", {})]) == [1]
    os.kill(child._helper.pid, signal.SIGKILL)
    os.kill(child._pid, signal.SIGKILL)
    assert gone(child._helper.pid)
    assert child([("a", "", {})] * 3) == [0, 1, 1]


def test_no_folder_for_temporary_files_is_needed(attacks, tmp_path):
    """A TMPDIR that is too long for a socket, and then a cleaner that deletes what is in it."""
    place = tmp_path / ("x" * 130)
    place.mkdir()
    script = f"""
import shutil
from opd_run import verifier
if __name__ == "__main__":
    child = verifier.Verifier(verifier.verifier_function({f"{attacks}:exits"!r}), 20.0)
    child([("a", "", {{}})])
    shutil.rmtree({str(place)!r})
    child._end_child()
    child._start()
    assert child([("a", "", {{}})]) == [0] and "SystemExit" in child.last_error
    child.close()
"""
    assert run(script, tmp_path, TMPDIR=str(place)) == ""


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


def test_a_script_without_the_main_guard(attacks, tmp_path):
    """The child does not run the caller's script: neither for ever nor twice."""
    script = f"""
with open({str(tmp_path / "count")!r}, "a") as file:
    file.write("x")
from opd_run import verifier
def mine(text, answer, row):
    return text == answer
for function in (verifier.verifier_function({f"{attacks}:right"!r}), verifier.verify_exact):
    child = verifier.Verifier(function, 20.0)
    assert child([("1", "1", {{}})]) == [1]
    child.close()
"""
    assert run(script, tmp_path) == ""
    assert (tmp_path / "count").read_text() == "x"


def test_a_function_of_the_script_itself(tmp_path):
    script = """
from opd_run import verifier
def mine(text, answer, row):
    return text == answer
if __name__ == "__main__":
    child = verifier.Verifier(mine, 20.0)
    assert child([("1", "1", {}), ("2", "1", {})]) == [1, -1]
    child.close()
"""
    assert run(script, tmp_path) == ""


def test_a_run_ends_that_does_not_close_a_stubborn_verifier(attacks, tmp_path):
    script = f"""
from opd_run import verifier
child = verifier.Verifier(verifier.verifier_function({f"{attacks}:stubborn"!r}), 20.0)
assert child([("a", "", {{}})]) == [1]
print(child._pid, child._helper.pid, file=open({str(tmp_path / "pids")!r}, "w"))
"""
    run(script, tmp_path)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_kill_9_of_a_run_ends_a_verifier_that_spins(attacks, tmp_path):
    (tmp_path / "script.py").write_text(f"""
from opd_run import verifier
child = verifier.Verifier(verifier.verifier_function({f"{attacks}:spin"!r}), 1000.0)
child([("a", "", {{"pid": {str(tmp_path / "pid")!r}}})])
""")
    place = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        end = time.monotonic() + 120
        while not (place.exists() and place.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert gone(int(place.read_text()))
