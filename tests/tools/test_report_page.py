"""`tools/report.py` and `tools/compare_runs.py`: numbers of the run, hostile text, bad folders."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import compare_runs  # noqa: E402
import report  # noqa: E402

from opd_run import console  # noqa: E402

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> \"'`&amp;"
    " \u2028\u2029 <!-- {{data}} ${x} \ud800 \u202e"
)


def tokens_row(step: int, phase: str, row: int, num: int, text: str = "a") -> dict:
    """`num` tokens that are all alike but for their log-ratio."""
    return {
        "step": step, "phase": phase, "row": row, "prompt": f"{text} {row}", "answer": text,
        "domain": "", "completion": text * num, "verdict": (-1.0, 1.0)[row % 2], "ended": True,
        "source": "student", "num_tokens": num, "ids": [7] * num,
        "student_logp": [round(-0.5 - 0.001 * i, 4) for i in range(num)],
        "teacher_logp": [-1.0] * (num - 1) + ["-inf"], "trained": [1] * num,
        "num_prefix_tokens": 0, "logged": {"gate": [1.8] * num},
        "support_ids": [[7, 8, 9, 10, 11]] * num,
        "support_student_logp": [[-0.5, -1.0, -2.0, -3.0, -4.0]] * num,
        "support_teacher_logp": [[-0.4, -1.1, -2.1, -3.1, -4.1]] * num,
        "pieces": {str(i): text for i in (7, 8, 9, 10, 11)},
    }  # fmt: skip


def write_run(folder: Path, seed: int, lr: float = 1e-3, text: str = "a", num: int = 5) -> Path:
    """A run folder of three steps, as `opd_run.run.Run` leaves it; values depend on the seed."""
    folder.mkdir(parents=True)
    args = {"seed": seed, "lr": lr, "run_dir": str(folder), "student": text, "teacher": [text]}
    environment = {"commit": "0123456789abcdef", "dirty": False, "torch": "2", "device": text}
    (folder / "args.json").write_text(json.dumps({"args": args, "environment": environment}))
    (folder / "opd.py").write_text("the method")
    rows = []
    for step in range(4):
        if step in (0, 3):
            score = round(0.4 + 0.1 * step + 0.01 * seed, 4)
            rows.append({"step": step, "eval/student/avg@8": score, "eval/student/reverse_kl": 0.2})
        if step == 0:
            rows.append({"step": 0, "eval/teacher/avg@8": 0.9})
        if step:
            rows.append({
                "step": step, "loss": -0.1, "grad_norm": 2.5 * step,
                "reverse_kl": 0.3 / step + seed,
                "num_rollouts": 4.0, "length_mean": 10.0, "generate_s": 1.5, "student_s": 0.5,
                "step_s": 2.0, "tokens_per_s": 20.0, "peak_memory_mib": 100.0, "bad_step": 0.0,
                "verifier_pass_rate": "nan",
            })  # fmt: skip
    rows[-2]["alarm/" + text] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = [tokens_row(step, "eval", row, num, text) for step in (0, 3) for row in (0, 1)]
    tokens += [tokens_row(step, "train", 0, num, text) for step in (1, 2, 3)]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tokens))
    evaluated = [
        {"step": step, "model": "student", "test": "", "row": row, "prompt": f"{text} {row}",
         "answer": text, "domain": "", "verdicts": verdicts, "lengths": [num, num + 40 * step],
         "completion_end": f"{text} at {step}"}
        for step, ends in ((0, VERDICTS[0]), (3, VERDICTS[1])) for row, verdicts in enumerate(ends)
    ]  # fmt: skip
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
    return folder


VERDICTS = (
    [[-1, -1], [1, 1], [1, -1], [-1, -1], [-1, 1], [0, 0]],
    [[1, 1], [-1, -1], [1, 1], [-1, 0], [1, 0], [1, 1]],
)
"""Of six prompts, before and after: won, lost, right in both, wrong in both, right, unknown."""


class Page(HTMLParser):
    """Elements, attributes, table cells and scripts of a page; strict about nesting."""

    VOID = ("meta", "br", "img", "input", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def text_of(*folders: Path, **how: int) -> str:
    return report.render(compare_runs.group([compare_runs.load(f) for f in folders]), **how)


def page_of(*folders: Path, **how: int) -> Page:
    return Page(text_of(*folders, **how))


@pytest.fixture
def seeds(tmp_path):
    return [write_run(tmp_path / f"seed{seed}", seed) for seed in (0, 1)]


# ----------------------------------------------------------------------------------- the report
def test_hostile_text_of_models_and_flags_stays_text(tmp_path):
    plain = page_of(write_run(tmp_path / "plain", 0))
    hostile = page_of(write_run(tmp_path / "hostile<b>", 0, text=HOSTILE))
    assert hostile.tags == plain.tags
    assert len(hostile.scripts) == 2 and hostile.scripts[1] == plain.scripts[1]
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    whole = HOSTILE.replace("\ud800", "\ufffd")  # nothing but the half character was lost
    assert whole in hostile.data["rollouts"][0]["prompt"]
    assert set(hostile.data["runs"][0]["pieces"].values()) == {whole}
    assert hostile.data["runs"][0]["alarms"][0]["name"] == whole
    assert set("<>&\u2028\u2029").isdisjoint(hostile.scripts[0])
    assert "document.title='taken'" in "".join(hostile.text)  # as text, in the table


def test_the_page_fetches_nothing(seeds):
    page = page_of(*seeds)
    assert {"link", "img", "iframe", "object", "base", "form"}.isdisjoint(page.tags)
    assert {"src", "href", "action", "srcset", "data"}.isdisjoint(dict(page.attributes))
    text = text_of(*seeds)
    rest = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not any(word in rest for word in ("http:", "https:", "url(", "@import", "fetch("))
    policy = next(value for name, value in page.attributes if name == "content" and "src" in value)
    assert policy.startswith("default-src 'none'")


def test_curves_and_tables_are_the_runs_numbers(seeds):
    page = page_of(*seeds)
    data = page.data
    assert data["groups"] == [{"name": "opd", "runs": [0, 1]}]
    run = data["runs"][1]
    assert run["train"]["steps"] == [1, 2, 3] and run["eval"]["steps"] == [0, 0, 3]
    assert run["train"]["columns"]["grad_norm"] == [2.5, 5.0, 7.5]
    assert run["train"]["columns"]["verifier_pass_rate"] == ["nan"] * 3
    assert run["eval"]["columns"]["eval/student/avg@8"] == [0.41, None, 0.71]
    assert [alarm["step"] for alarm in run["alarms"]] == [3]
    assert data["learning"][:2] == ["eval/student/avg@8", "eval/student/reverse_kl"]
    text = " ".join(page.text).replace("\u00a0", " ")
    mean, deviation = statistics.fmean([0.7, 0.71]), statistics.stdev([0.7, 0.71])
    assert f"{mean:.4f} ± {deviation:.4f}" in text and "0.7100" in text
    assert "4.5 s (75%)" in text and "6.0 s" in text  # generate, of three steps; all


def test_runs_with_other_numbers_of_samples_share_a_curve(tmp_path):
    """avg@8 and avg@4 are estimates of one number; in the table, evaluations come before counts."""
    folders = [write_run(tmp_path / name, 0) for name in ("a", "b")]
    metrics = folders[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("avg@8", "avg@4"))
    data = page_of(*folders).data
    joint = "eval/student/avg@n"
    assert data["learning"][:2] == [joint, "eval/student/reverse_kl"]
    assert data["scores"] == [joint] and data["hints"][joint] == "n differs: 8, 4"
    curves = [run["eval"]["columns"] for run in data["runs"]]
    assert curves[0][joint] == curves[0]["eval/student/avg@8"] == [0.4, None, 0.7]
    assert curves[1][joint] == curves[1]["eval/student/avg@4"]
    keys = compare_runs.columns(compare_runs.group([compare_runs.load(f) for f in folders]))
    assert keys.index("avg@4 after") < keys.index("steps")
    assert joint not in page_of(folders[0]).data["keys"]


def test_rollouts_are_the_rows_of_the_file(seeds):
    shown = page_of(seeds[0]).data["rollouts"]
    rows = compare_runs.read_jsonl(seeds[0] / "tokens.jsonl")
    assert len(shown) == len(rows) == 7
    found = {(each["phase"], each["step"], each["row"]): each for each in shown}
    for row in rows:
        each = found[row["phase"], row["step"], f"/{row['row']}"]
        assert each["student"] == row["student_logp"] and each["teacher"] == row["teacher_logp"]
        assert each["ids"] == row["ids"] and each["logged"] == row["logged"]
        assert each["support_teacher"][:5] == row["support_teacher_logp"][0]


def test_the_page_has_what_the_teacher_reads_where_that_is_another_prompt():
    row = tokens_row(1, "train", 0, 3)
    assert "teacher_prompt" not in report.rollout_data(row, 0)
    told = report.rollout_data(row | {"teacher_prompt": "<user> the solution"}, 0)
    assert told["teacher_prompt"] == "<user> the solution" and told["prompt"] == row["prompt"]


def test_pairs_come_first_and_the_rest_is_spread_and_counted(tmp_path):
    rows = [tokens_row(step, "eval", row, 10) for step in (0, 5, 10) for row in range(2)]
    rows += [tokens_row(step, "train", 0, 10) for step in range(1, 11)]
    kept, left_out = report.chosen_rollouts(rows, 60)
    assert [(row["phase"], row["step"]) for row in kept] == [
        ("eval", 0), ("eval", 0), ("eval", 10), ("eval", 10), ("train", 1), ("train", 9),
    ]  # fmt: skip
    assert left_out == len(rows) - 6
    again = tokens_row(1, "train", 0, 3)  # a resumed run wrote the step again
    kept, left_out = report.chosen_rollouts([*rows, again], 10**6)
    assert left_out == 0 and [r for r in kept if (r["phase"], r["step"]) == ("train", 1)] == [again]
    assert len(report.chosen_rollouts(rows[:1], 1)[0]) == 1  # one is shown whatever its length


def test_a_rollout_of_5000_tokens_stays_small(tmp_path):
    folder = write_run(tmp_path / "long", 0, num=5000)
    page = text_of(folder, max_tokens=10000)
    lengths = [len(each["ids"]) for each in Page(page).data["rollouts"]]
    assert lengths == [5000, 5000]
    assert len(page) < 1_500_000


def test_many_steps_are_thinned_and_keep_their_end():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 100_001)]
    table = report.table_of(rows)
    assert len(table["steps"]) <= report.MOST_POINTS + 1
    assert table["steps"][0] == 1 and table["steps"][-1] == 100_000
    assert table["columns"]["loss"] == [float(step) for step in table["steps"]]


# ------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("tool", [report, compare_runs])
def test_a_folder_that_is_no_run_costs_one_line(tmp_path, capsys, tool):
    empty, started = tmp_path / "empty", write_run(tmp_path / "started", 0)
    empty.mkdir()
    (started / "metrics.jsonl").write_text("")
    broken = write_run(tmp_path / "broken", 0)
    (broken / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    cases = [
        (tmp_path / "missing", "no such folder"),
        (empty, "no args.json"),
        (started, "nothing has been logged"),
        (broken, "line 2"),
    ]
    for folder, words in cases:
        out = ["--out", str(tmp_path / "out.html")] if tool is report else []
        with pytest.raises(SystemExit) as stop:
            tool.main([str(folder), *out])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.startswith("usage: ") and words in said and str(folder) in said
    assert not (tmp_path / "out.html").exists()


def test_what_cannot_be_written_is_said(seeds, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(seeds[0]), "--out", "/nowhere/report.html"])
    assert stop.value.code == 2 and "--out /nowhere/report.html" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_short_is_left_out(seeds):
    with (seeds[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert compare_runs.load(seeds[0]).metrics[-1]["step"] == 3


def test_runs_without_tokens_have_a_page(seeds, tmp_path, capsys):
    (seeds[0] / "tokens.jsonl").unlink()
    report.main([str(seeds[0]), "--out", str(tmp_path / "page.html")])
    assert "page.html" in capsys.readouterr().out
    assert Page((tmp_path / "page.html").read_text()).data["rollouts"] == []


# ---------------------------------------------------------------------------------- the comparison
def test_runs_that_differ_in_the_seed_alone_are_one_group(seeds, tmp_path):
    other = write_run(tmp_path / "lr", 0, lr=5e-4)
    groups = compare_runs.group([compare_runs.load(each) for each in [*seeds, other]])
    assert [(each.name, [run.seed for run in each.runs]) for each in groups] == [
        ("opd", [0, 1]),
        ("lr", [0]),
    ]
    assert compare_runs.differences(groups) == [["--lr", "0.001", "0.0005"]]
    loaded = compare_runs.load_all([*seeds, other], ["base", "base", "lower"])
    assert [each.name for each in compare_runs.group(loaded)] == ["base", "lower"]
    with pytest.raises(compare_runs.console.RunError, match="3 runs, 1 labels"):
        compare_runs.load_all([*seeds, other], ["base"])
    (tmp_path / "lr/opd.py").write_text("a fork")
    groups = compare_runs.group([compare_runs.load(each) for each in [seeds[0], other]])
    assert len(groups) == 2
    script_only = write_run(tmp_path / "fork", 0)
    (script_only / "opd.py").write_text("a fork")
    groups = compare_runs.group([compare_runs.load(each) for each in [seeds[0], script_only]])
    assert [each.name for each in groups] == ["seed0", "fork"]


def test_names_stay_short_and_tell_runs_apart(tmp_path, capsys):
    """Two runs that differ in 18 flags: no name lists them, no column is wider than 28."""
    one, two = write_run(tmp_path / "a/run", 0), write_run(tmp_path / "b/run", 0)
    for folder, value in ((one, 1), (two, 2)):
        record = json.loads((folder / "args.json").read_text())
        record["args"] |= {f"flag_{place}": f"{value} " * 40 for place in range(18)}
        record["argv"] = ["methods/opd.py", "--prompt-template", "{a} b"]
        (folder / "args.json").write_text(json.dumps(record))
    groups = compare_runs.group([compare_runs.load(each) for each in (one, two)])
    assert [each.name for each in groups] == ["a/run", "b/run"]
    assert [row[0] for row in compare_runs.differences(groups)] == [
        f"--flag-{i}" for i in range(18)
    ]
    compare_runs.main([str(one), str(two)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 100 and any(line.startswith("--flag-17") for line in lines)
    page = page_of(one, two)
    text = " ".join(page.text)
    assert "OPD report: a/run, b/run" in text and "--flag-17" in text
    assert "python methods/opd.py --prompt-template '{a} b'" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.1235"),
        (-0.5, "-0.5000"),
        (1.23456, "1.235"),
        (123.456, "123.5"),
        (5e4, "50,000"),
    ],
)
def test_numbers_have_four_digits(value, shown):
    assert compare_runs.show(value) == shown


def test_intervals_and_what_was_spent():
    """Wilson's interval by hand: 30 of 40 prompts; samples of a prompt count as one."""
    row = {"num_rollouts": 160.0, "gsm/num_rollouts": 160.0}
    assert report.interval(0.75, "avg@4", row) == "\u00a0[0.60,\u00a00.86]"
    assert report.interval(0.75, "gsm/avg@4", row) == "\u00a0[0.60,\u00a00.86]"
    assert report.interval(0.75, "avg@4/add", row) == report.interval(0.75, "pass@4", row) == ""


