"""Two processes act as one: the same samples, steps and checkpoints; and one that dies ends all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import opd
import pytest
import tinylm
import torch
import torchrun_worker
import transformers

from opd_run import console, files, ranks, rollouts

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("torchrun_worker.py")
METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
MODES = {"none": [], "fsdp": ["--shard", "fsdp", "--shard-frozen"]}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
REPLAY = (
    "--objective sampled --discount 0.9 --updates-per-rollout 2 --steps 4 --save-every 1".split()
)
TOLD = """
import os
def hint(row, completions, verdicts, index):  # another answer on another rank
    text = row["prompt"] if index is None else completions[1 - index]
    return f"{text} {os.environ.get('RANK', 0)}"
"""
VIEWS = {  # method and flags of a teacher with another prompt, and of a student that teaches itself
    "average": ["opd", "--teacher", "ema:0.5"],
    "live": ["opd", "--teacher", "live", "--objective", "full"],
    "adapters": ["opd", "--teacher", "ema:0.5", "--lora-rank", "2"],
    "template": ["exopd"],
    "told": ["topk_opd", "--teacher-prompt", "told.py:hint"],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def torchrun(*command: str, **how: object) -> subprocess.Popen:
    """`torchrun` on two processes; a session of its own, so that a test can end all of it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*TORCHRUN, *command],
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
        **(pipes | how),
    )


def flags(folder: Path, method: str, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--prompts": "prompts.jsonl"}
    paths |= {"--test-prompts": "prompts.jsonl", "--run-dir": f"{run}-{method}"}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    # Pieces of at most 60 tokens: 6 uneven rollouts are 3 to 5 pieces, not always as many a rank.
    sizes = "--max-completion-tokens 24 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 3"
    sizes += " --save-every 2 --keep-checkpoints 0 --eval-every 3 --eval-samples 2 --device cpu"
    sizes += " --micro-batch-tokens 60 --lr 1e-3"
    own = {
        "opd": ["--objective", "full"],
        "sg_opd": ["--gate-target", "reference", "--teacher-share", "0.5"],
        "topk_opd": ["--tail", "bucket", "--support-size", "8"],
        "tropd": ["--outlier-support", "8"],
    }
    teachers = ["--teacher", str(folder / "teacher")]
    if method == "exopd":  # prompts of one domain may all be on one rank
        teachers = [f"--teacher={name}={folder / 'teacher'}" for name in "ab"]
    if "--teacher" in more:
        teachers = []
    return [*named, *sizes.split(), *teachers, *own.get(method, []), *more]


def view_flags(folder: Path, kind: str, run: str, *more: str) -> list[str]:
    """The method of a kind of VIEWS, with its flags."""
    method, *own = VIEWS[kind]
    own = [f"{folder}/{each}" if each.startswith("told.py") else each for each in own]
    own = own if "--teacher-prompt" in own else [*own, "--teacher-prompt", "{answer} {prompt}"]
    own += ["--objective", "sampled"] if method == "opd" and "--objective" not in own else []
    return [method, flags(folder, method, f"{run}-{kind}", *own, *more)]


def save_rollouts(path: Path, tokenizer, steps: int) -> str:
    """Six rollouts for each step, of 1 to 40 tokens, by another policy than the student."""
    generator, stored = torch.Generator().manual_seed(0), []
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "345+6=")]
    for step in range(steps):
        rollout = rollouts.blank(opd.Rollout, prompts * 3, 40, torch.device("cpu"))
        lengths = torch.tensor([40, 1, 1, 2, 17, 1]).roll(step)
        rollout.completion_mask = torch.arange(40) < lengths[:, None]
        ids = torch.randint(4, len(tinylm.WORDS), rollout.completion_ids.shape, generator=generator)
        rollout.completion_ids = ids * rollout.completion_mask
        rollout.response_mask = rollout.completion_mask.clone()
        logp = -3.0 * torch.rand(ids.shape, generator=generator) * rollout.completion_mask
        rollout.behaviour_logp = rollout.rollout_logp = logp
        stored.append(rollout)
    torch.save(stored, path)
    return str(path)


