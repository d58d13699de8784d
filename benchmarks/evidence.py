"""Experiments that anyone can rerun: cells of one run each, resumable, with seeds and spread.

    python benchmarks/evidence.py --suite sweep --jobs 2     # learning rates of every arm, 1 seed
    python benchmarks/evidence.py --suite smoke --jobs 2     # five methods and a merge, 3 seeds
    python benchmarks/evidence.py --suite smoke --table      # print the table of what has been run

Every arm gets the same number of rollouts and the same limits: one budget of sampled tokens. The
smoke suite uses, for each arm, the learning rate that won the sweep, on a seed of its own.
A cell is a subprocess of a method file on the embedded tiny family; a finished cell is a row of
`benchmarks/results/evidence.csv` and its curve a file in `benchmarks/results/evidence/`; it is not
run again. The interval is the 95 % one of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from opd_ops import runs  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
STUDENT_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile with n - 1 degrees
SHARED = "--prompts-per-step 32 --rollouts-per-prompt 4 --lr-schedule linear --warmup-steps 3"
SHARED += " --save-every 0 --device cpu"
LENGTH = {  # a sweep is shorter: half the steps, a quarter of the test samples
    "smoke": "--steps 30 --eval-every 30 --eval-samples 8",
    "sweep": "--steps 15 --eval-every 15 --eval-samples 2",
}
RATES = ("1.5e-4", "3e-4", "6e-4", "1.2e-3")
EXPERTS = [f"--teacher {name}={runs.TINY}/expert_{name}" for name in ("add", "sub", "mul")]
FIELDS = (
    "suite,arm,seed,avg_before,avg_after,pass8_before,pass8_after,kl_before,kl_after,length,"
    "truncated,grad_norm,sampled_tokens,wall_s,commit,dirty,device,num_threads,torch,date,command"
)


@dataclass(frozen=True)
class Cell:
    """One run: a method file, its flags, a seed."""

    suite: str
    arm: str
    method: str
    flags: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.suite}-{self.arm}-{self.seed}"

    def command(self) -> list[str]:
        flags = f"{LENGTH[self.suite]} {SHARED} {self.flags} --seed {self.seed}".split()
        folder = f"runs/evidence/{self.name}"
        return [f"methods/{self.method}.py", *flags, "--run-dir", folder, "--overwrite"]


def suite(name: str, best: dict[str, str]) -> list[Cell]:
    """The cells of a suite, seeds outermost, so that a portion is balanced."""
    arms = [(method, method, "") for method in ("opd", "sg_opd", "exopd", "topk_opd", "tropd")]
    arms.append(("exopd-merge", "exopd", " ".join(EXPERTS)))
    if name == "sweep":
        return [
            Cell(name, f"{arm}@{rate}", method, f"--lr {rate} {flags}".strip(), 3)
            for rate in RATES for arm, method, flags in arms
        ]  # fmt: skip
    return [
        Cell(name, arm, method, f"--lr {best[arm]} {flags}".strip(), seed)
        for seed in range(3) for arm, method, flags in arms if arm in best
    ]  # fmt: skip


def best_rates(rows: list[dict[str, str]]) -> dict[str, str]:
    """The learning rate with the best accuracy in a complete sweep of an arm."""
    swept: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "sweep":
            arm, _, rate = row["arm"].partition("@")
            swept.setdefault(arm, {})[rate] = float(row["avg_after"])
    return {arm: max(of, key=of.__getitem__) for arm, of in swept.items() if len(of) == len(RATES)}


def run(cell: Cell) -> dict[str, object]:
    """Run one cell on one thread and return its row."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *cell.command()], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{cell.name}: {done.stderr.strip().splitlines()[-1]}")
    wall_s = time.perf_counter() - start
    folder = ROOT / "runs/evidence" / cell.name
    rows = runs.read_metrics(folder)
    most = 2 if cell.suite == "sweep" else 8
    before, *_, after = [row for row in rows if f"eval/student/avg@{most}" in row]
    steps = [row for row in rows if "loss" in row]
    seen = json.loads((folder / "args.json").read_text())["environment"]
    curve = RESULTS / f"evidence/{cell.name}.jsonl"
    curve.parent.mkdir(parents=True, exist_ok=True)
    keys = (
        "step",
        "log_ratio_mean",
        "reverse_kl",
        "verifier_pass_rate",
        "grad_norm",
        "length_mean",
    )
    curve.write_text("".join(json.dumps({k: r[k] for k in keys if k in r}) + "\n" for r in steps))
    row: dict[str, object] = {"suite": cell.suite, "arm": cell.arm, "seed": cell.seed}
    for key, name in (("avg", f"avg@{most}"), ("pass8", "pass@8"), ("kl", "reverse_kl")):
        if name == "pass@8" and most < 8:
            continue
        row[f"{key}_before"] = round(before[f"eval/student/{name}"], 5)
        row[f"{key}_after"] = round(after[f"eval/student/{name}"], 5)
    return row | {
        "length": round(after["eval/student/length_mean"], 2),
        "truncated": round(after["eval/student/truncated_share"], 5),
        "grad_norm": round(statistics.median(float(r["grad_norm"]) for r in steps), 4),
        "sampled_tokens": int(sum(r["num_rollouts"] * r["length_mean"] for r in steps)),
        "wall_s": round(wall_s, 1),
        "commit": seen["commit"][:10],
        "dirty": seen["dirty"],
        "device": seen["device"],
        "num_threads": seen["num_threads"],
        "torch": seen["torch"],
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(cell.command()).replace(str(ROOT) + "/", ""),
    }


