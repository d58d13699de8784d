"""Tiny random models of many types, and whether each trains rightly: the table of docs/models.md.

    python tests/modelzoo.py [TYPE ...]                  # one row each on stdout
    python tests/modelzoo.py --write docs/models.md      # all of them, between its marks
    python tests/modelzoo.py TYPE --write docs/models.md # these rows of it

A TYPE is a name of `TYPES` or a model type of `AutoModelForCausalLM`, whose own configuration is
then made small.
Truth is the model by itself: one row at a time, without padding, without a cache, in eval mode.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]

import opd  # noqa: E402
import safetensors  # noqa: E402
import tinylm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from opd_run import adapters, models  # noqa: E402
from opd_run.console import RunError  # noqa: E402

IDS = {"vocab_size": len(tinylm.WORDS), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
BASE = IDS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.25,
}  # fmt: skip
HEADS = BASE | {"head_dim": 16}
FULL = BASE | {"num_key_value_heads": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 24}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 8}  # fmt: skip
STATES = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
                "initializer_range": 0.25}  # fmt: skip
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512,
             "initializer_range": 0.25}  # fmt: skip
LATENT = FULL | SMALL | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", HEADS | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", BASE),
    "llama": ("llama", HEADS),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", IDS | {
        "text_config": HEADS | SLIDING | {"query_pre_attn_scalar": 16, "attention_dropout": 0.1},
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 1,
    }),
    "gemma3n_text": ("gemma3n_text", HEADS | SLIDING | {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": len(tinylm.WORDS), "hidden_size_per_layer_input": 8,
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
    }),
    "gemma4_text": ("gemma4_text", HEADS | SLIDING | {
        "global_head_dim": 16, "vocab_size_per_layer_input": len(tinylm.WORDS),
        "hidden_size_per_layer_input": 0,
    }),
    "gemma4": ("gemma4", IDS | {
        "text_config": HEADS | SLIDING | {
            "global_head_dim": 16, "vocab_size_per_layer_input": len(tinylm.WORDS),
            "hidden_size_per_layer_input": 0, "attention_dropout": 0.1},
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
                          "patch_size": 4},
        "audio_config": None,
    }),
    "mistral": ("mistral", HEADS | {"sliding_window": 8}),
    "ministral": ("ministral", HEADS | SLIDING),
    "phi": ("phi", FULL),
    "phi3": ("phi3", BASE | {"sliding_window": None, "original_max_position_embeddings": 512}),
    "phi3 LongRoPE": ("phi3", BASE | {
        "sliding_window": None, "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8,
                         "long_factor": [4.0] * 8, "original_max_position_embeddings": 32},
    }),
    "phimoe": ("phimoe", BASE | LOCAL),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", IDS | {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512,
        "initializer_range": 0.25}),
    "codegen": ("codegen", GPT | {"n_head": 4, "rotary_dim": 4}),
    "bert as it comes": ("bert", FULL),
    "bert as a decoder": ("bert", FULL | {"is_decoder": True}),
    "roberta as a decoder": ("roberta", FULL | {"is_decoder": True}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "opt": ("opt", IDS | {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 512, "word_embed_proj_dim": 32, "init_std": 0.25,
    }),
    "bloom": ("bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 2,
                              "initializer_range": 0.25}),
    "mpt": ("mpt", IDS | {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 512}),
    "falcon": ("falcon", IDS | {"hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 2, "initializer_range": 0.25}),
    "olmo": ("olmo", FULL),
    "olmo2": ("olmo2", BASE),
    "olmo3": ("olmo3", BASE | SLIDING),
    "smollm3": ("smollm3", BASE | {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", BASE),
    "starcoder2": ("starcoder2", BASE | {"sliding_window": 8}),
    "cohere": ("cohere", BASE),
    "cohere2": ("cohere2", HEADS | SLIDING),
    "granite": ("granite", BASE | {"logits_scaling": 2.0}),
    "glm": ("glm", HEADS),
    "glm4": ("glm4", HEADS),
    "nemotron": ("nemotron", HEADS),
    "ernie4_5": ("ernie4_5", HEADS),
    "seed_oss": ("seed_oss", HEADS),
    "helium": ("helium", HEADS),
    "arcee": ("arcee", HEADS),
    "apertus": ("apertus", HEADS),
    "exaone4": ("exaone4", HEADS | SLIDING),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEADS),
    "minicpm3": ("minicpm3", FULL),
    "qwen2_moe": ("qwen2_moe", BASE | EXPERTS | SMALL | SHARED | {"decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", HEADS | EXPERTS | SMALL | {
        "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "qwen3_moe with a dense layer": ("qwen3_moe", HEADS | EXPERTS | SMALL | {
        "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "mixtral": ("mixtral", HEADS | LOCAL),
    "mixtral with jitter": ("mixtral", HEADS | LOCAL | {"router_jitter_noise": 0.1}),
    "dbrx with jitter": ("dbrx", IDS | {
        "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8, "attn_pdrop": 0.1},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
                       "moe_jitter_eps": 0.1}}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", HEADS | {"num_experts": 4, "moe_topk": [2, 2]}),
    "olmoe": ("olmoe", BASE | EXPERTS),
    "granitemoe": ("granitemoe", BASE | LOCAL),
    "jetmoe": ("jetmoe", BASE | LOCAL | {"kv_channels": 16}),
    "gpt_oss": ("gpt_oss", HEADS | SLIDING | LOCAL),
    "llama4_text": ("llama4_text", HEADS | {
        "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 8, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 1,
    }),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "glm4_moe": ("glm4_moe", HEADS | SMALL | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1}),
    "dots1": ("dots1", HEADS | SMALL | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", HEADS | SMALL | {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1}),
    "minimax_m2": ("minimax_m2", HEADS | LOCAL),
    "lfm2": ("lfm2", BASE | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3,
                             "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", BASE | EXPERTS | SMALL | {
        "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "qwen3_next": ("qwen3_next", HEADS | LINEAR | EXPERTS | SMALL | SHARED | {
        "decoder_sparse_step": 1}),
    "qwen3_5_text": ("qwen3_5_text", HEADS | LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", HEADS | LINEAR | EXPERTS | SMALL | SHARED),
    "kimi_linear": ("kimi_linear", FULL | SMALL | {
        "layer_types": LINEAR["layer_types"], "num_experts": 4, "num_experts_per_token": 2,
        "num_shared_experts": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "linear_num_heads": 2, "linear_head_dim": 16}),
    "olmo_hybrid": ("olmo_hybrid", BASE | {"layer_types": LINEAR["layer_types"]}),
    "jamba": ("jamba", BASE | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False}),
    "bamba": ("bamba", BASE | MAMBA | {"attn_layer_indices": [1], "mamba_expand": 2}),
    "granitemoehybrid": ("granitemoehybrid", BASE | MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 24, "mamba_expand": 2}),
    "nemotron_h": ("nemotron_h", HEADS | {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        "chunk_size": 8}),
    "falcon_h1": ("falcon_h1", HEADS | MAMBA | {"mamba_d_ssm": 64}),
    "zamba2": ("zamba2", IDS | {
        "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
        "layers_block_type": ["mamba", "hybrid", "mamba"], "num_attention_heads": 2,
        "num_key_value_heads": 2, "mamba_d_state": 8, "mamba_expand": 2, "n_mamba_heads": 4,
        "mamba_ngroups": 1, "chunk_size": 8, "max_position_embeddings": 512, "num_mem_blocks": 1,
        "use_mem_rope": True, "initializer_range": 0.25}),
    "minimax": ("minimax", HEADS | {
        "layer_types": LINEAR["layer_types"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "block_size": 8}),
    "mamba": ("mamba", STATES),
    "mamba2": ("mamba2", STATES | {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1,
                                   "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", STATES),
    "rwkv": ("rwkv", IDS | {"hidden_size": 32, "attention_hidden_size": 32,
                            "num_hidden_layers": 2, "intermediate_size": 48,
                            "context_length": 512}),
    "recurrent_gemma": ("recurrent_gemma", BASE | {
        "lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"]}),
    "xlstm": ("xlstm", IDS | {
        "hidden_size": 32, "embedding_dim": 32, "num_heads": 2, "num_hidden_layers": 2,
        "num_blocks": 2, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native"}),
}  # fmt: skip
SMALLER = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim",), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("d_ff", "d_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size",), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), 0.25),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "rope_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size",), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "zero_expert_num"), 1),
    **{"first_k_dense_replace": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    **{"vocab_size_per_layer_input": len(tinylm.WORDS), "index_topk": 64},
    **MAMBA, **{k: v for k, v in LINEAR.items() if k.startswith("linear_num_")},
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
}  # fmt: skip
"""What configurations of any type call their sizes, and small ones."""
QUICK = [
    "qwen3", "llama", "gemma2", "gemma3", "gpt2", "mixtral with jitter", "gpt_oss", "deepseek_v3",
    "qwen3_next", "phi3 LongRoPE", "phimoe", "mamba", "rwkv",
]  # fmt: skip
"""One of each kind of difficulty; the others are marked slow."""
MOST_WEIGHTS = 10**7
COLUMNS = ["sampler", "trainer", "gradient", "LoRA export", "resume"]
PROMPTS = ("1+2=", "what is 3+4 and 5", "7")


def other_types() -> list[str]:
    """The types of `AutoModelForCausalLM` that no entry of `TYPES` is of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {kind for kind, _ in TYPES.values()})


