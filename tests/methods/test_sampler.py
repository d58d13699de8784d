"""The sampler: the law that it says it samples from, its masks, and what it must not depend on."""

from __future__ import annotations

import opd
import pytest
import tinylm
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from opd_run import diagnose, models

FLAGS = ["--max-completion-tokens", "12", "--max-prompt-tokens", "32", "--teacher-dtype", "float32"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tinylm.save_model(folder / "student", 0)


def prepared(path: str, *flags: str, paths: dict[str, str] | None = None):
    """(model, args, tokenizer) of one small model."""
    args = opd.parse_args([*FLAGS, "--student", path, "--device", "cpu", *flags])
    loaded, tokenizer = tinylm.load(opd, args, **(paths or {"student": path}))
    return loaded["student"], args, tokenizer


def prompts(tokenizer, *texts: str):
    return [opd.Prompt(tuple(tokenizer.encode(text)), text, "", "", {}) for text in texts]


def draw_many(model, args, chosen, seed=0, **how):
    args.seed = seed
    uniform = opd.uniforms(len(chosen), "rollouts", 0, args)
    return opd.sample(model, chosen, uniform, args, **how)


def test_teacher_forced_forward_reproduces_the_log_probs(student):
    """Trap 8 too: a shift by one would show here, for the logits depend on position and context."""
    model, args, tokenizer = prepared(student, "--loss-temperature", "0.8")
    chosen = prompts(tokenizer, "1+2=", "a", "12+345=", "zz top")
    rollout = draw_many(model, args, chosen)
    found = opd.token_logp(model, rollout, args)
    assert torch.allclose(found, rollout.behaviour_logp, atol=1e-4)
    assert found[rollout.completion_mask].std() > 0.3  # the models are not uniform
    naive = []
    for row, prompt in enumerate(chosen):  # one token at a time, no cache, no padding
        ids = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
        for t, token in enumerate(ids):
            context = torch.tensor([[*prompt.ids, *ids[:t]]])
            logits = model.lm(context).logits[0, -1] / 0.8
            naive.append(logits.log_softmax(-1)[token])
    assert torch.allclose(found[rollout.completion_mask], torch.stack(naive), atol=1e-4)


def test_draw_is_the_inverse_cdf():
    """A grid of uniforms gives every token exactly its share; ids beyond valid_vocab none."""
    law = {"valid_vocab": 4, "temperature": 1.0}
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2, 9.0]))
    grid = (torch.arange(1000) + 0.5) / 1000
    token, rollout_logp, behaviour_logp = opd.draw(
        logits.expand(1000, -1), grid, (1.0, 1.0, 0), law
    )
    assert torch.bincount(token, minlength=5).tolist() == [100, 400, 300, 200, 0]
    assert torch.allclose(rollout_logp.exp(), torch.tensor([0.1, 0.4, 0.3, 0.2])[token], atol=1e-6)
    assert torch.allclose(rollout_logp, behaviour_logp, atol=1e-6)


