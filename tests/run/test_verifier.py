"""Verifiers: what the functions take as right, and the pool of processes that asks them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_run import console, data, verdicts
from opd_run.verifier import Verifier, verifier_function

CASES = Path(__file__).parent / "cases"
FLAKY = f"{CASES}/flaky.py"


def items(*texts: str, answer="1", ended=True, **row):
    return [(text, answer, row, ended) for text in texts]


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(f"{FLAKY}:slow_if_asked", timeout_s=0.5, num_workers=2)
    yield verifier
    verifier.close()


# ------------------------------------------------------------------------------------- the pool
def test_verdicts(verifier):
    """+1 right, -1 wrong, 0 when it failed or hung: never wrong in silence, and it goes on."""
    texts = ["1", "2", "hang", "1", "raise", "1", "die", "1", "exit", "2"]
    before = verifier.num_unverified
    assert verifier(items(*texts)) == [1, -1, 0, 1, 0, 1, 0, 1, 0, -1]
    assert verifier.num_unverified - before == 4


def test_verifier_says_why(capsys):
    fresh = Verifier(f"{FLAKY}:slow_if_asked", 0.5, 1)
    assert fresh(items("raise", answer="7")) == [0]
    fresh.close()
    assert "cannot read this" in fresh.last_error and "'7'" in capsys.readouterr().out


def test_hanging_answers_cost_their_time_once():
    """Eight of them, in eight processes, side by side; one after the other would take 8 s."""
    pool = Verifier(f"{FLAKY}:slow_if_asked", 1.0, 8)
    start = time.monotonic()
    assert pool(items(*["hang"] * 8)) == [0] * 8
    assert time.monotonic() - start < 6
    pool.close()


def test_a_verifier_that_always_hangs_is_not_asked_for_ever(capsys):
    pool = Verifier(f"{FLAKY}:slow_if_asked", 0.05, 4)
    assert pool(items(*["hang"] * 60)) == [0] * 60
    assert "are not asked" in capsys.readouterr().out
    assert pool(items("1")) == [1]  # the next batch is
    pool.close()


def test_what_was_begun_ahead_is_asked_once(tmp_path):
    """Its words are those of the batch, wherever its items stand in it, cut or not."""
    note = tmp_path / "note"
    pool = Verifier(f"{FLAKY}:slow_if_asked", 5.0, 2)
    row = {"note": str(note)}
    batch = [(f"noted {each}", "", row, each < 3) for each in (0, 1, 2, 1, 3)]
    pool.ahead(batch[3:])
    pool.ahead(batch[:1])
    assert pool(batch) == [-1, 1, -1, 1, -1]
    asked = ["noted 0", "noted 1", "noted 1", "noted 2"]  # a cut one is wrong unasked
    assert sorted(note.read_text().splitlines()) == asked
    assert pool(batch) == [-1, 1, -1, 1, -1]  # the next batch is asked anew
    assert sorted(note.read_text().splitlines()) == sorted(asked * 2)
    pool.ahead([("raise", "", row, True)])
    assert pool([("raise", "", row, True)]) == [0] and "cannot read this" in pool.last_error
    pool.close()


def test_beginning_ahead_waits_for_nothing():
    pool = Verifier(f"{FLAKY}:slow_if_asked", 1.0, 1)
    start = time.monotonic()
    pool.ahead(items("hang"))
    assert time.monotonic() - start < 0.5
    pool.ahead(items("1"))
    assert pool(items("1", "hang")) == [1, 0]
    pool.ahead(items(*["hang"] * 9))
    start = time.monotonic()
    pool.close()  # gives up what was begun
    assert time.monotonic() - start < 4


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds (a zombie has)."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_what_a_verifier_started_ends_with_it(verifier, tmp_path):
    """A process that the verifier starts would outlive each time-out."""
    note = tmp_path / "pid"
    assert verifier(items("orphan", pid=str(note))) == [0]
    assert gone(int(note.read_text()))


@pytest.mark.parametrize("how", ["killed", "ends", "ends ahead"])
def test_a_spinning_verifier_does_not_outlive_the_run(tmp_path, how):
    """Not after kill -9 of the run, and the run's own end does not wait for it."""
    note = tmp_path / "pid"
    script = f"""
import os, sys, threading, time
from opd_run.verifier import Verifier
pool = Verifier({FLAKY + ":slow_if_asked"!r}, 1e300, 1)
pool([("pid", "", {{"pid": {str(note)!r}}}, True)])
if {how!r} == "ends ahead":
    pool.ahead([("stubborn", "", {{}}, True)] * 3)
else:
    pool._workers[0].pipe.send(("stubborn", "", {{}}, True))
time.sleep(0.5)
if {how!r} == "killed":
    os.kill(os.getpid(), 9)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0)
    assert gone(int(note.read_text())) and time.monotonic() - start < 40


def test_a_script_without_a_main_guard_may_call_a_verifier(tmp_path):
    """Its process does not import the caller's script, which would call itself for ever."""
    script = tmp_path / "mine.py"
    script.write_text(
        f"from opd_run.verifier import Verifier\n"
        f"print(Verifier({FLAKY + ':slow_if_asked'!r}, 5.0, 1)([('1', '1', {{}}, True)]))\n"
    )
    long = tmp_path / ("x" * 130)  # too long for the name of a socket
    long.mkdir()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(long)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.stdout == "[1.0]\n", done.stderr


