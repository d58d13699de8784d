"""What can be grepped of the promises in CONTRIBUTING.md, Security."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("methods", "forks", "opd_ops")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]


def dangerous(text: str) -> list[str]:
    """Calls that run data as code, and loading of models that may."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, named = ast.unparse(node.func), {each.arg: each.value for each in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "pickle.load", "torch.jit.load"):
            found.append(name)
        if name == "torch.load" and ast.unparse(named.get("weights_only", node)) != "True":
            found.append("torch.load without weights_only=True")
        if "shell" in named:
            found.append("a shell")
        loads = (
            name.endswith((".from_pretrained", ".from_config")) and "GenerationConfig" not in name
        )
        if loads and "trust_remote_code" not in named and None not in named and "Peft" not in name:
            found.append(f"{name} without --trust-remote-code")
        if name.endswith("AutoModelForCausalLM.from_pretrained") and (
            ast.unparse(named.get("use_safetensors", node)) != "True"
        ):
            found.append(f"{name} without use_safetensors=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_runs_data_as_code(path):
    assert not dangerous(path.read_text())


def test_remote_code_is_off_unless_asked():
    import opd

    assert opd.parse_args([]).trust_remote_code is False
    assert opd.parse_args(["--trust-remote-code"]).trust_remote_code is True


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "exec(text)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)", "pickle.load(file)", "AutoConfig.from_pretrained(path)",
        "transformers.AutoModelForCausalLM.from_pretrained(path, **trust)",
    ],
)  # fmt: skip
def test_the_rules_see(line):
    assert dangerous(line)
