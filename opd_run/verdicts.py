"""Functions that say whether an answer is right, and the process that calls them.

docs/data.md has the contract and a table of what each function takes. There is no torch in here: a
process that judges answers starts in a moment and holds no weights.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import logging
import math
import numbers
import os
import re
import select
import signal
import socket
import sys
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from opd_run.console import RunError, one_line, optional

Function = Callable[..., Any]
TAIL = 2000  # characters before the end, or before the last box, in which `math` looks
EXPECTED = "exact, math, reasoning_gym:TASK, module:function or file.py:function"


# ---------------------------------------------------------------------- what a text says at its end
def behind_thinking(text: str) -> str:
    """What stands behind the last `</think>`; nothing, if thinking never ended."""
    if "</think>" in text:
        return text.rsplit("</think>", 1)[1]
    return "" if "<think>" in text else text


def last_box(text: str) -> str | None:
    r"""What stands in the last `\\boxed{...}`; None without one that is closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
        if depth == 0:
            return text[start + 7 : place].strip()
    return None


def final_answer(text: str) -> str:
    r"""What is in the last `\\boxed{}`, else behind the last `####`, else the whole text."""
    text = behind_thinking(text)
    box = last_box(text)
    return (_marked_number(text) or text.rsplit("####", 1)[-1].strip()) if box is None else box


def _marked_number(text: str) -> str | None:
    """The number behind the last `####`, which ends with its line; None where there are words."""
    _, mark, found = text.rpartition("####")
    number = re.match(r"[^A-Za-z\n]*\d[^A-Za-z\n]*(?=\n|$)", found.lstrip()) if mark else None
    return number and number[0].strip()


def stated_answer(text: str) -> str:
    """`final_answer`; of a text without box and `####`, what follows its last "answer is" or
    "Answer:", up to the end of the line, without marks around it."""
    found = final_answer(text)
    inside = re.search(r"<answer>(.*?)</answer>\s*$", found, re.S)
    if inside:
        return inside[1].strip()
    says = r"\b(?:answer(?:\s+is)?|correct\s+(?:option|choice)\s+is)\s*:?\s*\**:?\s*([^\s:*].*)"
    said = re.findall(says, found, re.I)
    if said and found == behind_thinking(text).strip():
        found = said[-1]
    return found.strip().strip("*").rstrip(".").strip("*").strip()


def right_answers(answer: Any) -> list[str]:
    r"""The texts, any of which is right, of what a row has as its answer; none if it has none.

    What follows `####` in a solution is its answer, else what is in its last `\\boxed{}`. A list,
    or text that spells a list of texts, means any of its entries.

    Raises:
        TypeError: it is neither text nor a number, nor a list of these.
    """
    if answer is None:
        return []
    if isinstance(answer, (list, tuple)):
        if any(isinstance(each, (list, tuple)) for each in answer):
            raise TypeError(f"expected text, a number or a list of these, got {answer!r:.80}")
        return [text for each in answer for text in right_answers(each)]
    if isinstance(answer, float) and math.isfinite(answer):
        spelt = [str(int(answer))] if answer.is_integer() else []
        return list(dict.fromkeys([*spelt, f"{Decimal(str(answer)):f}", str(answer)]))
    if isinstance(answer, numbers.Number):  # and bool
        return [str(answer)]
    if not isinstance(answer, str):
        kind = type(answer).__name__
        raise TypeError(f"expected text, a number or a list of these, got {kind}: {answer!r:.80}")
    text = answer.strip()
    if re.match(r"\[\s*['\"]", text):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            spelt = ast.literal_eval(text)
            if isinstance(spelt, list) and all(isinstance(each, str) for each in spelt):
                return right_answers(spelt)
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif (box := last_box(text)) is not None:
        text = box
    return [text] if text else []


def _needed(answer: Any) -> list[str]:
    found = right_answers(answer)
    if not found:
        raise ValueError("there is no right answer to compare with")
    return found