def test_the_process_that_forks_the_others_may_be_killed():
    pool = Verifier(f"{FLAKY}:slow_if_asked", 5.0, 1)
    os.kill(pool._close.peek()[2][1].pid, signal.SIGKILL)
    assert pool(items("1", "2")) == [1, -1]
    pool.close()


def test_keys_are_not_inherited(monkeypatch):
    monkeypatch.setenv("OPD_TEST_API_KEY", "secret")
    pool = Verifier(f"{FLAKY}:slow_if_asked", 5.0, 1)
    assert pool(items("key")) == [-1]
    pool.close()


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        *(("True", 1), ("False", -1), ("1", 1), ("0.0", -1), ("__import__('numpy').bool_(1)", 1)),
        *(("__import__('numpy').float32(1)", 1), ("'False'", 0), ("(False, 'why')", 0)),
        *(("{'correct': False}", 0), ("-1", 0), ("0.3", 0), ("float('nan')", 0), ("None", 0)),
    ],
)
def test_what_counts_as_a_verdict(value, verdict):
    right, why = verdicts.judge(verdicts.verifier_function(f"{FLAKY}:returns"), "", "",
                                {"value": value}, True)  # fmt: skip
    assert right == {1: True, -1: False, 0: None}[verdict]
    assert bool(why) == (verdict == 0)


def test_a_partial_verdict_is_unverified_with_its_type(capsys):
    pool = Verifier(f"{CASES}/myver.py:partial", 5.0, 1)
    assert pool(items("42")) == [0]
    assert "returned float 0.5" in pool.last_error
    pool.close()
    pool = Verifier(f"{CASES}/myver.py:last_number", 5.0, 1)
    assert pool(items("it is 41, no: 1,042", answer="1042")) == [1]
    pool.close()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nothing", "'nothing'"),
        (f"{FLAKY}:nothing", "AttributeError"),
        (f"{FLAKY}:coroutine", "async"),
        (f"{FLAKY}:two", "too many positional arguments"),
        ("json:decoder", "no function"),
        ("{DIR}/exits.py:f", "SystemExit"),
        ("{DIR}/dies.py:f", "ended while the verifier was imported"),
        ("{DIR}/no.py:f", "FileNotFoundError"),
    ],
)
def test_no_verifier_is_a_usage_error(spec, why, tmp_path):
    """Before a model is loaded, and a module that exits ends nothing in silence."""
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(console.RunError, match="--verifier") as caught:
        Verifier(spec.replace("{DIR}", str(tmp_path)), 5.0, 1)
    assert why in str(caught.value) and caught.value.code == 2


def test_a_file_is_loaded_by_its_path(tmp_path):
    """dir/json.py is not the standard library's; a lambda will do."""
    (tmp_path / "json.py").write_text("def loads(text, answer, row):\n    return text == 'mine'\n")
    pool = Verifier(f"{tmp_path}/json.py:loads", 5.0, 1)
    assert pool(items("mine", "[]")) == [1, -1]
    pool.close()
    pool = Verifier(f"{FLAKY}:shortest", 5.0, 1)
    assert pool(items("ab", "abc")) == [1, -1]
    pool.close()


def test_module_function_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "def short(text, answer, row):\n    return len(text) < 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = Verifier("my_checks:short", 20.0, 1)
    assert pool(items("ab", "abc")) == [1, -1]
    pool.close()


# ----------------------------------------------------------------------------- cut completions
def test_who_is_asked_about_cut_completions():
    """Those that come with us (for a metric), and a function that is told; no other function."""
    cases = {
        f"{FLAKY}:slow_if_asked": (["1", "hang"], [-1, -1], False),
        f"{FLAKY}:with_ended": (["cut but fine", "1"], [1, -1], True),
        "exact": (["1", "2"], [1, -1], False),
    }
    for spec, (texts, words, judges_cut) in cases.items():
        pool = Verifier(spec, 5.0, 1)
        assert pool(items(*texts, ended=False)) == words and pool.judges_cut == judges_cut
        pool.close()


