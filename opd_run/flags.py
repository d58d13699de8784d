"""The command line: flags with bounds, one message for all that is wrong, and the flags that cannot
change a number."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_run import ranks, served_teacher, views, vllm_sampler
from opd_run.console import RunError, one_line, say

OF_THE_MACHINE = {
    "device": "auto", "teacher_device": "same", "dtype": "auto", "teacher_dtype": "auto",
    "check_models": None,
}  # fmt: skip
"""Flags that may be left to the machine, and their value then."""
OF_THE_COMMAND = ("resume", "overwrite", "run_dir", "dry_run", "debug")
"""Flags of one command, which `--resume RUN` does not take from the one before."""
PATHS = ("student", "teacher", "reference", "prompts", "test_prompts", "teacher_rollouts")
"""Flags whose value may name a file or a folder."""
TEXTS = ("verifier", "prompt_template", "teacher_prompt", "reference_prompt")
"""Flags whose value may be FILE.py:FUNCTION or @FILE, and is no path otherwise."""


class Flags(argparse.Namespace):
    """Parsed flags. `resolved`: those that this machine has decided; no flag, not in `vars`."""

    __slots__ = ("resolved",)
    resolved: list[str]


def flag(group: Any, name: str, default: Any, text: str, bounds: str = "", **kwargs: Any) -> None:
    """Add one flag. Its type is that of `default`; `bounds` is an interval such as (0,1]."""
    if isinstance(default, bool):
        kwargs["action"] = argparse.BooleanOptionalAction
    elif default is not None:
        kwargs.setdefault("type", type(default))
    shown = "; ".join(filter(None, ["" if default is None else f"default {default}", bounds]))
    text = f"{text} [{shown}]" if shown else text
    group.add_argument(
        name, default=default, help=text.replace("%", "%%"), **kwargs
    ).bounds = bounds


def new_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the flags that cannot change a number, but for rounding: where results go, and
    on what it runs.

    Args:
        description: the docstring of the method file.
        name: of the method; the run folder is `runs/NAME/default`.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(flag, parser.add_argument_group("run"))
    add("--run-dir", f"runs/{name}/default", "folder for logs and checkpoints")
    add("--resume", None, "go on from the newest complete checkpoint in --run-dir; with RUN, a run "
        "folder or a checkpoint in one, from there and with the flags of its args.json; flags "
        "given beside it win", metavar="RUN", nargs="?", const=True)  # fmt: skip
    add("--overwrite", False, "delete the run that is in --run-dir and start anew")
    add("--save-every", 50, "save a checkpoint every so many steps; 0: only at the end", "[0,inf)")
    add("--keep-checkpoints", 2, "keep this many of the newest checkpoints; 0: all", "[0,inf)")
    kinds = ["source", "float32"]
    add("--export-dtype", "source", "type of the weights in model/ of a checkpoint; trainer/ keeps "
        "float32", choices=kinds)  # fmt: skip
    services = ["none", "tensorboard", "wandb", "trackio"]
    add("--report-to", "none", "send metrics to this live view too", choices=services)
    add("--eval-every", 50, "evaluate every so many steps, and at both ends; 0: never", "[0,inf)")
    add("--eval-teacher", False, "evaluate the teacher too, once, and say the gap to the student")
    add("--domain-field", "domain", "field that names a prompt's group; evaluation shows each")
    add("--diagnostic-tokens", 512, "measure exact KLs on so many tokens a step; 0: off", "[0,inf)")
    add("--max-bad-steps", 0, "skip so many steps with a NaN or infinity, then stop", "[0,inf)")
    add("--stop-on-alarm", False, "save and stop at the first alarm (docs/metrics.md lists them)")
    add("--eval-only", False, "evaluate the student on the test prompts; train and save nothing")
    add("--dry-run", False, "print flags, model checks and a memory estimate, then exit")
    text = (
        "compare sampler, padded batches and train mode with plain forward passes before training"
    )
    kind = argparse.BooleanOptionalAction
    add("--check-models", None, f"{text} [on; with --dry-run: off]", action=kind)
    add("--debug", False, "show the traceback of an error")
    add = partial(flag, parser.add_argument_group("devices and memory"))
    add("--device", "auto", "cpu, cuda or cuda:1; auto: cuda if this machine has one")
    add("--teacher-device", "same", "device of the frozen models; same: that of --device")
    add("--teacher-offload", False, "keep frozen models in CPU memory while they are not used")
    add("--gradient-checkpointing", False, "recompute activations in backward to save memory")
    add("--micro-batch-tokens", 16384, "most tokens in one forward pass; lower to fit", "[1,inf)")
    add("--sampler-batch-size", 256, "most rollouts generated at a time; lower to fit", "[1,inf)")
    add("--sampler-memory", 0.3, "share of the GPU's memory that vLLM may use", "(0,1)")
    add("--shard", "none", "split the student among processes", choices=["none", "fsdp"])
    add("--shard-frozen", False, "with --shard fsdp: split the frozen models too")
    add("--rank-timeout-s", 1800.0, "stop when another process is silent so long", "(0,1e6]")
    add("--verifier-workers", 0, "processes that judge answers; 0: min(4, CPU cores)", "[0,inf)")
    add("--teacher-timeout-s", 600.0, "stop when --teacher-url is silent so long", "(0,1e6]")
    add("--trust-remote-code", False, "run Python code that comes with a model; read it first")
    return parser


ELSEWHERE = {  # what flags of ours are called in other programs
    "--learning-rate": "--lr", "--max-new-tokens": "--max-completion-tokens",
    "--max-completion-length": "--max-completion-tokens", "--batch-size": "--prompts-per-step",
    "--num-generations": "--rollouts-per-prompt", "--dataset": "--prompts", "--data": "--prompts",
    "--model": "--student", "--system-prompt": "--system", "--max-steps": "--steps",
    "--num-epochs": "--steps", "--output-dir": "--run-dir", "--lora-r": "--lora-rank",
}  # fmt: skip


def _meant(unknown: str, names: list[str]) -> str | None:
    """The flag that is meant by an unknown one: the same with _, longer, near, or ELSEWHERE's."""
    word = unknown.lower().replace("_", "-")
    begun = [name for name in names if name.startswith(word)]
    near = difflib.get_close_matches(word, [*names, *ELSEWHERE], 1)
    found = ELSEWHERE.get(word) or next(iter(begun), None) or next(iter(near), None)
    return ELSEWHERE.get(found, found) if found else None


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    check: Callable[[argparse.Namespace], list[str]],
) -> argparse.Namespace:
    """Parse flags and resolve what is `auto`; nothing is written to the result afterwards.

    `resume` is None, True, or, with `--resume RUN/checkpoints/step_N`, `step_N`; `run_dir` is RUN.

    Raises:
        RunError: exit code 2; everything that is wrong with bounds, JSON, combinations and
            `check(args)`, in one message; or `--resume RUN` has no run to take flags from.
    """

    def refuse_usage(message: str) -> None:
        names = [name for action in parser._actions for name in action.option_strings]
        for unknown in re.findall(r"--[\w-]+", message if "unrecognized" in message else ""):
            if near := _meant(unknown, names):
                message += f" (did you mean {near}?)"
        raise RunError(f"{message} (--help lists all flags)", code=2)

    parser.error, parser.allow_abbrev = refuse_usage, False  # type: ignore[assignment,method-assign]
    given, resume = _given(parser, argv), None
    if isinstance(given.get("resume"), str):
        run, resume = _run_of(given)
        argv = [*_recorded(parser, run, given), *(sys.argv[1:] if argv is None else argv)]
        argv = [*argv, f"--run-dir={run}"]
    args = parser.parse_args(argv, Flags())
    args.resume = resume or args.resume
    args.run_dir = os.path.expanduser(args.run_dir)  # no shell does behind the = of --run-dir=~/x
    errors = []
    for action in parser._actions:
        bounds, value = getattr(action, "bounds", ""), getattr(args, action.dest, None)
        if bounds and value is not None and not _inside(value, bounds):
            errors.append(f"{action.option_strings[0]} must be in {bounds}, got {value}")
    for name in ("chat_template_args", "teacher_template_args"):
        try:
            setattr(args, name, json.loads(getattr(args, name)))
            if not isinstance(getattr(args, name), dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as error:
            errors.append(f"--{name.replace('_', '-')} must be a JSON object: {error}")
    if args.resume and args.overwrite:
        errors.append("--resume and --overwrite exclude each other")
    if args.eval_only and (args.resume or not args.eval_every):
        errors.append("--eval-only: leave --resume and --eval-every 0 out; --student takes the "
                      "model/ of a checkpoint")  # fmt: skip
    if args.eval_teacher and not args.eval_every:
        errors.append("--eval-teacher: leave --eval-every 0 out")
    for check_some in (ranks.check, served_teacher.check, vllm_sampler.check, views.check, check):
        errors += check_some(args)
    refuse(errors)
    _resolve(args)
    return args


def without_teacher(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of a method that has no teacher (`set_defaults(teacher=[])`)."""
    named = {
        "--teacher": args.teacher,
        "--teacher-url": args.teacher_url,
        "--teacher-prompt": args.teacher_prompt is not None,
        "--teacher-system": args.teacher_system is not None,
        "--teacher-template-args": args.teacher_template_args,
        "--eval-teacher": args.eval_teacher,
        "--teacher-offload": args.teacher_offload,
        "--chat-template-from teacher": args.chat_template_from == "teacher",
    }
    return [f"{flag}: this method has no teacher" for flag, given in named.items() if given]


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """What the command line itself says, without defaults."""
    defaults = {action: action.default for action in parser._actions}
    for action in defaults:
        action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_args(argv))
    finally:
        for action, default in defaults.items():
            action.default = default


def _run_of(given: dict[str, Any]) -> tuple[Path, str | bool]:
    """The run folder that `--resume RUN` speaks of, and the checkpoint in it (True: the newest).

    Raises:
        RunError: exit code 2; `--run-dir` says another folder.
    """
    path = Path(os.path.abspath(given["resume"]))
    resume: str | bool = True
    if path.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", path.name):
        path, resume = path.parents[1], path.name
    if "run_dir" in given and os.path.realpath(given["run_dir"]) != os.path.realpath(path):
        raise RunError(
            f"--resume {given['resume']} goes on in its own folder: leave --run-dir out", 2
        )
    folder = Path(os.path.relpath(path))
    return (path if folder.parts[:1] == ("..",) else folder), resume


def _recorded(parser: argparse.ArgumentParser, run: Path, given: dict[str, Any]) -> list[str]:
    """The command line that `args.json` of a run stands for, without the flags that are `given`
    now, those of one command, and those that the machine had decided.

    Paths that were relative to the run's working directory are made absolute in another one.

    Raises:
        RunError: exit code 2; there is no `args.json` of a run.
    """
    try:
        record = json.loads((run / "args.json").read_bytes())
        flags, folder = dict(record["args"]), Path(record.get("cwd", Path.cwd()))
        left_out = {*record.get("resolved", OF_THE_MACHINE), *OF_THE_COMMAND, *given}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"--resume {given['resume']}: expected a run folder or a checkpoint in one, RUN or "
            f"RUN/checkpoints/step_N: {run / 'args.json'}: {type(error).__name__}: "
            f"{one_line(error, 160)}",
            2,
        ) from error
    actions, argv, unknown = {action.dest: action for action in parser._actions}, [], []
    for name, value in flags.items():
        action = actions.get(name)
        if name in left_out or value is None:
            continue
        if action is None:
            unknown.append(f"--{name.replace('_', '-')}")
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(action, argparse.BooleanOptionalAction):
                argv.append(action.option_strings[0 if each else 1])
            else:
                text = json.dumps(each) if isinstance(each, dict) else str(each)
                text = _placed(name, text, folder) if name in PATHS + TEXTS else text
                argv.append(f"{action.option_strings[0]}={text}")
    say(f"resume: flags of {run / 'args.json'}, which were given in {folder}")
    if unknown:
        say(f"! resume: {parser.prog} has no {', '.join(unknown)}: left out")
    return argv


def _placed(name: str, text: str, folder: Path) -> str:
    """A flag's value: PATH, NAME=PATH, @PATH, FOLDER:SPLIT or FILE.py:FUNCTION; with an absolute
    path, if it is there relative to `folder` and that is not the working directory."""
    if name == "teacher" and views.is_student(text):
        return text
    kind = re.match(r"(@|[^/.:=\[\]]+=)?", text)
    head = kind[0] if kind else ""
    is_text = name in TEXTS and head != "@"
    pattern = r"(.+\.py)(:\w+)" if is_text else r"([^:]+)(:.+)?"
    found = re.fullmatch(pattern, text.removeprefix(head), re.S)
    here = folder == Path.cwd() or text.startswith("reasoning_gym:")
    if here or not found or not os.path.exists(folder / found[1]):
        return text
    return f"{head}{folder / found[1]}{found[2] or ''}"


def refuse(errors: Sequence[str]) -> None:
    """Nothing, if there are no errors.

    Raises:
        RunError: exit code 2; all of them in one message.
    """
    if errors:
        raise RunError("; ".join(errors), code=2)


def _resolve(args: Flags) -> None:
    """`auto` and `same` as what they mean on this machine, and in this process of several."""
    cuda = torch.cuda.is_available()
    args.resolved = [name for name, left in OF_THE_MACHINE.items() if getattr(args, name) == left]
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if cuda and args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        args.resolved.append("device")
    if args.check_models is None:
        args.check_models = not args.dry_run
    if args.teacher_device == "same":
        args.teacher_device = args.device
    for name, device in (("dtype", args.device), ("teacher_dtype", args.teacher_device)):
        if getattr(args, name) == "auto":
            setattr(args, name, "bfloat16" if device.startswith("cuda") else "float32")


def _inside(value: float, interval: str) -> bool:
    low, high = interval[1:-1].split(",")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    below = value <= float(high) if interval[-1] == "]" else value < float(high)
    return above and below  # NaN fails both comparisons
