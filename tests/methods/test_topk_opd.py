"""topk_opd.py: which gradient each support, tail and divergence has, and what masks do."""

from __future__ import annotations

import math

import opd
import pytest
import tinylm
import topk_opd
import torch
import transformers
from tablelm import TableLM, all_completions, expected_gradient, rollout_of
from tinylm import weights

from opd_run import retry
from opd_run.compat import Facts

VOCAB, LENGTH, SIZE = 4, 2, 2
SUPPORTS = ["teacher", "student", "teacher+sampled"]
FORMS = [["--renormalise"], ["--no-renormalise"], ["--tail", "bucket"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("topk"), eos_token_id=[1, 7, 8, 9])


def flags(folder, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher"}
    paths |= {"--prompts": "prompts.jsonl", "--run-dir": run}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 8 --prompts-per-step 3 --rollouts-per-prompt 2 --steps 3"
    return [*named, *sizes.split(), *"--save-every 2 --eval-every 0 --device cpu".split(), *more]


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def prepared(folder, *more: str):
    """(models, args, tokenizer, what `collect` returns for 6 prompts)."""
    args = topk_opd.parse_args(flags(folder, "unused", *more))
    loaded, tokenizer = tinylm.load(topk_opd, args)
    texts = ["1+2=", "a", "12+345=", "hello", "9", "7-7="]
    chosen = [topk_opd.Prompt(tuple(tokenizer.encode(text)), text, "", "", {}) for text in texts]
    verifier = tinylm.Verdicts(lambda items: [0.0] * len(items))
    return loaded, args, tokenizer, topk_opd.collect(loaded, tokenizer, verifier, chosen, args, 0)


# ------------------------------------------------------------------------------------- collapse
@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_the_whole_vocabulary_is_the_full_divergence(folder, divergence):
    """Trap 24: K = V over 3 steps is opd.py --objective full; renormalised or not is the same."""
    vocab = str(len(tinylm.WORDS))
    common = ["--divergence", divergence, "--jsd-beta", "0.3", "--overwrite", "--lr", "1e-4"]
    opd.main(flags(folder, "full", "--objective", "full", *common))
    want = weights(folder, "full")
    moved = distance(want, models_state(folder, "student"))
    for form in ([], ["--no-renormalise"], ["--tail", "bucket"]):
        more = ["--support-size", vocab, "--top-p", "1", *form, *common]
        topk_opd.main(flags(folder, "k_is_v", *more))
        assert distance(want, weights(folder, "k_is_v")) < 1e-6 < moved, form
    topk_opd.main(flags(folder, "small", "--support-size", "3", "--top-p", "1", *common))
    assert distance(want, weights(folder, "small")) > 1e-5


def models_state(folder, name: str) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


def test_resume_equals_an_uninterrupted_run(folder):
    """2 + kill + 2 steps are 4, with masked and mapped special tokens."""
    more = "--steps 4 --support-size 5 --mask-special-tokens paper --map-eos 3=<end>".split()
    topk_opd.main(flags(folder, "whole", *more))
    topk_opd.main(flags(folder, "parts", *more))
    for path in (folder / "parts/checkpoints/step_4").rglob("*"):
        path.unlink() if path.is_file() else None
    topk_opd.main(flags(folder, "parts", *more, "--resume"))
    assert distance(weights(folder, "whole", 4), weights(folder, "parts", 4)) == 0.0


# ---------------------------------------------------------------------------------- enumeration
def arguments(*more: str, size: int = SIZE):
    args = topk_opd.parse_args(["--support-size", str(size), *more])
    return args


ON_POLICY = "--temperature 1 --loss-temperature 1 --top-p 1 --top-k 0".split()


def exact_rollout(completions: torch.Tensor, **changes):
    zeros = torch.zeros(completions.shape, dtype=torch.float64)
    return rollout_of(topk_opd, completions, **({"behaviour_logp": zeros} | changes))


def estimate(student, teacher, args, length: int = LENGTH) -> torch.Tensor:
    """Exact expectation of the gradient that `token_loss` has on one completion at a time."""
    completions = all_completions(VOCAB, length)
    probs = student.token_logp(completions).sum(1).exp()

    def loss(i: int):
        rollout = exact_rollout(completions[i : i + 1])
        scores = topk_opd.score({"teacher": teacher, "student": student}, rollout, args)
        return topk_opd.token_loss(student, rollout, scores, args)[0]

    return expected_gradient(student, probs, loss)


def by_hand(p: torch.Tensor, q: torch.Tensor, inside: list[int], args) -> torch.Tensor:
    """Divergence of two laws [V] (as log-probs) on a support, written without any op."""
    rest = [v for v in range(VOCAB) if v not in inside]
    student, teacher = p[inside].exp(), q[inside].exp()
    if args.renormalise:
        student, teacher = student / student.sum(), teacher / teacher.sum()
    elif args.tail == "bucket":
        student = torch.cat([student, p[rest].exp().sum()[None]])
        teacher = torch.cat([teacher, q[rest].exp().sum()[None]])
    if args.divergence == "reverse":
        return (student * (student / teacher).log()).sum()
    if args.divergence == "forward":
        return (teacher * (teacher / student).log()).sum()
    b = args.jsd_beta
    mixture = (1 - b) * student + b * teacher
    return (
        b * (teacher * (teacher / mixture).log()).sum()
        + (1 - b) * (student * (student / mixture).log()).sum()
    )


def wanted(student, teacher, args, value=by_hand, length: int = LENGTH) -> torch.Tensor:
    """Gradient of the mean over visited prefixes and tokens of `value`, visits held fixed."""
    completions = all_completions(VOCAB, length)
    p, q = student.logp(completions), teacher.logp(completions).detach()
    visits = student.token_logp(completions).sum(1).exp().detach()
    total = 0.0
    for i, completion in enumerate(completions):
        for t, token in enumerate(completion.tolist()):
            judge = p if args.support == "student" else q
            inside = judge[i, t].topk(args.support_size).indices.tolist()
            if args.support == "teacher+sampled" and token not in inside:
                inside = [*inside, token]
            total = total + visits[i] * value(p[i, t], q[i, t], inside, args)
    return torch.autograd.grad(total, student.table)[0]


@pytest.fixture(scope="module")
def pair():
    return TableLM(VOCAB, LENGTH, 1), TableLM(VOCAB, LENGTH, 2)


def full_reverse(p, q, inside, args):
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[-1])
@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_gradient_is_that_of_the_divergence_on_the_support(pair, support, divergence, form):
    """Eq. (2), (4), (6): exact through the logits, visits held fixed, and not 0 (trap 3)."""
    args = arguments("--support", support, "--divergence", divergence, "--jsd-beta", "0.3", *form)
    want = wanted(*pair, args)
    found = estimate(*pair, args)
    assert torch.allclose(found, want, atol=1e-9), (found - want).abs().max()
    assert want.abs().max() > 0.01
    whole = wanted(*pair, args, full_reverse)
    assert (found - whole).abs().max() > 1e-3  # none of them is the full reverse KL


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_score_tail_is_the_full_reverse_kl(pair, support, size):
    """Eq. (5) is unbiased for the KL over the whole vocabulary at each visited prefix (trap 5)."""
    args = arguments("--tail", "score", "--support", support, *ON_POLICY, size=size)
    want = wanted(*pair, args, full_reverse)
    found = estimate(*pair, args)
    assert torch.allclose(found, want, atol=1e-9), (found - want).abs().max()


def test_without_the_one_the_tail_pushes_mass_out_of_the_support(pair):
    """Trap 5: exact head and sampled tail without +1 = the wanted gradient + that of the mass."""
    student, teacher = pair
    args = arguments("--tail", "score", *ON_POLICY)
    completions = all_completions(VOCAB, LENGTH)
    probs = student.token_logp(completions).sum(1).exp()

    def loss(i: int):
        rollout = exact_rollout(completions[i : i + 1])
        scores = topk_opd.score({"teacher": teacher}, rollout, args)
        value, _ = topk_opd.token_loss(student, rollout, scores, args)
        plus_one = scores["outside"] * student.token_logp(completions[i : i + 1])
        return value - plus_one.sum()

    biased = expected_gradient(student, probs, loss)
    mass = wanted(*pair, args, lambda p, q, inside, args: p[inside].exp().sum())
    assert torch.allclose(biased - wanted(*pair, args, full_reverse), mass, atol=1e-9)
    assert mass.abs().max() > 0.02


def test_value_of_the_score_tail_is_unbiased(pair):
    """`divergence` is the reverse KL in the mean; the loss itself is not its value."""
    student, teacher = pair
    args = arguments("--tail", "score", *ON_POLICY)
    completions = all_completions(VOCAB, LENGTH)
    scores = topk_opd.score({"teacher": teacher}, exact_rollout(completions), args)
    _, logged = topk_opd.token_loss(student, exact_rollout(completions), scores, args)
    visits = student.token_logp(completions).sum(1).exp()
    p, q = student.logp(completions), teacher.logp(completions)
    want = (visits[:, None] * (p.exp() * (p - q)).sum(-1)).sum(0)
    assert torch.allclose((visits[:, None] * logged["divergence"]).sum(0), want, atol=1e-9)
    assert not any(grid.requires_grad for grid in logged.values())
    assert teacher.table.grad is None


def test_importance_weight_is_on_the_sampled_tail_only():
    """Several updates: other weights sampled; the mean is still the full reverse KL."""
    student, teacher, old = (TableLM(VOCAB, 1, seed) for seed in (1, 2, 9))
    args = arguments("--tail", "score", *ON_POLICY, "--updates-per-rollout", "2")
    args.importance_cap = math.inf
    completions = all_completions(VOCAB, 1)
    old_logp = old.token_logp(completions).detach()

    def loss(i: int):
        rollout = exact_rollout(completions[i : i + 1], behaviour_logp=old_logp[i : i + 1])
        scores = topk_opd.score({"teacher": teacher}, rollout, args)
        return topk_opd.token_loss(student, rollout, scores, args)[0]

    found = expected_gradient(student, old_logp.sum(1).exp(), loss)
    p, q = student.logp(completions)[0, 0], teacher.logp(completions)[0, 0].detach()
    want = torch.autograd.grad((p.exp() * (p - q)).sum(), student.table)[0]
    assert torch.allclose(found, want, atol=1e-9)


def descend(student, teacher, args, rate: float, steps: int) -> None:
    for _ in range(steps):
        student.table.data -= rate * estimate(student, teacher, args, 1)


def test_without_renormalisation_the_student_rests_at_teacher_over_e():
    """p = teacher / e on the support, the rest of the mass is thrown anywhere outside."""
    student, teacher = TableLM(VOCAB, 1, 4), TableLM(VOCAB, 1, 5)
    args = arguments("--no-renormalise")
    descend(student, teacher, args, 5.0, 150)
    inside = teacher.table[0].topk(SIZE).indices
    found = student.table.softmax(-1)[0, inside]
    want = teacher.table.softmax(-1)[0, inside] / math.e
    assert torch.allclose(found, want, atol=1e-4)
    scores = topk_opd.score({"teacher": teacher}, exact_rollout(torch.tensor([[0]])), args)
    loss, _ = topk_opd.token_loss(student, exact_rollout(torch.tensor([[0]])), scores, args)
    mass = float(teacher.table.detach().softmax(-1)[0, inside].sum())
    assert loss.item() == pytest.approx(-mass / math.e, abs=1e-4)  # negative: no divergence


def test_with_renormalisation_the_mass_outside_of_the_support_is_left_alone():
    """Shape inside the support is the teacher's; nothing pulls the student's mass into it."""
    student, teacher = TableLM(VOCAB, 1, 4), TableLM(VOCAB, 1, 5)
    inside = teacher.table[0].topk(SIZE).indices
    outside = [v for v in range(VOCAB) if v not in inside]
    before = student.table.data[0, outside].clone()
    descend(student, teacher, arguments(), 5.0, 150)
    found, want = (each.table[0, inside].softmax(-1) for each in (student, teacher))
    assert torch.allclose(found, want, atol=1e-4)
    assert torch.equal(student.table.data[0, outside], before)


@pytest.mark.parametrize("tail", ["bucket", "score"])
def test_with_a_tail_the_mass_is_the_teachers(tail):
    student, teacher = TableLM(VOCAB, 1, 4), TableLM(VOCAB, 1, 5)
    descend(student, teacher, arguments("--tail", tail, *ON_POLICY), 5.0, 200)
    inside = teacher.table[0].topk(SIZE).indices
    found, want = (each.table.softmax(-1)[0, inside] for each in (student, teacher))
    assert torch.allclose(found, want, atol=1e-3)


def test_a_truncated_sum_below_zero_keeps_its_gradient():
    """Trap 6: nothing is clamped at 0."""
    student, teacher = TableLM(VOCAB, 1, 7, 0.1), TableLM(VOCAB, 1, 8, 0.1)
    rollout, args = exact_rollout(torch.tensor([[0]])), arguments("--no-renormalise")
    student.table.data[0, teacher.table[0].topk(SIZE).indices] -= 0.5
    scores = topk_opd.score({"teacher": teacher}, rollout, args)
    loss, logged = topk_opd.token_loss(student, rollout, scores, args)
    assert loss.item() < -0.05 and logged["divergence"].item() == loss.item()
    assert torch.autograd.grad(loss, student.table)[0].abs().max() > 0.01


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_tiny_tail_is_precise(support):
    """Trap 7: 1e-8 outside of the support, also where the support is not the teacher's own."""
    student, teacher = TableLM(VOCAB, 1, 1), TableLM(VOCAB, 1, 2)
    teacher.table.data[0] = torch.tensor([0.0, 0.3, -19.0, -18.5])
    student.table.data[0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    args = arguments("--tail", "bucket", "--support", support)
    sampled = torch.tensor([[2]])
    for dtype in (torch.float32, torch.float64):
        teacher.to(dtype)
        both = {"teacher": teacher, "student": student}
        scores = topk_opd.score(both, exact_rollout(sampled), args)
        exact = teacher.table.data[0].double().softmax(-1)
        want = exact[3] if support == "teacher+sampled" else exact[2] + exact[3]
        assert scores["tail_logp"].double().exp().item() == pytest.approx(want.item(), rel=1e-5)


# -------------------------------------------------------------------------------------- support
def test_a_sampled_token_in_the_support_is_masked_and_not_repeated(pair):
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    for support in SUPPORTS:
        args = arguments("--support", support)
        both = {"teacher": teacher, "student": student}
        scores = topk_opd.score(both, exact_rollout(completions), args)
        ids, mask = scores["support_ids"], scores["support_mask"]
        assert torch.equal(ids[..., -1], completions) and mask[..., :-1].all()
        repeated = (ids[..., :-1] == completions[..., None]).any(-1)
        assert torch.equal(scores["outside"], ~repeated)
        assert torch.equal(mask[..., -1], ~repeated & (support == "teacher+sampled"))
        judge = student if support == "student" else teacher
        assert torch.equal(ids[..., :-1], judge.logp(completions).topk(SIZE).indices)
        want = teacher.logp(completions).gather(2, ids)
        assert torch.allclose(scores["support_logp"], want, atol=1e-12)


def test_logged_mass_is_the_teachers_on_the_support(pair):
    student, teacher = pair
    completions = all_completions(VOCAB, LENGTH)
    rollout, q = exact_rollout(completions), teacher.logp(completions)
    for support in ("teacher", "teacher+sampled"):
        args = arguments("--support", support)
        scores = topk_opd.score({"teacher": teacher}, rollout, args)
        _, logged = topk_opd.token_loss(student, rollout, scores, args)
        inside = torch.zeros_like(q).scatter(2, q.topk(SIZE).indices, 1.0)
        if support == "teacher+sampled":
            inside = inside.scatter(2, completions[..., None], 1.0)
        assert torch.allclose(logged["teacher_mass"], (inside * q.exp()).sum(-1), atol=1e-12)


def test_loss_temperature_applies_to_both_models(pair):
    """Trap 14: equal models give 0 at any temperature, with every tail."""
    student, _ = pair
    rollout = exact_rollout(all_completions(VOCAB, LENGTH))
    for form in FORMS:
        args = arguments("--loss-temperature", "0.7", *form)
        scores = topk_opd.score({"teacher": student}, rollout, args)
        _, logged = topk_opd.token_loss(student, rollout, scores, args)
        assert logged["divergence"].abs().max() < 1e-12, form
        want = (student.table / 0.7).log_softmax(-1)[student.prefix_index(rollout.completion_ids)]
        found = scores["support_logp"]
        assert torch.allclose(found, want.gather(2, scores["support_ids"]), atol=1e-12)


def test_renormalised_the_head_moves_in_rows_of_the_support_only(folder, tmp_path):
    """Only K student logits of a token matter: the head's other rows have gradient 0."""
    tinylm.save_model(tmp_path, 3, tie_word_embeddings=False)
    more = ["--student", str(tmp_path), "--support-size", "3"]
    for form, everywhere in (([], False), (["--tail", "bucket"], True)):
        loaded, args, _, (rollout, _) = prepared(folder, *more, *form)
        scores = topk_opd.score(loaded, rollout, args)
        topk_opd.token_loss(loaded["student"], rollout, scores, args)[0].backward()
        moved = loaded["student"].head.grad.abs().sum(1) > 0
        ids = scores["support_ids"][..., :-1][rollout.trained_mask].unique()
        assert moved[ids].all() and len(ids) < len(moved)
        assert bool(moved.all()) == everywhere


def test_micro_batches_do_not_change_the_step(folder):
    loaded, args, _, (rollout, _) = prepared(folder, "--support-size", "5", "--tail", "bucket")
    gradients = []
    for tokens in (100000, 1):
        args.micro_batch_tokens, args.max_grad_norm, args.lr = tokens, math.inf, 0.0
        batch = [(m, topk_opd.score(loaded, m, args)) for m in retry.micro_batches(rollout, args)]
        optimizer = topk_opd.make_optimizer(loaded["student"], args)
        topk_opd.train_step(loaded["student"], optimizer, batch, args, 0)
        gradients.append(torch.cat([w.grad.flatten() for w in loaded["student"].parameters()]))
    assert torch.allclose(*gradients, atol=1e-5 * float(gradients[0].abs().max()))


# ------------------------------------------------------------------------- sampling and masking
def test_rollouts_are_sampled_with_top_p(folder):
    """Paper: 0.9; the truncation shows in the log-probs that are kept."""
    assert topk_opd.parse_args([]).top_p == 0.9 and opd.parse_args([]).top_p == 1.0
    _, _, _, (rollout, _) = prepared(folder)
    gap = (rollout.behaviour_logp - rollout.rollout_logp)[rollout.completion_mask]
    assert (gap < 1e-6).all() and (gap > math.log(0.9) - 1e-5).all() and gap.min() < -0.01


def test_every_token_is_trained_by_default_and_eos_too(folder):
    loaded, args, _, (rollout, metrics) = prepared(folder)
    assert torch.equal(rollout.response_mask, rollout.completion_mask)
    assert metrics == {"num_masked_tokens": 0.0, "num_mapped_tokens": 0.0}
    assert rollout.ended.any()
    last = rollout.completion_mask.sum(1) - 1
    rows = rollout.ended.nonzero()[:, 0]
    ends = rollout.completion_ids[rows, last[rows]]
    assert torch.isin(ends, torch.tensor(topk_opd.stop_ids(loaded["student"].facts))).all()
    assert rollout.response_mask[rows, last[rows]].all()
    scores = topk_opd.score(loaded, rollout, args)
    _, logged = topk_opd.token_loss(loaded["student"], rollout, scores, args)
    assert (logged["divergence"][rows, last[rows]] > 0).all()


def test_masks_leave_out_first_or_all_occurrences(folder):
    """Per id and completion; the count is logged; other tokens are not touched."""
    plain = prepared(folder)[3][0]
    counts = torch.bincount(plain.completion_ids[plain.completion_mask])
    often = int(counts[4:].argmax()) + 4
    word = tinylm.WORDS[often]
    for which in ("first", "all"):
        more = ["--mask-special-tokens", f"{word},<end>", "--mask-occurrences", which]
        rollout, metrics = prepared(folder, *more)[3]
        assert torch.equal(rollout.completion_ids, plain.completion_ids)
        masked = rollout.completion_mask & ~rollout.response_mask
        assert metrics["num_masked_tokens"] == masked.sum() > 0
        for row, ids in enumerate(rollout.completion_ids.tolist()):
            want, seen = [], set()
            for t, each in enumerate(ids):
                special = each in (often, 1) and bool(rollout.completion_mask[row, t])
                want.append(special and (which == "all" or each not in seen))
                seen |= {each} if special else set()
            assert masked[row].tolist() == want, (row, which)


def test_papers_masks_are_its_tokens_and_every_eos(folder, tmp_path):
    words = ["<" if word == "+" else "think" if word == "-" else word for word in tinylm.WORDS]
    tokenizer = tinylm.tokenizer(words)
    args = arguments("--mask-special-tokens", "paper")
    facts = Facts(len(words), {"student": (1,), "teacher": (1, 7)}, 256)
    found = topk_opd.special_ids(tokenizer, facts, args)
    assert found == [words.index("<"), words.index("think"), 1, 7]
    assert topk_opd.special_ids(tinylm.tokenizer(), facts, args) == [
        1,
        7,
    ]  # a vocabulary without them
    args.mask_special_tokens = None
    assert topk_opd.special_ids(tokenizer, facts, args) == []


def test_masked_tokens_have_no_loss_and_do_not_count(folder):
    loaded, args, _, (rollout, _) = prepared(folder, "--mask-special-tokens", "paper")
    masked = rollout.completion_mask & ~rollout.response_mask
    assert masked.any()
    scores = topk_opd.score(loaded, rollout, args)
    loss, logged = topk_opd.token_loss(loaded["student"], rollout, scores, args)
    assert (logged["divergence"][masked] == 0).all() and (logged["teacher_mass"] > 0).any()
    batch, args.lr = [(rollout, scores)], 0.0
    optimizer = topk_opd.make_optimizer(loaded["student"], args)
    found = topk_opd.train_step(loaded["student"], optimizer, batch, args, 0)["loss"]
    assert found == pytest.approx(loss.item() / int(rollout.response_mask.sum()), rel=1e-5)


@pytest.mark.parametrize("old", [7, "often"])
def test_the_teacher_reads_the_eos_that_it_knows(folder, old):
    """--map-eos FROM=TO: the teacher is asked about TO, the student about what it wrote.

    Another turn can follow: then the teacher has TO in its context, too.
    """
    if old == "often":
        plain = prepared(folder)[3][0]
        old = int(torch.bincount(plain.completion_ids[plain.completion_mask])[10:].argmax()) + 10
    loaded, args, _, (rollout, metrics) = prepared(
        folder, "--map-eos", f"{tinylm.WORDS[old]}=<end>"
    )
    hits = (rollout.completion_ids == old) & rollout.completion_mask
    assert metrics["num_mapped_tokens"] == hits.sum() > 0
    scores = topk_opd.score(loaded, rollout, args)
    mapped = topk_opd.Rollout(**vars(rollout))
    mapped.completion_ids = rollout.completion_ids.masked_fill(hits, 1)
    want = topk_opd.token_logp(loaded["teacher"], mapped, args)
    found = scores["support_logp"][..., -1]
    assert torch.allclose(found, want, atol=1e-5)
    plain = topk_opd.token_logp(loaded["teacher"], rollout, args)
    assert not torch.allclose(found[hits], plain[hits], atol=0.01)
    after = rollout.completion_mask & ~hits & (hits.cumsum(1) > 0)
    assert old == 7 or not torch.allclose(found[after], plain[after], atol=0.01)
    assert (scores["support_ids"][..., -1][hits] == old).all()
    assert (rollout.completion_ids[hits] == old).all()


# --------------------------------------------------------------------------------- usage errors
@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--teacher", "x", "--teacher", "y"], "--teacher"),
        (["--tail", "bucket", "--renormalise"], "--tail bucket"),
        (["--tail", "score", "--renormalise", *ON_POLICY], "--tail score"),
        (["--tail", "score"], "--top-p 1"),  # the default is 0.9
        (["--tail", "score", *ON_POLICY, "--temperature", "0.7"], "--temperature 1"),
        (["--tail", "score", *ON_POLICY, "--top-k", "9"], "--top-k 0"),
        (["--tail", "score", *ON_POLICY, "--divergence", "jsd"], "--divergence reverse"),
        (["--tail", "score", *ON_POLICY, "--support", "teacher+sampled"], "--support"),
        (["--support-size", "1"], "the loss is 0"),
        (["--support-size", "1", "--support", "student"], "the loss is 0"),
        (["--support-size", "0"], "--support-size"),
        (["--map-eos", "a"], "FROM=TO"),
        (["--map-eos", "=b"], "FROM=TO"),
        (["--jsd-beta", "1"], "--jsd-beta"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(more, word, capsys):
    with pytest.raises(SystemExit) as stop:
        topk_opd.main(more)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_a_tail_turns_renormalisation_off_and_nothing_else_does():
    def on(*more, **size):
        return topk_opd.renormalised(arguments(*more, **size))

    assert on() and not on("--tail", "bucket")
    assert not on("--no-renormalise")
    assert not on("--tail", "bucket", "--no-renormalise")
    assert on("--support", "teacher+sampled", size=1)  # top 1 + sampled: 2
    assert not on("--no-renormalise", size=1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--support-size", "999"], ["--support-size", str(len(tinylm.WORDS))]),
        (["--mask-special-tokens", "a,nope"], ["--mask-special-tokens", "nope"]),
        (["--map-eos", "nope=<end>"], ["--map-eos", "nope"]),
    ],
)
def test_what_the_tokenizer_cannot_do_is_refused(folder, more, words, capsys):
    with pytest.raises(SystemExit) as stop:
        topk_opd.main(flags(folder, f"no{words[0]}", *more))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in text for word in words), text


def test_help_names_every_flag_and_the_default_of_top_p(capsys):
    with pytest.raises(SystemExit):
        topk_opd.main(["--help"])
    text = capsys.readouterr().out
    assert "--top-p is 0.9 by default" in text and "default 32" in text
