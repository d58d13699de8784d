"""The rooms: what may import what. A line of a method is in its file, an op in `opd_ops`, and all
that surrounds a run in `opd_run`, whose modules are layered."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [
    ["console"],
    ["ranks", "files", "alarms", "compat", "verdicts", "live"],
    ["verifier", "data", "rollouts", "environments", "folder", "command", "machine"],
    ["models", "views"],
    ["adapters", "offload"],
    ["vllm_sampler", "served_teacher", "checkpoints"],
    ["setup", "memory", "retry"],
    ["diagnose", "selfcheck"],
    ["run", "flags"],
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(text: str) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def against_the_layers(name: str, text: str) -> list[str]:
    """What a module of `opd_run` imports and may not."""
    found = []
    for module in sorted(imports(text)):
        room, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if room in ("methods", "forks", "tools", "benchmarks", "tests", "toy"):
            found.append(f"{name} imports {module}: not its room")
        elif room == "opd_run" and LAYER.get(other, len(LAYERS)) >= LAYER[name]:
            found.append(f"{name} imports {other}: not of a lower layer")
    return found


def test_every_module_has_a_layer():
    assert sorted(LAYER) == sorted(
        path.stem for path in (ROOT / "opd_run").glob("*.py") if path.stem != "__init__"
    )


@pytest.mark.parametrize("name", sorted(LAYER))
def test_modules_import_from_lower_layers_only(name):
    assert not against_the_layers(name, (ROOT / f"opd_run/{name}.py").read_text())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("console", "from opd_run import ranks"),
        ("models", "from opd_run.setup import prepare"),
        ("models", "def f():\n    from opd_run import adapters"),
        ("data", "from opd_run import rollouts"),
        ("run", "import tools.report"),
    ],
)
def test_an_import_from_above_is_seen(name, line):
    text = (ROOT / f"opd_run/{name}.py").read_text()
    assert len(against_the_layers(name, f"{text}\n\n{line}\n")) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "opd_ops").glob("*.py")), ids=lambda p: p.stem)
def test_the_ops_import_torch_and_themselves(path):
    rooms = {module.split(".")[0] for module in imports(path.read_text())}
    assert rooms <= {"torch", "opd_ops"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((ROOT / "opd_run").glob("*.py")), ids=lambda p: p.stem)
def test_the_packages_of_users_are_imported_where_they_are_used(path):
    """Optional packages at the top of a module would make them required."""
    tree = ast.parse(path.read_text())
    top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    plain = "\n".join(
        ast.unparse(n) for n in top.body if isinstance(n, (ast.Import, ast.ImportFrom))
    )
    rooms = {module.split(".")[0] for module in imports(plain)}
    needed = {"torch", "transformers", "numpy", "tqdm", "safetensors", "opd_ops", "opd_run"}
    assert rooms <= needed | set(sys.stdlib_module_names)


# What a method file may call of `opd_run`: plumbing, whose docstring may say that it changes no
# number. What is added here has to be read with that question.
PLUMBING = {
    "checkpoints": {"load", "save"},
    "command": {"command"},
    "compat": {"Facts", "check_prompts", "prompt_ids"},
    "data": {
        *("Prompt", "Source", "asks_functions", "completions_of", "load_sets", "messages_of"),
        *("plain", "user_text", "value_of"),
    },
    "diagnose": {
        *("num_not_finite", "of_evaluation", "of_step", "offending", "pass_metrics", "places"),
        *("rollout_metrics", "samples", "token_metrics"),
    },
    "environments": {"of"},
    "files": {"TINY"},
    "flags": {"flag", "new_parser", "parse", "refuse", "without_teacher"},
    "memory": {"say"},
    "models": {"CausalLM"},
    "ranks": {
        *("cat", "share", "start", "sum_gradients", "total", "unsharded", "whole"),
    },
    "retry": {"fit_memory", "in_chunks", "micro_batches", "of_tokens"},
    "rollouts": {
        *("begun", "blank", "by_teacher", "gather", "join", "left_padded", "record"),
        *("right_padded", "scattered", "select", "shaped"),
    },
    "run": {"Run", "say_plan"},
    "selfcheck": {"check_models"},
    "setup": {"load_lm", "load_models", "prepare", "token_ids", "zero_moments"},
    "verifier": {"Verifier"},
    "views": {"decay_of", "of", "show_attempts"},
    "vllm_sampler": {"fill_by_vllm"},
}


def test_what_the_method_files_call_is_on_the_list():
    used: dict[str, set[str]] = {}
    for path in [*(ROOT / "methods").glob("*.py"), *(ROOT / "forks").glob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        modules = {a.name for node in imported if node.module == "opd_run" for a in node.names}
        for node in imported:
            room, _, module = (node.module or "").partition(".")
            if room == "opd_run" and module:
                used.setdefault(module, set()).update(alias.name for alias in node.names)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    used.setdefault(node.value.id, set()).add(node.attr)
    assert used == PLUMBING
