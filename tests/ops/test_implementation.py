"""Which implementation runs, and that it says so: instruction sets, environment, documentation."""

import ast
import doctest
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opd_ops
from opd_ops import _dispatch, _ops, reference

ROOT = Path(__file__).resolve().parents[2]
OPS = [name for name in opd_ops.__all__ if name != "info"]
SOURCES = [ROOT / "opd_ops/__init__.py", ROOT / "opd_ops/reference.py"]
SOURCES += sorted((ROOT / "opd_ops").glob("_*.py"))[1:]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPD_OPS_REQUIRE": "", **environment},
    )  # fmt: skip


def test_compiled_ops_run_in_this_session():
    info = opd_ops.info()
    assert info["compiled"] and info["notice"] is None
    assert info["ops"]["token_logp"]["cpu"] == "cpp"
    assert info["built_with_torch"] and info["compiler"] and "-O3" in info["flags"]
    json.dumps(info)  # goes into args.json


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets(isa):
    """All row tests again with a lower instruction set of the same library, and `scale_out`."""
    from opd_ops import _build_info

    if ["portable", "avx2", "avx512"].index(_build_info.best_isa()) <= ["portable", "avx2"].index(
        isa
    ):
        assert isa != "portable" or _build_info.best_isa() == "portable"
        return  # the main session has run it already, or the processor lacks it
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider",
         "tests/ops/test_rows.py", "tests/ops/test_losses.py::test_scale"],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OPD_OPS_ISA": isa, "OPD_OPS_REQUIRE": "cpp"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_the_forced_instruction_set_is_the_one_that_runs():
    """Different vector widths add in different order, so some last bits differ; ids never do."""
    code = (
        "import torch, opd_ops; torch.manual_seed(0); z = torch.randn(64, 5000) * 5;"
        "lse = opd_ops.token_logp(z, None, torch.zeros(64, dtype=torch.int64)).lse;"
        "ids = opd_ops.topk_logp(z.round(), None, 32)[0];"
        "print(opd_ops.info()['isa'], lse.double().tolist(), ids.tolist(), sep='|')"
    )
    seen = {}
    for isa in ("portable", "avx2", "avx512"):
        done = run(code, OPD_OPS_ISA=isa)
        if done.returncode != 0:
            assert "this processor has" in done.stderr
            continue
        name, lse, ids = done.stdout.strip().split("|")
        assert name == isa
        seen[isa] = (ast.literal_eval(lse), ids)
    assert "portable" in seen
    base = seen.pop("portable")
    for lse, ids in seen.values():
        assert lse != base[0] and max(abs(a - b) for a, b in zip(lse, base[0])) < 2e-6
        assert ids == base[1]


def test_environment():
    status = "import opd_ops; i = opd_ops.info(); print(i['compiled'], i['isa'], i['notice'])"
    for name in ("plain", "reference"):  # its old name
        done = run(status, OPD_OPS_IMPL=name)
        assert done.stdout.startswith("False None opd_ops runs as plain PyTorch")
        assert "OPD_OPS_IMPL=plain" in done.stdout
    done = run("import opd_ops", OPD_OPS_IMPL="cpp", OPD_OPS_ISA="nonsense")
    assert done.returncode != 0 and "OPD_OPS_ISA: expected portable" in done.stderr


def test_what_cuda_kernels_do_not_take_runs_as_plain_pytorch_and_says_so(monkeypatch):
    """As on a CUDA device: float64, and K over 1,024."""
    monkeypatch.setattr(_dispatch, "_LIMITED", ("cpu",))
    z, ids = torch.randn(2, 1500), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="token_logp: .* does not take float64; plain") as w:
        logp = opd_ops.token_logp(z.double(), None, ids).logp
    assert w[0].filename == __file__
    assert torch.equal(logp, reference.token_logp(z.double(), None, ids).logp)
    with pytest.warns(UserWarning, match="topk_logp: .* does not take k = 1025 > 1024") as w:
        found = opd_ops.topk_logp(z, None, 1025)
    assert w[0].filename == __file__
    assert torch.equal(found.ids, reference.topk_logp(z, None, 1025).ids)
    monkeypatch.setattr(_dispatch, "_DEVICES", ())
    monkeypatch.setattr(_dispatch, "_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="OPD_OPS_IMPL=cpp, but it is not compiled for cpu"):
        opd_ops.token_logp(z, None, ids)


def test_bad_environment(monkeypatch):
    for name in ("_IMPL", "_REQUIRED"):
        with monkeypatch.context() as patch:
            patch.setattr(_dispatch, name, "nonsense")
            with pytest.raises(ImportError, match="nonsense"):
                _dispatch._load()


def test_without_the_library(tmp_path):
    """A checkout that was not built: the reference runs and says so; OPD_OPS_REQUIRE refuses."""
    package = tmp_path / "opd_ops"
    package.mkdir()
    for source in SOURCES:
        (package / source.name).write_text(source.read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, opd_ops;"
        f"assert opd_ops.__file__.startswith({str(tmp_path)!r});"
        "print(opd_ops.info()['notice']);"
        "print(opd_ops.token_logp(torch.zeros(1, 2), None, torch.tensor([0]))[0].item())"
    )
    done = run(code)
    assert "libopd_ops.so was not built" in done.stdout and "-0.693" in done.stdout, done.stderr
    done = run(code, OPD_OPS_REQUIRE="cpp")
    assert done.returncode != 0 and "ImportError" in done.stderr and "pip install" in done.stderr


def test_the_ops_are_six_and_import_torch_only():
    """What the package of ops is: it can be copied into another project."""
    assert sorted(OPS) == sorted(_dispatch.OPS) and len(OPS) == 6
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "opd_ops"} | sys.stdlib_module_names, (source, name)


def test_signatures_and_documentation_match_the_reference():
    for name in OPS:
        op, spec = getattr(opd_ops, name), getattr(reference, name)
        assert inspect.signature(op) == inspect.signature(spec), name
        assert op.__doc__ == spec.__doc__ and ">>>" in op.__doc__, name
        for part in ("Args:", "Returns:", "Gradient"):
            assert part in op.__doc__, (name, part)
        documented = op.__doc__
        assert all(argument in documented for argument in inspect.signature(op).parameters), name
    assert sorted(reference.__all__) == sorted(OPS)


@pytest.mark.parametrize("module", [opd_ops, reference, _ops])
def test_doctests(module):
    """The examples run with the reference ops, and again with the compiled ones (_ops)."""
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0 and result.attempted >= 2