# --------------------------------------------------------------- the functions that come with us
def without_commas(text: str) -> str:
    """A number without the commas between its thousands; any other text as it is."""
    return text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def verify_exact(text: str, answer: Any, row: dict[str, Any]) -> bool:
    """`final_answer` is one of the right ones, character by character but for 1,244 and 1244."""
    right = [without_commas(each) for each in _needed(answer)]
    return without_commas(final_answer(text)) in right


SIGNS = {
    **{"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "π": r"\pi "},
    **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    "°": r"^\circ ",
}
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+"))


def in_latex(text: str) -> str:
    r"""Signs of mathematics as LaTeX: ½ as \\frac{1}{2}, √2 as \\sqrt{2}, full-width １ as 1, 2 1/2
    as a mixed number, 1e3 as a power of ten."""
    found = []
    for each in text:
        if "！" <= each <= "～":  # full width
            each = chr(ord(each) - 0xFEE0)
        elif unicodedata.category(each) == "No" and "⁄" in unicodedata.normalize("NFKC", each):
            above, below = unicodedata.normalize("NFKC", each).split("⁄")
            each = f"\\frac{{{above}}}{{{below}}}" if below else each
        found.append(SIGNS.get(each, each))
    text = re.sub(r"(?<![\w)\]}])[‐‑–](?=\d)", "-", "".join(found))
    raised = f"[{''.join(RAISED)}]+"
    text = re.sub(raised, lambda run: f"^{{{''.join(RAISED[each] for each in run[0])}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"\b(\d+(?:\.\d+)?)[eE]([+-]?\d+)\b", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"\b(\d+) +(\d+)/(\d+)\b", r"\1\\frac{\2}{\3}", text)
    # A thin or fixed blank between thousands; a plain one may be that of a list.
    return re.sub(r"(?<=\d)(?:\\[,;:!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)


def folded(text: str, keep_case: bool = False) -> str:
    r"""Text without what only dresses it: $ signs, \\text{}, brackets around one letter, case."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\$", "").replace("$", "")
    text = " ".join(text.split()).rstrip(".").strip()
    letter = re.fullmatch(r"\(?([A-Za-z])\)?", text)
    return letter[1] if letter else text if keep_case else text.casefold()


CHOICE = re.compile(  # (B) 12, B. Paris, B) 12; option B
    r"\(?([A-J])[).:][\\\s~:]+[\w$]|(?:[Oo]ption|[Cc]hoice)\s+\(?([A-J])\)?$"
)


# Whose letters and digits are no factors and terms: words, dates, addresses of the net.
NO_MATHEMATICS = re.compile(
    r"[a-z]{3,}([ '-][a-z]+)*|[a-z]+([ '-][a-z]+)+|no|on|up|in|at|am|pm|or"
    r"|\d{1,4}(?P<mark>[-/.])\d{1,2}(?P=mark)\d{1,4}|\d+(\.\d+){3}|\d{3}-\d{4}"
)


@lru_cache(4096)
def _parsed_gold(text: str) -> list[Any]:
    import math_verify

    found: list[Any] = math_verify.parse(f"${text}$", parsing_timeout=None)
    return found


def verify_math(text: str, answer: Any, row: dict[str, Any]) -> bool:
    """Equal as mathematics (math-verify), or the same words; time is bounded by `Verifier`.

    The end of the text counts: `TAIL` characters, or those before its last box and all behind it.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no limit is known
    right = _needed(answer)
    text = behind_thinking(text).replace("\\$", "")
    if not text.strip():
        return False
    box = text.rfind("\\boxed")
    start = max(0, (len(text) if box < 0 else box) - TAIL)
    text = (
        text[max(start, text.find("\n", start) + 1 if start else 0) :] if box < 0 else text[start:]
    )
    stated = stated_answer(text)
    choice = CHOICE.match(folded(stated, keep_case=True))
    chosen = choice and (choice[1] or choice[2])
    names = list(map(folded, right))
    if {folded(stated), chosen} & set(names):
        return True
    words = set(filter(NO_MATHEMATICS.fullmatch, names))
    right = [each for each, name in zip(right, names) if name not in words]
    if box < 0:
        text = _marked_number(text) or text
    golds = [gold for each in right if (gold := _parsed_gold(each))]
    if plain := [in_latex(each) for each in right if in_latex(each) != each]:
        golds += [gold for each in plain if (gold := _parsed_gold(each))]
    if not golds and not words:
        raise ValueError(f"math-verify cannot read the right answer {answer!r:.80}")
    texts = [text, in_latex(text)]
    short = in_latex(stated)  # (1, 2) or 2 1/2 as it stands, without words
    is_odd = short != stated or re.fullmatch(r"[(\[].*,.*[)\]]", stated)
    if is_odd and len(short) <= 200 and not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2}", short):
        texts.append(f"${short}$")
    for each in dict.fromkeys(texts):
        found = math_verify.parse(each, parsing_timeout=None)
        if words & {folded(one) for one in found if isinstance(one, str)}:
            return True
        if any(math_verify.verify(gold, found, timeout_seconds=None) for gold in golds):
            return True
    return False


def verify_gym(task: str, text: str, answer: Any, row: dict[str, Any]) -> bool:
    """reasoning-gym gives `stated_answer` its full score."""
    import reasoning_gym

    return bool(reasoning_gym.get_score_answer_fn(task)(stated_answer(text), row) >= 1.0)


def is_built_in(spec: str) -> bool:
    """Whether the verifier is one that comes with us: a cut completion is wrong for it."""
    return spec in ("exact", "math") or spec.startswith("reasoning_gym:")


def verifier_function(spec: str) -> Function:
    """`exact`, `math`, `reasoning_gym:TASK`, `module:function` or `file.py:function`.

    A verifier is `function(completion, right_answer, row) -> bool`; an exception is verdict 0.

    Raises:
        RunError: exit code 2; there is no such function, or it cannot be called so.
    """
    if spec in ("exact", "math"):
        if spec == "math":
            optional("math_verify", "--verifier math")
        return {"exact": verify_exact, "math": verify_math}[spec]
    module, _, name = spec.rpartition(":")
    if module == "reasoning_gym" and name:
        gym = optional("reasoning_gym", f"--verifier {spec}")
        try:
            gym.get_score_answer_fn(name)
        except ValueError as error:
            raise RunError(f"--verifier {spec}: {one_line(error)}", 2) from None
        return partial(verify_gym, name)
    try:
        function: Function = getattr(imported(module), name)
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, no function")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{name} is async: expected a function that returns its verdict")
        with contextlib.suppress(ValueError):  # some functions written in C do not say
            inspect.signature(function).bind(
                "", "", {}, **({"ended": True} if told(function) else {})
            )
    except BaseException as error:  # whatever the module raises when it is imported
        raise RunError(
            f"--verifier: expected {EXPECTED}, got {spec!r} "
            f"({type(error).__name__}: {one_line(error)})",
            code=2,
        ) from error
    return function


def imported(module: str) -> Any:
    """A module by name, or the one in a file: by its path, whatever else has its name.

    Raises:
        ImportError: it exits, which would end the run without a word.
    """
    path = Path(module)
    folder = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(module)
        found = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
        assert found is not None and found.loader is not None  # it ends in .py
        made = importlib.util.module_from_spec(found)
        sys.modules[found.name] = made
        found.loader.exec_module(made)
    except SystemExit as error:
        raise ImportError(f"it ends in SystemExit: {error}") from None
    return made


def told(function: Function) -> bool:
    """Whether a verifier has a parameter `ended`: then its word on cut completions counts."""
    try:
        return "ended" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _more(function: Function, ended: bool) -> dict[str, bool]:
    return {"ended": ended} if told(function) else {}


def word(value: Any) -> tuple[bool | None, str]:
    """(right or wrong, "") of what a verifier returned, or (None, what is wrong with it).

    bool, numpy's bool, and numbers equal to 0 or 1 are verdicts. "False", (False, "why"), 0.3, NaN
    or a coroutine are true for Python, and no verdict.
    """
    kind = type(value)
    numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    if isinstance(value, bool) or numpy_bool:
        return bool(value), ""
    number: Any = value if isinstance(value, numbers.Number) else None
    if number in (0, 1):
        return bool(number == 1), ""
    if inspect.iscoroutine(value):
        value.close()
    return None, f"returned {kind.__name__} {value!r:.60}; expected True or False"


# ------------------------------------------------------------------ the process that forks others
def judge(function: Function, text: str, answer: Any, row: Any, ended: bool) -> tuple[Any, str]:
    """`word` of one call; an exception is none."""
    try:
        return word(function(text, answer, row, **_more(function, ended)))
    except BaseException as error:  # a verifier is the user's: whatever it raises is no verdict
        return None, f"{type(error).__name__}: {one_line(error, 200)}"


def _judge_forever(fd: int, function: Function) -> None:
    pipe, pid = Connection(fd), os.getpid()
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):  # nobody asks any more
            return
        answer = json.dumps(judge(function, *item)).encode()
        if os.getpid() != pid:  # forked by the verifier, whose own answer is the one that counts
            return
        pipe.send_bytes(answer)


