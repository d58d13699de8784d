"""sg_opd.py: the gate and its controls, which gradient they give, and the phase of the teacher."""

from __future__ import annotations

import itertools
import math

import opd
import pytest
import sg_opd
import tinylm
import torch
from tablelm import TableLM, all_completions, expected_gradient, rollout_of
from tinylm import equal, weights

from opd_run import files, retry, rollouts

VOCAB, LENGTH = 3, 3
NEUTRAL = ["--gate-extrapolation", "1", "--gate-interpolation", "1"]
OFF = ["--teacher-phase-steps", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sg_opd")
    for seed, name in enumerate(("student", "teacher", "base")):
        tinylm.save_model(folder / name, seed, eos_token_id=[1, 7, 8, 9])
    tinylm.save_prompts(folder / "prompts.jsonl")
    code = "def even(text, answer, row):\n    return sum(map(ord, text)) % 2 == 0\n"
    (folder / "parity.py").write_text(code)
    return folder


@pytest.fixture(autouse=True)
def parity(folder, monkeypatch):
    """A verifier that both random models pass about every other time."""
    monkeypatch.syspath_prepend(str(folder))


def flags(folder, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    paths |= {"--run-dir": run}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 4 --steps 3"
    sizes += " --save-every 2 --eval-every 0 --device cpu --verifier parity:even"
    return [*named, *sizes.split(), *more]


# ------------------------------------------------------------------------------------- collapse
def test_neutral_gates_are_opd_bit_for_bit(folder):
    """Both gates 1, no phase, 3 steps: the weights of opd.py, whatever is gated and by whom; to
    1e-6 where another op computes them."""
    opd.main(flags(folder, "opd"))
    want = weights(folder, "opd")
    for run, more in {
        "scalar": [],
        "reference": ["--gate-target", "reference", "--reference", str(folder / "base")],
        "random": ["--gate-control", "random", "--verdict", "group"],
        "inverse": ["--gate-control", "inverse", "--teacher-share", "0"],
    }.items():
        off = [] if "--teacher-share" in more else OFF
        sg_opd.main(flags(folder, run, *NEUTRAL, *off, *more))
        found = weights(folder, run)
        if run == "random":  # its tokens depend on each other: four products, not three
            assert all(torch.allclose(want[name], found[name], atol=1e-6) for name in want)
        else:
            assert equal(want, found), run
    for run, more in {"gated": OFF, "phased": NEUTRAL}.items():  # and each part alone matters
        sg_opd.main(flags(folder, run, *more))
        assert not equal(want, weights(folder, run)), run


# ----------------------------------------------------------------------------------- the gate
def arguments(*more: str):
    args = sg_opd.parse_args([*more])
    return args


def test_gate_by_hand():
    """verdict 0: 1; verdict and (teacher - student) of one sign: extrapolation; else the other."""
    log_ratio = torch.tensor([[-1.0, 2.0, 0.0]]).repeat(3, 1)  # the student likes: less, more, same
    rollout = rollout_of(sg_opd, torch.zeros(3, 3, dtype=torch.int64))
    rollout.verdict = torch.tensor([1.0, -1.0, 0.0])
    verdict = rollout.verdict[:, None]
    agree = verdict * -log_ratio > 0
    pair = ["--gate-interpolation", "0.5"]
    gate = sg_opd.sign_gate(agree, verdict, arguments(*pair))
    assert torch.equal(gate, torch.tensor([[1.8, 0.5, 0.5], [0.5, 1.8, 0.5], [1.0, 1.0, 1.0]]))
    gate = sg_opd.sign_gate(agree, verdict, arguments(*pair, "--gate-control", "inverse"))
    assert torch.equal(gate, torch.tensor([[0.5, 1.8, 1.8], [1.8, 0.5, 1.8], [1.0, 1.0, 1.0]]))


def test_random_gate_fires_as_often_in_every_rollout():
    """Same counts in each rollout, other tokens; padding does not take part."""
    generator = torch.Generator().manual_seed(0)
    agree = torch.rand(40, 50, generator=generator) < 0.3
    rollout = rollout_of(sg_opd, torch.zeros(40, 50, dtype=torch.int64), verdict=torch.ones(40))
    rollout.extra["coin"] = torch.rand(40, 50, generator=generator)
    for row in range(40):
        rollout.response_mask[row, row + 1 :] = False
    mask = rollout.trained_mask
    fired = sg_opd.shuffle(agree, rollout)
    assert torch.equal((fired & mask).sum(1), (agree & mask).sum(1))
    assert (fired != agree)[mask].float().mean() > 0.3
    part = rollouts.select(rollout, torch.arange(10))  # narrower: nothing moves
    width = part.completion_ids.shape[1]
    part_fired = sg_opd.shuffle(agree[:10, :width], part)
    assert torch.equal(part_fired & part.trained_mask, (fired & mask)[:10, :width])


def test_random_gate_has_no_preferred_token():
    """Over all orders of the coins, every token fires equally often."""
    orders = torch.tensor(list(itertools.permutations([0.1, 0.4, 0.8])))
    rollout = rollout_of(sg_opd, torch.zeros(6, 3, dtype=torch.int64), verdict=torch.ones(6))
    rollout.extra["coin"] = orders
    agree = torch.tensor([[True, False, False]]).repeat(6, 1)
    fired = sg_opd.shuffle(agree, rollout)
    gate = sg_opd.sign_gate(fired, rollout.verdict[:, None], arguments())
    assert torch.allclose(gate.mean(0), torch.full((3,), (1.8 + 1.0 + 1.0) / 3))


def test_group_verdict_by_hand():
    """Sign of score - mean of the verified; 0 in a group of one kind, and where unverified."""
    verdict = torch.tensor([1, 1, -1, 0, 1, 1, 1, 1, -1, -1, -1, 0, 0, 0, 0, 1.0])
    want = torch.tensor([1, 1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0])
    assert torch.equal(sg_opd.group_sign(verdict, 4), want)


# --------------------------------------------------------------------------------- enumeration
@pytest.fixture
def case():
    """student, teacher, reference, completions, their probabilities, a verdict for each."""
    three = [TableLM(VOCAB, LENGTH, seed) for seed in (1, 2, 3)]
    completions = all_completions(VOCAB, LENGTH)
    probs = three[0].token_logp(completions).sum(1).exp().detach()
    generator = torch.Generator().manual_seed(4)
    verdict = torch.randint(-1, 2, (len(completions),), generator=generator).float()
    return *three, completions, probs, verdict


def exact_rollout(completions: torch.Tensor, **changes):
    zeros = torch.zeros(completions.shape, dtype=torch.float64)
    return rollout_of(sg_opd, completions, **({"behaviour_logp": zeros} | changes))


def loss_of(case, args, i: int, **changes) -> torch.Tensor:
    student, teacher, reference, completions, _, verdict = case
    rollout = exact_rollout(completions[i : i + 1], verdict=verdict[i : i + 1], **changes)
    scores = sg_opd.score({"teacher": teacher, "reference": reference}, rollout, args)
    return sg_opd.token_loss(student, rollout, scores, args)[0]


def estimate(case, args) -> torch.Tensor:
    return expected_gradient(case[0], case[4], lambda i: loss_of(case, args, i))


def shaped_gradient(case, args, control: str) -> torch.Tensor:
    """What E[gradient] is: minus the policy gradient, at every prefix, of the constant reward
    E[advantage | prefix, token] over the verdicts of what may follow. No score function here."""
    student, teacher, reference, completions, probs, verdict = case
    p, q, r = (each.token_logp(completions).detach() for each in (student, teacher, reference))
    delta, v = q - p, verdict[:, None]
    agree = (v * delta > 0).double()
    if control == "inverse":
        agree = 1 - agree
    if control == "random":  # in expectation over the coins
        agree = agree.mean(1, keepdim=True).expand_as(agree)
    high, low = args.gate_extrapolation, args.gate_interpolation
    gate = torch.where(v == 0, 1.0, low + (high - low) * agree)
    value = gate * delta
    if args.gate_target == "reference":
        value = delta + (gate - 1) * (q - r)
    place = student.prefix_index(completions) * VOCAB + completions  # (prefix, token)
    num = student.table.numel()
    mass = torch.zeros(num, dtype=torch.float64).index_add(
        0, place.flatten(), probs[:, None].expand_as(value).flatten()
    )
    total = torch.zeros(num, dtype=torch.float64).index_add(
        0, place.flatten(), (probs[:, None] * value).flatten()
    )
    reward = (total / mass).view(-1, VOCAB)  # [prefixes, V]
    visits = mass.view(-1, VOCAB).sum(1)
    objective = -(visits[:, None] * student.table.softmax(-1) * reward).sum()
    return torch.autograd.grad(objective, student.table)[0]


@pytest.mark.parametrize("target", ["scalar", "reference"])
@pytest.mark.parametrize("low", ["1.0", "0.3", "0.0"])
@pytest.mark.parametrize("control", ["none", "inverse"])
def test_gradient_is_the_policy_gradient_of_the_gated_reward(case, target, low, control):
    args = arguments("--gate-target", target, "--gate-interpolation", low)
    args.gate_control = control
    found, want = estimate(case, args), shaped_gradient(case, args, control)
    assert torch.allclose(found, want, atol=1e-7), (found - want).abs().max()
    plain = estimate(case, arguments(*NEUTRAL))
    assert (found - plain).abs().max() > 1e-3  # it is not the reverse KL's


def test_random_gate_scales_whole_rollouts(case):
    """Expected over the coins: every token has its rollout's mean gate."""
    student, _, _, _, probs, _ = case
    args = arguments("--gate-control", "random", "--gate-interpolation", "0.3")
    orders = torch.tensor(list(itertools.permutations([0.1, 0.4, 0.8])))[:, None]
    found = sum(
        expected_gradient(student, probs, lambda i, c=coin: loss_of(case, args, i, coin=c)) / 6
        for coin in orders
    )
    assert torch.allclose(found, shaped_gradient(case, args, "random"), atol=1e-7)


def test_verdict_zero_and_neutral_gates_are_the_reverse_kl(case):
    student, teacher, _, completions, probs, _ = case
    p, q = student.logp(completions), teacher.logp(completions).detach()
    value = (probs[:, None] * (p.exp() * (p - q)).sum(-1)).sum()
    want = torch.autograd.grad(value, student.table)[0]
    unverified = (*case[:5], torch.zeros(len(completions)))
    for target in ("scalar", "reference"):
        gated = arguments("--gate-target", target)
        assert torch.allclose(estimate(unverified, gated), want, atol=1e-10)
        neutral = arguments("--gate-target", target, *NEUTRAL)
        assert torch.allclose(estimate(case, neutral), want, atol=1e-10)


@pytest.mark.parametrize("low", ["1.0", "0.2"])
def test_scalar_gate_leaves_the_fixed_point_where_it_was(low):
    """The gate is a step size: only the teacher is stationary, wrong as its tokens may be."""
    student, teacher = TableLM(4, 1, 5), TableLM(4, 1, 6)
    completions, args = all_completions(4, 1), arguments("--gate-interpolation", low)
    args.valid_vocab, verdict = 4, torch.tensor([1.0, -1, -1, 0])
    for _ in range(300):
        probs = student.token_logp(completions).sum(1).exp()
        at = (student, teacher, teacher, completions, probs, verdict)
        student.table.data -= 4.0 * estimate(at, args)
    assert torch.allclose(student.table.softmax(-1), teacher.table.softmax(-1), atol=1e-4)


def test_gate_and_advantage_carry_no_gradient(case):
    """Trap 22."""
    student, teacher, reference, completions, _, verdict = case
    for target in ("scalar", "reference"):
        args = arguments("--gate-target", target)
        rollout = exact_rollout(completions, verdict=verdict)
        scores = sg_opd.score({"teacher": teacher, "reference": reference}, rollout, args)
        loss, logged = sg_opd.token_loss(student, rollout, scores, args)
        assert not any(grid.requires_grad for grid in logged.values())
        found = torch.autograd.grad(loss, student.table)[0]
        by_hand = -(logged["advantage"] * student.token_logp(completions)).sum()
        want = torch.autograd.grad(by_hand, student.table)[0]
        assert torch.allclose(found, want, atol=1e-10)
        assert teacher.table.grad is None and reference.table.grad is None


# --------------------------------------------------------------------------- teacher rollouts
def test_loss_on_endorsed_teacher_rollouts(case):
    """nll: the forward KL from the endorsed teacher, whatever teacher_logp is; gated: Eq. (2)."""
    student, teacher, _, completions, _, verdict = case
    q = teacher.token_logp(completions).sum(1).exp().detach() * (verdict > 0)
    endorsed, source = q / q.sum(), torch.ones(1, dtype=torch.int64)
    p = student.token_logp(completions)
    want = torch.autograd.grad(-(endorsed[:, None] * p).sum(), student.table)[0]
    args = arguments()
    found = expected_gradient(student, endorsed, lambda i: loss_of(case, args, i, source=source))
    assert torch.allclose(found, want, atol=1e-7)
    args = arguments("--teacher-rollout-loss", "gated")
    delta = (teacher.token_logp(completions) - p).detach()
    advantage = torch.where(delta > 0, 1.8, 1.0) * delta
    p = student.token_logp(completions)
    want = torch.autograd.grad(-(endorsed[:, None] * advantage * p).sum(), student.table)[0]
    found = expected_gradient(student, endorsed, lambda i: loss_of(case, args, i, source=source))
    assert torch.allclose(found, want, atol=1e-7)


@pytest.mark.parametrize("loss", ["nll", "gated"])
def test_importance_weights_are_for_the_students_rollouts(case, loss):
    """behaviour_logp of a teacher rollout is the teacher's: no weight, and nothing logged."""
    student, teacher, reference, completions, _, _ = case
    args = arguments("--updates-per-rollout", "2", "--teacher-rollout-loss", loss)
    stale = student.token_logp(completions).detach() - 1.0
    found = []
    for source in (0, 1):
        rollout = exact_rollout(completions, behaviour_logp=stale)
        rollout.source[:], rollout.verdict = source, torch.ones(len(completions))
        scores = sg_opd.score({"teacher": teacher, "reference": reference}, rollout, args)
        loss_sum, logged = sg_opd.token_loss(student, rollout, scores, args)
        plain = -(logged["advantage"] * student.token_logp(completions)).sum()
        found.append(float((loss_sum / plain).detach()))
        assert torch.allclose(logged["policy_log_ratio"], torch.tensor(1.0 - source).double())
    assert found == pytest.approx([math.e, 1.0])


def test_teacher_share_decays_by_a_cosine_to_zero():
    args = arguments("--teacher-share", "0.5", "--teacher-phase-steps", "8")
    shares = [sg_opd.teacher_share(step, args) for step in range(12)]
    assert shares[0] == 0.5 and shares[4] == pytest.approx(0.25) and shares[8:] == [0.0] * 4
    assert shares[2] == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in itertools.pairwise(shares[:9]))
    assert sg_opd.teacher_share(0, arguments(*OFF)) == 0.0


def prepared(folder, *more: str):
    args = sg_opd.parse_args(flags(folder, "unused", *more))
    loaded, tokenizer = tinylm.load(sg_opd, args)
    texts = ["1+2=", "a", "12+345="]
    prompts = [opd.Prompt(tuple(tokenizer.encode(text)), text, text, "", {}) for text in texts]
    return loaded, tokenizer, prompts, args


def scripted(*answers: list[float]):
    """A verifier that gives these verdicts, one list a call."""
    queue = list(answers)
    return lambda items: [x for x, _ in zip(queue.pop(0), items, strict=True)]


def same_row(one, i: int, two, j: int) -> bool:
    a, b = rollouts.select(one, torch.tensor([i])), rollouts.select(two, torch.tensor([j]))
    names = ["prompt_ids", "completion_ids", "completion_mask", "behaviour_logp", "rollout_logp"]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in [*names, "ended"])


