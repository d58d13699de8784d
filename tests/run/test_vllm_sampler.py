"""The order of calls that vLLM wants on a GPU, with a stand-in for it; the rest: tests/engines."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import ClassVar

import modelzoo
import opd
import pytest
import tinylm
import torch

from opd_run import adapters, console, memory, ranks, vllm_sampler


class Engine:
    """Notes what it is asked to do; answers every prompt with the token 3."""

    answer: ClassVar[list[int]] = [3]

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
        self.prompts, self.params = [each["prompt_token_ids"] for each in prompts], params
        logprobs = [{each: SimpleNamespace(logprob=-0.5)} for each in self.answer]
        output = SimpleNamespace(token_ids=self.answer, logprobs=logprobs)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    vllm = SimpleNamespace(LLM=Engine, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(ranks, "at_end", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tinylm.save_model(tmp_path / "student", 0)
    args = opd.parse_args(["--student", str(tmp_path / "student"), "--device", "cpu"])
    loaded, _ = tinylm.load(opd, args, student=args.student)
    student = loaded["student"]
    args.device = "cuda:0"
    student.engine = vllm_sampler.VllmSampler(args.student, student.facts, args)
    return student, args


def sample(student, args) -> opd.Rollout:
    prompts = [opd.Prompt((4, 5), "", "", "", {})] * 2
    return opd.sample(student, prompts, opd.uniforms(2, "rollouts", 0, args), args)


def test_weights_come_while_the_engine_is_awake(prepared):
    """Asleep it has no memory for them. Only new weights are handed over."""
    student, args = prepared
    engine = student.engine.engine
    assert engine.how["enable_sleep_mode"]
    rollout = sample(student, args)
    assert rollout.completion_ids.tolist() == [[3], [3]] and not rollout.ended.any()
    assert rollout.behaviour_logp.tolist() == rollout.rollout_logp.tolist() == [[-0.5], [-0.5]]
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


@pytest.mark.parametrize("fused", [True, False])
def test_weights_of_any_optimizer_are_new_weights(prepared, fused):
    """A fused kernel does not count its change; what goes by that count sees it all the same, with
    an optimizer that a fork makes by itself too."""
    student, args = prepared
    engine = student.engine.engine
    sample(student, args)
    head = student.head_on(torch.device("cpu")).clone()
    for weight in student.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(student.parameters(), 1.0, fused=fused).step()
    sample(student, args)
    assert engine.calls.count("reload_weights") == 2
    assert all(torch.equal(engine.weights[k], v) for k, v in student.lm.state_dict().items())
    assert not torch.equal(head, student.head_on(torch.device("cpu")))
    assert opd.make_optimizer(student, args).defaults["fused"]  # on a GPU, as this seems to be


def test_ids_beyond_the_vocabulary_end_a_completion(prepared, monkeypatch, capsys):
    """The engine is not told which ids are in use: in Python that takes seconds a step."""
    student, args = prepared
    valid = student.facts.valid_vocab
    for answer, want in (([3, valid, 4], [3]), ([valid + 3], []), ([3, valid - 1], [3, valid - 1])):
        monkeypatch.setattr(Engine, "answer", answer)
        rollout = sample(student, args)
        kept = [
            ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)
        ]
        assert kept == [want] * 2
        assert ("is padding of the vocabulary" in capsys.readouterr().out) == (want != answer)
    params = student.engine.engine.params
    assert params and all("allowed_token_ids" not in each for each in params)


def test_truncation_leaves_one_law(prepared):
    """`behaviour_logp` is of the full softmax whatever was sampled from; of the law that was, an
    engine says nothing. A prefix is read, not sampled, and takes its columns."""
    student, args = prepared
    prompts = [opd.Prompt((4, 5), "", "", "", {})] * 2
    uniform = opd.uniforms(2, "rollouts", 0, args)
    rollout = opd.sample(student, prompts, uniform, args, (1.0, 0.9, 0), prefixes=[(), (7, 8)])
    assert rollout.behaviour_logp.tolist() == [[-0.5, 0.0, 0.0], [0.0, 0.0, -0.5]]
    assert rollout.rollout_logp.isnan().tolist() == [[True, False, False], [False, False, True]]
    assert rollout.completion_ids.tolist() == [[3, 0, 0], [7, 8, 3]]
    assert rollout.prefix_mask.tolist() == [[False] * 3, [True, True, False]]
    engine = student.engine.engine
    assert engine.how["logprobs_mode"] == "raw_logprobs"
    assert engine.prompts == [[4, 5], [4, 5, 7, 8]]
    assert [each["max_tokens"] for each in engine.params] == [128, 126]


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3"])
def test_weights_come_under_the_names_of_the_files(prepared, tmp_path, name, more):
    """The engine reads checkpoints: experts that are one tensor in memory are many there."""
    engine = prepared[0].engine
    path = modelzoo.save(tmp_path / "zoo", name)
    student, tokenizer, _, _ = modelzoo.loaded(path, *more)
    engine.update(student)
    adapters.export(student, tokenizer, tmp_path / "model")
    found, want = engine.engine.weights, modelzoo.read(tmp_path / "model")
    tied = {"lm_head.weight"} if name == "qwen3" else set()  # named twice in memory
    assert found.keys() == want.keys() | tied
    assert want.keys() == modelzoo.file_names(tmp_path / "zoo")
    assert all(torch.equal(found[each], want[each]) for each in want)


def test_another_loss_temperature_is_refused():
    with pytest.raises(console.RunError, match="--loss-temperature 1 only"):
        opd.parse_args(["--sampler", "vllm", "--loss-temperature", "0.7"])


def test_the_estimate_has_the_engine_instead_of_the_own_sampler(prepared, monkeypatch):
    student, args = prepared
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    args.device, args.sampler = "cpu", "vllm"
    found = memory.estimate({"student": args.student}, 12, args)
    size = sum(each.numel() * each.element_size() for each in student.parameters())
    assert [name for name in found if name.startswith("generate")] == ["generate: vLLM"]
    assert found["generate: vLLM"] == size + 2**30
    args.device, total = "cuda:0", SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    assert memory.estimate({"student": args.student}, 12, args)["generate: vLLM"] == 300
