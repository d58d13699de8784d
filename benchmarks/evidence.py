"""Experiments that anyone can rerun: cells of one run each, resumable, with seeds and spread.

    python benchmarks/evidence.py --suite sweep --jobs 2     # learning rates, 1 seed
    python benchmarks/evidence.py --suite smoke --jobs 2     # five methods and a merge, 3 seeds
    python benchmarks/evidence.py --suite full --jobs 2      # all claims, 5 seeds: hours
    python benchmarks/evidence.py --claim 4 --jobs 2         # the arms of one claim, 5 seeds
    python benchmarks/evidence.py --claim 4 --table          # print what has been run of it
    python benchmarks/evidence.py --claim 1 --again          # a second run of it, beside the first
    python benchmarks/evidence.py --figure docs/images/evidence.png

Arms and claims stand in `claims.py`. Every arm gets the same number of rollouts and the same
limits: one budget of sampled tokens, which each cell prints. An arm uses the learning rate that won
the sweep of its method, on a seed of its own. A cell is a subprocess on one thread, at most three
minutes on a quiet core; a finished cell is a row of `benchmarks/results/evidence.csv` and its curve
a file in `benchmarks/results/evidence/`; it is not run again. Suites share cells. The interval is
the 95 % one of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims import ARMS, CLAIMS, FOLDER, SMOKE, START, SWEPT, Comparison  # noqa: E402
from rows import RESULTS, append, half_width, markdown, read, spread  # noqa: E402

from opd_run.files import TINY, read_metrics  # noqa: E402

RATES = ("1.5e-4", "3e-4", "6e-4", "1.2e-3")
STEPS, SWEEP_STEPS, SWEEP_SEED = 30, 15, 3
NOISE = 0.4  # of the noisy student, in standard deviations of each matrix
FIELDS = (
    "suite,arm,seed,avg_before,avg_after,pass8_before,pass8_after,kl_before,kl_after,length,"
    "truncated,grad_norm,sampled_tokens,wall_s,commit,dirty,device,num_threads,torch,date,command,"
    "cpu_s,train_s"
)
CURVE = (
    *("step", "log_ratio_mean", "log_ratio_p1", "log_ratio_p99", "log_ratio_decile_0"),
    *("log_ratio_decile_9", "eos_log_ratio_mean", "advantage_negative_share", "reverse_kl"),
    *("student_entropy", "teacher_mass", "verifier_pass_rate", "grad_norm", "length_mean"),
    *("truncated_share", "gate_mean", "accepted_mean"),
)


@dataclass(frozen=True)
class Cell:
    """One run: an arm and a seed; in the suite "sweep" also a learning rate. "again": once more."""

    arm: str
    seed: int
    rate: str
    suite: str = "run"

    @property
    def key(self) -> tuple[str, str, int]:
        """What names its row: suite, arm, seed."""
        swept = f"@{self.rate}" if self.suite == "sweep" else ""
        return self.suite, self.arm + swept, self.seed

    @property
    def name(self) -> str:
        """The name of its folder and of its curve."""
        return "-".join(map(str, self.key))

    def command(self) -> list[str]:
        """The script and its flags, with paths relative to the project."""
        arm, swept = ARMS[self.arm], self.suite == "sweep"
        steps = SWEEP_STEPS if swept else STEPS
        flags = f"--steps {steps} --eval-samples {2 if swept else 8} --lr {self.rate} "
        flags += f"--eval-every {steps} --prompts-per-step 32 --rollouts-per-prompt 4 "
        flags += "--lr-schedule linear --warmup-steps 3 --save-every 0 --device cpu "
        flags += f"--run-dir {FOLDER}/{self.name} --overwrite "
        flags += f"--seed {self.seed} {arm.flags}"
        return [arm.script, *flags.replace(f"{ROOT}/", "").split()]


def sweep() -> list[Cell]:
    """The cells of the sweep."""
    return [Cell(arm, SWEEP_SEED, rate, "sweep") for rate in RATES for arm in SWEPT]


def cells(arms: list[str], num_seeds: int, best: dict[str, str], suite: str) -> list[Cell]:
    """The cells of some arms, seeds outermost, so that a portion is balanced."""
    seeds = range(num_seeds)
    return [Cell(arm, seed, best[ARMS[arm].rate], suite) for seed in seeds for arm in arms]


def best_rates(rows: list[dict[str, str]]) -> dict[str, str]:
    """The learning rate with the best accuracy in a complete sweep of an arm."""
    swept: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "sweep":
            arm, _, rate = row["arm"].partition("@")
            swept.setdefault(arm, {})[rate] = float(row["avg_after"])
    return {arm: max(of, key=of.__getitem__) for arm, of in swept.items() if len(of) == len(RATES)}


def make_models() -> None:
    """The two models of the claims that assets/tiny does not have, if they are not there yet."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / FOLDER / "models"
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")

    def save(model: Any, name: str) -> None:
        for each in (model, tokenizer):
            each.save_pretrained(folder / f"{name}.part")
        (folder / f"{name}.part").rename(folder / name)  # whole or not at all

    if not (folder / "other_end").is_dir():  # it reads <|end|> as ever and says <|unk|> instead
        model = AutoModelForCausalLM.from_pretrained(TINY / "teacher")
        end, other = tokenizer.convert_tokens_to_ids(["<|end|>", "<|unk|>"])
        rows = model.get_input_embeddings().weight.detach().clone()
        rows[[end, other]] = rows[[other, end]]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(rows)
        save(model, "other_end")
    if not (folder / "noisy").is_dir():  # right 11 % of the time instead of 43 %
        model = AutoModelForCausalLM.from_pretrained(TINY / "student", dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data += NOISE * weight.data.std() * noise
        save(model, "noisy")


def execute(command: list[str], num_threads: int = 1) -> tuple[float, float]:
    """Run a script: (wall-clock seconds, CPU seconds)."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=error,
            env=os.environ | {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        error.seek(0)
        if process.returncode:
            last = error.read().strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {last}")
        return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def run(cell: Cell, curves: Path) -> dict[str, object]:
    """Run one cell and return its row; its curve goes into the folder `curves`."""
    wall_s, cpu_s = execute(cell.command())
    suite, arm, seed = cell.key
    row, seconds = read_run(cell, curves)
    return {"suite": suite, "arm": arm, "seed": seed} | row | {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "train_s": round(seconds * cpu_s / wall_s, 1),  # of a quiet core: less what others took
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(cell.command()),
    }  # fmt: skip


def read_run(cell: Cell, curves: Path) -> tuple[dict[str, object], float]:
    """(columns, seconds of training) of a run; its curve is kept."""
    folder = ROOT / FOLDER / cell.name
    rows = read_metrics(folder)
    most = 2 if cell.suite == "sweep" else 8
    before, *_, after = [row for row in rows if f"eval/student/avg@{most}" in row]
    steps = [row for row in rows if "loss" in row]
    seen = json.loads((folder / "args.json").read_text())["environment"]
    write_curve(
        curves / f"{cell.name}.jsonl",
        [{k: r[k] for k in r if k in CURVE or k.startswith("alarm/")} for r in steps],
    )
    row: dict[str, object] = {}
    for key, name in (("avg", f"avg@{most}"), ("pass8", "pass@8"), ("kl", "reverse_kl")):
        if f"eval/student/{name}" in after:
            row[f"{key}_before"] = round(before[f"eval/student/{name}"], 5)
            row[f"{key}_after"] = round(after[f"eval/student/{name}"], 5)
    phases = sum(
        float(r[f"{phase}_s"]) for r in steps for phase in ("generate", "teacher", "student")
    )
    return row | {
        "length": round(after["eval/student/length_mean"], 2),
        "truncated": round(after["eval/student/truncated_share"], 5),
        "grad_norm": round(statistics.median(float(r["grad_norm"]) for r in steps), 4),
        "sampled_tokens": int(sum(r["num_rollouts"] * r["length_mean"] for r in steps)),
        "commit": seen["commit"][:10],
        "dirty": seen["dirty"],
        "device": seen["device"],
        "num_threads": seen["num_threads"],
        "torch": seen["torch"],
    }, phases


def write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """The curve of a cell, as JSON lines with four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in short))


