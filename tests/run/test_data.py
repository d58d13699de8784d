"""Rows and prompts: every form of file, fields, templates, test sets; the compatibility report."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import opd
import pytest
import tinylm
from hypothesis import given
from hypothesis import strategies as st

from opd_run import compat, console, data, setup, verdicts
from opd_run.verifier import Verifier

CASES = Path(__file__).parent / "cases"
TINY = opd.TINY / "student"


def arguments(*flags: str):
    return opd.parse_args([*flags])


def load(path: str, args, tokenizer=None) -> list[data.Prompt]:
    facts = compat.Facts(46, {}, 256)
    return setup.prompts_of(opd, path, tokenizer or tinylm.tokenizer(), facts, args)


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_keep_their_row_and_take_the_template(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": 2, "domain": "add", "level": 3})
    (prompt,) = load(path, arguments())
    assert prompt.ids == tuple(tinylm.tokenizer().encode("<user>1+1=<bot>"))
    assert (prompt.text, prompt.answer, prompt.domain) == ("1+1=", 2, "add")
    assert prompt.row["level"] == 3
    (plain,) = load(path, arguments("--no-chat-template"))
    assert plain.ids == tuple(tinylm.tokenizer().encode("1+1="))


def test_rows_without_an_answer_are_said_and_unverified(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl", {"prompt": "1", "solution": "1"}, {"prompt": "2", "answer": None}
    )
    found = load(path, arguments())
    assert [prompt.answer for prompt in found] == [None, None]
    assert "! " in (output := capsys.readouterr().out) and "2 rows have no field 'answer'" in output


def test_overlap_of_test_and_training_prompts_is_said(tmp_path, capsys):
    args = arguments()
    train = load(write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"}), args)
    test = load(write(tmp_path / "b.jsonl", {"prompt": "2"}, {"prompt": "3"}), args)
    assert (len(train), len(test)) == (2, 2)
    data.say_overlap(train, test)
    assert "1 of the test prompts are training prompts" in capsys.readouterr().out


def test_long_prompts_are_counted_not_cut(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "1" * 20}, {"prompt": "2"})
    args = arguments("--max-prompt-tokens", "10")
    tokenizer = tinylm.tokenizer()
    tokenizer.model_max_length = 10
    found = load(path, args, tokenizer)
    assert not tokenizer.deprecation_warnings  # nor does it warn of what is left out
    assert [prompt.text for prompt in found] == ["1", "2"]
    assert "2 prompts; 1 left out as too long" in capsys.readouterr().out


def test_prompts_beyond_the_positions_are_counted_not_the_end(tmp_path, capsys):
    """One prompt too long for the models ended the run; all of them still do, in one line."""
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "1" * 20}, {"prompt": "2"})
    args, facts = arguments("--max-completion-tokens", "8"), compat.Facts(46, {}, 20)
    found = setup.prompts_of(opd, path, tinylm.tokenizer(), facts, args)
    assert [prompt.text for prompt in found] == ["1", "2"]
    assert (
        "2 prompts; 1 left out as too long: longer than 12 tokens, which is what "
        "--max-completion-tokens 8 leaves of the models' 20 positions" in capsys.readouterr().out
    )
    for positions in (9, 8, 3):
        facts = compat.Facts(46, {}, positions)
        with pytest.raises(console.RunError, match=r"all 3 are longer than [01] tokens, [^\n]*$"):
            setup.prompts_of(opd, path, tinylm.tokenizer(), facts, args)


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


def test_reasoning_gym_rows():
    pytest.importorskip("reasoning_gym", reason="extra: tasks")
    rows = data.read_rows("reasoning_gym:chain_sum:5", seed=3)
    assert len(rows) == 5 and rows == data.read_rows("reasoning_gym:chain_sum:5", seed=3)
    assert {"prompt", "answer", "domain", "metadata"} <= set(rows[0])
    for spec in ("reasoning_gym:nothing", "reasoning_gym:chain_sum:5:train"):
        with pytest.raises(console.RunError, match=spec):
            data.read_rows(spec, 0)


@pytest.mark.parametrize("test", [None, ""])
def test_an_empty_name_is_no_data_set(test):
    """It trained on nothing, and left evaluation out without a word."""
    with pytest.raises(console.RunError, match=r"expected a \.jsonl, .* got nothing"):
        setup.prompts_of(opd, "", tinylm.tokenizer(), compat.Facts(46, {}, 256), arguments(), test)


@pytest.mark.parametrize("spec", ["no.jsonl", "no.CSV.gz", "no.jsonl:train", "no.jsonl[:10]"])
def test_a_file_that_is_not_there_is_no_hub_name(spec):
    with pytest.raises(console.RunError, match=f"no file {re.escape(spec)}"):
        data.read_rows(spec, 0)


# ------------------------------------------------------------------- files as people have them
@pytest.fixture(scope="module")
def tiny():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(TINY)


def case(name: str, tokenizer, *flags: str, test: str | None = None) -> list[data.Prompt]:
    facts = compat.Facts(692, {}, 10**6)
    return setup.prompts_of(opd, str(CASES / name), tokenizer, facts, arguments(*flags), test)


def first_lines(prompts) -> list[str]:
    return [prompt.text[:12] for prompt in prompts]


def rows_of_the_table() -> list[tuple[str, str, list[str]]]:
    """(file, flags, what is said) of each row of the table in cases/README.md."""
    found = []
    for line in (CASES / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| file"):
            file, flags, said = (cell.strip() for cell in re.split(r" \|(?: |$)", line[1:])[:3])
            found.append((file, flags.strip("`"), re.findall(r"`([^`]+)`", said)))
    return found


@pytest.mark.parametrize(("file", "flags", "said"), rows_of_the_table())
def test_the_table_of_cases(file, flags, said, tiny, monkeypatch, capsys):
    """Each command line of cases/README.md says what the table says."""
    if file.endswith(("parquet", "arrow", "disk")):
        pytest.importorskip("datasets", reason="extra: data")
    if "--verifier math" in flags:
        pytest.importorskip("math_verify", reason="extra: math")
    monkeypatch.chdir(CASES.parents[2])
    how = ["--max-completion-tokens", "32", "--prompts", f"tests/run/cases/{file}"]
    args = arguments(*how, *shlex.split(flags))
    pool = Verifier(args.verifier, 20.0, 1)
    try:
        facts = compat.Facts(692, {}, 512)
        pool.try_out(setup.prompts_of(opd, args.prompts, tiny, facts, args), {}, tiny)
        printed = capsys.readouterr().out
    except console.RunError as error:
        printed = str(error)
    finally:
        pool.close()
    for each in said:
        assert each in printed


def test_every_case_is_in_the_table():
    told = {file for file, *_ in rows_of_the_table()} | {"README.md", "myver.py", "flaky.py"}
    assert {path.name for path in CASES.iterdir() if path.name != "__pycache__"} == told


DUCKS = ["Janet’s duck", "A robe takes", "Josh decides", "James decide"]


@pytest.mark.parametrize(
    "name",
    ["ok.jsonl", "ok.csv", "ok.parquet", "ok.arrow", "ok.jsonl.gz", "array.json", "saved_to_disk"],
)
def test_one_data_set_in_seven_forms(name, tiny):
    if name.endswith(("parquet", "arrow", "disk")):
        pytest.importorskip("datasets", reason="extra: data")
    found, same = case(name, tiny), case("ok.jsonl", tiny)
    assert first_lines(found) == DUCKS
    assert found == same and [each.answer for each in found] == ["18", "3", "70000", "540"]


@pytest.mark.parametrize(
    ("name", "flags", "answers"),
    [
        ("gsm8k.jsonl", "", ["18", "3", "70000", "540"]),
        ("gsm8k.jsonl", "--prompt-field question", ["18", "3", "70000", "540"]),
        ("alpaca.jsonl", "--prompt-field instruction --answer-field output", ["18", "3", "70000"]),
        ("dapo.jsonl", "--answer-field reward_model.ground_truth", ["18", "3", "70000"]),
        ("ints.jsonl", "", ["18", "3", "70000"]),
        ("math.jsonl", "--answer-field solution", [r"\left( 3, \frac{\pi}{2} \right)", "p - q"]),
        ("math500.jsonl", "", [r"\left( 3, \frac{\pi}{2} \right)", "p - q"]),
        ("deepmath.jsonl", "--answer-field final_answer", [r"\left( 3, \frac{\pi}{2} \right)"]),
        ("multiline.jsonl", "", ["line 1\nline 2"]),
        ("unicode.jsonl", "", ["½"]),
        ("trl_prompt_conv.jsonl", "", ["18", "3"]),
        ("multiturn.jsonl", "", ["18", "3"]),
    ],
)
def test_right_answers_of_rows(name, flags, answers, tiny):
    """What `exact` and `math` compare with, and each right answer is right by their own word."""
    found = case(name, tiny, *flags.split())
    assert [verdicts.right_answers(each.answer)[0] for each in found][: len(answers)] == answers
    for prompt in found:
        (text, *_) = verdicts.right_answers(prompt.answer)
        for said in (text, f"so\n#### {text}", f"so \\boxed{{{text}}}."):
            assert verdicts.verify_exact(said, prompt.answer, prompt.row)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("trl_prompt_conv.jsonl", "S:You are a math tutor.|U:Janet’s"),
        ("trl_messages.jsonl", "U:Janet’s"),
        ("sharegpt.jsonl", "U:Janet’s"),
        ("multiturn.jsonl", "U:Janet’s"),
        ("tools.jsonl", "calc|U:Janet’s"),
        ("dapo.jsonl", "U:Solve the"),
    ],
)
def test_messages_are_rendered_by_the_template(name, shown, tiny, monkeypatch, capsys):
    seen = []
    template = (
        "{% for t in tools or [] %}{{ t['function']['name'] }}|{% endfor %}{% for m in messages %}"
        "{{ m['role'][0]|upper }}:{{ m['content'] }}|{% endfor %}A:"
    )
    monkeypatch.setattr(tiny, "chat_template", template)
    encode = tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda text, **how: (seen.append(text), encode(text))[1])
    found = case(name, tiny, "--max-prompt-tokens", "4096")
    assert len(found) == 4 and seen[0].startswith(shown) and seen[0].endswith("|A:")
    cut = "cut off in 4 rows" in capsys.readouterr().out
    assert cut == (name in ("trl_messages.jsonl", "sharegpt.jsonl"))
    if name == "multiturn.jsonl":
        assert "|A:Let me think.|U:Go on.|A:" in seen[0] and found[0].text == "Go on."
    if cut:
        assert "Janet sells" not in seen[0]


def test_rows_that_lack_something(tiny, capsys):
    assert [each.answer for each in case("mixed_missing.jsonl", tiny)][:2] == [None, "3"]
    assert "rows have no field 'answer'" in capsys.readouterr().out
    with pytest.raises(console.RunError, match=r"none_prompt\.jsonl: row 3: expected text"):
        case("none_prompt.jsonl", tiny)
    found = case("long.jsonl", tiny)
    assert "left out as too long" in (said := capsys.readouterr().out) and "; 0 left" not in said
    assert first_lines(found) == DUCKS
    assert len(case("dups.jsonl", tiny)) == 8
    assert "4 prompts are there more than once" in capsys.readouterr().out


def test_prompt_and_completion_are_a_teachers_rollouts(tiny):
    path = str(CASES / "trl_prompt_completion.jsonl")
    prompts = case("trl_prompt_completion.jsonl", tiny)
    texts = data.completions_of(path, None, "completion")
    assert all(texts[each.text][0].startswith(("Janet", "It", "The", "He")) for each in prompts)


def test_the_field_of_the_first_row_is_said_and_later_rows_must_have_it(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"question": "1"}, {"question": "2"}, {"problem": "3"})
    with pytest.raises(console.RunError, match=r"p.jsonl: row 3: expected a field 'question'"):
        load(path, arguments())
    assert "--prompt-field question, as in the first row" in capsys.readouterr().out
    path = write(tmp_path / "q.jsonl", {"text": "1"})
    with pytest.raises(console.RunError, match=r"row 1: .*prompt.*messages.*\['text'\]"):
        load(path, arguments())


def test_empty_cells_and_dates_of_a_table(tmp_path):
    """NaN is no right answer, and a date as an answer can be logged."""
    pandas = pytest.importorskip("pandas", reason="extra: data")
    frame = pandas.DataFrame({"prompt": ["1", "2"], "answer": [3.0, float("nan")]})
    frame["day"] = pandas.Timestamp("2026-01-02")
    frame.to_parquet(tmp_path / "t.parquet")
    found = load(str(tmp_path / "t.parquet"), arguments())
    assert [each.answer for each in found] == [3.0, None]
    dated = load(str(tmp_path / "t.parquet"), arguments("--answer-field", "day"))
    with pytest.raises(TypeError, match="got datetime"):
        verdicts.right_answers(dated[0].answer)


# ----------------------------------------------------------------------------------- the formats
ROWS = [{"prompt": '1,2\n"3"', "answer": "079"}, {"prompt": "2", "answer": "NA"}]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_cells_are_text(tmp_path, delimiter):
    """A reader that guesses types turns 079 into 79, and NA into nothing."""
    text = f'prompt{delimiter}answer\r\n"1,2\n""3"""{delimiter}079\r\n\r\n2{delimiter}NA\r\n'
    path = tmp_path / ("p.csv" if delimiter == "," else "p.tsv")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert data.read_rows(str(path), 0) == ROWS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", "prompt;answer\n1, or 2;3\n"),
        ("tabs.csv", "prompt\tanswer\n1, or 2\t3\n"),
        ("blanks.csv", 'prompt, answer\n"1, or 2", "3"\n'),
        ("loud.CSV", 'prompt,answer\n"1, or 2",3\n'),
        ("loud.JSONL", '{"prompt": "1, or 2", "answer": "3"}\n'),
        ("dos.jsonl", '\ufeff{"prompt": "1, or 2", "answer": "3"}\r\n\r\n'),
        ("dos.csv", '\ufeff\r\nprompt,answer\r\n"1, or 2",3\r\n'),
    ],
)
def test_files_of_other_programs(tmp_path, name, text):
    """Of spreadsheets and of Windows: the rows are those that their writers meant."""
    (tmp_path / name).write_bytes(text.encode())
    assert data.read_rows(str(tmp_path / name), 0) == [{"prompt": "1, or 2", "answer": "3"}]
    (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(text.encode()))
    assert len(data.read_rows(str(tmp_path / f"{name}.GZ"), 0)) == 1


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "prompt,answer\n1,2,3\n", "a.csv:2: expected 2 cells"),
        ("a.jsonl", '{"prompt": "1"},\n{"prompt": "2"}\n', "a.jsonl:1:"),
        ("a.jsonl", '{"prompt": "1"},\n{"prompt": "2"}\n', "a comma behind the object"),
        ("a.jsonl", '[\n{"prompt": "1"}\n]', "got an array: name it .json"),
        ("a.csv", 'prompt,answer\n"1,2\n', "a.csv:2:"),
        ("a.csv", "x,x\n1,2\n", "different names"),
        ("a.json", '{\n "prompt": "1"\n}\n', "one object over several lines"),
        ("a.json", '[{"prompt": "1"}, 2]', "entry 2: expected a JSON object, got 2"),
        ("a.json", '[\n{"prompt": "1"},\n{"prompt" 2}]', "a.json:3: expected an array"),
        ("a.jsonl", '[{"prompt": "1"}]', "expected a JSON object"),
        ("a.txt", "1", "expected a .jsonl, .json, .csv"),
        ("a.parquet", "no", "expected a .parquet file"),
        ("a.arrow", "no", "expected a .arrow file"),
        ("a.jsonl.gz", "no", "expected a whole .gz file"),
        ("a.jsonl.zst", "no", "expected a whole .zst file"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, why):
    if name.endswith(("parquet", "arrow", "zst")):
        pytest.importorskip("datasets", reason="extra: data")
    (tmp_path / name).write_text(text)
    with pytest.raises(console.RunError) as caught:
        data.read_rows(str(tmp_path / name), 0)
    assert why in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["ok.jsonl", "ok.csv", "array.json", "ok.parquet", "ok.arrow"])
