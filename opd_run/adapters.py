"""LoRA adapters (`--lora-rank`): put in, switched off for a reference, merged into an export."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from opd_run import ranks
from opd_run.console import RunError, optional, say
from opd_run.models import CausalLM

NO_LAYER = "--lora-rank: {} has no torch.nn.Linear but its head"


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

    Raises:
        RunError: there is no such layer.
    """
    peft = optional("peft", "--lora-rank")
    if not layers:
        raise RunError(NO_LAYER.format(lm.config.model_type))
    # As a part of something without a configuration: of a model type that it knows, peft would turn
    # the layers of these names into other targets, and leave dense and shared experts out.
    whole = torch.nn.ModuleDict({"lm": lm})
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[f"lm.{e}" for e in layers], lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, whole)
    _say_share(lm)
    for name, weight in lm.named_parameters():
        weight.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            weight.data = weight.data.float()


def _say_share(lm: Any) -> None:
    """Say which of the blocks' layers have an adapter, which part of the weights that is, and which
    stay as they are, such as experts that are one tensor and their router."""
    ends = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    outside = {id(weight) for each in ends if each is not None for weight in each.parameters()}
    sizes = {True: 0, False: 0}
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for name, weight in lm.named_parameters():
        if ".lora_" not in name and weight.dim() > 1 and id(weight) not in outside:
            adapted = ".base_layer." in name
            sizes[adapted] += weight.numel()
            parts = [each for each in name.split(".") if each not in ("base_layer", "weight")]
            router = " (router)" if {"gate", "router"} & set(parts) else ""
            names[adapted].add(".".join(parts[-2:]) + router)
    on, frozen = (", ".join(sorted(names[adapted])) for adapted in (True, False))
    share = f"{100 * sizes[True] / sum(sizes.values()):.0f} % of the weights of the blocks"
    say(
        f"adapters: on {len(_adapted(lm))} linear layers ({on}), {share}"
        + (f"; frozen, without adapters: {frozen}" if frozen else "")
    )


def _adapted(lm: Any) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: each for name, each in lm.named_modules() if hasattr(each, "lora_A")}


def merged(lm: Any, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Adapters added to the weights that they adapt, under the names of the plain model; the sums
    are float32.

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
            weight = weight.float() + scale[layer] * (up @ down)
        yield name.replace(".base_layer.", "."), weight


def as_saved(lm: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names of the checkpoint's files, as `save_pretrained` writes them: experts
    that `transformers` has in one tensor are many there. One block at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    def block(named: tuple[str, Tensor]) -> str:
        return "".join(re.findall(r"^.*?\.\d+\.", named[0]))

    for _, some in itertools.groupby(weights, block):
        yield from revert_weight_conversion(lm, dict(some)).items()


def names_in(file: Path) -> list[str]:
    """The names of the weights in a safetensors file; none if it is broken: loading says how."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        return []


def names_in_files(path: str) -> set[str]:
    """Names of all weights in the safetensors of a folder or hub name."""
    return set(_places(path))


def _places(path: str) -> dict[str, Path]:
    """In which of these files each weight is; empty for weights that were not read from files:
    benchmarks make some at random."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index, whole = (
        cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if index is not None:
        found = json.loads(Path(index).read_text())["weight_map"]
        return {name: Path(index).with_name(place) for name, place in found.items()}
    return dict.fromkeys(names_in(Path(whole)), Path(whole)) if whole is not None else {}


def source_dtype(path: str, config: Any) -> torch.dtype:
    """Type that a model came in: as its configuration says, else that of its first floating weight
    in its files."""
    from safetensors import safe_open

    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if config.dtype is not None:
        return config.dtype  # type: ignore[no-any-return]
    for name, file in _places(path).items():
        if file.is_file():
            with safe_open(file, "pt") as opened:
                kind = opened.get_slice(name).get_dtype()
            if kind in known:
                return known[kind]
    return torch.float32


def export(model: CausalLM, tokenizer: Any, folder: Path) -> None:
    """A plain `from_pretrained` folder, adapters merged, written by rank 0; all ranks call it.

    With adapters also `adapter/` beside it, a folder that peft reads.

    Raises:
        RunError: what was written is not the whole model.
    """
    lm = model.lm
    if ranks.sharded(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(lm, options=options)
    else:
        weights = lm.state_dict()
    once = dict(lm.named_parameters())  # a tied head is not written a second time
    twice = dict(lm.named_parameters(remove_duplicate=False)).keys() - once.keys()
    weights = {name: weight for name, weight in weights.items() if name not in twice}
    if ranks.rank() != 0:
        return
    plain = merged(lm, weights) if _adapted(lm) else weights.items()
    exact = [each for kind in ("", "_strict") for each in _kept_in_float32(lm, kind)]
    found = {
        name: weight if any(e in name for e in exact) else _as(weight, model.export_dtype)
        for name, weight in plain
    }
    if strange := [name for name in found if ".base_layer." in name or ".lora_" in name]:
        raise RunError(f"export of {lm.config.model_type}: {strange[0]} is no weight of its own")
    lm.save_pretrained(folder, state_dict=found)
    if model.export_dtype:
        config = copy.deepcopy(lm.config)
        config.dtype = model.export_dtype
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if _adapted(lm):
        _check_whole(lm, folder)
        _save_adapter(lm, weights, folder.parent / "adapter")


def _kept_in_float32(lm: Any, kind: str) -> Sequence[str]:
    """Parts of names of weights that `transformers` keeps in float32, such as a router's biases."""
    return getattr(lm, f"_keep_in_fp32_modules{kind}", None) or ()


def _as(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the type of the export, in CPU memory; another type than its own is a copy."""
    if dtype is None or not weight.is_floating_point() or weight.dtype == dtype:
        return weight
    return weight.detach().to(dtype).cpu()


def _check_whole(lm: Any, folder: Path) -> None:
    """Read the export back, without its values."""
    _, found = type(lm).from_pretrained(folder, device_map="meta", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(found[what]):
            raise RunError(
                f"export of {lm.config.model_type} with adapters: {len(names)} {what} when "
                f"{folder} is read back, such as {names[0]}"
            )


def _save_adapter(lm: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """The adapter by itself, in peft's format; not where peft would read it as another one."""
    from safetensors.torch import save_file

    layers = _adapted(lm)
    (one, *_) = layers.values()
    peft = optional("peft", "--lora-rank")
    config = peft.LoraConfig(
        r=one.r["default"],
        lora_alpha=one.lora_alpha["default"],
        target_modules=list(layers),
        base_model_name_or_path=lm.name_or_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    read = copy.deepcopy(config)
    with contextlib.suppress(ImportError):  # of a peft that takes names as they are
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        convert_peft_config_for_transformers(read, lm, None)
    if read.target_parameters:
        say(f"! no adapter/: of {lm.config.model_type}, peft would read it as one on other weights")
        return
    config.save_pretrained(str(folder))
    named = {
        f"base_model.model.{name.replace('.default.', '.')}": ranks.whole(weight).cpu().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(named, str(folder / "adapter_model.safetensors"), {"format": "pt"})
