"""Any model type trains rightly, or is refused in one line: self-check, caches, noise, adapters,
tokens and positions. `modelzoo` makes the models; its whole table is docs/models.md."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import modelzoo
import opd
import pytest
import tinylm
import torch
import transformers

from opd_run import compat, diagnose, memory, models, selfcheck, setup
from opd_run.console import RunError

REFUSED = {
    "phimoe": "noise in train mode",
    "mamba": "does not go on from the cache",
    "mamba2": "does not go on from the cache",
    "falcon_mamba": "does not go on from the cache",
    "zamba2": "does not go on from the cache",
    "recurrent_gemma": "reads padding as text",
    "minimax": "cannot be sampled from",
    "nemotron_h": "does not go on from the cache",
    "rwkv": "reads padding as text",
    "xlstm": "reads padding as text",
    "bert as it comes": "no causal language model",
    "roberta as a decoder": "counts positions in its own way",
}
WITHOUT_LINEAR = ["gpt2", "falcon"]


def each_type(names=tuple(modelzoo.TYPES)):
    return [
        pytest.param(name, marks=() if name in modelzoo.QUICK else pytest.mark.slow)
        for name in names
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: the folder of a model of that type."""
    folder = tmp_path_factory.mktemp("zoo")

    def path(name: str) -> str:
        place = folder / name.replace(" ", "_")
        return str(place) if place.exists() else modelzoo.save(place, name)

    return path


# ------------------------------------------------------------------------------------- every type
@pytest.mark.parametrize("name", each_type())
def test_sampler_trainer_and_gradient_are_the_models_own_or_it_is_refused(made, name):
    if name in REFUSED:
        with pytest.raises(RunError, match=REFUSED[name]) as error:
            modelzoo.parity(made(name))
        assert "\n" not in str(error.value) and modelzoo.TYPES[name][0] in str(error.value)
    else:
        assert max(modelzoo.parity(made(name)).values()) < 1e-4


@pytest.mark.parametrize("name", each_type([n for n in modelzoo.TYPES if n not in REFUSED]))
def test_lora_export_is_the_student_in_memory(made, tmp_path, name):
    """Issue: with dense or shared experts, exports held `experts.base_layer` and no experts."""
    if modelzoo.TYPES[name][0] in WITHOUT_LINEAR:
        with pytest.raises(RunError, match=r"has no torch.nn.Linear but its head"):
            modelzoo.round_trip(made(name), tmp_path / "model", "--lora-rank", "4")
    else:
        off = modelzoo.round_trip(made(name), tmp_path / "model", "--lora-rank", "4")
        assert off < 1e-3


# ------------------------------------------------------------------------------------- self-check
def checked(path, *flags: str, teacher: str | None = None, **changes):
    argv = modelzoo.flags(path, *flags)
    argv[3] = teacher or path
    args = opd.parse_args(argv)
    every, tokenizer = tinylm.load(opd, args)
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in modelzoo.PROMPTS]
    functions = {"sample": opd.sample, "token_logp": opd.token_logp} | changes
    paths = opd.model_paths(args)
    selfcheck.check_models(every, paths, prompts, args, opd.Rollout, **functions)
    return every, prompts, args


def test_it_says_what_agreed_and_for_how_long(made, capsys):
    checked(made("qwen3"))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("check:"))
    assert "student" in line and "teacher" in line and line.endswith(" s")


@pytest.mark.parametrize("broken", ["sample", "token_logp"])
def test_it_uses_the_functions_of_the_file(made, broken):
    """A shift of 0.01 nats in either is seen."""

    def sample(*args, **how):
        rollout = opd.sample(*args, **how)
        rollout.behaviour_logp += 0.01 * rollout.completion_mask
        return rollout

    def token_logp(model, rollout, args):
        return opd.token_logp(model, rollout, args) - 0.01 * (len(rollout.prompts) > 1)

    with pytest.raises(RunError, match=r"off by 0\.01 nats"):
        checked(made("qwen3"), **{broken: {"sample": sample, "token_logp": token_logp}[broken]})


def test_rows_that_need_no_padding_are_looked_at_too(made, monkeypatch):
    """They are sampled without a mask, which a model may read in another way."""
    forward = models.CausalLM.forward

    def stretched(self, read, where, **inputs):
        if inputs.get("attention_mask") is None and "position_ids" in inputs:
            inputs["position_ids"] = 2 * inputs["position_ids"]
        return forward(self, read, where, **inputs)

    monkeypatch.setattr(models.CausalLM, "forward", stretched)
    with pytest.raises(RunError, match="the sampler recorded are off"):
        checked(made("qwen3"))


def test_numbers_that_are_none_are_refused(made):
    def token_logp(model, rollout, args):
        return opd.token_logp(model, rollout, args) * (
            1 if len(rollout.prompts) == 1 else torch.nan
        )

    with pytest.raises(RunError, match="off by inf nats"):
        checked(made("qwen3"), token_logp=token_logp)


def test_it_leaves_the_models_as_they_were(made):
    every, _, _ = checked(made("qwen3"))
    student = every["student"]
    assert not student.training and student.facts.eos_ids == {"student": (1,), "teacher": (1,)}


