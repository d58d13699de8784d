"""Experiments that anyone can rerun: cells of one run each, resumable, with seeds and spread.

    python benchmarks/evidence.py --suite sweep --jobs 2     # learning rates, 1 seed
    python benchmarks/evidence.py --suite smoke --jobs 2     # five methods and a merge, 3 seeds
    python benchmarks/evidence.py --suite full --jobs 2      # all claims, 5 seeds: hours
    python benchmarks/evidence.py --claim 4 --jobs 2         # the arms of one claim, 5 seeds
    python benchmarks/evidence.py --claim 4 --table          # print what has been run of it
    python benchmarks/evidence.py --claim 1 --again          # a second run of it, beside the first
    python benchmarks/evidence.py --study ladder --jobs 2    # a study: --suite sweep --study first
    python benchmarks/evidence.py --decide --jobs 2          # as many seeds as comparisons need
    python benchmarks/evidence.py --study end --commands     # print its cells, run nothing
    python benchmarks/evidence.py --figures docs/images      # draw what has been run

Arms, claims and studies stand in `claims.py`. An arm uses the learning rate that won the sweep of
its method, on a seed of its own, or one that it names. A cell is a subprocess on one thread; a
finished cell is a row of `benchmarks/results/evidence.csv` and its curve a file in
`benchmarks/results/evidence/`; it is not run again. Suites share cells. The interval is the 95 %
one of Student's t over seeds.

Rows are compared within one `numerics` alone: a digest of every file that can change a number, at
the row's commit. Run long things in a checkout that stays where it is (`git worktree add`). Cells
of other numerics are run anew, and rows of a changed tree are compared with nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims import (  # noqa: E402
    ARMS,
    CLAIMS,
    DOMAINS,
    FIRST_SEED,
    FOLDER,
    HALF_WIDTH,
    MOST,
    SMOKE,
    STUDIES,
    SUPPORT,
    SURE,
    SWEPT,
    Sweep,
)
from findings import (  # noqa: E402
    again_table,
    best_rates,
    claim_table,
    decided,
    draw,
    find,
    new_rows,
    numerics_of,
    rate_of,
    seeds_needed,
    study_tables,
    sweep_table,
    table,
)
from rows import RESULTS, Row, append, processor, read, version  # noqa: E402

from opd_run.files import TINY, read_metrics  # noqa: E402

SWEEP_SEED, NUM_HELD_OUT = 3, 306
NOISE = 0.4  # of the noisy student, in standard deviations of each matrix
TEACHER_NOISE = 0.25  # of the noisy teacher
# What can change a number of a cell. `numerics` of a row is a digest of it and of torch's version.
NUMBERS = ("methods", "forks", "opd_ops", "opd_run", "csrc", "assets/tiny", "assets/plurals")
FIELDS = (
    "suite,arm,seed,avg_before,avg_after,pass8_before,pass8_after,kl_before,kl_after,length,"
    "truncated,grad_norm,sampled_tokens,wall_s,commit,dirty,device,num_threads,torch,date,command,"
    "cpu_s,train_s,numerics,avg_teacher"
)
CURVE = (
    *("step", "log_ratio_mean", "log_ratio_p1", "log_ratio_p99", "log_ratio_decile_0"),
    *("log_ratio_decile_9", "eos_log_ratio_mean", "advantage_negative_share", "reverse_kl"),
    *("student_entropy", "teacher_mass", "verifier_pass_rate", "grad_norm", "length_mean"),
    *("truncated_share", "gate_mean", "accepted_mean", "teacher_mass_mean", "student_mass"),
    *("correct_mean", "incorrect_mean", "agree_correct_mean", "agree_incorrect_mean"),
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

    @property
    def eval_samples(self) -> int:
        """Of each test prompt."""
        return 2 if self.suite == "sweep" else ARMS[self.arm].eval_samples

    @property
    def cpu_min(self) -> float:
        """CPU minutes to expect."""
        arm = ARMS[self.arm]
        if self.suite == "sweep":
            arm = replace(arm, steps=SWEPT[self.arm].steps, eval_every=0, eval_samples=2)
        return arm.cpu_min

    def command(self) -> list[str]:
        """The script and its flags, with paths relative to the project."""
        arm, more = ARMS[self.arm], ""
        steps, every = arm.steps, arm.eval_every or arm.steps
        if self.suite == "sweep":
            steps = every = SWEPT[self.arm].steps
            if SWEPT[self.arm].held_out:
                more = f" --prompts {FOLDER}/prompts/rest.jsonl"
                more += f" --test-prompts {FOLDER}/prompts/held_out.jsonl"
        flags = f"--steps {steps} --eval-samples {self.eval_samples} --lr {self.rate} "
        flags += f"--eval-every {every} --prompts-per-step 32 --rollouts-per-prompt 4 "
        flags += "--lr-schedule linear --warmup-steps 3 --save-every 0 --device cpu "
        flags += f"--run-dir {FOLDER}/{self.name} --overwrite "
        flags += f"--seed {self.seed} {arm.flags}{more}"
        return [arm.script, *flags.replace(f"{ROOT}/", "").split()]


def sweep(arms: Iterable[str]) -> list[Cell]:
    """The cells of the sweeps of some arms."""
    swept = [(arm, rate) for arm in arms for rate in SWEPT[arm].rates]
    return [Cell(arm, SWEEP_SEED, rate, "sweep") for arm, rate in swept]


def cells(
    arms: Iterable[str], seeds: Iterable[int], best: dict[str, str], suite: str
) -> list[Cell]:
    """The cells of some arms whose rates are known, seeds outermost: a portion is balanced."""
    rates = {arm: rate_of(arm, best) for arm in arms}
    return [Cell(a, seed, rate, suite) for seed in seeds for a, rate in rates.items() if rate]


def numerics() -> str:
    """A digest of what can change a number in this checkout; "" where it is changed or unknown."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else "unknown"

    trees = git("ls-tree", "HEAD", "--", *NUMBERS)
    if "unknown" in (trees, git("rev-parse", "HEAD")) or git("status", "--porcelain", *NUMBERS):
        return ""
    return hashlib.sha256(f"{trees}{version('torch')}".encode()).hexdigest()[:10]