def test_every_form_may_be_packed(name, tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="extra: data")
    rows, content = data.read_rows(str(CASES / name), 0), (CASES / name).read_bytes()
    half = len(content) // 2
    frames = [zstandard.compress(content[:half]), zstandard.compress(content[half:])]
    packed = {".gz": gzip.compress(content), ".zst": b"".join(frames)}
    for ending, each in packed.items():
        path = tmp_path / (name + ending)
        path.write_bytes(each)
        assert data.read_rows(str(path), 0) == rows
        path.write_bytes(each[:-9])  # a copy that broke off
        with pytest.raises(console.RunError, match="expected a whole"):
            data.read_rows(str(path), 0)


def test_a_folder_with_several_splits(tmp_path):
    pytest.importorskip("datasets", reason="extra: data")
    for split, name in (("train", "ok.jsonl"), ("test", "ints.jsonl")):
        shutil.copy(CASES / name, tmp_path / f"{split}.jsonl")
    folder = str(tmp_path)
    assert len({len(data.read_rows(folder, 0, split)) for split in ("train", "test")}) == 1
    assert data.read_rows(folder, 0)[0]["answer"] == "18"
    assert data.read_rows(folder, 0, "test") == data.read_rows(f"{folder}:test", 0)
    (tmp_path / "train.jsonl").unlink()  # one split is the one, unless another is named
    assert data.read_rows(f"{folder}/", 0)[0]["answer"] == 18
    shutil.copy(CASES / "ok.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(console.RunError, match=r"no split 'dev': it has \['test', 'train'\]"):
        data.read_rows(f"{folder}:dev", 0)


@pytest.mark.parametrize(
    ("spec", "names", "split"),
    [
        ("a/b", ("a/b",), "train"),
        ("a/b:test", ("a/b",), "test"),
        ("a/b:main:test", ("a/b", "main"), "test"),
        ("a/b:main:train[:100]", ("a/b", "main"), "train[:100]"),
        ("a/b:train[10:20]", ("a/b",), "train[10:20]"),
    ],
)
def test_hub_names(spec, names, split, monkeypatch):
    class Hub:
        disable_progress_bars = staticmethod(lambda: None)

        @staticmethod
        def load_dataset(*given, split):
            return [{"given": given, "split": split}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert data.read_rows(spec, 0) == [{"given": names, "split": split}]


@pytest.mark.parametrize("spec", ["ok.parquet", "saved_to_disk", "some/name"])
def test_a_missing_package_is_one_line(spec, monkeypatch):
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    spec = spec if "/" in spec else str(CASES / spec)
    with pytest.raises(console.RunError, match=r"needs datasets: pip install datasets$"):
        data.read_rows(spec, 0)


# --------------------------------------------------------------------------- fields and templates
def test_dotted_paths():
    row = {"a": {"b": [{"c": 1}, 2]}, "x.y": 3, "n": None}
    paths = ("a.b.0.c", "a.b.1", "a.b.-1", "a.b.2", "a.b.-3", "x.y", "n", "a.z")
    values = [1, 2, 2, None, None, 3, None, None]
    assert [data.value_of(row, path) for path in paths] == values


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"{question}\nPut it within \boxed{}.", "Q {a}\nPut it within \\boxed{}."),
        (r"\frac{1}{2} {{question}} {a.b}", r"\frac{1}{2} {question} 7"),
        ("{prompt}!", "user!"),
        ("{list}|{none}|{two words}|{ }", '["é"]||2|{ }'),
    ],
)
def test_templates(template, text):
    row = {"question": "Q {a}", "a": {"b": 7}, "list": ["é"], "none": None, "two words": 2}
    assert data.fill(template, row, "user") == text


