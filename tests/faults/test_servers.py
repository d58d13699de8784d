"""Attacks by the server of a teacher: false log-probs, redirects, answers that never end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import opd
import pytest
import tinylm
from stubserver import StubServer

from opd_run import console, served_teacher

ROWS = [[3, 5, 7], [4, 2]]


def honest(rows=ROWS, size=2):
    def entry(token):
        ids = [token, *(each for each in range(10, 10 + size) if each != token)]
        return {str(each): {"logprob": math.log(0.9 / len(ids))} for each in ids}

    choices = [
        {"index": i, "prompt_logprobs": [None, *map(entry, row[1:])]} for i, row in enumerate(rows)
    ]
    return {"choices": choices[::-1]}


def entries(answer):
    return answer["choices"][-1]["prompt_logprobs"]


def put(key: str, logp: object) -> Callable:
    return lambda answer: entries(answer)[1].update({key: {"logprob": logp}})


LIES: dict[str, Callable] = {
    "a log-prob above 0": put("5", 0.7),
    "not a number": put("5", float("nan")),
    "a text": put("5", "high"),
    "an id below 0": put("-1", -5.0),
    "an id that is none": put("five", -5.0),
    "the token is missing": lambda answer: entries(answer)[1].pop("5"),
    "too few of the top": lambda answer: [entries(answer)[1].pop(each) for each in ("10", "11")],
    "an entry is missing": lambda answer: entries(answer).pop(),
    "an entry is None": lambda answer: entries(answer).__setitem__(1, None),
    "shifted by one": lambda answer: entries(answer).append(entries(answer).pop(1)),
    "shifted to the front": lambda answer: entries(answer).append(entries(answer).pop(0)),
    "more than the whole mass": put("12", -0.05),
    "a choice is missing": lambda answer: answer["choices"].pop(),
    "no choice": lambda answer: answer["choices"].clear(),
    "a choice twice": lambda answer: answer["choices"].append(dict(answer["choices"][0])),
    "the same index twice": lambda answer: answer["choices"][0].update(index=0),
    "an index that is none": lambda answer: answer["choices"][0].update(index=None),
    "no choices at all": lambda answer: answer.clear(),
    "choices of another kind": lambda answer: answer.update(choices=7),
}


def test_an_honest_answer_is_taken():
    found = served_teacher.checked(honest(), ROWS, 2)
    assert [len(row) for row in found] == [3, 2] and found[0][0] == {}
    assert set(found[0][1]) == {5, 10, 11} and set(found[1][1]) == {2, 10, 11}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_seen(lie):
    answer = honest()
    LIES[lie](answer)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        served_teacher.checked(answer, ROWS, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("servers"))


@contextlib.contextmanager
def serving(folder, name="teacher") -> Iterator[StubServer]:
    server = StubServer(str(folder / name))
    try:
        yield server
    finally:
        server.close()


def teacher(folder, url: str, *more: str):
    """What a run with this server loads; it answers within a minute or, with `more`, sooner."""
    argv = ["--student", str(folder / "student"), "--device", "cpu", "--teacher-url", url]
    return tinylm.load(opd, opd.parse_args([*argv, "--teacher-timeout-s", "60", *more]))


def refused(folder, url: str, *more: str) -> str:
    with pytest.raises(console.RunError) as error:
        teacher(folder, url, *more)
    return str(error.value)


def test_lies_end_a_run_with_a_line(folder):
    with serving(folder) as server:
        reply = server.reply

        def lying(path, body):
            code, found = reply(path, body)
            if path == "/v1/completions":
                found["choices"].pop()
            return code, found

        server.reply = lying
        assert "gives no log-probs of what it was asked" in refused(folder, server.url)
        server.reply = lambda path, body: (200, [])
        assert "lists no model" in refused(folder, server.url)


def test_replicas_of_two_models_are_seen(folder):
    """Every second answer is of another model."""
    with serving(folder) as server, serving(folder, "student") as other:
        teacher(folder, server.url)
        reply, asked = server.reply, []

        def mixed(path, body):
            asked.append(path)
            return (other.reply if len(asked) % 2 else reply)(path, body)

        server.reply = mixed
        assert "nats apart" in refused(folder, server.url)


@contextlib.contextmanager
def raw(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that says what it likes to each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            talk(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def drip(head: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(1200):
            connection.sendall(b"x")
            time.sleep(0.05)

    return talk


def flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" " * 10**6)


def say(text: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(text)


@pytest.mark.parametrize(
    ("talk", "word"),
    [
        (drip(b"HTTP/1.1 200 OK\r\nX-Never: "), "no whole answer within"),
        (drip(b"HTTP/1.1 200 OK\r\n\r\n"), "no whole answer within"),
        (drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"), "no whole answer within"),
        (drip(b"HTTP/1.1 404 No\r\nContent-Length: 100000\r\n\r\n"), "/v1/models: 404"),
        (drip(b"HTTP/1.1 500 No\r\n\r\n"), "has not answered for 2 s: 500"),
        (flood, "an answer of more than"),
        (say(b""), "has not answered"),
        (say(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"), "has not answered"),
        (say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"), "has not answered"),
        (say(b"SSH-2.0-OpenSSH\r\n"), "has not answered"),
        (say(b"HTTP/1.1 500 \r\nContent-Length: 9\r\n\r\n{"), "has not answered"),
        (say(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 10**5), "has not answered"),
    ],
    ids=[
        "head",
        "body",
        "length",
        "404",
        "drip 500",
        "flood",
        "silence",
        "half",
        "chunk",
        "ssh",
        "500",
        "nested",
    ],
)
def test_answers_that_are_none(folder, talk, word):
    with raw(talk) as url:
        assert word in refused(folder, url, "--teacher-timeout-s", "2")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_carry_the_key(folder, code, monkeypatch):
    monkeypatch.setenv(served_teacher.KEY, "secret-7")
    heard: list[bytes] = []

    def listen(connection: socket.socket) -> None:
        heard.append(b"asked")
        body = json.dumps({"data": [{"id": "other"}]}).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with raw(listen) as other:
        head = f"HTTP/1.1 {code} Moved\r\nLocation: {other}/\r\nContent-Length: 0\r\n\r\n"
        with raw(say(head.encode())) as url:
            text = refused(folder, url)
    assert str(code) in text and "redirects" in text and "secret-7" not in text
    assert not heard


def test_the_key_is_not_told(folder, monkeypatch):
    """A server may quote it; one with its file's line end is sent without that."""
    monkeypatch.setenv(served_teacher.KEY, "secret-7\n")
    text = b"no such key: secret-7"
    head = b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(text)
    with raw(say(head + text)) as url:
        assert "401: no such key: ***" in refused(folder, url)
        monkeypatch.setenv(served_teacher.KEY, "sch\u00f6n")
        assert "expected ASCII" in refused(folder, url)


def test_sigterm_does_not_wait_for_a_silent_server(folder, tmp_path, monkeypatch, capsys):
    """The requests that are under way are cut off: they may take --teacher-timeout-s."""
    waited = []
    with serving(folder) as server:
        reply, score, silence = server.reply, opd.score, threading.Event()
        once = threading.Lock()

        def hangs(path, body):
            if once.acquire(blocking=False):  # a second signal would end the run at once
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            server.reply = lambda *_: (503, {})
            waited.append(silence.wait(60))
            return reply(path, body)

        def scored(*args):
            server.reply = hangs
            return score(*args)

        monkeypatch.setattr(opd, "score", scored)
        argv = f"--student {folder}/student --prompts {folder}/prompts.jsonl --device cpu --steps 1"
        argv += f" --teacher-url {server.url} --run-dir {tmp_path}/run --max-completion-tokens 8"
        with pytest.raises(SystemExit) as stop:
            opd.main(argv.split())
        assert not waited
        silence.set()
    assert stop.value.code == 143 and "step_0; go on with --resume" in capsys.readouterr().err