@pytest.mark.parametrize("off", [0.02, 0.3])
def test_weights_in_bfloat16_may_be_rounded(made, off):
    """0.1 nats in the mean, where float32 weights have to agree to 0.001 on every token."""

    def token_logp(model, rollout, args):
        return opd.token_logp(model, rollout, args) - off * (len(rollout.prompts) > 1)

    flags = ["--dtype", "bfloat16", "--lora-rank", "4"]
    if off < 0.1:
        checked(made("qwen3"), *flags, token_logp=token_logp)
    else:
        with pytest.raises(RunError, match=r"left-padded [^\n]*at most 0\.1"):
            checked(made("qwen3"), *flags, token_logp=token_logp)


def test_a_frozen_model_without_a_cache_scores_but_does_not_sample(made):
    """Mamba as a teacher: opd never samples from it; sg_opd and tropd are refused when they do."""
    every, prompts, args = checked(made("qwen3"), teacher=made("mamba"))
    rollout = modelzoo.sampled(every["student"], prompts, args)
    assert opd.token_logp(every["teacher"], rollout, args).isfinite().all()
    with pytest.raises(RunError, match=r"teacher .*mamba.*cannot be sampled from"):
        modelzoo.sampled(every["teacher"], prompts, args)
    with pytest.raises(RunError, match="cannot be sampled from"):
        checked(made("qwen3"), "--eval-teacher", teacher=made("mamba"))


def test_main_refuses_before_training_and_can_be_told_not_to_look(made, tmp_path, capsys):
    prompts = tinylm.save_prompts(tmp_path / "p.jsonl")
    more = ["--prompts", prompts, "--run-dir", f"{tmp_path}/run", "--steps", "0", "--eval-every"]
    argv = modelzoo.flags(made("rwkv"), *more, "0")
    with pytest.raises(SystemExit) as error:
        opd.main(argv)
    assert error.value.code == 1 and "reads padding as text" in capsys.readouterr().err
    opd.main([*argv, "--no-check-models", "--overwrite"])
    opd.main([*argv, "--dry-run"])
    with pytest.raises(SystemExit):
        opd.main([*argv, "--dry-run", "--check-models"])


# ------------------------------------------------------------------------- noise, caches, LongRoPE
def test_noise_is_off_at_every_depth():
    config = transformers.AutoConfig.for_model("gemma3", text_config={"attention_dropout": 0.1})
    opd.without_noise(config)
    assert config.get_text_config().attention_dropout == 0.0
    config = transformers.AutoConfig.for_model("mixtral", router_jitter_noise=0.1)
    opd.without_noise(config)
    assert config.router_jitter_noise == 0.0
    config = transformers.AutoConfig.for_model("phimoe")  # eval mode reads it too: not only noise
    opd.without_noise(config)
    assert config.router_jitter_noise == 0.01


def test_without_it_the_noise_is_seen(made, monkeypatch):
    monkeypatch.setattr(opd, "without_noise", lambda config: None)
    with pytest.raises(RunError, match="noise in train mode"):
        checked(made("mixtral with jitter"))


def test_frozen_models_keep_their_configuration(made):
    every, _, _ = checked(made("qwen3"), teacher=made("mixtral with jitter"))
    assert every["teacher"].lm.config.router_jitter_noise == 0.1


def test_states_of_linear_attention_are_selected(made, monkeypatch):
    name = "batch_select_indices"
    plain = models.DynamicCache.batch_select_indices
    monkeypatch.setattr(models._TypedCache, name, plain)
    with pytest.raises(RunError, match=name):
        checked(made("qwen3_next"))


def test_longrope_has_one_set_of_factors_for_all_sequences(made, monkeypatch, capsys):
    """A rollout's log-probs do not depend on how long its neighbours are."""
    every, prompts, args = checked(made("phi3 LongRoPE"), "--max-prompt-tokens", "24")
    assert "its long factors for all sequences, since 48 tokens can be" in capsys.readouterr().out
    rollout = modelzoo.sampled(every["student"], prompts, args)
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)
    assert lengths.max() > 32 > lengths.min()
    monkeypatch.setattr(setup, "pin_longrope", lambda lm, longest: False)
    with pytest.raises(RunError, match="reads positions by the length of the whole row"):
        checked(made("phi3 LongRoPE"), "--max-prompt-tokens", "24")


def test_longrope_that_no_sequence_crosses_is_left_alone(made):
    flags = ["--max-prompt-tokens", "20", "--max-completion-tokens", "12"]
    every, _, _ = checked(made("phi3 LongRoPE"), *flags)
    rope = every["student"].lm.model.rotary_emb
    assert torch.equal(rope.original_inv_freq, rope.inv_freq)
    want = transformers.AutoModelForCausalLM.from_pretrained(made("phi3 LongRoPE"))
    assert torch.equal(rope.original_inv_freq, want.model.rotary_emb.original_inv_freq)


