"""The memory estimate of --dry-run, and the padding of micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import exopd
import numpy as np
import opd
import pytest
import sg_opd
import supervised
import tinylm
import torch
import transformers
import tropd

from opd_run import memory, ranks, rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    tinylm.save_model(folder / "student", 0)
    tinylm.save_model(folder / "teacher", 1, num_hidden_layers=4)
    tinylm.save_prompts(folder / "prompts.jsonl")
    return folder


def arguments(folder, *flags: str):
    paths = ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    paths += ["--prompts", f"{folder}/prompts.jsonl"]
    kinds = ["--dtype", "float32", "--teacher-dtype", "float32"]
    return opd.parse_args([*paths, "--device", "cpu", *kinds, *flags])


def num_bytes(weights) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_weights_gradients_and_moments_are_those_of_the_run(folder, more):
    args = arguments(folder, *more)
    found = memory.estimate(opd.model_paths(args), 12, args)
    loaded, _ = tinylm.load(opd, args)
    student = loaded["student"]
    assert found["student weights"] == num_bytes(student.parameters())
    assert found["teacher weights"] == num_bytes(loaded["teacher"].parameters())
    optimizer = opd.make_optimizer(student, args)
    moments = [each[key] for each in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found["optimizer"] == num_bytes(moments) == 2 * found["student: gradients"]


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_an_average_is_a_second_student_beside_the_reference(folder, more):
    """Float32 whatever --teacher-dtype says; in a checkpoint, too."""
    argv = ["--student", f"{folder}/student", "--teacher", "ema:0.9", "--device", "cpu"]
    args = exopd.parse_args([*argv, "--dtype", "float32", "--teacher-dtype", "bfloat16", *more])
    found = memory.estimate(exopd.model_paths(args), 12, args)
    loaded, _ = tinylm.load(exopd, args)
    assert found["teacher weights"] == num_bytes(loaded["teacher"].parameters())
    assert found.get("reference weights") == (
        None if more else num_bytes(loaded["reference"].parameters())
    )


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_activations_are_what_autograd_saves(folder, more):
    """Counted without data, against the saved tensors of a real forward pass of that size."""
    args = arguments(folder, "--micro-batch-tokens", "400", "--max-completion-tokens", "38", *more)
    found = memory.estimate(opd.model_paths(args), 12, args)
    student = tinylm.load(opd, args)[0]["student"]
    ids = torch.randint(46, (8, 50))
    mask = torch.ones_like(ids)
    mask[:4, :5] = 0
    saved = {}

    def pack(value):
        saved[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        student.lm.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    for weight in student.parameters():
        saved.pop(weight.untyped_storage().data_ptr(), None)
    want = sum(value.untyped_storage().nbytes() for value in saved.values())
    assert found["student: activations"] == pytest.approx(want, rel=0.1)


def test_what_the_flags_change(folder):
    def of(*flags):
        args = arguments(folder, *flags)
        return memory.estimate(opd.model_paths(args), 12, args)

    plain = of()
    assert of("--gradient-checkpointing")["student: activations"] < plain["student: activations"]
    assert of("--teacher-dtype", "bfloat16")["teacher weights"] == plain["teacher weights"] / 2
    half = of("--dtype", "bfloat16")
    assert half["generate: cache"] == plain["generate: cache"] / 2
    assert half["student weights"] == plain["student weights"]
    longer = of("--max-completion-tokens", "268")["generate: cache"]
    assert longer == 2 * plain["generate: cache"]  # 12 + 128 tokens, 12 + 268
    always = plain["student weights"] + plain["teacher weights"] + plain["optimizer"]
    assert always + plain["student: gradients"] < memory.peak(plain) < sum(plain.values())


def test_evaluation_alone_trains_and_saves_nothing(folder, capsys):
    args = arguments(folder, "--eval-only", "--test-prompts", str(folder / "prompts.jsonl"))
    found = memory.estimate(opd.model_paths(args), 12, args)
    assert {name.partition(":")[0] for name in found} == {
        "student weights", "teacher weights", "evaluate",
    }  # fmt: skip
    trained = arguments(folder)
    of_training = memory.estimate(opd.model_paths(trained), 12, trained)
    assert found["evaluate: cache"] == 2 * of_training["generate: cache"]  # 256 rows, not 128
    tested = arguments(folder, "--test-prompts", str(folder / "prompts.jsonl"))
    with_tests = memory.estimate(opd.model_paths(tested), 12, tested)
    assert with_tests["evaluate: cache"] == found["evaluate: cache"]  # counted while training, too
    assert not any(name.startswith("evaluate") for name in of_training)
    memory.say(opd.model_paths(args), [SimpleNamespace(longest=2)], args)
    said = capsys.readouterr().out
    assert "peak, calculated" in said and "checkpoint" not in said


def token_in_a_cache(path) -> float:
    """Bytes of a token in a real cache in float32, and in the copy of one layer that grows."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(path)
    cache = lm(torch.zeros(2, 10, dtype=torch.int64), use_cache=True).past_key_values
    per_token = num_bytes(t for layer in cache.layers for t in (layer.keys, layer.values)) / 20
    layers = lm.config.num_hidden_layers
    return per_token * (layers + 1) / layers


