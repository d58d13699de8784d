"""The papers' claims as arms to run and comparisons to make; `evidence.py` runs them.

An arm is a script with flags; a comparison says which of two arms should score more, by which
column of `benchmarks/results/evidence.csv`. Its verdict follows from the 95 % interval of the
difference, paired by seed:

    reproduced       the whole interval is on the claim's side of 0 (weakly: not that of 99 %)
    not reproduced   the whole interval is on the other side
    not decidable    it contains 0: nothing can be said at this size and with these seeds

A comparison that the paper does not make is `ours`: it holds, does not hold, or is not decidable.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from opd_run.files import TINY  # noqa: E402

FOLDER = "runs/evidence"
METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
MERGE = " ".join(f"--teacher {name}={TINY}/expert_{name}" for name in ("add", "sub", "mul"))
WEAK = f"--teacher {TINY}/expert_add"  # right in one domain of three
NOISY = f"--student {FOLDER}/models/noisy"  # far from its teacher
OTHER_END = f"--teacher {FOLDER}/models/other_end"  # ends its turns with another token


@dataclass(frozen=True)
class Arm:
    """A script, its flags, and the arm of the sweep whose best learning rate it takes."""

    script: str
    flags: str = ""
    rate: str = ""


def method(name: str, flags: str = "", rate: str = "") -> Arm:
    """An arm that runs a method file at the rate of that method, if no other is named."""
    return Arm(f"methods/{name}.py", flags, rate or name)


ARMS = {name: method(name) for name in METHODS} | {
    "exopd-merge": method("exopd", MERGE, "exopd-merge"),
    # 1: what one would do without on-policy distillation
    "supervised": Arm("forks/supervised.py", "", "supervised"),
    "grpo": Arm("forks/grpo.py", "", "grpo"),
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
    "opd-merge": method("exopd", f"{MERGE} --reward-scale 1", "exopd-merge"),  # lambda 1 is opd
    "exopd-corrected": method("exopd", f"--reference {TINY}/teacher_base"),
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
    "tropd-noisy-clip": method("tropd", f"{NOISY} --outlier clip --outlier-threshold -5"),
    "tropd-noisy-mask": method("tropd", f"{NOISY} --outlier mask --outlier-threshold -5"),
    "tropd-noisy-no_guidance": method("tropd", f"{NOISY} --no-guidance"),
    "tropd-noisy-scalar": method(
        "tropd", f"{NOISY} --no-guidance --acceptance never --outlier-form scalar"
    ),
    "opd-noisy-swept": method("opd", NOISY, "opd-noisy"),
    "tropd-noisy-swept": method("tropd", NOISY, "tropd-noisy"),
}
SMOKE = (*METHODS, "exopd-merge")
START = "start"
SWEPT = (*SMOKE, "supervised", "grpo", "opd-noisy", "tropd-noisy")


@dataclass(frozen=True)
class Comparison:
    """`arm` should have more of `column` than `than`, an arm or a number; or less of it.

    START is the arm itself before training. `ours`: the paper does not claim it.
    """

    text: str
    arm: str
    than: str | float
    column: str = "avg_after"
    more: bool = True
    ours: bool = False


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
        named = [arm for c in self.comparisons for arm in (c.than, c.arm) if arm in ARMS]
        return list(dict.fromkeys([*named, *self.also]))


def recorded_score(model: str) -> float:
    """Accuracy over all domains of a model of the tiny family, as assets/tiny/README.md has it."""
    text = (TINY / "README.md").read_text(encoding="utf-8")
    (score,) = re.findall(rf"\| `{model}` \|[^|]*\|[^|]*\| ([\d.]+) %", text)
    return float(score) / 100


EXPERTS = [recorded_score(f"expert_{name}") for name in ("add", "sub", "mul")]
CLAIMS = {
    "1": Claim(
        "OPD beats supervised distillation and reinforcement learning",
        "Qwen3 report, as the Thinking Machines article quotes it: AIME24 74.4 by OPD against 67.6 "
        "by RL, at a tenth of the GPU hours; OPD 70 in 150 steps against 60 by supervision on "
        "400,000 examples",
        (
            Comparison("above supervision on the teacher's outputs", "opd", "supervised"),
            Comparison("full divergence above supervision", "opd-full", "supervised"),
            Comparison("above GRPO with the verifier", "opd", "grpo"),
            Comparison(
                "gain of these 30 steps per minute, above supervision's",
                "opd",
                "supervised",
                "gain_per_min",
                ours=True,
            ),
            Comparison(
                "gain of these 30 steps per minute, above GRPO's",
                "opd",
                "grpo",
                "gain_per_min",
                ours=True,
            ),
        ),
    ),
    "2": Claim(
        "Top-K matching is more stable than sampled-token OPD",
        "arXiv:2603.25562v2: average of five mathematics benchmarks 41.7 against 36.4 (student "
        "28.2); lower gradient norm, fewer clipped lengths; without renormalisation the score goes "
        "to 0; AIME24 23.6 with top-p 0.9, 17.7 without; masking special tokens lifts sampled OPD "
        "from 36.4 to 40.7",
        (
            Comparison("above opd", "topk_opd", "opd"),
            Comparison("smaller gradient norm than opd", "topk_opd", "opd", "grad_norm", False),
            Comparison("fewer cut completions than opd", "topk_opd", "opd", "truncated", False),
            Comparison("worse without renormalisation", "topk_opd-raw", "topk_opd", more=False),
            Comparison(
                "without renormalisation under the untrained student",
                "topk_opd-raw",
                START,
                more=False,
            ),
            Comparison("sampling at top-p 0.9 above top-p 1", "topk_opd", "topk_opd-p1"),
            Comparison(
                "teacher with another end token: top-K with a mask above none",
                "topk_opd-other_end-mask",
                "topk_opd-other_end",
                ours=True,
            ),
            Comparison(
                "teacher with another end token: fewer cut completions with the mask",
                "topk_opd-other_end-mask",
                "topk_opd-other_end",
                "truncated",
                False,
                ours=True,
            ),
        ),
        ("topk_opd-4", "topk_opd-8", "topk_opd-16", "topk_opd-64", "topk_opd-p08", "opd-other_end"),
    ),
    "3": Claim(
        "Extrapolated rewards beat the teacher's, and merge experts",
        "arXiv:2602.12125: mathematics 48.0 at lambda 1.25 against 46.5 by OPD (teacher 46.0); "
        "below 1 in between, at 1.5 unstable; merging two experts 47.7 at lambda 1.25 against 46.4 "
        "at 1; with the teacher's base as reference 28.7 against 28.1",
        (
            Comparison("lambda 1.25 above 1", "exopd", "opd"),
            Comparison("lambda 0.5 below 1", "exopd-0.5", "opd", more=False),
            Comparison("lambda 1.5 below 1.25", "exopd-1.5", "exopd", more=False),
            Comparison("lambda 2 below 1.25", "exopd-2", "exopd", more=False, ours=True),
            Comparison("better with the teacher's base as reference", "exopd-corrected", "exopd"),
            Comparison("merging three experts: lambda 1.25 above 1", "exopd-merge", "opd-merge"),
            Comparison(
                "the merged student above the mean of the experts",
                "exopd-merge",
                round(sum(EXPERTS) / 3, 3),
                ours=True,
            ),
            Comparison(
                "the merged student above the best expert",
                "exopd-merge",
                max(EXPERTS),
                ours=True,
            ),
        ),
    ),
    "4": Claim(
        "Gating by the verifier's sign helps",
        "arXiv:2606.09304v1, abstract: +1.98 per sample (avg@k), +7.50 per question (pass@k) over "
        "OPD in competition mathematics",
        (
            Comparison("good teacher: above opd", "sg_opd", "opd"),
            Comparison("good teacher: pass@8 above opd's", "sg_opd", "opd", "pass8_after"),
            Comparison("weak teacher: above opd", "sg_opd-weak", "opd-weak"),
            Comparison(
                "weak teacher: pass@8 above opd's", "sg_opd-weak", "opd-weak", "pass8_after"
            ),
            *(
                Comparison(f"weak teacher: {text}", "sg_opd-weak", f"sg_opd-weak-{arm}", ours=True)
                for text, arm in (
                    ("above no gate", "no_gate"),
                    ("above no teacher phase", "no_phase"),
                    ("above a random gate", "random"),
                    ("above the inverse gate", "inverse"),
                )
            ),
        ),
    ),
    "5": Claim(
        "A trust region helps where student and teacher are far apart",
        "arXiv:2606.01249v3: average of mathematics 49.85 against 46.79 by OPD; outliers by "
        "forward KL 49.00, clipped 47.86, masked 47.72; forward KL alone 1.40",
        (
            Comparison("above opd", "tropd-noisy", "opd-noisy"),
            Comparison(
                "above opd, at rates swept with this student",
                "tropd-noisy-swept",
                "opd-noisy-swept",
            ),
            Comparison("outliers by forward KL above clipped", "tropd-noisy", "tropd-noisy-clip"),
            Comparison("outliers by forward KL above masked", "tropd-noisy", "tropd-noisy-mask"),
            Comparison("guidance above none", "tropd-noisy", "tropd-noisy-no_guidance"),
            Comparison(
                "forward KL alone, as a scalar, below opd",
                "tropd-noisy-scalar",
                "opd-noisy",
                more=False,
            ),
        ),
        ("opd", "tropd"),
    ),
}
