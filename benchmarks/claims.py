"""The papers' claims as arms to run and comparisons to make; `evidence.py` runs them.

An arm is a script with flags; a comparison says which of two arms should score more, by which
column of `benchmarks/results/evidence.csv`. Its verdict follows from the 95 % interval of the
difference, paired by seed:

    reproduced       the whole interval is on the claim's side of 0
    not reproduced   the whole interval is on the other side
    not decidable    it contains 0: nothing can be said at this size and with these seeds
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from opd_ops import runs  # noqa: E402

FOLDER = "runs/evidence"
METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
MERGE = " ".join(f"--teacher {name}={runs.TINY}/expert_{name}" for name in ("add", "sub", "mul"))
WEAK = f"--teacher {runs.TINY}/expert_add"  # right in one domain of three
NOISY = f"--student {FOLDER}/models/noisy"  # far from its teacher
OTHER_END = f"--teacher {FOLDER}/models/other_end"  # ends its turns with another token


@dataclass(frozen=True)
class Arm:
    """A script, its flags, and the arm of the sweep whose best learning rate it takes."""

    script: str
    flags: str = ""
    rate: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether it is a baseline script, which has fewer flags and metrics."""
        return "baselines/" in self.script


def method(name: str, flags: str = "", rate: str = "") -> Arm:
    """An arm that runs a method file at the rate of that method, if no other is named."""
    return Arm(f"methods/{name}.py", flags, rate or name)


ARMS = {name: method(name) for name in METHODS} | {
    "exopd-merge": method("exopd", MERGE, "exopd-merge"),
    # 1: what one would do without on-policy distillation
    "supervised": Arm("benchmarks/baselines/supervised.py", "", "supervised"),
    "grpo": Arm("benchmarks/baselines/grpo.py", "", "grpo"),
    "opd-full": method("opd", "--objective full"),
    # 2: the teacher's top K
    "topk_opd-4": method("topk_opd", "--support-size 4"),
    "topk_opd-8": method("topk_opd", "--support-size 8"),
    "topk_opd-16": method("topk_opd", "--support-size 16"),
    "topk_opd-64": method("topk_opd", "--support-size 64"),
    "topk_opd-raw": method("topk_opd", "--no-renormalise"),
    "topk_opd-p1": method("topk_opd", "--top-p 1"),
    "topk_opd-p08": method("topk_opd", "--top-p 0.8"),
    "opd-other_end": method("opd", OTHER_END),
    "topk_opd-other_end": method("topk_opd", OTHER_END),
    "topk_opd-other_end-mask": method("topk_opd", f"{OTHER_END} --mask-special-tokens paper"),
    # 3: extrapolation
    "exopd-0.5": method("exopd", "--reward-scale 0.5"),
    "exopd-1.5": method("exopd", "--reward-scale 1.5"),
    "exopd-2": method("exopd", "--reward-scale 2"),
    "exopd-corrected": method("exopd", f"--reference {runs.TINY}/teacher_base"),
    # 4: a teacher that is right in one domain of three
    "opd-weak": method("opd", WEAK),
    "sg_opd-weak": method("sg_opd", WEAK),
    "sg_opd-weak-no_gate": method("sg_opd", f"{WEAK} --gate-extrapolation 1"),
    "sg_opd-weak-no_phase": method("sg_opd", f"{WEAK} --teacher-phase-steps 0"),
    "sg_opd-weak-random": method("sg_opd", f"{WEAK} --gate-control random"),
    "sg_opd-weak-inverse": method("sg_opd", f"{WEAK} --gate-control inverse"),
    # 5: a student that is far from the teacher
    "opd-noisy": method("opd", NOISY),
    "tropd-noisy": method("tropd", NOISY),
    "tropd-noisy-clip": method("tropd", f"{NOISY} --outlier clip"),
    "tropd-noisy-mask": method("tropd", f"{NOISY} --outlier mask"),
    "tropd-noisy-no_guidance": method("tropd", f"{NOISY} --no-guidance"),
    "tropd-noisy-scalar": method(
        "tropd", f"{NOISY} --no-guidance --acceptance never --outlier-form scalar"
    ),
    "opd-noisy-swept": method("opd", NOISY, "opd-noisy"),
    "tropd-noisy-swept": method("tropd", NOISY, "tropd-noisy"),
}
SMOKE = (*METHODS, "exopd-merge")
SWEPT = (*SMOKE, "supervised", "grpo", "opd-noisy", "tropd-noisy")


@dataclass(frozen=True)
class Comparison:
    """`arm` should have more of `column` than `than`, an arm or a number; or less of it."""

    text: str
    arm: str
    than: str | float
    column: str = "avg_after"
    more: bool = True


@dataclass(frozen=True)
class Claim:
    """What a paper says, with its own numbers, and what is compared here."""

    title: str
    paper: str
    comparisons: tuple[Comparison, ...]
    also: tuple[str, ...] = ()  # arms that the table shows beside those of the comparisons

    @property
    def arms(self) -> list[str]:
        """Every arm of the claim, once."""
        named = [arm for c in self.comparisons for arm in (c.than, c.arm) if isinstance(arm, str)]
        return list(dict.fromkeys([*named, *self.also]))


def recorded_score(model: str) -> float:
    """Accuracy over all domains of a model of the tiny family, as assets/tiny/README.md has it."""
    text = (runs.TINY / "README.md").read_text(encoding="utf-8")
    (score,) = re.findall(rf"\| `{model}` \|[^|]*\|[^|]*\| ([\d.]+) %", text)
    return float(score) / 100


