"""Drift gating: on-policy distillation with several updates, whose stale blocks weigh less.

With y ~ student, c_t = (prompt, y_<t), N trained tokens in the batch, sg = stop-gradient:

    log_ratio_t = log student(y_t|c_t) - log teacher(y_t|c_t)                            Eq. (1)
    advantage_t = sg[-log_ratio_t]                                                       Eq. (2)
    w_t = sg[min(student(y_t|c_t) / behaviour(y_t|c_t), importance_cap)]                 Eq. (3)
    loss = -1/N sum_t gate_t w_t advantage_t log student(y_t|c_t)                        Eq. (4)
    drift_b = mean over block b of log student(y_t|c_t) - log behaviour(y_t|c_t)         Eq. (5)
    gate_t = sg[exp(-tau |drift_b|)], divided by its mean over the rollout               Eq. (6)

behaviour is the student before the first update on y; a block is 64 tokens of a completion.
Source: arXiv:2606.24084, second-hand. Its tau is not known to us: the default is ours, and so is
the mean of (6) over the tokens of the rollout (of the batch, perhaps): it depends on no other
rollout, so not on micro-batches. At the first update on a batch, and at tau = 0, this is opd.

Differences from opd.py:
1. Eq. (5), (6), and by default two updates on each batch of rollouts.
2. The gate needs the tokens of its block, so the head takes part in four products, not three.
3. Left out: --objective full, --discount.

    python forks/drift_gate.py                                 # the embedded tiny pair, on a CPU
    python forks/drift_gate.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B \\
        --prompts train.jsonl --verifier math --max-completion-tokens 4096 --lr 1e-6 \\
        --updates-per-rollout 4 --sampler-batch-size 64
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import opd_ops
from opd_run import checkpoints, data, diagnose, flags, memory, ranks, retry, rollouts, setup, views
from opd_run.command import command
from opd_run.compat import Facts, check_prompts, prompt_ids
from opd_run.data import Prompt
from opd_run.files import TINY
from opd_run.models import CausalLM
from opd_run.rollouts import shaped
from opd_run.run import Run, say_plan
from opd_run.selfcheck import check_models
from opd_run.verifier import Verifier
from opd_run.vllm_sampler import fill_by_vllm

Args, Models = argparse.Namespace, dict[str, CausalLM]  # models by name: student, teacher, ...
Batch = list[tuple["Rollout", dict[str, Any]]]  # micro-batches, with what `score` says of them
Sampling = tuple[float, float, int]  # temperature (0: greedy), top-p, top-k (0: all tokens)
Row, Ids = dict[str, Any], tuple[int, ...]

# ==== 1. Arguments ================================================================================


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """All flags; everything that is wrong with them is reported in one message."""
    parser = flags.new_parser(__doc__, Path(__file__).stem)  # with those that change no number
    types = ["auto", "float32", "bfloat16"]
    add = partial(flags.flag, parser.add_argument_group("data"))
    add("--seed", 0, "seed of data order and sampling", "[0,inf)")
    add("--prompts", str(TINY / "prompts/train.jsonl"), "file, folder or hub name: docs/data.md")
    repeated = {"action": "append", "metavar": "[NAME=]..."}
    add("--test-prompts", None, "held-out prompts; repeat for several sets", **repeated)
    add("--prompt-field", None, "field with text or messages [prompt, messages, question, ...]")
    add("--test-prompt-field", None, "the same of a test set, where it differs", **repeated)
    add("--answer-field", "answer", "field with the right answer; a.b is b in a")
    add("--test-answer-field", None, "the same of a test set, where it differs", **repeated)
    add("--system", None, "put this system message before each prompt")
    add("--prompt-template", None, "the user's message, with {field} of the row; @FILE reads it")
    add("--chat-template", True, "render prompts with the tokenizer's chat template, if any")
    add("--chat-template-from", "student", "whose template is used", choices=["student", "teacher"])
    add("--chat-template-args", "{}", 'its arguments, such as {"enable_thinking": false}')
    add("--teacher-prompt", None, "the teacher reads this in place of the user's last message: a "
        "template with {field}, module:function or file.py:function: docs/recipes.md")  # fmt: skip
    add("--teacher-system", None, "the teacher's system message")
    add("--teacher-template-args", "{}", "more of --chat-template-args, for the teacher's prompt")
    add("--verifier", "exact", "exact, math, reasoning_gym:TASK, module:function, file.py:function")
    add("--verifier-timeout-s", 10.0, "a check that takes longer counts as no verdict", "(0,1e6]")
    add("--max-prompt-tokens", 1024, "longer prompts are left out, and counted", "[1,inf)")
    add = partial(flags.flag, parser.add_argument_group("models"))
    add("--student", str(TINY / "student"), "folder or hub name of the model to train")
    add("--teacher", None, "folder or hub name [the tiny one]; live: the student itself; ema:0.99: "
        "its average", action="append")  # fmt: skip
    add("--teacher-url", None, "http://HOST:PORT of a vLLM server that has the teacher instead")
    add("--dtype", "auto", "type the student computes in; its weights stay float32", choices=types)
    add("--teacher-dtype", "auto", "type of the frozen models' weights and products", choices=types)
    add("--allow-renamed-tokens", False, "special tokens may differ by name; they are not trained")
    add("--lora-rank", 0, "train adapters of this rank instead of all weights; 0: off", "[0,inf)")
    add("--lora-alpha", 32.0, "scale of the adapters, divided by --lora-rank", "(0,inf)")
    add = partial(flags.flag, parser.add_argument_group("rollout"))
    add("--prompts-per-step", 32, "prompts in one step", "[1,inf)")
    add("--rollouts-per-prompt", 4, "completions sampled for each prompt", "[1,inf)")
    add("--max-completion-tokens", 128, "longer completions are cut, and counted", "[1,inf)")
    add("--temperature", 1.0, "sampling temperature; the loss does not correct for it", "(0,inf)")
    add("--top-p", 1.0, "sample the likeliest tokens up to this mass; not corrected", "(0,1]")
    add("--top-k", 0, "sample from this many of the likeliest tokens; 0: from all", "[0,inf)")
    add("--sampler", "own", "what generates the student's rollouts", choices=["own", "vllm"])
    add = partial(flags.flag, parser.add_argument_group("optimisation"))
    add("--steps", 100, "training steps, a new batch of rollouts in each", "[0,inf)")
    add("--lr", 3e-4, "peak learning rate of AdamW", "[0,inf)")
    add("--lr-schedule", "constant", "after warm-up", choices=["constant", "linear", "cosine"])
    add("--warmup-steps", 0, "steps of linear warm-up", "[0,inf)")
    add("--weight-decay", 0.0, "weight decay of AdamW, on matrices only", "[0,inf)")
    add("--adam-beta2", 0.95, "beta2 of AdamW (beta1 is 0.9, epsilon 1e-8)", "[0,1)")
    add("--max-grad-norm", 1.0, "clip the gradient's norm to this", "(0,inf]")
    add("--updates-per-rollout", 1, "optimizer steps on each batch of rollouts", "[1,inf)")
    add("--importance-cap", 5.0, "largest importance weight of a token, w in Eq. (3)", "[1,inf]")
    add("--loss-temperature", 1.0, "divide all models' logits by this in the loss", "(0,inf)")
    add = partial(flags.flag, parser.add_argument_group("evaluation"))
    add("--eval-samples", 8, "completions sampled for each test prompt", "[1,inf)")
    add("--eval-temperature", 1.0, "sampling temperature of evaluation; 0: greedy", "[0,inf)")
    add("--eval-top-p", 1.0, "top-p of evaluation", "(0,1]")
    add_method_args(parser)
    args = flags.parse(parser, argv, check_method_args)
    args.teacher = [str(TINY / "teacher")] if args.teacher is None else args.teacher
    if args.test_prompts is None and args.prompts == str(TINY / "prompts/train.jsonl"):
        args.test_prompts = [str(TINY / "prompts/test.jsonl")]
    return args


# ==== 2. Data and verifier ========================================================================


def render(tokenizer: Any, said: str | list[Any], args: Args, **more: Any) -> str:
    """Text of the user, or messages, in the tokenizer's chat format, up to the answer's start."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    options = {"tokenize": False, "add_generation_prompt": True} | args.chat_template_args | more
    return str(tokenizer.apply_chat_template(messages, **options))