def test_positions_that_the_longest_row_decides_are_tried_beyond_where_that_begins(tmp_path):
    """Dynamic scaling, refused where a sequence can be longer than 64 tokens, and only there."""
    law = {"rope_type": "dynamic", "factor": 4.0}
    path = tinylm.save_model(tmp_path / "m", 0, max_position_embeddings=64, rope_scaling=law)
    checked(path, "--max-prompt-tokens", "30", "--max-completion-tokens", "34")
    with pytest.raises(RunError, match=r"off by|length of the whole row"):
        checked(path, "--max-prompt-tokens", "30", "--max-completion-tokens", "60")


def test_the_same_where_each_kind_of_layer_has_its_own_scaling(tmp_path):
    laws = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    laws["full_attention"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    sizes = modelzoo.TYPES["gemma3_text"][1] | {"max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model("gemma3_text", **sizes, rope_parameters=laws)
    assert models.rope_boundary(config) == 64 and compat.num_positions(config) == 256
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tinylm.tokenizer().save_pretrained(tmp_path)
    checked(str(tmp_path), "--max-prompt-tokens", "30", "--max-completion-tokens", "34")
    with pytest.raises(RunError, match=r"off by|length of the whole row"):
        checked(str(tmp_path), "--max-prompt-tokens", "30", "--max-completion-tokens", "60")


def small_bert(folder: Path, kind: str, **more) -> str:
    torch.manual_seed(0)
    sizes = {k: v for k, v in modelzoo.BASE.items() if k != "num_key_value_heads"} | more
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tinylm.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_sees_the_tokens_to_come_is_refused(made, tmp_path, who):
    """BERT as its configuration comes: a teacher that has read the answer."""
    paths = {"student": made("qwen3"), "teacher": made("qwen3")}
    paths[who] = small_bert(tmp_path / "bert", "bert")
    with pytest.raises(RunError, match=rf"^{who} .*change by [\d.]+ nats with the tokens after"):
        checked(paths["student"], teacher=paths["teacher"])
    checked(small_bert(tmp_path / "decoder", "bert", is_decoder=True))


def test_positions_that_a_model_counts_in_its_own_way_are_refused(tmp_path):
    """RoBERTa's begin at 2: with those that the loop gives it, it is another model."""
    with pytest.raises(RunError, match="counts positions in its own way"):
        checked(small_bert(tmp_path / "m", "roberta", is_decoder=True))


def test_states_that_drift_a_little_at_every_token_are_seen(made):
    with pytest.raises(RunError, match=r"nemotron_h.*off by 0\.00\d+ nats"):
        modelzoo.loaded(made("nemotron_h"))


# --------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize(
    ("name", "share", "left"),
    [("qwen3", "100", ""),
     ("mixtral with jitter", "", "experts.down_proj, experts.gate_up_proj, mlp.gate (router)"),
     ("deepseek_v3", "", "experts.down_proj, experts.gate_up_proj, mlp.gate (router)")],
)  # fmt: skip
def test_what_has_adapters_and_what_is_frozen_is_said(made, capsys, name, share, left):
    modelzoo.loaded(made(name), "--lora-rank", "4")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("adapters:"))
    on, _, frozen = line.partition("; frozen, without adapters: ")
    assert f"{share} % of the weights of the blocks" in on and "self_attn." in on
    assert frozen == left


def test_the_adapter_is_saved_too_and_peft_reads_it(made, tmp_path):
    import peft

    modelzoo.round_trip(made("qwen3"), tmp_path / "model", "--lora-rank", "4")
    base = transformers.AutoModelForCausalLM.from_pretrained(made("qwen3"), dtype=torch.float32)
    ids = torch.arange(4, 20)[None]
    start = base(ids).logits
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
    assert torch.allclose(found, want, atol=1e-4) and not torch.allclose(start, want, atol=1e-1)


def test_no_adapter_folder_where_peft_would_read_another(made, tmp_path, capsys):
    modelzoo.round_trip(made("deepseek_v3"), tmp_path / "model", "--lora-rank", "4")
    assert "! no adapter/: of deepseek_v3" in capsys.readouterr().out
    assert not (tmp_path / "adapter").exists()


def test_an_export_with_names_of_adapters_is_refused(made, tmp_path, monkeypatch):
    from opd_run import adapters

    student, tokenizer, _, _ = modelzoo.loaded(made("qwen3"), "--lora-rank", "4")
    monkeypatch.setattr(adapters, "merged", lambda lm, weights: weights.items())
    with pytest.raises(RunError, match=r"export of qwen3: .* is no weight of its own"):
        adapters.export(student, tokenizer, tmp_path / "model")