def test_endorsed_teacher_rollouts_replace_and_rejected_ones_are_counted(folder):
    """5 are offered: one for every prompt, then a second; +1, -1, +1, 0, +1 by the verifier."""
    loaded, tokenizer, prompts, args = prepared(folder, "--teacher-share", "0.42")
    students = [1.0, -1.0] * 6
    verifier = scripted(students, [1.0, -1.0, 1.0, 0.0, 1.0])
    found, metrics = sg_opd.collect(loaded, tokenizer, verifier, prompts, args, 0)
    plain, _ = opd.collect(loaded, tokenizer, scripted(students), prompts, args, 0)
    offered = [0, 4, 8, 1, 5]  # rows: prompt 0, 1, 2, then 0, 1 again
    taken = [0, 8, 5]
    assert found.source.nonzero()[:, 0].tolist() == sorted(taken)
    want = [1.0 if row in taken else students[row] for row in range(12)]
    assert found.verdict.tolist() == want
    repeated = [prompt for prompt in prompts for _ in range(4)]
    assert found.prompts == repeated
    uniform = sg_opd.uniforms(12, "teacher", 0, args)[offered]
    teacher = sg_opd.sample(loaded["teacher"], [repeated[row] for row in offered], uniform, args)
    for row in range(12):
        if row in taken:
            assert same_row(found, row, teacher, offered.index(row))
        else:  # rejected or not offered: the very rollout of opd.py
            assert same_row(found, row, plain, row)
    scored = sg_opd.token_logp(loaded["teacher"], found, args)
    mask = found.completion_mask & (found.source[:, None] == 1)
    assert torch.allclose(scored[mask], found.behaviour_logp[mask], atol=1e-4)
    assert metrics["num_teacher_rejected"] == 2.0
    assert metrics["teacher_pass_rate"] == 0.75 and metrics["student_pass_rate"] == 0.5
    assert metrics["teacher_share"] == 0.25