def test_the_cache_is_what_the_sampler_holds(folder):
    args = arguments(folder)
    found = memory.estimate(opd.model_paths(args), 12, args)["generate: cache"]
    assert found == 128 * (12 + 128) * token_in_a_cache(folder / "student")


SAMPLES = {  # method, flags, phase, rows of the teacher's
    "evaluation": (opd, "--eval-teacher --test-prompts {prompts}", "evaluate", 256),
    "sg_opd": (sg_opd, "--teacher-share 0.25", "generate", 32),
    "tropd": (tropd, "--guided-rollouts 1 --rollouts-per-prompt 4", "generate", 32),
    "supervised": (supervised, "", "generate", 128),
}
WRITES_NOT = {
    "sg_opd": "--teacher-phase-steps 0",
    "tropd": "--no-guidance",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_teacher_that_samples_has_a_cache(folder, name):
    """A large teacher's cache counts where it is larger than the student's; it is in its type."""
    method, flags, phase, rows = SAMPLES[name]
    large = folder / "large"
    tinylm.save_model(large, 1, num_hidden_layers=4, head_dim=512)
    common = ["--student", f"{folder}/student", "--teacher", str(large), "--device", "cpu"]
    common += ["--prompts", f"{folder}/prompts.jsonl", "--dtype", "bfloat16"]
    flags = [*common, *flags.format(prompts=folder / "prompts.jsonl").split()]
    args = method.parse_args([*flags, "--teacher-dtype", "float32"])
    found = memory.estimate(method.model_paths(args), 12, args)
    assert found[f"{phase}: cache"] == rows * (12 + 128) * token_in_a_cache(large)
    if name in WRITES_NOT:
        args = method.parse_args([*flags, *WRITES_NOT[name].split()])
        less = memory.estimate(method.model_paths(args), 12, args)["generate: cache"]
        assert less < found["generate: cache"] / 2


def test_dry_run_says_it(folder, capsys):
    args = ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher", "--dry-run"]
    opd.main([*args, "--prompts", f"{folder}/prompts.jsonl", "--run-dir", f"{folder}/none"])
    output = capsys.readouterr().out
    for name in ("student weights", "optimizer", "generate: cache", "peak, calculated"):
        assert f"memory: {name}" in output


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("kind", ["reasoning", "short", "uniform"])
def test_at_most_a_tenth_is_padding(kind, num_ranks, monkeypatch):
    generator = np.random.default_rng(0)
    prompts, completions = {
        "reasoning": (
            generator.integers(60, 300, 512),
            generator.lognormal(6.8, 0.8, 512).clip(1, 4096).astype(int),
        ),
        "short": (
            generator.integers(20, 30, 128),
            generator.normal(63, 18, 128).clip(5, 128).astype(int),
        ),
        "uniform": (generator.integers(60, 300, 256), generator.integers(1, 16384, 256)),
    }[kind]
    sizes = torch.tensor(np.stack([prompts, completions], 1))
    masks = [torch.arange(int(n.max())) < n[:, None] for n in sizes.T]
    prompts = [SimpleNamespace(longest=int(size)) for size in sizes[:, 0]]
    rollout = SimpleNamespace(prompts=prompts, prompt_mask=masks[0], completion_mask=masks[1])
    groups = []
    monkeypatch.setattr(ranks, "world", lambda: num_ranks)
    for rank in range(num_ranks):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        own, most, shortest = rollouts.pack(rollout, 16384)
        assert len(own) <= most and sizes[shortest].sum() == sizes.sum(1).min()
        groups += own
    assert sorted(row for group in groups for row in group) == list(range(len(sizes)))
    padded = [int(sizes[group].max(0).values.sum()) * len(group) for group in groups]
    assert all(size <= 16384 or len(group) == 1 for size, group in zip(padded, groups))
    assert 1 - int(sizes.sum()) / sum(padded) < 0.1
