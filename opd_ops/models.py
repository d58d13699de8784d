"""Loading `transformers` models so that hidden states and head are used inside one forward call."""

from __future__ import annotations

import argparse
import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import DynamicCache

from opd_ops import compat, engines, ranks, rollouts, runs


class CausalLM(torch.nn.Module):
    """A `transformers` model whose forward pass ends in `read`.

    `read(rows, head)` gets hidden states [N, D] and the head [V, D], so that a loss never holds
    [N, V]. Where the head is more than a matrix product (bias, soft-capping, scale, adapter) it
    gets logits [N, V] and None instead, which every `opd_ops.linear_*` op takes as well. `read`
    runs inside the module's forward, where sharded weights are whole.

    Attributes:
        lm: the `PreTrainedModel`.  plain_head: whether `read` gets the head.
        compute_dtype: autocast type; float32 means no autocast.
    """

    def __init__(self, lm: Any, plain_head: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.lm, self.plain_head, self.compute_dtype = lm, plain_head, compute_dtype
        self.engine: Any = None  # what samples in its stead (`opd_ops.engines`)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.lm.parameters()).device
        return device

    @property
    def head(self) -> Tensor | None:
        """The head [V, D], or None where it is not a plain matrix product.

        Outside of `forward`, a sharded head is put together, by all ranks at once.
        """
        return ranks.whole(self.lm.get_output_embeddings().weight) if self.plain_head else None

    def autocast(self) -> torch.autocast:
        """The compute type of `--dtype`; outside of it weights would be cast anew in every call."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled)

    def present(self) -> contextlib.AbstractContextManager[None]:
        """The weights on `device` for the block."""
        return contextlib.nullcontext()

    def new_cache(self) -> DynamicCache:
        """An empty key/value cache in the compute type. (Under autocast, keys and values come out
        of norm and rotation in float32: twice the memory, for numbers that are cast at use.)"""
        return _TypedCache(self.compute_dtype, config=self.lm.config)

    def forward(self, read: Callable[..., Any], where: Tensor | None, **inputs: Any) -> Any:
        """`read` at the positions `where`, a mask [B, P+T]; None: the last position of each row."""
        with self.autocast():
            if self.plain_head:
                rows = self.lm.get_decoder()(**inputs).last_hidden_state
            else:
                rows = self.lm(**inputs, logits_to_keep=int(where is None)).logits
            return read(rows[:, -1] if where is None else rows[where], self.head)


class WithoutAdapter(CausalLM):
    """The student as it was before its adapters were trained: a reference without a second copy."""

    def __init__(self, student: CausalLM) -> None:
        super().__init__(student.lm, student.plain_head, student.compute_dtype)
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


class Offloaded(CausalLM):
    """A frozen model that waits in CPU memory and is on `place` only while it computes."""

    def __init__(self, lm: Any, plain_head: bool, compute_dtype: torch.dtype, place: str) -> None:
        super().__init__(lm, plain_head, compute_dtype)
        self.place, self.is_present = torch.device(place), False
        self._head: Callable[[], Tensor | None] = lambda: None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.place

    @property
    def head(self) -> Tensor | None:
        """As of `CausalLM`; outside of `forward` one copy on the device, while anyone holds it."""
        head, copy = super().head, self._head()
        if head is None or self.is_present:
            return head
        if copy is None:
            copy = head.to(self.place, copy=True)
            self._head = weakref.ref(copy)
        return copy

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Copies of the weights on the device for the block; those that wait stay as they are."""
        if self.is_present:
            yield
            return
        waiting = [(each, each.data) for each in (*self.lm.parameters(), *self.lm.buffers())]
        try:
            for each, values in waiting:
                each.data = values.to(self.place, copy=True)
            self.is_present = True
            yield
        finally:
            self.is_present = False
            for each, values in waiting:
                each.data = values

    def forward(self, read: Callable[..., Any], where: Tensor | None, **inputs: Any) -> Any:
        """As of `CausalLM`."""
        with self.present():
            return super().forward(read, where, **inputs)


class _TypedCache(DynamicCache):  # type: ignore[misc]
    def __init__(self, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtype = dtype

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._dtype != torch.float32:
            keys, values = keys.to(self._dtype), values.to(self._dtype)
        return super().update(keys, values, *args, **kwargs)


def load_lm(path: str, frozen: bool, args: argparse.Namespace) -> CausalLM:
    """Load one model for training or frozen, in eval mode.

    The student's weights are float32 (its compute type is `--dtype`), a frozen model's are
    `--teacher-dtype` and take no gradient. With `--lora-rank` the student's are frozen in `--dtype`
    and its adapters are float32. Dropout is set to 0: the policy that is trained has to
    be the policy that sampled. Only safetensors are read.

    Raises:
        RunError: the folder or hub name has no model that can be loaded.
    """
    import transformers

    compute = getattr(torch, args.teacher_dtype if frozen else args.dtype)
    adapted = bool(args.lora_rank) and not frozen
    peft = runs.optional("peft", "lora", "--lora-rank") if adapted else None
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **trust)
        for key in config.to_dict():
            if "dropout" in key or key.endswith("_pdrop"):
                setattr(config, key, 0.0)
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=compute if frozen or adapted else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **trust,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files raise whatever their reader does
        raise runs.RunError(f"model {path} cannot be loaded: {runs.one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise runs.RunError(
            f"model {path}: {len(missing)} weights are missing in its files, such as {missing[0]}"
        )
    sharded = args.shard == "fsdp" and (not frozen or args.shard_frozen)
    offload = frozen and args.teacher_offload
    if not sharded and not offload:  # sharded it goes to the device in pieces
        lm = lm.to(args.teacher_device if frozen else args.device)
    lm = lm.requires_grad_(not frozen).eval()
    if peft is not None:
        _add_adapters(lm, peft, args)
    plain = compat.head_is_product(lm, args.valid_vocab)
    if not plain:
        runs.say(f"! {path}: the head is more than a matrix product: full [N, V] logits are held")
    if args.gradient_checkpointing and not frozen:
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # renamed in transformers 5.2x
    if offload:
        return Offloaded(lm, plain, torch.float32, args.teacher_device).eval()
    model = CausalLM(lm, plain, torch.float32 if frozen else compute).eval()
    if sharded:
        ranks.shard(model, args)
    return model


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


def load_models(paths: dict[str, str], args: argparse.Namespace) -> dict[str, CausalLM]:
    """Load `student` for training and all others frozen; frozen models with one path are shared.

    With `--lora-rank`, a frozen model with the student's path is the student without its adapters.
    """
    models: dict[str, Any] = {}
    for name, path in engines.local(paths, args).items():
        twin = next((n for n in models if n != "student" and paths[n] == path), None)
        if twin:
            models[name] = models[twin]
        elif name != "student" and args.lora_rank and path == paths["student"]:
            models[name] = WithoutAdapter(models["student"])
            runs.say(f"{name}: the student without its adapters; no second copy")
        else:
            models[name] = load_lm(path, name != "student", args)
    if args.teacher_url:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            paths["student"], trust_remote_code=args.trust_remote_code
        )
        models["teacher"] = engines.RemoteTeacher(tokenizer, args)
    if args.sampler == "vllm":
        models["student"].engine = engines.VllmSampler(paths["student"], args)
    return models


