"""tropd.py: what is inside of the trust region, which gradient each part has, and the prefixes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import opd
import pytest
import tinylm
import torch
import tropd
from tablelm import TableLM, all_completions, expected_gradient, rollout_of
from tinylm import equal, weights

from opd_run import data, retry

VOCAB, LENGTH, SIZE = 3, 2, 2
WIDTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("tropd"), eos_token_id=[1, 7])


def flags(folder, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher"}
    paths |= {"--prompts": "prompts.jsonl", "--run-dir": run}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = f"--max-completion-tokens {WIDTH} --prompts-per-step 3 --rollouts-per-prompt 2"
    rest = "--steps 3 --save-every 2 --eval-every 0 --device cpu"
    return [*named, *sizes.split(), *rest.split(), *more]


def prepared(folder, *more: str, step: int = 0):
    """(models, args, prompts, verified texts, what `collect` returns for 6 prompts x 2)."""
    args = tropd.parse_args(flags(folder, "unused", *more))
    loaded, tokenizer = tinylm.load(tropd, args)
    texts = ["1+2=", "a", "12+345=", "hello", "9", "7-7="]
    chosen = [tropd.Prompt(tuple(tokenizer.encode(text)), text, "", "", {}) for text in texts]
    seen: list[str] = []

    def verifier(items):
        seen.extend(item[0] for item in items)
        return [0.0] * len(items)

    collected = tropd.collect(loaded, tokenizer, tinylm.Verdicts(verifier), chosen, args, step)
    return loaded, args, chosen, seen, collected


# ------------------------------------------------------------------------------------- collapse
@pytest.mark.parametrize(
    "neutral",
    [
        ["--acceptance", "always"],
        ["--outlier", "clip", "--outlier-threshold=-1e30"],  # an infinite trust region
        ["--outlier", "mask", "--outlier-threshold=-1e30"],
    ],
    ids=["always", "clip", "mask"],
)
def test_an_infinite_trust_region_is_opd_bit_for_bit(folder, neutral):
    """Trap 22: everything accepted and no prefix, 3 steps: the weights of opd.py."""
    opd.main(flags(folder, "opd", "--overwrite"))
    tropd.main(flags(folder, "neutral", *neutral, "--no-guidance", "--overwrite"))
    assert equal(weights(folder, "opd"), weights(folder, "neutral"))
    tropd.main(flags(folder, "guided", *neutral, "--overwrite"))
    assert not equal(weights(folder, "opd"), weights(folder, "guided"))


@pytest.mark.parametrize("source", ["sampled", "file"])
def test_resume_inside_guidance_equals_an_uninterrupted_run(folder, source, tmp_path):
    """2 + kill + 2 steps are 4, prefixes and coins included."""
    more = ["--steps", "4"]
    if source == "file":
        more += ["--teacher-rollouts", teacher_file(folder, tmp_path)]
    tropd.main(flags(folder, f"whole_{source}", *more))
    tropd.main(flags(folder, f"parts_{source}", *more))
    for path in (folder / f"parts_{source}/checkpoints/step_4").rglob("*"):
        path.unlink() if path.is_file() else None
    tropd.main(flags(folder, f"parts_{source}", *more, "--resume"))
    assert equal(weights(folder, f"whole_{source}", 4), weights(folder, f"parts_{source}", 4))
    lines = (folder / f"parts_{source}/metrics.jsonl").read_text().splitlines()
    lengths = [json.loads(line)["prefix_length"] for line in lines]
    assert lengths[2] > 0 or source == "sampled"  # the resumed part was guided, too


def teacher_file(folder, tmp_path) -> str:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    path = tmp_path / "teacher.jsonl"
    lines = [
        {"prompt": row["prompt"], "completion": text}
        for row in rows
        for text in ("abcdefgh", "abcdef<end>gh")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# ---------------------------------------------------------------------------------- enumeration
def arguments(*more: str):
    args = tropd.parse_args(["--outlier-support", str(SIZE), "--no-guidance", *more])
    return args


def exact_rollout(completions: torch.Tensor, **changes):
    zeros = torch.zeros(completions.shape, dtype=torch.float64)
    return rollout_of(tropd, completions, **({"behaviour_logp": zeros} | changes))


@pytest.fixture(scope="module")
def pair():
    return TableLM(VOCAB, LENGTH, 1, 1.5), TableLM(VOCAB, LENGTH, 2, 1.5)


def estimate(pair, args) -> torch.Tensor:
    """Exact expectation of `token_loss`'s gradient over completions and over both faces of a coin.

    A coin just below 1 is rejected unless acceptance is 1: each token is accepted (coin 0) with
    its probability and rejected with the rest.
    """
    student, teacher = pair
    completions = all_completions(student.vocab, student.length)
    probs = student.token_logp(completions).sum(1).exp().detach()
    accept = (teacher.token_logp(completions) - student.token_logp(completions)).exp().clamp(max=1)
    cases, weight = [], []
    for i in range(len(completions)):
        for faces in itertools.product((True, False), repeat=student.length):
            chance = torch.where(torch.tensor(faces), accept[i], 1 - accept[i]).prod()
            if chance > 0:
                cases.append((i, torch.where(torch.tensor(faces), 0.0, 1 - 1e-7)[None]))
                weight.append(probs[i] * chance.detach())

    def loss(case: int):
        i, coin = cases[case]
        rollout = exact_rollout(completions[i : i + 1], coin=coin)
        scores = tropd.score({"teacher": teacher}, rollout, args)
        return tropd.token_loss(student, rollout, scores, args)[0]

    assert torch.stack(weight).sum().item() == pytest.approx(1.0)
    return expected_gradient(student, torch.stack(weight), loss)


def wanted(pair, args) -> torch.Tensor:
    """The same mean, written down: sum over prefixes and tokens, without ops or coins."""
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    p, q = student.logp(completions), teacher.logp(completions).detach()
    visits, total = student.token_logp(completions).sum(1).exp().detach(), 0.0
    for i, completion in enumerate(completions):
        for t, y in enumerate(completion.tolist()):
            delta = (q[i, t, y] - p[i, t, y]).detach()  # the advantage
            chance = delta.exp().clamp(max=1.0)
            inside = q[i, t].topk(args.outlier_support).indices
            target = q[i, t, inside].exp()
            if args.outlier_renormalise:
                target = target / target.sum()
            forward = (target * (target.log() - p[i, t, inside])).sum()
            if args.outlier == "clip":
                chance, outlier = 1.0, 0.0
                delta = delta.clamp(min=args.outlier_threshold)
            elif args.outlier == "mask":
                chance, outlier = float(delta >= args.outlier_threshold), 0.0
            elif args.outlier_form == "scalar":
                outlier = forward.detach() * p[i, t, y]
            else:
                outlier = forward
            value = -chance * delta * p[i, t, y] + (1 - chance) * outlier
            total = total + visits[i] * value
    return torch.autograd.grad(total, student.table)[0]


FORMS = [
    [],
    ["--no-outlier-renormalise"],
    ["--outlier-form", "scalar"],
    ["--outlier-form", "scalar", "--no-outlier-renormalise"],
]


@pytest.mark.parametrize("acceptance", ["sampled", "expected"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "default")
def test_gradient_is_the_papers(pair, form, acceptance):
    """Eq. (2), (4), (5): the coin and its mean have one expectation, for both forms (trap 3)."""
    args = arguments("--acceptance", acceptance, *form)
    found, want = estimate(pair, args), wanted(pair, args)
    assert torch.allclose(found, want, atol=1e-9), (found - want).abs().max()
    plain = wanted(pair, arguments("--outlier", "clip", "--outlier-threshold=-1e30"))
    assert (found - plain).abs().max() > 0.01  # it is not the reverse KL's gradient


@pytest.mark.parametrize("outlier", ["clip", "mask"])
def test_gradient_of_clip_and_mask(pair, outlier):
    """Eq. (6): outliers have the threshold, or 0, for an advantage."""
    args = arguments("--outlier", outlier, "--outlier-threshold", "-0.5")
    found, want = estimate(pair, args), wanted(pair, args)
    assert torch.allclose(found, want, atol=1e-9)
    other = arguments("--outlier", {"clip": "mask", "mask": "clip"}[outlier])
    other.outlier_threshold = -0.5
    assert not torch.allclose(found, wanted(pair, other), atol=1e-3)


def exact_gradient(pair, divergence):
    """Of `divergence(student_logp, teacher_logp)` at each visited prefix, visits held fixed."""
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    p, q = student.logp(completions), teacher.logp(completions).detach()
    visits = student.token_logp(completions).sum(1).exp().detach()
    value = (visits[:, None] * divergence(p, q).sum(-1)).sum()
    return torch.autograd.grad(value, student.table)[0]


def test_always_is_the_reverse_kl(pair):
    want = exact_gradient(pair, lambda p, q: p.exp() * (p - q))
    assert torch.allclose(estimate(pair, arguments("--acceptance", "always")), want, atol=1e-9)


def test_never_is_the_forward_kl(pair):
    """Every token is an outlier: with the whole vocabulary as support, KL(teacher to student)."""
    want = exact_gradient(pair, lambda p, q: q.exp() * (q - p))
    args = arguments("--acceptance", "never", "--outlier-support", f"{VOCAB}")
    assert torch.allclose(estimate(pair, args), want, atol=1e-6)


def test_renormalising_divides_the_outlier_gradient_by_the_teachers_mass(pair):
    """sum_S q log(q/p) = q(S) (KL(q^||p) + log q(S)): one fixed point, p = q^ on S."""
    rollout = exact_rollout(all_completions(VOCAB, LENGTH))
    grids = []
    for form in ([], ["--no-outlier-renormalise"]):
        args = arguments("--acceptance", "expected", *form)
        scores = tropd.score({"teacher": pair[1]}, rollout, args)
        target = scores["support_logp"].exp()
        grids.append((target, target.sum(-1)))
    mass = grids[1][1]
    assert torch.allclose(grids[0][1], torch.ones_like(mass)) and (mass < 0.99).any()
    assert torch.allclose(grids[0][0] * mass[..., None], grids[1][0])


def test_the_acceptance_rate_is_one_minus_total_variation():
    """E[accepted] = 1 - TV(student, teacher) at each prefix, by coin and by its mean."""
    student, teacher = TableLM(VOCAB, 1, 1, 3.0), TableLM(VOCAB, 1, 2, 3.0)
    completions = all_completions(VOCAB, 1)
    student_law, teacher_law = (e.table[0].softmax(-1).detach() for e in (student, teacher))
    want = 1 - (student_law - teacher_law).abs().sum() / 2
    coins = (torch.arange(4000) + 0.5) / 4000
    for acceptance in ("expected", "sampled"):
        args = arguments("--acceptance", acceptance)
        many = completions.repeat_interleave(len(coins), 0)
        rollout = exact_rollout(many, coin=coins.repeat(VOCAB)[:, None])
        scores = tropd.score({"teacher": teacher}, rollout, args)
        _, logged = tropd.token_loss(student, rollout, scores, args)
        mean = logged["accepted"].view(VOCAB, -1).double().mean(1)
        assert (student_law * mean).sum().item() == pytest.approx(want.item(), abs=3e-4)
    assert 0.1 < want < 0.9


def test_a_bad_token_pulls_by_at_most_one_over_e():
    """Expected coefficient of an accepted token: u |log u| <= 1/e for u = teacher / student < 1."""
    student, teacher = TableLM(5, 1, 1, 6.0), TableLM(5, 1, 2, 6.0)
    rollout = exact_rollout(all_completions(5, 1))
    args = arguments("--acceptance", "expected")
    args.valid_vocab = 5
    scores = tropd.score({"teacher": teacher}, rollout, args)
    _, logged = tropd.token_loss(student, rollout, scores, args)
    pull = logged["accepted"] * logged["advantage"]
    assert logged["advantage"].min() < -5 and pull.min() >= -1 / math.e - 1e-6
    assert (logged["accepted"][logged["advantage"] > 0] == 1).all()  # liked: always accepted


def test_a_token_that_the_teacher_excludes_is_finite():
    """Log-ratio infinite: it is an outlier, and 0 * inf is no NaN."""
    student, teacher = TableLM(VOCAB, 1, 1), TableLM(VOCAB, 1, 2)
    teacher.table.data[0, 0] = -math.inf
    rollout = exact_rollout(torch.tensor([[0]]))
    for acceptance in ("sampled", "expected"):
        args = arguments("--acceptance", acceptance)
        scores = tropd.score({"teacher": teacher}, rollout, args)
        loss, logged = tropd.token_loss(student, rollout, scores, args)
        assert torch.isfinite(loss) and logged["accepted"].item() == 0.0
        assert torch.isfinite(torch.autograd.grad(loss, student.table)[0]).all()


def test_a_scalar_outlier_only_pushes_its_token_down(pair):
    """The official code's form: the outlier's advantage is never above log student(S) <= 0."""
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    rollout = exact_rollout(completions, coin=torch.full(completions.shape, 1 - 1e-7))
    args = arguments("--outlier-form", "scalar")
    scores = tropd.score({"teacher": teacher}, rollout, args)
    _, logged = tropd.token_loss(student, rollout, scores, args)
    advantage = logged["outlier_loss"] / -student.token_logp(completions)
    mass = student.logp(completions).gather(2, scores["support_ids"]).exp().sum(-1)
    outlier = logged["outlier"] > 0
    assert outlier.any() and (advantage <= mass.log() + 1e-9)[outlier].all()


def test_nothing_flows_through_acceptance_or_advantage(pair):
    """Trap 22: gradients reach log student through the loss only; the teacher has none."""
    student, teacher = pair
    rollout, args = exact_rollout(all_completions(VOCAB, LENGTH)), arguments()
    scores = tropd.score({"teacher": teacher}, rollout, args)
    assert not any(grid.requires_grad for grid in scores.values())
    loss, logged = tropd.token_loss(student, rollout, scores, args)
    assert not any(grid.requires_grad for grid in logged.values())
    accepted, advantage = logged["accepted"].double(), logged["advantage"].double()
    p = student.token_logp(rollout.completion_ids)
    target = scores["support_logp"]
    support = student.logp(rollout.completion_ids).gather(2, scores["support_ids"])
    forward = (target.exp() * (target - support)).sum(-1)
    by_hand = (-accepted * advantage * p + (1 - accepted) * forward).sum()
    for one, two in zip(*(torch.autograd.grad(x, student.table) for x in (loss, by_hand))):
        assert torch.allclose(one, two, atol=1e-6)
    assert teacher.table.grad is None


def test_importance_weight_is_on_the_policy_gradients_only(pair):
    """Several updates: sampled terms are weighted (capped), the forward KL is exact and is not."""
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    p = student.token_logp(completions).detach()
    behaviour_logp = p - math.log(3.0)  # weight 3
    for form, weighted in (([], ["trust"]), (["--outlier-form", "scalar"], ["trust", "outlier"])):
        found = []
        for updates in ("1", "2"):
            args = arguments("--acceptance", "expected", *form, "--updates-per-rollout", updates)
            rollout = exact_rollout(completions, behaviour_logp=behaviour_logp)
            scores = tropd.score({"teacher": teacher}, rollout, args)
            found.append(tropd.token_loss(student, rollout, scores, args)[1])
        for name in ("trust", "outlier"):
            one, two = (logged[f"{name}_loss"] for logged in found)
            assert torch.allclose(two, one * (3.0 if name in weighted else 1.0), atol=1e-6), name


def test_a_support_beyond_the_vocabulary_is_the_whole_forward_kl(pair):
    student, teacher = pair
    rollout = exact_rollout(all_completions(VOCAB, LENGTH), coin=torch.full((9, LENGTH), 1 - 1e-7))
    args = tropd.parse_args(["--no-guidance"])  # 64 of 3
    scores = tropd.score({"teacher": teacher}, rollout, args)
    _, logged = tropd.token_loss(student, rollout, scores, args)
    p, q = student.logp(rollout.completion_ids), teacher.logp(rollout.completion_ids)
    want = (q.exp() * (q - p)).sum(-1)
    outlier = logged["outlier"] > 0
    assert outlier.any()
    assert torch.allclose(logged["outlier_loss"][outlier], want[outlier].detach(), atol=1e-9)


# --------------------------------------------------------------------------------------- prefix
def with_prefix(pair, *more: str):
    """(loss, logged, rollout): token 0 of each completion is the teacher's."""
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    rollout = exact_rollout(completions)
    rollout.prefix_mask[:, 0], rollout.response_mask[:, 0] = True, False
    args = arguments("--guidance", "--guidance-weight", "0.5", *more)
    scores = tropd.score({"teacher": teacher}, rollout, args)
    return *tropd.token_loss(student, rollout, scores, args), rollout