def test_an_export_that_misses_weights_is_refused(made, tmp_path, monkeypatch):
    from opd_run import adapters

    student, tokenizer, _, _ = modelzoo.loaded(made("qwen3"), "--lora-rank", "4")
    plain = adapters.merged
    monkeypatch.setattr(
        adapters, "merged", lambda lm, w: [x for x in plain(lm, w) if "up_proj" not in x[0]]
    )
    with pytest.raises(RunError, match="2 missing_keys when"):
        adapters.export(student, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_folder_with_an_adapter_is_refused(tmp_path, who):
    path = tinylm.save_model(tmp_path / "both", 0)
    (tmp_path / "both/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    args = opd.parse_args([f"--{who}", path])
    with pytest.raises(RunError, match=f"--{who} .*merge the adapter into its model first"):
        setup.prepare(opd.model_paths(args), args, opd.render)


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_an_export_has_the_type_of_the_source(tmp_path, more):
    path = tinylm.save_model(tmp_path / "half", 0)
    half = transformers.AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16)
    half.save_pretrained(path)
    for flag, dtype in (("source", torch.bfloat16), ("float32", torch.float32)):
        student, tokenizer, _, _ = modelzoo.loaded(path, "--export-dtype", flag, *more)
        from opd_run import adapters

        folder = tmp_path / flag
        adapters.export(student, tokenizer, folder)
        assert {weight.dtype for weight in modelzoo.read(folder).values()} == {dtype}
        assert modelzoo.file_names(folder) == modelzoo.file_names(Path(path))
        back = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert back.dtype == dtype
        assert torch.equal(back.lm_head.weight.float(), half.lm_head.weight.float())


def test_a_configuration_that_names_no_type_leaves_it_to_the_files(tmp_path, capsys):
    """And float32 is float32 where adapters are on weights in bfloat16."""
    from opd_run import adapters

    path = tinylm.save_model(tmp_path / "half", 0)
    half = transformers.AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16)
    half.save_pretrained(path)
    config = json.loads((tmp_path / "half/config.json").read_text())
    del config["dtype"]
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    adapted = ["--lora-rank", "4", "--dtype", "bfloat16"]
    for flag, dtype in (("source", torch.bfloat16), ("float32", torch.float32)):
        for more in ([], adapted):
            flags = modelzoo.flags(path, "--export-dtype", flag, *more)
            args = opd.parse_args([*flags, *more])
            every, tokenizer = tinylm.load(opd, args)
            said = f"exports: model/ of a checkpoint is {str(dtype)[6:]} (--export-dtype {flag})"
            assert said in capsys.readouterr().out
            folder = tmp_path / flag / str(len(more))
            adapters.export(every["student"], tokenizer, folder)
            assert {weight.dtype for weight in modelzoo.read(folder).values()} == {dtype}
    counted = memory._counted(opd.model_paths(args), 12, opd.parse_args(modelzoo.flags(path)))[1]
    assert counted.checkpoint_bytes == (2 + 4 + 8) * counted.num_parameters


def test_adapters_on_bfloat16_are_rounded_once_to_the_type_of_the_export(tmp_path):
    from opd_run import adapters

    flags = ["--export-dtype", "float32", "--lora-rank", "4", "--dtype", "bfloat16"]
    path = tinylm.save_model(tmp_path / "m", 0)
    student, tokenizer, _, _ = modelzoo.loaded(path, *flags)
    layer = student.lm.model.layers[0].mlp.up_proj
    down, up = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    torch.nn.init.normal_(up)
    adapters.export(student, tokenizer, tmp_path / "model")
    found = modelzoo.read(tmp_path / "model")["model.layers.0.mlp.up_proj.weight"]
    want = layer.base_layer.weight.float() + 8.0 * (up @ down)  # alpha 32 by rank 4
    assert torch.equal(found, want)


def test_an_export_keeps_what_transformers_keeps_in_float32(made, tmp_path):
    from opd_run import adapters

    student, tokenizer, _, _ = modelzoo.loaded(made("deepseek_v3"))
    student.export_dtype = torch.bfloat16
    adapters.export(student, tokenizer, tmp_path / "model")
    kinds = {name: weight.dtype for name, weight in modelzoo.read(tmp_path / "model").items()}
    exact = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert exact == {"model.layers.1.mlp.gate.e_score_correction_bias"}


