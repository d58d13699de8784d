"""The claims of toy/README.md, each recomputed here; and the tables, figures and command line."""

from __future__ import annotations

import functools
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toy import estimators as es
from toy import exact, mdp, study
from toy.mdp import Process
from toy.tables import read_csv, summary, write_csv

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "toy" / "README.md").read_text()
BUILD = study.GROWING


@functools.cache
def variance(case: str, horizon: int, gamma: float | None) -> float:
    """Exact variance; gamma None is the sequence-level form that is not causal."""
    process = BUILD[case](horizon)
    kind = es.sequence_level(process) if gamma is None else es.discounted(process, gamma)
    return exact.moments(process, kind).trace_cov


def last_slope(case: str, gamma: float | None) -> float:
    return math.log2(variance(case, 1024, gamma) / variance(case, 512, gamma))


# ---- The exponents -------------------------------------------------------------------------------


def test_token_level_attains_slope_two_with_shared_parameters_and_a_persistent_state() -> None:
    assert round(last_slope("persistent, shared", 0.0), 2) == 2.00


@pytest.mark.parametrize(
    "case", ["independent, shared", "persistent, per step", "random MDP, shared"]
)
def test_token_level_has_slope_one_elsewhere(case: str) -> None:
    assert round(last_slope(case, 0.0), 2) == 1.00


@pytest.mark.parametrize("seed", range(5))
def test_with_parameters_per_step_token_level_is_exactly_additive(seed: int) -> None:
    """Blocks are orthogonal, so E |X|^2 <= T B_r^2 B_s^2 on any process: slope at most 1."""
    process = mdp.correlated(8, num_states=4, num_actions=3, stay=0.9, seed=seed).untied()
    largest_cost, largest_score = exact.bound_sizes(process)
    moment = exact.moments(process, es.token_level(process))
    assert moment.second <= 8 * (largest_cost * largest_score) ** 2


@pytest.mark.parametrize("case", list(BUILD))
@pytest.mark.parametrize("gamma", [1.0, None])
def test_sequence_level_attains_slope_three_and_not_four(case: str, gamma: float | None) -> None:
    slope = last_slope(case, gamma)
    assert 2.97 < slope < 3.0
    if case == "persistent, shared" and gamma == 1.0:
        assert round(slope, 2) == 2.98


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_discount_below_one_grows_as_token_level_does(gamma: float) -> None:
    assert round(last_slope("independent, shared", gamma), 2) == {0.5: 1.00, 0.9: 1.02}[gamma]
    assert last_slope("persistent, shared", gamma) < 2.0


def test_the_bound_has_the_closed_forms_of_the_readme() -> None:
    process = mdp.persistent(10)
    largest_cost, largest_score = exact.bound_sizes(process)
    size = (largest_cost * largest_score) ** 2
    assert exact.second_moment_bound(process, 0.0) == pytest.approx(size * 10**2)
    assert exact.second_moment_bound(process, 1.0) == pytest.approx(size * 10**2 * 11 / 2)
    assert exact.second_moment_bound(process, 1.0, causal=False) == pytest.approx(size * 10**3)
    geometric = 10 * sum((1 - 0.25**t) / 0.75 for t in range(1, 11))
    assert exact.second_moment_bound(process, 0.5) == pytest.approx(size * geometric)


@pytest.mark.parametrize("case", list(BUILD))
def test_variance_stays_below_t_cubed_and_passes_t_squared(case: str) -> None:
    for gamma in (0.0, 0.9, 1.0, None):
        process = BUILD[case](1024)
        bound = exact.second_moment_bound(
            process, 1.0 if gamma is None else gamma, gamma is not None
        )
        assert variance(case, 1024, gamma) < bound
    assert variance(case, 1024, 1.0) > exact.second_moment_bound(BUILD[case](1024), 0.0)


def test_variance_ratio_of_gamma_one_to_gamma_zero_at_128() -> None:
    found = {case: variance(case, 128, 1.0) / variance(case, 128, 0.0) for case in BUILD}
    assert found["independent, shared"] == pytest.approx(638.1, rel=1e-3)
    assert found["persistent, shared"] == pytest.approx(23.3, rel=1e-3)
    assert found["persistent, per step"] == pytest.approx(857.7, rel=1e-3)
    assert found["random MDP, shared"] == pytest.approx(639.6, rel=1e-3)


# ---- Bias and error ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_32() -> Process:
    return mdp.random_mdp(32)