def test_the_prefix_term_raises_the_teachers_tokens(pair):
    """beta (log teacher - log student), differentiable: its gradient is -beta grad log student."""
    student = pair[0]
    loss, logged, rollout = with_prefix(pair)
    p, q = (each.token_logp(rollout.completion_ids) for each in pair)
    assert torch.allclose(logged["guidance_loss"][:, 0], 0.5 * (q - p)[:, 0].detach(), atol=1e-9)
    assert (logged["guidance_loss"][:, 1:] == 0).all()
    for name in ("trust_loss", "outlier_loss", "policy_log_ratio"):
        assert (logged[name][:, 0] == 0).all(), name  # no coin for what the student did not draw
    for name in ("accepted", "outlier"):
        assert logged[name][:, 0].isnan().all() and not logged[name][:, 1:].isnan().any(), name
    parts = sum(logged[f"{name}_loss"].sum() for name in ("trust", "outlier", "guidance"))
    assert loss.item() == pytest.approx(parts.item())
    found = torch.autograd.grad(loss, student.table)[0][0]  # the row that predicts token 0
    want = torch.autograd.grad(-0.5 * p[:, 0].sum(), student.table)[0][0]
    assert torch.allclose(found, want, atol=1e-9)


def test_the_scalar_prefix_term_has_the_wrong_sign(pair):
    """The official code's form (second-hand) lowers tokens that the student underrates."""
    student, _ = pair
    loss, _, rollout = with_prefix(pair, "--guidance-form", "scalar")
    p, q = (each.token_logp(rollout.completion_ids)[:, 0] for each in pair)
    found = torch.autograd.grad(loss, student.table)[0][0]
    want = torch.autograd.grad((0.5 * (q - p).detach() * p).sum(), student.table)[0][0]
    assert torch.allclose(found, want, atol=1e-9)
    assert ((q - p) > 0).any()  # there the loss rises with log student: it is pushed down


