"""Prove and measure everything on one GPU in five minutes, stage by stage, in order of value.

    make gpu OUT=runs/gpu                                         # in a git repository
    python benchmarks/gpu.py --device cuda --budget-s 300 --out DIR --commit SHA
    python benchmarks/gpu.py --device cuda --out DIR --stages head,rows     # after a mend
    make gpu-rehearsal                                            # the same, small, on a CPU
    python benchmarks/gpu.py --collect DIR                        # its rows: benchmarks/results

Nothing is installed and nothing is fetched. Every stage is a process of its own with a time limit:
one that fails, or hangs, says so in one line and the next one starts; one that would pass the
budget is skipped and says so. Rows are in DIR as soon as they are measured: gpu_stages.csv,
gpu_checks.csv, gpu_ops.csv and gpu_steps.csv; what the stages print is in gpu.log. The exit code
is 1 unless every stage that was asked for is done. What a stage does is in gpu_stages.py.

Packages that the machine lacks are taken from the wheels in `.wheels/`, if they are there
(`tools/gpu_wheels.sh` fetches them); a baseline that is still missing is left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import rows

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks/gpu_stages.py"
MARK = "gpu: "  # lines of a stage that begin so are shown; all others are in the log alone


class Stage(NamedTuple):
    """What a stage is for, and its seconds: planned on a GPU, planned in the rehearsal."""

    purpose: str
    seconds: int
    rehearsal: int


STAGES = {
    "facts": Stage("card, driver, versions; speed of a copy and of a product", 10, 15),
    "build": Stage("the extension for this card, in place", 25, 60),
    "correct": Stage("the tests marked gpu; compute-sanitizer on each kernel", 35, 40),
    "train": Stage("every method; one update of each against the CPU's values", 45, 70),
    "head": Stage("losses from hidden states", 40, 10),
    "rows": Stage("ops on logits", 50, 25),
    "step": Stage("whole training steps", 65, 20),
    "sample": Stage("samplers", 30, 15),
}
COMMON = "device,driver,num_threads,load,torch,cuda,transformers,trl,commit,dirty,date,command"
TABLES = {  # of the files gpu_NAME.csv; the same on a GPU and in the rehearsal
    "stages": f"stage,seconds,planned_s,result,{COMMON}",
    "checks": f"stage,name,value,unit,expected,ok,detail,{COMMON}",
    "ops": "stage,op,implementation,direction,dtype,rows,vocab,valid_vocab,k,width,best_ms,p20_ms,"
    f"median_ms,p80_ms,floor_ms,x_floor,peak_mib,failed,{COMMON}",
    "steps": "stage,implementation,objective,vocab,completion,rollouts,prompt,dtype,total_s,"
    "generate_s,teacher_s,student_s,tokens_per_s,every_total_s,peak_mib,estimated_mib,num_tokens,"
    f"divided_by,failed,{COMMON}",
}


def path_of(folder: Path, table: str) -> Path:
    """The file of a table."""
    return folder / f"gpu_{table}.csv"


# ==== packages that the machine lacks =============================================================


def unpack_wheels(wheels: Path, folder: Path) -> list[Path]:
    """Folders of the wheels whose packages are not installed here, unpacked below `folder`."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        if rows.version(wheel.name.partition("-")[0]):
            continue
        target = folder / wheel.stem
        if not target.is_dir():
            part = target.with_name(target.name + ".part")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)
            for program in [*part.glob("*/*/bin/*"), *part.glob("*.data/scripts/*")]:
                program.chmod(0o755)
            part.rename(target)
        found.append(target)
    return found


def child_environment(wheels: list[Path]) -> dict[str, str]:
    """Of every process that is started: this source tree first, the wheels last."""
    paths = [ROOT, ROOT / "methods", ROOT / "tests", ROOT / "benchmarks"]
    old = os.environ.get("PYTHONPATH")
    given = [old] if old else []
    programs = [str(path) for wheel in wheels for path in wheel.glob("*.data/scripts")]
    return os.environ | {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *programs]),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *given, *map(str, wheels)]),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


# ==== stages ======================================================================================


def run(
    command: list[str], env: dict[str, str], log: TextIO, limit_s: float
) -> tuple[int | None, str]:
    """(exit code, last line) of a process; None: it was ended with all its children at its limit.

    Its output goes to the log, and lines that begin with MARK to the screen as well.
    """
    start = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
    )
    end, last, rest = time.monotonic() + limit_s, "no output", b""
    with open(log.name, "rb") as reader:
        reader.seek(start)
        while True:
            done = process.poll() is not None or time.monotonic() > end
            code = process.poll()
            if done:  # its children too, also where it has ended itself
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            *lines, rest = (rest + reader.read()).split(b"\n")
            for line in [*lines, rest] if done else lines:
                text = line.decode(errors="replace").strip()
                if text.startswith(MARK):
                    print(text.removeprefix(MARK), flush=True)
                last = text.removeprefix(MARK) or last
            if done:
                return code, last[:300]
            time.sleep(0.1)


