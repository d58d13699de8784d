"""From flags to loaded models: every check that can come before a weight is read, then loading."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_run import compat, data, offload, ranks, served_teacher, views, vllm_sampler
from opd_run.adapters import (
    WithoutAdapter,
    add_adapters,
    as_saved,
    names_in,
    names_in_files,
    source_dtype,
)
from opd_run.compat import Facts
from opd_run.console import RunError, one_line, say
from opd_run.files import TINY
from opd_run.models import CausalLM, ReadAs, head_is_product, pin_longrope, without_weights

MOST_LAYERS = 2000  # more than any model has
MERGE_FIRST = "it has an adapter_config.json: merge the adapter into its model first"


def prepare(
    paths: dict[str, str], args: argparse.Namespace, render: Callable[..., str]
) -> tuple[Any, Facts]:
    """Everything that can refuse a set of models before a weight is read.

    Loads tokenizers and configurations and compares them (`compat.check_pair`).

    Args:
        paths: folders or hub names by model name (`model_paths(args)` of the method file).
        render: `render(tokenizer, text, args)` of the method file, for the comparison of templates.

    Returns:
        The student's tokenizer, with the chat template of `--chat-template-from`; what is known of
        all models together.

    Raises:
        RunError: a device or a model is not there, or the models do not go together.
    """
    import transformers

    paths = served_teacher.local(paths, args)
    transformers.utils.logging.disable_progress_bar()
    for flag, device in (("--device", args.device), ("--teacher-device", args.teacher_device)):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"{flag} {device!r}: {one_line(error)}", 2) from None
    if args.teacher_offload and args.teacher_device == "cpu":
        raise RunError("--teacher-offload: frozen models are in CPU memory already", 2)
    if (device := torch.device(args.device)).type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what timings and memory figures speak of
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizers, configs, generation_configs, stored = {}, {}, {}, {}
    for name, path in paths.items():
        if (Path(path) / "adapter_config.json").exists():
            raise RunError(f"--{name.split('/')[0]} {path}: {MERGE_FIRST}", 2)
        if inside := _model_inside(Path(path)):
            raise RunError(
                f"--{name.split('/')[0]} {path}: expected the folder of a model, got that of a run "
                f"or checkpoint; its model is in {inside}",
                2,
            )
        try:
            _check_layers(name, path, transformers.PretrainedConfig.get_config_dict(path)[0])
            configs[name] = transformers.AutoConfig.from_pretrained(path, **trust)
            tokenizers[name] = transformers.AutoTokenizer.from_pretrained(path, **trust)
        except RunError:
            raise
        except Exception as error:  # whatever a reader, or the classes of a type, say of its files
            raise RunError(
                f"--{name.split('/')[0]} {path}: no model or tokenizer: {one_line(error)}"
            ) from error
        if why := _unfit(name, configs[name]):
            raise RunError(f"--{name.split('/')[0]} {path}: {why}")
        if set(tokenizers[name].get_vocab().values()) <= set(tokenizers[name].all_special_ids):
            raise RunError(
                f"--{name.split('/')[0]} {path}: no tokenizer: it has special tokens only"
            )
        stored[name] = _check_files(name, path)
        try:
            generation_configs[name] = transformers.GenerationConfig.from_pretrained(path)
        except OSError as error:
            file = Path(path) / "generation_config.json"
            if file.is_file():
                raise RunError(f"--{name.split('/')[0]} {file}: {one_line(error)}") from error
            generation_configs[name] = transformers.GenerationConfig()
    report = compat.check_pair(
        tokenizers,
        configs,
        generation_configs,
        partial(render, args=args) if args.chat_template else None,
        args.chat_template_from,
        args.allow_renamed_tokens,
    )
    for name, config in configs.items():
        try:
            lm = without_weights(config, **trust)
        except ValueError as error:
            raise RunError(
                f"--{name.split('/')[0]} {paths[name]}: expected a causal language model, got "
                f"{config.model_type}: {one_line(error, 100)}"
            ) from error
        except Exception as error:  # of kernels, of sizes: each type has its own way
            raise RunError(
                f"--{name.split('/')[0]} {paths[name]}: no {config.model_type} can be made of its "
                f"configuration: {one_line(error)}"
            ) from error
        num = _num_layers(list(lm.state_dict()))  # configurations count layers in unlike ways
        if 0 < (found := _num_layers(stored[name])) < num:
            raise RunError(
                f"--{name.split('/')[0]} {paths[name]}: its config.json says {num} layers, its "
                f"weights have {found}"
            )
        size = sum(weight.numel() for weight in lm.parameters())
        report.facts.append(
            f"{name}: {paths[name]}: {config.model_type}, {size / 1e6:.2f} M parameters"
        )
    say(*report.lines())
    if args.chat_template and not report.errors:
        _say_idle_arguments(tokenizers, args, render)
    if report.errors and paths.get("teacher") == str(TINY / "teacher"):
        report.errors.insert(0, "no --teacher given: the tiny one goes with the tiny student only")
    if report.errors:
        raise RunError("; ".join(report.errors))
    tokenizer = tokenizers["student"]
    if args.chat_template_from == "teacher":
        teacher = next(name for name in tokenizers if name.startswith("teacher"))
        tokenizer.chat_template = tokenizers[teacher].chat_template
    check_system = partial(_check_system, tokenizer, args, render)
    if args.system is not None:
        check_system("--system", args.system, "--prompt-template", {})
    for view in views.of(args):
        if view.spec is not None and data.is_function(view.spec):
            views.function_of(view.spec, view.role)  # here nothing limits how long its imports take
        if view.system is not None:
            remedy = f"--{view.role}-prompt"
            check_system(f"--{view.role}-system", view.system, remedy, view.template_args)
    return tokenizer, report.all_facts()


def _check_layers(name: str, path: str, config: Any) -> None:
    """Refuse a config.json with more layers than any model has, before they are made.

    Raises:
        RunError: it has them, at any depth.
    """
    for key, value in config.items() if isinstance(config, dict) else ():
        if re.fullmatch(r"n(um)?(_[a-z]+)?_layers?", key) and isinstance(value, int):
            if value > MOST_LAYERS:
                raise RunError(
                    f"--{name.split('/')[0]} {path}: its config.json says {value} layers ({key}); "
                    f"at most {MOST_LAYERS} are expected"
                )
        _check_layers(name, path, value)


def _model_inside(path: Path) -> Path | None:
    """The model of a checkpoint, or of the newest one of a run; None where `path` is neither."""
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = [path / "model", *path.glob("checkpoints/step_*/model")]
    found = [each for each in found if (each / "config.json").exists()]
    return max(found, key=lambda each: (each / "config.json").stat().st_mtime, default=None)


def _check_files(name: str, path: str) -> list[str]:
    """Refuse what a folder from elsewhere may claim: files outside of it, or of a kind that is not
    read. The names of its weights, as far as the folder says them.

    Raises:
        RunError: it does.
    """
    from transformers.utils import cached_file

    flag = f"--{name.split('/')[0]} {path}"
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as opened:
            if opened.read(8) == b"version ":
                raise RunError(f"{flag}: {file.name} is a pointer of Git LFS: git lfs pull has to "
                               "fetch the weights first")  # fmt: skip
    index = cached_file(
        path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    weights: list[str] = []
    if index is not None:
        try:
            weight_map = json.loads(Path(index).read_bytes())["weight_map"]
            places = {str(place) for place in weight_map.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{flag}: {Path(index).name}: {one_line(error)}") from error
        for place in sorted(places):
            if Path(place).name != place or not place.endswith(".safetensors"):
                raise RunError(
                    f"{flag}: {Path(index).name} names {place!r}: expected a .safetensors file in "
                    "the same folder"
                )
        weights = list(weight_map)
    elif (file := Path(path) / "model.safetensors").is_file():
        weights = names_in(file)
    return weights


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the number in model.layers.5.mlp.up_proj.weight


def _num_layers(names: Sequence[str]) -> int:
    """How many layers the names of weights speak of; 0 if their names have no numbers."""
    numbers = [found for found in map(_LAYER.search, names) if found]
    return 1 + max((int(found[0]) for found in numbers), default=-1)


def _layers_beyond(lm: Any, names: Sequence[str]) -> list[str]:
    """Those names of weights that differ from one of the model's own in a higher layer only."""
    num = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    if not names or num is None:
        return []
    own = lm.state_dict().keys()
    numbered = [(name, _LAYER.search(name)) for name in sorted(names)]
    beyond = [name for name, found in numbered if found and int(found[0]) >= num]
    return [name for name in beyond if _LAYER.sub("0", name, count=1) in own]


