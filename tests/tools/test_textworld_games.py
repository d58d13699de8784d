"""tools/textworld_games.py: its error without TextWorld, and with it (`-m agents`) its games."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import agent_opd
import pytest
import tinylm

from opd_run import environments
from opd_run.console import RunError
from opd_run.files import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SPEC = f"{ROOT / 'tools/textworld_games.py'}:Game"


def test_without_textworld_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(RunError, match="needs textworld: pip install textworld"):
        environments.of(SPEC)


@pytest.fixture
def games(tmp_path, monkeypatch):
    """The module, whose compiled games lie in a folder of the test, and its two files."""
    monkeypatch.setenv("OPD_TEXTWORLD", str(tmp_path / "games"))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("textworld_games")
    module.main(["--out", str(tmp_path), "--train", "2", "--test", "1"])
    return module


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.agents
def test_games_are_won_by_their_answers(games, tmp_path):
    rows = rows_of(tmp_path / "train.jsonl") + rows_of(tmp_path / "test.jsonl")
    assert len({row["prompt"] for row in rows}) == 3
    for row in rows:
        *before, last = row["answer"].split(", ")
        game, again = games.Game(), games.Game()
        first = game.reset(row)
        assert first == again.reset(row) and last in first
        for text in ("save", "", "x" * 5000, "look\nquit", "Inventory.", *before):
            said, done, success = game.step(text)
            assert (said, done, success) == again.step(text) and not done and not success
            assert said.splitlines()[-1].startswith("Commands: ")
            assert not re.search(r"^>|\d/\d|  ", said, re.M)
            refused = said.startswith("That is not one of the commands.")
            assert refused == (text in ("save", "", "x" * 5000))
        assert game.step(f" {last.upper()}.\nand more") == ("", True, True)


@pytest.mark.agents
def test_a_game_that_is_missing_is_made_again(games, tmp_path):
    (row,) = rows_of(tmp_path / "test.jsonl")
    first, game = games.Game().reset(row), games.game_of(row)
    game.unlink()
    assert games.Game().reset(row) == first and game.exists()
    assert {path.suffix for path in game.parent.iterdir()} == {".json", ".z8"}  # nothing half made


@pytest.mark.agents
def test_agent_opd_plays(games, tmp_path):
    for seed, name in enumerate(("student", "teacher")):
        tinylm.save_model(tmp_path / name, seed, max_position_embeddings=4096)
    paths = {"student": "student", "teacher": "teacher", "run-dir": "run"}
    paths |= {"prompts": "train.jsonl", "test-prompts": "test.jsonl"}
    named = [f"--{flag}={tmp_path / name}" for flag, name in paths.items()]
    sizes = "--max-turns 2 --max-turn-tokens 4 --max-completion-tokens 600 --prompts-per-step 2"
    few = "--rollouts-per-prompt 1 --steps 1 --eval-every 1 --eval-samples 1 --device cpu"
    agent_opd.main([*named, f"--environment={SPEC}", *f"{sizes} {few}".split()])
    (row,) = [row for row in read_metrics(tmp_path / "run") if "turns_mean" in row]
    assert row["turns_mean"] == 2.0  # a random model does not win
    assert 0 < row["in_turn_2_mean"] < 1 and row["num_untrained_tokens"] > 100