STUDENT = recorded_score("student")
EXPERTS = [recorded_score(f"expert_{name}") for name in ("add", "sub", "mul")]
CLAIMS = {
    "1": Claim(
        "OPD beats supervised distillation and reinforcement learning",
        "Qwen3 report, as the Thinking Machines article quotes it: AIME24 74.4 by OPD against 67.6 "
        "by RL, at a tenth of the GPU hours; OPD 70 in 150 steps against 60 by supervision on "
        "400,000 examples",
        (
            Comparison("than supervision on the teacher's outputs, accuracy", "opd", "supervised"),
            Comparison("the full divergence than supervision, accuracy", "opd-full", "supervised"),
            Comparison("than GRPO with the verifier, accuracy", "opd", "grpo"),
            Comparison(
                "than supervision, gain per minute of training", "opd", "supervised", "gain_per_min"
            ),
            Comparison("than GRPO, gain per minute of training", "opd", "grpo", "gain_per_min"),
        ),
    ),
    "2": Claim(
        "Top-K matching is more stable than sampled-token OPD",
        "arXiv:2603.25562v2: average of five mathematics benchmarks 41.7 against 36.4 (student "
        "28.2); lower gradient norm, fewer clipped lengths; without renormalisation the score goes "
        "to 0; AIME24 23.6 with top-p 0.9, 17.7 without; masking special tokens lifts sampled OPD "
        "from 36.4 to 40.7",
        (
            Comparison("accuracy", "topk_opd", "opd"),
            Comparison("gradient norm, median of steps", "topk_opd", "opd", "grad_norm", False),
            Comparison("share of cut completions", "topk_opd", "opd", "truncated", False),
            Comparison("without renormalisation: accuracy", "topk_opd-raw", "topk_opd", more=False),
            Comparison(
                "without renormalisation: falls under the start",
                "topk_opd-raw",
                STUDENT,
                more=False,
            ),
            Comparison("sampling at top-p 0.9, not 1: accuracy", "topk_opd", "topk_opd-p1"),
            Comparison(
                "teacher with another end token: with the mask, accuracy",
                "topk_opd-other_end-mask",
                "topk_opd-other_end",
            ),
            Comparison(
                "teacher with another end token: with the mask, share cut",
                "topk_opd-other_end-mask",
                "topk_opd-other_end",
                "truncated",
                False,
            ),
        ),
        ("topk_opd-4", "topk_opd-8", "topk_opd-16", "topk_opd-64", "topk_opd-p08", "opd-other_end"),
    ),
    "3": Claim(
        "Extrapolated rewards beat the teacher's, and merge experts",
        "arXiv:2602.12125: mathematics 48.0 at lambda 1.25 against 46.5 by OPD (teacher 46.0); "
        "below 1 in between, at 1.5 unstable; three-way merging 47.7 against 46.4; with the "
        "teacher's base as reference 28.7 against 28.1",
        (
            Comparison("lambda 1.25: accuracy", "exopd", "opd"),
            Comparison("lambda 0.5: accuracy in between", "exopd-0.5", "opd", more=False),
            Comparison("lambda 2: gradient norm, median of steps", "exopd-2", "exopd", "grad_norm"),
            Comparison("the teacher's base as reference: accuracy", "exopd-corrected", "exopd"),
            Comparison(
                "merge, than the mean of the experts",
                "exopd-merge",
                round(sum(EXPERTS) / 3, 3),
            ),
            Comparison("merge, than the best expert", "exopd-merge", max(EXPERTS)),
        ),
        ("exopd-1.5",),
    ),
    "4": Claim(
        "Gating by the verifier's sign helps",
        "arXiv:2606.09304v1, abstract: +1.98 per sample (avg@k), +7.50 per question (pass@k) over "
        "OPD in competition mathematics",
        (
            Comparison("good teacher: accuracy", "sg_opd", "opd"),
            Comparison("good teacher: pass@8", "sg_opd", "opd", "pass8_after"),
            Comparison("weak teacher: accuracy", "sg_opd-weak", "opd-weak"),
            Comparison("weak teacher: pass@8", "sg_opd-weak", "opd-weak", "pass8_after"),
            Comparison("weak: the gate itself", "sg_opd-weak", "sg_opd-weak-no_gate"),
            Comparison("weak: the teacher phase itself", "sg_opd-weak", "sg_opd-weak-no_phase"),
            Comparison("weak: than a random gate", "sg_opd-weak", "sg_opd-weak-random"),
            Comparison("weak: than the inverse gate", "sg_opd-weak", "sg_opd-weak-inverse"),
        ),
    ),
    "5": Claim(
        "A trust region helps where student and teacher are far apart",
        "arXiv:2606.01249v3: average of mathematics 49.85 against 46.79 by OPD; outliers by "
        "forward KL 49.00, clipped 47.86, masked 47.72; forward KL alone 1.40",
        (
            Comparison("accuracy", "tropd-noisy", "opd-noisy"),
            Comparison(
                "accuracy, at rates swept with this student",
                "tropd-noisy-swept",
                "opd-noisy-swept",
            ),
            Comparison("outliers by forward KL, not clipped", "tropd-noisy", "tropd-noisy-clip"),
            Comparison("outliers by forward KL, not masked", "tropd-noisy", "tropd-noisy-mask"),
            Comparison("guidance", "tropd-noisy", "tropd-noisy-no_guidance"),
            Comparison(
                "forward KL alone, as a scalar: accuracy",
                "tropd-noisy-scalar",
                "opd-noisy",
                more=False,
            ),
        ),
        ("opd", "tropd"),
    ),
}