def smaller(kind: str) -> Any:
    """The configuration that a type has by itself, with small sizes."""
    made = transformers.CONFIG_MAPPING[kind]

    def sizes(config: Any) -> dict[str, Any]:
        known = {k: v for k, v in SMALLER.items() if getattr(config, k, None) is not None}
        if "qk_rope_head_dim" in known:
            known["head_dim"] = known["qk_rope_head_dim"]
        if layers := getattr(config, "layer_types", None):
            known["layer_types"] = (list(dict.fromkeys(layers)) * 2)[:2]
        if hasattr(config, "vocab_size"):
            known |= IDS
        return known

    parts = {k: sizes(v) for k, v in vars(made()).items() if hasattr(v, "to_dict")}
    whole = {k: v for k, v in sizes(made()).items() if not parts or k in vars(made())}
    return made(**(whole | parts | IDS))


def save(folder: Path, name: str, seed: int = 0) -> str:
    """A random model of that type with the tokenizer of `tinylm`; the folder as text."""
    kind, sizes = TYPES.get(name, (name, None))
    torch.manual_seed(seed)
    if sizes is None:
        config = smaller(kind)
    else:
        config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        num = sum(
            w.numel() for w in transformers.AutoModelForCausalLM.from_config(config).parameters()
        )
    if num > MOST_WEIGHTS:
        raise ValueError(f"{num} parameters")
    lm = transformers.AutoModelForCausalLM.from_config(config)
    for module in lm.modules():  # gradients of gemma3n at a row of zeros are NaN
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.normal_(module.weight.data[module.padding_idx], 0, 0.25)
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = 1, 0
    lm.save_pretrained(folder)
    tinylm.tokenizer().save_pretrained(folder)
    return str(folder)


