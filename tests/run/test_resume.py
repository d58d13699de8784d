"""Exact resume: k steps, a kill, and the rest are an undisturbed run, bit for bit, in all methods.

The kill is an exception that nothing catches, raised where a real one would hurt; real ones, with
SIGKILL, are tried by tests/faults/runner.py.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path

import opd
import pytest
import tinylm
import torch
from safetensors.torch import load_file

from opd_run import files

HERE = Path(__file__).parent

METHODS = {
    "opd": ["--updates-per-rollout", "2", "--discount", "0.5"],
    "sg_opd": ["--teacher-share", "0.5", "--teacher-phase-steps", "4", "--gate-control", "random"],
    "exopd": [],
    "topk_opd": ["--support-size", "8"],
    "tropd": [],
}
POINTS = {  # which call after the first checkpoint, that of step 2, is the last one
    "collect": 2, "token_loss": 5, "evaluate": 1, "checkpoints.save": 1,
    "diagnose.rollout_metrics": 2,
}  # fmt: skip


class Killed(BaseException):
    """What no `except Exception` sees, like a SIGKILL."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tinylm.save_model(folder / "student", 0, eos_token_id=[1, 7])
    tinylm.save_model(folder / "teacher", 1)
    tinylm.save_prompts(folder / "prompts.jsonl", 7)  # an epoch ends within the run
    (folder / "coin_of.py").write_text("def f(text, *_):\n    return sum(text.encode()) % 2 == 1\n")
    return folder


def flags(folder, method: str, run: str, *more: str) -> list[str]:
    argv = f"--student {folder}/student --teacher {folder}/teacher --prompts {folder}/prompts.jsonl"
    argv += f" --test-prompts {folder}/prompts.jsonl --run-dir {folder}/{method}_{run} --device cpu"
    argv += f" --verifier {folder}/coin_of.py:f --max-completion-tokens 8 --prompts-per-step 3"
    argv += " --rollouts-per-prompt 2 --steps 5 --save-every 2 --eval-every 2 --eval-samples 2"
    argv += " --lr 1e-2 --lr-schedule cosine --warmup-steps 2"
    return [*argv.split(), *METHODS[method], *more]


def state(folder, method: str, run: str) -> tuple[dict, list]:
    """Final weights and moments, and everything that was logged but what a clock decides."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    path = folder / f"{method}_{run}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is unavailable")
        reader = FileSystemReader(path / "checkpoints/step_5/trainer")
        trainer = _load_state_dict_from_keys(storage_reader=reader)
    tensors = load_file(path / "checkpoints/step_5/model/model.safetensors")
    flat = {f"model {name}": value for name, value in tensors.items()}
    for weight, moments in trainer["optimizer"]["state"].items():
        flat |= {f"{weight} {name}": value for name, value in moments.items()}
    logs = [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_mib"))}
        for name in ("metrics", "samples", "tokens")
        for line in (path / f"{name}.jsonl").read_text().splitlines()
    ]
    return flat, logs


@pytest.mark.parametrize("method", list(METHODS))
def test_resume_is_exact(folder, method, monkeypatch):
    """Killed in generation, update, evaluation, a half-written checkpoint and between: the same
    bits of weights and moments, the same data, samples, schedule, phases and evaluations."""
    module = importlib.import_module(method)
    module.main(flags(folder, method, "whole"))
    tensors, logs = state(folder, method, "whole")
    if method in ("sg_opd", "tropd"):  # the phase is there before and after the kills
        key = {"sg_opd": "teacher_share", "tropd": "guided_share"}[method]
        shares = [row[key] for row in logs if key in row]
        assert shares[0] > 0 and shares[2] > 0 and shares[4] == 0
    for point in POINTS if method == "opd" else ("collect", "evaluate"):  # the loop is shared
        where, _, name = point.rpartition(".")
        owner = getattr(module, where) if where else module
        whole, calls = getattr(owner, name), []
        first = folder / f"{method}_{name}/checkpoints/step_2"

        def dies(*args, calls=calls, whole=whole, point=point, first=first, **more):
            calls.extend([1] * first.exists())
            found = whole(*args, **more)
            if len(calls) == POINTS[point]:
                raise Killed
            return found

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(Killed):
                module.main(flags(folder, method, name))
        module.main(flags(folder, method, name, "--resume"))
        found, found_logs = state(folder, method, name)
        assert found.keys() == tensors.keys() and len(tensors) > 60
        assert not [key for key in tensors if not tensors[key].equal(found[key])], point
        assert found_logs == logs, point
        left = sorted(path.name for path in (folder / f"{method}_{name}/checkpoints").iterdir())
        assert left == ["step_4", "step_5"], point


def test_a_run_of_version_0_1_goes_on(tmp_path, monkeypatch, capsys):
    """Stored by opd.py of 0.1 after one of two steps: this version's second step is that one's.

    `after_step_2` are the weights that 0.1 had then, and `metrics.jsonl` has both steps.
    """
    shutil.unpack_archive(HERE / "run_of_0.1.tar.gz", tmp_path)
    monkeypatch.chdir(tmp_path)
    want = files.read_metrics(Path("run"))[-1]
    opd.main(["--student", "student", "--teacher", "teacher", "--prompts", "prompts.jsonl",
              "--test-prompts", "prompts.jsonl", "--steps", "2", "--prompts-per-step", "3",
              "--rollouts-per-prompt", "2", "--max-completion-tokens", "8", "--lr", "1e-2",
              "--weight-decay", "0.1", "--eval-every", "0", "--diagnostic-tokens", "0",
              "--device", "cpu", "--run-dir", "run", "--resume"])  # fmt: skip
    assert "commit was" in capsys.readouterr().out
    found = [row for row in files.read_metrics(Path("run")) if row["step"] == 2 and "loss" in row]
    assert found[0]["loss"] == pytest.approx(want["loss"], abs=1e-5) and want["step"] == 2
    mine = load_file("run/checkpoints/step_2/model/model.safetensors")
    theirs = load_file("after_step_2.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)
    old = load_file("run/checkpoints/step_1/model/model.safetensors")
    assert not all(torch.allclose(old[name], theirs[name], atol=1e-4) for name in old)