def test_prefixes_keep_the_rules(folder):
    """No EOS, at least one token for the student, masks disjoint, Eq. (7), texts whole."""
    for step in (0, 1, 2):
        loaded, args, prompts, seen, (rollout, metrics) = prepared(folder, "--seed", "3", step=step)
        prefix, response = rollout.prefix_mask, rollout.response_mask
        stop = tropd.stop_ids(loaded["student"].facts)
        assert not (prefix & response).any()
        assert torch.equal(prefix | response, rollout.completion_mask)
        assert not torch.isin(rollout.completion_ids[prefix], torch.tensor(stop)).any()
        assert response.any(1).all() and rollout.completion_ids.shape[1] <= WIDTH
        starts = prefix.sum(1)
        assert torch.equal(prefix, torch.arange(prefix.shape[1]) < starts[:, None])
        assert [each.ids for each in rollout.prompts] == [p.ids for p in prompts for _ in "ab"]
        for row, each in enumerate(rollout.prompts):
            assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == list(each.ids)
        guided = starts.view(-1, 2)
        assert (guided[:, 1] == 0).all()  # one of the two rollouts of a prompt
        alpha = 0.5 + 0.5 * math.cos(math.pi * step / 3)
        theirs = tropd.sample(
            loaded["teacher"], prompts, tropd.uniforms(6, "teacher", step, args), args
        )
        for row, start in enumerate(guided[:, 0].tolist()):
            ids = theirs.completion_ids[row][theirs.completion_mask[row]].tolist()
            ended = ids[-1] in stop
            assert start == min(int(alpha * len(ids)), WIDTH - 1, len(ids) - ended)
            assert rollout.completion_ids[2 * row, :start].tolist() == ids[:start]
        num = int((starts > 0).sum())
        assert metrics["prefix_length"] == pytest.approx(int(starts.sum()) / max(num, 1))
        assert metrics["guided_share"] == num / 12
        assert len(seen) == 12 and (rollout.source == 0).all()
        if step == 0:
            assert num > 0 and metrics["prefix_length"] > 2


