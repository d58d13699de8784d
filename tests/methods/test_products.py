"""How often a method's loss multiplies with the head: three times where a token stands alone.

Logits, the gradient of the hidden states, the gradient of the head. A loss in which the weight of a
token depends on other tokens multiplies for the logits a second time.
"""

from __future__ import annotations

import importlib

import pytest
import tinylm

from opd_ops import _head
from opd_run import ranks, retry, setup, verifier

FEW = "--prompts-per-step 2 --rollouts-per-prompt 2 --max-completion-tokens 8 --device cpu"
CASES = {
    "opd": 3,
    "opd --discount 0.5": 4,
    "opd --objective full": 4,  # the teacher's logits, too
    "sg_opd": 3,
    "sg_opd --gate-control random": 4,
    "exopd": 3,
    "tropd": 3,
    "topk_opd": 0,  # renormalised: K rows of the head are enough
    "topk_opd --tail bucket": 3,
    "topk_opd --tail score --top-p 1": 3,
    "supervised": 3,
    "grpo": 3,
    "reward_opd": 3,
    "power_opd": 3,
    "reopold": 3,
    "eopd": 3,
    "opsa": 3,
    "drift_gate": 4,  # a gate of a block asks for its other tokens
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("products"))


@pytest.mark.parametrize("case", CASES)
def test_number_of_products(case, folder, monkeypatch):
    name, *flags = case.split()
    method = importlib.import_module(name)
    paths = ["--student", f"{folder}/student"]
    if name not in ("grpo", "opsa"):
        paths += ["--teacher", f"{folder}/teacher"]
    paths += ["--prompts", f"{folder}/prompts.jsonl"]
    args = method.parse_args([*paths, *FEW.split(), *flags])
    ranks.start(args)
    loaded, tokenizer, facts = setup.models_of(method, args)
    prompts = setup.prompts_of(method, args.prompts, tokenizer, facts, args)
    child = verifier.Verifier(args.verifier, args.verifier_timeout_s)
    chosen = method.prompts_of_step(prompts, 0, args)
    rollout, _ = method.collect(loaded, tokenizer, child, chosen, args, 0)
    child.close()
    batch = next(iter(retry.micro_batches(rollout, args)))
    scores, seen, multiply = method.score(loaded, batch, args), [], _head._multiply

    def counted(*given, **named):
        seen.append(given)
        return multiply(*given, **named)

    monkeypatch.setattr(_head, "_multiply", counted)
    loss, _ = method.token_loss(loaded["student"].train(), batch, scores, args)
    loss.backward()
    assert len(seen) == CASES[case]
