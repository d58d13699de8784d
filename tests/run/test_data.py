"""Prompts, verifiers and the child process that they run in."""

from __future__ import annotations

import json
import time
from functools import partial

import opd
import pytest
import tinylm
from hypothesis import given
from hypothesis import strategies as st

from opd_run import compat, console, data
from opd_run import verifier as verifiers


def slow_if_asked(text: str, answer: str, row: dict) -> bool:
    """A verifier of the worst kind: it may hang, raise, or kill its process."""
    if text == "hang":
        time.sleep(60)
    if text == "raise":
        raise ValueError("cannot read this")
    if text == "die":
        import os

        os._exit(3)
    return text == answer


@pytest.fixture(scope="module")
def verifier():
    verifier = verifiers.Verifier(slow_if_asked, timeout_s=0.5)
    yield verifier
    verifier.close()


def test_verdicts(verifier):
    """+1 right, -1 wrong, 0 when it failed or hung: never wrong in silence, and it goes on."""
    texts = ["1", "2", "hang", "1", "raise", "1", "die", "1", "2"]
    before = verifier.num_unverified
    assert verifier([(text, "1", {}) for text in texts]) == [1, -1, 0, 1, 0, 1, 0, 1, -1]
    assert verifier.num_unverified - before == 3


def test_verifier_says_why(verifier, capsys):
    fresh = verifiers.Verifier(slow_if_asked, 0.5)
    assert fresh([("raise", "7", {})]) == [0]
    fresh.close()
    assert "cannot read this" in fresh.last_error
    assert "'7'" in capsys.readouterr().out


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
    ],
)
def test_exact(text, answer, right):
    if right is None:  # no right answer: unverified, not wrong
        with pytest.raises(ValueError, match="no right answer"):
            verifiers.verify_exact(text, answer, {})
    else:
        assert verifiers.verify_exact(text, answer, {}) is right


@given(st.text(), st.text())
def test_exact_takes_what_follows_the_last_marker(text, answer):
    right = answer.strip() or "7"
    assert verifiers.verify_exact(f"{text}#### {right}", right, {}) or "#" in right


def test_math_verifier():
    pytest.importorskip("math_verify", reason="extra: math")
    assert verifiers.verify_math("so it is $\\boxed{\\frac{2}{4}}$", "0.5", {})
    assert not verifiers.verify_math("so it is $\\boxed{3}$", "0.5", {})
    with pytest.raises(ValueError, match="cannot read"):
        verifiers.verify_math("3", "", {})
    verifier = verifiers.Verifier(
        verifiers.verifier_function("math"), 20.0
    )  # in the child's main thread
    assert verifier([("$\\frac{1}{2}$", "0.5", {}), ("$2$", "", {})]) == [1, 0]
    verifier.close()


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="extra: tasks")
    rows = data.read_rows("reasoning_gym:chain_sum:5", seed=3)
    assert len(rows) == 5 and rows == data.read_rows("reasoning_gym:chain_sum:5", seed=3)
    assert {"prompt", "answer", "domain", "metadata"} <= set(rows[0])
    function = verifiers.verifier_function("reasoning_gym:chain_sum")
    assert function(f"think #### {rows[0]['answer']}", rows[0]["answer"], rows[0])
    assert not function("#### 123456789", rows[0]["answer"], rows[0])
    with pytest.raises(console.RunError, match="reasoning_gym:nothing"):
        data.read_rows("reasoning_gym:nothing", 0)


def test_module_function_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "def short(text, answer, row):\n    return len(text) < 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    verifier = verifiers.Verifier(verifiers.verifier_function("my_checks:short"), 20.0)
    assert verifier([("ab", "", {}), ("abc", "", {})]) == [1, -1]
    verifier.close()


def arguments(*flags: str):
    return opd.parse_args([*flags])


