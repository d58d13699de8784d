"""benchmarks/gpu.py: stages that end well, badly, late or not at all, and what is kept of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import gpu  # noqa: E402
import gpu_tables  # noqa: E402
import rows  # noqa: E402


def rehearse(out: Path, stages: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out)]
    command += ["--stages", stages, "--commit", "0123456789ab", "--budget-s", "900", *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_three_stages_write_rows_of_the_columns_that_a_gpu_writes(tmp_path):
    done = rehearse(tmp_path, "facts,head,sample")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *("gpu.log", "gpu_stages.csv", "gpu_checks.csv", "gpu_ops.csv", "gpu_steps.csv")
    }
    for table, columns in gpu.TABLES.items():
        found = rows.read(gpu.path_of(tmp_path, table))
        assert found and list(found[0]) == columns.split(","), table
        assert all(row["commit"] == "0123456789" and row["device"] for row in found)
    results = {row["stage"]: row["result"] for row in rows.read(tmp_path / "gpu_stages.csv")}
    assert results == {"facts": "ok", "head": "ok", "sample": "ok"}
    ops = rows.read(tmp_path / "gpu_ops.csv")
    assert {row["op"] for row in ops} == {"token_logp", "full_kl jsd", "support_kl"}
    for row in ops:  # the floor is measured in turn with what is compared with it
        is_bare = "products" in row["implementation"]
        assert (row["x_floor"] == "") == (is_bare or row["op"] == "support_kl")
    assert all(float(row["best_ms"]) > 0 for row in ops)
    samplers = {row["implementation"] for row in rows.read(tmp_path / "gpu_steps.csv")}
    assert samplers == {"opd.sample", "transformers.generate"}


WORKER = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [{benchmarks!r}]
import rows, gpu
stage = sys.argv[1]
if stage == "environment":
    print(json.dumps({{"device": "x", "torch": "y", "commit": "z", "dirty": False}}))
    sys.exit()
out = Path(sys.argv[sys.argv.index("--out") + 1])
if stage != "build":
    row = {{"stage": stage, "name": "one"}}
    rows.append(gpu.path_of(out, "checks"), [row], gpu.TABLES["checks"])
print("gpu: shown", flush=True)
if stage == "facts":
    sys.exit("something broke")
if stage == "train":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out / "child").write_text(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def staged(tmp_path, monkeypatch, capsys):
    """Run stages by a worker that fails in facts, writes nothing in build and hangs in train."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(benchmarks=str(ROOT / "benchmarks")))
    monkeypatch.setattr(gpu, "WORKER", worker)
    plan = {name: stage._replace(rehearsal=1) for name, stage in gpu.STAGES.items()}
    monkeypatch.setattr(gpu, "STAGES", plan | {"rows": plan["rows"]._replace(rehearsal=1000)})

    def run(stages: str, budget_s: float) -> tuple[int, dict[str, str], str]:
        out = tmp_path / "out"
        flags = ["--device", "cpu", "--out", str(out), "--stages", stages]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, "--budget-s", str(budget_s)])
        code = gpu.main()
        found = rows.read(out / "gpu_stages.csv")
        return code, {row["stage"]: row["result"] for row in found}, capsys.readouterr().out

    return run


def test_a_stage_that_fails_says_so_and_the_next_one_starts(staged):
    code, results, shown = staged("facts,build,correct", 100)
    assert code == 1
    assert results == {
        "facts": "failed: something broke", "build": "failed: it wrote no rows", "correct": "ok",
    }  # fmt: skip
    assert "facts: failed: something broke" in shown and "shown" in shown.splitlines()
    assert "| correct |" in shown


