"""A pool of processes that judge answers: a verifier may hang or die, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from opd_run import ranks
from opd_run.console import RunError, one_line, say
from opd_run.verdicts import is_built_in, right_answers, verifier_function

__all__ = ["Item", "Verifier", "verifier_function"]

Item = tuple[str, Any, dict[str, Any], bool]
"""(completion, right answer, row, whether it ended by itself)"""
Word = tuple[bool | None, str]
"""(right or wrong, ""), or (None, why there is no verdict)"""

START_LIMIT_S = 120.0
MOST_TIMEOUTS = 16  # in a row, then the rest of a batch is not asked
PLAYED = "opd_run.environments:success"  # says what an environment has said: not of answers alone
NUM_TRIED = 20  # rows whose right answer the verifier is asked about before the run
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CRED|AUTH|BEARER|COOKIE|_PWD$|_PAT$")
# Nothing is imported before the path is that of the run: the working directory may have a json.py.
_START = "import sys; sys.path[:] = sys.argv[3:]; " + (
    "from opd_run.verdicts import nursery; nursery(int(sys.argv[1]), sys.argv[2])"
)


@dataclass
class _Worker:
    """A process that judges one item at a time."""

    pipe: Connection
    pid: int
    place: int = -1  # of the item that it has
    deadline: float = 0.0


class Verifier:
    """Asks `function(completion, right_answer, row) -> bool` in `num_workers` processes.

    One that takes longer than `timeout_s` for an answer is killed, with what it has started, so
    that a verifier that hangs cannot stop a run. A process is no sandbox: do not execute model
    text. The processes inherit no variable that looks like a key or token. Answers that are known
    early can be judged `ahead`, beside the generation of others.

    Attributes:
        judges_cut: its word on completions that were cut counts (it has a parameter `ended`).
        num_unverified: calls that timed out, raised or returned no verdict since the run began.
        last_error: the newest message.

    Args:
        spec: see `verifier_function`.  num_workers: 0 means min(4, CPU cores).

    Raises:
        RunError: exit code 2; there is no such function, or its module does not load.
    """

    def __init__(self, spec: str, timeout_s: float, num_workers: int = 0) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.spec, self.timeout_s = spec, min(timeout_s, 1e6)  # more would overflow
        self.num_workers = num_workers or min(4, cores or 1)
        self.num_unverified, self.last_error = 0, ""
        self._workers: list[_Worker] = []
        self._one_asks = threading.Lock()  # one thread at a time talks to the processes
        self._ahead: list[tuple[Sequence[Item], Future[list[Word]]]] = []
        self._num_timeouts = 0  # in a row, of one batch
        self._start()

    def _start(self) -> None:
        """Start the process that forks the others, and wait until it has imported the verifier."""
        ours, theirs = socket.socketpair()
        env = {name: value for name, value in os.environ.items()
               if not _SECRET.search(name.upper())}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), self.spec, *sys.path],
            stdin=subprocess.DEVNULL,
            env=env | {"OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control, self._ended = ours, threading.Event()
        self._close = weakref.finalize(self, _end, ours, process, self._ended)  # at exit, too
        ours.settimeout(START_LIMIT_S)
        try:
            with ours.makefile() as lines:
                line = lines.readline()
        except TimeoutError:
            self._close()
            raise RunError(
                f"--verifier {self.spec}: not imported within {START_LIMIT_S:.0f} s", 2
            ) from None
        ended = f"--verifier {self.spec}: its process ended while the verifier was imported"
        reply = json.loads(line) if line else {"error": ended}
        if "error" in reply:
            self._close()
            raise RunError(reply["error"], 2)
        self.judges_cut = bool(reply["told"])

    def _ask(self, message: bytes, fds: Sequence[int] = ()) -> int:
        socket.send_fds(self._control, [message.ljust(16)], list(fds))
        reply = self._control.recv(16, socket.MSG_WAITALL)
        if len(reply) < 16:
            raise BrokenPipeError("the verifier's process has ended")
        return int(reply)

    def _new_worker(self) -> _Worker:
        for again in (True, False):
            ours, theirs = socket.socketpair()
            try:
                pid = self._ask(b"F", [theirs.fileno()])
                break
            except OSError:  # somebody has killed what forks them
                ours.close()
                if not again or self._ended.is_set():
                    raise
                self._close()
                self._start()
            finally:
                theirs.close()
        return _Worker(Connection(ours.detach()), pid)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        with contextlib.suppress(OSError):  # who forked it was killed, and it with that
            self._ask(b"K%d" % worker.pid)

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """Verdicts: +1 right, -1 wrong, 0 unverified.

        A completion that was cut is put to the verifiers that come with us (what becomes of their
        word is decided in the method file) and to a function with a parameter `ended`; for any
        other function it is wrong. Each rank has all the items, and verifies its share of them;
        what was begun `ahead` is not asked again.
        """
        mine = items[ranks.share(len(items))]
        found = self._rest(mine)
        for item, (right, error) in zip(mine, found):
            if right is None:
                self.num_unverified, self.last_error = self.num_unverified + 1, error
                if self.num_unverified <= 3:  # then only counted, in unverified_share
                    say(f"! verifier failed on answer {item[1]!r:.60}: {error}; verdict 0")
        verdicts = [0.0 if right is None else 1.0 if right else -1.0 for right, _ in found]
        return [verdict for some in ranks.gather(verdicts) for verdict in some]

    def ahead(self, items: Sequence[Item]) -> None:
        """Begin with some items of the next batch, and return at once."""
        words: Future[list[Word]] = Future()
        self._ahead.append((items, words))

        def ask() -> None:
            try:
                words.set_result(self.words(items))
            except BaseException as error:  # raised where the batch is asked for
                words.set_exception(error)

        threading.Thread(target=ask, daemon=True, name="verifier").start()

    def _rest(self, items: Sequence[Item]) -> list[Word]:
        """The words on a batch, of which some items may have been begun."""
        early: dict[Any, list[Word]] = {}
        begun, self._ahead = self._ahead, []
        for some, words in begun:
            for item, word in zip(some, words.result()):
                early.setdefault(_key(item), []).append(word)
        found = [early[_key(item)].pop() if early.get(_key(item)) else None for item in items]
        asked = iter(self.words([item for item, word in zip(items, found) if word is None]))
        self._num_timeouts = 0
        return [next(asked) if word is None else word for word in found]

    def words(self, items: Sequence[Item]) -> list[Word]:
        """(right, "") of each item, or (None, why there is no verdict)."""
        with self._one_asks:
            return self._words(items)

    def _words(self, items: Sequence[Item]) -> list[Word]:
        asked = self.judges_cut or is_built_in(self.spec)
        found: list[Word | None] = [None if asked or item[3] else (False, "") for item in items]
        waiting = deque(place for place, each in enumerate(found) if each is None)
        while waiting or any(worker.place >= 0 for worker in self._workers):
            if self._ended.is_set():  # so does the run
                break
            while waiting and (worker := self._idle()):
                worker.place, worker.deadline = waiting.popleft(), time.monotonic() + self.timeout_s
                try:
                    worker.pipe.send(items[worker.place])
                except OSError:  # it died idle: another one gets the item
                    waiting.appendleft(worker.place)
                    self._drop(worker)
            busy = [worker for worker in self._workers if worker.place >= 0]
            if not busy:
                continue
            first = min(worker.deadline for worker in busy)
            ready = wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
            for worker in busy:
                answered: Word
                if worker.pipe in ready:
                    try:
                        answered = tuple(json.loads(worker.pipe.recv_bytes()))
                        self._num_timeouts = 0
                    except (EOFError, OSError):
                        answered = (None, "its process died")
                elif worker.deadline <= time.monotonic():
                    answered = self._late(items[worker.place])
                    self._num_timeouts += 1
                else:
                    continue
                found[worker.place], worker.place = answered, -1
                if worker.pipe not in ready or answered[1] == "its process died":
                    self._drop(worker)
            if waiting and self._num_timeouts >= MOST_TIMEOUTS:
                say(
                    f"! verifier: {self._num_timeouts} answers in a row took longer than "
                    f"{self.timeout_s} s: the other {len(waiting)} of this batch are not asked"
                )
                for place in waiting:
                    found[place] = self._late(items[place])
                waiting.clear()
        return [each or (None, "not asked") for each in found]

    def _late(self, item: Item) -> tuple[bool | None, str]:
        """No answer in time: unverified; a cut completion needs no word to be wrong."""
        wrong = not item[3] and not self.judges_cut
        return (False, "") if wrong else (None, f"no answer within {self.timeout_s} s")

    def _idle(self) -> _Worker | None:
        for worker in self._workers:
            if worker.place < 0:
                return worker
        if len(self._workers) < self.num_workers:
            worker = self._new_worker()
            self._workers.append(worker)
            return worker
        return None

    def close(self) -> None:
        """End the processes, with what they have started; what was begun `ahead` is given up."""
        self._close()
        with self._one_asks:  # who asked has seen it
            for worker in self._workers:
                worker.pipe.close()
            self._workers = []

    # ------------------------------------------------------------------------- before the run
    def try_out(
        self, prompts: Sequence[Any], tests: dict[str, Sequence[Any]], tokenizer: Any
    ) -> None:
        r"""Say what the first prompt looks like, and what the verifier says of right answers.

        It is asked about the answers themselves of the first 20 rows of each set: bare, as
        `#### x`, and as `\\boxed{x}`. If it rejects all three, no completion will be right.

        Raises:
            RunError: an answer is neither text nor a number (for the verifiers that come with us).
        """
        self._try_out("prompts", prompts, tokenizer)
        for name, test in tests.items():
            self._try_out(f"test prompts {name}".strip(), test, tokenizer)

    def _try_out(self, source: str, prompts: Sequence[Any], tokenizer: Any) -> None:
        if not prompts:
            return
        if is_built_in(self.spec):
            for prompt in prompts:
                try:
                    right_answers(prompt.answer)
                except TypeError as error:
                    raise RunError(
                        f"{source}: --verifier {self.spec}: right answer: {error} (--answer-field; "
                        f"the row has {sorted(prompt.row)})"
                    ) from None
        if ranks.rank():
            return
        tried, items = [], []
        for prompt in prompts[: 0 if self.spec == PLAYED else NUM_TRIED]:
            text = _as_text(prompt.answer, self.spec)
            if text:
                tried.append(prompt)
                items += [(each, prompt.answer, prompt.row, True)
                          for each in (text, f"#### {text}", f"\\boxed{{{text}}}")]  # fmt: skip
        words = self.words(items)
        shapes = ("bare", "as #### x", "as \\boxed{x}")
        spoken = [words[place : place + 3] for place in range(0, len(words), 3)]
        first = prompts[0]
        for who, ids in [
            ("", first.ids),
            *((f", as the {k} reads it", v) for k, v in first.views.items()),
        ]:
            shown = tokenizer.decode(ids)
            shown = shown if len(shown) <= 400 else "..." + shown[-400:]
            shown = json.dumps(shown, ensure_ascii=False)
            say(f"{source}: the first{who}, {len(ids)} tokens: {shown}")
        if tried[:1] == [first]:
            said = ", ".join(
                f"{shape} {'unverified' if right is None else 'right' if right else 'wrong'}"
                for shape, (right, _) in zip(shapes, spoken[0])
            )
            answer = _as_text(first.answer, self.spec)
            spec = self.spec
            say(f"{source}: its right answer: {answer!r:.200}; --verifier {spec} calls it: {said}")
        else:
            say(f"{source}: its right answer: none; --verifier {self.spec} is not asked about it")
        rejected = [each for each, three in zip(tried, spoken) if not any(r for r, _ in three)]
        if rejected:
            place = next(place for place, each in enumerate(tried) if each is rejected[0])
            why = next((f" ({error})" for _, error in spoken[place] if error), "")
            say(
                f"! {source}: --verifier {self.spec} rejects {len(rejected)} of {len(tried)} right "
                f"answers themselves, bare, as #### x and as \\boxed{{x}}: no completion can be "
                f"right{why}; the first: {rejected[0].answer!r:.120} in the row "
                f"{one_line(rejected[0].row, 300)}"
            )


def _key(item: Item) -> tuple[str, int, bool]:
    """Items with the same key have the same answer and row."""
    return item[0], id(item[2]), item[3]


def _as_text(answer: Any, spec: str) -> str:
    """A right answer as a completion would have it; empty if there is none."""
    if is_built_in(spec):
        return next(iter(right_answers(answer)), "")
    if answer is None or isinstance(answer, str):
        return answer or ""
    return json.dumps(answer, ensure_ascii=False, default=str)


def _end(control: socket.socket, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    ended.set()
    control.close()  # it kills those that it has forked, and ends
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