# ==== Tables ======================================================================================


def of_arm(rows: list[dict[str, str]], arm: str, column: str) -> dict[str, float]:
    """Seed to value; `gain_per_min` is accuracy gained in a minute of training on a quiet core."""
    mine = {row["seed"]: row for row in rows if row["suite"] == "run" and row["arm"] == arm}
    if column != "gain_per_min":
        return {seed: float(row[column]) for seed, row in mine.items() if row[column]}
    starts = of_arm(rows, "opd", "avg_before").values()  # the same student in all
    if not starts:
        return {}
    start = statistics.mean(starts)
    return {
        seed: 60 * (float(row["avg_after"]) - start) / float(row["train_s"])
        for seed, row in mine.items() if row["train_s"]
    }  # fmt: skip


def table(rows: list[dict[str, str]], arms: list[str], gains: bool = True) -> str:
    """A Markdown table: arms, seeds, means with intervals; the gain over opd is paired by seed."""
    titles = {
        "avg_after": "accuracy", "pass8_after": "pass@8", "kl_after": "reverse KL to its teacher",
        "length": "length", "truncated": "cut", "grad_norm": "gradient norm",
        "train_s": "training, s",
    }  # fmt: skip
    if gains:
        titles["gain"] = "accuracy minus opd's"
    lines = []
    base = of_arm(rows, "opd", "avg_after")
    for arm in arms:
        mine = of_arm(rows, arm, "avg_after")
        paired = [mine[seed] - base[seed] for seed in mine if seed in base and arm != "opd"]
        found = []
        for key in titles:
            values = paired if key == "gain" else list(of_arm(rows, arm, key).values())
            missing = f", {len(values)} seeds" if 0 < len(values) < len(mine) else ""
            found.append(spread(values) + missing)
        lines.append([arm, f"{len(mine)}", *found])
    return markdown(["arm", "seeds", *titles.values()], lines)


