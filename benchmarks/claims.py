"""Arms to run, the papers' claims as comparisons of them, and studies; `evidence.py` runs them.

An arm is a script with flags; a comparison says which of two arms should score more, by which
column of `benchmarks/results/evidence.csv`. Its verdict follows from the 95 % interval of the
difference, paired by seed among rows of the same numerics:

    reproduced                      the whole interval is on the claim's side of 0
    not reproduced here             the whole interval is on the other side
    no difference seen, at most X   it contains 0; X is its far end

Nothing is refuted at this size. A comparison that the paper does not make is `ours`: it holds, does
not hold here, or no difference is seen. A study is a table of its own, of arms and seeds.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from opd_run.files import TINY  # noqa: E402

FOLDER = "runs/evidence"
METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
MERGE = " ".join(f"--teacher {name}={TINY}/expert_{name}" for name in ("add", "sub", "mul"))
WEAK = f"--teacher {TINY}/expert_add"  # right in one domain of three
NOISY = f"--student {FOLDER}/models/noisy"  # far from its teacher
OTHER_END = f"--teacher {FOLDER}/models/other_end"  # ends its turns with another token


SURE = 1.5  # the final norm of the teacher "sure" is so much larger, that of "flat" smaller
RATES = ("1.5e-4", "3e-4", "6e-4", "1.2e-3")


@dataclass(frozen=True)
class Arm:
    """A script with flags and a budget.

    Attributes:
        rate: the arm of the sweep whose best learning rate it takes; or a rate.
        eval_every: 0: at both ends.  step_s: CPU seconds of a step, measured on an EPYC (Zen 4).
    """

    script: str
    flags: str = ""
    rate: str = ""
    steps: int = 30
    eval_every: int = 0
    eval_samples: int = 8
    step_s: float = 2.6

    @property
    def cpu_min(self) -> float:
        """CPU minutes to expect of a cell: an evaluation of the tiny pair takes 2.75 s a sample."""
        evaluations = 1 + self.steps // (self.eval_every or self.steps)
        return (self.steps * self.step_s + 2.75 * self.eval_samples * evaluations) / 60


@dataclass(frozen=True)
class Sweep:
    """How the rate of an arm is found.

    `held_out`: on training prompts that are taken out for it, not on the test prompts.
    """

    rates: tuple[str, ...] = RATES
    steps: int = 15
    held_out: bool = False


def method(name: str, flags: str = "", rate: str = "", **more: Any) -> Arm:
    """An arm that runs a method file at the rate of that method, if no other is named."""
    return Arm(f"methods/{name}.py", flags, rate or name, **more)


def fork(name: str, rate: str = "", **more: Any) -> Arm:
    """An arm that runs a fork."""
    return Arm(f"forks/{name}.py", "", rate or name, **more)


ARMS = {name: method(name) for name in METHODS} | {
    "exopd-merge": method("exopd", MERGE, "exopd-merge"),
    # 1: what one would do without on-policy distillation
    "supervised": fork("supervised"),
    "grpo": fork("grpo"),
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
    "tropd-noisy-no_guidance": method("tropd", f"{NOISY} --no-guidance"),
    "tropd-noisy-scalar": method(
        "tropd", f"{NOISY} --no-guidance --acceptance never --outlier-form scalar"
    ),
    "opd-noisy-swept": method("opd", NOISY, "opd-noisy"),
    "tropd-noisy-swept": method("tropd", NOISY, "tropd-noisy"),
}

# ---- The ladder from opd to tropd: at opd's rate, and (-best) each at its own ----
CLIP, MASK = "--no-guidance --outlier clip", "--no-guidance --outlier mask"
LADDER = {  # what the table calls it -> arm, method, flags
    "opd": ("ladder-opd", "opd", ""),
    "clipped at -1e9, no guidance: has to equal opd": (
        "ladder-open",
        "tropd",
        f"{CLIP} --outlier-threshold=-1e9",
    ),
    "clipped at -1.72": ("ladder-clip-1.72", "tropd", f"{CLIP} --outlier-threshold=-1.72"),
    "clipped at -0.85": ("ladder-clip-0.85", "tropd", f"{CLIP} --outlier-threshold=-0.85"),
    "masked at -0.85": ("ladder-mask", "tropd", f"{MASK} --outlier-threshold=-0.85"),
    "outliers by forward KL": ("ladder-forward_kl", "tropd", "--no-guidance"),
    "+ guidance: tropd": ("ladder-tropd", "tropd", ""),
    "tropd, outliers in the scalar form": ("ladder-scalar", "tropd", "--outlier-form scalar"),
}
for _arm, _name, _flags in LADDER.values():
    ARMS[_arm] = method(_name, f"{NOISY} {_flags}", "3e-4")
    if _arm != "ladder-open":  # opd again
        ARMS[f"{_arm}-best"] = method(_name, f"{NOISY} {_flags}", f"{_arm}-best")

# ---- To the end: 200 steps, accuracy every 20 ----
LONG = {"steps": 200, "eval_every": 20}
END = {
    "end-opd": method("opd", "", "end-opd", **LONG),
    "end-supervised": fork("supervised", "end-supervised", **LONG),
    "end-grpo": fork("grpo", "end-grpo", **LONG),
    "end-topk_opd": method("topk_opd", "", "end-topk_opd", **LONG),
    "end-exopd-merge": method("exopd", MERGE, "end-exopd-merge", **LONG),
    "end-opd-merge": method("exopd", f"{MERGE} --reward-scale 1", "end-opd-merge", **LONG),
    "end-opd-noisy": method("opd", NOISY, "end-opd-noisy", **LONG),
    "end-tropd-noisy": method("tropd", NOISY, "end-tropd-noisy", **LONG),
}
ARMS |= END
DOMAINS = ("add", "sub", "mul")
for _name in DOMAINS:  # the paper's setting: its teacher is the student after RL, in one domain
    _flags = f"--teacher {TINY}/expert_{_name} --eval-teacher "
    _flags += f"--prompts {FOLDER}/prompts/{_name}.jsonl "
    _flags += f"--test-prompts {FOLDER}/prompts/{_name}_test.jsonl --reward-scale "
    for _scale in ("1", "1.25"):
        ARMS[f"expert-{_name}-{_scale}"] = method("exopd", _flags + _scale, "end-opd", **LONG)

# ---- A support that does not hold the mass: top K without renormalisation, a constant rate ----
CONSTANT = "--lr-schedule constant --support-size"
SUPPORT = {
    "support-4-raw": method("topk_opd", f"{CONSTANT} 4 --no-renormalise", steps=300),
    "support-2-raw": method("topk_opd", f"{CONSTANT} 2 --no-renormalise", steps=150),
    "support-8-raw": method("topk_opd", f"{CONSTANT} 8 --no-renormalise", steps=150),
    "support-4": method("topk_opd", f"{CONSTANT} 4", steps=150),
}
ARMS |= SUPPORT

# ---- When a gate helps: opd, sg_opd and its random gate under teachers of every quality ----
TEACHERS = {  # name -> flags, arms of opd, sg_opd, its random gate
    "the good one": ("", "opd", "sg_opd", "sg_opd-random"),
    "expert of additions": (WEAK, "opd-weak", "sg_opd-weak", "sg_opd-weak-random"),
}
for _name, _title, _path in (
    ("expert_sub", "expert of subtractions", f"{TINY}/expert_sub"),
    ("noise", "the good one, noisy", f"{FOLDER}/models/teacher_noise"),
    ("sure", "the good one, too sure", f"{FOLDER}/models/teacher_sure"),
    ("flat", "the good one, too flat", f"{FOLDER}/models/teacher_flat"),
):
    _arms = f"opd-{_name}", f"sg_opd-{_name}", f"sg_opd-{_name}-random"
    TEACHERS[_title] = (f"--teacher {_path}", *_arms)
for _flags, _plain, _gated, _random in TEACHERS.values():
    ARMS[_plain] = method("opd", _flags)
    ARMS[_gated] = method("sg_opd", _flags)
    ARMS[_random] = method("sg_opd", f"{_flags} --gate-control random".strip())

# ---- A real vocabulary: SmolLM2-135M and its noisy copy (docs/reproducing.md makes them) ----
SMOL = (
    "--student models/smollm2-noisy --teacher models/smollm2 --prompts assets/plurals/train.jsonl "
    "--test-prompts assets/plurals/test.jsonl --verifier assets/plurals/turns.py:right "
    "--max-completion-tokens 32 --micro-batch-tokens 1024 --diagnostic-tokens 256"
)
SMOL_BUDGET: dict[str, Any] = {"steps": 40, "eval_samples": 1, "step_s": 45.0}
ONE_EACH, TWO_EACH = (
    f"{SMOL} --prompts-per-step {16 // each} --rollouts-per-prompt {each}" for each in (1, 2)
)
VOCABULARY = {
    "vocabulary-opd": method("opd", ONE_EACH, "2e-5", **SMOL_BUDGET),
    "vocabulary-topk_opd": method("topk_opd", ONE_EACH, "2e-5", **SMOL_BUDGET),
    "vocabulary-tropd": method("tropd", TWO_EACH, "2e-5", **SMOL_BUDGET),
}
ARMS |= VOCABULARY

SMOKE = (*METHODS, "exopd-merge")
START = "start"
TEACHER = "teacher"
SWEPT = dict.fromkeys((*SMOKE, "supervised", "grpo", "opd-noisy", "tropd-noisy"), Sweep())
SWEPT |= {arm: Sweep(held_out=True) for arm in ARMS if arm.startswith("ladder-") and "best" in arm}
SWEPT |= dict.fromkeys(END, Sweep(("1.5e-4", "3e-4", "6e-4"), 100, held_out=True))
SWEPT["end-grpo"] = Sweep(("7.5e-5", "1.5e-4", "3e-4"), 100, held_out=True)  # best at the lowest


@dataclass(frozen=True)
class Comparison:
    """`arm` should have more of `column` than `than`, an arm or a number; or less of it.

    START is the arm itself before training, TEACHER the teacher that it was evaluated with. `ours`:
    the paper does not claim it.
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
                "on 32 tokens, 30 steps: without renormalisation under the untrained student",
                "topk_opd-raw",
                START,
                more=False,
            ),
            Comparison(
                "on 4 tokens, 300 steps: without renormalisation under the untrained student",
                "support-4-raw",
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
                "200 steps, the expert of additions alone: lambda 1.25 above the expert",
                "expert-add-1.25",
                TEACHER,
            ),
            Comparison(
                "200 steps, the expert of additions alone: lambda 1.25 above 1",
                "expert-add-1.25",
                "expert-add-1",
            ),
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
            Comparison("above opd, at rates of the usual student", "tropd-noisy", "opd-noisy"),
            Comparison(
                "above opd, at rates swept with this student",
                "tropd-noisy-swept",
                "opd-noisy-swept",
            ),
            Comparison("above opd, both at opd's rate", "ladder-tropd", "ladder-opd"),
            Comparison(
                "outliers by forward KL above clipped, each at its best rate",
                "ladder-forward_kl-best",
                "ladder-clip-0.85-best",
            ),
            Comparison(
                "outliers by forward KL above masked, each at its best rate",
                "ladder-forward_kl-best",
                "ladder-mask-best",
            ),
            Comparison("clipped above opd, at opd's rate", "ladder-clip-0.85", "ladder-opd"),
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


