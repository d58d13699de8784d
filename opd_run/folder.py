"""A run folder before a run: whether it may be used, what is in it, and what went into a run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_run import files
from opd_run.console import RunError

LOGS = (
    *("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "evaluations.jsonl", "offending.jsonl"),
)


def check_folder(args: argparse.Namespace) -> None:
    """Refuse a run folder that is in use, or whose removal would take more than a run.

    Raises:
        RunError: the folder has a run and neither `--resume` nor `--overwrite` was given; it is no
            folder; `--overwrite` would delete an input of this run, or what is no run.
    """
    path = Path(args.run_dir)
    if not args.run_dir.strip():
        raise RunError("--run-dir: expected a folder, got an empty name", 2)
    in_the_way = next((each for each in (path, *path.parents) if each.exists()), path)
    if not in_the_way.is_dir():
        raise RunError(f"--run-dir {path}: expected a folder, {in_the_way} is a file", 2)
    if not os.access(in_the_way, os.W_OK):
        raise RunError(f"--run-dir {path}: {in_the_way} is not writable", 2)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the writers of weights take no other
        raise RunError(f"--run-dir {path}: its name is not UTF-8 in this locale", 2) from None
    used = (path / "metrics.jsonl").exists() or any(path.glob("checkpoints/step_*"))
    found = [name for name in (*LOGS, "args.json", "checkpoints") if (path / name).exists()]
    if found and not args.resume and not is_run(path):
        raise RunError(
            f"--run-dir {path}: it is not a run folder (no args.json of a run), and has its own "
            f"{', '.join(found)}",
            2,
        )
    if used and not (args.resume or args.overwrite):
        raise RunError(f"run folder {path} exists: give --resume or --overwrite", 2)
    for name, value in vars(args).items() if found and args.overwrite else ():
        for each in value if isinstance(value, list) else [value]:
            inside = isinstance(each, str) and name != "run_dir" and Path(each.split("=")[-1])
            if inside and inside.exists() and path.resolve() in inside.resolve().parents:
                raise RunError(
                    f"--overwrite would delete --{name.replace('_', '-')} {each}, which is in it",
                    2,
                )


def is_run(path: Path) -> bool:
    """Whether the folder has the `args.json` of a run."""
    try:
        record = json.loads((path / "args.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"args", "environment"} <= record.keys()


def remove_run(path: Path, script: str) -> None:
    """Delete what a run writes, and nothing else that is in its folder; its `args.json`, which
    tells that it is one, stays until it is replaced.

    Raises:
        OSError: something cannot be deleted. Nothing has been trained yet.
    """
    if is_run(path):
        own = [path / name for name in ("checkpoints", "tensorboard", *LOGS, script)]
        for each in (*own, *path.glob("before_step_*")):
            files.remove(each)


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def hashes_of_files(args: argparse.Namespace) -> dict[str, str]:
    """Of the files that flags name, FILE or FILE.py:NAME, but for models and prompts."""
    found = {}
    for name in ("verifier", "teacher_prompt", "reference_prompt", "teacher_rollouts"):
        text = str(getattr(args, name, None) or "")
        path = text.rpartition(":")[0] if ".py:" in text else text
        if os.path.isfile(path):
            hashed = hash_of(Path(path).read_bytes())
            found[f"file of --{name.replace('_', '-')}"] = f"{Path(path).name} {hashed}"
    return found


def hash_of_prompts(prompts: Sequence[Any]) -> str:
    """Of the ids (which have the template in them, and the date that it may write), answers, and
    rows, which the verifier reads."""
    digest = hashlib.sha256()
    for prompt in prompts:
        what = [prompt.ids, prompt.answer, prompt.domain, *([prompt.views] if prompt.views else [])]
        digest.update(json.dumps([*what, prompt.row], default=lambda x: str(type(x))).encode())
    return f"{len(prompts)} {digest.hexdigest()[:16]}"