VERDICTS = ("reproduced", "not decidable", "not reproduced")


@dataclass(frozen=True)
class Finding:
    """What came of a comparison: both arms and their difference, over the seeds of both."""

    own: list[float]
    other: list[float]

    @property
    def gains(self) -> list[float]:
        """The difference of each seed."""
        return [one - two for one, two in zip(self.own, self.other)]

    def verdict(self, comparison: Comparison) -> str:
        """Whether the interval of the difference lies on the claim's side of 0."""
        if len(self.own) < 2:
            return "too few seeds"
        mean = statistics.mean(self.gains)
        if half_width(self.gains) >= abs(mean):
            return "not decidable"
        yes, no = ("holds", "does not hold") if comparison.ours else VERDICTS[::2]
        weakly = ", weakly" if half_width(self.gains, wide=True) >= abs(mean) else ""
        return (yes if (mean > 0) == comparison.more else no) + weakly


def find(rows: list[dict[str, str]], comparison: Comparison) -> Finding:
    """The finding of a comparison, over the seeds that both arms have."""
    own = of_arm(rows, comparison.arm, comparison.column)
    than = comparison.than
    if than == START:
        other = of_arm(rows, comparison.arm, "avg_before")
    elif isinstance(than, str):
        other = of_arm(rows, than, comparison.column)
    else:
        other = dict.fromkeys(own, than)
    seeds = [seed for seed in own if seed in other]
    return Finding([own[seed] for seed in seeds], [other[seed] for seed in seeds])


def claim_table(rows: list[dict[str, str]], key: str) -> str:
    """Comparisons of a claim with their verdicts, then its arms."""
    claim = CLAIMS[key]
    titles = "here", "arm", "against", "of the one", "of the other", "difference", "verdict"
    lines = []
    for each in claim.comparisons:
        found = find(rows, each)
        than = f"`{each.than}`" if each.than in ARMS else "a recorded score"
        shown = [each.text, f"`{each.arm}`", "itself untrained" if each.than == START else than]
        shown += [spread(found.own), spread(found.other), spread(found.gains)]
        verdict = f"**{found.verdict(each)}**, {len(found.own)} seeds"
        shown.append(f"ours: {verdict}" if each.ours else verdict)
        lines.append(shown)
    parts = [f"Paper: {claim.paper}.", markdown(titles, lines), table(rows, claim.arms, False)]
    run = [row for row in rows if row["suite"] == "run" and row["arm"] in claim.arms]
    if run:
        seconds = [float(row["wall_s"]) for row in run]
        parts.append(
            f"Run: `python benchmarks/evidence.py --claim {key} --jobs 2`; {len(run)} cells, "
            f"{statistics.median(seconds):.0f} s of wall-clock time each (median; "
            f"{min(seconds):.0f} to {max(seconds):.0f}), "
            f"commits {', '.join(sorted({row['commit'] for row in run}))}."
        )
    return "\n\n".join(parts)


