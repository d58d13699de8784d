"""bench_decode.py, bench_lines.py and bench_step.py without an older tree, where nothing can be
timed: that they run, what they count."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import bench_decode  # noqa: E402
import bench_lines  # noqa: E402
import gpu  # noqa: E402


def printed(script: str, flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--no-save", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_token_waits_twice_at_most_for_a_gpu():
    """For the look at ended rollouts, and with top-p for one at the candidates."""
    said = printed("bench_decode.py", "--cases full top-p greedy --repeats 1 --vocab 600")
    found = re.findall(r"^(\S+) +after +[\d.]+ s, ([\d.]+) waits a token$", said, re.M)
    assert [name for name, _ in found] == ["full", "top-p", "greedy"]
    assert all(1 <= float(waits) <= 1 + (name == "top-p") for name, waits in found), found


def test_rollouts_are_made_without_gradients_and_teacher_logits_are_not_kept():
    """32 rollouts of 32 tokens have 125 MiB of logits; a micro-batch of two has 8."""
    said = printed("bench_lines.py", "--cases gradients logits --repeats 1")
    found = dict(re.findall(r"^(\S+) +after +([\d,]+) MiB", said, re.M))
    assert found["gradients"] == "0"
    assert 0 < int(found["logits"]) < 250, found  # 483 where all logits of the teacher were kept


@pytest.mark.parametrize(
    ("table", "cases", "num_bars"),
    [
        (bench_decode.decode_table, bench_decode.CASES, 7),
        (bench_lines.lines_table, bench_lines.CASES, 4),
    ],
)
def test_the_table_has_a_line_for_each_case(table, cases, num_bars):
    lines = table().splitlines()[2:]
    assert len(lines) == len(cases)
    assert all(line.count("|") == num_bars for line in lines)


def test_two_trees_take_turns_and_each_runs_its_own_method(tmp_path):
    """Of bench_step.py, here with this tree as both; a tree without ops of its own is told."""
    script = """
        import argparse, sys; from pathlib import Path
        import bench_step, gpu_stages
        if __name__ == "__main__":
            case = gpu_stages.case_of(argparse.Namespace(cuda=False, device="cpu"), 2, 4)
            case.vocab, case.made_on_device = 512, False
            case.trees = {"before": Path(sys.argv[1]), "after": bench_step.ROOT}
            case.arms = [(tree, "reverse") for tree in case.trees]
            folder = Path(sys.argv[2])
            for row in bench_step.measure(folder, case):
                print("ROW", row["implementation"], row.get("failed"), row.get("num_tokens"))
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    (tmp_path / "models").mkdir()

    def said(before):
        command = [sys.executable, str(path), str(before), str(tmp_path / "models")]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=gpu.child_environment([])
        )
        rows = [line for line in done.stdout.splitlines() if line.startswith("ROW")]
        return rows, done.stderr

    assert said(ROOT)[0] == ["ROW before None 8", "ROW after None 8"]
    older = tmp_path / "older"
    (older / "benchmarks").mkdir(parents=True)
    (older / "benchmarks/bench_step.py").write_text("")
    rows, errors = said(older)
    assert rows == ["ROW before its process died None", "ROW after None 8"], errors
    assert f"opd of {older} came from {ROOT}" in errors
