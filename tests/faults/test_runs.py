"""Attacks on runs and their folders: what must neither be lost nor mixed up."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import opd
import pytest
import tinylm
import torch
from tinylm import weights

from opd_run import console, files
from opd_run import run as runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("attacked"))


def flags(folder, run, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 2"
    sizes += " --save-every 1 --eval-every 0 --keep-checkpoints 0 --device cpu --lr 1e-2"
    return [*named, "--run-dir", str(folder / run), *sizes.split(), *more]


@pytest.fixture(scope="module")
def whole(folder):
    """A run of two steps, which tests copy."""
    opd.main(flags(folder, "whole"))
    return folder / "whole"


@pytest.fixture
def copy(folder, whole, request):
    """A copy of it, whose newest checkpoint is that of step 1 if the test goes on from there."""
    path = folder / request.node.name.replace("/", "_")[:60]
    shutil.copytree(whole, path)
    shutil.rmtree(path / "checkpoints/step_2")
    return path


def fails(argv: list[str], code: int, *words: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        opd.main(argv)
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == code, text
    assert all(word in text for word in words), text
    return text


def bits(path: Path, step: int) -> dict:
    return weights(path.parent, path.name, step)


def same(one: dict, two: dict) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def losses(path: Path) -> list[tuple]:
    return [(row["step"], row["loss"]) for row in files.read_metrics(path) if "loss" in row]


# ------------------------------------------------------------------------------- wrong results
def test_overwrite_empties_a_linked_folder_of_checkpoints(folder, whole, tmp_path):
    run = folder / "linked"
    shutil.copytree(whole, run)
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    opd.main(flags(folder, "linked", "--overwrite", "--lr", "3e-2", "--steps", "1"))
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step_1"]
    assert (run / "checkpoints").is_symlink()
    assert not same(bits(run, 1), bits(whole, 1))


def test_what_cannot_be_deleted_is_noticed_before_training(folder, copy, monkeypatch, capsys):
    def refuses(path, *args, **named):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    fails(flags(folder, copy.name, "--overwrite"), 1, "Permission denied", capsys=capsys)


def test_a_step_folder_of_another_run_is_not_taken_for_ours(folder, whole, copy):
    """It lies there whole, as another run, or a failed removal, may leave it."""
    opd.main(flags(folder, "foreign", "--lr", "0.5"))
    step_2 = copy / "checkpoints/step_2"
    save = opd.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        collect = opd.collect

        def puts(*args):
            if not step_2.exists():
                shutil.copytree(folder / "foreign/checkpoints/step_2", step_2)
            return collect(*args)

        patch.setattr(opd, "collect", puts)
        opd.main(flags(folder, copy.name, "--resume"))
    assert save is opd.save_checkpoint and same(bits(copy, 2), bits(whole, 2))


@pytest.mark.parametrize("flag", [["--weight-decay", "0.9"], ["--adam-beta2", "0.1"]])
def test_resume_uses_the_flags_that_it_says(folder, whole, copy, flag, capsys):
    used = {}
    train = opd.train_step

    def told(student, optimizer, *rest):
        used.update(optimizer.param_groups[0])
        used["last"] = optimizer.param_groups[-1]["weight_decay"]
        return train(student, optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "train_step", told)
        opd.main(flags(folder, copy.name, "--resume", *flag))
    assert f"{flag[0]} was" in capsys.readouterr().out
    wanted = {"--weight-decay": (0.9, (0.9, 0.95)), "--adam-beta2": (0.0, (0.9, 0.1))}[flag[0]]
    assert (used["weight_decay"], used["betas"]) == wanted and used["last"] == 0.0
    assert not same(bits(copy, 2), bits(whole, 2))


# ----------------------------------------------------------------------------------- data lost
@pytest.mark.parametrize("name", ["args.json", "opd.py", "samples.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_ones_own_files_are_not_replaced(folder, tmp_path, name, more, capsys):
    own = tmp_path / "thesis"
    own.mkdir()
    for each in (name, "curves.png"):
        (own / each).write_text('{"mine": 1}')
    fails(flags(folder, own, *more), 2, name, capsys=capsys)
    assert (own / name).read_text() == (own / "curves.png").read_text() == '{"mine": 1}'


def test_weights_that_overflow_are_not_saved(folder, capsys, monkeypatch):
    """The loss of the step is finite; the update is not. The good checkpoint stays."""
    train = opd.train_step

    def overflows(student, optimizer, batch, args, step):
        metrics = train(student, optimizer, batch, args, step)
        if step == 1:
            with torch.no_grad():
                next(iter(student.parameters())).view(-1)[0] = float("inf")
        return metrics

    monkeypatch.setattr(opd, "train_step", overflows)
    argv = flags(folder, "overflow", "--keep-checkpoints", "1")
    fails(argv, 1, "not finite", "last good checkpoint", "step_1", capsys=capsys)
    assert [path.name for path in (folder / "overflow/checkpoints").iterdir()] == ["step_1"]


CUTS = {
    "inside a character": '{"step": 2, "prompt": "数'.encode()[:-1],
    "no step": b'{"loss": 1}\n',
    "no object": b"7\n",
    "a step that is text": b'{"step": "two"}\n',
    "not UTF-8": b'\xff\xfe{"step": 1}\n',
    "nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_log_that_was_cut_does_not_end_a_resume(folder, whole, copy, cut):
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        with (copy / name).open("ab") as file:
            file.write(CUTS[cut])
    opd.main(flags(folder, copy.name, "--resume"))
    assert losses(copy) == losses(whole)
    assert (copy / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_logs_are_read_from_their_end(tmp_path, monkeypatch):
    """Of a large log only the last block is read, to cut it and to look something up."""
    log = tmp_path / "metrics.jsonl"
    with log.open("w") as file:
        for step in range(60_000):
            file.write(json.dumps({"step": step, "text": "数" * 40, "loss": 1.0}) + "\n")
    size, read = log.stat().st_size, []
    monkeypatch.setattr(files, "_row", lambda line, row=files._row: read.append(line) or row(line))
    assert files.cut_log(log, 59_990) == 59_990
    rows = files.rows_from_end(log)
    assert [row["step"] for _, row in (next(rows), next(rows))] == [59_990, 59_989]
    assert len(read) < 20 and log.stat().st_size < size
    assert files.cut_log(log, -1) is None and log.stat().st_size == 0
    assert files.cut_log(tmp_path / "none.jsonl", 3) is None


def test_rows_are_whole_across_blocks(tmp_path):
    log = tmp_path / "log"
    long = [{"step": step, "text": "é" * (300_000 * (step % 3))} for step in range(12)]
    log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in long))
    found = list(files.rows_from_end(log))
    assert [row for _, row in found] == long[::-1] and found[0][0] == log.stat().st_size


def test_missing_rows_are_said(folder, copy, capsys):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:0]))
    opd.main(flags(folder, copy.name, "--resume"))
    assert "has no row, the checkpoint is of step 1" in capsys.readouterr().out


def test_every_resume_keeps_what_was_before(folder, copy):
    """Three resumes from one checkpoint: three copies; one that is refused writes nothing."""
    first = (copy / "args.json").read_bytes()
    for lr in ("1", "2", "3"):
        opd.main(flags(folder, copy.name, "--resume", "--lr", lr))
        shutil.rmtree(copy / "checkpoints/step_2")
    kept = [
        json.loads((copy / f"before_step_1{n}_args.json").read_text()) for n in ("", ".2", ".3")
    ]
    assert [each["args"]["lr"] for each in kept] == [0.01, 1.0, 2.0]
    assert (copy / "before_step_1_args.json").read_bytes() == first
    before = {path: path.read_bytes() for path in copy.glob("*.*")}
    with pytest.raises(SystemExit):
        opd.main(flags(folder, copy.name, "--resume", "--lora-rank", "2"))
    assert before == {path: path.read_bytes() for path in copy.glob("*.*")}


def test_a_disk_that_cannot_rename_is_noticed_at_the_start(folder, capsys, monkeypatch):
    rename = Path.rename

    def refuses(path, target):
        if path.is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    monkeypatch.setattr(opd, "collect", lambda *_: pytest.fail("it trains"))
    fails(flags(folder, "exdev"), 1, "Invalid cross-device link", capsys=capsys)


def test_a_disk_that_cannot_sync_folders_is_used(folder, whole, monkeypatch):
    fsync = os.fsync

    def refuses(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    opd.main(flags(folder, "nosync"))
    assert same(bits(folder / "nosync", 2), bits(whole, 2))


def test_a_name_that_is_not_utf8_is_refused(folder, capsys):
    name = os.fsdecode(b"run\xff")
    fails(flags(folder, name), 2, "not UTF-8", capsys=capsys)


def test_an_error_outside_of_the_update_saves(folder, capsys, monkeypatch):
    collect = opd.collect

    def breaks(*args):
        if args[-1] == 1:
            raise ZeroDivisionError("a fork of mine")
        return collect(*args)

    monkeypatch.setattr(opd, "collect", breaks)
    argv = flags(folder, "broken", "--save-every", "0")
    fails(argv, 1, "ZeroDivisionError: a fork of mine", "--debug", capsys=capsys)
    assert files.check_manifest(folder / "broken/checkpoints/step_1") is None


def test_a_live_view_that_fails_only_warns(folder, whole, capsys, monkeypatch):
    def fails_to_show(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(runs, "_reporter", lambda *_: fails_to_show)
    opd.main(flags(folder, "unseen"))
    assert "live view: step 1 is not shown: no network" in capsys.readouterr().out
    assert losses(folder / "unseen") == losses(whole)


def test_files_of_a_checkpoint_have_one_mode(whole):
    found = {path.stat().st_mode for path in (whole / "checkpoints/step_2").rglob("*.*")
             if path.is_file()}  # fmt: skip
    assert len(found) == 1


def test_the_lock_survives_a_reader_in_the_same_process(folder, monkeypatch, capsys):
    """A lock of lockf is lost as soon as its own process closes any copy of the file."""
    collect, tried = opd.collect, []
    second = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def reads(*args):
        lock = folder / "locked/lock"
        lock.read_text()
        tried.append(subprocess.run([sys.executable, "-c", second, lock], capture_output=True))
        return collect(*args)

    monkeypatch.setattr(opd, "collect", reads)
    opd.main(flags(folder, "locked", "--steps", "1"))
    assert tried[0].returncode == 1 and b"BlockingIOError" in tried[0].stderr


# -------------------------------------------------------------------------------------- security
class Payload:
    """What pickle runs when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