def again_table(rows: list[dict[str, str]], key: str) -> str:
    """A Markdown table: the comparisons of a claim, as first run and as run `--again`."""
    again = [row | {"suite": "run"} for row in rows if row["suite"] == "again"]
    lines = []
    for each in CLAIMS[key].comparisons:
        one, two = find(rows, each), find(again, each)
        shown = [each.text, f"`{each.arm}` - `{each.than}`", spread(one.gains), spread(two.gains)]
        verdict = two.verdict(each)
        shown.append("the same" if verdict == one.verdict(each) else f"**{verdict}**")
        lines.append(shown)
    return markdown(["here", "difference of", "first run", "second run", "verdict"], lines)


def summary_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: each claim, and which of its comparisons came out how, by how much."""
    lines = []
    for key, claim in CLAIMS.items():
        came: dict[str, list[str]] = {}
        for each in claim.comparisons:
            found = find(rows, each)
            verdict, _, weakly = found.verdict(each).partition(", ")
            text = each.text
            if found.gains:
                text += f" ({statistics.mean(found.gains):+.3f}{', weakly' * bool(weakly)})"
            place, shown = ("", f"{text}: {verdict}") if each.ours else (verdict, text)
            came.setdefault(place, []).append(shown)
        left = len(came.get("too few seeds", []))
        title = f"{key}. {claim.title}" + (f" ({left} not run)" if left else "")
        lines.append([title, *("; ".join(came.get(each, "-")) for each in (*VERDICTS, ""))])
    return markdown(["claim", *VERDICTS, "beyond the papers"], lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """A figure of every comparison of accuracies: difference and interval, colour by verdict."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(VERDICTS, ("#2a7d4f", "#8a8a8a", "#b5382f")))
    colours |= {"holds": colours[VERDICTS[0]], "does not hold": colours[VERDICTS[2]]}
    bars = []
    for key, claim in CLAIMS.items():
        for each in claim.comparisons:
            found = find(rows, each)
            if each.column == "avg_after" and len(found.own) > 1:
                side = "" if each.more else " (less is claimed)"
                bars.append((f"{key}. {each.arm} - {each.than}{side}", found, each))
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(bars) + 1.2), layout="constrained")
    for place, (_, found, each) in enumerate(reversed(bars)):
        colour = colours[found.verdict(each).split(",")[0]]
        how = {"fmt": "o", "color": colour, "capsize": 3, "mfc": "white" if each.ours else colour}
        axes.errorbar(statistics.mean(found.gains), place, xerr=half_width(found.gains), **how)
    for name in VERDICTS:
        axes.plot([], [], "o", color=colours[name], label=name)
    axes.plot([], [], "o", color="black", mfc="white", label="hollow: ours")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)])
    axes.set_xlabel("difference in accuracy, mean and 95 % interval over seeds")
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


FAILURES = {  # arXiv:2603.25562v2: what goes wrong, the arm that shows it, by which metric
    "share of tokens with a negative advantage": ("opd", "advantage_negative_share"),
    "1st percentile of log_ratio, nats": ("opd", "log_ratio_p1"),
    "99th percentile of log_ratio, nats": ("opd", "log_ratio_p99"),
    "log_ratio in the first tenth of a completion": ("opd-noisy", "log_ratio_decile_0"),
    "log_ratio in the last tenth": ("opd-noisy", "log_ratio_decile_9"),
    "log_ratio at the end token": ("opd-other_end", "eos_log_ratio_mean"),
    "log_ratio of all tokens": ("opd-other_end", "log_ratio_mean"),
    "share of cut completions": ("opd-other_end", "truncated_share"),
}