def test_a_stage_beyond_the_budget_is_skipped_and_the_next_one_starts(staged):
    code, results, shown = staged("correct,rows,sample", 100)
    assert code == 1 and results["correct"] == results["sample"] == "ok"
    assert results["rows"].startswith("skipped: 1000 s are planned, ")
    assert results["rows"] in shown


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_its_rows(staged, tmp_path):
    code, results, _ = staged("train,sample", 100)
    assert code == 1 and results["sample"] == "ok"
    assert results["train"] == "failed: not done after 14 s; 1 rows were kept"
    child = int((tmp_path / "out/child").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_package_is_unpacked_only_where_it_is_missing(tmp_path):
    for name in ("pytest", "a_package_that_is_not_there"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/data/bin/program", "#!/bin/sh\n")
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
    found = gpu.unpack_wheels(tmp_path, tmp_path / "unpacked")
    assert [path.name for path in found] == ["a_package_that_is_not_there-1.0-py3-none-any"]
    program = found[0] / "a_package_that_is_not_there/data/bin/program"
    assert program.stat().st_mode & 0o111 and gpu.unpack_wheels(tmp_path, found[0].parent) == found


def test_rows_are_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    row = {"stage": "facts", "name": "copy", "value": "1.0", "driver": "580"}
    path = gpu.path_of(tmp_path, "checks")
    rows.append(path, [row, row | {"name": "b"}], gpu.TABLES["checks"])
    for _ in range(2):
        gpu.collect(tmp_path)
        assert len(rows.read(gpu.path_of(rows.RESULTS, "checks"))) == 2
    rows.append(path, [row | {"driver": ""}], gpu.TABLES["checks"])
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu.collect(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is there")
def test_a_trainer_that_cannot_be_imported_says_so_and_ours_goes_on(tmp_path):
    script = """
        import sys; from pathlib import Path
        import bench_step, gpu_stages, argparse
        if __name__ == "__main__":
            case = gpu_stages.case_of(argparse.Namespace(cuda=False, device="cpu"), 2, 4)
            case.arms = [("GKDTrainer", "reverse"), ("opd.py", "sampled")]
            for row in bench_step.measure(Path(sys.argv[1]), case):
                print("ROW", row["implementation"], row.get("failed"), row.get("num_tokens"))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=gpu.child_environment([]))  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROW")]
    assert "cannot be imported: ModuleNotFoundError: No module named" in lines[0], done.stderr
    assert lines[0].startswith("ROW GKDTrainer") and lines[1] == "ROW opd.py None 8"


def test_pages_show_rows_of_a_gpu_and_say_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    assert all("Not measured" in text for text in gpu_tables.tables().values())

    def add(table: str, **values: object) -> None:
        row = {"driver": "580", "device": "H", "commit": "abc", "torch": "2.11", "command": "c"}
        rows.append(gpu.path_of(tmp_path, table), [row | values], gpu.TABLES[table])

    add("stages", stage="correct", seconds=41.5, result="ok", dirty=False)
    add("stages", stage="train", seconds=1, result="ok", driver="")  # of a rehearsal
    add("checks", stage="facts", name="copy", value="4000", unit="GB/s", ok=True)
    case = {"direction": "forward+backward", "dtype": "bfloat16"}
    hidden = case | {"stage": "head", "op": "token_logp", "rows": 8192, "width": 4096}
    for who, ms in (("opd_ops", 20), ("torch", 50), ("opd_ops", 10)):  # the last one counts
        add("ops", **hidden, implementation=who, median_ms=ms, x_floor=1.1, peak_mib=256)
    add("ops", **hidden, implementation="Liger", failed="OutOfMemoryError: CUDA out of memory")
    logits = case | {"stage": "rows", "op": "token_logp"}
    for who, ms in (("opd_ops", 2), ("torch", 9)):
        add("ops", **logits, implementation=who, median_ms=ms)
    step = {"stage": "step", "rollouts": 256, "total_s": 20, "generate_s": 15, "tokens_per_s": 2184}
    add("steps", **step, implementation="opd.py", peak_mib=9000, estimated_mib=8000)
    add("steps", **step, implementation="GKDTrainer", failed="out of memory")
    shown = gpu_tables.tables()
    assert "| correct | 41.5 | ok | H | 2.11 | abc |" in shown["gpu stages"]
    assert "| train | not measured |" in shown["gpu stages"]
    assert "| facts | copy | 4000 GB/s | - | yes |" in shown["gpu checks"]
    assert (
        "| 8,192 | 4,096 | log-prob of a token | not measured | 10 ms, 1.10 of floor, 256 MiB | "
        "50 ms, 1.10 of floor, 256 MiB | OutOfMemoryError |" in shown["gpu head"]
    )
    assert "forward+backward | bfloat16 | 2 ms | 4.5x | - | - | - |" in shown["gpu rows"]
    assert "| 20.00 | 15.00 | - | - | 2,184 | 9,000 (8,000) |" in shown["gpu steps"]
    assert "| step | `GKDTrainer` | 256 | out of memory |" in shown["gpu steps"]
    assert "20.0 s, 9,000 MiB" in shown["gpu in short"]


COLLECT = """
import sys, pytest
for words in sys.argv[1:]:
    code = pytest.main(["-q", "--collect-only", "tests/gpu", *words.split("|")])
    print("EXIT", int(code))
"""


def collected(*selections: str) -> list[list[str]]:
    """The tests of tests/gpu that pytest would run with each; no GPU is needed to list them."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *selections], capture_output=True, text=True, cwd=ROOT
    )
    found = []
    for part in done.stdout.split("EXIT ")[:-1]:
        found.append([line for line in part.splitlines() if "::" in line])
    codes = [part.split()[0] for part in done.stdout.split("EXIT ")[1:]]
    assert codes == ["0" if tests else "5" for tests in found], done.stdout  # 5: there are none
    return found


def test_gpu_tests_are_asked_for_by_name_and_shared_in_parts():
    shares = [f"-m|gpu|--part|{part}/3" for part in range(3)]
    every, not_gpu, not_slow, *parts = collected("-m|gpu", "-m|not gpu", "-m|not slow", *shares)
    assert len(every) >= 40
    assert not_gpu == not_slow == []
    assert sorted(test for part in parts for test in part) == sorted(every)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_short_runs_are_compared_with_those_of_the_cpu(tmp_path):
    """tests/gpu/each_run.py, on a CPU: a case is right, and another loss is an error."""
    script = [sys.executable, str(ROOT / "tests/gpu/each_run.py"), "--device", "cpu"]
    for name, value in (("one", 1.0), ("other", 1.01)):
        (tmp_path / name).mkdir()
        row = json.dumps({"loss": value, "grad_norm": 1.0})
        (tmp_path / name / "metrics.jsonl").write_text(row + "\n")
    look = "import sys, pathlib; sys.path.insert(0, 'tests/gpu'); import each_run; "
    look += (
        f"print(each_run.compared(*(pathlib.Path({str(tmp_path)!r}) / n for n in sys.argv[1:])))"
    )
    for pair, words in ((["one", "one"], "loss 1, grad_norm 1"), (["one", "other"], "1.01 on the")):
        done = subprocess.run([sys.executable, "-c", look, *pair], capture_output=True, text=True,
                              cwd=ROOT)  # fmt: skip
        assert words in done.stdout + done.stderr
    done = subprocess.run([*script, "--case", "type qwen3", "--folder", str(tmp_path)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "grad_norm" in done.stdout.splitlines()[-1]
