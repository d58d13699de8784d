"""The order of calls that vLLM wants on a GPU, with a stand-in for it; the rest: tests/engines."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import opd
import pytest
import tinylm
import torch

from opd_ops import engines, memory, models, ranks


class Engine:
    """Notes what it is asked to do; answers every prompt with the token 3."""

    def __init__(self, **how: object) -> None:
        self.how, self.calls = how, []
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 0)

    def wake_up(self) -> None:
        self.calls.append("wake")

    def sleep(self, level: int) -> None:
        self.calls.append("sleep")

    def collective_rpc(self, name: str, kwargs: dict) -> None:
        self.calls.append(name)
        self.weights = dict(kwargs["weights_iterator"])

    def generate(self, prompts: list, params: list, use_tqdm: bool) -> list:
        self.calls.append("generate")
        output = SimpleNamespace(token_ids=[3], logprobs=[{3: SimpleNamespace(logprob=-0.5)}])
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    vllm = SimpleNamespace(LLM=Engine, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(ranks, "at_end", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tinylm.save_model(tmp_path / "student", 0)
    args = opd.parse_args(["--student", str(tmp_path / "student"), "--device", "cpu"])
    models.prepare(opd.model_paths(args) | {"teacher": args.student}, args)
    student = models.load_lm(args.student, False, args)
    args.device = "cuda:0"
    student.engine = engines.VllmSampler(args.student, args)
    return student, args


def sample(student, args) -> opd.Rollout:
    prompts = [opd.Prompt((4, 5), "", "", "", {})] * 2
    return opd.sample(student, prompts, opd.uniforms(2, 2, 0, args), args, 1.0)


def test_weights_come_while_the_engine_is_awake(setup):
    """Asleep it has no memory for them. Only new weights are handed over."""
    student, args = setup
    engine = student.engine.engine
    assert engine.how["enable_sleep_mode"]
    rollout = sample(student, args)
    assert rollout.completion_ids.tolist() == [[3], [3]] and not rollout.ended.any()
    turn = ["wake", "reload_weights", "generate", "sleep"]
    assert engine.calls == turn
    sample(student, args)
    assert engine.calls == [*turn, "wake", "generate", "sleep"]
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    sample(student, args)
    assert engine.calls[7:] == turn
    assert all(torch.equal(engine.weights[k], v) for k, v in student.lm.state_dict().items())
    ranks.end()
    assert engine.calls[-1] == "shutdown"


def test_the_estimate_has_the_engine_instead_of_the_own_sampler(setup, monkeypatch):
    student, args = setup
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    args.device, args.sampler = "cpu", "vllm"
    found = memory.estimate({"student": args.student}, 12, args)
    size = sum(each.numel() * each.element_size() for each in student.parameters())
    assert [name for name in found if name.startswith("generate")] == ["generate: vLLM"]
    assert found["generate: vLLM"] == size + 2**30
    args.device, total = "cuda:0", SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    assert memory.estimate({"student": args.student}, 12, args)["generate: vLLM"] == 300