def test_token_level_bias_is_small_on_the_random_mdp(random_32: Process) -> None:
    norm = float(np.linalg.norm(exact.sequence_kl_gradient(random_32)))
    found = exact.report(random_32, es.token_level(random_32))
    assert found.bias_sequence / norm == pytest.approx(0.134, abs=5e-4)
    assert found.cosine == pytest.approx(0.992, abs=5e-4)


def test_token_level_wins_below_a_number_of_rollouts(random_32: Process) -> None:
    token, causal = es.token_level(random_32), es.causal_sequence_level(random_32)
    count = study.crossover(random_32, token, causal)
    assert count == pytest.approx(7_474, rel=1e-3)
    with_baseline = es.discounted(random_32, 1.0, baseline=exact.values(random_32, causal)[:-1])
    assert study.crossover(random_32, token, with_baseline) == pytest.approx(1_031, rel=1e-3)
    one, other = exact.report(random_32, token), exact.report(random_32, causal)
    for factor, token_wins in ((0.9, True), (1.1, False)):
        num = int(count * factor)
        assert (one.mean_squared_error(num) < other.mean_squared_error(num)) is token_wins
    assert study.crossover(mdp.persistent(8), *[es.token_level(mdp.persistent(8))] * 2) == math.inf


def test_the_value_baseline_is_worth_more_than_the_full_vocabulary(random_32: Process) -> None:
    causal = es.causal_sequence_level(random_32)
    baseline = exact.values(random_32, causal)[:-1]
    plain = exact.moments(random_32, causal).trace_cov
    with_baseline = es.discounted(random_32, 1.0, baseline=baseline)
    assert plain / exact.moments(random_32, with_baseline).trace_cov == pytest.approx(
        6.88, abs=0.01
    )
    full = exact.moments(random_32, es.full_vocabulary(random_32, 1.0)).trace_cov
    assert plain / full == pytest.approx(1.18, abs=0.01)


def test_the_value_baseline_hurts_token_level(random_32: Process) -> None:
    token = es.token_level(random_32)
    baseline = exact.values(random_32, token)[:-1]
    worse = exact.moments(random_32, es.discounted(random_32, 0.0, baseline=baseline))
    assert worse.trace_cov / exact.moments(random_32, token).trace_cov == pytest.approx(
        1.25, abs=0.01
    )


def test_top_k_trades_bias_for_variance(random_32: Process) -> None:
    norm = float(np.linalg.norm(exact.prefix_kl_gradient(random_32)))
    token = exact.report(random_32, es.token_level(random_32))
    expected = {"renormalise": 0.491, "bucket": 0.328, "score_without_one": 0.527, "drop": 0.728}
    for outside, bias in expected.items():
        found = exact.report(random_32, es.top_k(random_32, 4, outside))  # type: ignore[arg-type]
        assert found.bias_prefix / norm == pytest.approx(bias, abs=1e-3)
        assert found.trace_cov < token.trace_cov
    unbiased = exact.report(random_32, es.top_k(random_32, 4, "score"))
    assert unbiased.bias_prefix / norm < 1e-12
    assert unbiased.trace_cov > token.trace_cov  # the + 1 costs variance


def test_in_the_trap_token_level_points_the_wrong_way() -> None:
    process = mdp.trap(32)
    cosine = {g: exact.report(process, es.discounted(process, g)).cosine for g in (0.0, 0.25, 1.0)}
    assert cosine[0.0] == pytest.approx(-0.990, abs=1e-3)
    assert cosine[0.25] > 0.99 and cosine[1.0] == pytest.approx(1.0)


def test_descent_along_token_level_raises_the_kl_of_the_trap_first() -> None:
    rows = study.descent_rows(160)
    curve = {g: [r["sequence_kl"] for r in rows if r["gamma"] == g] for g in (0.0, 1.0)}
    assert curve[0.0][0] == pytest.approx(107.1, abs=0.1)
    assert max(curve[0.0]) == pytest.approx(149.4, abs=0.2)
    assert np.argmax(curve[0.0]) > 20  # more than 80 steps uphill
    assert curve[0.0][-1] < 1e-3  # and a better end: it has visited what it had to learn
    assert curve[1.0][-1] == pytest.approx(1.207, abs=2e-3)


