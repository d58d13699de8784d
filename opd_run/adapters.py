"""LoRA adapters (`--lora-rank`): put in, switched off for a reference, merged into an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from opd_run import ranks
from opd_run.console import optional
from opd_run.models import CausalLM


class WithoutAdapter(CausalLM):
    """The student as it was before its adapters were trained: a reference without a second copy."""

    def __init__(self, student: CausalLM) -> None:
        super().__init__(student.lm, student.plain_head, student.compute_dtype, student.facts)
        object.__setattr__(self, "student", student)  # not a submodule: sharding is the student's

    def forward(self, read: Callable[..., Any], where: Tensor | None, **inputs: Any) -> Any:
        """As of `CausalLM`."""
        student: CausalLM = self.student  # type: ignore[assignment]
        layers = _adapted(self.lm).values()
        try:
            for layer in layers:
                layer.set_scale("default", 0.0)
            return student(read, where, **inputs)
        finally:
            for layer in layers:
                layer.set_scale("default", 1.0)


def add_adapters(lm: Any, layers: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Adapters on the named linear layers, float32, without dropout; everything else is frozen.

    In place, so that `lm` keeps its class. `seed` is that of their first values: the same on every
    process.
    """
    peft = optional("peft", "--lora-rank")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(layers), lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, lm)
    for name, weight in lm.named_parameters():
        weight.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            weight.data = weight.data.float()


def _adapted(lm: Any) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: each for name, each in lm.named_modules() if hasattr(each, "lora_A")}


def merged(lm: Any, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Adapters added to the weights that they adapt, under the names of the plain model.

    Sharded weights are put together, one at a time; all ranks have to ask for all of them.
    """
    scale = {name: each.scaling["default"] for name, each in _adapted(lm).items()}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        weight = ranks.whole(weight)
        layer, at, rest = name.partition(".base_layer.")
        if at and rest == "weight":
            names = (f"{layer}.lora_{side}.default.weight" for side in "AB")
            down, up = (ranks.whole(weights[each]).float() for each in names)
            weight = (weight.float() + scale[layer] * (up @ down)).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def export(model: CausalLM, tokenizer: Any, folder: Path) -> None:
    """A plain `from_pretrained` folder, adapters merged, written by rank 0; all ranks call it."""
    weights: Any = None
    if ranks.sharded(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model.lm, options=options)
        once = dict(model.lm.named_parameters())  # a tied head is not written a second time
        twice = dict(model.lm.named_parameters(remove_duplicate=False)).keys() - once.keys()
        weights = {name: weight for name, weight in weights.items() if name not in twice}
    if _adapted(model.lm) and ranks.rank() == 0:
        weights = dict(merged(model.lm, weights or model.lm.state_dict()))
    if ranks.rank() == 0:
        model.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
