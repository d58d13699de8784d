"""--teacher-url against a stub of the server: equal scores, refusals, and a server that is away."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import opd
import pytest
import tinylm
import torch
from stubserver import StubServer

from opd_run import console, files, served_teacher

OWN = {
    "opd": [],
    "exopd": [],
    "sg_opd": ["--teacher-phase-steps", "0"],
    "topk_opd": ["--support-size", "8", "--tail", "bucket"],
    "tropd": ["--outlier-support", "8", "--no-guidance"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("served"))


@pytest.fixture
def stub(folder):
    server = StubServer(str(folder / "teacher"))
    yield server
    server.close()


def flags(folder, *more: str) -> list[str]:
    named = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    paths = [item for flag, name in named.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 12 --prompts-per-step 3 --rollouts-per-prompt 2 --device cpu"
    return [*paths, *sizes.split(), "--dtype", "float32", *more]


def prepared(module, folder, *more: str):
    args = module.parse_args(flags(folder, *OWN[module.__name__], *more))
    loaded, tokenizer = tinylm.load(module, args)
    return loaded, args, tokenizer


@pytest.mark.parametrize("told", [False, True], ids=["", "told"])
@pytest.mark.parametrize("method", OWN)
def test_a_served_teacher_gives_the_step_of_a_local_one(folder, stub, method, told):
    """Also behind a prompt of its own, shorter or longer than the student's."""
    module = importlib.import_module(method)
    local, args, tokenizer = prepared(module, folder)
    served, served_args, _ = prepared(module, folder, "--teacher-url", stub.url)
    assert isinstance(served["teacher"], served_teacher.RemoteTeacher)
    texts = ["1+2=", "a", "12+345=", "hello"]
    prompts = [module.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in texts]
    uniform = module.uniforms(4, "rollouts", 0, args)
    rollout = module.sample(local["student"], prompts, uniform, args)
    rollout.verdict = torch.tensor([1.0, -1.0, 1.0, 0.0])
    rollout.extra["coin"] = torch.full(rollout.completion_ids.shape, 0.5)
    if told:
        plain = module.score(local, rollout, args)
        read = [tuple(tokenizer.encode(text)) for text in ("7", "1+2=3 b", "12+345=357 " * 3, "x")]
        rollout.prompts = [replace(p, views={"teacher": ids}) for p, ids in zip(prompts, read)]
        assert any(
            not torch.equal(plain[k], v) for k, v in module.score(local, rollout, args).items()
        )
    want, found = module.score(local, rollout, args), module.score(served, rollout, served_args)
    for name, values in want.items():
        if name in ("support_ids", "support_mask", "outside"):
            assert torch.equal(found[name], values), name
        else:
            assert torch.allclose(found[name], values, atol=1e-4), name
    steps = []
    for scores, each in ((want, args), (found, served_args)):
        student = copy.deepcopy(local["student"])
        optimizer = module.make_optimizer(student, each)
        steps.append(module.train_step(student, optimizer, [(rollout, scores)], each, 0))
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], abs=1e-4)
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-3)


def test_a_run_waits_for_its_server(folder, stub, tmp_path, monkeypatch, capsys):
    """Two answers of 503 cost a pause each; the key goes along and stands nowhere."""
    monkeypatch.setenv(served_teacher.KEY, "secret-7")
    run = tmp_path / "run"
    argv = flags(folder, "--teacher-url", stub.url, "--steps", "2", "--run-dir", str(run))
    stub.failures = 2
    opd.main(argv)
    assert len([row for row in files.read_metrics(run) if "loss" in row]) == 2
    assert stub.headers["Authorization"] == "Bearer secret-7"
    logged = "".join(p.read_text(errors="replace") for p in run.glob("*.*") if p.suffix != ".png")
    assert "secret-7" not in logged + capsys.readouterr().out
    assert "reverse_kl" not in files.read_metrics(run)[-1]  # not known, so not logged


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(folder, stub, tmp_path, capsys):
    run = tmp_path / "run"
    argv = flags(folder, "--steps", "9", "--run-dir", str(run), "--teacher-timeout-s", "2")
    train = opd.train_step

    def once(*args):
        stub.failures = 10**6
        return train(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(opd, "train_step", once)
        opd.main([*argv, "--teacher-url", stub.url])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "has not answered for 2 s: 503" in text
    assert "step_1; go on with --resume" in text
    stub.failures = 0
    opd.main([*argv, "--teacher-url", stub.url, "--resume", "--steps", "2"])
    assert files.read_metrics(run)[-1]["step"] == 2


def refused(module, folder, server, *more: str) -> str:
    with pytest.raises(console.RunError) as error:
        prepared(module, folder, "--teacher-url", server.url, *more)
    return str(error.value)


def test_what_is_refused(folder, stub, tmp_path):
    topk = importlib.import_module("topk_opd")
    words = tinylm.WORDS[:4] + tinylm.WORDS[:3:-1]  # same size, other ids
    other = StubServer(tinylm.save_model(tmp_path / "other", 1, words=words))
    warm = StubServer(str(folder / "teacher"), warm=True)
    assert "another tokenizer" in refused(opd, folder, other)
    assert "applies a temperature" in refused(opd, folder, warm)
    text = refused(topk, folder, stub, "--support-size", "21")
    assert "at most 20" in text and "--max-logprobs" in text
    for server in (other, warm):
        server.close()
    for wrong, words in (
        (["--loss-temperature", "0.7"], "--loss-temperature 1"),
        (["--objective", "full"], "--objective full"),
        (["--eval-teacher"], "only scores"),
        (["--teacher-url", "localhost:1"], "expected http"),
    ):
        with pytest.raises(console.RunError, match=words):
            opd.parse_args(flags(folder, "--teacher-url", stub.url, *wrong))


def test_a_method_that_samples_from_the_teacher_says_that_it_cannot(folder, stub, tmp_path, capsys):
    tropd = importlib.import_module("tropd")
    argv = flags(folder, "--teacher-url", stub.url, "--run-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit):
        tropd.main([*argv, "--outlier-support", "8"])
    assert "only scores, this method samples" in capsys.readouterr().err


def test_columns_of_padding_that_a_server_counts_are_left_out():
    """A head of 6 with a vocabulary of 4: a local teacher's softmax is over the 4."""
    logits = torch.tensor([1.0, 0.5, -1.0, 0.0, 2.0, 1.5])
    served = logits.log_softmax(0)
    entry = {each: float(served[each]) for each in (0, 1, 2, 4, 5)}  # top 4, and the token 2
    row = torch.empty(4)
    served_teacher.RemoteTeacher._fill(None, row, entry)
    assert torch.allclose(row, logits[:4].log_softmax(0), atol=1e-6)
