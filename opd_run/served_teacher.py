"""A teacher behind a vLLM server (`--teacher-url`), used as if it were a local model.

It gives the log-probs that a local one gives; tests hold it to that with the real server
(`make test-engines`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_run import views
from opd_run.compat import Facts
from opd_run.console import RunError, ServerLost, one_line, say

Item = TypeVar("Item")
Found = TypeVar("Found")
NUM_REQUESTS = 8  # at a time
ROWS_A_REQUEST = 16
MOST_LOGP = 1e-3  # nats; what rounding may put above 0
MOST_NATS_APART = 0.2  # replicas in bfloat16 differ by less, other models by more
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

    remote, plain_head, head, role = True, False, None, "teacher"

    def __init__(self, tokenizer: Any, facts: Facts, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.facts, self.device = args, facts, torch.device(args.device)
        self.url = args.teacher_url.rstrip("/").removesuffix("/v1")
        self.size = max(getattr(args, name, 0) for name in ("support_size", "outlier_support"))
        self.size = min(self.size, facts.valid_vocab)
        self._stopped = threading.Event()
        self._why: BaseException | None = None
        self._under_way: set[Callable[[], None]] = set()  # each ends a request
        try:
            served = self._post("/v1/models", None)["data"][0]
            self.name, self.max_len = served["id"], served.get("max_model_len") or math.inf
        except (KeyError, TypeError, IndexError, AttributeError):
            raise RunError(f"--teacher-url: {self.url} lists no model: is it vllm serve?") from None
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
        padding = math.fsum(math.exp(logp) for each, logp in entry.items() if each not in known)
        logp -= math.log1p(-min(padding, 1.0 - 1e-9))  # a local teacher has no such columns
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
            num = sum(map(len, group))
            body = {
                "model": self.name,
                "prompt": list(group),
                "max_tokens": 1,
                "prompt_logprobs": size,
                "temperature": temperature,
                "seed": 0,
            }
            answer = self._post("/v1/completions", body, 10**6 + num * (size + 1) * 1000)
            try:
                return checked(answer, group, size)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunError(
                    f"--teacher-url: {self.url} gives no log-probs of what it was asked: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error

        return [found for part in self._at_once(ask, groups) for found in part]

    def _at_once(self, ask: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`ask(item)` of all, several at a time. Where one fails, or a signal ends the run, the
        others are not waited for."""
        pool = ThreadPoolExecutor(NUM_REQUESTS)
        try:
            return list(pool.map(ask, items))
        except BaseException as error:
            self._why = self._why or error  # the first that failed, not one that was stopped by it
            self._stopped.set()
            for end in list(self._under_way):
                end()
            raise self._why from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Every id has to be the same text here and there."""
        num = self.facts.valid_vocab
        for start in range(0, num, 1024):
            ids = list(range(start, min(start + 1024, num)))
            found = self._post("/detokenize", {"model": self.name, "tokens": ids})
            theirs = found.get("prompt") if isinstance(found, dict) else None
            if theirs != tokenizer.decode(ids):
                raise RunError(
                    f"--teacher-url: the served model {self.name} has another tokenizer: ids "
                    f"{ids[0]} to {ids[-1]} are another text there; token-level distillation "
                    "needs one token-to-id map"
                )

    def _check_server(self) -> None:
        """Refuse a server that gives too few log-probs, changes them by a temperature, or answers
        the same request in two ways, as replicas of different models do."""
        num, length = self.facts.valid_vocab, min(8, self.facts.valid_vocab)
        probe = [[(7 * at + row) % num for at in range(length)] for row in range(NUM_REQUESTS)]
        several = self._at_once(self.prompt_logp, [probe] * NUM_REQUESTS)  # one replica each
        if max(_difference(several[0], each) for each in several) > MOST_NATS_APART:
            raise RunError(
                f"--teacher-url: the servers behind {self.url} give log-probs that are more than "
                f"{MOST_NATS_APART} nats apart: do they all have one model?"
            )
        if _difference(self.prompt_logp(probe[:1]), self.prompt_logp(probe[:1], 0.5)) > 1e-2:
            raise RunError(
                "--teacher-url: the server applies a temperature to log-probs: start it with "
                "--logprobs-mode raw_logprobs"
            )

    def _post(self, path: str, body: Any, most: int = 10**7) -> Any:
        """JSON of an answer of at most `most` bytes; waits and asks again until
        `--teacher-timeout-s` have passed in all."""
        end, pause = time.monotonic() + self.args.teacher_timeout_s, 0.5
        headers, key = {"Content-Type": "application/json"}, os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise RunError(f"{KEY}: expected ASCII without control characters", 2)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        while not self._stopped.is_set():
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                text = self._fetch(request, max(1.0, end - time.monotonic()), most)
                if len(text) > most:
                    raise RunError(f"--teacher-url: {path}: an answer of more than {most} bytes")
                return json.loads(text)
            except urllib.error.HTTPError as error:
                said = str(error.reason)
                if error.code < 500 and error.code not in (408, 429):
                    advice = "; start it with --max-logprobs N" if "logprobs" in said else ""
                    if error.code < 400:
                        advice = "; give the address that it redirects to, if you trust it"
                    raise RunError(f"--teacher-url: {path}: {error.code}: {said}{advice}") from None
                problem = f"{error.code}: {said}"
            except (OSError, ValueError, HTTPException, RecursionError) as error:
                problem = one_line(error) or type(error).__name__  # no connection, half an answer
            if time.monotonic() + pause > end:
                raise ServerLost(
                    f"--teacher-url: {self.url} has not answered for "
                    f"{self.args.teacher_timeout_s:g} s: {problem}"
                )
            self._stopped.wait(pause)
            pause = min(2 * pause, 30.0)
        raise ServerLost(f"--teacher-url: {self.url} is not asked any more")

    def _fetch(self, request: urllib.request.Request, limit_s: float, most: int) -> bytes:
        """An answer, cut after `most` + 1 bytes; all of it within `limit_s`, however it drips.

        Raises:
            TimeoutError: it was not whole by then.
        """
        sockets: list[socket.socket] = []
        over, stopped = threading.Event(), self._stopped

        def remembered(kind: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
            class Connection(kind):  # type: ignore[valid-type,misc]
                def connect(self) -> None:
                    super().connect()
                    sockets.append(self.sock)
                    if stopped.is_set():
                        end()

            return Connection

        class Http(urllib.request.HTTPHandler):
            def http_open(self, req: Any) -> Any:
                return self.do_open(remembered(HTTPConnection), req)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, req: Any) -> Any:
                return self.do_open(remembered(HTTPSConnection), req)

        def end() -> None:
            over.set()
            for each in sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        self._under_way.add(end)
        try:
            opener = urllib.request.build_opener(_NoRedirect, Http, Https)
            with opener.open(request, timeout=limit_s) as answer:
                found = bytes(answer.read(most + 1))
                length = answer.headers.get("Content-Length", "")
                if len(found) <= most and length.isdecimal() and len(found) < int(length):
                    raise OSError(f"{len(found)} of {length} bytes of an answer")
        except urllib.error.HTTPError as error:
            error.msg = _said(error)  # while the time is limited
            raise
        except (OSError, HTTPException):
            if over.is_set():
                raise TimeoutError(f"no whole answer within {limit_s:.0f} s") from None
            raise
        finally:
            timer.cancel()
            self._under_way.discard(end)
        if over.is_set():
            raise TimeoutError(f"no whole answer within {limit_s:.0f} s")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key, and the prompts, to another host: it is an error."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, or of itself, where it says nothing; without the key."""
    try:
        said = one_line(error.read(10**4).decode(errors="replace")) or one_line(error.reason)
    except (OSError, HTTPException) as lost:
        return one_line(lost)
    key = os.environ.get(KEY, "").strip()
    return said.replace(key, "***") if key else said


