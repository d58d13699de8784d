"""--lora-rank: adapters train, the base does not, and is the reference without a second copy."""

from __future__ import annotations

import exopd
import opd
import pytest
import sg_opd
import tinylm
import torch
import transformers

from opd_run import adapters, files, models, setup

FLAGS = ["--max-completion-tokens", "8", "--device", "cpu", "--lora-rank", "4", "--lr", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("lora"))


def prepared(folder, module, *flags: str):
    """Models of a method after two steps on three completions."""
    paths = ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    args = module.parse_args([*FLAGS, *paths, *flags])
    loaded, tokenizer = tinylm.load(module, args)
    chosen = [module.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in ("1+2=", "a", "7")]
    rollout = module.sample(
        loaded["student"], chosen, module.uniforms(3, "rollouts", 0, args), args
    )
    rollout.verdict = torch.tensor([1.0, -1.0, 1.0])
    before = {name: w.detach().clone() for name, w in loaded["student"].named_parameters()}
    optimizer = module.make_optimizer(loaded["student"], args)
    for step in range(2):
        batch = [(rollout, module.score(loaded, rollout, args))]
        module.train_step(loaded["student"], optimizer, batch, args, step)
    return loaded, args, rollout, before, optimizer


def test_only_the_adapters_train(folder):
    loaded, _, _, before, optimizer = prepared(folder, opd)
    after = dict(loaded["student"].named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    adapters = {name for name in after if ".lora_" in name}
    assert changed == adapters and len(adapters) == 2 * 2 * 7  # two layers of seven matrices
    assert not any("lm_head" in name or "embed" in name for name in adapters)
    assert loaded["student"].plain_head
    trained = {id(w) for group in optimizer.param_groups for w in group["params"]}
    assert trained == {id(after[name]) for name in adapters}


@pytest.mark.parametrize("module, flags", [(exopd, []), (sg_opd, ["--gate-target", "reference"])])
def test_the_base_is_the_reference_without_a_second_copy(folder, module, flags):
    loaded, args, rollout, _, _ = prepared(folder, module, *flags)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    want = module.token_logp(
        models.CausalLM(fresh, True, torch.float32, loaded["student"].facts), rollout, args
    )
    found = module.score(loaded, rollout, args)["reference_logp"]
    assert torch.allclose(found, want, atol=1e-6)
    trained = module.token_logp(loaded["student"], rollout, args)
    assert (trained - want).abs().max() > 1e-3  # and the adapters are back on

    def num_bytes(names):
        weights = {id(w): w for name in names for w in loaded[name].parameters()}
        return sum(w.numel() * w.element_size() for w in weights.values())

    assert num_bytes(loaded) == num_bytes(["student"]) + num_bytes(["teacher"])


def test_another_reference_is_loaded(folder):
    paths = {"student": f"{folder}/student", "reference": f"{folder}/teacher"}
    args = opd.parse_args([*FLAGS, "--student", paths["student"]])
    loaded, _ = tinylm.load(opd, args, **paths)
    assert not isinstance(loaded["reference"], adapters.WithoutAdapter)


def test_the_export_is_a_plain_model_with_the_adapters_in_it(folder, tmp_path):
    loaded, args, rollout, _, _ = prepared(folder, opd)
    tokenizer, _ = setup.prepare(opd.model_paths(args), args, opd.render)
    adapters.export(loaded["student"], tokenizer, tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    assert plain.state_dict().keys() == start.state_dict().keys()
    found = opd.token_logp(
        models.CausalLM(plain, True, torch.float32, loaded["student"].facts), rollout, args
    )
    want = opd.token_logp(loaded["student"], rollout, args)
    assert torch.allclose(found, want, atol=1e-5)


def test_resume_equals_an_uninterrupted_run(folder):
    named = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    paths = [item for flag, name in named.items() for item in (flag, str(folder / name))]
    sizes = "--prompts-per-step 2 --rollouts-per-prompt 2 --save-every 2 --keep-checkpoints 0"
    argv = [*FLAGS, *paths, *sizes.split(), "--steps", "4", "--run-dir", str(folder / "run")]
    opd.main(argv)
    last = folder / "run/checkpoints/step_4"
    want = transformers.AutoModelForCausalLM.from_pretrained(last / "model").state_dict()
    rows = [row["loss"] for row in files.read_metrics(folder / "run")]
    for path in last.rglob("*"):
        path.unlink() if path.is_file() else None
    opd.main([*argv, "--resume"])
    found = transformers.AutoModelForCausalLM.from_pretrained(last / "model").state_dict()
    assert all(torch.equal(want[name], found[name]) for name in want)
    assert rows == [row["loss"] for row in files.read_metrics(folder / "run")]