@pytest.mark.parametrize(
    "how, shares",
    [
        ((1.0, 0.6, 0), [0, 4 / 7, 3 / 7, 0]),  # the smallest set that holds 0.6
        ((1.0, 0.39, 0), [0, 1, 0, 0]),  # the first token always stays
        ((1.0, 1.0, 3), [0, 4 / 9, 3 / 9, 2 / 9]),
        ((0.5, 1.0, 0), [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ((0.0, 1.0, 0), [0, 1, 0, 0]),  # greedy
    ],
)
def test_draw_truncates_as_asked_and_says_so(how, shares):
    """Trap 15: rollout_logp is of the law sampled from, behaviour_logp of the full softmax."""
    law = {"valid_vocab": 4, "temperature": 1.0}
    probs = torch.tensor([0.1, 0.4, 0.3, 0.2])
    grid = (torch.arange(6300) + 0.5) / 6300
    token, rollout_logp, behaviour_logp = opd.draw(probs.log().expand(6300, -1), grid, how, law)
    found = torch.bincount(token, minlength=4) / 6300
    assert torch.allclose(found, torch.tensor(shares, dtype=torch.float32), atol=2e-3)
    assert torch.allclose(rollout_logp.exp(), torch.tensor(shares)[token].float(), atol=1e-5)
    assert torch.allclose(behaviour_logp, probs.log()[token], atol=1e-6)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("flat", [0.01, 1.0, 4.0])
def test_a_few_candidates_give_the_tokens_of_a_sort(top_p, flat):
    """With top-p the likeliest 1,024 are looked at first; all are sorted where they hold too little
    of the mass; ties go to the lowest id, here in pairs."""
    generator = torch.Generator().manual_seed(0)
    logits = (flat * torch.randn(40, 2500, generator=generator)).repeat_interleave(2, 1)
    uniform, law = torch.rand(40, generator=generator), {"valid_vocab": 4999, "temperature": 1.0}
    token, rollout_logp, _ = opd.draw(logits, uniform, (0.8, top_p, 0), law)
    probs = (logits[:, :4999].double() / 0.8).softmax(-1)
    if top_p < 1.0:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    cdf = probs.cumsum(-1) / probs.sum(-1, keepdim=True)
    column = (cdf <= uniform[:, None].double()).sum(1, keepdim=True)
    want = column if top_p == 1.0 else ids.gather(1, column)
    near = ((cdf - uniform[:, None]).abs() < 1e-5).any(1)  # there rounding may decide
    assert torch.equal(token[~near], want[:, 0][~near]) and near.float().mean() < 0.5
    logp = (probs.gather(1, column) / probs.sum(-1, keepdim=True)).log()[:, 0].float()
    assert torch.allclose(rollout_logp[~near], logp[~near], atol=1e-4)


def test_out_of_memory_halves_the_chunk_and_goes_on(student, monkeypatch, capsys):
    """Room for two rollouts: the same samples, and the next call starts with two."""
    model, args, tokenizer = prepared(student)
    chosen = prompts(tokenizer, "1+2=", "a", "1+2=", "12+345=", "9")
    want, decode, sizes = draw_many(model, args, chosen), opd.decode, []

    def poor(*inputs):
        sizes.append(len(inputs[-1]))
        if sizes[-1] > 2:
            inputs[1].completion_mask[inputs[-1], 0] = True  # it had begun
            inputs[1].completion_ids[inputs[-1], 0] = 11
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")
        decode(*inputs)

    monkeypatch.setattr(opd, "decode", poor)
    opd.retry.start()
    found = draw_many(model, args, chosen)
    assert sizes == [5, 3, 2, 2, 1] and "at most 2 rollouts" in capsys.readouterr().out
    for name in ("completion_ids", "completion_mask", "ended"):
        assert torch.equal(getattr(want, name), getattr(found, name)), name
    draw_many(model, args, chosen)
    assert sizes[5:] == [2, 2, 1]
    opd.retry.start()


def test_what_is_forgotten_leaves_no_number(student):
    """Memory that runs out where logits are not finite: NaN times no mask is NaN."""
    model, args, tokenizer = prepared(student)
    rollout = draw_many(model, args, prompts(tokenizer, "a", "9"), prefixes=[(11, 12), (13,)])
    rollout.rollout_logp[:, 2:] = torch.nan
    opd.rollouts.clear(rollout, torch.tensor([0]))
    assert (rollout.rollout_logp[0] == 0).all() and rollout.rollout_logp[1, 2:].isnan().all()
    assert rollout.completion_ids[0].tolist() == [11, 12] + [0] * 10


def test_the_cache_grows_by_blocks_and_keeps_what_a_plain_one_has():
    generator = torch.Generator().manual_seed(0)
    ours, plain = models._GrowingLayer(), DynamicLayer()
    for length in (5, *[1] * 70, 130, 1):
        keys, values = torch.randn(2, 3, 2, length, 4, generator=generator)
        for layer in (ours, plain):
            layer.update(keys[: len(layer.keys)] if layer.is_initialized else keys, values)
        if ours.get_seq_length() == 40:
            for layer in (ours, plain):
                layer.batch_select_indices(torch.tensor([2, 0, 1]))
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
        assert ours.get_seq_length() == plain.get_seq_length()


def test_the_sampler_grows_its_cache_in_place(student, monkeypatch):
    """12 tokens move it once: a plain cache is copied at every one."""
    model, args, tokenizer = prepared(student)
    tinylm.endless({"student": model})
    places, cache = [], models._TypedCache.update

    def update(self, keys, values, layer, *more):
        found = cache(self, keys, values, layer, *more)
        if layer == 0:
            places.append(found[0].data_ptr())
        return found

    monkeypatch.setattr(models._TypedCache, "update", update)
    draw_many(model, args, prompts(tokenizer, "1+2=", "1+2="))
    assert len(places) == 12 and len(set(places)) == 2  # copied once: for equal prompts


def test_the_head_is_cast_once_for_all_tokens(student):
    """Autocast keeps the cast of a weight, not that of a view of it."""
    model, args, tokenizer = prepared(student, "--dtype", "bfloat16")
    tinylm.endless({"student": model})
    casts, head = [], model.lm.get_output_embeddings().weight

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, given=(), named=None):
            result = op(*given, **(named or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
                if result.numel() == head.numel() and "copy" in str(op):
                    casts.append(op)
            return result

    with Watch():
        draw_many(model, args, prompts(tokenizer, "1+2=", "12+345="))
    assert len(casts) == 1


def test_prompts_are_padded_to_the_longest_of_their_chunk(student, monkeypatch):
    """Not to the longest of all."""
    model, args, tokenizer = prepared(student, "--sampler-batch-size", "2")
    widths, forward = [], opd.next_logits

    def next_logits(model, cache, ids, *more):
        widths.append(ids.shape[1])
        return forward(model, cache, ids, *more)

    monkeypatch.setattr(opd, "next_logits", next_logits)
    opd.retry.start()
    draw_many(model, args, prompts(tokenizer, "a", "1+2=", "12+345=12+345", "9"))
    sizes = sorted(len(tokenizer.encode(text)) for text in ("1+2=", "12+345=12+345"))
    assert sorted(width for width in widths if width > 1) == sizes and sizes[0] < sizes[1]


@pytest.mark.parametrize("sampling", [(1.0, 1.0, 0), (1.0, 0.9, 0), (0.0, 1.0, 0)])
def test_drawn_ids_are_not_looked_at(sampling, monkeypatch):
    """They are in range, and a GPU would have to be waited for at every token."""
    monkeypatch.setattr(torch, "aminmax", lambda *args: pytest.fail("looked"))
    law = {"temperature": 1.0, "valid_vocab": 20}
    opd.draw(torch.randn(3, 24), torch.rand(3), sampling, law)


def test_draw_never_takes_an_impossible_token():
    """The ends of the unit interval, with zero probabilities at both ends of the row."""
    law = {"valid_vocab": 5, "temperature": 1.0}
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2.0**-24])
    token, rollout_logp, _ = opd.draw(logits, uniform, (1.0, 1.0, 0), law)
    assert token.tolist() == [1, 3, 3] and rollout_logp.isfinite().all()


def test_samples_do_not_depend_on_the_batch(student):
    """The randomness belongs to the row: order, batch size and padding change nothing."""
    model, args, tokenizer = prepared(student)
    chosen = prompts(tokenizer, "1+2=", "a", "1+2=", "12+345=", "1+2=", "a")
    uniform = opd.uniforms(6, "rollouts", 0, args)
    whole = opd.sample(model, chosen, uniform, args)
    args.sampler_batch_size = 2
    split = opd.sample(model, chosen, uniform, args)
    order = torch.tensor([4, 3, 0, 5, 1, 2])
    mixed = opd.sample(model, [chosen[i] for i in order], uniform[order], args)
    for name in ("completion_ids", "completion_mask", "ended"):
        assert torch.equal(getattr(whole, name), getattr(split, name))
        assert torch.equal(getattr(whole, name)[order], getattr(mixed, name))
    assert torch.allclose(whole.behaviour_logp, split.behaviour_logp, atol=1e-5)
    assert len({tuple(row) for row in whole.completion_ids[[0, 2, 4]].tolist()}) == 3


class Checker:
    """A verifier that notes when it is asked."""

    judges_cut = True

    def __init__(self, told):
        self.told = told

    def ahead(self, items):
        self.told.append(("ahead", items))

    def __call__(self, items):
        self.told.append(("batch", items))
        return [float(len(text) % 2) for text, *_ in items]


def test_what_is_finished_is_verified_while_the_rest_is_generated(student, monkeypatch):
    model, args, tokenizer = prepared(student, "--sampler-batch-size", "2")
    chosen, told, decode = prompts(tokenizer, "1+2=", "a", "12+345=", "9", "7"), [], opd.decode

    def noted(*inputs):
        told.append(("generate", inputs[-1].tolist()))
        decode(*inputs)

    monkeypatch.setattr(opd, "decode", noted)
    uniform = opd.uniforms(5, "rollouts", 0, args)
    how, models_ = (1.0, 1.0, 0), {"student": model}
    rollout = opd.generate(models_, "student", chosen, uniform, args, how, tokenizer, Checker(told))
    assert [name for name, _ in told] == [*("generate", "ahead") * 3, "batch"]
    assert [each for _, each in told[::2][:3]] == [[0, 1], [2, 3], [4]]
    batch = told[-1][1]
    assert [item for name, items in told if name == "ahead" for item in items] == batch
    assert [row for _, _, row, _ in batch] == [prompt.row for prompt in chosen]
    assert rollout.verdict.tolist() == [float(len(text) % 2) for text, *_ in batch]


def test_memory_that_runs_out_after_a_chunk_loses_none_of_it(student):
    """It is not taken for the chunk's own, which would be forgotten and not sampled again."""
    model, args, tokenizer = prepared(student, "--sampler-batch-size", "2")

    def poor(chunk):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        draw_many(model, args, prompts(tokenizer, "1+2=", "a", "9"), done=poor)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_eos_is_in_the_masks_and_nothing_after_it(tmp_path, pad_is_eos):
    """Trap 10: the EOS that ends a completion is trained, also where pad and EOS are one token."""
    path = tinylm.save_model(tmp_path / "m", 3, eos_token_id=[1, 7, 8, 9])
    model, args, tokenizer = prepared(path)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    stop = opd.stop_ids(model.facts)
    assert stop == [1, 7, 8, 9]
    rollout = draw_many(model, args, prompts(tokenizer, *["1+2="] * 32))
    eos = torch.isin(rollout.completion_ids, torch.tensor(stop))
    lengths = rollout.completion_mask.sum(1)
    assert 3 < int(rollout.ended.sum()) < 32  # both kinds occur
    for row in range(32):
        at = eos[row][rollout.completion_mask[row]].nonzero()[:, 0].tolist()
        assert at == ([int(lengths[row]) - 1] if rollout.ended[row] else [])
        assert rollout.completion_mask[row, : lengths[row]].all()
    assert torch.equal(rollout.response_mask, rollout.completion_mask)
    assert not rollout.prefix_mask.any()


def test_truncated_completions_are_flagged_and_counted(student):
    """Trap 25: without EOS within the budget a rollout is not `ended`."""
    model, args, tokenizer = prepared(student)
    rollout = draw_many(model, args, prompts(tokenizer, *["a"] * 40))
    full = rollout.completion_mask.sum(1) == args.max_completion_tokens
    last_is_eos = rollout.completion_ids[:, -1] == 1
    assert torch.equal(~rollout.ended, full & ~last_is_eos)
    metrics = diagnose.rollout_metrics(rollout)
    assert 0 < metrics["truncated_share"] < 1
    assert metrics["truncated_share"] == pytest.approx(float((~rollout.ended).float().mean()))


def test_generation_config_of_the_checkpoint_is_not_read(tmp_path):
    """A top_k in the checkpoint must not reach the samples."""
    path = tinylm.save_model(tmp_path / "m", 0)
    model, args, tokenizer = prepared(path)
    chosen = prompts(tokenizer, *["1+2="] * 8)
    before = draw_many(model, args, chosen)
    transformers.GenerationConfig(
        temperature=0.1, top_k=1, do_sample=True, eos_token_id=1, max_length=3
    ).save_pretrained(path)
    model, args, _ = prepared(path)
    assert torch.equal(before.completion_ids, draw_many(model, args, chosen).completion_ids)


def test_greedy_is_the_argmax(student):
    model, args, tokenizer = prepared(student)
    rollout = draw_many(model, args, prompts(tokenizer, "1+2=", "abc"), sampling=(0.0, 1.0, 0))
    for row, prompt in enumerate(rollout.prompts):
        ids = list(prompt.ids)
        for token in rollout.completion_ids[row][rollout.completion_mask[row]].tolist():
            assert token == int(model.lm(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    assert (rollout.rollout_logp == 0).all()  # the law that was sampled from is a point


def test_padded_vocabulary_is_never_sampled_or_normalised_over(tmp_path):
    """Trap 16: rows of the head beyond the tokenizer may hold anything."""
    path = tinylm.save_model(tmp_path / "m", 0, vocab=64, tie_word_embeddings=False)
    model, args, tokenizer = prepared(path)
    assert model.facts.valid_vocab == len(tinylm.WORDS) == 46
    chosen = prompts(tokenizer, *["1+2="] * 4)
    before = draw_many(model, args, chosen)
    logp = opd.token_logp(model, before, args)
    with torch.no_grad():
        model.lm.lm_head.weight[46:] = 50.0
    after = draw_many(model, args, chosen)
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert torch.equal(logp, opd.token_logp(model, before, args))


def test_uniforms_are_a_function_of_seed_stream_and_step():
    args = opd.parse_args(["--max-completion-tokens", "5"])
    first = opd.uniforms(3, "rollouts", 7, args)
    assert first.shape == (3, 5) and ((first >= 0) & (first < 1)).all()
    assert torch.equal(first, opd.uniforms(3, "rollouts", 7, args))
    more = opd.uniforms(9, "rollouts", 7, args)
    assert torch.equal(first, more[:3])  # a rollout's numbers are its own
    for other in (opd.uniforms(3, "evaluation", 7, args), opd.uniforms(3, "rollouts", 8, args)):
        assert not torch.equal(first, other)
