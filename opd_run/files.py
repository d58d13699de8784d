"""Files that are whole or absent: atomic writes, lines of JSON, checkpoints with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from opd_run.console import one_line, printable, rank

_INSTALLED, _CHECKOUT = (
    Path(__file__).resolve().parent / "tiny",
    Path(__file__).resolve().parents[1] / "assets" / "tiny",
)
TINY = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""The embedded pair of models that a method file runs when it is called without arguments."""


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line of JSON; of several processes rank 0 does."""
    if rank():
        return
    # Readable in any script, but nothing that a model wrote reaches a terminal as a control code.
    line = printable(json.dumps(row, ensure_ascii=False))
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


def check_manifest(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        parts = {name.split("/")[0] for name in manifest}
        if not all(isinstance(entry, dict) for entry in manifest.values()) or len(parts) < 2:
            raise ValueError("not the list of a model's and a trainer's files")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"manifest.json: {one_line(error, 80)}"
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return f"{name}: missing or cut short"
        if _sha(path) != entry.get("sha256"):
            return f"{name}: checksum differs"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether it is there and good; a damaged one is removed."""
    if checkpoint.exists() and check_manifest(checkpoint) is not None:
        shutil.rmtree(checkpoint)
    return checkpoint.exists()


def make_empty(folder: Path) -> None:
    """A new folder, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def seal(folder: Path, target: Path) -> None:
    """Hash the files of `folder` into its manifest, bring all to the disk, then rename it."""
    every = sorted(folder.rglob("*"))
    files = [path for path in every if path.is_file()]
    manifest = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha(path)}
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*every, folder / "manifest.json", folder):
        _sync(path)
    folder.rename(target)
    _sync(target.parent)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, `step_N`."""
    return int(path.name.removeprefix("step_"))


def _sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