def test_log_probs_follow_their_tokens_into_the_completion(folder):
    """After the move of columns, a teacher-forced pass gives what the sampler recorded."""
    loaded, args, _, _, (rollout, _) = prepared(folder, "--seed", "3")
    logp = tropd.token_logp(loaded["student"], rollout, args)
    response = rollout.response_mask
    assert torch.allclose(logp[response], rollout.behaviour_logp[response], atol=1e-4)
    assert (rollout.behaviour_logp[rollout.prefix_mask] == 0).all()
    scores = tropd.score(loaded, rollout, args)
    _, logged = tropd.token_loss(loaded["student"], rollout, scores, args)
    assert logged["policy_log_ratio"].abs().max() < 1e-4


def test_guidance_fades_to_nothing(folder):
    """alpha goes from 1 to 0 by a cosine; with less than a token left the teacher is not asked."""
    args = tropd.parse_args(flags(folder, "unused", "--steps", "10"))
    loaded, tokenizer = tinylm.load(tropd, args)
    teacher, prompts = loaded["teacher"], [tropd.Prompt((2, 5, 3), "", "", "", {})] * 2
    lengths = []
    for step in range(11):
        args.teacher_rollouts = None
        found = tropd.teacher_prefixes(teacher, tokenizer, prompts, args, step)
        lengths.append(sum(map(len, found)))
    assert lengths[0] == WIDTH - 1 or lengths[0] > 0
    assert lengths[-1] == lengths[9] == 0
    assert tropd.teacher_prefixes(teacher, tokenizer, prompts, args, 10) == [(), ()]
    args.guidance = False
    assert tropd.teacher_prefixes(teacher, tokenizer, prompts, args, 0) == [(), ()]