# ---------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_experts_are_computed_in_the_type_of_the_run(made, more):
    """`grouped_mm` is not on autocast's list: float32 experts were multiplied in float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    types = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            if func is torch.ops.aten._grouped_mm.default:
                types.extend(each.dtype for each in args[:2])
            return func(*args, **(kwargs or {}))

    student, _, args, prompts = modelzoo.loaded(made("qwen3_moe"), "--dtype", "bfloat16", *more)
    rollout = modelzoo.sampled(student, prompts, args)
    with Watch():
        logp = opd.token_logp(student, rollout, args)
        logp.sum().backward()
    assert set(types) == {torch.bfloat16} and len(types) >= 2 * 4 * 2  # layers, products
    if not more:  # with adapters the weights are in that type
        experts = student.lm.model.layers[0].mlp.experts
        weights = experts.gate_up_proj, experts.down_proj
        assert all(each.dtype == each.grad.dtype == torch.float32 for each in weights)
        student.compute_dtype = torch.float32
        exact = opd.token_logp(student, rollout, args)
        assert 0 < (exact - logp)[rollout.completion_mask].abs().mean() < 0.1


def test_experts_are_cast_once_for_all_tokens_and_anew_after_a_step(made):
    """Issue: autocast keeps casts of linear layers alone; experts were cast at every token."""
    student, _, args, prompts = modelzoo.loaded(made("qwen3_moe"), "--dtype", "bfloat16")
    weights = [each for name, each in student.lm.named_parameters() if "experts" in name]
    shapes, cast, of = {each.shape for each in weights}, [], models._cast
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_cast", lambda *each: cast.append(of(*each)) or cast[-1])
        first = modelzoo.sampled(student, prompts, args)
        assert len(cast) > 2 * len(weights) and len({id(each) for each in cast}) == len(weights)
        assert {each.mT.shape for each in cast} <= shapes
        cast.clear()
        for each in weights:
            each.neg_()
        again = modelzoo.sampled(student, prompts, args)
    assert not torch.equal(first.behaviour_logp, again.behaviour_logp)


def test_a_cast_is_of_the_weight_and_not_of_its_address(made):
    """Sharded layers are gathered one after the other, often into the same memory."""
    student, *_ = modelzoo.loaded(made("qwen3_moe"), "--dtype", "bfloat16")
    one = torch.nn.Parameter(torch.ones(2, 3))
    with torch.no_grad(), student.autocast():
        kept = models._cast(one.mT, torch.bfloat16)
        other = torch.nn.Parameter(one.data.neg_())
        assert models._cast(one.mT, torch.bfloat16) is kept and kept.min() == 1
        assert models._cast(other.mT, torch.bfloat16).max() == -1
    assert models._cast(one.mT, torch.bfloat16).max() == -1  # no block, no memory


@pytest.mark.parametrize(
    ("change", "why"),
    [({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
     ({"is_encoder_decoder": True}, "an encoder and a decoder")],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_its_weights_are_read(tmp_path, change, why):
    tinylm.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    args = opd.parse_args(["--student", str(tmp_path)])
    with pytest.raises(RunError, match=f"^--student .*{why}"):
        setup.prepare(opd.model_paths(args), args, opd.render)


def test_a_configuration_that_makes_no_model_is_named(tmp_path):
    """A padding token that was added to the tokenizer, and not to the embedding."""
    tinylm.save_config(tmp_path, pad_token_id=46)
    args = opd.parse_args(["--student", str(tmp_path)])
    with pytest.raises(RunError, match=r"^--student .*: no qwen3 can be made of its conf.*: Padd"):
        setup.prepare(opd.model_paths(args), args, opd.render)


def test_weights_of_another_shape_than_the_configuration_has_are_refused(tmp_path):
    path = tinylm.save_model(tmp_path / "m", 0)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(
        RunError, match=r"embed_tokens.weight is \[46, 32\] in .* and \[60, 32\] by"
    ):
        modelzoo.loaded(path)


@pytest.mark.parametrize("name", ["longcat_flash", "hrm_text"])
def test_a_type_that_counts_a_block_as_several_layers_is_not_refused(made, name):
    args = opd.parse_args(modelzoo.flags(made(name)))
    setup.prepare(opd.model_paths(args), args, opd.render)


def test_a_model_that_cannot_take_a_forward_pass_is_named(tmp_path, capfd):
    """DBRX without a bound for its queries; a dry run says in a line what it cannot count."""
    sizes = dict(modelzoo.TYPES["dbrx with jitter"][1])
    sizes["attn_config"] = {"kv_n_heads": 1, "rope_theta": 1e4}
    config = transformers.AutoConfig.for_model("dbrx", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tinylm.tokenizer().save_pretrained(tmp_path / "m")
    argv = modelzoo.flags(f"{tmp_path}/m", "--prompts", tinylm.save_prompts(tmp_path / "p.jsonl"))
    opd.main([*argv, "--dry-run"])
    out, err = capfd.readouterr()
    assert "! memory: activations" in out and "Traceback" not in err
    with pytest.raises(RunError, match=r"m \(dbrx\): a plain forward pass ends in RuntimeError"):
        modelzoo.loaded(f"{tmp_path}/m")


def test_weights_that_are_not_trained_are_said(made, tmp_path, capsys):
    """Of a vision tower, of more layers than the configuration has; nothing of a whole model."""
    for name in ("qwen3", "deepseek_v3"):
        modelzoo.loaded(made(name))
    assert "have no place" not in capsys.readouterr().out
    text = modelzoo.HEADS | modelzoo.LINEAR
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "deepstack_visual_indexes": []}
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tinylm.tokenizer().save_pretrained(tmp_path)
    modelzoo.loaded(str(tmp_path))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "have no place" in x)
    assert "weights of its files have no place in Qwen3_5ForCausalLM, such as model.visual" in line


def test_a_configuration_that_asks_for_tuples_is_read_all_the_same(tmp_path):
    checked(tinylm.save_model(tmp_path / "m", 0, return_dict=False))


def test_what_a_model_leaves_untrained_stays_so(tmp_path, monkeypatch):
    path = tinylm.save_model(tmp_path / "m", 0)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def with_frozen_norm(*args, **how):
        lm, found = load(*args, **how)
        lm.model.norm.weight.requires_grad_(False)
        return lm, found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", with_frozen_norm)
    every, _, _ = checked(path)
    still = [name for name, w in every["student"].lm.named_parameters() if not w.requires_grad]
    assert still == ["model.norm.weight"]
    assert not any(weight.requires_grad for weight in every["teacher"].parameters())


# --------------------------------------------------------------------- tokens, prompts, positions
def test_eos_of_the_whole_configuration_comes_first():
    config = transformers.AutoConfig.for_model("gemma3", eos_token_id=[2, 5])
    tokenizer = tinylm.tokenizer()
    tokenizer.eos_token = None
    assert compat.eos_ids(tokenizer, config, transformers.GenerationConfig()) == {2, 5}
    config = transformers.AutoConfig.for_model("gemma3", text_config={"eos_token_id": 7})
    config.eos_token_id = None
    assert compat.eos_ids(tokenizer, config, transformers.GenerationConfig()) == {7}
    none = transformers.GenerationConfig(eos_token_id=-1)
    assert compat.eos_ids(tokenizer, config, none) == {7}


@pytest.mark.parametrize(
    ("law", "want"),
    [
        (None, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 512),
    ],
)  # fmt: skip
def test_positions_are_those_that_the_scaling_gives(law, want):
    sizes = modelzoo.BASE | ({"rope_scaling": law} if law else {})
    config = transformers.AutoConfig.for_model("qwen2", **sizes)
    assert compat.num_positions(config) == want


def test_positions_of_a_model_that_calls_them_otherwise():
    assert compat.num_positions(transformers.MptConfig(max_seq_len=77)) == 77
    assert compat.num_positions(transformers.WhisperConfig(max_target_positions=78)) == 78


def prompt(*ids: int, text: str = "") -> opd.Prompt:
    return opd.Prompt(ids, text, "", "", {})


def test_tokens_without_a_row_are_refused_and_untrained_rows_are_said(capsys):
    words = [*tinylm.WORDS, "<|task|>"]
    tokenizer = tinylm.tokenizer(words)
    sizes = {"student": 47, "teacher": 46}
    facts = compat.Facts(46, {}, 99, sizes, sizes)
    with pytest.raises(RunError, match=r"2 prompts hold <\|task\|> 46, for which the teacher"):
        compat.check_prompts([prompt(46), prompt(3), prompt(1, 46)], tokenizer, facts)
    facts = compat.Facts(46, {}, 99, {"student": 64, "teacher": 64}, sizes)
    compat.check_prompts([prompt(46), prompt(3)], tokenizer, facts)
    out = capsys.readouterr().out
    assert "! 1 prompts hold <|task|> 46, which the teacher's tokenizer has not" in out
    compat.check_prompts([prompt(3)], tokenizer, facts)
    assert not capsys.readouterr().out
    facts = compat.Facts(46, {}, 99, sizes, sizes)  # what a teacher reads in its place
    other = replace(prompt(3), views={"teacher": (3, 46)})
    with pytest.raises(RunError, match=r"1 prompts hold <\|task\|> 46, for which the teacher"):
        compat.check_prompts([prompt(3), other], tokenizer, facts)
    compat.check_prompts([replace(prompt(46), views={"teacher": (3,)})], tokenizer, facts)


RENAMED = [*tinylm.WORDS[:2], "<role>", "<think>", *tinylm.WORDS[4:]]


@pytest.fixture
def renamed(tmp_path):
    """Flags of a student and a teacher to whom ids 2 and 3 are other special tokens."""
    student, teacher = (tinylm.save_model(tmp_path / n, i) for i, n in enumerate("st"))
    tinylm.tokenizer(RENAMED).save_pretrained(teacher)
    return ["--student", student, "--teacher", teacher, "--max-completion-tokens", "40"]


def test_renamed_special_tokens_are_refused_unless_allowed(renamed, capsys):
    args = opd.parse_args(renamed)
    with pytest.raises(RunError, match=r"differ on 2 of 46 ids .*--allow-renamed-tokens goes on"):
        setup.prepare(opd.model_paths(args), args, opd.render)
    args = opd.parse_args([*renamed, "--allow-renamed-tokens"])
    _, facts = setup.prepare(opd.model_paths(args), args, opd.render)
    assert facts.renamed_ids == (2, 3) and facts.valid_vocab == 46
    compat.check_prompts([prompt(2, 5), prompt(5)], tinylm.tokenizer(), facts)
    assert "! 1 prompts hold special tokens that mean others to a teach" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "ids"),
    [(["<pad>", "<stop>", *RENAMED[2:]], (2, 3)),  # the end of both: it means the same
     ([*RENAMED[:-1], "!"], None)],  # a word is no special token
)  # fmt: skip
def test_what_renamed_tokens_are(renamed, words, ids):
    teacher = tinylm.tokenizer(words)
    teacher.eos_token = words[1]
    teacher.save_pretrained(renamed[3])
    args = opd.parse_args([*renamed, "--allow-renamed-tokens"])
    if ids is None:
        with pytest.raises(RunError, match=r"differ on 3 of 46 ids .*one token-to-id map$"):
            setup.prepare(opd.model_paths(args), args, opd.render)
    else:
        assert setup.prepare(opd.model_paths(args), args, opd.render)[1].renamed_ids == ids


def test_positions_with_a_renamed_token_leave_the_loss_and_are_counted(renamed):
    args = opd.parse_args([*renamed, "--allow-renamed-tokens"])
    every, _ = tinylm.load(opd, args)
    student = tinylm.endless(every)["student"]
    prompts, uniform = [prompt(4, 5, 6)] * 8, opd.uniforms(8, "rollouts", 0, args)
    prefixes = [(5, 2, 6)] * 8  # a teacher's prefix has one too
    rollout = opd.sample(student, prompts, uniform, args, prefixes=prefixes)
    hit = (rollout.completion_ids == 2) | (rollout.completion_ids == 3)
    assert hit[:, 3:].sum() > 5 and hit[:, :3].sum() == 8
    assert torch.equal(rollout.trained_mask, rollout.completion_mask & ~hit)
    assert diagnose.rollout_metrics(rollout)["num_untrained_tokens"] == hit.sum()
    loss, _ = opd.token_loss(student, rollout, opd.score(every, rollout, args), args)
    loss.backward()
    # What was sampled, and each distribution, is as it would be if all tokens were alike.
    student.facts = replace(student.facts, renamed_ids=())
    whole = opd.sample(student, prompts, uniform, args, prefixes=prefixes)
    assert torch.equal(whole.completion_ids, rollout.completion_ids)
    assert torch.equal(whole.behaviour_logp, rollout.behaviour_logp)
    assert torch.equal(whole.trained_mask, whole.completion_mask)


def test_special_tokens_in_the_text_of_prompts_are_counted(capsys):
    facts = compat.Facts(46, {}, 99)
    texts = ("1+2<end>=", "plain", "<pad>")
    compat.check_prompts([prompt(3, text=t) for t in texts], tinylm.tokenizer(), facts)
    assert "! 2 prompts have special tokens in their text" in capsys.readouterr().out


def test_without_a_template_no_second_bos_and_no_eos_at_the_end():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tinylm.tokenizer()
    tokenizer.bos_token = "<user>"
    ends = [("<user>", 2), ("<end>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A <end>", special_tokens=ends
    )
    seven = tokenizer.convert_tokens_to_ids("7")
    assert tokenizer.encode("<user>7") == [2, 2, seven, 1]
    assert compat.prompt_ids(tokenizer, "<user>7", False) == [2, seven]
    assert compat.prompt_ids(tokenizer, "7", False) == [2, seven]
    assert compat.prompt_ids(tokenizer, "<user>7", True) == [2, seven]
    assert compat.prompt_ids(tokenizer, "7<end>", False) == [2, seven, 1]  # the text's own


def pair(**templates: str):
    tokenizers = {name: tinylm.tokenizer() for name in ("student", "teacher")}
    for name, template in templates.items():
        tokenizers[name].chat_template = template
    configs = {name: transformers.Qwen3Config(vocab_size=46) for name in tokenizers}
    generation = {name: transformers.GenerationConfig(eos_token_id=1) for name in tokenizers}
    return compat.check_pair(
        tokenizers, configs, generation, partial(opd.render, args=opd.parse_args([]))
    )


def test_a_template_that_is_not_used_may_raise():
    raising = "{{ raise_exception('a system message is needed') }}"
    report = pair(teacher=raising)
    assert not report.errors and any("teacher does not render" in fact for fact in report.facts)
    (error,) = pair(student=raising).errors
    assert "chat template of student" in error and "a system message is needed" in error


def test_a_template_without_the_question_or_with_a_date_is_said():
    parts = "{% for m in messages %}{% if m.content is not string %}{{ m.content }}{% endif %}"
    warnings = pair(student=f"x{parts}{{% endfor %}}").warnings
    assert any("the question is not in" in warning for warning in warnings)
    dated = "{{ strftime_now('%d %b %Y') }}" + tinylm.TEMPLATE
    assert any("today's date" in warning for warning in pair(student=dated).warnings)
    assert not any("date" in warning for warning in pair().warnings)


def test_a_template_argument_that_does_nothing_is_said(tmp_path, capsys):
    tinylm.save_family(tmp_path)
    paths = ["--student", f"{tmp_path}/student", "--teacher", f"{tmp_path}/teacher"]
    argument = json.dumps({"enable_thinkng": False, "add_generation_prompt": False})
    args = opd.parse_args([*paths, "--chat-template-args", argument])
    setup.prepare(opd.model_paths(args), args, opd.render)
    lines = [x for x in capsys.readouterr().out.splitlines() if "changes nothing" in x]
    assert len(lines) == 1 and "'enable_thinkng'" in lines[0]


def test_a_student_alone_is_told_that_no_teacher_was_given(tmp_path):
    args = opd.parse_args(["--student", tinylm.save_model(tmp_path / "s", 0)])
    with pytest.raises(RunError, match=r"^no --teacher given"):
        setup.prepare(opd.model_paths(args), args, opd.render)


# ---------------------------------------------------------------------------------------- dry run
def test_dry_run_says_that_nothing_can_be_adapted(made, tmp_path, capsys):
    prompts = tinylm.save_prompts(tmp_path / "p.jsonl")
    argv = modelzoo.flags(made("gpt2"), "--prompts", prompts, "--dry-run", "--lora-rank", "4")
    with pytest.raises(SystemExit):
        opd.main(argv)
    assert "gpt2 has no torch.nn.Linear but its head" in capsys.readouterr().err


@pytest.mark.parametrize("name", each_type(["gpt_oss", "deepseek_v3", "gemma3", "qwen3_next",
                                            "mamba", "llama4_text", "gemma3n_text", "qwen3_moe",
                                            "qwen3_5_text", "lfm2", "rwkv"]))  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"], ["--dtype", "bfloat16"]])
def test_dry_run_counts_what_can_be_counted(made, tmp_path, capsys, name, more):
    prompts = tinylm.save_prompts(tmp_path / "p.jsonl")
    argv = modelzoo.flags(made(name), "--prompts", prompts, *more, "--dry-run")
    opd.main(argv)
    out = capsys.readouterr().out
    for text in ("memory: student weights", "memory: peak, calculated", "budget:", "disk: a check"):
        assert text in out


def test_dry_run_counts_the_cache_under_adapters_in_bfloat16(made, tmp_path, capsys):
    prompts = tinylm.save_prompts(tmp_path / "p.jsonl")
    more = ["--lora-rank", "4", "--dtype", "bfloat16", "--dry-run"]
    opd.main(modelzoo.flags(made("qwen3"), "--prompts", prompts, *more))
    out = capsys.readouterr().out
    assert "memory: generate: cache" in out and "cannot be counted" not in out


@pytest.mark.parametrize("more", [[], ["--export-dtype", "float32"], ["--lora-rank", "4"]])
def test_the_disk_line_is_what_a_checkpoint_takes(tmp_path, more):
    path = tinylm.save_model(tmp_path / "s", 0, hidden_size=192, intermediate_size=256)
    prompts = tinylm.save_prompts(tmp_path / "p.jsonl")
    run = ["--prompts", prompts, "--run-dir", f"{tmp_path}/run", "--steps", "0", "--eval-every"]
    argv = modelzoo.flags(path, *run, "0", *more)
    args = opd.parse_args(argv)
    opd.main(argv)
    student = memory._counted(opd.model_paths(args), 12, args)[1]
    (step,) = (tmp_path / "run/checkpoints").iterdir()
    size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert student.checkpoint_bytes == pytest.approx(size, rel=0.1)


# ------------------------------------------------------------------- what held, and has to go on so
def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(made):
    for flags in (
        [],
        ["--objective", "full"],
        ["--dtype", "bfloat16", "--teacher-dtype", "float32"],
    ):
        every, prompts, args = checked(made("qwen3"), *flags)
        rollout = modelzoo.sampled(every["student"], prompts, args)
        scores = opd.score(every, rollout, args)
        loss, _ = opd.token_loss(every["student"], rollout, scores, args)
        loss.backward()
        norm = sum(float(w.grad.norm()) for w in every["student"].parameters())
        exact = "bfloat16" not in flags
        assert abs(float(loss.detach())) < 1e-4 and norm < 1e-3 if exact else norm > 0


def test_a_generation_config_that_cannot_be_saved_does_not_stop_an_export(tmp_path):
    """`transformers` refuses to write a temperature without sampling."""
    from opd_run import adapters

    path = tinylm.save_model(tmp_path / "m", 0)
    bad = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(bad))
    student, tokenizer, _, _ = modelzoo.loaded(path)
    adapters.export(student, tokenizer, tmp_path / "model")
    assert modelzoo.file_names(tmp_path / "model") == modelzoo.file_names(tmp_path / "m")


@pytest.mark.parametrize("name", each_type(["qwen3", "gemma3", "lfm2"]))
def test_gradient_checkpointing_changes_no_loss(made, name):
    """Nor does a cache stay on: that is what others had to switch off by hand."""
    losses = []
    for flags in ([], ["--gradient-checkpointing"]):
        every, prompts, args = checked(made(name), *flags, "--max-completion-tokens", "8")
        rollout = modelzoo.sampled(every["student"], prompts, args)
        every["student"].train()
        loss = opd.token_logp(every["student"], rollout, args).sum()
        grad = modelzoo.gradient(loss, every["student"].lm)
        losses.append((loss.detach(), grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-4)


def test_added_tokens_a_tied_head_and_adapters_export_as_in_memory(tmp_path):
    words = [*tinylm.WORDS, "<|task|>"]
    path = tinylm.save_model(tmp_path / "m", 0, words=words)
    off = modelzoo.round_trip(path, tmp_path / "model", "--lora-rank", "4")
    assert off < 1e-4
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert kept.convert_tokens_to_ids("<|task|>") == 46


def test_rotation_in_bfloat16_is_no_worse_at_the_end_of_a_long_completion(tmp_path):
    """Angles of long positions have to stay in float32: the drift does not grow with length."""
    path = tinylm.save_model(tmp_path / "m", 0, max_position_embeddings=1024)
    student, _, args, prompts = modelzoo.loaded(path, "--dtype", "bfloat16")
    draws = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    rollout = selfcheck._written(opd.Rollout, prompts[:2], draws, student)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        off = (opd.token_logp(student, rollout, args) - modelzoo.truth(plain, rollout)).abs()
    first, *_, last = (each.mean() for each in off.chunk(4, 1))
    assert 0 < last < 2 * first