def sealed(checkpoint: Path) -> None:
    """The manifest again: whoever sends a folder writes that too."""
    (checkpoint / "manifest.json").unlink()
    target = checkpoint.with_name(checkpoint.name + "_")
    files.seal(checkpoint, target)
    target.rename(checkpoint)


def test_resume_runs_nothing_of_the_metadata(folder, copy, tmp_path, capsys):
    checkpoint = copy / "checkpoints/step_1"
    metadata = pickle.loads((checkpoint / "trainer/.metadata").read_bytes())
    metadata.planner_data = Payload(tmp_path / "it_ran")
    (checkpoint / "trainer/.metadata").write_bytes(pickle.dumps(metadata))
    sealed(checkpoint)
    fails(flags(folder, copy.name, "--resume"), 1, "has no place", capsys=capsys)
    assert not (tmp_path / "it_ran").exists()


def test_resume_runs_nothing_of_the_numbers(folder, copy, tmp_path, capsys):
    """`step` is a pickle of its own within the file of the tensors."""
    checkpoint = copy / "checkpoints/step_1"
    metadata = pickle.loads((checkpoint / "trainer/.metadata").read_bytes())
    harm = io.BytesIO()
    torch.save(Payload(tmp_path / "it_ran"), harm)
    for index, info in metadata.storage_data.items():
        if index.fqn == "step":
            file = checkpoint / "trainer" / info.relative_path
            info.offset, info.length = file.stat().st_size, len(harm.getvalue())
            file.write_bytes(file.read_bytes() + harm.getvalue())
    (checkpoint / "trainer/.metadata").write_bytes(pickle.dumps(metadata))
    sealed(checkpoint)
    fails(flags(folder, copy.name, "--resume"), 1, "does not fit", capsys=capsys)
    assert not (tmp_path / "it_ran").exists()