def test_prefixes_from_a_file(folder, tmp_path):
    """Prompts are found by their text; EOS and what follows is left; prompts without: no prefix."""
    path = tmp_path / "teacher.jsonl"
    lines = [("1+2=", "abcdefgh"), ("a", "ab<end>cdefg"), ("hello", "")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines))
    more = ["--teacher-rollouts", str(path)]
    _, _, _, _, (rollout, metrics) = prepared(folder, *more)
    assert rollout.prefix_mask.sum(1).view(-1, 2).tolist() == [[7, 0], [2, 0]] + [[0, 0]] * 4
    assert metrics == {"prefix_length": 4.5, "guided_share": 2 / 12}
    shown = [tinylm.WORDS[i] for i in rollout.completion_ids[0, :7].tolist()]
    assert "".join(shown) == "abcdefg"


def test_several_teacher_rollouts_of_a_prompt_take_turns(folder, tmp_path):
    path = teacher_file(folder, tmp_path)
    seen = set()
    texts = data.completions_of(path, "prompt", "completion")
    prompt = next(iter(texts))
    args = tropd.parse_args(flags(folder, "unused", "--teacher-rollouts", path))
    for step in range(8):
        chosen = [tropd.Prompt((2,), prompt, "", "", {})] * 2
        found = tropd.teacher_completions(None, tinylm.tokenizer(), chosen, args, step)
        again = tropd.teacher_completions(None, tinylm.tokenizer(), chosen, args, step)
        assert found == again  # a function of seed and step
        seen |= {tuple(ids) for ids in found}
    assert len(seen) == 2


