"""Engines that are not ours: vLLM as the sampler, and a teacher behind a vLLM server.

Both give what the local path gives: the sampler fills the same `Rollout`, the served teacher the
same log-probs. Tests hold them to it with the real engine (`make test-engines`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from opd_ops import ranks, runs

NUM_REQUESTS = 8  # at a time
ROWS_A_REQUEST = 16
CPU_CACHE_GIB = "1"  # of vLLM on a CPU, which takes no share of the memory
KEY = "OPD_TEACHER_API_KEY"  # environment variable; sent as a bearer token, never logged


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of engines."""
    errors = []
    if args.teacher_url:
        if not args.teacher_url.startswith(("http://", "https://")):
            errors.append(f"--teacher-url: expected http://HOST:PORT, got {args.teacher_url}")
        if args.loss_temperature != 1.0:
            errors.append("--teacher-url: a server knows --loss-temperature 1 only")
        if len(args.teacher or []) > 1:
            errors.append("--teacher-url: one teacher is expected")
        if args.eval_teacher:
            errors.append("--teacher-url: a served teacher only scores; leave --eval-teacher out")
        if args.chat_template_from == "teacher":
            errors.append("--teacher-url: its template is not known; --chat-template-from student")
        for name, value in (("objective", "full"), ("support", "student")):
            if getattr(args, name, None) == value:
                errors.append(f"--teacher-url: --{name} {value} needs more than top log-probs")
    return errors


