"""The one writer and reader of the benchmarks' result rows, and of the tables made of them.

Rows are lines of CSV that are appended and never rewritten. A file whose rows have got new columns
gets them at the end of its first line; older rows read as "" there.
"""

from __future__ import annotations

import csv
import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
NOT_MEASURED = "not measured"
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # environment: what is freed goes back at once


# ==== writing =====================================================================================


def environment(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """What every row says of the machine, the code and the command.

    Args:
        device: "cpu" or "cuda".  commit: where there is no `.git`, the output of
            `git describe --always --dirty --abbrev=40`; else git is asked.

    Raises:
        RuntimeError: there is neither `commit` nor a repository.
    """
    import torch

    from opd_run.machine import environment as of_a_run  # it alone knows what dirty means

    seen = of_a_run()
    if commit:
        seen |= {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
    elif seen["commit"] == "unknown":
        raise RuntimeError("no git repository here: say which commit this is with --commit")
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "driver": driver() if cuda else "",
        "num_threads": seen["num_threads"],
        "load": f"{os.getloadavg()[0]:.1f}",
        "isa": seen["opd_ops"]["isa"],
        "torch": seen["torch"],
        "cuda": torch.version.cuda or "",
        "transformers": seen["transformers"],
        "trl": version("trl"),
        "commit": seen["commit"][:10],
        "dirty": seen["dirty"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def commit_of(tree: Path) -> str:
    """Of a checkout, for `environment`; "-dirty" behind it where files differ."""
    from opd_run.machine import commit_of as of_a_tree

    commit, dirty = of_a_tree(tree)
    if commit == "unknown":
        raise RuntimeError(f"{tree}: no git repository, so no commit")
    return commit + "-dirty" * dirty


def processor() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def failure(error: BaseException) -> str:
    """For the column `failed`: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def restart_peak() -> None:
    """The peak of this process' resident memory starts anew, on Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """`VmRSS`, `VmHWM` (the peak) or another line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def result_of(command: Sequence[Any], **environment: str) -> str:
    """What a child process prints behind "RESULT ", where freed memory goes back at once.

    Raises:
        SystemExit: it has ended without; with the end of what it said.
    """
    environ = os.environ | RETURN | environment
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return line.removeprefix("RESULT ")
    raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")


def driver() -> str:
    """The version of the NVIDIA driver."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "unknown"


def version(package: str) -> str:
    """Of an installed package; "" where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def append(path: Path, rows: Iterable[Mapping[str, Any]], columns: str | Sequence[str]) -> None:
    """Add rows; a row's keys that are no columns are left out, columns that it lacks are empty.

    Args:
        columns: names, or one string of names with commas between them. They say what a new file
            has, and what an old one gets at the end of its first line.
    """
    wanted = columns.split(",") if isinstance(columns, str) else list(columns)
    end = "\n"
    if path.is_file() and path.stat().st_size:
        with path.open(newline="") as file:
            first, rest = file.readline(), file.read()
        end = "\r\n" if first.endswith("\r\n") else "\n"
        have = next(csv.reader([first]))
        new = [name for name in wanted if name not in have]
        if new:
            part = path.with_name(path.name + ".part")
            with part.open("w", newline="") as file:
                file.write(",".join([*have, *new]) + end + rest)
            part.replace(path)
        wanted = [*have, *new]
        fresh = False
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, wanted, extrasaction="ignore", lineterminator=end)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


# ==== reading =====================================================================================

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))


def newest(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[str, ...], Row]:
    """The last row of each case, by the values of `keys`, in the order of the first of them."""
    return {tuple(row[key] for key in keys): row for row in rows}


# ==== tables ======================================================================================


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a line of titles and further lines, all of one length."""
    rule = "|---" * len(titles) + "|"
    shown = [f"| {' | '.join(cells)} |" for cells in (titles, *lines)]
    return "\n".join([shown[0], rule, *shown[1:]])


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The t that |T| stays below with this probability, for a whole number of degrees of freedom.

    The distribution is a finite sum of sines and cosines (Abramowitz and Stegun, 26.7.3 and
    26.7.4); its inverse is bisected.
    """

    def below(angle: float) -> float:
        """The probability of |T| < sqrt(freedom) tan(angle)."""
        cosine, even = math.cos(angle), freedom % 2 == 0
        term, total = (1.0 if even else cosine), 0.0
        for n in range(0 if even else 1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (n + 1) / (n + 2)
        total *= math.sin(angle)
        return total if even else (angle + total) * 2 / math.pi

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean by Student's t, of two values or more."""
    return student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 20 else 3
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {half_width(values):.{digits}f}"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which about this share of the others lies; one of them, not between two."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
