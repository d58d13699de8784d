"""Test sets by name, evaluation alone, and a run of a data set as people have it, end to end."""

from __future__ import annotations

import json

import opd
import pytest
import tinylm

from opd_run import files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tinylm.save_family(tmp_path_factory.mktemp("evals"))
    rows = [{"question": f"{i}+1=", "gold": {"value": f"so\n#### {i + 1}"}} for i in range(4)]
    (folder / "nested.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(folder, run: str, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher", "--run-dir": run}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-completion-tokens 6 --prompts-per-step 2 --rollouts-per-prompt 2 --device cpu"
    return [*named, *sizes.split(), "--eval-samples", "2", *more]


def sets(folder) -> list[str]:
    named = f"nested={folder}/nested.jsonl"
    return [
        "--test-prompts", str(folder / "prompts.jsonl"), "--test-prompts", named,
        "--test-prompt-field", "nested=question", "--test-answer-field", "nested=gold.value",
    ]  # fmt: skip


def test_evaluation_alone_trains_and_saves_nothing(folder, capsys):
    opd.main(flags(folder, "alone", *sets(folder), "--eval-only", "--eval-teacher"))
    said = capsys.readouterr().out
    rows = files.read_metrics(folder / "alone")
    assert {row["step"] for row in rows} == {0} and not any("loss" in row for row in rows)
    keys = {key for row in rows for key in row}
    for name in ("student", "teacher"):
        assert {f"eval/{name}/avg@2", f"eval/{name}/nested/avg@2"} <= keys
    assert "eval/student/nested/reverse_kl" in keys and "eval/student/cut_but_right_share" in keys
    assert list((folder / "alone/checkpoints").iterdir()) == []
    metrics = {key: value for row in rows for key, value in row.items()}
    by_test: dict[tuple[str, str], list[dict]] = {}
    for line in (folder / "alone/evaluations.jsonl").open():
        row = json.loads(line)
        by_test.setdefault((row["model"], row["test"]), []).append(row)
    assert sorted(by_test) == [(m, t) for m in ("student", "teacher") for t in ("", "nested")]
    for (model, test), found in by_test.items():
        prefix = f"eval/{model}/{test}/" if test else f"eval/{model}/"
        assert [row["row"] for row in found] == list(range(len(found)))
        lengths = [each for row in found for each in row["lengths"]]
        assert len(lengths) == metrics[f"{prefix}num_rollouts"]
        assert sum(lengths) / len(lengths) == pytest.approx(metrics[f"{prefix}length_mean"])
        verdicts = [each for row in found for each in row["verdicts"]]
        right = sum(each > 0 for each in verdicts) / sum(each != 0 for each in verdicts)
        assert right == pytest.approx(metrics[f"{prefix}avg@2"])
    assert by_test["student", "nested"][1]["answer"] == "so\n#### 2"
    shown = [json.loads(line) for line in (folder / "alone/tokens.jsonl").open()]
    assert {row["test"] for row in shown} == {"", "nested"}
    for row in shown:  # the first sample of a prompt
        same = by_test["student", row["test"]][row["row"]]
        assert (same["prompt"], same["answer"]) == (row["prompt"], row["answer"])
        assert same["lengths"][0] == row["num_tokens"] and same["verdicts"][0] == row["verdict"]
        assert same["completion_end"] == row["completion"]
    (line,) = [line for line in said.splitlines() if line.startswith("nested/avg@2: ")]
    assert "before" not in line and ", teacher " in line
    assert "test prompts nested: its right answer: '1'" in said
    assert "budget: each test prompt x 2 samples x at most 6 tokens\n" in said  # no steps


def test_rows_of_any_form_train(folder, capsys):
    where = ["--prompts", str(folder / "nested.jsonl"), "--answer-field", "gold.value"]
    more = ["--steps", "1", "--eval-every", "1", "--prompt-template", "{question}?"]
    opd.main(flags(folder, "trained", *where, *sets(folder)[2:4], *more,
                   "--test-answer-field", "nested=gold.value"))  # fmt: skip
    said = capsys.readouterr().out
    assert "--prompt-field question, as in the first row" in said
    assert "4 of the test prompts are training prompts" in said
    assert "nested/avg@2: before " in said and ", after " in said
    (sample, *_) = (json.loads(line) for line in (folder / "trained/samples.jsonl").open())
    assert sample["prompt"].endswith("+1=?") and sample["answer"].startswith("so\n####")


def test_the_first_row_is_shown_by_a_dry_run(folder, capsys):
    where = ["--prompts", str(folder / "nested.jsonl"), "--answer-field", "gold.value"]
    opd.main(flags(folder, "dry", *where, "--eval-every", "0", "--dry-run"))
    said = capsys.readouterr().out
    assert '"<user> 0 + 1 = <bot>"' in said
    assert "its right answer: '1'; --verifier exact calls it: bare right" in said
    assert not (folder / "dry").exists()
    with pytest.raises(SystemExit) as stop:
        opd.main(flags(folder, "dry", *where[:2], "--answer-field", "gold", "--dry-run"))
    assert stop.value.code == 1 and "got dict" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--resume"], ["--eval-every", "0"]])
def test_evaluation_alone_refuses_what_it_does_not_do(folder, more, capsys):
    with pytest.raises(SystemExit) as stop:
        opd.main(flags(folder, "refused", *sets(folder), "--eval-only", *more))
    assert stop.value.code == 2 and "--eval-only" in capsys.readouterr().err