def _add_adapters(lm: Any, peft: Any, args: argparse.Namespace) -> None:
    """LoRA on every linear layer but the head; in place, so that `lm` keeps its class."""
    head = next(n for n, each in lm.named_modules() if each is lm.get_output_embeddings())
    linear = [n for n, each in lm.named_modules() if type(each) is torch.nn.Linear and n != head]
    config = peft.LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=linear, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # the same on every rank
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


def by_teacher(
    models: dict[str, CausalLM], rollout: Any
) -> Iterator[tuple[CausalLM, list[int], Any]]:
    """Each teacher with the rollouts of its domain: which rows they are, and these rollouts.

    Names: `teacher` gets all, `teacher/NAME` those whose prompt has the domain NAME. All ranks have
    to use a sharded model together, the student too, with which a teacher is compared: a teacher
    without rows then gets a rollout with nothing to train.
    """
    in_step = any(ranks.sharded(model) for model in models.values())
    for name, model in models.items():
        kind, _, domain = name.partition("/")
        rows = [row for row, each in enumerate(rollout.prompts) if domain in ("", each.domain)]
        if kind == "teacher" and rows:
            yield model, rows, rollout.select(torch.tensor(rows))
        elif kind == "teacher" and in_step:
            yield model, rows, rollouts.idle(rollout, 0)