def test_nothing_endorsed_and_after_the_phase_is_opd(folder):
    loaded, tokenizer, prompts, args = prepared(folder, "--teacher-share", "0.5")
    students = [1.0, -1.0] * 6
    plain, _ = opd.collect(loaded, tokenizer, scripted(students), prompts, args, 0)
    verifier = scripted(students, [-1.0] * 6)
    found, metrics = sg_opd.collect(loaded, tokenizer, verifier, prompts, args, 0)
    assert metrics["num_teacher_rejected"] == 6.0 and metrics["teacher_share"] == 0.0
    assert all(same_row(found, row, plain, row) for row in range(12))
    for step in (20, 21):  # no teacher is asked: the verifier has one list of answers only
        plain, _ = opd.collect(loaded, tokenizer, scripted(students), prompts, args, step)
        verifier = scripted(students)
        found, metrics = sg_opd.collect(loaded, tokenizer, verifier, prompts, args, step)
        assert metrics == {"student_pass_rate": 0.5, "teacher_share": 0.0}
        assert all(same_row(found, row, plain, row) for row in range(12))
        assert not found.source.any()


def test_group_verdict_is_of_the_batch_that_is_trained(folder):
    """A teacher rollout among wrong ones makes these the wrong ones of a group."""
    more = ["--verdict", "group", "--teacher-share", "0.25"]
    loaded, tokenizer, prompts, args = prepared(folder, *more)
    students = [-1.0] * 8 + [1.0, 1.0, -1.0, 0.0]
    verifier = scripted(students, [1.0, -1.0, 1.0])
    found, metrics = sg_opd.collect(loaded, tokenizer, verifier, prompts, args, 0)
    want = [[1, -1, -1, -1], [0, 0, 0, 0], [1, 1, -1, 0]]
    assert found.extra["group_verdict"].view(3, 4).tolist() == want
    assert metrics["student_pass_rate"] == pytest.approx(2 / 11)  # the verifier's own word
    # So are all metrics: a group that is all alike is no group without verdicts.
    assert found.verdict.view(3, 4).tolist() == [[1, -1, -1, -1], [-1] * 4, [1, 1, -1, 0]]
    assert sg_opd.diagnose.rollout_metrics(found)["unverified_share"] == pytest.approx(1 / 12)
    # The gate goes by the group's: nothing is gated where it has no sign.
    student = loaded["student"]
    _, logged = sg_opd.token_loss(student, found, sg_opd.score(loaded, found, args), args)
    plain = (logged["gate"] == 1.0) | ~found.trained_mask
    assert plain[4:8].all() and not plain[:4].all()


