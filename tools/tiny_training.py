"""What `make_tiny.py` trains the tiny family with: a sampler, a supervised step and a GRPO step.

It stays as it was when the family was made, so that the recipe of `assets/tiny` can be run again;
nothing else uses it. The baselines are forks/supervised.py and forks/grpo.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

Row = dict[str, Any]  # prompt, answer, domain; completion in gold files


class Rollout(NamedTuple):
    prompt_ids: torch.Tensor  # [B, P], left-padded
    prompt_mask: torch.Tensor  # [B, P] bool
    completion_ids: torch.Tensor  # [B, T], right-padded
    completion_mask: torch.Tensor  # [B, T] bool, end-of-sequence token included


def load_prompts(path: str | Path, domain: str | None = None) -> list[Row]:
    """Rows of a jsonl file; all of them or those of one domain."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if domain in (None, row.get("domain"))]


def encode_prompts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def pad(rows: list[list[int]], pad_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), True
    return ids, mask


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    generator: torch.Generator,
    max_completion_tokens: int = 128,
    temperature: float = 1.0,
) -> Rollout:
    """One completion per prompt, each token by the inverse CDF of one uniform number of [B, T]."""
    model.eval()
    prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, left=True)
    uniforms = torch.rand(len(prompts), max_completion_tokens, generator=generator)
    completion_ids = torch.full((len(prompts), max_completion_tokens), tokenizer.pad_token_id)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    cache, live, mask = DynamicCache(config=model.config), torch.arange(len(prompts)), prompt_mask
    done = torch.zeros(len(prompts), dtype=torch.bool)  # [rows in the cache]
    ids, positions = prompt_ids, (prompt_mask.cumsum(-1) - 1).clamp(min=0)
    for t in range(max_completion_tokens):
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cdf = torch.log_softmax(output.logits[:, -1].float() / temperature, -1).exp().cumsum(-1)
        threshold = uniforms[live, t, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[-1] - 1)
        completion_ids[live, t] = torch.where(done, tokenizer.pad_token_id, token[:, 0])
        completion_mask[live, t] = ~done
        done = done | (token[:, 0] == tokenizer.eos_token_id)
        if done.all():
            break
        ids, positions = token, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if done.sum() * 8 >= len(done):  # drop finished rows when it pays
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            live, mask, ids, positions, done = (x[keep] for x in (live, mask, ids, positions, done))
    return Rollout(prompt_ids, prompt_mask, completion_ids[:, : t + 1], completion_mask[:, : t + 1])


def verify(tokenizer: Any, rollout: Rollout, answers: list[str]) -> torch.Tensor:
    """+1 where the text after the last `####` is the answer, else -1; [B] float."""
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    said = [text.rpartition("####")[2].strip() if "####" in text else None for text in texts]
    return torch.tensor([1.0 if s == a else -1.0 for s, a in zip(said, answers, strict=True)])


def evaluate(
    model: Any, tokenizer: Any, rows: list[Row], samples: int = 8, seed: int = 0, **limits: Any
) -> dict[str, float]:
    """avg@samples and pass@samples in all and per domain, mean length, share without an end."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    right, lengths, ended = [], [], []
    for _ in range(samples):
        rollout = sample(model, tokenizer, prompts, generator, **limits)
        right.append(verify(tokenizer, rollout, [row["answer"] for row in rows]) > 0)
        lengths.append(rollout.completion_mask.sum(-1).float())
        ended.append((rollout.completion_ids == tokenizer.eos_token_id).any(-1))
    correct = torch.stack(right)  # [samples, rows]
    result = {"avg": correct.float().mean().item(), "pass": correct.any(0).float().mean().item()}
    for domain in sorted({row["domain"] for row in rows}):
        chosen = torch.tensor([row["domain"] == domain for row in rows])
        result[f"avg_{domain}"] = correct[:, chosen].float().mean().item()
    result["mean_length"] = torch.stack(lengths).mean().item()
    result["truncated"] = 1 - torch.stack(ended).float().mean().item()
    return result


def completion_logp(model: Any, rollout: Rollout) -> torch.Tensor:
    """Full-vocabulary log-prob of each completion token, float32, in nats; [N] where masked in."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state[:, rollout.prompt_ids.shape[1] - 1 : -1]
    logp = torch.log_softmax(model.lm_head(hidden[rollout.completion_mask]).float(), -1)
    return logp.gather(-1, rollout.completion_ids[rollout.completion_mask][:, None])[:, 0]


def gold_rollout(tokenizer: Any, rows: list[Row]) -> Rollout:
    """Prompts with given completions, in the layout of the sampler; the end is trained too."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    encoded = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    completions = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    fill = tokenizer.pad_token_id
    return Rollout(*pad(prompts, fill, left=True), *pad(completions, fill, left=False))


def supervised_step(model: Any, optimizer: torch.optim.Optimizer, rollout: Rollout) -> float:
    """One update on the mean negative log-likelihood per completion token, which is returned."""
    model.train()
    optimizer.zero_grad()
    loss = -completion_logp(model, rollout).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def grpo_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    verdict: torch.Tensor,
    group: int,
) -> None:
    """One update; rows lie group by group. Groups without variance only count in the normaliser."""
    groups = verdict.view(-1, group)
    centred = groups - groups.mean(-1, keepdim=True)
    advantage = (centred / (groups.std(-1, correction=0, keepdim=True) + 1e-6)).flatten()  # [B]
    num_trained_tokens = rollout.completion_mask.sum()
    chosen = advantage.nonzero()[:, 0]
    chosen = chosen[rollout.completion_mask[chosen].sum(-1).argsort()]  # alike in length: less pad
    model.train()
    optimizer.zero_grad()
    for index in chosen.split(64) if len(chosen) else ():  # type: ignore[no-untyped-call]
        part = Rollout(*(field[index] for field in rollout))
        width = int(part.completion_mask.sum(-1).max())
        part = Rollout(*part[:2], part.completion_ids[:, :width], part.completion_mask[:, :width])
        weight = advantage[index, None].expand(-1, width)[part.completion_mask]  # [N]
        (-(weight * completion_logp(model, part)).sum() / num_trained_tokens).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
