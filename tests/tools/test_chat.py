"""`tools/chat.py`: which model of a folder answers, and that it does."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import chat  # noqa: E402

STUDENT = ROOT / "assets/tiny/student"


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 2 and 10, and a half-written one of step 12."""
    for step in (2, 10, 12):
        folder = tmp_path / f"checkpoints/step_{step}"
        shutil.copytree(STUDENT, folder / "model")
        (folder / "trainer").mkdir()
        (folder / "trainer/x").write_text("x")
        files = [path for path in folder.rglob("*") if path.is_file()]
        manifest = {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        }
        if step != 12:
            (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "args.json").write_text(json.dumps({"args": {"system": "be brief"}}))
    return tmp_path


def test_the_newest_complete_checkpoint_answers(run):
    newest = run / "checkpoints/step_10/model"
    assert chat.model_of(run, None) == (newest, {"system": "be brief"})
    assert chat.model_of(run, 2)[0] == run / "checkpoints/step_2/model"
    assert chat.model_of(run / "checkpoints/step_10", None) == (newest, {"system": "be brief"})
    assert chat.model_of(newest, None) == (newest, {"system": "be brief"})
    assert chat.model_of(STUDENT, None) == (STUDENT, {})


def test_one_prompt_is_answered(capsys):
    how = ["--prompt", "Nora has 8 keys.", "--temperature", "0", "--max-completion-tokens", "8"]
    assert chat.main([str(STUDENT), *how]) == 0
    first = capsys.readouterr().out
    assert first.strip() and chat.main([str(STUDENT), *how]) == 0
    assert capsys.readouterr().out == first  # greedy


def test_a_run_answers_with_its_system_message_and_names_its_template(run, capsys, monkeypatch):
    flags = {"system": "be brief", "prompt_template": "{question} Go."}
    (run / "args.json").write_text(json.dumps({"args": flags}))
    asked = []
    monkeypatch.setattr(chat, "answer", lambda lm, _, said, *more: asked.append(said) or "")
    assert chat.main([str(run), "--prompt", "Nora has 8 keys."]) == 0
    system, user = asked[0][:2]
    assert system == {"role": "system", "content": "be brief"}
    assert user == {"role": "user", "content": "Nora has 8 keys."}
    assert "--prompt-template '{question} Go.'" in capsys.readouterr().err


def test_a_folder_without_a_model_is_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(run), "--step", "3"])
    assert stop.value.code == 2 and "complete ones: [2, 10]" in capsys.readouterr().err
