"""Small random models with a word-level tokenizer, made in milliseconds, for tests of the loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_run import setup

WORDS = ["<pad>", "<end>", "<user>", "<bot>", *"0123456789+-=# abcdefghijklmnopqrstuvwxyz?"]
TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


class Verdicts:
    """A verifier that is a function of the items, and judges cut completions itself."""

    judges_cut = True

    def __init__(self, of_items):
        self.of_items = of_items

    def ahead(self, items):
        pass

    def __call__(self, items):
        return self.of_items(items)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per character, four special tokens, a chat template."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.add_special_tokens(words[:4])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="?"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_model(
    folder: Path, seed: int, *, vocab: int | None = None, words: list[str] = WORDS, **config: Any
) -> str:
    """A random Qwen3 whose logits depend on position and context; returns the folder as text."""
    torch.manual_seed(seed)
    sizes = save_config(folder, vocab=vocab, words=words, **config)
    transformers.Qwen3ForCausalLM(sizes).save_pretrained(folder)
    return str(folder)


def save_config(
    folder: Path, *, vocab: int | None = None, words: list[str] = WORDS, **config: Any
) -> transformers.Qwen3Config:
    """The folder of such a model, but for its weights."""
    sizes = {
        "vocab_size": vocab or len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.25,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    found = transformers.Qwen3Config(architectures=["Qwen3ForCausalLM"], **(sizes | config))
    found.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return found


def save_prompts(path: Path, num: int = 12) -> str:
    """`num` additions of different lengths in two domains."""
    rows = [
        {"prompt": f"{i}+{i * 37 % 501}=", "answer": str(i), "domain": "ab"[i % 2]}
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_family(folder: Path, **student: Any) -> Path:
    """Two models of unlike weights and prompts for them, in `folder`, which is returned."""
    save_model(folder / "student", 0, **student)
    save_model(folder / "teacher", 1)
    save_prompts(folder / "prompts.jsonl")
    return folder


def weights(folder: Path, run: str, step: int = 3) -> dict[str, torch.Tensor]:
    """The student that a run has saved after `step` steps."""
    path = folder / run / f"checkpoints/step_{step}/model"
    return transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def endless(models: dict[str, Any]) -> dict[str, Any]:
    """The models, without an end of sequence: every completion is as long as it may be."""
    for model in models.values():
        model.facts = replace(model.facts, eos_ids={})
    return models


def load(module: Any, args: Any, **paths: str) -> tuple[dict[str, Any], Any]:
    """The models of a method file and their tokenizer, as its `main` loads them."""
    return setup.models_of(module, args, paths)[:2]