def make_inputs() -> None:
    """Models and prompts of the arms that assets/tiny does not have, if they are not there yet."""
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
    noises = {"noisy": ("student", NOISE), "teacher_noise": ("teacher", TEACHER_NOISE)}
    for name, (of, scale) in noises.items():  # noisy: right 11 % of the time instead of 43 %
        if not (folder / name).is_dir():
            model = AutoModelForCausalLM.from_pretrained(TINY / of, dtype=torch.float32)
            generator = torch.Generator().manual_seed(0)
            for weight in model.parameters():
                if weight.dim() > 1:
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.data += scale * weight.data.std() * noise
            save(model, name)
    for name, scale in {"teacher_sure": SURE, "teacher_flat": 1 / SURE}.items():  # of all logits
        if not (folder / name).is_dir():
            model = AutoModelForCausalLM.from_pretrained(TINY / "teacher", dtype=torch.float32)
            model.model.norm.weight.data *= scale
            save(model, name)
    prompts = ROOT / FOLDER / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    train, test = (
        (TINY / f"prompts/{name}.jsonl").read_text().splitlines(keepends=True)
        for name in ("train", "test")
    )
    parts = {"rest": train[:-NUM_HELD_OUT], "held_out": train[-NUM_HELD_OUT:]}
    for name in DOMAINS:
        for lines, ending in ((train, ""), (test, "_test")):
            mine = [line for line in lines if json.loads(line)["domain"] == name]
            parts[f"{name}{ending}"] = mine
    for name, lines in parts.items():
        if not (prompts / f"{name}.jsonl").is_file():
            (prompts / f"{name}.part").write_text("".join(lines))
            (prompts / f"{name}.part").rename(prompts / f"{name}.jsonl")


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
    before = numerics()
    wall_s, cpu_s = execute(cell.command())
    suite, arm, seed = cell.key
    row, seconds = read_run(cell, curves)
    return {"suite": suite, "arm": arm, "seed": seed} | row | {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "train_s": round(seconds * cpu_s / wall_s, 1),  # of a quiet core: less what others took
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(cell.command()),
        "numerics": before if numerics() == before else "",
    }  # fmt: skip