def test_verify_makes_cut_ones_wrong_and_counts_them():
    import opd
    import tinylm
    import torch

    tokenizer = tinylm.tokenizer()
    ids = torch.tensor([tokenizer.encode("1"), tokenizer.encode("1"), tokenizer.encode("2")])
    zero, yes = torch.zeros(ids.shape), torch.ones(ids.shape, dtype=torch.bool)
    prompt = data.Prompt((2,), "", "1", "", {})
    for spec, judged in (("exact", [1.0, -1.0, -1.0]), (f"{FLAKY}:with_ended", [1.0, -1.0, -1.0])):
        rollout = opd.Rollout(
            [prompt] * 3, ids, yes, ids, yes, yes, ~yes, zero, zero,
            ended=torch.tensor([True, False, False]), source=ids[:, 0], verdict=zero[:, 0],
        )  # fmt: skip
        pool = Verifier(spec, 5.0, 1)
        opd.verify(rollout, tokenizer, pool)
        pool.close()
        assert rollout.verdict.tolist() == judged
        cut = [0.0, 1.0, 0.0] if spec == "exact" else [0.0] * 3
        assert rollout.extra["cut_but_right"].tolist() == cut


# -------------------------------------------------------------------------------- the functions
@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("3 + 4 = 7 #### 7<end>", "7<end>", True),
        ("#### 7", "7", True),
        ("first #### 6, no: #### 7 ", " 7", True),
        ("7", "7", True),
        ("17", "7", False),
        ("#### 7.", "7", False),
        ("", "7", False),
        ("7", "", None),
        ("7", None, None),
        (r"so \boxed{42} it is", "42", True),
        (r"\boxed{41} #### 42", "42", False),  # the box goes first
        ("#### 1,244", "1244", True),
        ("#### 1244", "1,244", True),
        ("#### 1,24", "124", False),  # no thousands
        ("#### 18", "so it is\n#### 18", True),
        ("18", r"thus $\boxed{18}$.", True),
        ("18", 18, True),
        ("3", 3.0, True),
        ("3.0", 3.0, True),
        ("0.00001", 1e-5, True),
        ("1e-05", 1e-5, True),
        ("no", ["yes", "no"], True),
        ("<think>#### 7", "7", False),
        (r"<think>\boxed{8}</think>#### 7", "7", True),
        ("The answer is 42.", "42", False),  # `math` reads sentences
    ],
)
def test_exact(text, answer, right):
    if right is None:  # no right answer: unverified, not wrong
        with pytest.raises(ValueError, match="no right answer"):
            verdicts.verify_exact(text, answer, {})
    else:
        assert verdicts.verify_exact(text, answer, {}) is right


@given(st.text(), st.text())
def test_exact_takes_what_follows_the_last_marker(text, answer):
    right = answer.strip() or "7"
    assert verdicts.verify_exact(f"{text}#### {right}", right, {}) or "#" in right


@pytest.mark.parametrize("answer", [{"a": 1}, [["1"]], b"1"])
def test_other_right_answers_are_refused(answer):
    with pytest.raises(TypeError, match="text, a number or a list"):
        verdicts.right_answers(answer)