def num_parameters(config: Any, **trust: bool) -> int:
    """Of a model with this configuration; a tied head is counted once, no weight is made."""
    import transformers

    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config, **trust)
    return sum(weight.numel() for weight in lm.parameters())


def prepare(paths: dict[str, str], args: argparse.Namespace) -> Any:
    """Everything that can refuse a set of models before a weight is read.

    Loads tokenizers and configurations, compares them (`compat.check_pair`), resolves `--device`,
    `--dtype` and their frozen counterparts; sets `args.valid_vocab`, `.eos_ids`, `.num_positions`.

    Returns:
        The student's tokenizer, with the chat template of `--chat-template-from`.
    """
    import transformers

    paths = engines.local(paths, args)
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    args.device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    args.teacher_device = args.device if args.teacher_device == "same" else args.teacher_device
    for flag, device in (("--device", args.device), ("--teacher-device", args.teacher_device)):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise runs.RunError(f"{flag} {device!r}: {runs.one_line(error)}", 2) from None
    if args.teacher_offload and args.teacher_device == "cpu":
        raise runs.RunError("--teacher-offload: frozen models are in CPU memory already", 2)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)  # what timings and memory figures speak of
    for name, device in (("dtype", args.device), ("teacher_dtype", args.teacher_device)):
        if getattr(args, name) == "auto":
            setattr(args, name, "bfloat16" if device.startswith("cuda") else "float32")
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizers, configs, generation_configs = {}, {}, {}
    for name, path in paths.items():
        try:
            configs[name] = transformers.AutoConfig.from_pretrained(path, **trust)
            tokenizers[name] = transformers.AutoTokenizer.from_pretrained(path, **trust)
        except (OSError, ValueError, KeyError) as error:
            raise runs.RunError(
                f"--{name.split('/')[0]} {path}: no model or tokenizer: {runs.one_line(error)}"
            ) from error
        if set(tokenizers[name].get_vocab().values()) <= set(tokenizers[name].all_special_ids):
            raise runs.RunError(
                f"--{name.split('/')[0]} {path}: no tokenizer: it has special tokens only"
            )
        try:
            generation_configs[name] = transformers.GenerationConfig.from_pretrained(path)
        except OSError:
            generation_configs[name] = transformers.GenerationConfig()
    report = compat.check_pair(
        tokenizers,
        configs,
        generation_configs,
        args.chat_template_args if args.chat_template else None,
        args.chat_template_from,
    )
    for name, config in configs.items():
        try:
            size = num_parameters(config, **trust)
        except ValueError as error:
            raise runs.RunError(
                f"--{name.split('/')[0]} {paths[name]}: expected a causal language model, got "
                f"{config.model_type}: {runs.one_line(error, 100)}"
            ) from error
        report.facts.append(
            f"{name}: {paths[name]}: {config.model_type}, {size / 1e6:.2f} M parameters"
        )
    runs.say(*report.lines())
    if report.errors:
        raise runs.RunError("; ".join(report.errors))
    args.valid_vocab, args.eos_ids = report.valid_vocab, report.eos_ids
    args.num_positions = report.num_positions
    tokenizer = tokenizers["student"]
    if args.chat_template_from == "teacher":
        teacher = next(name for name in tokenizers if name.startswith("teacher"))
        tokenizer.chat_template = tokenizers[teacher].chat_template
    return tokenizer