def test_a_prefix_is_placed_by_the_sampler(folder):
    """What follows a prefix is what follows a prompt that ends with it, one token a uniform; it
    stops at the last column, and an EOS that would stand beyond has not ended it."""
    loaded, args, prompts, _, _ = prepared(folder)
    student, uniform = loaded["student"], tropd.uniforms(6, "rollouts", 0, args)
    prefixes = [(), (9,), (5, 6), (7, 8, 9), (4,) * (WIDTH - 1), (10, 11)]
    longer = [replace(p, ids=p.ids + prefix) for p, prefix in zip(prompts, prefixes)]
    want = tropd.sample(student, longer, uniform, args)
    found = tropd.sample(student, prompts, uniform, args, prefixes=prefixes)
    assert found.prompts == prompts and want.ended.any()
    for row, prefix in enumerate(prefixes):
        ids, mask = found.completion_ids[row], found.completion_mask[row]
        assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == list(prompts[row].ids)
        assert found.prefix_mask[row].sum() == len(prefix)
        assert torch.equal(found.response_mask[row], mask & ~found.prefix_mask[row])
        theirs = want.completion_ids[row][want.completion_mask[row]].tolist()
        most = WIDTH - len(prefix)
        assert ids[mask].tolist() == [*prefix, *theirs[:most]]
        assert found.ended[row] == (want.ended[row] and len(theirs) <= most)
        logp = found.behaviour_logp[row][found.response_mask[row]]
        assert torch.allclose(logp, want.behaviour_logp[row, : len(logp)], atol=1e-5)
        assert (found.behaviour_logp[row][found.prefix_mask[row]] == 0).all()