def _at_death_of_parent(number: int) -> None:
    """Get this signal when the process above has ended; 0: none."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, number)


def _requests(control: socket.socket) -> Iterator[tuple[str, int]]:
    """(letter, number or file descriptor) of each request, until who asks is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([control], [], [], 2.0)[0]:
            continue
        message, fds, *_ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        yield chr(message[0]), fds[0] if fds else int(message[1:])


def nursery(control_fd: int, spec: str) -> None:
    """Import a verifier, then fork a process that judges with it for each one that is asked for.

    Everything is imported before a fork, so that a new one is there at once. What a verifier has
    started ends with it. All end when the other side of `control` is closed, however the run ended.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):  # the run's to handle, and not for exec to keep
        signal.signal(stop, lambda *_: None)
    control, pid = socket.socket(fileno=control_fd), os.getpid()
    _at_death_of_parent(signal.SIGKILL)  # an import may never end
    try:
        function = verifier_function(spec)
        if spec == "math":
            judge(function, "1", "1", {}, True)  # builds what the first call builds
        reply: dict[str, Any] = {"told": told(function)}
    except RunError as error:
        reply = {"error": str(error)}
    if os.getpid() != pid:  # forked by the module
        os._exit(0)
    _at_death_of_parent(0)  # from here on the end of `control` says it
    children = set()
    with contextlib.suppress(OSError):  # who asks is gone in the middle of a request
        control.sendall(json.dumps(reply).encode() + b"\n")
        for letter, number in _requests(control):
            if letter == "F":
                child = os.fork()
                if child == 0:
                    os.setsid()
                    _at_death_of_parent(signal.SIGKILL)
                    control.close()
                    try:
                        _judge_forever(number, function)
                    finally:
                        os._exit(0)
                os.close(number)
                children.add(child)
                control.sendall(b"%16d" % child)
            else:
                if number in children:
                    _end(number)
                    children.discard(number)
                control.sendall(b"%16d" % 0)
    for child in children:
        _end(child)
    for child in _below(pid):  # that the module has started
        _kill(child)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # before it leads a session, it has no group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _end(child: int) -> None:
    """Kill a process and all that it has started, in whatever session, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGSTOP)  # it starts no more
    for pid in [child, *_below(child)]:
        _kill(pid)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _below(pid: int) -> list[int]:
    """The processes that a process has started, those that they have, and so on (on Linux)."""
    parents = {}
    for each in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(each.parent.name)] = int(each.read_bytes().rpartition(b")")[2].split()[1])
    found = [pid]
    for above in found:
        found += [each for each, parent in parents.items() if parent == above]
    return found[1:]