# ---- Comparisons that get as many seeds as they need ----
HALF_WIDTH, FIRST_SEED, FEWEST, MOST = 0.010, 5, 5, 32
DECIDED = (
    Comparison("opd above supervision on the teacher's outputs", "opd", "supervised"),
    Comparison("opd above GRPO with the verifier", "opd", "grpo"),
    Comparison("topk_opd above opd", "topk_opd", "opd"),
    Comparison("exopd: lambda 1.25 above 1", "exopd", "opd"),
    Comparison("sg_opd above opd, good teacher", "sg_opd", "opd"),
    Comparison("sg_opd above opd, weak teacher", "sg_opd-weak", "opd-weak"),
    Comparison("sg_opd above its random gate, weak teacher", "sg_opd-weak", "sg_opd-weak-random"),
)  # and tropd's best form against opd on the noisy student: `findings.decided`


@dataclass(frozen=True)
class Study:
    """Arms that have a table of their own."""

    title: str
    arms: tuple[str, ...]
    seeds: range


ENDS = (  # of section 10: where 200 steps end
    Comparison("200 steps: opd above supervision", "end-opd", "end-supervised"),
    Comparison("200 steps: opd above GRPO", "end-opd", "end-grpo"),
    Comparison("200 steps: topk_opd above opd", "end-topk_opd", "end-opd"),
    Comparison("200 steps, three experts: lambda 1.25 above 1", "end-exopd-merge", "end-opd-merge"),
    Comparison("200 steps, noisy student: tropd above opd", "end-tropd-noisy", "end-opd-noisy"),
)
STUDIES = {
    "ladder": Study(
        "What TrOPD needs",
        tuple(arm for arm in ARMS if arm.startswith("ladder-")),
        range(3),
    ),
    "support": Study("Where renormalisation matters", tuple(SUPPORT), range(2)),
    "end": Study("To the end", tuple(END), range(3)),
    "expert": Study(
        "The teacher is the student after RL, in one domain",
        ("expert-add-1", "expert-add-1.25"),
        range(3),
    ),
    "more_experts": Study(
        "The same in the other two domains",
        tuple(f"expert-{name}-{scale}" for name in DOMAINS[1:] for scale in ("1", "1.25")),
        range(3),
    ),
    "teachers": Study(
        "When a gate helps",
        # the expert of additions is in DECIDED, with as many seeds or more
        tuple(arm for flags, *arms in TEACHERS.values() if flags != WEAK for arm in arms),
        range(FIRST_SEED, FIRST_SEED + 6),
    ),
    "vocabulary": Study("A real vocabulary", tuple(VOCABULARY), range(2)),
}
