"""vLLM as the sampler (`--sampler vllm`): an engine in this process that has the student's weights.

It fills the same `Rollout` as the method file's own sampler; tests hold it to that with the real
engine (`make test-engines`).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_run import ranks, rollouts
from opd_run.adapters import as_saved, merged
from opd_run.compat import Facts
from opd_run.console import optional, say

CPU_CACHE_GIB = "1"  # of vLLM on a CPU, which takes no share of the memory


class VllmSampler:
    """A vLLM engine in this process, whose weights follow the student's.

    Of several processes each has an engine of its own. Their start is common (vLLM makes its groups
    in the one that `torchrun`'s processes have joined), and so is `update` of sharded weights;
    generation is not.
    """

    def __init__(self, path: str, facts: Facts, args: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
        if ranks.rank():  # rank 0 prints
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm = optional("vllm", "--sampler vllm")
        self._params = vllm.SamplingParams
        self._version: Any = None
        how: dict[str, Any] = {}
        if ranks.world() > 1:  # vLLM's word for: a process, and its device, that torchrun started
            how["distributed_executor_backend"] = "external_launcher"
        self._sleeps = args.device.startswith("cuda")
        if self._sleeps:
            how["gpu_memory_utilization"] = args.sampler_memory
            how["enable_sleep_mode"] = True
        else:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        self.engine = vllm.LLM(
            model=path,
            dtype=args.dtype,
            seed=args.seed,
            max_model_len=min(
                facts.num_positions, args.max_prompt_tokens + args.max_completion_tokens
            ),
            max_num_seqs=args.sampler_batch_size,
            trust_remote_code=args.trust_remote_code,
            generation_config="vllm",  # nothing is inherited from the checkpoint
            logprobs_mode="raw_logprobs",  # of the full vocabulary, before temperature and top-p
            enable_prefix_caching=False,  # a cache would outlive the weights
            enforce_eager=not self._sleeps,
            disable_log_stats=True,
            **how,
        )
        ranks.at_end.append(self.engine.llm_engine.engine_core.shutdown)

    def update(self, model: Any) -> None:
        """Hand the weights over, if they have changed since the last time, one after the other."""
        version = sum(weight._version for weight in model.parameters())
        if version != self._version:
            weights = as_saved(model.lm, merged(model.lm, model.lm.state_dict()))
            with torch.no_grad():
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._version = version

    def sample(
        self,
        model: Any,
        prompts: Sequence[tuple[int, ...]],
        most: Sequence[int],
        seeds: Sequence[int],
        stop: Sequence[int],
        args: argparse.Namespace,
        law: dict[str, Any],
    ) -> list[tuple[list[int], list[float]]]:
        """Of each prompt at most `most` sampled ids, up to one of `stop`, and their log-probs under
        the full softmax at temperature 1, whatever `law` they were sampled from.

        The engine knows no padding of the vocabulary (to forbid the ids costs seconds a step): a
        completion is cut before such an id, and that is said."""
        if self._sleeps:
            self.engine.wake_up()  # first: there is no memory for weights while it sleeps
        self.update(model)
        params = [
            self._params(
                **law,
                max_tokens=num_tokens,
                stop_token_ids=list(stop),
                logprobs=0,  # of the sampled token alone
                seed=seed,
                detokenize=False,
            )
            for num_tokens, seed in zip(most, seeds)
        ]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        found = []
        for answer in self.engine.generate(asked, params, use_tqdm=False):
            output = answer.outputs[0]
            ids = list(output.token_ids)
            padding = [at for at, each in enumerate(ids) if each >= model.facts.valid_vocab]
            if padding:
                say(f"! sampler: id {ids[padding[0]]} is padding of the vocabulary: cut before it")
                ids = ids[: padding[0]]
            found.append((ids, [entry[i].logprob for i, entry in zip(ids, output.logprobs)]))
        if self._sleeps:
            self.engine.sleep(level=1)
        return found


def memory(num_parameters: int, args: argparse.Namespace) -> int:
    """Bytes that the sampler's engine takes while it generates."""
    if args.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(args.device)
        return int(args.sampler_memory * properties.total_memory)
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * 2**30
    size: int = getattr(torch, args.dtype).itemsize
    return num_parameters * size + cache


def fill_by_vllm(
    model: Any,
    out: Any,
    rows: Tensor,
    uniform: Tensor,
    stop: Sequence[int],
    args: argparse.Namespace,
    sampling: tuple[float, float, int],
) -> None:
    """Sample the rows `rows` of the rollout `out` with the model's engine and current weights.

    A row goes on from its prompt and prefix. Its seed comes from its first uniform.
    `behaviour_logp` is the engine's, so that `policy_log_ratio` has the mismatch between engine and
    training in it. An engine tells one log-prob of a token: where temperature or truncation make
    `rollout_logp` another one, that is NaN.
    """
    seeds = (uniform[rows, 0].double() * 2**31).long().tolist()
    starts = out.completion_mask.sum(1)
    most = (uniform.shape[1] - starts[rows]).tolist()
    temperature, top_p, top_k = sampling
    law = {"temperature": temperature, "top_p": top_p, "top_k": top_k or -1}
    asked = [rollouts.begun(out, row, model.role) for row in rows.tolist()]
    found = model.engine.sample(model, asked, most, seeds, stop, args, law)
    plain = temperature == 1.0 and top_p == 1.0 and top_k == 0
    for row, (ids, logp) in zip(rows.tolist(), found):
        span = slice(int(starts[row]), int(starts[row]) + len(ids))
        out.completion_ids[row, span] = torch.tensor(ids, device=uniform.device)
        out.completion_mask[row, span] = True
        out.behaviour_logp[row, span] = torch.tensor(logp, device=uniform.device)
        out.rollout_logp[row, span] = out.behaviour_logp[row, span] if plain else math.nan
        out.ended[row] = bool(ids) and ids[-1] in stop


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the engine."""
    if args.sampler == "vllm" and args.loss_temperature != 1.0:
        return ["--sampler vllm: the engine tells log-probs at --loss-temperature 1 only"]
    return []