def finished(path: Path) -> list[dict[str, str]]:
    """Rows that have been run."""
    return list(csv.DictReader(path.open())) if path.is_file() else []


def spread(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 20 else 3
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: arms, seeds, means with intervals; the gain over opd is paired by seed."""
    titles = {
        "avg_after": "accuracy", "pass8_after": "pass@8", "kl_after": "reverse KL to its teacher",
        "length": "length", "grad_norm": "gradient norm", "wall_s": "seconds",
    }  # fmt: skip
    titles = {key: title for key, title in titles.items() if rows[0][key]}
    base = {row["seed"]: float(row["avg_after"]) for row in rows if row["arm"] == "opd"}
    lines = ["| arm | seeds | " + " | ".join(titles.values()) + " | accuracy minus opd's |"]
    lines.append("|---" * (len(titles) + 3) + "|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [spread([float(row[key]) for row in mine]) for key in titles]
        gains = [float(row["avg_after"]) - base[row["seed"]] for row in mine if row["seed"] in base]
        cells.append(spread(gains) if gains and arm != "opd" else "-")
        lines.append(f"| {arm} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: arms against learning rates, accuracy, the best one in bold."""
    found = {tuple(row["arm"].split("@")): float(row["avg_after"]) for row in rows}
    lines = ["| arm | " + " | ".join(RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in found):
        scores = [found.get((arm, rate)) for rate in RATES]
        best = max(score for score in scores if score is not None)
        shown = ["-" if s is None else f"**{s:.3f}**" if s == best else f"{s:.3f}" for s in scores]
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="smoke", choices=list(LENGTH))
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument("--most", type=int, default=10**6, help="run at most so many cells")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.csv")
    args = parser.parse_args()
    rows = finished(args.out)
    have = {(row["suite"], row["arm"], int(row["seed"])) for row in rows}
    best = best_rates(rows)
    if args.suite == "smoke" and len(best) < len(suite("sweep", {})) / len(RATES):
        parser.error(f"--suite smoke needs the whole sweep, found {best}: run --suite sweep first")
    todo = [
        cell for cell in suite(args.suite, best) if (cell.suite, cell.arm, cell.seed) not in have
    ][: args.most]
    if not args.table and todo:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not args.out.is_file()
        with (
            args.out.open("a", newline="") as file,
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
        ):
            writer = csv.DictWriter(file, FIELDS.split(","), lineterminator="\n")
            if fresh:
                writer.writeheader()
            jobs = [pool.submit(run, cell) for cell in todo]
            for job in tqdm(concurrent.futures.as_completed(jobs), total=len(jobs), unit="cell"):
                writer.writerow(job.result())
                file.flush()
    rows = [row for row in finished(args.out) if row["suite"] == args.suite]
    if rows:
        before = statistics.mean(float(row["avg_before"]) for row in rows)
        print(f"student before, mean over the cells: accuracy {before:.3f}\n")
        print(sweep_table(rows) if args.suite == "sweep" else table(rows))


if __name__ == "__main__":
    main()