def read_run(cell: Cell, curves: Path) -> tuple[dict[str, object], float]:
    """(columns, seconds of training) of a run; its curve is kept."""
    folder = ROOT / FOLDER / cell.name
    rows = read_metrics(folder)
    score = f"eval/student/avg@{cell.eval_samples}"
    before, *_, after = [row for row in rows if score in row]
    steps = [row for row in rows if "loss" in row]
    seen = json.loads((folder / "args.json").read_text())["environment"]
    masses = support_masses(folder, SUPPORT[cell.arm].flags) if cell.arm in SUPPORT else {}
    curve, tokens, seconds = [], 0.0, 0.0
    for row in rows:
        kept = {k: v for k, v in row.items() if k in CURVE or k.startswith("alarm/")}
        if "loss" in row:
            tokens += row["num_rollouts"] * row["length_mean"]
            seconds += sum(float(row[f"{phase}_s"]) for phase in ("generate", "teacher", "student"))
            curve.append(kept | masses.get(row["step"], {}))
        elif score in row and ARMS[cell.arm].eval_every:
            kept |= {"accuracy": row[score], "tokens": round(tokens), "train_s": seconds}
            curve.append(kept)
    write_curve(curves / f"{cell.name}.jsonl", curve)
    found: dict[str, object] = {}
    names = {"avg": f"avg@{cell.eval_samples}", "pass8": "pass@8", "kl": "reverse_kl"}
    for key, name in names.items():
        if f"eval/student/{name}" in after:
            found[f"{key}_before"] = round(before[f"eval/student/{name}"], 5)
            found[f"{key}_after"] = round(after[f"eval/student/{name}"], 5)
    of_teacher = [row for row in rows if f"eval/teacher/avg@{cell.eval_samples}" in row]
    if of_teacher:
        found["avg_teacher"] = round(of_teacher[0][f"eval/teacher/avg@{cell.eval_samples}"], 5)
    return found | {
        "length": round(after["eval/student/length_mean"], 2),
        "truncated": round(after["eval/student/truncated_share"], 5),
        "grad_norm": round(statistics.median(float(r["grad_norm"]) for r in steps), 4),
        "sampled_tokens": int(tokens),
        "commit": seen["commit"][:10],
        "dirty": seen["dirty"],
        "device": processor(),
        "num_threads": seen["num_threads"],
        "torch": seen["torch"],
    }, seconds


