"""benchmarks/bench_ops.py at a size where nothing can be timed: that it runs, what it covers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import opd_ops
from opd_ops import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import bench_ops  # noqa: E402
import render_docs  # noqa: E402

TINY = "--rows 4 --vocab 301 --width 16 --threads 1 --repeats 1".split()


@pytest.fixture
def bench(monkeypatch):
    """Run the script with flags; the rows that it would append, by which all are text."""

    def run(*flags: str) -> list[dict[str, str]]:
        table: list[dict] = []
        with monkeypatch.context() as patch:
            patch.setattr(bench_ops.results, "append", lambda path, rows, names: table.extend(rows))
            patch.setattr(sys, "argv", ["bench_ops.py", *flags, *TINY])
            bench_ops.main()
        return [{key: str(value) for key, value in row.items()} for row in table]

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "autocast"])
def test_every_public_op_is_timed_beside_a_baseline(bench, dtype):
    found = bench("--k", "8", "--no-compile", "--dtype", dtype)
    ops = {row["op"].split()[0] for row in found} - {"memory"}
    assert ops == set(opd_ops.__all__) - {"info"}
    for op in ops:
        names = {row["implementation"] for row in found if row["op"].split()[0] == op}
        assert "opd_ops" in names and len(names) > 1, f"{op} stands alone"
    heads = {row["op"].split()[0] for row in found if row["width"]}
    assert heads == (set() if dtype == "float16" else ops)


def test_ops_are_chosen_by_how_their_names_start(bench):
    found = bench("--k", "8", "--no-compile", "--ops", "ga")
    assert {row["op"] for row in found} == {"memory", "gather_logp", "gated_kl"}


def test_the_table_in_the_readme_is_filled_by_make_bench_short(bench):
    """What `make bench-short` runs, small; its rows, said to be of the table's size, fill it."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^bench-short:.*?bench_ops.py (.*?[^\\])\n\t", makefile, re.M | re.S)
    assert recipe is not None
    found = bench(*recipe[1].replace("\\\n", " ").split())
    assert render_docs.ops_table(found).count("not measured") == 5 * 4  # they are of another size
    for row in found:
        row |= render_docs.OPS_SIZE
    cells = r"\d+ ms \| \d+ ms \([\d.e+]+x\) \| \d+ MiB \| \d+ MiB"
    lines = render_docs.ops_table(found).splitlines()[2:]
    assert len(lines) == 5
    assert all(re.fullmatch(rf"\|.*\|.*\| {cells} \|", line) for line in lines), lines
    without = [row for row in found if row["op"] != "gated_kl"]
    assert render_docs.ops_table(without).count("not measured") == 4


def test_the_table_of_the_loss_is_filled_by_the_command_beside_it(bench):
    page = (ROOT / "docs/benchmarks.md").read_text()
    section = page.split("### The loss of sampled tokens")[1]
    command = re.search(r"bench_ops.py (.*?)```", section, re.S)
    assert command is not None
    found = bench(*command[1].replace("\\\n", " ").split())
    assert {row["op"] for row in found} == {"gated_kl"}
    assert bench_ops.loss_table(found).count("not measured") == 6 * 6  # they are of another size
    for row in found:
        row |= {"rows": "2048", "vocab": "151936", "width": "1024", "threads": "2"}
    lines = bench_ops.loss_table(found).splitlines()[2:]
    assert [line.count("not measured") for line in lines] == [6, 1] * 3
    assert all("x |" in line and "MiB" in line for line in lines[1::2])


def test_autocast_is_of_the_calls_and_casts_at_each():
    """A head that stays cast from call to call would flatter what casts it at once."""
    head, hidden = torch.randn(40, 8, requires_grad=True), torch.randn(3, 8)
    seen = []
    call = bench_ops.lowered(lambda: seen.append(torch.nn.functional.linear(hidden, head)), "cpu")
    call()
    with torch.no_grad():
        head.zero_()
    call()
    assert [each.dtype for each in seen] == [torch.bfloat16] * 2
    assert seen[0].any() and not seen[1].any()


def test_baselines_compute_what_the_ops_compute():
    torch.manual_seed(0)
    z, teacher, logp = torch.randn(5, 40), torch.randn(5, 40), torch.randn(5, 3).log_softmax(-1)
    ids = torch.stack([torch.randperm(40)[:3] for _ in range(5)])
    support = reference.support_kl(z, None, ids, logp).loss
    torch.testing.assert_close(bench_ops.torch_support_kl(z, ids, logp).sum(), support.sum())
    jsd = reference.full_kl(z, None, teacher, None, divergence="jsd", beta=0.5).loss
    torch.testing.assert_close(bench_ops.torch_jsd(z, teacher).sum(), jsd.sum())


def test_peak_memory_counts_what_a_call_takes_and_gives_back():
    def call() -> None:
        torch.zeros(16, 2**20)  # 64 MiB of float32, gone when the call returns

    call()
    assert 60 <= int(bench_ops.peak_mib(call, "cpu")) <= 80
    kept = torch.ones(16, 2**20)  # was there before
    assert int(bench_ops.peak_mib(lambda: kept.sum(), "cpu")) <= 8