def test_no_random_mdp_of_the_study_has_a_negative_cosine() -> None:
    rows = read_csv(study.RESULTS / "cosine.csv")
    assert len(rows) == 9 and all(row["processes"] == 200 for row in rows)
    assert min(row["cosine_min"] for row in rows) == pytest.approx(0.496, abs=1e-3)
    again = study.cosine_rows(3)  # the first three seeds of each row
    assert all(a["cosine_min"] >= row["cosine_min"] - 1e-9 for a, row in zip(again, rows))


def test_the_proxy_underestimates_by_one_part_in_m_and_scatters() -> None:
    rows = read_csv(study.RESULTS / "proxy.csv")
    for row in [*rows, *study.proxy_rows(40)]:
        assert abs(row["mean_over_expected"] - 1) < 4.5 * row["standard_error"]
    widest = max(rows, key=lambda row: row["quantile_95_over_expected"])
    assert (widest["process"], widest["gamma"]) == ("persistent, shared", 1.0)
    assert round(widest["quantile_05_over_expected"], 2) == 0.53
    assert round(widest["quantile_95_over_expected"], 2) == 1.50


# ---- Tables, figures, page and command line ------------------------------------------------------


def test_committed_tables_are_what_the_code_computes() -> None:
    committed = {
        (r["process"], r["estimator"], r["horizon"]): r["trace_cov"]
        for r in read_csv(study.RESULTS / "horizon.csv")
    }
    assert len(committed) == len(BUILD) * (len(study.DISCOUNTS) + 1) * len(study.HORIZONS)
    for row in study.horizon_rows((4, 64, 128), num_sampled=10):
        expected = committed[row["process"], row["estimator"], row["horizon"]]
        assert row["trace_cov"] == pytest.approx(expected, rel=1e-8)
    frontier = read_csv(study.RESULTS / "frontier.csv")
    now = [
        row
        for process in (mdp.random_mdp(32), mdp.trap(32))
        for row in study.frontier_rows(process)
    ]
    for row, expected in zip(now, frontier, strict=True):
        for key in ("bias_sequence", "bias_prefix", "variance"):
            assert row[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9)


def test_sampled_points_of_the_figure_agree_with_the_exact_ones() -> None:
    scores = [
        (r["sampled_trace_cov"] - r["trace_cov"]) / r["sampled_standard_error"]
        for r in read_csv(study.RESULTS / "horizon.csv")
        if r["sampled_trace_cov"] != ""
    ]
    assert len(scores) == 4 * 8 * 5 and max(map(abs, scores)) < 4.5


def test_the_page_includes_the_summary_of_the_committed_tables() -> None:
    block = README.split("<!-- results:begin -->\n")[1].split("<!-- results:end -->")[0]
    assert block == summary(study.RESULTS) == (study.RESULTS / "summary.md").read_text()


def test_the_page_names_only_tests_and_figures_that_exist() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 12
    assert not [name for name in named if f"def {name}(" not in sources]
    figures = re.findall(r"\]\((results/\w+\.png)\)", README)
    assert len(figures) > 5
    assert all((ROOT / "toy" / figure).stat().st_size > 10_000 for figure in figures)


def test_results_are_small() -> None:
    assert sum(path.stat().st_size for path in study.RESULTS.iterdir()) < 3_000_000


def test_tables_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "value": 1 / 3, "count": 2, "none": ""}]
    write_csv(tmp_path / "deep" / "table.csv", rows)
    (back,) = read_csv(tmp_path / "deep" / "table.csv")
    assert back["name"] == "a, b" and back["none"] == ""
    assert back["value"] == pytest.approx(1 / 3, rel=1e-9) and back["count"] == 2


def test_without_matplotlib_the_tables_are_written_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import toy

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "toy.figures", raising=False)
    monkeypatch.delattr(toy, "figures", raising=False)
    write_csv(tmp_path / "slopes.csv", read_csv(study.RESULTS / "slopes.csv"))
    write_csv(tmp_path / "horizon.csv", read_csv(study.RESULTS / "horizon.csv"))
    assert study.main(["--figures-only", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed: tables written" in capsys.readouterr().out
    assert "Slope of log variance" in (tmp_path / "summary.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_the_quick_study_writes_every_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "toy.study", "--quick", "--out", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # processor time: the wall clock of a busy machine proves nothing
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    committed = {path.name for path in study.RESULTS.iterdir()} - {"control_sweep.csv"}
    assert {path.name for path in tmp_path.iterdir()} == committed


@pytest.mark.parametrize("flags", [["--part", "c"], ["--out"], ["--unknown"]])
def test_bad_flags_exit_with_two(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        study.main(flags)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err