def flags(path: str, *more: str) -> list[str]:
    """Of a short run of the model as its own teacher."""
    sizes = ["--max-completion-tokens", "24", "--max-prompt-tokens", "24", "--device", "cpu"]
    return ["--student", path, "--teacher", path, *sizes, "--dtype", "float32", *more]


def loaded(path: str, *more: str) -> tuple[Any, Any, Any, list[Any]]:
    """Student, tokenizer and flags as in a run, checked; and three prompts of unlike length."""
    args = opd.parse_args(flags(path, *more))
    every, tokenizer = tinylm.load(opd, args)
    prompts = [opd.Prompt(tuple(tokenizer.encode(t)), t, "", "", {}) for t in PROMPTS]
    paths = opd.model_paths(args)
    opd.check_models(every, paths, prompts, args, opd.Rollout, opd.sample, opd.token_logp)
    return every["student"], tokenizer, args, prompts


def truth(lm: Any, rollout: Any) -> torch.Tensor:
    """Log-probs [B, T] of the sampled tokens, each row by itself; differentiable."""
    found = []
    for row in range(len(rollout.prompts)):
        mask = rollout.completion_mask[row]
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = rollout.completion_ids[row][mask]
        logits = lm(input_ids=torch.cat([prompt, ids])[None], use_cache=False).logits[0].float()
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        found.append(logp.new_zeros(len(mask)).index_put((mask,), logp))
    return torch.stack(found)