def cells_of(part: str) -> list[list[str]]:
    """The rows of the tables of a part of the page."""
    rows = re.findall("<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_prompts_that_were_won_and_lost(tmp_path):
    run = write_run(tmp_path / "run", 0, text="<i>")
    part = report.won_part(compare_runs.group([compare_runs.load(run)]))
    head, counts, texts, *changed = cells_of(part)
    assert head == ["", "won", "lost", "right in both", "wrong in both"]
    assert counts == ["run", "1", "1", "2", "1"]  # one is unknown
    assert texts[0] == "right" and [row[:2] for row in changed] == [
        ["0/2 → 2/2", "&lt;i&gt; 0"],
        ["1/2 → 1/1", "&lt;i&gt; 4"],  # one sample has no verdict any more
        ["1/2 → 2/2", "&lt;i&gt; 2"],
        ["2/2 → 0/2", "&lt;i&gt; 1"],
    ]
    assert changed[0][2:] == ["&lt;i&gt;", "&lt;i&gt; at 0", "&lt;i&gt; at 3"]
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").open()]
    rows = [row for row in rows if row["step"] == 0]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.won_part(compare_runs.group([compare_runs.load(run)])) == ""  # nothing after
    (run / "evaluations.jsonl").write_text('{"step": 0, "model": "student"}\n')
    with pytest.raises(console.RunError, match=r"evaluations\.jsonl: a row without 'test'"):
        report.tested(compare_runs.load(run))


def test_lengths_are_shares_of_equal_bins(tmp_path):
    """10 or 10 tokens before, 10 or 130 after: 121 values, 18 bins of 7."""
    runs = [write_run(tmp_path / name, 0, num=10) for name in ("run", "older")]
    (runs[1] / "evaluations.jsonl").unlink()
    found = report.histograms([report.tested(compare_runs.load(run)) for run in runs])
    assert found["width"] == 7 and found["middles"][:2] == [13.0, 20.0]
    (before, after), older = found["shares"]
    assert before == [1.0] + [0.0] * 17 and after == [0.5] + [0.0] * 16 + [0.5]
    assert older == [[0.0] * 18] * 2
    assert report.histograms([[]]) == {}


def test_several_test_sets_have_their_rows_in_the_summary_and_their_rollouts(tmp_path):
    run = write_run(tmp_path / "run", 0)
    more = {"eval/student/gsm/avg@8": 0.25, "eval/student/gsm/length_mean": 7.0}
    with (run / "metrics.jsonl").open("a") as file:  # each test set has a row of its own
        for step in (0, 3):
            file.write(json.dumps({"step": step} | more) + "\n")
    with (run / "tokens.jsonl").open("a") as file:
        for step in (0, 3):
            file.write(json.dumps(tokens_row(step, "eval", 0, 5) | {"test": "gsm"}) + "\n")
    with (run / "evaluations.jsonl").open("a") as file:
        row = {"model": "student", "test": "gsm", "row": 0, "prompt": "", "answer": ""}
        row |= {"lengths": [1], "completion_end": ""}
        for step, verdicts in ((0, [1]), (3, [-1])):
            file.write(json.dumps({"step": step, "verdicts": verdicts} | row) + "\n")
    found = compare_runs.summary(compare_runs.load(run))
    counts = cells_of(report.won_part(compare_runs.group([compare_runs.load(run)])))
    assert counts[1:3] == [["run", "", "1", "1", "2", "1"], ["run", "gsm", "0", "1", "0", "0"]]
    assert found["avg@8 before"] == 0.4 and found["avg@8 after"] == 0.7
    assert found["gsm/avg@8 before"] == found["gsm/avg@8 after"] == 0.25
    assert found["gsm/length after"] == 7.0 and found["gap closed"] == pytest.approx(0.6)
    rollouts = page_of(run).data["rollouts"]
    assert len([each for each in rollouts if each["phase"] == "eval"]) == 6
    assert {each["row"] for each in rollouts if each["phase"] == "eval"} == {"/0", "/1", "gsm/0"}


def test_evaluation_alone_has_no_before_and_after(tmp_path):
    run = write_run(tmp_path / "run", 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rows = [row for row in rows if row["step"] == 0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare_runs.summary(compare_runs.load(run))
    assert found == {"avg@8": 0.4, "avg@8 teacher": 0.9, "reverse_kl": 0.2, "steps": 0.0}


def test_what_is_copied_is_the_text_as_it_was_decoded(tmp_path):
    run = write_run(tmp_path / "run", 0)
    (first, *_) = page_of(run).data["rollouts"]
    assert "completion" not in first  # its pieces say the same
    row = tokens_row(9, "train", 0, 5) | {"completion": "\u65e5\u672c"}  # pieces of characters
    with (run / "tokens.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert page_of(run).data["rollouts"][-1]["completion"] == "\u65e5\u672c"


def test_spent_and_deciles_are_sums_and_means(tmp_path):
    run = compare_runs.load(write_run(tmp_path / "run", 0))
    assert report.spent(run) == {
        "steps": [0, 3], "tokens": [0.0, 120 / 1e6], "minutes": [0.0, 0.1],
    }  # fmt: skip
    assert report.deciles(run) == []
    for step, row in enumerate(run.training()):
        row |= {f"log_ratio_decile_{tenth}": float(step + tenth) for tenth in range(10)}
    assert report.deciles(run)[0] == [1.0 + tenth for tenth in range(10)]


def test_the_table_has_mean_and_deviation_and_the_csv_every_run(seeds, tmp_path, capsys):
    out, picture = tmp_path / "out.csv", tmp_path / "out.png"
    compare_runs.main([*map(str, seeds), "--csv", str(out), "--plot", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [each for each in lines if each.startswith("avg@8 after")]
    assert line.split()[2:] == ["0.7050", "±", f"{statistics.stdev([0.7, 0.71]):.4f}"]
    (line,) = [each for each in lines if each.startswith("gap closed")]
    assert line.split()[2] == f"{statistics.fmean([0.3 / 0.5, 0.3 / 0.49]):.4f}"
    (line,) = [each for each in lines if each.startswith("sampled tokens")]
    assert line.split()[2:] == ["120"]  # a count without spread
    rows = list(csv.DictReader(out.open()))
    assert [float(row["avg@8 after"]) for row in rows] == pytest.approx([0.7, 0.71])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_mean_is_not_taken_where_a_run_is_missing(seeds):
    rows = (seeds[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (seeds[1] / "metrics.jsonl").write_text("".join(rows[:-2]))
    (only,) = compare_runs.group([compare_runs.load(each) for each in seeds])
    assert [step for step, _ in only.curve("reverse_kl")] == [1, 2]
    assert only.curve("reverse_kl")[0][1] == pytest.approx(0.8)
    assert any("different steps" in line for line in compare_runs.warnings([only]))


def test_a_seed_that_is_there_twice_is_said(seeds, capsys):
    compare_runs.main([str(seeds[0]), str(seeds[0])])
    assert "a seed is there twice" in capsys.readouterr().out
