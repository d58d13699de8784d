"""Attacks by verifiers, and on the process that they run in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import opd
import pytest

from opd_run import verdicts
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

def own_session(text, answer, row):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    open(row["pid"], "w").write(str(child.pid))
    time.sleep(1000)

def forks(text, answer, row):
    if text == "fork" and os.fork() == 0:
        sys.exit(0)
    time.sleep(0.2)
    return text != "2"

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


PROMPTERS = {
    "at import": ("import sys; sys.exit(0)", 2, "ImportError: it ends in SystemExit"),
    "asked before the run": ("def f(*_):\n    raise SystemExit", 1, "SystemExit"),
    "asked in a step": ("def f(row, said, *_):\n    return exit() if said else 'a'", 1, "SystemEx"),
}


@pytest.mark.parametrize("when", PROMPTERS)
def test_a_teachers_prompt_that_exits_is_an_error(tmp_path, when, capsys):
    """Not the end of the run with exit code 0."""
    text, code, words = PROMPTERS[when]
    (tmp_path / "leaves.py").write_text(text + "\n")
    flags = f"--teacher-prompt {tmp_path}/leaves.py:f --run-dir {tmp_path}/run --steps 1 "
    flags += "--prompts-per-step 1 --rollouts-per-prompt 1 --max-completion-tokens 2 --eval-every 0"
    with pytest.raises(SystemExit) as stop:
        opd.main(flags.split())
    assert stop.value.code == code and words in capsys.readouterr().err


def test_a_lambda_serves_by_its_name(start, attacks):
    assert start(f"{attacks}:right")([("a", "", {}, True)]) == [1]


@pytest.mark.parametrize("how", ["parent", "own_session"])
def test_what_an_answer_starts_ends_with_its_time(start, attacks, tmp_path, how):
    pool = start(f"{attacks}:{how}", 3.0)
    assert pool([("a", "", {"pid": str(tmp_path / "pid")}, True)]) == [0]
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_a_module_starts_ends_with_the_run(tmp_path):
    (tmp_path / "serves.py").write_text(
        "import subprocess\nchild = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "f = lambda text, answer, row: str(child.pid) == text\n"
    )
    pool = Verifier(f"{tmp_path}/serves.py:f", 20.0, 1)
    (child,) = verdicts._below(pool._close.peek()[2][1].pid)
    assert pool([(str(child), "", {}, True)]) == [1] and alive(child)
    pool.close()
    assert gone(child)


def test_a_fork_of_an_answer_does_not_answer(start, attacks):
    """Its word would be taken for that of the next answer, and so on to the end."""
    items = [(text, "", {}, True) for text in ("fork", "2", "1", "fork", "2")]
    assert start(f"{attacks}:forks")(items) == [1, -1, 1, 1, -1]


def test_a_fork_at_import_does_not_answer(start, tmp_path):
    text = "import os\nos.fork()\ndef f(text, answer, row):\n    return text == '1'\n"
    (tmp_path / "forks.py").write_text(text)
    assert start(f"{tmp_path}/forks.py:f")([(each, "", {}, True) for each in "121"]) == [1, -1, 1]


@pytest.mark.parametrize(
    ("value", "word"),
    [("numpy.int64(1)", 1), ("numpy.float32(0)", -1), ("numpy.bool_(True)", 1),
     ("decimal.Decimal(1)", 1), ("decimal.Decimal('sNaN')", 0), ("numpy.array([True])", 0)],
)  # fmt: skip
def test_numbers_of_all_kinds_through_the_process(start, tmp_path, value, word):
    text = f"import decimal, numpy\ndef f(text, answer, row):\n    return {value}\n"
    (tmp_path / "numbers_of.py").write_text(text)
    pool = start(f"{tmp_path}/numbers_of.py:f")
    assert pool([("a", "", {}, True)]) == [word] and "died" not in pool.last_error


def test_a_file_of_the_working_directory_named_as_a_library(start, tmp_path, monkeypatch):
    """Its process imports the library for itself, and the file as the verifier."""
    (tmp_path / "json.py").write_text("def loads(text, answer, row):\n    return text == 'mine'\n")
    monkeypatch.chdir(tmp_path)
    assert start("json.py:loads")([(each, "", {}, True) for each in ("mine", "[]")]) == [1, -1]


def test_a_module_that_never_ends_to_import_does_not_outlive_the_run(tmp_path):
    note = tmp_path / "pid"
    text = f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nwhile True:\n    pass\n"
    (tmp_path / "spins.py").write_text(text)
    script = f"from opd_run.verifier import Verifier\nVerifier({f'{tmp_path}/spins.py:f'!r}, 9.0)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while not note.is_file() or not note.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert gone(int(note.read_text()))


def test_exit_in_an_answer(start, attacks):
    pool = start(f"{attacks}:exits")
    assert pool([("a", "", {}, True)] * 2) == [0, 0] and "SystemExit" in pool.last_error


def test_keys_and_tokens_stay_with_the_run(start, attacks, monkeypatch):
    names = ["OPD_TEACHER_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_token"]
    names += ["SSH_AUTH_SOCK", "MYSQL_PWD", "GITHUB_PAT", "KEYRING_PASSPHRASE"]
    for name in names:
        monkeypatch.setenv(name, "secret")
    pool = start(f"{attacks}:keys")
    assert pool([("a", "", {"names": names}, True)]) == [1]
    assert pool([("a", "", {"names": ["PATH"]}, True)]) == [-1]
    assert pool([("a", "", {"names": ["PWD"]}, True)]) == [-1 if "PWD" in os.environ else 1]


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