def load(path: str, args) -> list[data.Prompt]:
    facts = compat.Facts(46, {}, 256)
    return opd.load_prompts(path, 0, tinylm.tokenizer(), facts, args)


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_keep_their_row_and_take_the_template(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": 2, "domain": "add", "level": 3})
    (prompt,) = load(path, arguments())
    assert prompt.ids == tuple(tinylm.tokenizer().encode("<user>1+1=<bot>"))
    assert (prompt.text, prompt.answer, prompt.domain) == ("1+1=", "2", "add")
    assert prompt.row["level"] == 3
    (plain,) = load(path, arguments("--no-chat-template"))
    assert plain.ids == tuple(tinylm.tokenizer().encode("1+1="))


def test_rows_without_an_answer_are_said_and_unverified(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl", {"prompt": "1", "solution": "1"}, {"prompt": "2", "answer": None}
    )
    found = load(path, arguments())
    assert [prompt.answer for prompt in found] == ["", ""]
    assert "! " in (output := capsys.readouterr().out) and "2 rows have no field 'answer'" in output


def test_overlap_of_test_and_training_prompts_is_said(tmp_path, capsys):
    args = arguments()
    train = load(write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"}), args)
    test = load(write(tmp_path / "b.jsonl", {"prompt": "2"}, {"prompt": "3"}), args)
    assert (len(train), len(test)) == (2, 2)
    data.say_overlap(train, test)
    assert "1 of the test prompts are training prompts" in capsys.readouterr().out


def test_time_limit_holds_for_a_verifier_that_always_hangs():
    """Only the first start is waited for: a batch of hanging answers costs its limits."""
    verifier = verifiers.Verifier(slow_if_asked, 0.3)
    assert verifier([("1", "1", {})]) == [1]
    start = time.monotonic()
    assert verifier([("hang", "1", {})] * 3) == [0, 0, 0]
    assert time.monotonic() - start < 30
    verifier.close()


def test_verifier_in_a_file(tmp_path):
    (tmp_path / "check_it.py").write_text("def yes(text, answer, row):\n    return True\n")
    verifier = verifiers.Verifier(verifiers.verifier_function(f"{tmp_path}/check_it.py:yes"), 20.0)
    assert verifier([("a", "", {})]) == [1]
    verifier.close()


def test_long_prompts_are_counted_not_cut(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "1" * 20}, {"prompt": "2"})
    args = arguments("--max-prompt-tokens", "10")
    found = load(path, args)
    assert [prompt.text for prompt in found] == ["1", "2"]
    assert "2 prompts; 1 left out as too long" in capsys.readouterr().out


@given(st.binary(max_size=60))
def test_reader_of_any_bytes_answers_or_refuses(tmp_path_factory, content):
    """Rows, or one RunError: never another exception."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        rows = data.read_rows(str(path), 0)
    except console.RunError as error:
        assert "fuzz.jsonl" in str(error)
    else:
        assert all(isinstance(row, dict) for row in rows)


# ------------------------------------------------------------------------------- compatibility
def report(student_words=tinylm.WORDS, teacher_words=tinylm.WORDS, sizes=(46, 46), **changes):
    import transformers

    tokenizers = {
        "student": tinylm.tokenizer(student_words),
        "teacher": tinylm.tokenizer(teacher_words),
    }
    configs = {
        name: transformers.Qwen3Config(vocab_size=size, max_position_embeddings=99, eos_token_id=1)
        for name, size in zip(tokenizers, sizes)
    }
    generation = {name: transformers.GenerationConfig(eos_token_id=1) for name in tokenizers}
    if "teacher_eos" in changes:
        generation["teacher"].eos_token_id = changes["teacher_eos"]
    if "teacher_template" in changes:
        tokenizers["teacher"].chat_template = changes["teacher_template"]
    if "temperature" in changes:
        generation["student"].temperature = changes["temperature"]
    render = partial(opd.render, args=opd.parse_args([]))
    used = changes.get("used", "student")
    return compat.check_pair(tokenizers, configs, generation, render, used)


def test_equal_models_pass():
    found = report()
    assert not found.errors and not found.warnings
    assert (found.valid_vocab, found.eos_ids, found.num_positions) == (
        46, {"student": (1,), "teacher": (1,)}, 99,
    )  # fmt: skip


def test_same_size_other_ids_are_refused():
    """Trap 17: TRL compares sizes only."""
    words = [*tinylm.WORDS[:4], *tinylm.WORDS[:3:-1]]
    (error,) = report(teacher_words=words).errors
    assert "differ on 42 of 46 ids" in error and "id 4: '0' and '?'" in error


def test_two_heads_may_be_padded_differently():
    """Trap 16: 64 and 96 rows for 46 tokens: only the 46 are in use."""
    found = report(sizes=(64, 96))
    assert not found.errors and found.valid_vocab == 46
    assert any("student's head 64" in fact and "teacher's head 96" in fact for fact in found.facts)


def test_longer_tokenizer_is_cut_and_said():
    found = report(teacher_words=[*tinylm.WORDS, "A", "B"], sizes=(64, 64))
    assert not found.errors and found.valid_vocab == 46


def test_different_eos_is_a_loud_warning():
    """Trap 18: base student, instruct teacher."""
    found = report(teacher_eos=[1, 3])
    (warning,) = found.warnings
    assert "EOS differs" in warning and "<bot> 3" in warning and "truncated_share" in warning
    assert opd.stop_ids(found.all_facts()) == [1, 3]


def test_different_templates_are_a_loud_warning():
    found = report(teacher_template="{{ messages[0]['content'] }}!")
    (warning,) = found.warnings
    assert "chat templates differ" in warning and "--chat-template-from teacher" in warning
    assert "<bot>" in warning and "?!" in warning  # from the first difference on
    (warning,) = report(teacher_template="{{ messages[0]['content'] }}!", used="teacher").warnings
    assert "the student meets text in the teacher's format" in warning
    assert "--chat-template-from" not in warning


def test_generation_config_that_is_ignored_is_said():
    assert any("{'temperature': 0.3}" in fact for fact in report(temperature=0.3).facts)
