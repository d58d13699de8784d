"""Files that are whole or absent: atomic writes, lines of JSON, checkpoints with a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
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
    sync(temporary)
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
    return list(each_metrics(path))


def each_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The same one by one. Lines that were cut by a kill or a full disk are left out."""
    if (path / "metrics.jsonl").is_file():
        with (path / "metrics.jsonl").open("rb") as lines:
            yield from (row for row in map(_row, lines) if row is not None)


def rows_from_end(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The lines of a log, the last one first: (bytes up to its end, its row or None if cut).

    Only what is asked for is read: a log may be larger than the memory.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        rest, end = b"", start
        while start or rest:
            size = min(start, 1 << 20)
            start = file.seek(start - size)
            lines = (file.read(size) + rest).splitlines(keepends=True)
            rest = lines.pop(0) if start else b""  # its beginning is not read yet
            for line in reversed(lines):
                yield end, _row(line)
                end -= len(line)


def cut_log(path: Path, step: int) -> int | None:
    """Drop the rows after `step` at the end of a log, and lines that cannot be read there.

    Rows are in order of their steps, so that what stands before the first row to keep is kept.

    Returns:
        The step of the last row that is kept; None without any.
    """
    kept: tuple[int, int | None] = 0, None
    for end, row in rows_from_end(path):
        if row is not None and row["step"] <= step:
            kept = end, row["step"]
            break
    if path.is_file() and path.stat().st_size != kept[0]:
        os.truncate(path, kept[0])
        sync(path)
    return kept[1]


_STEP = re.compile(rb'\{"step": (\d{1,15})[,}]')  # how `append_row` begins a line


def missing_steps(path: Path, last: int, key: str = "") -> list[tuple[int, int]]:
    """The training steps from 1 to `last` of which a log has no row: first and last of each gap.

    Args:
        path: the log; a missing one has no rows.
        key: of the rows that count; without it all do.
    """
    mark, found, before = f'"{key}": '.encode() if key else b"", [], 0
    if path.is_file():
        with path.open("rb") as lines:
            for line in lines:
                begin = _STEP.match(line)
                if begin and mark in line and line.endswith(b"}\n"):
                    step = int(begin[1])
                    if step > before + 1:
                        found.append((before + 1, step - 1))
                    before = max(before, step)
    return [*found, (before + 1, last)] if before < last else found


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None if it is no whole row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole else None


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


def is_complete(checkpoint: Path, ours: bool) -> bool:
    """Whether it is there, good and of this run (`ours`); any other one is removed."""
    if os.path.lexists(checkpoint) and (not ours or check_manifest(checkpoint) is not None):
        drop(checkpoint)
    return checkpoint.exists()


def remove(path: Path) -> None:
    """Delete a file or a folder; of a link to a folder what is in the folder. Nothing may be left.

    Raises:
        OSError: something cannot be deleted.
    """
    if path.is_symlink() and path.is_dir():
        for each in path.iterdir():
            drop(each)
    else:
        drop(path)


def drop(path: Path) -> None:
    """Delete a file, a folder or a link, which is not followed.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def probe(folder: Path) -> None:
    """Do once what a checkpoint will need: write, sync, rename, delete.

    Raises:
        OSError: the disk refuses one of them.
    """
    first, second = folder / ".writing-probe", folder / ".writing-probed"
    for each in (first, second):
        remove(each)
    first.mkdir()
    write_atomically(first / "file", "whole")
    sync(first)
    first.rename(second)
    remove(second)


def make_empty(folder: Path) -> None:
    """A new folder, in place of what was there."""
    remove(folder)
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
    mode = (folder / "manifest.json").stat().st_mode & 0o777  # as the user's umask has it
    for path in files:  # libraries have each their own idea
        if path.stat().st_mode & 0o777 != mode:  # some disks have one mode, and refuse to set it
            path.chmod(mode)
    for path in (*every, folder / "manifest.json", folder):
        sync(path)
    folder.rename(target)
    sync(target.parent)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, `step_N`."""
    return int(path.name.removeprefix("step_"))


def _sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk. Some file systems have no such thing for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