def result_of(code: int | None, last: str, limit_s: float, num_rows: int) -> str:
    """One line on how a stage ended."""
    if code is None:
        return f"failed: not done after {limit_s:.0f} s; {num_rows} rows were kept"
    if code < 0:
        return f"failed: signal {-code}: {last}"
    if code:
        return f"failed: {last}"
    return "ok" if num_rows else "failed: it wrote no rows"


def run_stages(args: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Run the stages; their rows of gpu_stages.csv."""
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    env = child_environment(unpack_wheels(args.wheels, ROOT / "build/wheels"))
    with (args.out / "gpu.log").open("a") as log:
        print(f"==== {' '.join(sys.argv)}", file=log, flush=True)
        ask = [sys.executable, str(WORKER), "environment", "--device", args.device]
        ask += ["--commit", args.commit] if args.commit else []
        done = subprocess.run(ask, capture_output=True, text=True, env=env, cwd=ROOT)
        if done.returncode:
            log.write(done.stderr)
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        common = json.loads(done.stdout.splitlines()[-1])
        words = ["DIR" if Path(word).resolve() == args.out else word for word in sys.argv[1:]]
        common["command"] = " ".join(["python benchmarks/gpu.py", *words])
        print(f"{common['device']}, torch {common['torch']}, commit {common['commit']}"
              f"{' with changes' * common['dirty']}: {time.monotonic() - began:.1f} s to look",
              flush=True)  # fmt: skip
        finished = []
        for name in names:
            stage = STAGES[name]
            planned = stage.seconds if args.device == "cuda" else stage.rehearsal
            left = args.budget_s - (time.monotonic() - began)
            start = time.monotonic()
            if planned > left:
                result = f"skipped: {planned} s are planned, {max(0.0, left):.0f} s are left"
            else:
                print(f"==== {name}: {stage.purpose}", flush=True)
                print(f"==== {name}", file=log, flush=True)
                slack = 1.5 if args.device == "cuda" else 4.0  # a plan is no promise
                limit_s = min(slack * planned + 10, left)
                before = sum(num_rows(args.out, name))
                command = [sys.executable, str(WORKER), name, "--device", args.device]
                command += ["--out", str(args.out), "--common", json.dumps(common)]
                command += ["--limit-s", f"{limit_s:.0f}"]
                code, last = run(command, env, log, limit_s)
                result = result_of(code, last, limit_s, sum(num_rows(args.out, name)) - before)
            if result != "ok":
                print(f"{name}: {result}", flush=True)
            seconds = round(time.monotonic() - start, 1)
            row = {"stage": name, "seconds": seconds, "planned_s": planned, "result": result}
            finished.append(common | row)
            rows.append(path_of(args.out, "stages"), finished[-1:], TABLES["stages"])
        return finished


def num_rows(folder: Path, stage: str) -> list[int]:
    """How many rows of a stage each table has, but that of the stages."""
    tables = [table for table in TABLES if table != "stages"]
    found = [rows.read(path_of(folder, table)) for table in tables]
    return [sum(row["stage"] == stage for row in table) for table in found]


def table_of(finished: list[dict[str, Any]]) -> str:
    """A Markdown table: stage, seconds, result."""
    shown = [[row["stage"], f"{float(row['seconds']):.1f}", row["result"]] for row in finished]
    shown.append(["all", f"{sum(float(row['seconds']) for row in finished):.1f}", ""])
    return rows.markdown(["stage", "seconds", "result"], shown)


def collect(folder: Path) -> None:
    """Add the rows of a GPU's run to those in benchmarks/results; each row once."""
    for table, columns in TABLES.items():
        found = rows.read(path_of(folder, table))
        if not all(row["driver"] for row in found):
            raise SystemExit(f"{folder}: rows of a rehearsal are no results")
        have = [tuple(row.values()) for row in rows.read(path_of(rows.RESULTS, table))]
        fresh = [row for row in found if tuple(row.values()) not in have]
        if fresh:
            rows.append(path_of(rows.RESULTS, table), fresh, columns)
        print(f"{path_of(rows.RESULTS, table).name}: {len(fresh)} new rows")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--budget-s", type=float, default=300.0, help="seconds for all stages")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the files")
    parser.add_argument(
        "--commit", help="git describe --always --dirty --abbrev=40; where there is no .git"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="names with commas between them, in order"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="keep its rows, run nothing")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
        return 0
    names = args.stages.split(",")
    if unknown := sorted(set(names) - set(STAGES)):
        parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    args.out = args.out.resolve()
    finished = run_stages(args, names)
    text = table_of(finished)
    with (args.out / "gpu.log").open("a") as log:
        print(text, file=log)
    print(text)
    return int(any(row["result"] != "ok" for row in finished))


if __name__ == "__main__":
    sys.exit(main())