MATH = [  # right answer, completion, whether a person calls it right
    *(("42", "The answer is 42.", 1), ("42", "42", 1), ("42", "**42**", 1)),
    *(("42", "The final answer is **42**.", 1), ("42", "#### 42", 1), ("42", "Answer: 42", 1)),
    *(("42", r"$\boxed{42}$", 1), ("42", r"\boxed{42} apples", 1)),
    *(("42", r"\boxed{42\text{ apples}}", 1), ("42", r"\boxed{x = 42}", 1)),
    *(("42", r"\boxed{\$42}", 1), ("42", "She makes $42 per day.", 1), ("$42", r"\boxed{42}", 1)),
    ("18", "<think>\nMaybe 17? no\n</think>\n\nThe answer is 18.", 1),
    ("18", "<think>\n\\boxed{18} hmm wait\n</think>\n\nThe answer is \\boxed{17}.", 0),
    ("18", "<think>\n\\boxed{17}\n</think>\n\n\\boxed{18}", 1),
    ("18", "<think>\nI think the answer is \\boxed{18}. Let me check", 0),
    *(("1/2", r"\boxed{\frac{1}{2}}", 1), (r"\frac{1}{2}", "0.5", 1)),
    (r"\frac12", r"\boxed{1/2}", 1),
    *(("50%", r"\boxed{50\%}", 1), ("50", r"\boxed{50\%}", 1)),
    *(("1,234", r"\boxed{1234}", 1), ("1234", "The answer is 1,234.", 1)),
    (r"(3, \frac{\pi}{2})", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", 1),
    *(("[0,1)", r"\boxed{[0,1)}", 1), ("[0,1)", r"\boxed{[0,1]}", 0)),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2)\cup(3,\infty)}", 1),
    *((r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1), ("Evelyn", r"\boxed{\text{John}}", 0)),
    *((r"\text{(A)}", r"\boxed{A}", 1), ("A", "The answer is (A).", 1), ("A", r"\boxed{B}", 0)),
    ("B", r"\boxed{\textbf{(B)}\ 12}", 1),
    *((r"10^\circ", r"\boxed{10}", 1), (r"90^\circ", r"\boxed{90^{\circ}}", 1)),
    *((r"5\sqrt{2}", r"\boxed{5\sqrt2}", 1), ("x^2+2x+1", r"\boxed{(x+1)^2}", 1)),
    *(("1,2", r"\boxed{2,1}", 1), ("-2, 3", r"\boxed{-2 \text{ and } 3}", 1)),
    *(("10:30", r"\boxed{10:30}", 1), ("12_5", r"\boxed{12_5}", 1)),
    *(("11:00 AM", "The answer is 11:00 AM", 1), ("yes", r"\boxed{Yes}", 1)),
    *(("2.5", r"\boxed{2.50}", 1), ("3.14", r"\boxed{3.14159}", 0), ("079", r"\boxed{79}", 1)),
    *(("18.0", r"\boxed{18}", 1), ("['18', '18.0']", r"\boxed{18}", 1)),
    *(("½", r"\boxed{\frac12}", 1), ("√2", r"\boxed{\sqrt{2}}", 1), ("π", r"\boxed{\pi}", 1)),
    *((r"\frac12", "It is ½.", 1), ("−3", r"\boxed{-3}", 1), ("１２", r"\boxed{12}", 1)),
    *((r"$\frac{1}{2}$", r"\boxed{\frac12}", 1), (r"\boxed{42}", r"\boxed{42}", 1)),
    *(("42.", r"\boxed{42}", 1), ("42", "", 0), ("42", "I do not know", 0)),
    ("1", "1 2 3 4 5 6 7 8 9 " * 200, 0),
    ("She makes 9 * 2 = 18.\n#### 18", r"\boxed{18}", 1),
    *((r"50\%", r"\boxed{0.5}", 1), ("6", "The answer is six.", 0), ("18", r"\boxed{18.0}", 1)),
    *(("18", r"\boxed{17} or \boxed{18}", 1), ("17", r"\boxed{17} or \boxed{18}", 0)),
    *((r"3 \pm 2\sqrt{2}", r"\boxed{3+2\sqrt{2}, 3-2\sqrt{2}}", 1), ("True", r"\boxed{True}", 1)),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", 1),
    *(("(1,2)", "(1, 2)", 1), ("(1,2)", "(2, 1)", 0), ("[1,2]", "(1, 2)", 0)),
    *(("5/2", "2 1/2", 1), ("2 1/2", r"\boxed{\frac52}", 1), ("12", "3 4", 0)),
    *(("1000", "1e3", 1), ("1e3", r"\boxed{1000}", 1), (1e-7, r"\boxed{10^{-7}}", 1)),
    *((0.5, r"\boxed{1/2}", 1), (18, "The answer is 18.", 1), ([1, 2], r"\boxed{2}", 1)),
    *((r"1\,234", r"\boxed{1234}", 1), ("1234", "1\u202f234", 1), ("10{,}000", "10000", 1)),
    *(("-3", "The answer is –3.", 1), ("-2", "It takes 5–7 days.", 0), ("-3", "‑3", 1)),
    *(("C", r"\boxed{C. Paris}", 1), ("C", "Answer: C) 12", 1), ("C", "Option C", 1)),
    *(("C", "The correct option is C.", 1), ("C", "Option D", 0), ("C", "D. C is wrong", 0)),
    (r"We have $r = 3$, so $\boxed{\left( 3, \frac{\pi}{2} \right)}.$", r"\boxed{(3, \pi/2)}", 1),
    # a dollar as LaTeX writes it
    *(("18", r"The answer is \$18.", 1), ("18.90", r"The total is \$18.90", 1)),
    *((r"\$18", "She makes 18 a day.", 1), ("18", r"She makes \$81 a day.", 0)),
    # letters of words are no factors, parts of dates no terms
    *(("stop", r"\boxed{post}", 0), ("no", r"\boxed{on}", 0), ("ABC", r"\boxed{CBA}", 0)),
    *(("listen", "The answer is $silent$.", 0), ("listen", r"Thus $\text{Listen}$.", 1)),
    *(("2024-01-15", r"\boxed{2008}", 0), ("2024-01-15", r"\boxed{2024-01-15}", 1)),
    *(("1/2/2024", r"\boxed{2/4/2024}", 0), ("192.168.0.1", r"\boxed{192.168.0.2}", 0)),
    *(("no solution", r"\boxed{\text{No solution}}", 1), ("yes", r"\boxed{no}", 0)),
    *(("xy", r"\boxed{yx}", 1), ("AB", r"\boxed{BA}", 1), (["one", "1"], r"\boxed{1}", 1)),
    # what is stated on the next line; a number behind #### ends with its line
    *(("C", "Final answer:\nC", 1), ("Paris", "**Answer:**\nParis", 1), ("7", "**Answer**: 7", 1)),
    *(("42", "#### 41\n\nLet me explain: 42", 0), ("41", "#### 41\n\nLet me explain: 42", 1)),
    ("42", "#### Conclusion\nThe answer is 42", 1),
    ("42", "The answer is 42.\n#### Why\nAs shown.", 1),
    *(("x⁴", r"\boxed{x^4}", 1), ("10⁻³", r"\boxed{0.001}", 1), ("x¹²", r"\boxed{x^{12}}", 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "text", "right"), MATH, ids=[f"{a}|{t[:30]}" for a, t, _ in MATH]
)
def test_math(answer, text, right):
    pytest.importorskip("math_verify", reason="extra: math")
    assert verdicts.verify_math(text, answer, {}) is bool(right)


