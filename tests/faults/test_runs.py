"""Attacks on runs and their folders: what must neither be lost nor mixed up."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import exopd
import opd
import pytest
import tinylm
import torch
import transformers
from tinylm import weights

from opd_run import compat, console, files
from opd_run import flags as command_line
from opd_run import folder as folders
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


@pytest.mark.parametrize("way", ["a link", "a dangling link", "a file"])
def test_what_is_in_the_way_of_a_checkpoint_is_replaced(folder, whole, copy, tmp_path, way):
    """And an older one that is a link is dropped as any other; what it points to stays."""
    elsewhere, step_2 = tmp_path / "elsewhere", copy / "checkpoints/step_2"
    shutil.move(copy / "checkpoints/step_1", elsewhere)
    (copy / "checkpoints/step_1").symlink_to(elsewhere)
    if way == "a file":
        step_2.write_text("in the way")
    else:
        (tmp_path / "a link").mkdir()
        step_2.symlink_to(tmp_path / way)
    opd.main(flags(folder, copy.name, "--resume", "--keep-checkpoints", "1"))
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_2"]
    assert same(bits(copy, 2), bits(whole, 2)) and files.check_manifest(elsewhere) is None


def test_overwrite_drops_links_in_a_linked_folder(folder, whole, tmp_path):
    run = folder / "links"
    shutil.copytree(whole, run)
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere/step_2", tmp_path / "kept")
    (tmp_path / "elsewhere/step_2").symlink_to(tmp_path / "kept")
    opd.main(flags(folder, "links", "--overwrite", "--lr", "3e-2"))
    assert not (run / "checkpoints/step_2").is_symlink() and not same(bits(run, 2), bits(whole, 2))
    assert files.check_manifest(tmp_path / "kept") is None


def test_what_cannot_be_deleted_is_noticed_before_training(folder, copy, monkeypatch, capsys):
    def refuses(path, *args, **named):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    fails(flags(folder, copy.name, "--overwrite"), 1, "Permission denied", capsys=capsys)


def test_a_step_folder_of_another_run_is_not_taken_for_ours(folder, whole, copy):
    """It lies there whole, as another run, or a failed removal, may leave it."""
    opd.main(flags(folder, "foreign", "--lr", "0.5"))
    step_2 = copy / "checkpoints/step_2"
    with pytest.MonkeyPatch.context() as patch:
        collect = opd.collect

        def puts(*args):
            if not step_2.exists():
                shutil.copytree(folder / "foreign/checkpoints/step_2", step_2)
            return collect(*args)

        patch.setattr(opd, "collect", puts)
        opd.main(flags(folder, copy.name, "--resume"))
    assert same(bits(copy, 2), bits(whole, 2))


def test_a_step_folder_with_another_name_is_refused(folder, whole, copy, capsys):
    """The steps after it would be done again, and their checkpoint be taken for written."""
    (copy / "checkpoints/step_1").rename(copy / "checkpoints/step_2")
    fails(flags(folder, copy.name, "--resume"), 1, "step_2 is of step 1", capsys=capsys)


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


def test_weights_that_overflow_in_the_export_are_not_saved(folder, tmp_path, capsys, monkeypatch):
    """100,000 is a number in float32, in which it is trained, and infinity in float16."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    shutil.copytree(folder / "student", tmp_path / "half")
    lm.half().save_pretrained(tmp_path / "half")
    train = opd.train_step

    def grows(student, *rest):
        metrics = train(student, *rest)
        with torch.no_grad():
            student.lm.model.layers[0].mlp.gate_proj.weight[0, 0] = 1e5
        return metrics

    monkeypatch.setattr(opd, "train_step", grows)
    argv = [*flags(folder, "half", "--steps", "1"), "--student", str(tmp_path / "half")]
    fails(argv, 1, "not finite in torch.float16 (--export-dtype)", "gate_proj", capsys=capsys)
    opd.main([*argv, "--export-dtype", "float32", "--overwrite"])


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
    output = capsys.readouterr().out
    assert "metrics.jsonl has no rows of steps 1; the checkpoint is of step 1" in output


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


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_sync_folders_is_used(folder, whole, monkeypatch, code):
    fsync, run = os.fsync, f"nosync_{code}"

    def refuses(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    opd.main(flags(folder, run))
    assert same(bits(folder / run, 2), bits(whole, 2))


def test_a_disk_with_one_mode_for_all_files_is_used(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file").write_text("whole")
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("it need not be set"))
    files.seal(tmp_path / "new", tmp_path / "step_1")


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


def test_an_exit_in_a_step_is_an_error(folder, capsys, monkeypatch):
    """It would end the run with exit code 0."""
    monkeypatch.setattr(opd, "collect", lambda *_: sys.exit(0))
    fails(flags(folder, "leaves"), 1, "phase generate ended in SystemExit: 0", capsys=capsys)
    assert files.check_manifest(folder / "leaves/checkpoints/step_0") is None


def test_a_live_view_that_fails_only_warns(folder, whole, capsys, monkeypatch):
    def fails_to_show(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(runs, "reporter", lambda *_: fails_to_show)
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
_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_is_left():
    """A process that a failing test waits for in vain would run on."""
    yield
    while _started:
        _started.pop().kill()


def start(argv: list[str], wrapper: str = "", **how) -> subprocess.Popen:
    """A run as a process of its own, behind `wrapper` (a shell's words, $@ being the command).

    It hears SIGHUP, also where these tests run behind `nohup`.
    """
    command = [sys.executable, str(ROOT / "methods/opd.py"), *argv]
    if wrapper:
        command = ["bash", "-c", wrapper, "run", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | how.pop("env", {})
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, env=os.environ | environment, **(pipes | how))
    finally:
        signal.signal(signal.SIGHUP, before)
    _started.append(process)
    return process


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


def test_a_terminal_that_dies_ends_no_run(folder, whole):
    """What is printed to it from then on is an error of input and output."""
    ours, theirs = os.openpty()
    process = start(flags(folder, "dead_terminal"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 1)  # it has begun to print
    os.close(ours)
    assert process.wait(timeout=240) == 0
    assert losses(folder / "dead_terminal") == losses(whole)


def test_the_c_locale_ends_no_run(folder, whole, tmp_path):
    """Its encoding is ASCII; what the log shows of rows in another script is escaped."""
    rows = (folder / "prompts.jsonl").read_text().replace('"answer": "', '"answer": "数')
    (tmp_path / "prompts.jsonl").write_text(rows, encoding="utf-8")
    argv = flags(folder, "c_locale", "--prompts", str(tmp_path / "prompts.jsonl"))
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = start(argv, env=locale)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert losses(folder / "c_locale") == losses(whole) and "\\u6570" in output


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
    record["environment"] |= {"torch": "1.0", "num_devices": 8, "num_processes": 2, "commit": "0"}
    record["hashes"]["script"] = "exopd.py 0123456789abcdef"
    (copy / "args.json").write_text(json.dumps(record))
    argv = flags(folder, copy.name, "--resume", "--steps", "1")
    text = Path(argv[argv.index("--prompts") + 1]).read_text()
    (tmp_path / "edited.jsonl").write_text(text.replace('"answer": "', '"answer": "1', 1))
    argv[argv.index("--prompts") + 1] = str(tmp_path / "edited.jsonl")
    opd.main(argv)
    output = capsys.readouterr().out
    told = ["torch was '1.0'", "num_devices was 8", "the script was exopd.py 0123456789abcdef"]
    told += ["num_processes was 2 and is now 1", "commit was '0'"]
    told += ["the prompts was ", "--prompts was", "is of step 2, beyond --steps 1"]
    for words in told:
        assert words in output, words


def test_resume_says_that_files_and_fields_are_not_as_they_were(folder, tmp_path, capsys):
    """What only the verifier reads: its own file, and a field of the rows."""
    code, rows = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    whole = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    argv = flags(folder, "edited", f"--verifier={code}:f", f"--prompts={rows}", "--steps=1")
    for number, more in enumerate([[], ["--resume"], ["--resume"]]):
        if number < 2:
            code.write_text(f"def f(*_):\n    return {number}\n")
            rows.write_text("".join(json.dumps(r | {"test": number}) + "\n" for r in whole))
        opd.main([*argv, *more])
        output = capsys.readouterr().out
        for words in ("the file of --verifier was mine.py ", "the prompts was 12 "):
            assert (words in output) == (number == 1)


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
     {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, {"RANK": "9" * 5000},
     {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "y"}],
)  # fmt: skip
def test_an_environment_that_torchrun_did_not_make(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        opd.main([])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: " in text and "Traceback" not in text


# ------------------------------------------------------------------------------- --resume RUN
def args_of(path: Path) -> dict:
    return json.loads((path / "args.json").read_text())["args"]


def test_resume_of_a_run_takes_its_flags(folder, whole, copy, capsys):
    """Nothing but the folder is said, and the bits are those of a run that was never stopped."""
    opd.main(["--resume", str(copy)])
    output = capsys.readouterr().out
    assert f"resume: flags of {copy}/args.json" in output and " was " not in output
    assert losses(copy) == losses(whole) and same(bits(copy, 2), bits(whole, 2))
    assert args_of(copy) == args_of(whole) | {"resume": True, "run_dir": str(copy)}


def test_flags_given_beside_the_run_win_and_are_said(folder, whole, copy, capsys):
    """A flag that may be repeated is replaced, not added to."""
    other = [f"--teacher={folder}/student", "--lr=0.5", "--no-chat-template"]
    opd.main([*other, "--resume", str(copy), "--run-dir", str(copy)])
    output = capsys.readouterr().out
    teachers = f"['{folder}/teacher'] and is now ['{folder}/student']"
    for words in ("lr was 0.01 and is now 0.5", "template was True and is now False", teachers):
        assert words in output
    assert not same(bits(copy, 2), bits(whole, 2))
    kept = json.loads((copy / "before_step_1_args.json").read_text())["args"]
    assert (kept["lr"], args_of(copy)["lr"]) == (0.01, 0.5)


def test_resume_of_an_earlier_checkpoint(folder, whole, copy, capsys):
    """The later ones are kept under another name, and are not taken for the newest."""
    for step in (2, 5):
        shutil.copytree(whole / "checkpoints/step_2", copy / f"checkpoints/step_{step}")
    (copy / "checkpoints/dropped_step_2").mkdir()
    opd.main(["--resume", str(copy / "checkpoints/step_1"), "--lr", "0.5"])
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"step_1", "step_2", "dropped_step_2", "dropped_step_2.2", "dropped_step_5"}
    assert same(bits(copy, 2), bits(whole, 2)) is False
    assert files.check_manifest(copy / "checkpoints/dropped_step_2.2") is None
    assert "step_5 is later than the checkpoint to go on from" in capsys.readouterr().out


def test_a_checkpoint_that_was_asked_for_is_not_replaced_by_another(folder, whole, copy, capsys):
    shutil.copytree(whole / "checkpoints/step_2", copy / "checkpoints/step_2")
    (copy / "checkpoints/step_2/model/model.safetensors").write_bytes(b"cut")
    listed = sorted(copy.rglob("*"))
    asked = str(copy / "checkpoints/step_2")
    fails(["--resume", asked], 1, "step_2 is damaged", "missing or cut short", capsys=capsys)
    fails(["--resume", asked[:-1] + "7"], 1, "step_7 is damaged", capsys=capsys)
    assert sorted(copy.rglob("*")) == listed


@pytest.mark.parametrize(
    "record", ["", "[]", '{"args": 7}', '{"environment": {}}', "[" * 100_000, None]
)
def test_a_run_without_readable_flags(tmp_path, record, capsys):
    if record is not None:
        (tmp_path / "args.json").write_text(record)
    fails(["--resume", str(tmp_path)], 2, "RUN/checkpoints/step_N", "args.json", capsys=capsys)


def test_paths_are_those_of_the_folder_where_the_run_was_started(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text("def judge(text, answer, row):\n    return '1' in text\n")
    (folder / "ask.txt").write_text("{prompt}=")
    named = "--student student --teacher teacher --prompts prompts.jsonl --verifier mine.py:judge"
    named += " --test-prompts of=prompts.jsonl --run-dir moved --prompt-template @ask.txt"
    _, _, _, _, *more = flags(folder, "moved", "--eval-every=1", "--eval-samples=1")
    opd.main([*more, *named.split()])
    shutil.rmtree(folder / "moved/checkpoints/step_2")
    before = losses(folder / "moved")
    monkeypatch.chdir(tmp_path)
    opd.main(["--resume", str(folder / "moved/checkpoints/step_1")])
    assert losses(folder / "moved") == before and not list(tmp_path.iterdir())
    found = args_of(folder / "moved")
    assert found["verifier"] == f"{folder}/mine.py:judge"
    assert found["test_prompts"] == [f"of={folder}/prompts.jsonl"]
    assert found["prompt_template"] == f"@{folder}/ask.txt"


@pytest.mark.parametrize(
    ("name", "text", "there"),
    [
        ("prompts", "data:test", "{}/data:test"), ("prompts", "data", "{}/data"),
        ("prompts", "none.jsonl", "none.jsonl"), ("prompts", "reasoning_gym:x", "reasoning_gym:x"),
        ("prompts", "/data", "/data"), ("teacher", "a=data", "a={}/data"),
        ("verifier", "data", "data"), ("verifier", "f.py:g", "{}/f.py:g"),
        ("prompt_template", "data", "data"), ("prompt_template", "x" * 5000, "x" * 5000),
        ("teacher_prompt", "f.py:g", "{}/f.py:g"), ("teacher_prompt", "@f.py", "@{}/f.py"),
        ("teacher", "ema:0.99", "ema:0.99"), ("teacher", "live", "live"),
        ("teacher", "./live", "{}/live"),
    ],
)  # fmt: skip
def test_what_is_a_path_of_a_recorded_flag(name, text, there, tmp_path):
    for each in ("data", "reasoning_gym", "live", "ema"):
        (tmp_path / each).mkdir()
    (tmp_path / "f.py").touch()
    assert command_line._placed(name, text, tmp_path) == there.format(tmp_path)
    assert command_line._placed(name, text, Path.cwd()) == text


ODD = [
    "--system=- a\n'b' = c", "--chat-template-args={\"a\": [1, null]}", "--max-grad-norm=inf",
    "--lr=1e-7", "--no-chat-template", "--teacher-offload", "--test-prompts=x=a.jsonl",
    "--test-prompts=b.jsonl", "--prompt-field=a.b", "--teacher-device=cuda:1", "--dtype=bfloat16",
]  # fmt: skip


@pytest.mark.parametrize("more", [[], ODD], ids=["defaults", "odd"])
@pytest.mark.parametrize("method", ["opd", "sg_opd", "exopd", "topk_opd", "tropd"])
def test_every_flag_comes_back_from_its_record(method, more, tmp_path):
    module = importlib.import_module(method)
    first = module.parse_args(more)
    record = {"args": vars(first), "resolved": first.resolved, "environment": {}}
    (tmp_path / "args.json").write_text(json.dumps(record))
    again = module.parse_args(["--resume", str(tmp_path)])
    assert vars(again) == vars(first) | {"resume": True, "run_dir": str(tmp_path)}
    assert again.resolved == first.resolved and ("dtype" in first.resolved) == (not more)


def test_what_belonged_to_the_machine_or_the_command_is_not_taken(tmp_path):
    found = vars(opd.parse_args(["--dry-run", "--debug", "--overwrite", "--lr=7"]))
    found |= {"device": "cuda:7", "teacher_device": "cuda:7", "dtype": "bfloat16"}
    record = {"args": found, "resolved": ["device", "teacher_device", "dtype"]}
    for each in (record, {"args": found}):  # without `resolved`: of an older version
        (tmp_path / "args.json").write_text(json.dumps(each))
        args = opd.parse_args(["--resume", str(tmp_path), "--device", "cpu"])
        assert (args.device, args.teacher_device, args.dtype, args.lr) == (
            "cpu",
            "cpu",
            "float32",
            7,
        )
        assert not (args.dry_run or args.debug or args.overwrite)
    (tmp_path / "args.json").write_text(json.dumps(record | {"resolved": []}))
    args = opd.parse_args(["--resume", str(tmp_path), "--device", "cpu"])
    assert (args.device, args.teacher_device) == ("cpu", "cuda:7")


def test_flags_of_another_method_are_named_and_left_out(folder, whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exopd.py", "--resume", str(whole), "--dry-run"])
    exopd.main()
    output = capsys.readouterr().out
    assert "has no --objective" in output and "--lr 0.01" in output


@pytest.mark.parametrize("method", ["opd", "sg_opd", "exopd", "topk_opd", "tropd"])
def test_every_flag_that_names_a_path_is_known(method, monkeypatch):
    """A new one would be looked for in the wrong folder."""
    parse, helps = command_line.parse, {}

    def told(parser, *rest):
        helps.update({action.dest: action.help for action in parser._actions})
        return parse(parser, *rest)

    monkeypatch.setattr(command_line, "parse", told)
    importlib.import_module(method).parse_args([])
    named = {name for name, text in helps.items() if re.search(r"folder|file|FILE|jsonl", text)}
    named -= {"run_dir", "resume"}
    known = {*command_line.PATHS, *command_line.TEXTS}
    assert {"student", "teacher", "prompts", "verifier"} <= named <= known, named - known


# ------------------------------------------------------------------------------ logs and the disk
def test_logs_are_on_the_disk_before_a_checkpoint_that_claims_them(folder, monkeypatch):
    """All rows of all logs, at the moment when a checkpoint gets its name."""
    run, synced, seen = folder / "ordered", {}, []
    fsync, rename = os.fsync, Path.rename

    def told(descriptor):
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def checked(path, target):
        if Path(target).name.startswith("step_"):
            logs = [run / name for name in folders.LOGS if (run / name).exists()]
            seen.append((Path(target).name, len(logs)))
            assert [synced.get(str(log)) for log in logs] == [log.stat().st_size for log in logs]
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(Path, "rename", checked)
    opd.main(flags(folder, "ordered"))
    assert seen == [("step_1", 3), ("step_2", 3)]


@pytest.mark.parametrize(
    ("kept", "gaps"),
    [
        ([1, 2, 3, 4], []), ([1, 3, 4], [(2, 2)]), ([3, 4], [(1, 2)]), ([1, 2], [(3, 4)]),
        ([], [(1, 4)]), ([2], [(1, 1), (3, 4)]), ([1, 2, 2, 4], [(3, 3)]), ([0, 1, 2, 3, 4], []),
    ],
)  # fmt: skip
def test_gaps_in_the_steps_are_found(tmp_path, kept, gaps):
    log = tmp_path / "metrics.jsonl"
    for step in range(5):
        files.append_row(log, {"step": step, "eval/student/loss": 1.0})  # does not count
        for _ in range(kept.count(step)):
            files.append_row(log, {"step": step, "loss": "nan", "text": '"loss": 数'})
    assert files.missing_steps(log, 4, "loss") == gaps
    assert files.missing_steps(log, 4) == []
    assert files.missing_steps(tmp_path / "none", 4) == [(1, 4)]


def test_a_gap_in_the_middle_is_said(folder, capsys):
    opd.main(flags(folder, "gaps", "--steps", "5"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (folder / "gaps" / name).read_text().splitlines(keepends=True)
        left = [line for line in lines if json.loads(line)["step"] not in (2, 3)]
        (folder / "gaps" / name).write_text("".join(left))
    capsys.readouterr()
    opd.main(["--resume", str(folder / "gaps"), "--steps", "6"])
    output = capsys.readouterr().out
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert f"! {name} has no rows of steps 2 to 3; the checkpoint is of step 5" in output


# -------------------------------------------------------------------------------- chat templates
NESTED = "{{% for a in {0} %}}{{% for b in {0} %}}{{% endfor %}}{{% endfor %}}"
SLOW = {
    "nested ranges": NESTED.format("range(99999)"),
    "a power that the compiler folds": "{{ (9 ** 999999999) > 1 }}",
    "text that doubles": "{% set n = namespace(s='ab') %}{% for a in range(20) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}" + NESTED.format("n.s"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_template_that_never_ends_is_ended(kind, monkeypatch):
    monkeypatch.setattr(compat, "TEMPLATE_LIMIT_S", 0.5)
    tokenizer = tinylm.tokenizer()
    tokenizer.chat_template = SLOW[kind]
    args, before = opd.parse_args([]), signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(console.RunError, match=r"it takes more than 0.5 s"),
        compat.time_limit("it"),
    ):
        opd.render(tokenizer, "1+1=", args)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_hangs_on_one_row(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compat, "TEMPLATE_LIMIT_S", 5.0)
    shutil.copytree(folder / "student", tmp_path / "student")
    slow = "{% if '2+74' in messages[0]['content'] %}" + SLOW["nested ranges"] + "{% endif %}"
    (tmp_path / "student/chat_template.jinja").write_text(slow + tinylm.TEMPLATE)
    argv = [*flags(folder, "slow"), "--student", str(tmp_path / "student")]
    fails(argv, 1, "row 3", "its chat template", "takes more than 5 s", capsys=capsys)
    assert not (folder / "slow").exists()
