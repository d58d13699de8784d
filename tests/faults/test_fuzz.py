"""Any input: an error with a message or a right answer, never a crash of the process."""

from __future__ import annotations

import json
import math
import re

import opd
import pytest
import tinylm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import opd_ops
from opd_ops import reference
from opd_run import compat, console, setup, verdicts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "answer", "domain", "x"]), JSON), max_size=4
)


@given(ROWS, st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), st.booleans(), st.booleans())
@example([{"prompt": "1\u2028+\x852"}], "\n", False, False)  # ends of lines, not of a row
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_prompts_of_any_rows(tmp_path_factory, rows, end, ascii_only, template):
    """Every row becomes a prompt as it is spelt, or one error names the file."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    args = opd.parse_args([] if template else ["--no-chat-template"])
    try:
        facts = compat.Facts(46, {}, 10**9)
        found = setup.prompts_of(opd, str(path), tinylm.tokenizer(), facts, args)
    except console.RunError as error:
        assert "rows.jsonl" in str(error)
        prompts = [row.get("prompt") for row in rows]
        text += "".join(each for each in prompts if isinstance(each, str))
        halves = re.search("[\ud800-\udfff]", text)
        assert halves or not prompts or not all(isinstance(x, str) and x for x in prompts)
    else:
        assert [prompt.text for prompt in found] == [row["prompt"] for row in rows]


@given(st.text(), st.text())
def test_verifiers_answer_or_raise(text, answer):
    """`exact` on any text; what it raises becomes verdict 0 in `runs.Verifier`."""
    try:
        assert verdicts.verify_exact(text, answer, {}) in (True, False)
    except ValueError as error:
        assert "no right answer" in str(error) and not verdicts.right_answers(answer)


@given(st.text(max_size=30), st.text(max_size=12))
@settings(max_examples=15)
def test_math_verifier_answers_or_raises(text, answer):
    pytest.importorskip("math_verify", reason="extra: math")
    try:
        assert verdicts.verify_math(text, answer, {}) in (True, False)
    except Exception as error:  # any: the child process that it runs in makes it verdict 0
        assert not isinstance(error, (SystemExit, KeyboardInterrupt))


@given(st.text())
def test_no_text_reaches_the_terminal_as_a_control_code(text):
    shown = console.printable(json.dumps({"completion": text}, ensure_ascii=False))
    assert json.loads(shown) == {"completion": text}  # a log row says the same
    assert all(each.isprintable() or each in "\t\n" or ord(each) >= 0xA0 for each in shown)
    shown.encode()


# ------------------------------------------------------------------------------------------ ops
VALUES = [0.0, -0.0, 1.0, -3.5, 1e4, -1e4, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def tensors(draw) -> torch.Tensor:
    """[N, V] of anything: empty, one column, strided, a view into padding, wrong kinds too."""
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(rows, columns + 3, generator=generator) * draw(
        st.sampled_from([1.0, 30.0])
    )
    for _ in range(draw(st.integers(0, 4)) if rows else 0):
        place = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns + 2))
        values[place] = draw(st.sampled_from(VALUES))
    values = values.to(draw(st.sampled_from([*TYPES, torch.int64])))
    way = draw(st.sampled_from(["view", "whole", "transposed", "expanded", "meta", "1d"]))
    if way == "transposed":
        return values.T.contiguous().T[:, :columns]
    if way == "expanded":
        return values[:1].expand(rows, -1)[:, :columns] if rows else values[:, :columns]
    if way == "meta":
        return values[:, :columns].to("meta")
    if way == "1d":
        return values[0] if rows else values[:, 0]
    return values[:, :columns] if way == "view" else values[:, :columns].contiguous()


def both(name: str, *args, **how) -> None:
    """The installed op and the reference refuse alike, or agree."""
    answers: list = []
    for module in (opd_ops, reference):
        try:
            found = getattr(module, name)(*args, **how)
            answers.append(found if isinstance(found, tuple) else (found,))
        except (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError) as error:
            assert str(error)
            answers.append(error)
    assert isinstance(answers[0], Exception) == isinstance(answers[1], Exception), answers
    if isinstance(answers[0], Exception) or any(
        x.device.type == "meta" for x in args if torch.is_tensor(x)
    ):
        return
    for one, two in zip(*answers, strict=True):
        if torch.is_tensor(one) and one.is_floating_point():
            bound = 2e-2 * two.double().abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=1.0)
            same = (one.double() - two.double()).abs() <= bound
            same |= (one == two) | (one.isnan() & two.isnan())
            assert same.all(), (name, one, two)


@given(
    tensors(),
    st.lists(st.integers(-3, 75), max_size=5),
    st.sampled_from([1.0, 0.7, 0.0, math.nan]),
    st.integers(-1, 71),
)
def test_token_and_gather_logp(logits, ids, temperature, valid_vocab):
    how = {"temperature": temperature, "valid_vocab": valid_vocab or None}
    rows = logits.shape[0]
    token_ids = torch.tensor([*ids, 0, 1, 2, 3, 4][: max(rows, 0)], dtype=torch.int64)
    both("token_logp", logits, None, token_ids, **how)
    both("gather_logp", logits, None, token_ids[:, None].expand(-1, 3), **how)


@given(tensors(), tensors(), st.sampled_from(["forward", "reverse", "jsd", "kl", ""]))
def test_full_kl(student, teacher, divergence):
    both("full_kl", student, None, teacher, None, divergence=divergence)


@given(tensors(), st.integers(-2, 80))
def test_topk_logp(logits, k):
    both("topk_logp", logits, None, k)
