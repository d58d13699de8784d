"""A model that teaches itself, by all methods: what it gains, and what it loses elsewhere.

    python tools/convert_smollm2.py --out models/smollm2       # or a hub name as --model
    python benchmarks/plurals.py --model models/smollm2 --jobs 2         # all arms, 3 seeds: hours
    python benchmarks/plurals.py --table                                 # what has been run

SmolLM2-135M-Instruct reads a question about a plural; its teacher, the same model, reads six
examples before it (`assets/plurals`, docs/recipes.md). Every arm gets 20 steps of 32 rollouts (32
words; tropd, which begins one rollout of each word with a prefix of the teacher, 16 words twice) at
one learning rate, that of the recipe, which was chosen with opd. Accuracy is greedy, on 36 held-out
words. Then the trained model answers the 32 questions of `elsewhere.jsonl`, by the same random
numbers as the untouched one: the lengths of the answers, and the exact reverse KL to the untouched
model at each token of them.

A cell is two processes; a finished one is a row of `benchmarks/results/plurals.csv` and a curve in
`benchmarks/results/plurals/`, and is not run again. Its checkpoint (2 GB) is removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from evidence import CURVE, execute, run_all, write_curve  # noqa: E402
from rows import NOT_MEASURED, RESULTS, append, markdown, processor, read, spread  # noqa: E402

from opd_run.files import read_metrics  # noqa: E402

ONE_EACH = "--prompts-per-step 32 --rollouts-per-prompt 1"
TWO_EACH = "--prompts-per-step 16 --rollouts-per-prompt 2"  # one guided, one from the start
ARMS = {  # script and flags beyond those of all
    "opd": ("opd", ONE_EACH),
    "opd-full": ("opd", f"{ONE_EACH} --objective full"),
    "sg_opd": ("sg_opd", ONE_EACH),
    "exopd": ("exopd", ONE_EACH),
    "topk_opd": ("topk_opd", ONE_EACH),
    "tropd": ("tropd", TWO_EACH),
}
UNTOUCHED = "untouched"  # the arm of the row that says how the model answers before training
STEPS, SEEDS, FOLDER, WORDS = 20, 3, "runs/plurals", "assets/plurals"
FIELDS = (
    "arm,seed,steps,teacher,before,after,kl_before,kl_after,pass_rate,sampled_tokens,"
    "elsewhere_kl,elsewhere_length,elsewhere_cut,wall_s,cpu_s,commit,dirty,device,num_threads,"
    "torch,transformers,date,command"
)
SHOWN = (*CURVE, "eval/student/avg@1", "eval/teacher/avg@1", "eval/student/reverse_kl")


def training(arm: str, seed: int, model: str, steps: int) -> list[str]:
    """The command that trains an arm."""
    script, more = ARMS[arm]
    flags = f"--prompts {WORDS}/train.jsonl --lr 2e-5 "
    flags += f"--teacher-prompt {WORDS}/turns.py:teacher --verifier {WORDS}/turns.py:right "
    flags += f"--test-prompts {WORDS}/test.jsonl --eval-teacher --eval-every {steps} "
    flags += "--eval-samples 1 --eval-temperature 0 --diagnostic-tokens 0 --save-every 0 "
    flags += f"--max-completion-tokens 16 {more} --steps {steps} --seed {seed} --device cpu "
    flags += f"--run-dir {FOLDER}/{arm}-{seed} --overwrite"
    return [f"methods/{script}.py", "--student", model, "--teacher", model, *flags.split()]


def answering(student: str, model: str, name: str) -> list[str]:
    """The command by which a model answers other questions; the teacher is the untouched one."""
    flags = f"--test-prompts {WORDS}/elsewhere.jsonl "
    flags += "--eval-only --eval-samples 1 --max-completion-tokens 256 --device cpu "
    flags += f"--run-dir {FOLDER}/{name}-elsewhere --overwrite"
    return ["methods/opd.py", "--student", student, "--teacher", model, *flags.split()]


def elsewhere(student: str, model: str, name: str, threads: int) -> tuple[dict[str, Any], Any]:
    """(columns, times) of a model's answers to other questions."""
    times = execute(answering(student, model, name), threads)
    (found,) = read_metrics(ROOT / FOLDER / f"{name}-elsewhere")
    columns = {"kl": "reverse_kl", "length": "length_mean", "cut": "truncated_share"}
    return {
        f"elsewhere_{key}": round(found[f"eval/student/{column}"], 5)
        for key, column in columns.items()
    }, times