def _unfit(name: str, config: Any) -> str:
    """Why a model with this configuration cannot be distilled, or nothing."""
    if config.is_encoder_decoder:
        return (
            f"expected a causal language model, got an encoder and a decoder ({config.model_type})"
        )
    how = getattr(config, "quantization_config", None) if name == "student" else None
    if how:
        how = how if isinstance(how, dict) else how.to_dict()
        return (
            f"its weights are quantised ({how.get('quant_method')}), which cannot be trained: take "
            "the checkpoint without quantisation"
        )
    return ""


def _say_idle_arguments(
    tokenizers: dict[str, Any], args: argparse.Namespace, render: Callable[..., str]
) -> None:
    """Say which of `--chat-template-args` and `--teacher-template-args` the template does not
    know."""
    name = next(name for name in tokenizers if name.startswith(args.chat_template_from))
    tokenizer, own = tokenizers[name], args.chat_template_args
    kinds: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("--chat-template-args", {}, own),
        ("--teacher-template-args", own, args.teacher_template_args),
    ]
    for flag, before, given in kinds if tokenizer.chat_template is not None else ():
        for key in given:
            texts = []
            for fewer in (given, {k: v for k, v in given.items() if k != key}):
                each = argparse.Namespace(**vars(args) | {"chat_template_args": before | fewer})
                with compat.time_limit(f"the chat template of the {name}"):
                    texts.append(render(tokenizer, "What is 12 + 34?", each))
            if texts[0] == texts[1]:
                say(f"! {flag}: {key!r} changes nothing in the template of the {name}")