# -------------------------------------------------------------------------------------- the step
def test_micro_batches_do_not_change_the_step(folder):
    """Coins belong to rows: one batch of 12 and 12 batches of one have one gradient."""
    loaded, args, _, _, (rollout, _) = prepared(folder, "--seed", "3")
    assert rollout.prefix_mask.any()
    gradients, accepted = [], []
    for tokens in (100000, 1):
        args.micro_batch_tokens, args.max_grad_norm, args.lr = tokens, math.inf, 0.0
        batch = [(m, tropd.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
        optimizer = tropd.make_optimizer(loaded["student"], args)
        metrics = tropd.train_step(loaded["student"], optimizer, batch, args, 0)
        gradients.append(torch.cat([w.grad.flatten() for w in loaded["student"].parameters()]))
        accepted.append(metrics["accepted_mean"])
        parts = sum(metrics[f"{name}_loss_mean"] for name in ("trust", "outlier", "guidance"))
        assert parts == pytest.approx(metrics["loss"], abs=1e-5)
        # of the student's tokens alone: a prefix is neither
        assert metrics["accepted_mean"] + metrics["outlier_mean"] == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(*gradients, atol=1e-5 * float(gradients[0].abs().max()))
    assert accepted[0] == pytest.approx(accepted[1], abs=1e-6)


def test_coins_are_a_function_of_seed_and_step(folder):
    one, two, other = (
        prepared(folder, "--seed", seed, step=step)[-1][0].extra["coin"]
        for seed, step in (("3", 0), ("3", 0), ("3", 1))
    )
    assert torch.equal(one, two) and not torch.equal(one[:, :3], other[:, :3])
    assert 0 <= one.min() and one.max() < 1 and one.unique().numel() == one.numel()


# --------------------------------------------------------------------------------- usage errors
@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--teacher", "x", "--teacher", "y"], "--teacher"),
        (["--guided-rollouts", "5", "--rollouts-per-prompt", "4"], "--guided-rollouts"),
        (["--teacher-rollouts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--outlier-threshold", "0"], "(-inf,0)"),
        (["--guidance-weight", "-1"], "--guidance-weight"),
        (["--outlier-support", "0"], "--outlier-support"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(more, word, capsys):
    with pytest.raises(SystemExit) as stop:
        tropd.main(more)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_a_file_without_completions_is_refused(folder, capsys):
    argv = flags(folder, "no", "--teacher-rollouts", str(folder / "prompts.jsonl"))
    with pytest.raises(SystemExit) as stop:
        tropd.main(argv)
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "'completion'" in text and "row 1" in text


def test_no_guidance_needs_no_room_for_it():
    args = tropd.parse_args(
        ["--no-guidance", "--rollouts-per-prompt", "1", "--guided-rollouts", "3"]
    )
    assert not args.guidance and tropd.parse_args([]).guidance


def test_little_stray_mass_is_hardly_held_down():
    """A position where the student puts 0.01 on a token of the teacher's 0.0001: the expected push
    by its logit. A token is answered by the forward KL only where it is sampled, so that the push
    is of second order there: what docs/evidence.md finds is left in tropd's students."""
    p, q = 0.01, 0.0001
    student, teacher = TableLM(3, 1, 1), TableLM(3, 1, 2)
    for model, stray in ((student, p), (teacher, q)):
        law = torch.tensor([[stray, 0.6 * (1 - stray), 0.4 * (1 - stray)]], dtype=torch.float64)
        model.table.data = law.log()

    def push(*more: str) -> float:
        args = arguments("--outlier-support", "3", *more)
        return float(estimate((student, teacher), args)[0, 0])

    assert push("--acceptance", "always") == pytest.approx(p * math.log(p / q), rel=0.02)
    assert push("--acceptance", "never") == pytest.approx(p - q)
    assert push("--outlier", "clip") == pytest.approx(p * 0.85, rel=0.02)
    assert push("--outlier", "mask") < q
    assert push() == pytest.approx(q * math.log(p / q) + p * (p - q), rel=0.25)