def sampled(model: Any, prompts: list[Any], args: Any) -> Any:
    """A rollout of the prompts, each twice."""
    asked = [prompt for prompt in prompts for _ in range(2)]
    return opd.sample(model, asked, opd.uniforms(len(asked), "rollouts", 0, args), args)


def gradient(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """The whole gradient as one vector."""
    weights = [w for w in module.parameters() if w.requires_grad]
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten()
                      for w, g in zip(weights, parts)])  # fmt: skip


def parity(path: str) -> dict[str, float]:
    """Largest differences from the truth: of the sampler and the trainer in nats, of the gradient
    of a batch relative to that of its rows."""
    student, _, args, prompts = loaded(path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    models.pin_longrope(plain, args.max_prompt_tokens + args.max_completion_tokens)
    rollout = sampled(student, prompts, args)
    want = truth(plain, rollout)
    mask = rollout.completion_mask
    student.train()
    logp = opd.token_logp(student, rollout, args)
    ours, theirs = gradient(logp.sum(), student.lm), gradient(want.sum(), plain)
    return {
        "sampler": float((rollout.behaviour_logp - want.detach())[mask].abs().max()),
        "trainer": float((logp - want).detach()[mask].abs().max()),
        "gradient": float((ours - theirs).norm() / theirs.norm()),
    }


def round_trip(path: str, folder: Path, *more: str) -> float:
    """Largest difference in nats between a student in memory and its export, read back; with
    `--lora-rank` its adapters are random ones."""
    student, tokenizer, args, prompts = loaded(path, *more)
    rollout = sampled(student, prompts, args)
    opd.token_logp(student, rollout, args).sum().backward()
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_B" in name and weight.grad is not None:  # what training would move
                moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
                weight.add_(0.1 * moved * weight.grad.sign())
    adapters.export(student, tokenizer, folder)
    back, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    assert file_names(folder) == file_names(Path(path))
    models.pin_longrope(back, args.max_prompt_tokens + args.max_completion_tokens)
    with torch.no_grad():
        want = truth(back.eval(), rollout)
        return float((opd.token_logp(student, rollout, args) - want).abs().max())


def file_names(folder: Path) -> set[str]:
    """Names of all weights in its safetensors."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def resume(path: str, folder: Path) -> float:
    """Largest difference of any weight between a run that was resumed and one that was not."""
    prompts = tinylm.save_prompts(folder / "prompts.jsonl")
    sizes = "--steps 2 --prompts-per-step 2 --rollouts-per-prompt 2 --save-every 1 --eval-every 0"
    teacher = str(Path(path).parent / "teacher")
    argv = [*flags(path, *sizes.split()), "--prompts", prompts, "--run-dir", f"{folder}/run"]
    argv[3] = teacher
    opd.main(argv)
    weights = folder / "run/checkpoints/step_2/model"
    want = read(weights)
    shutil.rmtree(folder / "run/checkpoints/step_2")
    opd.main([*argv, "--resume"])
    found = read(weights)
    return max(float((want[name] - found[name]).abs().max()) for name in want)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def row(name: str, folder: Path) -> dict[str, str]:
    """A cell for each of `COLUMNS`: right (the number), refused, or WRONG."""
    cells = dict.fromkeys(COLUMNS, "")
    try:
        path = save(folder / "student", name)
        save(folder / "teacher", name, seed=1)
        with torch.no_grad():  # that the sizes go together
            lm = transformers.AutoModelForCausalLM.from_pretrained(path)
            lm(input_ids=torch.arange(4, 20)[None], use_cache=False)
    except Exception as error:  # whatever the type says of its sizes
        text = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
        return dict.fromkeys(COLUMNS, "not tried") | {"why": text}

    def judge(column: str, value: float, limit: float) -> None:
        cells[column] = f"{value:.0e}" if value <= limit else f"WRONG: {value:.1e}"

    try:
        for column, value in parity(path).items():
            judge(column, value, 1e-3)
    except RunError as error:
        why = str(error).replace(f"{path} ", "")
        return dict.fromkeys(COLUMNS, "refused") | {"why": why}
    try:
        judge("LoRA export", round_trip(path, folder / "lora", "--lora-rank", "4"), 1e-3)
    except RunError as error:
        cells |= {"LoRA export": "refused", "why": str(error)}
    try:
        judge("resume", resume(path, folder), 0.0)
    except SystemExit:
        cells |= {"resume": "run stops", "why": "training stops with an error, which says why"}
    return cells


def table(rows: dict[str, dict[str, str]]) -> str:
    """As Markdown: what was tried, what of it was refused, what could not be made."""
    tried = {name: cells for name, cells in rows.items() if "not tried" not in cells.values()}
    head = ["model type", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, cells in tried.items():
        lines.append(f"| {name} | " + " | ".join(cells[column] for column in COLUMNS) + " |")
    wrong = sum(any("WRONG" in cells[column] for column in COLUMNS) for cells in tried.values())
    refused = sum(cells["sampler"] == "refused" for cells in tried.values())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    count = (
        f"{len(tried)} kinds with {versions}: {len(tried) - refused - wrong} right, {refused} "
        f"refused, {wrong} wrong."
    )
    why = [f"- {name}: {cells['why']}" for name, cells in tried.items() if "why" in cells]
    left = ", ".join(name for name in rows if name not in tried)
    note = ["", f"Not tried, since no small one could be made: {left}."] if left else []
    return "\n".join([count, "", *lines, "", "What is refused, and why:", "", *why, *note])


def parsed(text: str) -> dict[str, dict[str, str]]:
    """The rows of a table that `table` wrote."""
    rows: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 1 + len(COLUMNS):
            rows[cells[0]] = dict(zip(COLUMNS, cells[1:]))
        name, colon, why = line.removeprefix("- ").partition(": ")
        if colon and name in rows:
            rows[name]["why"] = why
        for name in line.partition("could be made: ")[2].rstrip(".").split(", "):
            rows |= {name: dict.fromkeys(COLUMNS, "not tried")} if name else {}
    return {name: cells for name, cells in rows.items() if name in [*TYPES, *other_types()]}


def main() -> int:
    """Try them; 1 if one is silently wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="TYPE")
    parser.add_argument("--write", type=Path, help="file with <!-- models --> marks")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows: dict[str, dict[str, str]] = {}
    every = [*TYPES, *other_types()]
    for name in args.names or every:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                rows[name] = row(name, Path(folder))
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
                rows[name] = dict.fromkeys(COLUMNS, "WRONG: error") | {"why": text}
        print(name, *(f"{k}={v}" for k, v in rows[name].items()), file=sys.stderr, flush=True)
    if args.write:
        head, rest = args.write.read_text().split("<!-- models -->\n")
        old, tail = rest.split("<!-- /models -->")
        rows = parsed(old) | rows if args.names else rows
        rows = {name: rows[name] for name in every if name in rows}
        args.write.write_text(f"{head}<!-- models -->\n{table(rows)}\n<!-- /models -->{tail}")
    else:
        print(table(rows))
    return int(any("WRONG" in cell for cells in rows.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
