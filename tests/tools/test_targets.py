"""benchmarks/targets.py: its commands, the estimate of memory, rows of a run, the page."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import targets  # noqa: E402


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_commands_parse_and_stand_on_the_page(name):
    target = targets.TARGETS[name]
    command = target.command(name, 0)
    assert command in (ROOT / "docs/reproducing.md").read_text()
    _, script, *flags = shlex.split(command)
    args = importlib.import_module(Path(script).stem).parse_args(flags)
    steps = [int(step) for step in target.published if step != "not said"]
    assert max(steps) <= args.steps and min(steps) == 0
    assert all(step % args.eval_every == 0 for step in steps)


def test_memory_is_that_of_the_page_and_holds_the_weights():
    """16 bytes for each of 1.72e9 trained weights, 2 for each of 4.02e9 frozen ones, are 33 GiB."""
    text = (ROOT / "docs/reproducing.md").read_text()
    sizes = {
        name: targets.peak_gib(each.script, each.flags, each.longest_prompt)
        for name, each in targets.TARGETS.items()
    }
    assert 33 < sizes["math-opd"] < 50
    for name, size in sizes.items():
        assert f"| {size:.1f} GiB |" in next(
            x for x in text.splitlines() if f"`{name}`" in x and "GiB" in x
        )


def examples() -> list[str]:
    """Every command of the pages and docstrings that trains a Qwen3 model, on one line."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += [*(ROOT / "methods").glob("*.py"), *(ROOT / "forks").glob("*.py")]
    found = []
    for path in sorted(files):
        text = re.sub(r"\\{1,2}\n", " ", path.read_text(encoding="utf-8"))
        commands = re.findall(r"^ *(python (?:methods|forks)/.*--student Qwen/.*)$", text, re.M)
        found += [f"{path.relative_to(ROOT)}: {' '.join(each.split())}" for each in commands]
    return found


@pytest.mark.parametrize("example", examples())
def test_an_example_fits_a_gpu_of_80_gb(example, tmp_path, monkeypatch):
    """With prompts of 512 tokens, and some GiB left for what the estimate has not."""
    _, _, command = example.partition(": ")
    _, script, *words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "mixed.jsonl", "tasks.jsonl", "x.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "game.py").write_text(
        "class Game:\n    def reset(self, row): ...\n    def step(self, text): ...\n"
    )
    assert targets.peak_gib(script, shlex.join(words), 512) < 76


def test_a_run_becomes_rows_and_the_table_says_them(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "FILE", tmp_path / "targets.csv")
    assert targets.table().count("not run") == sum(
        len(t.published) for t in targets.TARGETS.values()
    )
    seen = {"device": "NVIDIA H100", "commit": "0123456789abc", "dirty": False}
    said = {"args": {"seed": 3}, "environment": seen}
    (tmp_path / "args.json").write_text(json.dumps(said))
    rows = [{"step": 0, targets.SCORE: 0.47}]
    rows += [
        {"step": n, "loss": 1.0, "step_s": 90.0, "peak_memory_mib": 2048.0} for n in range(1, 26)
    ]
    rows += [{"step": 25, targets.SCORE: 0.61}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = targets.rows_of("math-opd", tmp_path)
    assert [row["minutes"] for row in found] == [0.0, 37.5] and found[1]["peak_gib"] == 2.0
    targets.append(targets.FILE, found, targets.FIELDS)
    assert "| `math-opd` | 25 | 0.604 | 0.610, 1 seeds |" in targets.table()
    assert "| `math-opd` | 50 | 0.636 | not run |" in targets.table()


def test_the_teacher_reads_examples_out_of_another_repository(tmp_path, monkeypatch):
    path = tmp_path / "TuFT/examples/on_policy_distillation/dataset.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        'import nothing\nTEACHER_SYSTEM = ("a " "b")\n'
        'FEWSHOT: list[tuple[str, str]] = [("1+1?", "two"), ("2+1?", "three")]\n'
    )
    monkeypatch.chdir(tmp_path)
    targets.tuft_texts.cache_clear()
    turns = targets.tuft_teacher({"question": "3+1?"}, [], [], None)
    assert [turn["content"] for turn in turns] == ["a b", "1+1?", "two", "2+1?", "three", "3+1?"]
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 2, "user"]
    targets.tuft_texts.cache_clear()