def test_resume_reads_files_of_its_checkpoint_only(folder, copy, capsys):
    checkpoint = copy / "checkpoints/step_1"
    metadata = pickle.loads((checkpoint / "trainer/.metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../../../../whole/checkpoints/step_2/trainer/{info.relative_path}"
    (checkpoint / "trainer/.metadata").write_bytes(pickle.dumps(metadata))
    sealed(checkpoint)
    fails(flags(folder, copy.name, "--resume"), 1, "is not in the checkpoint", capsys=capsys)


# ---------------------------------------------------------------------------- signals and output
def start(argv: list[str], wrapper: str = "", **how) -> subprocess.Popen:
    """A run as a process of its own, behind `wrapper` (a shell's words, $@ being the command)."""
    command = [sys.executable, str(ROOT / "methods/opd.py"), *argv]
    if wrapper:
        command = ["bash", "-c", wrapper, "run", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.Popen(command, env=os.environ | environment, **(pipes | how))


OUTPUTS = {
    "a reader that has gone": 'set -o pipefail; "$@" | head -n 1',
    "stdout is closed": '"$@" >&-',
    "stdin, stdout and stderr are closed": '"$@" <&- >&- 2>&-',
    "a full disk": '"$@" > /dev/full',
    "a full disk for both": '"$@" > /dev/full 2> /dev/full',
    "an ASCII terminal": 'PYTHONIOENCODING=ascii "$@"',
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_lost_output_ends_no_run(folder, whole, output):
    run = f"数 {output}".replace(" ", "_")
    process = start(flags(folder, run), OUTPUTS[output])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert losses(folder / run) == losses(whole)
    assert same(bits(folder / run, 2), bits(whole, 2))


def until(condition, process) -> None:
    import time

    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_connection_that_drops_saves(folder, name):
    number = getattr(signal, name)
    process = start(flags(folder, name, "--steps", "100000", "--save-every", "0"))
    until((folder / name / "metrics.jsonl").is_file, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    (saved,) = (folder / name / "checkpoints").iterdir()
    assert name in errors and files.check_manifest(saved) is None


def test_nohup_is_heard(folder):
    wrapper = 'trap "" HUP; exec "$@"'
    process = start(flags(folder, "nohup", "--steps", "40", "--save-every", "0"), wrapper)
    until((folder / "nohup/metrics.jsonl").is_file, process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("where", ["generate", "teacher", "diagnose"])
def test_sigterm_does_not_wait_for_the_step(folder, whole, where, monkeypatch, capsys):
    """It stops in the middle of a slow phase, saves the boundary before it, and the step that is
    redone has the bits of an undisturbed run."""
    name = {"generate": "verify", "teacher": "score", "diagnose": "read_tokens"}[where]
    slow, run = getattr(opd, name), f"term_{where}"
    begun = []

    def killed(*args, **named):
        begun.extend([1] * ((folder / run / "checkpoints/step_1").exists() and not begun))
        if begun == [1] and _phase(folder / run) == where:
            begun.append(2)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10**6):
                pass
            pytest.fail("it goes on")
        return slow(*args, **named)

    phase, now = runs.Run.phase, []

    def told(self, name):
        now.append(name)
        return phase(self, name)

    def _phase(_):
        return now[-1] if now else ""

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "phase", told)
        patch.setattr(opd, name, killed)
        fails(flags(folder, run), 143, "step_1; go on with --resume", capsys=capsys)
    assert begun == [1, 2]
    opd.main(flags(folder, run, "--resume"))
    assert losses(folder / run) == losses(whole) and same(bits(folder / run, 2), bits(whole, 2))


# ---------------------------------------------------------------------------------------- unclear
def test_resume_says_what_is_not_as_it_was(folder, copy, tmp_path, capsys):
    opd.main(flags(folder, copy.name, "--resume"))
    assert " was " not in capsys.readouterr().out  # nothing has changed
    record = json.loads((copy / "args.json").read_text())
    record["environment"] |= {"torch": "1.0", "num_devices": 8}
    record["hashes"]["script"] = "exopd.py 0123456789abcdef"
    (copy / "args.json").write_text(json.dumps(record))
    argv = flags(folder, copy.name, "--resume", "--steps", "1")
    text = Path(argv[argv.index("--prompts") + 1]).read_text()
    (tmp_path / "edited.jsonl").write_text(text.replace('"answer": "', '"answer": "1', 1))
    argv[argv.index("--prompts") + 1] = str(tmp_path / "edited.jsonl")
    opd.main(argv)
    output = capsys.readouterr().out
    told = ["torch was '1.0'", "num_devices was 8", "the script was exopd.py 0123456789abcdef"]
    told += ["the prompts was ", "--prompts was", "is of step 2, beyond --steps 1"]
    for words in told:
        assert words in output, words


@pytest.mark.parametrize(
    "flag", ["--verifier-timeout-s", "--teacher-timeout-s", "--rank-timeout-s"]
)
@pytest.mark.parametrize("value", ["1e300", "1e7", "inf", "nan"])
def test_huge_time_limits_are_refused(flag, value):
    with pytest.raises(console.RunError, match=flag):
        opd.parse_args([flag, value])


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "abc"}, {"RANK": "-1"}, {"RANK": ""}, {"RANK": "0", "WORLD_SIZE": "two"},
     {"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
     {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}],
)  # fmt: skip
def test_an_environment_that_torchrun_did_not_make(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        opd.main([])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: " in text and "Traceback" not in text
