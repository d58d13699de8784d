"""What the estimators of opd.py estimate, by enumeration of every completion (traps 1 to 3)."""

from __future__ import annotations

import opd
import pytest
import torch
from tablelm import TableLM, all_completions, expected_gradient, rollout_of

VOCAB, LENGTH = 3, 3


@pytest.fixture
def case():
    student, teacher = TableLM(VOCAB, LENGTH, 1), TableLM(VOCAB, LENGTH, 2)
    completions = all_completions(VOCAB, LENGTH)
    probs = student.token_logp(completions).sum(1).exp()
    return student, teacher, completions, probs


def arguments(*flags: str):
    args = opd.parse_args(list(flags))
    return args


def estimate(case, args):
    """Exact expectation of the gradient that `token_loss` has on one completion at a time."""
    student, teacher, completions, probs = case

    def loss(i: int):
        rollout = rollout_of(opd, completions[i : i + 1])
        scores = opd.score({"teacher": teacher}, rollout, args)
        return opd.token_loss(student, rollout, scores, args)[0]

    return expected_gradient(student, probs, loss)


def per_prefix_kl(case, divergence: str, beta: float = 0.5) -> torch.Tensor:
    """sum over prefixes of P(prefix) D(student || teacher), P(prefix) not differentiated."""
    student, teacher, completions, probs = case
    p, q = student.logp(completions), teacher.logp(completions).detach()
    mixture = torch.log((1 - beta) * p.exp() + beta * q.exp())
    values = {
        "reverse": (p.exp() * (p - q)).sum(-1),
        "forward": (q.exp() * (q - p)).sum(-1),
        "jsd": beta * (q.exp() * (q - mixture)).sum(-1)
        + (1 - beta) * (p.exp() * (p - mixture)).sum(-1),
    }[divergence]
    return (probs.detach()[:, None] * values).sum()


def exact(case, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, case[0].table)[0]


def test_sampled_objective_is_the_reverse_kl_at_visited_prefixes(case):
    """Eq. (4) at discount 0: E[gradient] = gradient of the per-prefix reverse KL."""
    found = estimate(case, arguments())
    want = exact(case, per_prefix_kl(case, "reverse"))
    assert torch.allclose(found, want, atol=1e-6), (found - want).abs().max()
    forward = exact(case, per_prefix_kl(case, "forward"))
    assert (found - forward).abs().max() > 0.01  # and not the forward KL (the k3 mistake)


def test_discount_one_is_the_sequence_reverse_kl(case):
    """Eq. (2) at discount 1: E[gradient] = gradient of KL over whole completions."""
    student, teacher, completions, _ = case
    log_p = student.token_logp(completions).sum(1)
    log_q = teacher.token_logp(completions).sum(1).detach()
    want = exact(case, (log_p.exp() * (log_p - log_q)).sum())
    found = estimate(case, arguments("--discount", "1"))
    assert torch.allclose(found, want, atol=1e-6)
    assert not torch.allclose(found, estimate(case, arguments()), atol=1e-3)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_full_objective_is_the_divergence_it_names(case, divergence):
    """Eq. (5), (6): exact gradient through all student logits, none through sampling."""
    args = arguments("--objective", "full", "--divergence", divergence, "--jsd-beta", "0.3")
    want = exact(case, per_prefix_kl(case, divergence, 0.3))
    assert torch.allclose(estimate(case, args), want, atol=1e-6)


def test_loss_temperature_applies_to_both_models(case):
    """The KL of the tempered pair; equal models give 0 at any temperature (trap 14)."""
    student, teacher, completions, _ = case
    args = arguments("--objective", "full", "--loss-temperature", "0.7")
    rollout = rollout_of(opd, completions)
    same = opd.score({"teacher": student}, rollout, args)
    assert opd.token_loss(student, rollout, same, args)[0].abs() < 1e-5
    other = opd.score({"teacher": teacher}, rollout, args)
    found = opd.token_loss(student, rollout, other, args)[1]["divergence"]
    p, q = (
        (each.table / 0.7).log_softmax(-1)[each.prefix_index(completions)]
        for each in (student, teacher)
    )
    assert torch.allclose(found.double(), (p.exp() * (p - q)).sum(-1), atol=1e-5)


def test_gradient_depends_on_the_teacher(case):
    """Trap 1: a back-propagated k1 has a gradient that no teacher can change."""
    student, _, completions, _ = case
    gradients = []
    for seed in (5, 6):
        rollout, args = rollout_of(opd, completions), arguments()
        scores = opd.score({"teacher": TableLM(VOCAB, LENGTH, seed)}, rollout, args)
        loss, _ = opd.token_loss(student, rollout, scores, args)
        gradients.append(torch.autograd.grad(loss, student.table)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 0.1


def test_advantage_is_detached_and_signed(case):
    """loss = -advantage * logp with advantage = teacher - student: no gradient through it."""
    student, teacher, completions, _ = case
    rollout, args = rollout_of(opd, completions), arguments()
    scores = opd.score({"teacher": teacher}, rollout, args)
    loss, logged = opd.token_loss(student, rollout, scores, args)
    advantage = (teacher.token_logp(completions) - student.token_logp(completions)).detach()
    assert torch.allclose(logged["advantage"].double(), advantage, atol=1e-5)
    assert not any(values.requires_grad for values in logged.values())
    found = torch.autograd.grad(loss, student.table)[0]
    by_hand = -(advantage * student.token_logp(completions)).sum()
    assert torch.allclose(found, torch.autograd.grad(by_hand, student.table)[0], atol=1e-5)


def test_importance_weight_corrects_for_other_weights(case):
    """Eq. (3): other weights sample; weighted and uncapped, the expectation is on-policy."""
    student, teacher, completions, _ = case
    old = TableLM(VOCAB, LENGTH, 9, scale=0.5)
    old_logp = old.token_logp(completions).detach()
    args = arguments("--updates-per-rollout", "2", "--importance-cap", "inf")

    def loss(i: int, width: int = 1):
        # One token: per-token weights leave the prefix law of the old weights as it is.
        rollout = rollout_of(
            opd, completions[i : i + 1], behaviour_logp=old_logp[i : i + 1].float()
        )
        rollout.response_mask[:, width:] = False
        scores = opd.score({"teacher": teacher}, rollout, args)
        return opd.token_loss(student, rollout, scores, args)[0]

    found = expected_gradient(student, old_logp.sum(1).exp(), loss)
    p, q = student.logp(completions)[0, 0], teacher.logp(completions)[0, 0].detach()
    want = exact(case, (p.exp() * (p - q)).sum())
    assert torch.allclose(found, want, atol=1e-6)


def test_importance_cap_bounds_the_weight():
    args = arguments("--updates-per-rollout", "2", "--importance-cap", "1.5")
    weight = opd.importance_weight(torch.tensor([[-1.0, 0.0, 3.0]]), args)
    assert torch.allclose(weight, torch.tensor([[0.36787945, 1.0, 1.5]]))


def test_discounted_sum_by_hand():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(opd.discounted_sum(values, 0.5), torch.tensor([[3.0, 4.0, 4.0]]))