def failure_table() -> str:
    """A Markdown table of the metrics of FAILURES in the curves: their first and last 3 steps."""
    lines = []
    for text, (arm, key) in FAILURES.items():
        curves = []
        for path in sorted((RESULTS / "evidence").glob(f"run-{arm}-[0-9].jsonl")):
            found = [json.loads(line).get(key) for line in path.read_text().splitlines()]
            values = [value for value in found if value is not None and not math.isnan(value)]
            curves += [values] if len(values) >= 6 else []
        ends = [[statistics.mean(v[:3]) for v in curves], [statistics.mean(v[-3:]) for v in curves]]
        lines.append([text, f"`{arm}`", f"{len(curves)}", *map(spread, ends)])
    return markdown(["metric", "arm", "runs", "first 3 steps", "last 3 steps"], lines)


def sweep_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: arms against learning rates, accuracy, the best one in bold."""
    found = {
        tuple(row["arm"].split("@")): float(row["avg_after"])
        for row in rows
        if row["suite"] == "sweep"
    }
    lines = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        scores = [found.get((arm, rate)) for rate in RATES]
        best = max(score for score in scores if score is not None)
        shown = ["-" if s is None else f"**{s:.3f}**" if s == best else f"{s:.3f}" for s in scores]
        lines.append([arm, *shown])
    return markdown(["arm", *RATES], lines)


# ==== Command line ================================================================================


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["sweep", "smoke", "full"], help="default: smoke")
    parser.add_argument("--claim", choices=list(CLAIMS), action="append", help="its arms, 5 seeds")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 6), help="fewer than 5, in a smoke suite 3"
    )
    parser.add_argument("--most", type=int, default=10**6, help="run at most so many cells")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--figure", type=Path, help="draw all claims into this file, run nothing")
    parser.add_argument(
        "--again", action="store_true", help="a second run, in rows of its own: does it agree?"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.csv")
    args = parser.parse_args()
    if args.suite and args.claim:
        parser.error("--suite and --claim: give one of them")
    if args.suite == "sweep" and args.again:
        parser.error("--again: a sweep has no second run")
    rows = read(args.out)
    if args.figure:
        draw(rows, args.figure)
        return
    have = {(row["suite"], row["arm"], int(row["seed"])): row["command"] for row in rows}
    claims = args.claim or (list(CLAIMS) if args.suite == "full" else [])
    if args.suite == "sweep":
        wanted = sweep()
    else:
        arms = list(dict.fromkeys(arm for key in claims for arm in CLAIMS[key].arms)) or list(SMOKE)
        best = best_rates(rows)
        missing = sorted({ARMS[arm].rate for arm in arms} - set(best))
        if missing:
            parser.error(f"no complete sweep of {missing}: run --suite sweep first")
        suite = "again" if args.again else "run"
        wanted = cells(arms, args.seeds or (5 if claims else 3), best, suite)
    for cell in wanted:
        if f"--lr {cell.rate} " not in have.get(cell.key, f"--lr {cell.rate} "):
            parser.error(
                f"{cell.key} was run at another rate than {cell.rate}, the best of the sweep: "
                f"{have[cell.key]}; delete its row or give another --out"
            )
    todo = [cell for cell in wanted if cell.key not in have][: args.most]
    num_failed = 0
    if not args.table and todo:
        if any(FOLDER in ARMS[cell.arm].flags for cell in todo):
            make_models()
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, cell, args.out.parent / "evidence") for cell in todo]
            for job in tqdm(concurrent.futures.as_completed(jobs), total=len(jobs), unit="cell"):
                if (error := job.exception()) is not None:  # the others go on, and are kept
                    num_failed += 1
                    print(f"failed: {error}", file=sys.stderr)
                    continue
                row = job.result()
                print(
                    f"{row['arm']} seed {row['seed']}: accuracy {row['avg_after']}, "
                    f"{row.get('sampled_tokens', '')} sampled tokens, {row['cpu_s']} CPU s"
                )
                append(args.out, [row], FIELDS)
    rows = read(args.out)
    if args.suite == "sweep":
        print(sweep_table(rows))
    elif claims:
        for key in claims:
            print(f"\n## {key}. {CLAIMS[key].title}\n\n{claim_table(rows, key)}")
            if args.again:
                print(f"\n{again_table(rows, key)}")
    else:
        print(table(rows, list(SMOKE)))
    if num_failed:
        raise SystemExit(f"{num_failed} of {len(todo)} cells failed; run the command again")


if __name__ == "__main__":
    main()