def support_masses(folder: Path, flags: str) -> dict[int, dict[str, float]]:
    """Of each step: what student and teacher put on the teacher's top K, of rollouts in the trace.

    The trace has the teacher's top 5; what holds of each of the K tokens holds of those of them.
    """
    size = min(5, int(flags.split("--support-size ")[1].split()[0]))
    found: dict[int, dict[str, list[float]]] = {}
    for line in (folder / "tokens.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] != "train":
            continue
        masses = found.setdefault(row["step"], {"student_top": [], "teacher_top": []})
        pairs = zip(row["support_teacher_logp"], row["support_student_logp"])
        for teacher, student in pairs:
            top = sorted(zip(map(float, teacher), map(float, student)), reverse=True)[:size]
            masses["teacher_top"].append(sum(math.exp(one) for one, _ in top))
            masses["student_top"].append(sum(math.exp(two) for _, two in top))
    return {
        step: {key: statistics.mean(values) for key, values in masses.items() if values}
        for step, masses in found.items()
    }


def write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """The curve of a cell, as JSON lines with four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in short))


def cells_to_decide(rows: list[Row], best: dict[str, str]) -> list[Cell]:
    """All cells that the comparisons need, as far as their rows tell by now."""
    wanted: dict[Cell, None] = {}
    for each in decided(rows):
        num = seeds_needed(find(new_rows(rows), each).gains)
        seeds = range(FIRST_SEED, FIRST_SEED + num)
        wanted |= dict.fromkeys(cells((each.arm, str(each.than)), seeds, best, "run"))
    return sorted(wanted, key=lambda cell: cell.seed)


# ==== Command line ================================================================================


def wanted_cells(args: argparse.Namespace, rows: list[Row], best: dict[str, str]) -> list[Cell]:
    """The cells that the flags ask for, run or not."""
    studies = [STUDIES[name] for name in args.study or []]
    if args.suite == "sweep":
        arms = {ARMS[arm].rate: None for study in studies for arm in study.arms} or SWEPT
        return sweep(arm for arm in arms if arm in SWEPT and (studies or SWEPT[arm] == Sweep()))
    if args.decide:
        return cells_to_decide(rows, best)
    found = []
    for study in studies:
        found += cells(study.arms, study.seeds[: args.seeds], best, "run")
    claims = args.claim or (list(CLAIMS) if args.suite == "full" else [])
    if claims or not studies:  # arms of studies are run by --study alone
        mine = [study for study in STUDIES.values() if study.seeds.start < FIRST_SEED]
        others = {arm for study in mine for arm in study.arms}
        arms = dict.fromkeys(a for key in claims for a in CLAIMS[key].arms if a not in others)
        seeds = range(args.seeds or (5 if claims else 3))
        found += cells(arms or SMOKE, seeds, best, "again" if args.again else "run")
    return found


def run_all(
    runs: Sequence[Callable[[], dict[str, Any]]], jobs: int, keep: Callable[[dict[str, Any]], None]
) -> int:
    """Run some cells, `jobs` at once; `keep(row)` of each that is done. How many have failed."""
    num_failed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        started = concurrent.futures.as_completed([pool.submit(each) for each in runs])
        for job in tqdm(started, total=len(runs), unit="cell", disable=not runs):
            if (error := job.exception()) is not None:  # the others go on, and are kept
                num_failed += 1
                print(f"failed: {error}", file=sys.stderr)
            else:
                keep(job.result())
    return num_failed


def run_cells(todo: list[Cell], jobs: int, out: Path) -> int:
    """Run cells, append their rows to a file; how many have failed."""
    make_inputs()
    curves = out.parent / "evidence" / numerics()

    def keep(row: dict[str, Any]) -> None:
        print(
            f"{row['arm']} seed {row['seed']}: accuracy {row['avg_after']}, "
            f"{row.get('sampled_tokens', '')} sampled tokens, {row['cpu_s']} CPU s"
        )
        append(out, [row], FIELDS)

    return run_all([partial(run, cell, curves) for cell in todo], jobs, keep)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["sweep", "smoke", "full"], help="default: smoke")
    parser.add_argument("--claim", choices=list(CLAIMS), action="append", help="its arms, 5 seeds")
    parser.add_argument(
        "--study", choices=list(STUDIES), action="append", help="its arms; with --suite sweep rates"
    )
    parser.add_argument(
        "--decide", action="store_true", help=f"comparisons to ± {HALF_WIDTH} or {MOST} seeds"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument("--seeds", type=int, choices=range(1, 6), help="so many, and no more")
    parser.add_argument("--most", type=int, default=10**6, help="run at most so many cells")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--commands", action="store_true", help="print missing cells, run nothing")
    parser.add_argument("--figures", type=Path, help="draw all into this folder, run nothing")
    parser.add_argument(
        "--again", action="store_true", help="a second run, in rows of its own: does it agree?"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.csv")
    args = parser.parse_args()
    if bool(args.suite) + bool(args.claim) + args.decide + bool(args.study) > 1:
        if not (args.suite == "sweep" and args.study and not args.claim and not args.decide):
            parser.error("--suite, --claim, --study, --decide: one of them, or a sweep of a study")
    if args.again and (args.suite == "sweep" or args.study or args.decide):
        parser.error("--again: claims and the smoke suite alone have a second run")
    if args.figures:
        draw(read(args.out), args.figures)
        return
    now, num_failed, left = numerics(), 0, args.most
    if not now and not args.table:
        print("! changed files, or no repository: these rows will be compared with nothing")
    while not args.table:
        rows = read(args.out)
        best = best_rates(rows)
        mine = [row for row in rows if row["suite"] == "sweep" or numerics_of(row) == now]
        have = {(row["suite"], row["arm"], int(row["seed"])): row["command"] for row in mine}
        wanted = wanted_cells(args, mine, best)
        for cell in wanted:
            if f"--lr {cell.rate} " not in have.get(cell.key, f"--lr {cell.rate} "):
                parser.error(
                    f"{cell.key} was run at another rate than {cell.rate}, the best of the sweep: "
                    f"{have[cell.key]}; delete its row or give another --out"
                )
        todo = [cell for cell in wanted if cell.key not in have][:left]
        if args.commands:
            for cell in todo:
                print(f"{cell.cpu_min:5.1f} min  python {' '.join(cell.command())}")
            print(f"{sum(cell.cpu_min for cell in todo):5.0f} CPU minutes in {len(todo)} cells")
        if args.study and args.suite != "sweep":
            arms = {arm for name in args.study for arm in STUDIES[name].arms}
            if waiting := sorted(arm for arm in arms if rate_of(arm, best) is None):
                print(f"! no whole sweep yet for {waiting}: --suite sweep --study, then again")
        if args.commands or not todo:
            break
        num_failed += run_cells(todo, args.jobs, args.out)
        left -= len(todo)
        if num_failed or left <= 0 or not args.decide:  # the first seeds say how many are needed
            break
    if args.commands:
        return
    rows = read(args.out)
    if args.suite == "sweep":
        print(sweep_table(rows) if not args.study else best_rates(rows))
    elif args.study or args.decide:
        tables = study_tables(rows)
        of = {"end": ("end", "ends"), "expert": ("end",), "more_experts": ("end",)}
        for name in args.study or ["decide"]:
            print("\n\n".join(tables[each] for each in of.get(name, (name,))))
    elif claims := args.claim or (list(CLAIMS) if args.suite == "full" else []):
        for key in claims:
            print(f"\n## {key}. {CLAIMS[key].title}\n\n{claim_table(rows, key)}")
            if args.again:
                print(f"\n{again_table(rows, key)}")
    else:
        print(table(rows, SMOKE))
    if num_failed:
        raise SystemExit(f"{num_failed} cells failed; run the command again")


if __name__ == "__main__":
    main()
