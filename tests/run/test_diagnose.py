"""Every metric against its formula in docs/metrics.md."""

from __future__ import annotations

import itertools
import math

import opd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tablelm import rollout_of

from opd_run import diagnose


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=4, max_size=4))
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(verdicts):
    """1 - C(n-c, k) / C(n, k) against all subsets; unverified samples leave c and n."""
    prompt = opd.Prompt((0,), "", "", "", {})
    found = diagnose.pass_metrics(torch.tensor([verdicts]), [prompt])
    kept = [verdict for verdict in verdicts if verdict != 0]
    for k in (1, 2, 4):
        subsets = list(itertools.combinations(kept, k))
        if subsets:
            want = sum(1.0 in subset for subset in subsets) / len(subsets)
            assert found[f"pass@{k}"] == pytest.approx(want)
        else:
            assert math.isnan(found[f"pass@{k}"])
    assert found["avg@4"] == pytest.approx(found["pass@1"], nan_ok=True)


def test_pass_metrics_by_domain():
    prompts = [opd.Prompt((0,), "", "", domain, {}) for domain in ("a", "b", "a")]
    verdicts = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    found = diagnose.pass_metrics(verdicts, prompts)
    assert found["avg@2"] == 0.5 and found["avg@2/a"] == 0.5 and found["avg@2/b"] == 0.5
    assert found["pass@2"] == pytest.approx(2 / 3) and found["pass@2/b"] == 1.0


def test_rollout_metrics_by_hand():
    completions = torch.tensor([[5, 6, 5, 6, 5, 6, 5, 6], [1, 0, 0, 0, 0, 0, 0, 0], [2] * 8])
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 1:] = False
    rollout = rollout_of(
        opd, completions, completion_mask=mask, response_mask=mask.clone(),
        ended=torch.tensor([False, True, False]), verdict=torch.tensor([1.0, -1.0, 0.0]),
        behaviour_logp=-2.0 * mask, rollout_logp=-1.5 * mask,
    )  # fmt: skip
    found = diagnose.rollout_metrics(rollout)
    want = {
        "num_rollouts": 3, "num_trained_tokens": 17, "length_mean": 17 / 3, "length_p95": 8,
        "eos_rate": 1 / 3, "truncated_share": 2 / 3, "repetition_share": (3 / 5 + 0 + 4 / 5) / 3,
        "verifier_pass_rate": 0.5, "unverified_share": 1 / 3, "truncation_mean": -0.5,
        "num_untrained_tokens": 0,
    }  # fmt: skip
    assert found == pytest.approx(want)


def test_token_metrics_by_hand():
    log_ratio = torch.arange(100.0)
    decile = torch.arange(100) // 10
    found = diagnose.token_metrics(
        {"log_ratio": log_ratio, "advantage": 49.5 - log_ratio, "decile": decile}
    )
    assert found["log_ratio_mean"] == 49.5 and found["advantage_positive_share"] == 0.5
    assert (found["log_ratio_p1"], found["log_ratio_p99"]) == (0.0, 98.0)
    assert found["log_ratio_decile_3"] == 34.5


def test_position_decile():
    mask = torch.tensor([[True] * 20, [True] * 5 + [False] * 15])
    found = diagnose.position_decile(mask)
    assert found[0].tolist() == [i // 2 for i in range(20)]
    assert found[1, :5].tolist() == [0, 2, 4, 6, 8]


def test_divergences_by_hand():
    torch.manual_seed(0)
    student, teacher = torch.randn(70, 9), torch.randn(70, 9)
    found = diagnose.divergences(student, teacher, None, None, 7, 0.5, support_size=3)
    p, q = ((each[:, :7] / 0.5).log_softmax(-1) for each in (student, teacher))
    support = q.topk(3).indices
    common = [
        len(set(a) & set(b)) / 3 for a, b in zip(support.tolist(), p.topk(3).indices.tolist())
    ]
    want = {
        "reverse_kl": (p.exp() * (p - q)).sum(-1),
        "forward_kl": (q.exp() * (q - p)).sum(-1),
        "student_entropy": -(p.exp() * p).sum(-1),
        "teacher_entropy": -(q.exp() * q).sum(-1),
        "teacher_mass": q.gather(1, support).exp().sum(1),
        "student_mass": p.gather(1, support).exp().sum(1),
        "overlap": torch.tensor(common),
    }
    assert found.keys() == want.keys()
    for name in want:
        assert torch.allclose(found[name], want[name], atol=1e-5), name


def test_divergences_with_heads_are_those_of_the_products():
    torch.manual_seed(0)
    rows, heads = (torch.randn(5, 4), torch.randn(5, 6)), (torch.randn(9, 4), torch.randn(11, 6))
    with_heads = diagnose.divergences(*rows, *heads, valid_vocab=8, temperature=1.0)
    logits = [row @ head.T for row, head in zip(rows, heads)]
    without = diagnose.divergences(*logits, None, None, valid_vocab=8, temperature=1.0)
    assert all(torch.allclose(with_heads[name], without[name], atol=1e-5) for name in without)


@given(st.integers(1, 60), st.integers(0, 5))
def test_thin_keeps_at_most_that_many_trained_tokens(num_tokens, seed):
    completions = torch.zeros(8, 6, dtype=torch.int64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [6], [2], [5], [4], [6]])
    rollout = rollout_of(opd, completions, completion_mask=mask, response_mask=mask.clone())
    part = diagnose.thin(rollout, num_tokens, [seed, 7, 0])
    assert int(part.trained_mask.sum()) == min(num_tokens, int(mask.sum()))
    assert not (part.trained_mask & ~part.completion_mask).any()
    assert torch.equal(rollout.response_mask, mask)  # the rollout itself is left alone


def test_repeated_share():
    assert diagnose.repeated_share([1, 2, 3]) == 0.0
    assert diagnose.repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
