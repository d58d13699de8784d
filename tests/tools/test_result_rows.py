"""benchmarks/rows.py: rows are appended, never rewritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]
import rows  # noqa: E402


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_with_fewer_columns_keeps_its_lines(tmp_path, end):
    path = tmp_path / "old.csv"
    old = f'op,ms{end}"a, b",1.50{end}'
    path.write_bytes(old.encode())
    rows.append(path, [{"ms": 2, "device": "x", "op": "c", "unknown": 3}, {"op": "d"}], "device,op")
    text = path.read_bytes().decode()
    assert text == f'op,ms,device{end}"a, b",1.50{end}c,2,x{end}d,,{end}'
    assert [row["device"] for row in rows.read(path)] == ["", "x", ""]


def test_a_new_file_has_the_columns_that_were_asked_for(tmp_path):
    path = tmp_path / "folder/new.csv"
    rows.append(path, [{"b": 1}], ["a", "b"])
    rows.append(path, [{"a": 2}], ["a", "b"])
    assert path.read_text() == "a,b\n,1\n2,\n"
    assert rows.read(tmp_path / "none.csv") == []


def test_the_newest_row_of_a_case_counts():
    found = rows.newest([{"op": "a", "n": "1"}, {"op": "b", "n": "2"}, {"op": "a", "n": "3"}], "op"
                        .split())  # fmt: skip
    assert [(key, row["n"]) for key, row in found.items()] == [(("a",), "3"), (("b",), "2")]


def test_committed_rows_can_be_read():
    for path in rows.RESULTS.glob("*.csv"):
        found = rows.read(path)
        may_be_empty = path.name == "targets.csv"  # a reader fills it
        assert (found or may_be_empty) and all(None not in row for row in found), (
            path
        )  # no row is longer than its head


def test_a_row_says_commit_and_dirty(monkeypatch):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    if commit.returncode == 0:
        assert rows.environment()["commit"] == commit.stdout[:10]
    given = rows.environment(commit="0123456789abcdef-dirty")
    assert given["commit"] == "0123456789" and given["dirty"] is True
    assert rows.environment(commit="0123456789abcdef")["dirty"] is False
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    with pytest.raises(RuntimeError, match="--commit"):
        rows.environment()


def test_rows_that_were_just_written_make_no_tree_dirty(tmp_path):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *command], check=True, capture_output=True)

    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/ops.csv"):
        (tmp_path / name).write_text("a\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    clean = rows.commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "benchmarks/results/ops.csv").write_text("a\nb\n")
    assert rows.commit_of(tmp_path) == clean
    (tmp_path / "code.py").write_text("b\n")
    assert rows.commit_of(tmp_path) == clean + "-dirty"
    with pytest.raises(RuntimeError, match="no git repository"):
        rows.commit_of(tmp_path / "nowhere")