def _difference(
    some: Sequence[Sequence[dict[int, float]]], others: Sequence[Sequence[dict[int, float]]]
) -> float:
    """The largest difference, in nats, of log-probs that both have of one token in one place."""
    return max(
        (
            abs(logp - b[each])
            for row, other in zip(some, others)
            for a, b in zip(row, other)
            for each, logp in a.items()
            if each in b
        ),
        default=0.0,
    )


def checked(answer: Any, rows: Sequence[list[int]], size: int) -> list[list[dict[int, float]]]:
    """Log-probs by id for each row and position; of a server nothing is taken on trust.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what was asked for: one choice
            for each row, one entry for each token but the first, with that token and `size` others
            in it, ids from 0 on, and log-probs of at most probability 1 in all.
    """
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    if [choice["index"] for choice in choices] != list(range(len(rows))):
        raise ValueError(f"{len(choices)} choices, not one for each of {len(rows)} rows")
    found = []
    for row, choice in zip(rows, choices):
        entries = [_entry(each) for each in choice["prompt_logprobs"]]
        if len(entries) != len(row) or entries[0]:  # nothing comes before the first
            raise ValueError(f"{len(entries)} entries for {len(row)} tokens")
        for at, (token, entry) in enumerate(zip(row, entries)):
            if at and token not in entry:
                raise ValueError(f"position {at} has no log-prob of its token {token}")
            if not all(each >= 0 and logp <= MOST_LOGP for each, logp in entry.items()):
                raise ValueError(f"position {at} has an id below 0, or a log-prob above 0 or NaN")
            if sum(math.exp(logp) for logp in entry.values()) > math.exp(MOST_LOGP):
                raise ValueError(f"position {at} has probabilities of more than 1 in all")
            if at and len(entry) < size:
                raise ValueError(f"position {at} has {len(entry)} tokens, {size} were asked for")
        found.append(entries)
    return found


def _entry(entry: dict[str, dict[str, float]] | None) -> dict[int, float]:
    return {int(key): float(value["logprob"]) for key, value in (entry or {}).items()}


def local(paths: dict[str, str], args: argparse.Namespace) -> dict[str, str]:
    """The models of `paths` that are loaded here: the student's average begins as the student."""
    here = {}
    for name, path in paths.items():
        own = name == "teacher" and views.is_student(path)
        if not (args.teacher_url and name == "teacher") and not (own and path == "live"):
            here[name] = paths["student"] if own else path
    return here


def remote(models: Iterable[Any]) -> bool:
    """Whether one of them is behind a server."""
    return any(getattr(model, "remote", False) for model in models)
