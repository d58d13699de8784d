"""`--report-to` shows every number that is in `metrics.jsonl`."""

from __future__ import annotations

import sys
import types

import opd
import pytest

from opd_run import files

FLAGS = "--steps 2 --prompts-per-step 2 --rollouts-per-prompt 1 --max-completion-tokens 16"
FLAGS += " --eval-every 0 --save-every 0 --device cpu"


def run(folder, kind: str, *more: str) -> dict[tuple[int, str], float]:
    """Two steps with a live view; what the file says, by step and key."""
    opd.main([*FLAGS.split(), "--run-dir", str(folder), "--report-to", kind, *more])
    return {
        (row["step"], key): value
        for row in files.read_metrics(folder)
        for key, value in row.items()
        if isinstance(value, float)
    }


def test_tensorboard_has_every_number_of_the_file(tmp_path):
    pytest.importorskip("tensorboard")
    logged = run(tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    seen = {
        (event.step, key): event.value
        for key in events.Tags()["scalars"]
        for event in events.Scalars(key)
    }
    assert {key for step, key in logged} >= {"loss", "grad_norm", "log_ratio_mean"}
    missing = {at for at in logged if at not in seen}
    assert not missing
    assert all(
        seen[at] == pytest.approx(value, rel=1e-5, nan_ok=True) for at, value in logged.items()
    )


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_number_of_the_file(tmp_path, monkeypatch, kind):
    """Both have `init(project, name, config)` and `log(metrics, step)`; a stand-in records them."""
    seen, opened = {}, {}
    session = types.SimpleNamespace(
        log=lambda metrics, step: seen.update({(step, key): v for key, v in metrics.items()})
    )

    def init(**how):
        opened.update(how)
        return session

    monkeypatch.setitem(sys.modules, kind, types.SimpleNamespace(init=init))
    logged = run(tmp_path / "run", kind)
    assert opened["project"] == "opd" and opened["name"] == "run"
    assert opened["config"]["steps"] == 2
    assert opened.get("dir") == (str(tmp_path / "run") if kind == "wandb" else None)
    assert logged and all(seen[at] == value for at, value in logged.items())


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_anything_is_lost(tmp_path, monkeypatch, capsys, kind):
    """Before models are loaded, and before `--overwrite` deletes the run that is there."""
    run(tmp_path / "run", "none")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setattr(opd.setup, "load_models", lambda *_: pytest.fail("models were loaded"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", kind, "--overwrite")
    assert stop.value.code != 0
    assert f"--report-to {kind} needs {kind}" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
