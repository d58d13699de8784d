"""Runs as a user starts them: resume, interrupts, run folders, bad input, checkpoints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import opd
import pytest
import tinylm
import torch
import transformers
from tinylm import weights

from opd_run import checkpoints, files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("runs"))


def flags(folder, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    paths |= {"--test-prompts": "prompts.jsonl", "--run-dir": run}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 4"
    sizes += " --save-every 2 --eval-every 2 --eval-samples 2 --device cpu"
    return [*named, *sizes.split(), "--lr-schedule", "cosine", "--warmup-steps", "1", *more]


def rows(folder, run: str, *keys: str) -> list[dict]:
    """Logged rows without what a clock decides."""
    clocks = ("_s", "_mib", "_per_s")
    return [
        {key: row[key] for key in row if not key.endswith(clocks)}
        for row in files.read_metrics(folder / run)
    ]


def fails(argv: list[str], code: int, *words: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        opd.main(argv)
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == code, text
    assert all(word in text for word in words), text
    assert "Traceback" not in text
    return text


def test_resume_equals_an_uninterrupted_run(folder):
    """Trap 26: 2 + kill + 2 steps are 4 steps: weights bit for bit, every logged number equal."""
    opd.main(flags(folder, "whole"))
    opd.main(flags(folder, "parts"))
    parts = folder / "parts"
    # As a kill would leave it: the newest checkpoint is gone, a row is cut short.
    for path in (parts / "checkpoints/step_4").rglob("*"):
        path.unlink() if path.is_file() else None
    (parts / "checkpoints/.writing-4").mkdir()
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')
    opd.main(flags(folder, "parts", "--resume"))
    whole, resumed = weights(folder, "whole", 4), weights(folder, "parts", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert not torch.equal(start["model.norm.weight"], whole["model.norm.weight"])
    assert rows(folder, "whole") == rows(folder, "parts")
    assert (folder / "whole/samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    assert not list((parts / "checkpoints").glob(".writing*"))


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_that_another_process_writes_to_is_refused(folder, capsys, flag):
    run = folder / f"shared{flag}"
    opd.main(flags(folder, run.name, "--steps", "2"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as stop:
            opd.main(flags(folder, run.name, "--steps", "2", flag))
        other.stdin.close()
    assert stop.value.code == 2
    assert f"run folder {run}: another process runs in it" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    opd.main(flags(folder, run.name, "--steps", "2", flag))  # the other one is gone


def test_a_run_is_a_function_of_its_seed(folder):
    opd.main(flags(folder, "seed0", "--steps", "2"))
    opd.main(flags(folder, "seed0b", "--steps", "2"))
    opd.main(flags(folder, "seed1", "--steps", "2", "--seed", "1"))
    assert rows(folder, "seed0") == rows(folder, "seed0b") != rows(folder, "seed1")


def test_run_folder_holds_the_experiment(folder, capsys):
    opd.main(flags(folder, "book", "--steps", "2", "--eval-teacher"))
    run = folder / "book"
    assert (run / "opd.py").read_text() == (ROOT / "methods/opd.py").read_text()
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["lr"] == 3e-4 and record["facts"]["valid_vocab"] == 46
    assert {"torch", "transformers", "commit", "dirty", "opd_ops"} <= set(record["environment"])
    output = capsys.readouterr().out
    assert re.search(r"avg@\d: before \S+, after \S+, teacher \S+", output) and str(run) in output
    logged = files.read_metrics(run)
    assert [row["step"] for row in logged] == [0, 0, 1, 2, 2]
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "completion", "answer", "verdict", "ended"} <= set(sample)


def test_checkpoint_loads_with_from_pretrained(folder):
    opd.main(flags(folder, "plain", "--steps", "1", "--eval-every", "0"))
    path = folder / "plain/checkpoints/step_1/model"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=3).shape[0] == 1


def test_old_checkpoints_are_dropped_and_damaged_ones_skipped(folder, capsys):
    opd.main(flags(folder, "keep", "--save-every", "1", "--keep-checkpoints", "2"))
    kept = folder / "keep/checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step_3", "step_4"]
    victim = next(kept.glob("step_4/trainer/*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    opd.main(flags(folder, "keep", "--resume"))
    output = capsys.readouterr().out
    assert "step_4 is damaged" in output and "resume: from" in output and "step_3" in output


def test_run_folder_that_exists_is_refused(folder, capsys):
    opd.main(flags(folder, "busy", "--steps", "1", "--eval-every", "0"))
    before = (folder / "busy/metrics.jsonl").read_text()
    fails(flags(folder, "busy"), 2, "--resume or --overwrite", capsys=capsys)
    assert (folder / "busy/metrics.jsonl").read_text() == before
    fails(flags(folder, "none", "--resume"), 1, "no complete checkpoint", capsys=capsys)
    opd.main(flags(folder, "busy", "--overwrite", "--steps", "1"))


def test_overwrite_does_not_delete_what_is_no_run(folder, capsys):
    precious = folder / "thesis"
    precious.mkdir()
    (precious / "metrics.jsonl").write_text("mine")
    fails(flags(folder, "thesis", "--overwrite"), 2, "not a run folder", capsys=capsys)
    assert (precious / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_stop(folder, number, code):
    """Ctrl-C and a pre-emption: a checkpoint at the next step boundary, then 130 or 143."""
    run = f"signal{int(number)}"
    argv = flags(folder, run, "--steps", "100000", "--eval-every", "0", "--save-every", "0")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "methods/opd.py"), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / run / "metrics.jsonl").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--resume" in errors.splitlines()[-1] and "Traceback" not in errors
    (saved,) = (folder / run / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step_"))
    assert steps == files.read_metrics(folder / run)[-1]["step"] >= 1
    assert files.check_manifest(saved) is None


def test_non_finite_loss_stops_at_the_first(folder, capsys, monkeypatch):
    """--max-bad-steps 0: stop, keep the last good checkpoint, say where, keep the sample."""
    whole, calls = opd.token_loss, []

    def broken(*args, **named):
        if torch.is_grad_enabled():  # training; the trace of tokens asks too
            calls.append(1)
        loss, logged = whole(*args, **named)
        return (loss * float("nan") if len(calls) >= 3 else loss), logged

    monkeypatch.setattr(opd, "token_loss", broken)
    # Evaluations and checkpoints are due every second step; the third is bad.
    text = fails(flags(folder, "nan"), 1, "step 3: loss nan", "step_2", capsys=capsys)
    assert "offending.jsonl" in text
    assert (folder / "nan/offending.jsonl").read_text().count("\n") == 6
    assert all(value.isfinite().all() for value in weights(folder, "nan", 2).values())
    calls.clear()
    opd.main(flags(folder, "nan2", "--max-bad-steps", "9"))
    assert [row["bad_step"] for row in files.read_metrics(folder / "nan2") if "loss" in row] == [
        0.0, 0.0, 1.0, 1.0,
    ]  # fmt: skip


def test_resume_from_a_stop_before_the_first_update(folder):
    """A checkpoint of an optimizer that has made no step is exact too."""
    opd.main(flags(folder, "early", "--eval-every", "0"))
    opd.main(flags(folder, "halted", "--eval-every", "0", "--steps", "0"))
    opd.main(flags(folder, "halted", "--eval-every", "0", "--resume"))
    one, two = weights(folder, "early", 4), weights(folder, "halted", 4)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_copied_script_can_go_on_with_its_own_run(folder):
    opd.main(flags(folder, "copy", "--steps", "1", "--eval-every", "0"))
    script = folder / "copy/opd.py"
    for word in ("--resume", "--overwrite"):
        more = flags(folder, "copy", "--steps", "2", "--eval-every", "0", word)
        done = subprocess.run([sys.executable, str(script), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert script.read_text() == (ROOT / "methods/opd.py").read_text()


def test_an_evaluation_without_verdicts_is_reported(folder, tmp_path, capsys):
    """avg@n is NaN where nothing could be verified; the summary still prints."""
    rows = (folder / "prompts.jsonl").read_text().replace("answer", "solution")
    (tmp_path / "open.jsonl").write_text(rows)
    argv = flags(folder, "nanavg", "--steps", "1")
    argv[argv.index("--test-prompts") + 1] = str(tmp_path / "open.jsonl")
    opd.main(argv)
    output = capsys.readouterr().out
    assert re.search(r"avg@\d: before nan, after nan", output) and "12 rows have no field" in output


def test_dry_run_reads_no_weights_and_writes_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(opd.setup, "load_models", lambda *_: pytest.fail("loaded weights"))
    opd.main(flags(folder, "dry", "--dry-run"))
    output = capsys.readouterr().out
    assert not (folder / "dry").exists()
    for word in ("--lr 0.0003", "M parameters", "compat:", "ops:", "budget:", "12 prompts"):
        assert word in output, word


def test_every_wrong_flag_is_named_in_one_message(folder, capsys):
    wrong = ["--top-p", "1.5", "--lr", "-1", "--jsd-beta", "1", "--steps", "-3", "--lr", "nan"]
    wrong += ["--chat-template-args", "[]", "--teacher", "another"]
    names = ["--top-p", "--lr", "--jsd-beta must be in (0,1)", "--steps", "--chat-template-args"]
    names += ["--teacher"]
    fails(flags(folder, "wrong", *wrong), 2, *names, "(0,1]", "got 1.5", capsys=capsys)


def test_bad_input_costs_one_line_and_writes_nothing(folder, capsys, tmp_path):
    words = tinylm.WORDS[:4] + tinylm.WORDS[:3:-1]  # same size, other ids
    other = tinylm.save_model(tmp_path / "other", 1, words=words)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "fields.jsonl").write_text('{"asked": "1+1="}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 7}\n')
    (tmp_path / "hollow").mkdir()
    cases = {
        ("--student", str(tmp_path / "none")): (1, "--student", "no model"),
        ("--student", str(tmp_path / "hollow")): (1, "--student", "no model"),
        ("--teacher", str(tmp_path / "none")): (1, "--teacher", "no model"),
        ("--teacher", other): (1, "tokenizers", "id 4", "'0'", "'?'"),
        ("--prompts", str(tmp_path / "none.jsonl")): (1, "no file"),
        ("--prompts", str(tmp_path)): (1, "data set folder"),
        ("--prompts", str(tmp_path / "empty.jsonl")): (1, "no prompt to use", "empty"),
        ("--prompts", str(tmp_path / "broken.jsonl")): (1, "broken.jsonl:2", "not JSON"),
        ("--prompts", str(tmp_path / "list.jsonl")): (1, "list.jsonl:1", "JSON object"),
        ("--prompts", str(tmp_path / "bytes.jsonl")): (1, "UTF-8", "byte 12"),
        ("--prompts", str(tmp_path / "fields.jsonl")): (1, "row 1", "'prompt'", "['asked']"),
        ("--prompts", str(tmp_path / "number.jsonl")): (1, "expected text", "got 7"),
        ("--max-prompt-tokens", "2"): (1, "all 12 are longer"),
        ("--max-completion-tokens", "254"): (1, "all 12", "the models' 256 positions"),
        ("--verifier", "nothing"): (2, "--verifier", "'nothing'"),
        ("--verifier", "json:nothing"): (2, "--verifier", "'json:nothing'"),
        ("--device", "tpu9"): (2, "device 'tpu9'"),
        ("--top-p", "0"): (2, "--top-p", "(0,1]"),
        ("--resume", "--overwrite"): (2, "exclude each other"),
    }
    for change, (code, *words) in cases.items():
        argv = flags(folder, "bad")
        if change[0] == "--teacher":
            argv[argv.index("--teacher") + 1] = change[1]
            change = ()
        fails([*argv, *change], code, *words, capsys=capsys)
        assert not (folder / "bad").exists(), change


def test_unknown_flag_is_a_usage_error():
    with pytest.raises(SystemExit) as stop:
        opd.main(["--leraning-rate", "1"])
    assert stop.value.code == 2


def test_checkpoint_that_cannot_be_written_loses_nothing(folder, capsys, monkeypatch):
    save, calls = checkpoints.save, []

    def full_disk(path, *args):
        save(path, *args)
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full_disk)
    fails(flags(folder, "full"), 1, "step 4", "No space left", "step_2", capsys=capsys)
    left = [path.name for path in (folder / "full/checkpoints").iterdir()]
    assert left == ["step_2"]
    monkeypatch.setattr(checkpoints, "save", save)
    opd.main(flags(folder, "full", "--resume"))


def test_prompts_of_step_cover_each_epoch_once():
    args = opd.parse_args(["--prompts-per-step", "5"])
    stream = [p for step in range(6) for p in opd.prompts_of_step(list(range(10)), step, args)]
    epochs = [stream[0:10], stream[10:20], stream[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    args.prompts_per_step = 25  # more than an epoch in a step
    assert len(opd.prompts_of_step(list(range(10)), 1, args)) == 25


def test_a_home_folder_behind_an_equals_sign_is_meant(monkeypatch):
    """No shell expands it there."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert opd.parse_args(["--run-dir=~/run"]).run_dir == "/somewhere/run"
