"""How much memory a run will need, by component, before a weight is read.

The formula is in docs/scaling.md, and `benchmarks/bench_memory.py` holds it against measured peaks.
What a layer keeps for its backward pass is not guessed from an architecture: the model runs once on
tensors without data, and what autograd saves is counted.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_ops.reference import default_workspace_mib
from opd_run import ranks, served_teacher, views, vllm_sampler
from opd_run.adapters import NO_LAYER, source_dtype
from opd_run.console import RunError, one_line
from opd_run.console import say as say_lines
from opd_run.models import num_parameters

LOGITS = 4  # copies of [rows, V] float32 that one step of the sampler holds


def estimate(
    paths: dict[str, str], longest_prompt: int, args: argparse.Namespace
) -> dict[str, int]:
    """Bytes of each component on the device of the student (of frozen models: on theirs).

    Args:
        paths: `model_paths(args)`.  longest_prompt: in tokens.
    """
    return _counted(paths, longest_prompt, args)[0]


def _counted(
    paths: dict[str, str], longest_prompt: int, args: argparse.Namespace
) -> tuple[dict[str, int], _Shape]:
    """The estimate, without what cannot be counted; the student's shape."""
    import transformers

    paths = served_teacher.local(paths, args)
    trust = {"trust_remote_code": args.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(paths["student"], **trust)
    config.dtype = source_dtype(paths["student"], config)
    compute = getattr(torch, args.dtype)
    length = longest_prompt + args.max_completion_tokens
    rows = max(1, args.micro_batch_tokens // length)
    rows = min(rows, rows_of_rank(args))
    student = _Shape(config, compute, rows, length, args)
    parts = ranks.world() if args.shard == "fsdp" else 1
    found = {"student weights": student.weight_bytes // parts}
    if views.decay_of(args) is not None:  # an average is loaded and split as the student is
        found["teacher weights"] = student.weight_bytes // parts
        del paths["teacher"]
    teachers = {path for name, path in paths.items() if name.partition("/")[0] == "teacher"}
    frozen = {path: name for name, path in reversed(paths.items()) if name != "student"}
    if args.lora_rank:
        frozen.pop(paths["student"], None)  # the student without its adapters
    of_frozen = {
        f"{name} weights": num_parameters(
            transformers.AutoConfig.from_pretrained(path, **trust), **trust
        )
        * getattr(torch, args.teacher_dtype).itemsize
        // (parts if args.shard_frozen else 1)
        for path, name in frozen.items()
    }
    if args.teacher_offload:  # one at a time
        found["teacher: largest frozen model"] = max(of_frozen.values(), default=0)
    else:
        found |= of_frozen
    found["optimizer"] = 8 * student.num_trained // parts
    whole = student.num_parameters * compute.itemsize if parts > 1 else 0
    cast = student.num_parameters * compute.itemsize if compute != torch.float32 else 0
    text, batch = config.get_text_config(), min(args.sampler_batch_size, rows_of_rank(args))
    sizes = {"generate": batch}
    if args.eval_every and args.test_prompts:  # at most: how many test prompts there are is open
        sizes["evaluate"] = args.sampler_batch_size
    if args.sampler == "vllm":
        found["generate: vLLM"] = vllm_sampler.memory(student.num_parameters, args)
    else:
        for phase, num in sizes.items():
            if student.cache_bytes is not None:
                found[f"{phase}: cache"] = num * length * student.cache_bytes
            found[f"{phase}: logits"] = LOGITS * num * text.vocab_size * 4
            found[f"{phase}: weights in --dtype"] = max(whole, cast)
    sampled = _rows_of_teacher(sizes, args)
    for path in teachers if sampled else ():
        config = transformers.AutoConfig.from_pretrained(path, **trust)
        config.dtype = source_dtype(path, config)
        teacher = _Shape(config, getattr(torch, args.teacher_dtype), 0, 0, args)
        student.left_out |= {f"{name} of {path}": why for name, why in teacher.left_out.items()}
        vocab = config.get_text_config().vocab_size
        for phase, num in sampled.items():
            for part, size in _of_teacher(teacher, num, length, vocab, parts, args).items():
                name = f"{phase}: {part}"  # models sample one after the other
                found[name] = max(size, found.get(name, 0))
    found["student: gradients"] = 4 * student.num_trained // parts
    if student.saved_bytes is not None:
        found["student: activations"] = student.saved_bytes
    wide = args.device != "cpu" and args.dtype != "float32"  # float32, and gradients of 16 bits
    logits = (6 if wide else 4) * rows * args.max_completion_tokens * text.vocab_size
    workspace = int(default_workspace_mib(args.device) * 2**20)
    found["student: loss"] = min(workspace, logits) + 4 * text.vocab_size * text.hidden_size
    if args.eval_only:
        trained = ("optimizer", "student: ", "generate: ")
        found = {name: size for name, size in found.items() if not name.startswith(trained)}
    return found, student


def rows_of_rank(args: argparse.Namespace) -> int:
    """Rollouts that one process samples in a step, at most."""
    num_rollouts: int = args.prompts_per_step * args.rollouts_per_prompt
    return -(-num_rollouts // ranks.world())


def _rows_of_teacher(sizes: dict[str, int], args: argparse.Namespace) -> dict[str, int]:
    """How many rollouts the teacher samples together in the phases where it samples, at most."""
    rows, found = rows_of_rank(args), {}
    if args.eval_teacher and "evaluate" in sizes:
        found["evaluate"] = sizes["evaluate"]
    if getattr(args, "guidance", False) and args.teacher_rollouts is None:  # tropd
        found["generate"] = rows * args.guided_rollouts / args.rollouts_per_prompt
    elif getattr(args, "teacher_phase_steps", 0):  # sg_opd
        found["generate"] = rows * args.teacher_share
    elif hasattr(args, "right_only"):  # forks/supervised.py
        found["generate"] = rows
    return {
        phase: min(math.ceil(num), args.sampler_batch_size) for phase, num in found.items() if num
    }


def _of_teacher(
    teacher: _Shape, rows: int, length: int, vocab: int, parts: int, args: argparse.Namespace
) -> dict[str, int]:
    """What a teacher takes beside its weights while it samples `rows` completions."""
    found = {"logits": LOGITS * rows * vocab * 4}
    if teacher.cache_bytes is not None:
        found["cache"] = rows * length * teacher.cache_bytes
    if args.shard_frozen and parts > 1:
        found["weights in --dtype"] = teacher.weight_bytes
    if args.teacher_offload:
        found["the teacher, on its device"] = teacher.weight_bytes
    return found


def peak(found: dict[str, int]) -> int:
    """The components that are always there, and the largest of the phases."""
    phases = {"generate": 0, "evaluate": 0, "teacher": 0, "student": 0}
    always = 0
    for name, size in found.items():
        phase = name.partition(":")[0]
        if phase in phases:
            phases[phase] += size
        else:
            always += size
    return always + max(phases.values())


def say(paths: dict[str, str], prompts: Sequence[Any], args: argparse.Namespace) -> None:
    """Print the estimate: it assumes that completions reach `--max-completion-tokens`."""
    found, student = _counted(paths, max(prompt.longest for prompt in prompts), args)
    lines = [f"memory: {name:<30} {size / 2**20:>10.0f} MiB" for name, size in found.items()]
    what = "and what libraries take" if args.device == "cpu" else "and the CUDA context"
    total = f"memory: {'peak, calculated':<30} {peak(found) / 2**20:>10.0f} MiB, {what}"
    if student.left_out:
        total += f" and {', '.join(student.left_out)}"
    away = args.teacher_device.partition(":")[0] != args.device.partition(":")[0]
    if args.teacher_offload:
        total += "; frozen models wait in CPU memory"
    say_lines(*lines, total + (f"; frozen models are on {args.teacher_device}" if away else ""))
    for name, why in student.left_out.items():
        say_lines(f"! memory: {name} of this model type cannot be counted without its data: {why}")
    if args.eval_only:
        return
    size, kept = student.checkpoint_bytes, args.keep_checkpoints
    if views.decay_of(args) is not None:  # saved, too
        size += student.weight_bytes
    most = f"{kept} are kept, and one more while it is written: {(kept + 1) * size / 1e9:.1f} GB"
    say_lines(f"disk: a checkpoint takes {size / 1e9:.1f} GB; {most if kept else 'all are kept'}")


class _Shape:
    """Counts for a model made of tensors without data: of `rows` 0 for one that is not trained."""

    def __init__(
        self,
        config: Any,
        compute: torch.dtype,
        rows: int,
        length: int,
        args: argparse.Namespace,
    ) -> None:
        import transformers
        from torch._subclasses import fake_tensor

        trust = {"trust_remote_code": args.trust_remote_code}
        lora_rank = args.lora_rank if rows else 0
        dtype = compute if lora_rank or not rows else torch.float32
        source = config.dtype if args.export_dtype == "source" else torch.float32

        def make() -> Any:
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
            if lora_rank:
                _pretend_adapters(lm, lora_rank)
            return lm

        layers = max(1, config.get_text_config().num_hidden_layers)
        self.saved_bytes: int | None = None
        self.cache_bytes: int | None = None
        self.left_out: dict[str, str] = {}
        counted: tuple[int, int] | None = None
        fake_tensor.log.setLevel(logging.CRITICAL)  # what it says is said below, in a line
        with fake_tensor.FakeTensorMode():
            lm = self._try("activations and cache", make)
            if lm is not None:
                if rows:
                    counted = self._try("activations", self._count_saved, lm, compute, rows, length)
                self.cache_bytes = self._try("cache", self._count_cache, lm, compute, layers)
                if counted and args.gradient_checkpointing:
                    self.saved_bytes = counted[0] // layers + layers * counted[1]
                elif counted:
                    self.saved_bytes = counted[0]
        if lm is None:
            with torch.device("meta"):
                lm = make()
        weights = list(lm.parameters())
        self.num_parameters = sum(weight.numel() for weight in weights)
        self.num_trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        self.checkpoint_bytes = (  # model/, and in trainer/ weights and two moments
            source.itemsize * self.num_parameters + self.weight_bytes + 8 * self.num_trained
        )

    def _try(self, name: str, count: Callable[..., Any], *args: Any) -> Any:
        """What `count(*args)` finds; None, and a line, where the architecture does not let it: each
        has its own way to ask for data that is not there."""
        try:
            return count(*args)
        except RunError:
            raise
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {one_line(error, 80)}"
            return None

    @staticmethod
    def _count_saved(lm: Any, compute: torch.dtype, rows: int, length: int) -> tuple[int, int]:
        """Bytes that autograd saves of one forward pass; of one layer's hidden states."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        saved = _Saved(list(lm.parameters()))
        with torch.autocast("cpu", compute, compute != torch.float32), saved:
            mask = torch.ones(rows, length, dtype=torch.bool)
            mask[0, 0] = False  # padded: the same attention kernel as in the run
            hidden = lm.get_decoder()(
                input_ids=ids, attention_mask=mask.long(), use_cache=False
            ).last_hidden_state
        return saved.num_bytes, hidden.numel() * hidden.element_size()

    @staticmethod
    def _count_cache(lm: Any, compute: torch.dtype, layers: int) -> int:
        """Bytes of a token in the cache."""
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with torch.autocast("cpu", compute, compute != torch.float32):
            cache = lm.get_decoder()(input_ids=ids, use_cache=True).past_key_values
        floats: int = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        return floats * compute.itemsize * (layers + 1) // layers  # one is copied


def _pretend_adapters(lm: Any, rank: int) -> None:
    """What adapters have and keep; peft itself moves weights about, which have no data here."""
    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    layers = [e for e in lm.modules() if type(e) is torch.nn.Linear and e is not head]
    if not layers:
        raise RunError(NO_LAYER.format(lm.config.model_type))
    for module in layers:
        module.down = torch.nn.Parameter(torch.zeros(rank, module.in_features))
        module.up = torch.nn.Parameter(torch.zeros(module.out_features, rank))
        module.register_forward_hook(_adapt)


def _adapt(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    rows = inputs[0].to(module.down.dtype)
    product: Tensor = F.linear(F.linear(rows, module.down), module.up) * 2.0
    return output + product


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves, each storage once, without the weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.num_bytes = 0
        self._kept: list[Tensor] = []  # alive, so that no storage is counted for two
        self._seen = {weight.untyped_storage()._cdata for weight in weights}
        super().__init__(self._pack, lambda value: value)

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(value)
            self.num_bytes += storage.nbytes()
        return value
