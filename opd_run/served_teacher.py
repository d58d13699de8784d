"""A teacher behind a vLLM server (`--teacher-url`), used as if it were a local model.

It gives the log-probs that a local one gives; tests hold it to that with the real server
(`make test-engines`).
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

from opd_run.compat import Facts
from opd_run.console import RunError, ServerLost, one_line, say

NUM_REQUESTS = 8  # at a time
ROWS_A_REQUEST = 16
KEY = "OPD_TEACHER_API_KEY"  # environment variable; sent as a bearer token, never logged


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of a served teacher."""
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


class RemoteTeacher(torch.nn.Module):
    """A teacher behind `vllm serve`, used as if it were a local one.

    A server tells the log-prob of each token and the top K. `read` gets logits [N, V] that have
    exactly these log-probs, the rest of the mass being spread evenly over the other ids: the token,
    the top K, their mass and their tail are those of the teacher, everything else is not, so that
    metrics over full rows are left out.
    """

    remote, plain_head, head = True, False, None

    def __init__(self, tokenizer: Any, facts: Facts, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.facts, self.device = args, facts, torch.device(args.device)
        self.url = args.teacher_url.rstrip("/").removesuffix("/v1")
        self.size = max(getattr(args, name, 0) for name in ("support_size", "outlier_support"))
        self.size = min(self.size, facts.valid_vocab)
        served = self._post("/v1/models", None)["data"][0]
        self.name, self.max_len = served["id"], served.get("max_model_len") or math.inf
        self._check_tokenizer(tokenizer)
        self._check_server()
        say(f"teacher: {self.name} at {self.url}, top {self.size} and the sampled token")

    @property
    def engine(self) -> Any:
        """There is none: a served teacher cannot sample."""
        raise RunError("--teacher-url: the served teacher only scores, this method samples it")

    def forward(
        self, read: Callable[..., Tensor], where: Tensor, input_ids: Tensor, **inputs: Any
    ) -> Tensor:
        """`read(logits, None)` at the positions `where`, as of `CausalLM`."""
        mask = inputs["attention_mask"].bool()
        rows = [ids[kept].tolist() for ids, kept in zip(input_ids, mask)]
        wanted = [w[kept].tolist() for w, kept in zip(where, mask)]
        logits = torch.zeros(int(where.sum()), self.facts.valid_vocab)
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
        num = self.facts.valid_vocab
        for start in range(0, num, 1024):
            ids = list(range(start, min(start + 1024, num)))
            theirs = self._post("/detokenize", {"model": self.name, "tokens": ids})["prompt"]
            if theirs != tokenizer.decode(ids):
                raise RunError(
                    f"--teacher-url: the served model {self.name} has another tokenizer: ids "
                    f"{ids[0]} to {ids[-1]} are another text there; token-level distillation "
                    "needs one token-to-id map"
                )

    def _check_server(self) -> None:
        """Refuse a server that gives too few log-probs, or changes them by a temperature."""
        probe = [list(range(min(8, self.facts.valid_vocab)))]
        plain, warm = (self.prompt_logp(probe, each)[0][1:] for each in (1.0, 0.5))
        worst = max(
            (abs(a[each] - b[each]) for a, b in zip(plain, warm) for each in a.keys() & b.keys()),
            default=0.0,
        )
        if worst > 1e-2:
            raise RunError(
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
                text = one_line(error.read().decode(errors="replace"))
                if error.code < 500 and error.code not in (408, 429):
                    advice = "; start it with --max-logprobs N" if "logprobs" in text else ""
                    raise RunError(f"--teacher-url: {path}: {error.code}: {text}{advice}") from None
                problem = f"{error.code}: {text}"
            except (OSError, ValueError) as error:  # no connection, time-out, half an answer
                problem = one_line(error)
            if time.monotonic() + pause > end:
                raise ServerLost(
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