def test_templates_that_no_field_fits(tmp_path):
    with pytest.raises(
        console.RunError, match=r"no field 'answr'.*{{answr}} is a literal"
    ) as caught:
        data.fill("{answr}", {"answer": "1"})
    assert caught.value.code == 2
    (tmp_path / "t.txt").write_text("{question}\n\\neq\n")
    assert data.fill(f"@{tmp_path}/t.txt", {"question": "1"}) == "1\n\\neq"
    with pytest.raises(console.RunError, match="cannot be read"):
        data.fill(f"@{tmp_path}/none.txt", {})


def test_system_and_template_make_the_prompt(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", {"instruction": "add", "input": "1+1"})
    how = ["--system", "be brief", "--prompt-template", "{instruction} {input}="]
    (prompt,) = load(path, arguments(*how))
    assert prompt.ids == tuple(tinylm.tokenizer().encode("<user>be brief<user>add 1+1=<bot>"))
    assert prompt.text == "add 1+1="
    path = write(tmp_path / "q.jsonl", {"prompt": [{"role": "user", "content": "1"}], "k": 2})
    (prompt,) = load(path, arguments("--prompt-template", "{prompt}+{k}"))
    assert prompt.text == "1+2"
    with pytest.raises(console.RunError, match="need a chat template"):
        load(path, arguments("--system", "a", "--no-chat-template"))
    path = write(tmp_path / "r.jsonl", {"prompt": [{"role": "system", "content": "1"},
                                                   {"role": "user", "content": "1"}]})  # fmt: skip
    with pytest.raises(console.RunError, match="row 1: the row has a system message"):
        load(path, arguments("--system", "a"))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "1"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"from": "nobody", "value": "1"}],
        [{"from": "human", "text": "1"}],
        [{"role": "user", "content": None, "name": "a"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": "1"}, {"role": "user", "content": " "}],
        "   ",
        [{"content": "1"}],
        ["1"],
        {"role": "user", "content": "1"},
    ],
)
def test_messages_that_are_refused(messages, tmp_path):
    path = write(tmp_path / "p.jsonl", {"messages": messages})
    with pytest.raises(console.RunError, match=r"p.jsonl: row 1: expected"):
        load(path, arguments())


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"text": "2"}]}],
        [{"role": "user", "content": ["1+", "2"]}],
        [{"role": "User", "content": "1+2"}, {"role": "Assistant", "content": "3"}],
        [{"role": "human", "content": "1+2"}, {"role": "gpt", "content": "3"}],
        [{"from": "Human", "content": "1+2"}, {"from": "bing", "content": "3"}],
        [{"role": "user", "value": "1+2", "weight": None}],
        json.dumps([{"role": "user", "content": "1+2"}]),
        str([{"from": "human", "value": "1+2"}, {"from": "gpt", "value": "it's 3"}]),
        "[{'role': 'user', 'content': '1+2'}\n {'role': 'assistant', 'content': '}\\n{'}]",
    ],
)
def test_messages_as_people_write_them(messages, tmp_path):
    path = write(tmp_path / "p.jsonl", {"messages": messages})
    (prompt,) = load(path, arguments())
    assert prompt.messages == [{"role": "user", "content": "1+2"}]


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[{1: 2", "[1+1]", '[{"role": "user"}]'])
def test_text_that_only_looks_like_messages_stays_text(text, tmp_path):
    (row,) = data.load(
        data.Source(write(tmp_path / "p.jsonl", {"prompt": text}), 0, None, ""), data.messages_of
    )
    assert row == [{"role": "user", "content": text}]


@pytest.mark.parametrize("spelt", [lambda x: x, json.dumps, lambda x: [json.dumps(x[0])]])
def test_tools_reach_the_template_however_they_are_spelt(spelt, tmp_path):
    tools = [{"type": "function", "function": {"name": "calc"}}]
    path = write(tmp_path / "p.jsonl", {"prompt": "1", "tools": spelt(tools)})
    assert data.load(data.Source(path, 0, None, ""), lambda row, _: row["tools"]) == [tools]


@pytest.mark.parametrize("tools", ["calc", {"name": "calc"}, [1], ["calc"]])
def test_tools_that_are_refused(tools, tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1", "tools": tools})
    with pytest.raises(console.RunError, match=r"row 1: expected a list of objects in .*'tools'"):
        load(path, arguments())


def test_a_template_that_shows_the_right_answer_is_said(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1", "answer": "2"})
    load(path, arguments("--prompt-template", "{prompt}=\\boxed{answer}"))
    assert "{answer} puts the right answer into the prompt" in capsys.readouterr().out
    load(path, arguments("--prompt-template", "{prompt}=\\boxed{{answer}}"))
    assert "right answer" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------- several tests
def test_test_sets_by_name():
    how = ["--test-prompts", "a=x.jsonl", "--test-prompts", "y=z/b.jsonl:test[:5]"]
    args = arguments(*how, "--test-prompt-field", "a=problem", "--test-answer-field", "y=gold")
    assert data.test_sets(args) == {"a": "x.jsonl", "y": "z/b.jsonl:test[:5]"}
    fields = [data.source_of("s", 0, args, test) for test in (None, "a", "y")]
    assert [each.prompt_field for each in fields] == [None, "problem", None]
    assert [each.answer_field for each in fields] == ["answer", "answer", "gold"]
    assert [each.split for each in fields] == ["train", "test", "test"]
    assert data.test_sets(arguments("--test-prompts", "dir/a=b.jsonl")) == {"": "dir/a=b.jsonl"}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--test-prompts", "a=1", "--test-prompts", "a=2"], "given twice for a"),
        (["--test-prompts", "1", "--test-prompts", "2"], "given twice for the unnamed"),
        (["--test-prompts", "1", "--test-answer-field", "b=2"], "no --test-prompts b="),
        (["--prompts", "1", "--eval-only"], "--eval-only: needs --test-prompts"),
        (["--prompts", "1", "--eval-teacher"], "--eval-teacher: needs --test-prompts"),
    ],
)
def test_test_sets_that_are_refused(flags, why):
    with pytest.raises(console.RunError, match=why) as caught:
        data.test_sets(arguments(*flags))
    assert caught.value.code == 2


def test_no_test_prompts_is_said(capsys):
    assert data.test_sets(arguments("--prompts", "mine.jsonl")) == {}
    assert "nothing is evaluated" in capsys.readouterr().out


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


# ----------------------------------------------------- what tables, folders and templates leave out
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_a_column_of_mixed_types_is_what_it_was_before_the_table(tmp_path):
    """datasets spells it as JSON and says so in the file's metadata."""
    datasets = pytest.importorskip("datasets", reason="extra: data")
    rows = [{"prompt": "a", "answer": "Paris"}, {"prompt": "b", "answer": ["7", "8"]}]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/train.jsonl", *rows)
    made = datasets.load_dataset(str(tmp_path / "in"), split="train")
    made.to_parquet(str(tmp_path / "p.parquet"))
    made.save_to_disk(str(tmp_path / "disk"))
    for place in ("in", "p.parquet", "disk", "disk/data-00000-of-00001.arrow"):
        assert data.read_rows(str(tmp_path / place), 0) == rows


def test_objects_of_a_table_have_no_keys_of_other_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="extra: data")
    parquet = pytest.importorskip("pyarrow.parquet", reason="extra: data")
    rows = [{"prompt": "a", "tools": [{"x": 1}], "b": None}, {"prompt": "b", "tools": [{"y": 2}]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (one, two) = data.read_rows(str(tmp_path / "t.parquet"), 0)
    assert one == rows[0] and two["tools"] == [{"y": 2}]


def test_a_file_in_a_folder_is_read_as_by_itself(tmp_path):
    pytest.importorskip("datasets", reason="extra: data")
    (tmp_path / "train.csv").write_text("prompt,answer\nsay,079\nhow,None\n1,NA\n")
    assert data.read_rows(str(tmp_path), 0) == data.read_rows(str(tmp_path / "train.csv"), 0)
    (tmp_path / "train.csv").unlink()
    row = {"prompt": "1", "answer": "2024-01-15", "tools": [{"default": None}]}
    write(tmp_path / "train.jsonl", row)
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as packed:
        packed.write('{"prompt": "2", "answer": 80}\n')
    assert data.read_rows(str(tmp_path), 0) == [row]
    assert data.read_rows(f"{tmp_path}:test", 0) == [{"prompt": "2", "answer": 80}]


@pytest.mark.parametrize("call", [CALL, CALL["function"]])
def test_arguments_of_a_call_are_an_object(call):
    told = data.message({"role": "assistant", "content": None, "tool_calls": [call, "?"]})
    found = told["tool_calls"][0]
    assert found.get("function", found)["arguments"] == {"a": 1} and told["tool_calls"][1] == "?"


@pytest.mark.parametrize(("flag", "row"), [("", {"prompt": "1"}), ("{context}", {"context": " "})])
def test_a_template_that_makes_nothing_is_refused(flag, row, tmp_path):
    path = write(tmp_path / "p.jsonl", row)
    with pytest.raises(console.RunError, match="row 1: expected text from the template"):
        load(path, arguments(f"--prompt-template={flag}"))


def test_prompts_without_a_token_are_refused(tmp_path):
    tokenizer = tinylm.tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(console.RunError, match="1 of 1 prompts have no tokens"):
        load(write(tmp_path / "p.jsonl", {"prompt": "1"}), arguments(), tokenizer)


SHOWN = (
    "{% for t in tools or [] %}t{{ t['a'] }}{% endfor %}{% for m in messages %}{{ m['role'][0] }}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}c{{ c['a'] }}{% endfor %}{% endfor %}"
)
TEMPLATE_OF_USERS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
LEAVES_OUT = {
    "tools": {"prompt": "1", "tools": [{"a": 1}]},
    "calls of tools": {"messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "x", "tool_calls": [{"a": 1}]},
        {"role": "user", "content": "2"},
    ]},
    "a system message": {"messages": [
        {"role": "system", "content": "no"}, {"role": "user", "content": "1"},
    ]},
}  # fmt: skip


@pytest.mark.parametrize("what", LEAVES_OUT)
def test_what_the_template_leaves_out_is_said(what, tmp_path, capsys):
    tokenizer = tinylm.tokenizer()
    path = write(tmp_path / "p.jsonl", LEAVES_OUT[what], LEAVES_OUT[what])
    said = f"2 prompts have {what}, which the chat template leaves out"
    for template, is_said in ((SHOWN, False), (TEMPLATE_OF_USERS, True)):
        tokenizer.chat_template = template
        load(path, arguments(), tokenizer)
        assert (said in capsys.readouterr().out) == is_said
        if what != "a system message":
            load(path, arguments("--system", "say"), tokenizer)
            printed = capsys.readouterr().out
            assert (said in printed) == is_said and "a system message" not in printed


def test_a_system_text_beside_messages_stands_before_them(tmp_path):
    turns = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    path = write(tmp_path / "p.jsonl", {"system": "say", "conversations": turns})
    (prompt,) = load(path, arguments())
    assert [each["role"] for each in prompt.messages] == ["system", "user"]
    (prompt,) = load(write(tmp_path / "q.jsonl", {"system": "say", "prompt": "1"}), arguments())
    assert [each["role"] for each in prompt.messages] == ["user"]
    spelt = {"system": "say", "conversations": json.dumps(turns)}
    (prompt,) = load(write(tmp_path / "r.jsonl", spelt), arguments())
    assert [each["role"] for each in prompt.messages] == ["system", "user"]
    with pytest.raises(console.RunError, match="addresses are not read"):
        data.read_rows("https://host/p.jsonl", 0)