def test_math_without_a_right_answer_is_unverified(capfd):
    pytest.importorskip("math_verify", reason="extra: math")
    with pytest.raises(ValueError, match="no right answer"):
        verdicts.verify_math("3", "", {})
    pool = Verifier("math", 20.0, 1)
    found = pool([*items("$\\frac{1}{2}$", answer="0.5"), *items("$2$", answer="")])
    assert found == [1, 0]
    pool.close()
    assert "Timeout is disabled" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "said", ["{}", "#### {}", "thus \\boxed{{{}}}.", "The answer is {}.", "Answer: **{}**",
             "<think>\nhm, 3?\n</think>\n\nThe answer is {}.", "<answer>{}</answer>"]
)  # fmt: skip
def test_reasoning_gym_reads_the_stated_answer(said):
    pytest.importorskip("reasoning_gym", reason="extra: tasks")
    function = verifier_function("reasoning_gym:chain_sum")
    for row in data.read_rows("reasoning_gym:chain_sum:5", seed=3):
        assert function(said.format(row["answer"]), row["answer"], row)
        assert not function(said.format("123456789"), row["answer"], row)


# -------------------------------------------------------------------------- right answers first
def tried(spec: str, answer, capsys) -> str:
    import tinylm

    tokenizer = tinylm.tokenizer()
    prompt = data.Prompt(tuple(tokenizer.encode("<user>1+1=<bot>")), "1+1=", answer, "", {"a": 1})
    pool = Verifier(spec, 5.0, 2)
    try:
        pool.try_out([prompt] * 3, {}, tokenizer)
    finally:
        pool.close()
    return capsys.readouterr().out


def test_the_first_row_is_shown_with_the_verifiers_word(capsys):
    said = tried("exact", "2\n#### 2", capsys)
    assert '"<user> 1 + 1 = <bot>"' in said and "6 tokens" in said
    assert "its right answer: '2'; --verifier exact calls it: bare right, as #### x right" in said
    assert "!" not in said


def test_a_right_answer_that_the_verifier_rejects_is_loud(capsys):
    """Trap 35: the reading of `answer` is not the verifier's: no completion could be right."""
    said = tried(f"{CASES}/myver.py:last_number", "so it is 2\n#### two", capsys)
    assert "! prompts: --verifier" in said and "rejects 3 of 3" in said and "#### two" in said
    assert "returned float 0.5" in tried(f"{CASES}/myver.py:partial", "2", capsys)
    assert "its right answer: none" in tried("exact", None, capsys)


def test_answers_that_are_no_text_are_refused(capsys):
    with pytest.raises(console.RunError, match="--answer-field"):
        tried("exact", {"ground_truth": "2"}, capsys)