# ------------------------------------------------------------------------------------ the sampler
class VllmSampler:
    """A vLLM engine in this process, whose weights follow the student's.

    Of several processes each has an engine of its own. Their start is common (vLLM makes its groups
    in the one that `torchrun`'s processes have joined), and so is `update` of sharded weights;
    generation is not.
    """

    def __init__(self, path: str, args: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
        if ranks.rank():  # rank 0 prints
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm = runs.optional("vllm", "vllm", "--sampler vllm")
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
                args.num_positions, args.max_prompt_tokens + args.max_completion_tokens
            ),
            max_num_seqs=args.sampler_batch_size,
            trust_remote_code=args.trust_remote_code,
            generation_config="vllm",  # nothing is inherited from the checkpoint
            logprobs_mode="processed_logprobs",  # of the law that is sampled from
            enable_prefix_caching=False,  # a cache would outlive the weights
            enforce_eager=not self._sleeps,
            disable_log_stats=True,
            **how,
        )
        ranks.at_end.append(self.engine.llm_engine.engine_core.shutdown)

    def update(self, model: Any) -> None:
        """Hand the weights over, if they have changed since the last time, one after the other."""
        from opd_ops.models import merged

        version = sum(weight._version for weight in model.parameters())
        if version != self._version:
            weights = merged(model.lm, model.lm.state_dict())
            with torch.no_grad():
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._version = version

    def sample(
        self,
        model: Any,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        args: argparse.Namespace,
        temperature: float,
        top_p: float,
        top_k: int,
    ) -> list[tuple[list[int], list[float], bool]]:
        """Of each prompt the ids, their log-probs in the law sampled from, whether EOS ended it."""
        if self._sleeps:
            self.engine.wake_up()  # first: there is no memory for weights while it sleeps
        self.update(model)
        law: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k or -1}
        if args.valid_vocab < self.engine.model_config.get_vocab_size():
            law["allowed_token_ids"] = list(range(args.valid_vocab))
        params = [
            self._params(
                **law,
                max_tokens=args.max_completion_tokens,
                stop_token_ids=args.eos_ids,
                logprobs=0,  # of the sampled token alone
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        found = []
        for answer in self.engine.generate(asked, params, use_tqdm=False):
            output = answer.outputs[0]
            ids = list(output.token_ids)
            logp = [entry[each].logprob for each, entry in zip(ids, output.logprobs)]
            found.append((ids, logp, bool(ids) and ids[-1] in args.eos_ids))
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


def sample(
    model: Any,
    out: Any,
    rows: Tensor,
    uniform: Tensor,
    args: argparse.Namespace,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    """Fill `rows` of the rollout `out` from the model's engine, with its current weights.

    The seed of a row comes from its first uniform. `behaviour_logp` is what the engine sampled
    with, so that `policy_log_ratio` has the mismatch between engine and training in it; where
    truncation or a temperature made that another law, the caller has to compute it.
    """
    seeds = (uniform[rows, 0].double() * 2**31).long().tolist()
    prompts = [out.prompts[row] for row in rows.tolist()]
    found = model.engine.sample(model, prompts, seeds, args, temperature, top_p, top_k)
    for row, (ids, logp, ended) in zip(rows.tolist(), found):
        out.completion_ids[row, : len(ids)] = torch.tensor(ids, device=uniform.device)
        out.completion_mask[row, : len(ids)] = True
        out.rollout_logp[row, : len(ids)] = torch.tensor(logp, device=uniform.device)
        out.ended[row] = ended
    out.behaviour_logp[rows] = out.rollout_logp[rows]


# ------------------------------------------------------------------------------ the served teacher
class RemoteTeacher(torch.nn.Module):
    """A teacher behind `vllm serve`, used as if it were a local one.

    A server tells the log-prob of each token and the top K. `read` gets logits [N, V] that have
    exactly these log-probs, the rest of the mass being spread evenly over the other ids: the token,
    the top K, their mass and their tail are those of the teacher, everything else is not, so that
    metrics over full rows are left out.
    """

    remote, plain_head, head = True, False, None

    def __init__(self, tokenizer: Any, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.device = args, torch.device(args.device)
        self.url = args.teacher_url.rstrip("/").removesuffix("/v1")
        self.size = max(getattr(args, name, 0) for name in ("support_size", "outlier_support"))
        self.size = min(self.size, args.valid_vocab)
        served = self._post("/v1/models", None)["data"][0]
        self.name, self.max_len = served["id"], served.get("max_model_len") or math.inf
        self._check_tokenizer(tokenizer)
        self._check_server()
        runs.say(f"teacher: {self.name} at {self.url}, top {self.size} and the sampled token")

    @property
    def engine(self) -> Any:
        """There is none: a served teacher cannot sample."""
        raise runs.RunError("--teacher-url: the served teacher only scores, this method samples it")

    def forward(
        self, read: Callable[..., Tensor], where: Tensor, input_ids: Tensor, **inputs: Any
    ) -> Tensor:
        """`read(logits, None)` at the positions `where`, as of `models.CausalLM`."""
        mask = inputs["attention_mask"].bool()
        rows = [ids[kept].tolist() for ids, kept in zip(input_ids, mask)]
        wanted = [w[kept].tolist() for w, kept in zip(where, mask)]
        logits = torch.zeros(int(where.sum()), self.args.valid_vocab)
        place = 0
        for marks, entries in zip(wanted, self.prompt_logp(rows)):
            for at, mark in enumerate(marks):
                if mark:  # position `at` predicts the token after it
                    self._fill(logits[place], entries[at + 1])
                    place += 1
        return read(logits.to(input_ids.device), None)

    def _fill(self, row: Tensor, entry: dict[int, float]) -> None:
        known = {each: logp for each, logp in entry.items() if each < len(row)}
        ids = torch.tensor(list(known))
        logp = torch.tensor(list(known.values()), dtype=torch.float64)
        others = len(row) - len(ids)
        rest = float(-torch.expm1(torch.logsumexp(logp, 0)))
        row[:] = math.log(rest / others) if others and rest > 0 else -torch.inf
        row[ids] = logp.float()

    def prompt_logp(
        self, rows: Sequence[list[int]], temperature: float = 1.0, size: int | None = None
    ) -> list[list[dict[int, float]]]:
        """For each row and position, log-probs by id: the top K and the token that stands there."""
        size = self.size if size is None else size
        groups = [rows[i : i + ROWS_A_REQUEST] for i in range(0, len(rows), ROWS_A_REQUEST)]

        def ask(group: Sequence[list[int]]) -> list[list[dict[int, float]]]:
            body = {
                "model": self.name,
                "prompt": list(group),
                "max_tokens": 1,
                "prompt_logprobs": size,
                "temperature": temperature,
                "seed": 0,
            }
            choices = self._post("/v1/completions", body)["choices"]
            choices.sort(key=lambda choice: choice["index"])
            return [[_entry(each) for each in c["prompt_logprobs"]] for c in choices]

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            return [found for part in pool.map(ask, groups) for found in part]

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Every id has to be the same text here and there."""
        num = self.args.valid_vocab
        for start in range(0, num, 1024):
            ids = list(range(start, min(start + 1024, num)))
            theirs = self._post("/detokenize", {"model": self.name, "tokens": ids})["prompt"]
            if theirs != tokenizer.decode(ids):
                raise runs.RunError(
                    f"--teacher-url: the served model {self.name} has another tokenizer: ids "
                    f"{ids[0]} to {ids[-1]} are another text there; token-level distillation "
                    "needs one token-to-id map"
                )

    def _check_server(self) -> None:
        """Refuse a server that gives too few log-probs, or changes them by a temperature."""
        probe = [list(range(min(8, self.args.valid_vocab)))]
        plain, warm = (self.prompt_logp(probe, each)[0][1:] for each in (1.0, 0.5))
        worst = max(
            (abs(a[each] - b[each]) for a, b in zip(plain, warm) for each in a.keys() & b.keys()),
            default=0.0,
        )
        if worst > 1e-2:
            raise runs.RunError(
                "--teacher-url: the server applies a temperature to log-probs: start it with "
                "--logprobs-mode raw_logprobs"
            )

    def _post(self, path: str, body: Any) -> Any:
        """JSON of an answer; waits and asks again until `--teacher-timeout-s` have passed."""
        end, pause = time.monotonic() + self.args.teacher_timeout_s, 0.5
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        while True:
            left = max(1.0, end - time.monotonic())
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=left) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                text = runs.one_line(error.read().decode(errors="replace"))
                if error.code < 500 and error.code not in (408, 429):
                    advice = "; start it with --max-logprobs N" if "logprobs" in text else ""
                    raise runs.RunError(
                        f"--teacher-url: {path}: {error.code}: {text}{advice}"
                    ) from None
                problem = f"{error.code}: {text}"
            except (OSError, ValueError) as error:  # no connection, time-out, half an answer
                problem = runs.one_line(error)
            if time.monotonic() + pause > end:
                raise runs.ServerLost(
                    f"--teacher-url: {self.url} has not answered for "
                    f"{self.args.teacher_timeout_s:g} s: {problem}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _entry(entry: dict[str, dict[str, float]] | None) -> dict[int, float]:
    return {int(key): value["logprob"] for key, value in (entry or {}).items()}


def local(paths: dict[str, str], args: argparse.Namespace) -> dict[str, str]:
    """The models of `paths` that are loaded here."""
    served = {"teacher"} if args.teacher_url else set()
    return {name: path for name, path in paths.items() if name not in served}


def remote(models: Iterable[Any]) -> bool:
    """Whether one of them is behind a server."""
    return any(getattr(model, "remote", False) for model in models)