def to_ids(messages: list[Any], row: Row, tokenizer: Any, args: Args, **more: Any) -> Ids:
    """Messages as token ids, in the chat format, if there is one."""
    templated = args.chat_template and tokenizer.chat_template is not None
    more |= {"tools": row["tools"]} if row.get("tools") else {}
    text = render(tokenizer, messages, args, **more) if templated else data.plain(messages)
    return tuple(prompt_ids(tokenizer, text, templated))


def make_prompt(row: Row, source: data.Source, tokenizer: Any, args: Args) -> Prompt:
    """FORK: how a row of the data set becomes a prompt."""
    messages = data.messages_of(row, source, args.prompt_template, args.system)
    answer, domain = (data.value_of(row, each) for each in (source.answer_field, args.domain_field))
    ids, text = to_ids(messages, row, tokenizer, args), data.user_text(messages)
    domain = "" if domain is None else str(domain)
    return told(Prompt(ids, text, answer, domain, row, messages), tokenizer, args, source=source)


def told(
    prompt: Prompt, tokenizer: Any, args: Args, attempts: Any = ([], [], None), source: Any = None
) -> Prompt:
    """The prompt with what others read in its place (--teacher-prompt), where that is another."""
    read = {}
    for view in views.of(args):
        messages = view.messages(prompt, attempts, source)
        ids = to_ids(messages, prompt.row, tokenizer, args, **view.template_args)
        read |= {view.role: ids} if ids != prompt.ids else {}
    return replace(prompt, views=read)


