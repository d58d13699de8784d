"""Run the toy study: `python -m toy.study [--part a|b|sweep] [--quick] [--out FOLDER]`.

Part A is exact (tabular processes), part B the control task of arXiv:2603.25562v2 appendix E, part
sweep repeats part B over what the paper leaves out. Each writes CSV tables, PNG figures (with
matplotlib) and a Markdown summary; into `toy/results` the summary also goes into toy/README.md.
All randomness is seeded; only the timings in cost.csv differ from run to run.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from toy import estimators as es
from toy import exact, mdp
from toy.mdp import Process
from toy.tables import Rows, include, summary, write_csv

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICK_RESULTS = Path("runs") / "toy-quick"
DISCOUNTS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
HORIZONS = tuple(2**i for i in range(2, 11))  # 4 ... 1,024


# ---- Part A, 1: variance against the horizon -----------------------------------------------------

# the same 16 states and 4 actions, random policies one nat apart, in four environments
GROWING: dict[str, Callable[[int], Process]] = {
    "independent, shared": lambda horizon: mdp.independent(horizon),
    "persistent, shared": lambda horizon: mdp.persistent(horizon),
    "persistent, per step": lambda horizon: mdp.persistent(horizon).untied(),
    "random MDP, shared": lambda horizon: mdp.random_mdp(horizon, num_states=16, num_actions=4),
}


def horizon_rows(horizons: Sequence[int], num_sampled: int = 4_000) -> Rows:
    """Exact variance, its bound and, up to T = 64, a sampled estimate with its standard error."""
    rows: Rows = []
    for case, build in tqdm(GROWING.items(), desc="variance against T"):
        for horizon in horizons:
            process = build(horizon)
            sampled = horizon <= 64
            rng = np.random.default_rng(horizon)
            rollouts = mdp.sample(process, num_sampled if sampled else 1, rng)
            kinds = [es.discounted(process, gamma) for gamma in DISCOUNTS]
            for kind in [*kinds, es.sequence_level(process)]:
                moment = exact.moments(process, kind)
                row: dict[str, Any] = {
                    "process": case,
                    "estimator": kind.name,
                    "horizon": horizon,
                    "trace_cov": moment.trace_cov,
                    "mean_norm": float(np.linalg.norm(moment.mean)),
                    "bound": exact.second_moment_bound(process, kind.discount, kind.causal),
                    "sampled_trace_cov": "",
                    "sampled_standard_error": "",
                }
                if sampled:
                    gradient = es.rollout_gradients(process, rollouts, kind)
                    gradient = gradient.reshape(num_sampled, -1)
                    square = ((gradient - gradient.mean(axis=0)) ** 2).sum(axis=1)
                    row["sampled_trace_cov"] = float(square.sum() / (num_sampled - 1))
                    error = square.std(ddof=1) / math.sqrt(num_sampled)
                    row["sampled_standard_error"] = float(error)
                rows.append(row)
    return rows


def slope_rows(rows: Rows) -> Rows:
    """Slope of log variance against log T: least squares over T >= 64, and of the last doubling."""
    result: Rows = []
    for key in dict.fromkeys((row["process"], row["estimator"]) for row in rows):
        mine = [row for row in rows if (row["process"], row["estimator"]) == key]
        horizon = np.log([float(row["horizon"]) for row in mine])
        variance = np.log([float(row["trace_cov"]) for row in mine])
        late = horizon >= min(math.log(64), float(horizon[-2]))
        slope = float(np.polyfit(horizon[late], variance[late], 1)[0])
        last = float((variance[-1] - variance[-2]) / (horizon[-1] - horizon[-2]))
        result.append(
            {"process": key[0], "estimator": key[1], "slope": slope, "slope_last_doubling": last}
        )
    return result


# ---- Part A, 2: bias against variance ------------------------------------------------------------


def frontier_estimators(process: Process) -> list[tuple[str, str, es.Estimator]]:
    """(family, knob, estimator): over gamma (plain, value baseline, full vocabulary) and over K."""
    found: list[tuple[str, str, es.Estimator]] = []
    for gamma in (*DISCOUNTS[:-2], 0.95, 0.99, 1.0):
        plain = es.discounted(process, gamma)
        baseline = exact.values(process, plain)[:-1]
        found.append(("sampled token", f"{gamma:g}", plain))
        with_baseline = es.discounted(process, gamma, baseline=baseline)
        found.append(("sampled token, value baseline", f"{gamma:g}", with_baseline))
        found.append(("full vocabulary", f"{gamma:g}", es.full_vocabulary(process, gamma)))
    found.append(("sequence-level", "1", es.sequence_level(process)))
    for bound in (0.5, 1.0, 2.0, 4.0):
        found.append(("clipped at c nats", f"{bound:g}", es.discounted(process, 0.0, clip=bound)))
    sizes = [2**i for i in range(20) if 2**i <= process.num_actions]
    for outside in ("renormalise", "bucket", "score", "score_without_one", "drop"):
        for k in sizes:
            kind = es.top_k(process, k, outside)
            found.append((f"top-K, {outside}", str(k), kind))
    return found


def frontier_rows(process: Process) -> Rows:
    """Exact bias against both targets and variance, relative to the gradient of the sequence KL."""
    sequence = float(np.linalg.norm(exact.sequence_kl_gradient(process)))
    prefix = float(np.linalg.norm(exact.prefix_kl_gradient(process)))
    rows: Rows = []
    for family, knob, kind in frontier_estimators(process):
        found = exact.report(process, kind)
        rows.append(
            {
                "process": process.name,
                "family": family,
                "knob": knob,
                "bias_sequence": found.bias_sequence / sequence,
                "bias_prefix": found.bias_prefix / prefix,
                "cosine": found.cosine,
                "variance": found.trace_cov / sequence**2,
            }
        )
    return rows


def error_rows(process: Process, counts: Sequence[int]) -> Rows:
    """Mean squared error against the sequence-KL gradient over its squared norm, at N rollouts."""
    norm = float(np.linalg.norm(exact.sequence_kl_gradient(process)))
    causal = es.causal_sequence_level(process)
    baseline = exact.values(process, causal)[:-1]
    kinds = {
        "token-level (gamma 0)": es.token_level(process),
        "gamma 0.5": es.discounted(process, 0.5),
        "gamma 0.9": es.discounted(process, 0.9),
        "causal sequence-level (gamma 1)": causal,
        "gamma 1, value baseline": es.discounted(process, 1.0, baseline=baseline),
        "full vocabulary, gamma 0": es.full_vocabulary(process),
    }
    rows: Rows = []
    for name, kind in kinds.items():
        found = exact.report(process, kind)
        for count in counts:
            error = found.mean_squared_error(count) / norm**2
            cells = {"process": process.name, "estimator": name, "rollouts": count}
            rows.append({**cells, "relative_squared_error": error})
    return rows


def crossover(process: Process, biased: es.Estimator, unbiased: es.Estimator) -> float:
    """Rollouts above which `unbiased` has the smaller mean squared error; inf if never."""
    one, other = exact.report(process, biased), exact.report(process, unbiased)
    gain = one.bias_sequence**2 - other.bias_sequence**2
    return max(0.0, (other.trace_cov - one.trace_cov) / gain) if gain > 1e-20 else math.inf


# ---- Part A, 3: where token-level points the wrong way -------------------------------------------


def descent_rows(num_steps: int, step_size: float = 0.1, horizon: int = 32) -> Rows:
    """Sequence KL of the trap along exact expected gradients of several gammas (no sampling)."""
    rows: Rows = []
    for gamma in tqdm((0.0, 0.5, 0.9, 1.0), desc="descent in the trap"):
        process = mdp.trap(horizon)
        for step in range(num_steps + 1):
            gradient = exact.expectation(process, es.discounted(process, gamma))
            if step % 4 == 0:
                row = {"gamma": gamma, "step": step, "sequence_kl": exact.sequence_kl(process)}
                rows.append({**row, "fork_to_trap": float(process.student_probs[0, 0, 0])})
            logits = process.student_logits - step_size * gradient
            process = replace(process, student_logits=logits)
    return rows


def cosine_rows(num_seeds: int) -> Rows:
    """Cosine of the token-level expectation with the sequence-KL gradient on random MDPs."""
    rows: Rows = []
    for gap in (1.0, 2.0, 3.0):
        for horizon in (8, 32, 128):
            cosines = []
            for seed in range(num_seeds):
                process = mdp.random_mdp(horizon, gap=gap, seed=seed)
                token = exact.prefix_kl_gradient(process)
                full = exact.sequence_kl_gradient(process)
                size = np.linalg.norm(token) * np.linalg.norm(full)
                cosines.append(float((token * full).sum() / size))
            low, median, high = np.quantile(cosines, [0.05, 0.5, 0.95])
            rows.append(
                {
                    "gap_nats": gap,
                    "horizon": horizon,
                    "processes": num_seeds,
                    "cosine_05": float(low),
                    "cosine_50": float(median),
                    "cosine_95": float(high),
                    "cosine_min": min(cosines),
                }
            )
    return rows


# ---- Part A, 4: the paper's proxy, and what exactness costs --------------------------------------


def proxy_rows(num_batches: int, batch: int = 64, micro_batches: int = 8) -> Rows:
    """Var(g) = 1/M sum_m |g_m - mean g|^2 over many batches, against its exact expectation.

    g_m averages B/M rollouts, so the expectation is (1 - 1/M) trace_cov M / B.
    """
    rows: Rows = []
    for case, build in GROWING.items():
        process = build(32)
        rollouts = mdp.sample(process, num_batches * batch, np.random.default_rng(32))
        for gamma in (0.0, 0.5, 1.0):
            kind = es.discounted(process, gamma)
            gradient = es.rollout_gradients(process, rollouts, kind)
            means = gradient.reshape(num_batches, micro_batches, batch // micro_batches, -1).mean(2)
            centred = means - means.mean(axis=1, keepdims=True)
            proxy = (centred**2).sum(axis=2).mean(axis=1)
            trace_cov = exact.moments(process, kind).trace_cov
            expected = (1 - 1 / micro_batches) * trace_cov * micro_batches / batch
            low, high = np.quantile(proxy / expected, [0.05, 0.95])
            rows.append(
                {
                    "process": case,
                    "gamma": gamma,
                    "batches": num_batches,
                    "mean_over_expected": float(proxy.mean() / expected),
                    "standard_error": float(proxy.std(ddof=1) / expected / num_batches**0.5),
                    "quantile_05_over_expected": float(low),
                    "quantile_95_over_expected": float(high),
                }
            )
    return rows


def cost_rows(horizons: Sequence[int], counts: Sequence[int]) -> Rows:
    """Seconds (best of 3) of the exact moments against T, and of sampling against rollouts."""

    def best(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    rows: Rows = []
    for horizon in horizons:
        process = mdp.random_mdp(horizon, num_states=16, num_actions=4)
        kind = es.causal_sequence_level(process)
        seconds = best(lambda x=process, k=kind: exact.moments(x, k))  # type: ignore[misc]
        rows.append({"method": "exact", "horizon": horizon, "rollouts": 0, "seconds": seconds})
    process = mdp.random_mdp(64, num_states=16, num_actions=4)
    kind = es.causal_sequence_level(process)
    for count in counts:

        def estimate(num: int = count) -> None:
            rollouts = mdp.sample(process, num, np.random.default_rng(0))
            es.rollout_gradients(process, rollouts, kind)

        row = {"method": "sampling", "horizon": 64, "rollouts": count}
        rows.append({**row, "seconds": best(estimate)})
    return rows


def crossover_rows(processes: Sequence[Process]) -> Rows:
    """Rollouts an update from which the unbiased gamma 1 beats token-level in squared error."""
    rows: Rows = []
    for process in processes:
        causal = es.causal_sequence_level(process)
        baseline = exact.values(process, causal)[:-1]
        unbiased = {
            "gamma 1": causal,
            "gamma 1, value baseline": es.discounted(process, 1.0, baseline=baseline),
        }
        for name, kind in unbiased.items():
            count = crossover(process, es.token_level(process), kind)
            rows.append({"process": process.name, "unbiased": name, "rollouts": count})
    return rows


def part_a(out: Path, quick: bool) -> None:
    """All tables of part A."""
    horizons = HORIZONS[:6] if quick else HORIZONS
    growth = horizon_rows(horizons, 400 if quick else 4_000)
    write_csv(out / "horizon.csv", growth)
    write_csv(out / "slopes.csv", slope_rows(growth))
    processes = [mdp.random_mdp(32), mdp.trap(32)]
    write_csv(
        out / "frontier.csv", [row for process in processes for row in frontier_rows(process)]
    )
    counts = [int(10 ** (i / 2)) for i in range(13)]
    write_csv(
        out / "error.csv", [row for process in processes for row in error_rows(process, counts)]
    )
    write_csv(out / "crossover.csv", crossover_rows(processes))
    write_csv(out / "descent.csv", descent_rows(40 if quick else 400))
    write_csv(out / "cosine.csv", cosine_rows(2 if quick else 200))
    write_csv(out / "proxy.csv", proxy_rows(20 if quick else 400))
    write_csv(
        out / "cost.csv", cost_rows(horizons, (10, 100, 1_000) if quick else (100, 1_000, 10_000))
    )


# ---- Part B --------------------------------------------------------------------------------------


def control_settings(quick: bool) -> Any:
    """The settings of part B; `quick` is a smoke run."""
    from toy.control import Settings

    return Settings(iterations=20, teacher_iterations=20) if quick else Settings()


def control_run_rows(result: Any, label: dict[str, Any]) -> Rows:
    """One row a run: variance of the left task (odd iterations), sampled KL, final distances."""
    from toy import control

    settings, seeds = result.settings, [seed for _, seed in result.runs]
    left = result.variance[0::2].log10().numpy()
    last = max(1, len(left) // 5)
    ends = [
        control.final_distance(control.evaluate(result.params, seeds, task, settings), task)
        for task in (0, 1)
    ]
    rows: Rows = []
    for i, (gamma, seed) in enumerate(result.runs):
        curve = left[:, i][np.isfinite(left[:, i])]
        late = curve[-last:] if len(curve) else np.array([np.nan])
        rows.append(
            {
                **label,
                "gamma": gamma,
                "seed": seed,
                "log10_variance_max": float(curve.max()) if len(curve) else math.nan,
                "log10_variance_median": float(np.median(curve)) if len(curve) else math.nan,
                "log10_variance_last_fifth": float(np.median(late)),
                "sequence_kl_last_fifth": float(np.median(result.sequence[-2 * last :, i].numpy())),
                "distance_left": float(ends[0][i]),
                "distance_right": float(ends[1][i]),
                "finished": int(result.alive[i]),
            }
        )
    return rows


def teacher_rows(settings: Any, teachers: Any) -> Rows:
    """Final distance of each teacher to its target."""
    from toy import control

    seeds = list(settings.seeds)
    rows: Rows = []
    for task, name in enumerate(("left", "right")):
        mine = [tensor[task * len(seeds) : (task + 1) * len(seeds)] for tensor in teachers]
        distance = control.final_distance(control.evaluate(mine, seeds, task, settings), task)
        for seed, value in zip(seeds, distance.tolist()):
            rows.append({"task": name, "seed": seed, "distance": value})
    return rows


def visit_rows(result: Any) -> Rows:
    """Share of final trajectories in each cell of time and position (-8 to 8, 64 cells)."""
    from toy import control

    settings = result.settings
    seeds = list(settings.seeds)
    edges = np.linspace(-8.0, 8.0, 65)
    rows: Rows = []
    for task, task_name in enumerate(("left", "right")):
        teacher = [
            tensor[task * len(seeds) : (task + 1) * len(seeds)] for tensor in result.teachers
        ]
        groups = {"teacher": control.evaluate(teacher, seeds, task, settings)}
        every = control.evaluate(result.params, [s for _, s in result.runs], task, settings)
        for gamma in (0.0, 0.5, 1.0):
            keep = [i for i, (g, _) in enumerate(result.runs) if g == gamma]
            groups[f"gamma {gamma:g}"] = every[keep]
        for policy, positions in groups.items():
            for i, seed in enumerate(seeds):
                for t in range(settings.horizon + 1):
                    here = np.nan_to_num(positions[i, :, t].numpy(), nan=np.inf)
                    counts = np.histogram(here, edges)[0]
                    for cell in np.flatnonzero(counts):
                        share = float(counts[cell] / len(here))
                        cells = {"task": task_name, "policy": policy, "seed": seed, "time": t}
                        rows.append({**cells, "cell": int(cell), "share": round(share, 4)})
    return rows


def part_b(out: Path, quick: bool) -> None:
    """The control study: 15 runs in one program."""
    from toy import control

    settings = control_settings(quick)
    teachers = control.train_teachers(settings)
    result = control.distil(settings, teachers)
    write_csv(out / "control_runs.csv", control_run_rows(result, {}))
    write_csv(out / "control_teachers.csv", teacher_rows(settings, teachers))
    write_csv(out / "control_visits.csv", visit_rows(result))
    log_variance, sequence = result.variance.log10().numpy(), result.sequence.numpy()
    rows: Rows = []
    for step in range(settings.iterations):
        row: dict[str, Any] = {"iteration": step + 1, "task": ("left", "right")[step % 2]}
        for i, (gamma, seed) in enumerate(result.runs):
            row[f"log10_variance gamma {gamma:g} seed {seed}"] = f"{log_variance[step, i]:.3f}"
        for i, (gamma, seed) in enumerate(result.runs):
            if gamma in (0.0, 1.0):
                row[f"sequence_kl gamma {gamma:g} seed {seed}"] = f"{sequence[step, i]:.4g}"
        rows.append(row)
    write_csv(out / "control_curves.csv", rows)


SWEEP: dict[str, dict[str, Any]] = {
    "default": {},
    "std floor 0": {"std_floor": 0.0},
    "std floor 0.05": {"std_floor": 0.05},
    "std floor 0.2": {"std_floor": 0.2},
    "softplus std": {"std": "softplus"},
    "squared reward": {"reward": "squared"},
    "teacher 200 iterations": {"teacher_iterations": 200},
    "student step size 3e-3": {"learning_rate": 3e-3},
    "student step size 3e-4": {"learning_rate": 3e-4},
    "gradient descent 1e-5": {"optimiser": "sgd", "learning_rate": 1e-5},
    "gradient descent 1e-7": {"optimiser": "sgd", "learning_rate": 1e-7},
    "horizon 40": {"horizon": 40},
}
SWEEP_ITERATIONS = 500


def part_sweep(out: Path, quick: bool) -> None:
    """Part B over what the paper leaves open: gammas 0, 0.5 and 1, 500 iterations."""
    from toy import control

    rows: Rows = []
    for name, changes in SWEEP.items():
        print(f"sweep: {name}")
        settings = control_settings(quick)
        settings = replace(settings, iterations=min(settings.iterations, SWEEP_ITERATIONS))
        settings = replace(settings, discounts=(0.0, 0.5, 1.0), **changes)
        try:
            teachers = control.train_teachers(settings)
        except RuntimeError as error:
            print(f"sweep: {name}: {error}")
            continue
        reached = teacher_rows(settings, teachers)
        distance = float(np.mean([row["distance"] for row in reached]))
        label = {"variant": name, "teacher_distance": distance}
        rows += control_run_rows(control.distil(settings, teachers), label)
        write_csv(out / "control_sweep.csv", rows)


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Parse, run, write. Returns the exit code: 0, or 2 through argparse for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m toy.study", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--part", choices=["a", "b", "sweep"], help="only this part (default: a, b)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run, under a minute")
    parser.add_argument("--out", type=Path, help="folder (default toy/results, or runs/toy-quick)")
    parser.add_argument("--figures-only", action="store_true", help="redraw from the CSV files")
    args = parser.parse_args(argv)
    out: Path = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not args.figures_only:
        if args.part in (None, "b", "sweep"):
            import torch

            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        if args.part in (None, "a"):
            part_a(out, args.quick)
        if args.part in (None, "b"):
            part_b(out, args.quick)
        if args.part == "sweep":
            part_sweep(out, args.quick)
    text = summary(out)
    (out / "summary.md").write_text(text)
    if out.resolve() == RESULTS:
        include(HERE / "README.md", text)
    try:
        from toy import figures
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        print(
            "matplotlib is not installed: tables written, figures left out (pip install opd[plot])"
        )
    else:
        figures.draw_all(out)
    print(f"wrote {out} in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