def cut(folder: Path, source: str, run: str) -> None:
    """A copy of a run as it was after step 2."""
    shutil.copytree(folder / source, folder / run)
    shutil.rmtree(folder / run / "checkpoints/step_3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of all methods on one process and on two, replicated and sharded."""
    folder = tmp_path_factory.mktemp("torchrun")
    tinylm.save_model(folder / "student", 0, eos_token_id=[1, 7, 8])
    tinylm.save_model(folder / "teacher", 1)
    tinylm.save_prompts(folder / "prompts.jsonl")
    jobs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for method in METHODS:
        importlib.import_module(method).main(flags(folder, method, "one"))
        for mode, more in MODES.items():
            jobs.append([method, flags(folder, method, mode, *more)])
    stored = save_rollouts(folder / "rollouts.pt", tinylm.tokenizer(), 4)
    torchrun_worker.run("opd", flags(folder, "opd", "one-stored", *REPLAY), stored)
    for mode, more in MODES.items():
        cut(folder, "one-opd", f"from-one-{mode}-opd")
        jobs.append(["opd", flags(folder, "opd", f"from-one-{mode}", "--resume", *more)])
        jobs.append(["opd", flags(folder, "opd", f"{mode}-stored", *REPLAY, *more), stored])
        lonely = ["--prompts-per-step", "1", "--rollouts-per-prompt", "1"]  # a rank has no rollout
        jobs.append(["opd", flags(folder, "opd", f"lonely-{mode}", *lonely, *more)])
    lora = ["--lora-rank", "2"]
    importlib.import_module("exopd").main(flags(folder, "exopd", "one-lora", *lora))
    jobs.append(["exopd", flags(folder, "exopd", "fsdp-lora", *lora, "--shard", "fsdp")])
    (folder / "told.py").write_text(TOLD)
    for kind in VIEWS:
        method, one = view_flags(folder, kind, "one")
        importlib.import_module(method).main(one)
        for mode, more in MODES.items():
            jobs.append(view_flags(folder, kind, mode, *more))
    half = ["--dtype", "bfloat16", "--gradient-checkpointing", "--steps", "1", *MODES["fsdp"]]
    jobs.append(["opd", flags(folder, "opd", "half-lora", *lora, *half)])
    jobs.append(["opd", flags(folder, "opd", "half", *half)])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = torchrun(str(WORKER), str(folder / "jobs.json"))
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        end_session(process)
    assert process.returncode == 0, errors[-3000:]
    (folder / "output.txt").write_text(output)
    torch.set_num_threads(threads)
    return folder


def end_session(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def differences(one: Path, two: Path) -> dict[str, float]:
    """Logged numbers, relative above 1, that differ by more than 1e-5; not what a clock decides."""
    clocks = ("_s", "_mib", "_per_s")
    found = {}
    rows = list(zip(lines(one, "metrics.jsonl"), lines(two, "metrics.jsonl"), strict=True))
    for left, right in rows:
        assert left.keys() == right.keys()
        for key in left:
            a, b = float(left[key]), float(right[key])
            if not key.endswith(clocks) and abs(a - b) > 1e-5 * max(1.0, abs(a)):
                found[f"{left['step']}/{key}"] = (a, b)
    return found


def weights(run: Path, step: int = 3) -> dict[str, torch.Tensor]:
    path = run / f"checkpoints/step_{step}/model"
    return transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()


def apart(one: Path, two: Path, step: int = 3) -> float:
    left, right = weights(one, step), weights(two, step)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(folder, method, mode):
    """The same samples, verdicts and evaluations, the same trajectory: neither rows nor tokens
    depend on how many processes share them, whatever the lengths."""
    one, two = folder / f"one-{method}", folder / f"{mode}-{method}"
    lengths = [row["num_tokens"] for row in lines(one, "samples.jsonl")]
    assert max(lengths) >= 3 * min(lengths)
    assert lines(one, "samples.jsonl") == lines(two, "samples.jsonl")
    assert not differences(one, two)
    assert apart(one, two) < 1e-5
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert not torch.equal(start["model.norm.weight"], weights(two)["model.norm.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_stored_rollouts_give_one_trajectory(folder, mode):
    """1 to 40 tokens each, two updates of a step: losses and weights, after every step."""
    one, two = folder / "one-stored-opd", folder / f"{mode}-stored-opd"
    assert not differences(one, two)
    (row, *_) = [row for row in lines(two, "metrics.jsonl") if "loss" in row]
    assert row["num_trained_tokens"] == 62 and abs(row["policy_log_ratio_mean"]) > 0.1
    assert all(apart(one, two, step) < 1e-5 for step in range(1, 5))
    assert apart(one, folder / "one-opd") > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_rollouts_keeps_step(folder, mode):
    """One rollout for two processes, and ends after 1 to 24 tokens: nothing hangs."""
    run = folder / f"lonely-{mode}-opd"
    assert [row["num_rollouts"] for row in lines(run, "metrics.jsonl") if "loss" in row] == [
        1.0
    ] * 3
    assert weights(run)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_do_not_know_how_many_processes_wrote_them(folder, mode):
    """Saved by two and resumed by one, and the reverse: the run that was never cut."""
    assert not differences(folder / "one-opd", folder / f"from-one-{mode}-opd")
    assert apart(folder / "one-opd", folder / f"from-one-{mode}-opd") < 1e-5
    cut(folder, f"{mode}-opd", f"to-one-{mode}-opd")
    importlib.import_module("opd").main(flags(folder, "opd", f"to-one-{mode}", "--resume"))
    assert not differences(folder / "one-opd", folder / f"to-one-{mode}-opd")
    assert apart(folder / "one-opd", folder / f"to-one-{mode}-opd") < 1e-5


def test_one_process_prints_and_writes(folder):
    output = (folder / "output.txt").read_text()
    assert output.count("run folder:") == len(json.loads((folder / "jobs.json").read_text()))
    assert len(lines(folder / "fsdp-opd", "metrics.jsonl")) == 5


def test_bfloat16_and_checkpointing_train_when_sharded(folder):
    (row,) = [row for row in lines(folder / "half-opd", "metrics.jsonl") if "loss" in row]
    one = lines(folder / "one-opd", "metrics.jsonl")[1]
    assert row["bad_step"] == 0.0 and abs(row["loss"] - one["loss"]) < 0.2 * abs(one["loss"])


def test_adapters_are_sharded_too(folder):
    """And the reference, which is the sharded student without its adapters."""
    assert not differences(folder / "one-lora-exopd", folder / "fsdp-lora-exopd")
    assert apart(folder / "one-lora-exopd", folder / "fsdp-lora-exopd") < 1e-5
    assert lines(folder / "half-lora-opd", "metrics.jsonl")[1]["bad_step"] == 0.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", VIEWS)
def test_teachers_with_another_prompt_are_one_on_two_processes(folder, kind, mode):
    """Averages and adapters sharded like the student, frozen teachers sharded too; a function of
    the user is asked by the first process alone."""
    one, two = (folder / f"{each}-{kind}-{VIEWS[kind][0]}" for each in ("one", mode))
    assert not differences(one, two)
    assert apart(one, two) < 1e-5
    plain = folder / f"one-{VIEWS[kind][0]}"
    assert lines(one, "metrics.jsonl")[1]["loss"] != lines(plain, "metrics.jsonl")[1]["loss"]


@pytest.mark.parametrize("mode", MODES)
def test_an_average_does_not_know_how_many_processes_saved_it(folder, mode):
    """Saved by two after step 2 and resumed by one: the run that was never cut."""
    cut(folder, f"{mode}-average-opd", f"to-one-{mode}-average-opd")
    method, argv = view_flags(folder, "average", f"to-one-{mode}", "--resume")
    importlib.import_module(method).main(argv)
    assert not differences(folder / "one-average-opd", folder / f"to-one-{mode}-average-opd")
    assert apart(folder / "one-average-opd", folder / f"to-one-{mode}-average-opd") < 1e-5


def test_shares_of_all_ranks_are_everything(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    for num in range(9):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares += list(range(num))[ranks.share(num)]
        assert shares == list(range(num))


def test_flags_of_several_processes(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        opd.main(["--shard", "fsdp"])
    assert stop.value.code == 2 and "start with torchrun" in capsys.readouterr().err
    with pytest.raises(console.RunError, match="needs --shard fsdp"):
        opd.parse_args(["--shard-frozen"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(console.RunError, match="gives each process a device"):
        opd.parse_args(["--device", "cuda:1"])
    with pytest.raises(console.RunError, match="leave --teacher-device out"):
        opd.parse_args(["--shard", "fsdp", "--shard-frozen", "--teacher-device", "cpu"])
    with pytest.raises(console.RunError, match="--teacher-offload: models of --shard-frozen stay"):
        opd.parse_args(["--shard", "fsdp", "--shard-frozen", "--teacher-offload"])


# ------------------------------------------------------------------------------- a rank that dies
def processes(parent: int) -> dict[int, int]:
    """Process ids of the ranks that `parent` has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            above = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (path / "environ").read_text().split("\0") if above == parent else []
        except OSError:
            continue
        found |= {int(word[5:]): int(path.name) for word in words if word.startswith("RANK=")}
    return found


def test_what_a_function_of_the_user_raises_ends_all_processes_saved(tmp_path):
    """It is asked by the first process, and all have its error; one line says it."""
    tinylm.save_family(tmp_path)
    (tmp_path / "told.py").write_text(TOLD.replace("completions[1 - index]", "completions[9]"))
    view = ["--teacher-prompt", f"{tmp_path}/told.py:hint", "--shard", "fsdp"]
    argv = flags(tmp_path, "opd", "fails", *view, "--eval-every", "0")
    process = torchrun(str(ROOT / "methods/opd.py"), *argv)
    try:
        said, errors = process.communicate(timeout=400)
    finally:
        end_session(process)
    lines = [line for line in errors.splitlines() if "list index out of range" in line]
    assert len(lines) == 1 and "told.py:hint: IndexError" in lines[0], errors
    assert "! RunError in phase generate: saved" in said + errors
    assert (tmp_path / "fails-opd/checkpoints/step_0/manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_rank_dies_or_hangs_the_other_ends_within_the_limit(tmp_path, number):
    tinylm.save_model(tmp_path / "student", 0)
    tinylm.save_model(tmp_path / "teacher", 1)
    tinylm.save_prompts(tmp_path / "prompts.jsonl")
    endless = ["--steps", "100000", "--save-every", "0", "--eval-every", "0"]
    limit = ["--rank-timeout-s", "15"]
    argv = flags(tmp_path, "opd", "dies", *endless, *limit)
    with (tmp_path / "errors.txt").open("w") as errors:
        process = torchrun(
            str(ROOT / "methods/opd.py"), *argv,
            stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        ids: dict[int, int] = {}
        try:
            metrics = tmp_path / "dies-opd/metrics.jsonl"
            wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 1, 200)
            ids = processes(process.pid)
            os.kill(ids[1], number)
            start = time.monotonic()
            wait_until(lambda: ended(ids[0]), 60)
            assert time.monotonic() - start < 15 + 10
        finally:
            for each in ids.values():  # sessions of their own, and one may be stopped
                if not ended(each):
                    os.kill(each, signal.SIGKILL)
            end_session(process)
            process.wait()
    text = (tmp_path / "errors.txt").read_text()
    said = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process has ended or hangs" in said[0], text[-3000:]


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_sg_opd_on_two_processes_improves_the_tiny_student(tmp_path):
    few = tmp_path / "few.jsonl"
    rows = (files.TINY / "prompts/test.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(rows[::4]))
    argv = f"--steps 10 --eval-every 10 --eval-samples 3 --device cpu --test-prompts {few}".split()
    argv += ["--run-dir", str(tmp_path / "run"), "--shard", "fsdp"]
    process = torchrun(str(ROOT / "methods/sg_opd.py"), *argv)
    try:
        _, errors = process.communicate(timeout=1500)
    finally:
        end_session(process)
    assert process.returncode == 0, errors[-3000:]
    logged = lines(tmp_path / "run", "metrics.jsonl")
    first, last = (row for row in logged if "eval/student/avg@3" in row)
    assert last["eval/student/avg@3"] > first["eval/student/avg@3"]
    assert last["eval/student/reverse_kl"] < 0.9 * first["eval/student/reverse_kl"]