def prompts_of_step(prompts: list[Prompt], step: int, args: Args) -> list[Prompt]:
    """A function of seed and step alone, so that resuming needs no state; reshuffled each epoch."""
    positions = range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step)
    order = {
        epoch: np.random.default_rng(seed_of("data", epoch, args)).permutation(len(prompts))
        for epoch in range(positions[0] // len(prompts), positions[-1] // len(prompts) + 1)
    }
    return [prompts[order[at // len(prompts)][at % len(prompts)]] for at in positions]


def texts_of(rollout: Rollout, tokenizer: Any) -> list[str]:
    """The completions as text, without special tokens."""
    kept = [ids[mask] for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True))


def verify(rollout: Rollout, tokenizer: Any, verifier: Verifier, ahead: bool = False) -> None:
    """Write the verdicts: +1 right, -1 wrong, 0 unverified. `ahead`: begin to ask, and go on."""
    of_row = zip(texts_of(rollout, tokenizer), rollout.prompts, rollout.ended.tolist())
    items = [(text, prompt.answer, prompt.row, ended) for text, prompt, ended in of_row]
    if ahead:
        return verifier.ahead(items)
    verdict = torch.tensor(verifier(items), device=rollout.verdict.device)
    # A completion that was cut is wrong, unless the verifier is told (a parameter `ended`).
    cut_but_right = ~rollout.ended & (verdict > 0) & (not verifier.judges_cut)
    rollout.verdict = verdict.masked_fill(cut_but_right, -1.0)
    rollout.extra["cut_but_right"] = cut_but_right.float()


# ==== 3. Models and sampling ======================================================================


def load(name: str, path: str, facts: Facts, args: Args) -> CausalLM:
    """What loading does to a model. All but the student are frozen."""
    frozen = name != "student"
    dtype = getattr(torch, args.teacher_dtype if frozen else args.dtype)
    weights = dtype if frozen or args.lora_rank else torch.float32  # trained weights are float32
    compute = torch.float32 if frozen else dtype  # of autocast; float32: none
    return setup.load_lm(path, frozen, weights, compute, without_noise, adapted_layers, facts, args)


def without_noise(config: Any) -> None:
    """No noise: what is trained has to be what sampled. (PhiMoE has its jitter in both.)"""
    noise = ["dropout", "_pdrop", "layerdrop"] + ["jitter"] * (config.model_type != "phimoe")
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):  # a configuration in the configuration
            without_noise(value)
        elif isinstance(value, (int, float)) and any(part in name for part in noise):
            setattr(config, name, type(value)(0))


def adapted_layers(lm: Any) -> list[str]:
    """The layers that --lora-rank adapts: every linear one but the head."""
    layers = [(name, each) for name, each in lm.named_modules() if type(each) is torch.nn.Linear]
    return [name for name, each in layers if each is not lm.get_output_embeddings()]


def stop_ids(facts: Facts) -> list[int]:
    """A completion ends at what any of the models calls end of sequence."""
    return sorted({each for ids in facts.eos_ids.values() for each in ids})


@dataclass
class Rollout:
    """B completions and how they were sampled. Names, units and signs: docs/notation.md."""

    prompts: list[Prompt]
    prompt_ids: Tensor = shaped("BP", torch.int64)  # left-padded
    prompt_mask: Tensor = shaped("BP", torch.bool)
    completion_ids: Tensor = shaped("BT", torch.int64)  # right-padded
    completion_mask: Tensor = shaped("BT", torch.bool)  # every token after the prompt, EOS too
    response_mask: Tensor = shaped("BT", torch.bool)  # tokens that the main loss trains
    prefix_mask: Tensor = shaped("BT", torch.bool)  # tokens of a teacher's prefix; none in opd
    rollout_logp: Tensor = shaped("BT")  # nats, after temperature, top-p and top-k
    behaviour_logp: Tensor = shaped("BT")  # nats, of the full softmax at --loss-temperature
    ended: Tensor = shaped("B", torch.bool)  # EOS was sampled
    source: Tensor = shaped("B", torch.int64)  # 0 student, 1 teacher
    verdict: Tensor = shaped("B")  # +1 right, -1 wrong, 0 unverified
    extra: dict[str, Tensor] = field(default_factory=dict)  # what a method drew, [B] or [B, T] each

    @property
    def trained_mask(self) -> Tensor:  # [B, T], N tokens; no others are scored
        return self.response_mask | self.prefix_mask


def prompt_of(model: CausalLM, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """What a model reads before the completion, ids and mask [B, P]; a teacher may have its own."""
    if not any(model.role in prompt.views for prompt in rollout.prompts):
        return rollout.prompt_ids, rollout.prompt_mask
    read = [prompt.read_by(model.role) for prompt in rollout.prompts]
    return rollouts.left_padded(read, rollout.prompt_ids.device)


def read_tokens(model: CausalLM, rollout: Rollout, read: Callable[..., Any]) -> Any:
    """Run a model over the rollouts: `read(hidden, head)` at the N positions before trained tokens.

    Tensors [N, ...] that it returns, in tuples or dicts, come back as [B, T, ...]; a sum [] stays.
    """
    mask, device = rollout.trained_mask, model.device
    prompt_ids, prompt_mask = prompt_of(model, rollout)
    attention_mask = torch.cat([prompt_mask, rollout.completion_mask], 1).to(device)
    outputs = model(
        read,
        F.pad(mask, (prompt_ids.shape[1] - 1, 1)).to(device),  # t - 1 predicts t
        input_ids=torch.cat([prompt_ids, rollout.completion_ids], 1).to(device),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    )
    return rollouts.scattered(outputs, mask)


def token_logp(model: CausalLM, rollout: Rollout, args: Args) -> Tensor:
    """Log-probs of the sampled tokens: [B, T] nats, full vocabulary, loss temperature."""
    ids, law = rollout.completion_ids[rollout.trained_mask].to(model.device), loss_law(model, args)
    return read_tokens(
        model, rollout, lambda hidden, head: opd_ops.token_logp(hidden, head, ids, **law).logp
    )


def loss_of_tokens(
    student: CausalLM, rollout: Rollout, loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    values: Sequence[Tensor], args: Args, ids: Tensor | None = None, together: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The sum over trained tokens of `loss_of(student_logp, *values)`, and what it logs, [B, T].

    `student_logp` is of the sampled tokens, or of `ids` [B, T, M]. `loss_of` sees a few of the N
    tokens at a time, so a loss may use its own token's numbers only; the head takes part in three
    matrix products. With `together` it sees all tokens, [B, T], which costs a fourth product.
    """
    mask, law = rollout.trained_mask, loss_law(student, args)
    if together:
        student_logp = token_logp(student, rollout, args)
        loss, logged = loss_of(student_logp, *(value * mask for value in values))
        return torch.where(mask, loss, 0.0).sum(), logged
    ids = (rollout.completion_ids if ids is None else ids)[mask].to(student.device)
    pieces = [value[mask].to(student.device) for value in values]  # [N] each
    read = partial(opd_ops.gated_kl, token_ids=ids, loss_of=loss_of, values=pieces, **law)
    found = read_tokens(student, rollout, read)
    return found.loss, found.logged


def loss_law(model: CausalLM, args: Args) -> dict[str, Any]:
    """How the loss turns logits into log-probs: the same for student, teacher and reference."""
    return {"temperature": args.loss_temperature, "valid_vocab": model.facts.valid_vocab}


STREAMS = dict(data=1, rollouts=2, evaluation=3, teacher=4, method=5, teacher_file=6, diagnostics=7)


def seed_of(stream: str, step: int, args: Args) -> list[int]:
    """Every draw is of one stream at one step, and of no earlier one: resuming needs no state."""
    return [args.seed, STREAMS[stream], step]


def uniforms(num_rollouts: int, stream: str, step: int, args: Args) -> Tensor:
    """[B, T] random numbers in [0, 1), one per token: randomness belongs to the rollout, so that
    neither batching nor the number of processes changes a sample."""
    shape = (num_rollouts, args.max_completion_tokens)
    generator = np.random.default_rng(seed_of(stream, step, args))
    return torch.from_numpy(generator.random(shape, dtype=np.float32))


def draw(
    logits: Tensor, uniform: Tensor, sampling: Sampling, law: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by the inverse CDF: (token, rollout_logp, behaviour_logp), each [B]."""
    (temperature, top_p, top_k), ids = sampling, None
    logits = logits[:, : law["valid_vocab"]].float()
    if temperature == 0.0:  # greedy
        temperature, top_k = 1.0, 1
    if top_k or top_p < 1.0:
        size = min(top_k or 1024, logits.shape[1])  # all are sorted only where that is too few
        top = opd_ops.topk_logp(logits, None, size, temperature=temperature)
        ids, probs = top.ids, top.logp.exp()
        if not top_k and (top.tail_logp.exp() > 1.0 - top_p).any():
            probs = (logits / temperature).softmax(-1)
            probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the first one stays
    else:
        probs = (logits / temperature).softmax(-1)
    cdf = probs.cumsum(-1)
    mass = cdf[:, -1:]  # 1 without truncation
    point = (uniform[:, None] * mass).minimum(mass.nextafter(torch.zeros_like(mass)))
    column = torch.searchsorted(cdf, point, right=True)  # never a token of probability 0
    column = column.clamp(max=probs.shape[1] - 1)  # NaN: the step is refused later
    rollout_logp = (probs.gather(1, column) / mass).log()[:, 0]
    token = (column if ids is None else ids.gather(1, column))[:, 0]
    if sampling == (law["temperature"], 1.0, 0):  # both log-probs are of one distribution
        return token, rollout_logp, rollout_logp
    return token, rollout_logp, opd_ops.token_logp(logits, None, token, check_ids=False, **law).logp


def next_logits(model: CausalLM, cache: Any, ids: Tensor, position: Tensor, seen: Any) -> Tensor:
    """[B, V] logits after the newest tokens `ids` at `position`, [B, n]; `seen` [B, L] masks all
    tokens so far, or is None: there is no padding."""
    last = min(model.facts.num_positions, 2**31) - 1  # a rollout that has ended may run beyond
    return model(
        cache.to_logits,
        None,
        input_ids=ids,
        attention_mask=seen,
        position_ids=position.clamp(0, last),
        past_key_values=cache,
        use_cache=True,
    )


@torch.no_grad()
def sample(
    model: CausalLM, prompts: list[Prompt], uniform: Tensor, args: Args,
    sampling: Sampling = (1.0, 1.0, 0), prefixes: Sequence[Ids] = (),
    done: Callable[[Rollout], None] | None = None,
) -> Rollout:  # fmt: skip
    """One completion per prompt; `uniform` [B, T] are its random numbers, one per sampled token.

    Nothing but these arguments decides how: a checkpoint's generation_config is not read.
    `prefixes` are tokens that a completion starts with: not sampled, and not part of the response.
    `done` gets each chunk of rollouts that the own sampler has finished, before the next one.
    """
    (num, width), device = uniform.shape, model.device
    out, uniform = rollouts.blank(Rollout, prompts, width, device), uniform.to(device)
    prefixes = prefixes or [()] * num
    out.completion_ids[:], out.prefix_mask = rollouts.right_padded(prefixes, width, device)
    out.completion_mask = out.prefix_mask.clone()
    share = torch.arange(num, device=device)[ranks.share(num)]  # the rollouts of this process
    model.eval()
    if model.engine:
        fill_by_vllm(model, out, share, uniform, stop_ids(model.facts), args, sampling)
    else:
        with ranks.unsharded(model), model.autocast():  # for all tokens: weights are cast once
            work = partial(decode, model, out, uniform, sampling, args)
            retry.in_chunks(work, out, share, args, done)
    out = rollouts.gather(out)
    renamed = torch.tensor(model.facts.renamed_ids, device=device)
    kept = out.completion_mask & ~torch.isin(out.completion_ids, renamed)
    out.response_mask, out.prefix_mask = kept & ~out.prefix_mask, kept & out.prefix_mask
    return rollouts.select(out, torch.arange(num, device=device))


def decode(
    model: CausalLM, out: Rollout, uniform: Tensor, sampling: Sampling, args: Args, rows: Tensor
) -> None:
    """Go on with the rollouts `rows` of `out`, by a key/value cache, until all of them end.

    The model works on `rows` [n] together; those that have ended are taken out once in a while.
    """
    width, device, law = uniform.shape[1], uniform.device, loss_law(model, args)
    stop = torch.tensor(stop_ids(model.facts), device=device)
    cache = model.new_cache(model.compute_dtype)  # keys and values in the compute type
    begun = [rollouts.begun(out, row, model.role) for row in rows.tolist()]
    distinct = list(dict.fromkeys(begun))  # equal prompts are read once, then copied
    copies = torch.tensor([distinct.index(each) for each in begun], device=device)
    ids, seen = rollouts.left_padded(distinct, device)
    padded, place = not seen.all(), seen.cumsum(1) - 1
    logits = next_logits(model, cache, ids, place, seen if padded else None)[copies]  # [n, V]
    cache.batch_select_indices(copies)
    seen, place = F.pad(seen, (0, width), value=True)[copies], place[copies, -1:]  # place [n, 1]
    column = out.prefix_mask[rows].sum(1)  # [n], where the first token goes
    alive, drawn = column < width, []  # has room and has not ended; not yet recorded
    bar = tqdm(total=len(rows), unit="rollout", desc="sample", leave=False, disable=None)
    look_every = 1 if device.type == "cpu" else 8  # tokens; to look, a GPU has to be waited for
    for t in range(width):
        token, *logp = draw(logits, uniform[rows, t], sampling, law)
        drawn.append((alive, token, *logp))
        alive = alive & ~torch.isin(token, stop) & (column + t + 1 < width)
        if t % look_every == look_every - 1 or t + 1 == width:
            keep = alive.nonzero()[:, 0]
            if len(keep) <= 0.9 * len(rows):  # copying the cache costs about a token
                rollouts.record(out, rows, column + t + 1 - len(drawn), drawn, stop)
                bar.update(len(rows) - len(keep))
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                rows, seen, place, token, column, alive, drawn = (
                    *(each[keep] for each in (rows, seen, place, token, column, alive)), []
                )  # fmt: skip
        so_far = seen[:, : ids.shape[1] + t + 1] if padded else None
        logits = next_logits(model, cache, token[:, None], place + t + 1, so_far)
    bar.close()


# ==== 4. The method ===============================================================================

MUST_BE_FINITE = ("log_ratio", "policy_log_ratio")  # of what `token_loss` logs, else no step


def add_method_args(parser: argparse.ArgumentParser) -> None:
    """Hyper-parameters of the method."""
    add = partial(flags.flag, parser.add_argument_group("method"))
    parser.set_defaults(updates_per_rollout=2)
    add("--drift-rate", 10.0, "tau of Eq. (6), 1 / nats; 0: opd", "[0,inf)")
    add("--block-tokens", 64, "tokens that share a gate, Eq. (5)", "[1,inf)")


def check_method_args(args: Args) -> list[str]:
    """What is wrong with the flags, beyond their bounds."""
    errors = []
    if len(args.teacher or []) > 1:
        errors.append("--teacher: one is expected (exopd.py takes several)")
    return errors


def check_method_data(tokenizer: Any, prompts: list[Prompt], facts: Facts, args: Args) -> list[str]:
    """What is wrong with the flags that only tokenizer and prompts can tell."""
    return []


def model_paths(args: Args) -> dict[str, str]:
    """Which models exist *is* the method. All but the student are frozen."""
    return {"student": args.student, "teacher": args.teacher[0]}


def teacher_of(prompt: Prompt, args: Args) -> str:
    """The name of the model that is the teacher on this prompt."""
    return "teacher"


def generate(
    models: Models, name: str, prompts: list[Prompt], uniform: Tensor,
    args: Args, sampling: Sampling, tokenizer: Any, verifier: Verifier,
) -> Rollout:  # fmt: skip
    """FORK: how a model answers, while training and in evaluation: by one completion, verified."""
    begin = partial(verify, tokenizer=tokenizer, verifier=verifier, ahead=True)
    rollout = sample(models[name], prompts, uniform, args, sampling, done=begin)
    verify(rollout, tokenizer, verifier)
    return rollout


def collect(
    models: Models, tokenizer: Any, verifier: Verifier, prompts: list[Prompt], args: Args, step: int
) -> tuple[Rollout, dict[str, float]]:
    """Where trajectories come from (the student), and what to log of how they came."""
    prompts = [prompt for prompt in prompts for _ in range(args.rollouts_per_prompt)]
    uniform = uniforms(len(prompts), "rollouts", step, args)
    sampling = args.temperature, args.top_p, args.top_k
    rollout = generate(models, "student", prompts, uniform, args, sampling, tokenizer, verifier)
    return rollout, {}


@torch.no_grad()
def score(models: Models, rollout: Rollout, args: Args) -> dict[str, Any]:
    """Everything that comes from frozen models."""
    teacher = models["teacher"]
    return {"teacher_logp": token_logp(teacher, rollout, args)}


def token_loss(
    student: CausalLM, rollout: Rollout, scores: dict[str, Any], args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, summed over trained tokens, and what to log of each token, [B, T]."""

    def loss_of(student_logp: Tensor, teacher_logp: Tensor, behaviour_logp: Tensor) -> Any:
        log_ratio = student_logp.detach() - teacher_logp  # Eq. (1)
        advantage = -log_ratio  # Eq. (2)
        policy_log_ratio = student_logp.detach() - behaviour_logp
        weight = importance_weight(policy_log_ratio, args)
        gate = drift_gate(policy_log_ratio, rollout.trained_mask, args)
        logged = {"log_ratio": log_ratio, "advantage": advantage, "gate": gate}
        logged["policy_log_ratio"] = policy_log_ratio
        return -gate * weight * advantage * student_logp, logged  # Eq. (4)

    values = [scores["teacher_logp"], rollout.behaviour_logp]
    return loss_of_tokens(student, rollout, loss_of, values, args, together=True)


def drift_gate(policy_log_ratio: Tensor, mask: Tensor, args: Args) -> Tensor:
    """[B, T], 1 on average over the trained tokens of each rollout."""
    (num, width), size = mask.shape, args.block_tokens
    blocks = [
        F.pad(values, (0, -width % size)).view(num, -1, size).sum(2)
        for values in (policy_log_ratio * mask, mask.float())
    ]
    drift = blocks[0] / blocks[1].clamp(min=1.0)  # Eq. (5)
    log_gate = (-args.drift_rate * drift.abs()).repeat_interleave(size, 1)[:, :width]
    share = log_gate.masked_fill(~mask, -1e30).softmax(1) * mask  # no underflow where all drift
    return share * mask.sum(1, keepdim=True)  # Eq. (6)


def importance_weight(policy_log_ratio: Tensor, args: Args) -> Tensor | float:
    """w of Eq. (3): exactly 1 where the weights that sampled are still those that are trained."""
    on_policy = args.updates_per_rollout == 1 and args.sampler == "own"
    return 1.0 if on_policy else policy_log_ratio.exp().clamp(max=args.importance_cap)  # Eq. (3)


# ==== 5. Update, evaluation, checkpoints ==========================================================


def learning_rate(step: int, args: Args) -> float:
    """Linear warm-up, then constant, or down to 0 at --steps."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    part = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    down = {"constant": 1.0, "linear": 1.0 - part, "cosine": 0.5 + 0.5 * math.cos(math.pi * part)}
    return args.lr * down[args.lr_schedule]


def make_optimizer(student: CausalLM, args: Args) -> torch.optim.Optimizer:
    """AdamW over float32 weights; weight decay on matrices only."""
    weights = [w for w in student.parameters() if w.requires_grad]
    groups = [
        {"params": [w for w in weights if w.dim() > 1]},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"weight_decay": args.weight_decay, "fused": args.device.startswith("cuda")}
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, args.adam_beta2), **settings)
    setup.zero_moments(optimizer)  # now, so that a checkpoint before the first step is exact
    return optimizer


def accumulate(
    student: CausalLM, num_trained_tokens: float, args: Args, batch: Batch
) -> tuple[float, dict[str, list[Tensor]]]:
    """Add up a batch's gradient. Returns its loss, and what each micro-batch logged, by name."""
    student.zero_grad()
    loss, tokens = 0.0, {}
    for rollout, scores in batch:
        loss_sum, logged = token_loss(student, rollout, scores, args)
        (loss_sum / num_trained_tokens).backward()  # the one normalisation: tokens of all ranks
        loss += float(loss_sum.detach()) / num_trained_tokens
        for name, values in (logged | diagnose.places(rollout)).items():
            tokens.setdefault(name, []).append(values[rollout.trained_mask])
    return loss, tokens


def train_step(
    student: CausalLM, optimizer: torch.optim.Optimizer, batch: Batch, args: Args, step: int
) -> dict[str, float]:
    """One optimizer step; skipped where loss, gradient or log-ratio is not finite (`bad_step`)."""
    num_trained_tokens = sum(int(rollout.trained_mask.sum()) for rollout, _ in batch)
    num_trained_tokens = max(1, ranks.total(num_trained_tokens))  # of all processes
    student.train()
    work = partial(accumulate, student, num_trained_tokens, args)
    loss, tokens = retry.fit_memory(work, batch, args)
    ranks.sum_gradients(student)
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
    loss, grad_norm = ranks.total(loss), float(ranks.whole(grad_norm))
    tokens = {name: ranks.cat(torch.cat(parts)) for name, parts in tokens.items()}
    num_bad = diagnose.num_not_finite(tokens, MUST_BE_FINITE)
    good = math.isfinite(loss + grad_norm) and not num_bad
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    if good:
        optimizer.step()
    metrics = {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate(step, args)}
    metrics |= {"num_bad_log_ratios": float(num_bad), "bad_step": float(not good)}
    return metrics | diagnose.token_metrics(tokens, MUST_BE_FINITE)


@torch.no_grad()
def move_average(models: Models, decay: float) -> None:
    """--teacher ema:DECAY: teacher = DECAY teacher + (1 - DECAY) student, in float32."""
    for old, new in zip(models["teacher"].parameters(), models["student"].parameters()):
        old.lerp_(new, 1.0 - decay)


def evaluate(
    models: Models, tokenizer: Any, verifier: Verifier, args: Args, name: str, prompts: list[Prompt]
) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:  # metrics, and rows by log file
    """avg@n, pass@k, lengths; of the student also, on one sample of each prompt, the reverse KL."""
    asked = [prompt for prompt in prompts for _ in range(args.eval_samples)]
    uniform = uniforms(len(asked), "evaluation", 0, args)  # the same numbers in every evaluation
    sampling = args.eval_temperature, args.eval_top_p, 0
    rollout = generate(models, name, asked, uniform, args, sampling, tokenizer, verifier)
    functions = dict(read_tokens=read_tokens, loss_law=loss_law, teacher_of=teacher_of)
    return diagnose.of_evaluation(models, name, rollout, tokenizer, args, **functions)


# ==== 6. Main loop ================================================================================


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Sample, score, update; evaluate and save."""
    args = parse_args(argv)
    ranks.start(args)
    paths = model_paths(args)
    tokenizer, facts = setup.prepare(paths, args, render)
    make = partial(make_prompt, tokenizer=tokenizer, args=args)
    prompts, tests = data.load_sets(make, facts.num_positions, args)
    held_out = [prompt for test in tests.values() for prompt in test]
    flags.refuse(check_method_data(tokenizer, prompts + held_out, facts, args))
    verifier = Verifier(args.verifier, args.verifier_timeout_s, args.verifier_workers)
    verifier.try_out(prompts, tests, tokenizer)
    say_plan(args)
    check_prompts(prompts + held_out, tokenizer, facts)
    if args.dry_run:
        memory.say(paths, prompts or held_out, args)
        if not args.check_models:
            return
    models = setup.load_models(partial(load, facts=facts, args=args), paths, args, facts)
    check_models(models, paths, prompts or held_out, args, Rollout, sample, token_logp)
    if args.dry_run:
        return
    run = Run(args, facts, __file__, {"prompts": prompts, "test prompts": held_out})
    student, state = models["student"], {"step": 0, "num_bad_steps": 0}
    optimizer = None if args.eval_only else make_optimizer(student, args)
    state = run.load(checkpoints.load, student, optimizer, state)  # as it is, but with --resume

    for step in tqdm(range(state["step"], args.steps + 1), unit="step", disable=None):
        state["step"] = step
        save = partial(run.save, step, checkpoints.save, student, optimizer, tokenizer, state)
        run.stop_if_asked(step, save)
        last = step == args.steps or args.eval_only
        if args.eval_every and (last or step % args.eval_every == 0):
            run.evaluate(step, tests, partial(evaluate, models, tokenizer, verifier, args))
        if last or (args.save_every and step and step % args.save_every == 0):
            save()
        if last:
            break
        with run.phase("generate"):
            chosen = prompts_of_step(prompts, step, args)
            rollout, metrics = collect(models, tokenizer, verifier, chosen, args, step)
            if data.asks_functions(args):
                tell = partial(told, tokenizer=tokenizer, args=args)
                metrics |= views.show_attempts(rollout, texts_of(rollout, tokenizer), tell, facts)
        with run.phase("teacher"):
            pieces = retry.micro_batches(rollout, args)
            batch = [(micro, score(models, micro, args)) for micro in pieces]
        metrics |= diagnose.rollout_metrics(rollout)
        if args.diagnostic_tokens:
            with run.phase("diagnose"):
                seed = seed_of("diagnostics", step, args)
                functions = dict(read_tokens=read_tokens, loss_law=loss_law, teacher_of=teacher_of)
                functions |= {"score": score, "token_loss": token_loss}
                found = diagnose.of_step(models, rollout, tokenizer, args, seed, **functions)
                metrics |= found[0]
                run.trace(step + 1, found[1])
        with run.phase("student"):
            for _ in range(args.updates_per_rollout):
                metrics |= train_step(student, optimizer, batch, args, step)
                if metrics["bad_step"]:
                    break
                if decay := views.decay_of(args):
                    move_average(models, decay)
            student.zero_grad()  # no memory for gradients while rollouts are made
        run.log_step(step + 1, metrics, diagnose.samples(rollout, tokenizer))
        if metrics["bad_step"]:
            alone = diagnose.offending(student, batch, tokenizer, args, token_loss, MUST_BE_FINITE)
            run.bad_step(step + 1, metrics, state["num_bad_steps"], alone, save)
            state["num_bad_steps"] += 1
    run.finish()


if __name__ == "__main__":
    main()
