"""The live view of `--report-to`, and the line of a step in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_run.console import optional


def live_view(kind: str) -> Any:
    """The package of `--report-to`; None for `none`."""
    return None if kind == "none" else optional(kind, f"--report-to {kind}")


def reporter(
    kind: str, path: Path, config: dict[str, Any]
) -> Callable[[int, dict[str, float]], None]:
    module = live_view(kind)
    if kind == "none":
        return lambda step, metrics: None
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(path / "tensorboard"))

        def write(step: int, metrics: dict[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        return write
    place = {"dir": str(path)} if kind == "wandb" else {}  # trackio has one store for all runs
    session = module.init(project="opd", name=path.name, config=config, **place)
    return lambda step, metrics: session.log(metrics, step=step)


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One aligned line for a step."""
    width = len(str(steps))
    shown = (
        ("loss", "loss", "{:+.4f}"),
        ("log_ratio_mean", "log_ratio", "{:+.4f}"),
        ("verifier_pass_rate", "pass", "{:.3f}"),
        ("length_mean", "length", "{:6.1f}"),
        ("truncated_share", "cut", "{:.2f}"),
        ("grad_norm", "grad", "{:7.3f}"),
        ("generate_s", "generate", "{:5.1f}s"),
        ("teacher_s", "teacher", "{:5.1f}s"),
        ("student_s", "student", "{:5.1f}s"),
        ("tokens_per_s", "tok/s", "{:6.0f}"),
    )
    cells = [f"{name} {form.format(metrics[key])}" for key, name, form in shown if key in metrics]
    return f"step {step:>{width}}/{steps}  " + "  ".join(cells)