def test_agreement_is_counted_on_the_students_rollouts(folder):
    """Parts and shares of all trained tokens; micro-batches do not matter, random gate or not."""
    loaded, tokenizer, prompts, args = prepared(
        folder, "--gate-control", "random", "--teacher-share", "0.25"
    )
    verifier = scripted([1.0, -1.0, 0.0] * 4, [1.0] * 3)
    rollout, _ = sg_opd.collect(loaded, tokenizer, verifier, prompts, args, 0)
    assert 0 <= rollout.extra["coin"].min() and rollout.extra["coin"].std() > 0.1
    args.lr, optimizer = 0.0, sg_opd.make_optimizer(loaded["student"], args)
    found = []
    for args.micro_batch_tokens in (100000, 1):
        batch = [(m, sg_opd.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
        found.append(sg_opd.train_step(loaded["student"], optimizer, batch, args, 0))
    assert found[0] == pytest.approx(found[1], abs=1e-4, nan_ok=True)  # NaN: an empty decile
    mask, own = rollout.trained_mask, rollout.source[:, None] == 0
    log_ratio = sg_opd.token_logp(loaded["student"], rollout, args)
    log_ratio = log_ratio - sg_opd.score(loaded, rollout, args)["teacher_logp"]
    for name, sign in (("correct", 1), ("incorrect", -1)):
        on = mask & own & (rollout.verdict[:, None] == sign)
        agreement = found[0][f"agree_{name}_mean"] / found[0][f"{name}_mean"]
        assert agreement == pytest.approx((sign * log_ratio < 0)[on].float().mean().item())
        assert found[0][f"{name}_mean"] == pytest.approx(on.sum().item() / mask.sum().item())


def test_resume_inside_the_phase_equals_an_uninterrupted_run(folder):
    """2 + kill + 2 steps are 4, with teacher rollouts and a random gate before and after."""
    more = ["--steps", "4", "--gate-control", "random", "--teacher-share", "0.5"]
    sg_opd.main(flags(folder, "whole", *more))
    sg_opd.main(flags(folder, "parts", *more))
    for path in (folder / "parts/checkpoints/step_4").rglob("*"):
        path.unlink() if path.is_file() else None
    sg_opd.main(flags(folder, "parts", *more, "--resume"))
    assert equal(weights(folder, "whole", 4), weights(folder, "parts", 4))
    shares = [
        [row["teacher_share"] for row in files.read_metrics(folder / run)]
        for run in ("whole", "parts")
    ]
    assert shares[0] == shares[1] and sum(shares[0][:2]) > 0 and sum(shares[0][2:]) > 0


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--teacher", "x"], "exopd.py"),
        (["--reference", "x"], "--gate-target reference"),
        (["--verdict", "group", "--rollouts-per-prompt", "1"], "--rollouts-per-prompt"),
        (["--teacher-share", "1.5"], "[0,1]"),
        (["--gate-interpolation", "-1"], "[0,inf)"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(folder, capsys, more, word):
    with pytest.raises(SystemExit) as stop:
        sg_opd.main(flags(folder, "no", *more))
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and word in text, text


def test_a_reference_exists_only_where_it_is_used():
    assert "reference" not in sg_opd.model_paths(sg_opd.parse_args([]))
    args = sg_opd.parse_args(["--gate-target", "reference"])
    assert sg_opd.model_paths(args)["reference"] == args.student
    args = sg_opd.parse_args(["--gate-target", "reference", "--reference", "x"])
    assert sg_opd.model_paths(args)["reference"] == "x"
