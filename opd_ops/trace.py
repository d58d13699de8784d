"""Rollouts token by token, for `tools/report.py`: what both models make of every token.

Nothing here feeds back into training. The rows of `tokens.jsonl` are defined in docs/metrics.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import opd_ops
from opd_ops import engines, health
from opd_ops.models import by_teacher

SUPPORT_SIZE = 5
NUM_TRAINED, NUM_TESTED = 2, 8  # rollouts of a training step, and of an evaluation


@torch.no_grad()
def rows(
    models: dict[str, Any],
    rollout: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    read_tokens: Callable[..., Tensor],
    law: dict[str, Any],
    score: Callable[..., Any] | None = None,
    token_loss: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `tokens.jsonl`. The functions are the method file's, `law` is its `loss_law(args)`.

    With `score` and `token_loss`, a training step: the first rollout and the last, at most
    `--diagnostic-tokens` tokens of each, with everything that the method logs of a token. Without,
    an evaluation: the same few prompts each time, spread over the test set, whole.
    """
    if engines.remote(models.values()):
        return []  # as in `health.exact_divergences`
    total = len(rollout.prompts)
    wanted = min(total, NUM_TESTED if token_loss is None else NUM_TRAINED)
    most = None if token_loss is None else args.diagnostic_tokens
    found = []
    for place in range(wanted):
        row = place * total // wanted
        if token_loss is not None:  # the last one is another prompt's, and not its first: tropd
            row = place * (total - 1)  # guides the first
        one = rollout.select(torch.tensor([row]))
        logged = {}
        if score is not None and token_loss is not None:
            logged = token_loss(models["student"], one, score(models, one, args), args)[1]
        trained, num_prefix = one.trained_mask[0], int(one.prefix_mask.sum())
        one.response_mask = one.completion_mask.clone()  # all of it is shown, trained or not
        if most is not None:
            one.response_mask &= one.response_mask.cumsum(1) <= most
        one.prefix_mask = torch.zeros_like(one.prefix_mask)
        shown = one.response_mask[0]
        for teacher, scored, part in by_teacher(models, one):
            (sample,) = health.samples(part, tokenizer)
            tokens = _tokens(models["student"], teacher, part, tokenizer, read_tokens, law)
            if not scored:
                continue  # the teacher of another domain
            tokens["trained"] = trained[shown].int().tolist()
            tokens["num_prefix_tokens"] = num_prefix
            tokens["logged"] = {
                name: rounded(values[0][shown].float().tolist())
                for name, values in logged.items()
                if name != "log_ratio"  # student_logp - teacher_logp, which are there
            }
            phase = "eval" if token_loss is None else "train"
            found.append({"phase": phase, "row": row} | sample | tokens)
    return found


def _tokens(
    student: Any,
    teacher: Any,
    one: Any,
    tokenizer: Any,
    read_tokens: Callable[..., Tensor],
    law: dict[str, Any],
) -> dict[str, Any]:
    """Both log-probs of each of the N tokens of one rollout, and of the teacher's top K there."""
    mask, size = one.response_mask, min(SUPPORT_SIZE, law["valid_vocab"])
    ids = one.completion_ids[mask]

    def read_teacher(rows: Tensor, head: Tensor | None) -> Tensor:
        """[N, 2K + 1]: log-prob of the token, those of the support, its ids (as floats, exact)."""
        token_ids = ids.to(rows.device)
        found = opd_ops.linear_topk_logp(rows, head, size, token_ids=token_ids, **law)
        return torch.cat([found[4][:, None], found[1], found[0].to(found[1].dtype)], 1)

    scored = read_tokens(teacher, one, read_teacher)[mask]
    teacher_logp, support_logp = scored[:, 0], scored[:, 1 : size + 1]
    support = scored[:, size + 1 :].long()
    every = torch.cat([ids[:, None].to(support.device), support], 1)  # [N, 1 + K]
    student_logp = read_tokens(
        student,
        one,
        lambda rows, head: opd_ops.linear_gather_logp(rows, head, every.to(rows.device), **law)[0],
    )[mask]
    used = sorted(set(every.flatten().tolist()))
    return {
        "ids": ids.tolist(),
        "student_logp": rounded(student_logp[:, 0].tolist()),
        "teacher_logp": rounded(teacher_logp.tolist()),
        "support_ids": support.tolist(),
        "support_student_logp": [rounded(row) for row in student_logp[:, 1:].tolist()],
        "support_teacher_logp": [rounded(row) for row in support_logp.tolist()],
        "pieces": {str(each): piece(tokenizer, each) for each in used},
    }


def piece(tokenizer: Any, token_id: int) -> str:
    """The text of one token; U+FFFD where it holds a part of a character only."""
    text = str(tokenizer.decode([token_id]))
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
        return " " + text  # sentencepiece drops the space of a token that stands alone
    return text


def rounded(values: list[float]) -> list[float | str]:
    """Four decimals; what JSON has no number for as a string, as in `metrics.jsonl`."""
    return [round(each, 4) if math.isfinite(each) else str(each) for each in values]