def run(arm: str, seed: int, model: str, steps: int, threads: int, curves: Path) -> dict[str, Any]:
    """Run one cell and return its row; its curve goes into the folder `curves`."""
    name, row = f"{arm}-{seed}", {"arm": arm, "seed": seed, "steps": steps}
    if arm == UNTOUCHED:
        row["steps"], command = 0, answering(model, model, name)
        found, times = elsewhere(model, model, name, threads)
        folder = ROOT / FOLDER / f"{name}-elsewhere"
    else:
        folder, command = ROOT / FOLDER / name, training(arm, seed, model, steps)
        times = execute(command, threads)
        checkpoint = f"{FOLDER}/{name}/checkpoints/step_{steps}/model"
        found, more = elsewhere(checkpoint, model, name, threads)
        times = tuple(map(sum, zip(times, more)))
        shutil.rmtree(folder / "checkpoints")
        rows = read_metrics(folder)
        write_curve(curves / f"{name}.jsonl", [{k: r[k] for k in r if k in SHOWN} for r in rows])
        found |= of_training(rows)
    seen = json.loads((folder / "args.json").read_text())["environment"]
    kept = ("dirty", "num_threads", "torch", "transformers")
    return row | found | {key: seen[key] for key in kept} | {
        "device": processor(),
        "wall_s": round(times[0]),
        "cpu_s": round(times[1]),
        "commit": seen["commit"][:10],
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(command),
    }  # fmt: skip


def of_training(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of a run, from its metrics."""
    (teacher,) = [row for row in rows if "eval/teacher/avg@1" in row]
    before, *_, after = [row for row in rows if "eval/student/avg@1" in row]
    steps = [row for row in rows if "loss" in row]
    found = {"teacher": teacher["eval/teacher/avg@1"]}
    for key, row in (("before", before), ("after", after)):
        found[key] = row["eval/student/avg@1"]
        found[f"kl_{key}"] = row["eval/student/reverse_kl"]
    found["pass_rate"] = statistics.mean(row["verifier_pass_rate"] for row in steps[-3:])
    found = {key: round(value, 5) for key, value in found.items()}
    tokens = sum(row["num_rollouts"] * row["length_mean"] for row in steps)
    return found | {"sampled_tokens": round(tokens)}


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table: arms, what they have gained, what has changed elsewhere; over seeds."""
    untouched = [row for row in rows if row["arm"] == UNTOUCHED]
    if len(rows) == len(untouched):
        return NOT_MEASURED
    titles = ["arm", "seeds", "before", "after", "gain", "share of the gap", "above the teacher",
              "reverse KL to the teacher", "elsewhere: reverse KL", "length", "cut"]  # fmt: skip
    lines = []
    for arm in [*ARMS, UNTOUCHED]:
        mine = [{k: float(v) for k, v in row.items() if k in NUMBERS and v} for row in rows
                if row["arm"] == arm]  # fmt: skip
        if not mine:
            continue
        shown = [arm, f"{len(mine)}", *["-"] * 6]
        if arm != UNTOUCHED:
            gains = [row["after"] - row["before"] for row in mine]
            gaps = [row["teacher"] - row["before"] for row in mine]
            above = sum(row["after"] > row["teacher"] for row in mine)
            shown[2:] = [spread([row["before"] for row in mine])]
            shown += [spread([row["after"] for row in mine]), spread(gains)]
            shown += [spread([gain / gap for gain, gap in zip(gains, gaps) if gap > 0])]
            shown += [f"in {above} of {len(mine)}", spread([row["kl_after"] for row in mine])]
        for key in ("elsewhere_kl", "elsewhere_length", "elsewhere_cut"):
            shown.append(spread([row[key] for row in mine]))
        lines.append(shown)
    found: str = markdown(titles, lines)
    teacher = next(row["teacher"] for row in rows if row["teacher"])
    return f"The teacher's accuracy: {float(teacher):.3f}.\n\n{found}"


NUMBERS = ("teacher", "before", "after", "kl_before", "kl_after",
           "elsewhere_kl", "elsewhere_length", "elsewhere_cut")  # fmt: skip


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2", help="folder or hub name")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, choices=range(1, 6), default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, for a try with --out")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, 3 to 5 GiB each")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "plurals.csv")
    args = parser.parse_args()
    have = {(row["arm"], int(row["seed"])) for row in read(args.out)}
    wanted = [(UNTOUCHED, 0), *((arm, seed) for seed in range(args.seeds) for arm in args.arms)]
    todo = [] if args.table else [cell for cell in wanted if cell not in have]
    how = args.model, args.steps, args.threads, args.out.with_suffix("")

    def keep(row: dict[str, Any]) -> None:
        print(f"{row['arm']} seed {row['seed']}: {row.get('before')} -> {row.get('after')}")
        append(args.out, [row], FIELDS)

    num_failed = run_all([partial(run, *cell, *how) for cell in todo], args.jobs, keep)
    print(table(read(args.out)))
    if num_failed:
        raise SystemExit(f"{num_failed} of {len(todo)} cells failed; run the command again")


if __name__ == "__main__":
    main()