def _check_system(
    tokenizer: Any, args: argparse.Namespace, render: Callable[..., str], flag: str, system: str,
    remedy: str, template_args: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse a system message that would not be read: compared with another text, as a template
    may have a message of its own where there is none.

    Args:
        flag: that has it.  remedy: another flag.  template_args: more of the chat template's.

    Raises:
        RunError: exit code 2; there is no chat template, it refuses a system message or drops it.
    """
    if not args.chat_template or tokenizer.chat_template is None:
        raise RunError(f"{flag}: needs a chat template", 2)
    texts = []
    for text in (system, f"{system} 12 + 34"):
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "Hello."}]
        try:
            with compat.time_limit("the chat template"):
                texts.append(render(tokenizer, messages, args, **template_args))
        except RunError:
            raise
        except Exception as error:  # templates raise what they like
            raise RunError(f"{flag}: the chat template refuses it: {one_line(error)}", 2) from error
    if texts[0] == texts[1]:
        raise RunError(f"{flag}: the chat template drops system messages: put it into {remedy}", 2)


def load_lm(
    path: str,
    frozen: bool,
    weights_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    configure: Callable[[Any], None],
    adapted_layers: Callable[[Any], Sequence[str]],
    facts: Facts,
    args: argparse.Namespace,
) -> CausalLM:
    """Load one model, in eval mode, onto its device. Only safetensors are read.

    Args:
        frozen: it takes no gradient.
        weights_dtype: type of the weights.  compute_dtype: autocast type; float32: no autocast.
        configure: changes the student's configuration before the model is made.
        adapted_layers: with `--lora-rank` the names of the layers that get an adapter, from the
            loaded model; the rest of the student is then frozen.

    Raises:
        RunError: the folder or hub name has no model that can be loaded.
    """
    import transformers

    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **trust)
        source = source_dtype(path, config)
        config.return_dict = True  # a tuple has no names
        if not frozen:
            configure(config)
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=weights_dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **trust,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files raise whatever their reader does
        raise RunError(f"model {path} cannot be loaded: {one_line(error)}") from error
    if getattr(lm, "_hf_peft_config_loaded", False):
        raise RunError(f"model {path}: {MERGE_FIRST}")
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise RunError(
            f"model {path}: {len(missing)} weights are missing in its files, such as {missing[0]}"
        )
    if extra := _layers_beyond(lm, found["unexpected_keys"]):  # transformers leaves them out
        num = lm.config.get_text_config().num_hidden_layers
        raise RunError(
            f"model {path}: its config.json says {num} layers, its files have more: {extra[0]}"
        )
    for name, *shapes in sorted(found["mismatched_keys"]):
        raise RunError(
            f"model {path}: {name} is {list(shapes[0])} in its files and {list(shapes[1])} by its "
            "configuration"
        )
    if not frozen:
        _say_left_out(path, lm)
    longest = args.max_prompt_tokens + args.max_completion_tokens
    if pin_longrope(lm, longest):
        say(
            f"! {path}: LongRoPE: its long factors for all sequences, since {longest} tokens can be"
        )
    sharded = args.shard == "fsdp" and (not frozen or args.shard_frozen)
    offloaded = frozen and args.teacher_offload
    if not sharded and not offloaded:  # sharded it goes to the device in pieces
        lm = lm.to(args.teacher_device if frozen else args.device)
    lm = lm.eval()
    if frozen:  # of the student, what its own class leaves untrained stays so
        lm.requires_grad_(False)
    if args.lora_rank and not frozen:
        add_adapters(lm, adapted_layers(lm), args.lora_rank, args.lora_alpha, args.seed)
    try:
        plain = head_is_product(lm, facts.valid_vocab)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the architecture says of its configuration
        raise RunError(
            f"model {path} ({lm.config.model_type}): a plain forward pass ends in "
            f"{type(error).__name__}: {one_line(error, 200)}"
        ) from error
    if not plain:
        say(f"! {path}: the head is more than a matrix product: full [N, V] logits are held")
    if args.gradient_checkpointing and not frozen:
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # renamed in transformers 5.2x
    if offloaded:
        return offload.Offloaded(lm, plain, compute_dtype, facts, args.teacher_device).eval()
    model = CausalLM(lm, plain, compute_dtype, facts).eval()
    if not frozen:
        model.export_dtype = source if args.export_dtype == "source" else torch.float32
    if sharded:
        ranks.shard(model, args)
    return model


def _say_left_out(path: str, lm: Any) -> None:
    """Say which weights of a student's files are neither trained nor in its exports: of a vision
    tower, of heads that predict several tokens, of more layers than the configuration has."""

    def plain(name: str) -> str:
        return name.removeprefix(f"{lm.base_model_prefix}.")

    ours = as_saved(lm, ((name, weight.to("meta")) for name, weight in lm.state_dict().items()))
    kept = {plain(name) for name, _ in ours}
    if names := sorted(name for name in names_in_files(path) if plain(name) not in kept):
        say(
            f"! {path}: {len(names)} weights of its files have no place in {type(lm).__name__}, "
            f"such as {names[0]}: they are not trained, and not in exports"
        )


def load_models(
    load: Callable[[str, str], CausalLM],
    paths: dict[str, str],
    args: argparse.Namespace,
    facts: Facts,
) -> dict[str, CausalLM]:
    """All models by name: frozen ones with one path are shared.

    With `--lora-rank`, a frozen model with the student's path is the student without its adapters.
    `--teacher live` is the student itself, `--teacher ema:DECAY` its average, which begins as the
    student, with adapters of its own.

    Args:
        load: `load(name, path)` loads one of them.
    """
    models: dict[str, Any] = {}
    for name, path in served_teacher.local(paths, args).items():
        role = name.partition("/")[0]
        twin = next((n for n in models if n != "student" and paths[n] == paths[name]), None)
        if twin:
            same = models[twin].role == role
            models[name] = models[twin] if same else ReadAs(models[twin], role)
            continue
        if name == "teacher" and views.decay_of(args):
            models[name] = load("student", path).requires_grad_(False)
            models["student"].average = (models[name],)
        elif name != "student" and args.lora_rank and path == paths["student"]:
            models[name] = WithoutAdapter(models["student"])
            say(f"{name}: the student without its adapters; no second copy")
        else:
            models[name] = load(name, path)
        models[name].role = role
    if not args.eval_only:
        kind = str(models["student"].export_dtype).removeprefix("torch.")
        say(f"exports: model/ of a checkpoint is {kind} (--export-dtype {args.export_dtype})")
    if paths.get("teacher") == "live":
        models["teacher"] = ReadAs(models["student"], "teacher")
    if args.teacher_url:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            paths["student"], trust_remote_code=args.trust_remote_code
        )
        models["teacher"] = served_teacher.RemoteTeacher(tokenizer, facts, args)
    if args.sampler == "vllm":
        models["student"].engine = vllm_sampler.VllmSampler(paths["student"], facts, args)
    return models


def models_of(
    method: Any, args: argparse.Namespace, paths: dict[str, str] | None = None
) -> tuple[dict[str, CausalLM], Any, Facts]:
    """Models, tokenizer and facts, as `main` of a method file has them: for tests and benchmarks.

    Args:
        method: the module.  paths: instead of `method.model_paths(args)`.
    """
    paths = paths or method.model_paths(args)
    tokenizer, facts = prepare(paths, args, method.render)
    load = partial(method.load, facts=facts, args=args)
    return load_models(load, paths, args, facts), tokenizer, facts


def prompts_of(
    method: Any,
    spec: str | None,
    tokenizer: Any,
    facts: Facts,
    args: argparse.Namespace,
    test: str | None = None,
) -> list[data.Prompt]:
    """The prompts of one data set, as `main` of a method file has them: for tests and benchmarks.

    Args:
        method: the module.  test: the name of a test set.
    """
    make = partial(method.make_prompt, tokenizer=tokenizer, args=args)
    return data.load_prompts(spec, make, facts.num_positions, args, test)


def zero_moments(optimizer: torch.optim.Optimizer) -> None:
    """The state that AdamW has before its first step, in place."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            step = torch.zeros((), device=weight.device if group.get("fused") else "cpu")
            optimizer.state[weight] = {"step": step} | moments


def token_ids(tokenizer: Any, texts: Sequence[str], flag: str) -> list[int]:
    """Ids of single tokens, spelt as in the tokenizer's vocabulary.

    Raises:
        RunError: one of them is no token; `flag` is named.
    """
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    unknown = [text for text, i in zip(texts, ids) if tokenizer.convert_ids_to_tokens(i) != text]
    if unknown:
        raise RunError(f"{flag}: no tokens of the student's tokenizer: {unknown}", code=2)
    return ids
