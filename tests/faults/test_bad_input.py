"""What is wrong costs one line that says what was expected and what came, and nothing else.

Every case runs `main(argv)` with all good flags but the changed ones. bad_input.md beside
this file has the answers as they were last written; OPD_WRITE_ANSWERS=1 writes them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import opd
import pytest
import tinylm
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(__file__).with_name("bad_input.md")


@dataclass(frozen=True)
class Case:
    """`changes` replaces flags (a list: given several times); `more` is appended as it is."""

    group: str
    name: str
    code: int
    words: tuple[str, ...]
    more: tuple[str, ...] = ()
    changes: dict[str, object] = field(default_factory=dict)
    method: str = "opd"


def flag(name: str, value: str, *words: str, method: str = "opd", code: int = 2) -> Case:
    """A flag with a value that it cannot have: the line names flag, bounds and value."""
    return Case(
        "flags", f"`{name} {value}`", code, (name, *words), (f"{name}={value}",), {}, method
    )


def file(what: str, flags: dict[str, object], *words: str, code: int = 1, method="opd") -> Case:
    return Case("files", what, code, words, (), flags, method)


def model(what: str, flags: dict[str, object], *words: str, code: int = 1, method="opd") -> Case:
    return Case("models", what, code, words, (), flags, method)


CASES = [
    # ------------------------------------------------------------------------------------ flags
    flag("--steps", "abc", "int", "'abc'"),
    flag("--steps", "1.5", "int", "'1.5'"),
    flag("--steps", "-1", "[0,inf)", "got -1"),
    flag("--seed", "-1", "[0,inf)", "got -1"),
    flag("--save-every", "-1", "[0,inf)", "got -1"),
    flag("--keep-checkpoints", "-1", "[0,inf)", "got -1"),
    flag("--lr", "fast", "float", "'fast'"),
    flag("--lr", "-1", "[0,inf)", "got -1"),
    flag("--lr", "nan", "[0,inf)", "got nan"),
    flag("--lr", "inf", "[0,inf)", "got inf"),
    flag("--lr-schedule", "sine", "'cosine'", "'sine'"),
    flag("--warmup-steps", "-1", "[0,inf)", "got -1"),
    flag("--weight-decay", "-0.1", "[0,inf)", "got -0.1"),
    flag("--adam-beta2", "1", "[0,1)", "got 1"),
    flag("--max-grad-norm", "0", "(0,inf]", "got 0"),
    flag("--updates-per-rollout", "0", "[1,inf)", "got 0"),
    flag("--importance-cap", "0.5", "[1,inf]", "got 0.5"),
    flag("--loss-temperature", "0", "(0,inf)", "got 0"),
    flag("--micro-batch-tokens", "0", "[1,inf)", "got 0"),
    flag("--max-bad-steps", "-1", "[0,inf)", "got -1"),
    flag("--prompts-per-step", "0", "[1,inf)", "got 0"),
    flag("--rollouts-per-prompt", "0", "[1,inf)", "got 0"),
    flag("--max-completion-tokens", "0", "[1,inf)", "got 0"),
    flag("--max-prompt-tokens", "0", "[1,inf)", "got 0"),
    flag("--temperature", "0", "(0,inf)", "got 0"),
    flag("--top-p", "0", "(0,1]", "got 0"),
    flag("--top-p", "1.5", "(0,1]", "got 1.5"),
    flag("--top-k", "-1", "[0,inf)", "got -1"),
    flag("--sampler-batch-size", "0", "[1,inf)", "got 0"),
    flag("--eval-every", "-1", "[0,inf)", "got -1"),
    flag("--eval-samples", "0", "[1,inf)", "got 0"),
    flag("--eval-temperature", "-1", "[0,inf)", "got -1"),
    flag("--eval-top-p", "0", "(0,1]", "got 0"),
    flag("--diagnostic-tokens", "-1", "[0,inf)", "got -1"),
    flag("--verifier-timeout-s", "0", "(0,1e6]", "got 0"),
    flag("--dtype", "fp8", "'bfloat16'", "'fp8'"),
    flag("--report-to", "email", "'tensorboard'", "'email'"),
    flag("--chat-template-from", "nobody", "'teacher'", "'nobody'"),
    flag("--chat-template-args", "[1]", "JSON object"),
    flag("--chat-template-args", "{", "JSON object"),
    flag("--device", "tpu9", "'tpu9'"),
    flag("--teacher-device", "cuda:99", "'cuda:99'"),
    Case(
        "flags", "`--teacher-offload` to where they are", 2, ("--teacher-offload", "CPU"),
        ("--teacher-offload",),
    ),
    flag("--objective", "half", "'full'", "'half'"),
    flag("--discount", "2", "[0,1]", "got 2"),
    flag("--jsd-beta", "1", "(0,1)", "got 1"),
    flag("--teacher", "other", "one is expected"),
    flag("--leraning-rate", "1", "unrecognized", "mean --lr?"),
    flag("--max_completion_tokens", "8", "mean --max-completion-tokens?"),
    flag("--max-new-tokens", "8", "mean --max-completion-tokens?"),
    flag("--temp", "1", "mean --temperature?"),
    flag("--step", "5", "unrecognized", "--steps"),
    Case("flags", "`--lr` without a value", 2, ("--lr", "expected one argument"), ("--lr",)),
    Case("flags", "a word that is no flag", 2, ("unrecognized", "train"), ("train",)),
    Case(
        "flags", "three wrong flags", 2, ("--lr", "--top-p", "--steps"),
        ("--lr=-1", "--top-p=2", "--steps=-3"),
    ),
    flag("--gate-extrapolation", "-1", "[0,inf)", "got -1", method="sg_opd"),
    flag("--teacher-share", "1.5", "[0,1]", "got 1.5", method="sg_opd"),
    flag("--reference-prompt", "x", "--gate-target reference", method="sg_opd"),
    flag("--reference", "x", "--gate-target reference", method="sg_opd"),
    Case(
        "flags", "`--verdict group` of groups of one", 2, ("--verdict group", "at least 2"),
        ("--verdict=group",), {"--rollouts-per-prompt": "1"}, "sg_opd",
    ),
    flag("--reward-scale", "0", "(0,inf)", "got 0", method="exopd"),
    flag("--teacher", "other", "NAME=", method="exopd"),
    Case(
        "flags", "two teachers of one name", 2, ("--teacher", "of its own"), (),
        {"--teacher": ["a={teacher}", "a={teacher}"]}, "exopd",
    ),
    Case(
        "flags", "a domain without a teacher", 2, ("--teacher", "['b']"), (),
        {"--teacher": ["a={teacher}"]}, "exopd",
    ),
    flag("--support-size", "0", "[1,inf)", "got 0", method="topk_opd"),
    flag("--support-size", "1", "at least 2", method="topk_opd"),
    flag("--support-size", "999", "only 46 token ids", method="topk_opd"),
    flag("--map-eos", "<end>", "FROM=TO", "'<end>'", method="topk_opd"),
    flag("--mask-special-tokens", "<think>", "no tokens", "'<think>'", method="topk_opd"),
    Case(
        "flags", "`--tail score` of a truncated law", 2, ("--tail score", "--top-p 1"),
        ("--tail=score",), {}, "topk_opd",
    ),
    Case(
        "flags", "`--tail bucket --renormalise`", 2, ("--tail bucket", "no tail"),
        ("--tail=bucket", "--renormalise"), {}, "topk_opd",
    ),
    flag("--outlier-threshold", "1", "(-inf,0)", "got 1", method="tropd"),
    flag("--guided-rollouts", "9", "at most --rollouts-per-prompt", method="tropd"),
    flag("--teacher-rollouts", "none.jsonl", "no file none.jsonl", method="tropd"),
    # ------------------------------------------------------------------------------------ files
    file("prompts: no such file", {"--prompts": "{DIR}/none.jsonl"}, "no file", "none.jsonl"),
    file("prompts: a folder", {"--prompts": "{DIR}/hollow"}, "data set folder"),
    file("prompts: an empty file", {"--prompts": "{DIR}/empty.jsonl"}, "no prompt to use"),
    file("prompts: cut short", {"--prompts": "{DIR}/broken.jsonl"}, "broken.jsonl:2", "JSON"),
    file("prompts: a list", {"--prompts": "{DIR}/list.jsonl"}, "list.jsonl:1", "JSON object"),
    file("prompts: not UTF-8", {"--prompts": "{DIR}/bytes.jsonl"}, "UTF-8", "byte 12"),
    file("prompts: other fields", {"--prompts": "{DIR}/fields.jsonl"}, "'prompt'", "['asked']"),
    file("prompts: a number", {"--prompts": "{DIR}/number.jsonl"}, "expected text", "got 7"),
    file("prompts: null", {"--prompts": "{DIR}/null.jsonl"}, "expected text", "got None"),
    file("prompts: an empty text", {"--prompts": "{DIR}/void.jsonl"}, "expected text", "got ''"),
    file("prompts: half a character", {"--prompts": "{DIR}/surrogate.jsonl"}, "row 1", "\\ud800"),
    file("prompts: many brackets", {"--prompts": "{DIR}/deep.jsonl"}, "deep.jsonl:1", "JSON"),
    file("prompts: 5,000 digits", {"--prompts": "{DIR}/digits.jsonl"}, "digits.jsonl:1", "JSON"),
    file("prompts: all too long", {"--max-prompt-tokens": "2"}, "all 12 are longer"),
    file("beyond the positions", {"--max-completion-tokens": "254"}, "256 positions"),
    file("test prompts: no such file", {"--test-prompts": "{DIR}/none.jsonl"}, "no file"),
    file("a task that reasoning-gym has not", {"--prompts": "reasoning_gym:nothing"}, "nothing"),
    file("a size that is no number", {"--prompts": "reasoning_gym:chain_sum:x"}, "chain_sum:x"),
    file("a size below 1", {"--prompts": "reasoning_gym:chain_sum:-3"}, "chain_sum:-3"),
    file("a hub data set without `datasets`", {"--prompts": "some/data"}, "some/data"),
    file("verifier: no such module", {"--verifier": "nothing"}, "'nothing'", code=2),
    file("verifier: no such function", {"--verifier": "json:nothing"}, "'json:nothing'", code=2),
    file("verifier: no such file", {"--verifier": "{DIR}/no.py:f"}, "no.py:f", code=2),
    file("verifier: a syntax error", {"--verifier": "{DIR}/syntax.py:f"}, "SyntaxError", code=2),
    file("verifier: raises at import", {"--verifier": "{DIR}/raises.py:f"}, "ZeroDivision", code=2),
    file("verifier: no function", {"--verifier": "json:decoder"}, "'json:decoder'", code=2),
    file("verifier: unknown task", {"--verifier": "reasoning_gym:no"}, "reasoning_gym:no", code=2),
    file(
        "teacher rollouts without a completion", {"--teacher-rollouts": "{DIR}/good.jsonl"},
        "'completion'", "row 1", method="tropd",
    ),
    file("run folder: in use", {"--run-dir": "{DIR}/used"}, "--resume or --overwrite", code=2),
    file("run folder: a file", {"--run-dir": "{DIR}/list.jsonl"}, "expected a folder", code=2),
    file("run folder: below a file", {"--run-dir": "{DIR}/list.jsonl/x"}, "is a file", code=2),
    file("run folder: no name", {"--run-dir": ""}, "--run-dir", "empty", code=2),
    file("run folder: not writable", {"--run-dir": "/proc/opd/run"}, "run folder"),
    file(
        "resume: no run folder", {"--resume": "{DIR}/hollow", "--run-dir": "{DIR}/hollow"},
        "args.json", "RUN", code=2,
    ),
    file(
        "resume: RUN and another run folder", {"--resume": "{DIR}/resumed"}, "leave --run-dir out",
        code=2,
    ),
    file("resume: nothing there", {"--resume": None}, "no complete checkpoint"),
    file(
        "resume: only damaged ones", {"--resume": None, "--run-dir": "{DIR}/damaged"},
        "no complete checkpoint",
    ),
    file(
        "resume: another student", {"--resume": None, "--run-dir": "{DIR}/resumed",
        "--student": "{DIR}/wide"}, "step_1", "--student",
    ),
    file(
        "resume and overwrite", {"--resume": None, "--overwrite": None}, "exclude each other",
        code=2,
    ),
    file(
        "overwrite: no run", {"--overwrite": None, "--run-dir": "{DIR}/thesis"}, "not a run folder",
        code=2,
    ),
    file(
        "overwrite: the student is in it", {"--overwrite": None, "--run-dir": "{DIR}/used",
        "--student": "{DIR}/used/checkpoints/step_1/model"}, "would delete --student", code=2,
    ),
    # ----------------------------------------------------------------------------------- models
    model("student: no such folder", {"--student": "{DIR}/none"}, "--student", "no model"),
    model("teacher: no such folder", {"--teacher": "{DIR}/none"}, "--teacher", "no model"),
    model("student: an empty folder", {"--student": "{DIR}/hollow"}, "--student", "no model"),
    model("student: a file", {"--student": "{DIR}/list.jsonl"}, "--student", "no model"),
    model("student: config.json is not JSON", {"--student": "{DIR}/config"}, "--student"),
    model("student: layers as text", {"--student": "{DIR}/worded"}, "--student", "expected int"),
    model("student: broken generation_config.json", {"--student": "{DIR}/unset"}, "generation_c"),
    model("student: config.json of no model", {"--student": "{DIR}/typeless"}, "--student"),
    model("student: an encoder-decoder", {"--student": "{DIR}/t5"}, "--student"),
    model("student: no tokenizer", {"--student": "{DIR}/mute"}, "--student"),
    model("student: a broken tokenizer", {"--student": "{DIR}/garbled"}, "--student"),
    model("student: no weights", {"--student": "{DIR}/weightless"}, "weightless"),
    model("student: a run", {"--student": "{DIR}/trained"}, "step_2", code=2),
    model("student: a checkpoint", {"--student": "{DIR}/trained/checkpoints/step_2"}, code=2),
    model("student: a pointer of Git LFS", {"--student": "{DIR}/pointer"}, "git lfs pull"),
    model("student: eos as text", {"--student": "{DIR}/spoken"}, "eos_token_id", "'<end>'"),
    model("student: weights cut short", {"--student": "{DIR}/short"}, "short"),
    model("student: weights in a pickle", {"--student": "{DIR}/pickled"}, "pickled"),
    model("student: half of the weights", {"--student": "{DIR}/half"}, "half", "are missing"),
    model("student: NaN weights", {"--student": "{DIR}/nan"}, "student", "not finite"),
    model("student: an index that is not JSON", {"--student": "{DIR}/unlisted"}, "index.json"),
    model("student: weights from a .bin", {"--student": "{DIR}/binned"}, "'pytorch_model.bin'"),
    model("student: weights from elsewhere", {"--student": "{DIR}/outside"}, "'../student/model"),
    model("student: 10 million layers", {"--student": "{DIR}/towering"}, "10000000", "at most"),
    model("student: one layer too many", {"--student": "{DIR}/taller"}, "3 layers", "have 2"),
    model("student: one layer too few", {"--student": "{DIR}/flatter"}, "1 layers", "layers.1."),
    model("student: an endless template", {"--student": "{DIR}/endless"}, "takes more than 10 s"),
    model("student: its own code", {"--student": "{DIR}/remote"}, "trust_remote_code", "--student"),
    model("teacher: other token ids", {"--teacher": "{DIR}/permuted"}, "tokenizers", "id 4"),
    model("reference: no folder", {"--reference": "{DIR}/none"}, "--reference", method="exopd"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good models and prompts, and everything that can be wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    tinylm.save_model(folder / "student", 0)
    tinylm.save_model(folder / "teacher", 1)
    tinylm.save_prompts(folder / "good.jsonl")
    rows = {
        "empty": b"\n", "broken": b'{"prompt": "a"}\n{"prompt": \n', "list": b"[1]\n",
        "bytes": b'{"prompt": "\xff"}\n', "fields": b'{"asked": "1+1="}\n',
        "number": b'{"prompt": 7}\n', "null": b'{"prompt": null}\n', "void": b'{"prompt": ""}\n',
        "surrogate": b'{"prompt": "\\ud800"}\n', "deep": b"[" * 100_000 + b"\n",
        "digits": b'{"prompt": "1", "n": ' + b"1" * 5000 + b"}\n",
    }  # fmt: skip
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "hollow").mkdir()
    tinylm.save_model(folder / "permuted", 1, words=tinylm.WORDS[:4] + tinylm.WORDS[:3:-1])
    tinylm.save_model(folder / "wide", 0, intermediate_size=64)
    copies = ["config", "typeless", "mute", "garbled", "weightless", "short", "pickled", "half"]
    copies += ["unlisted", "binned", "outside", "towering", "taller", "flatter", "endless"]
    copies += ["worded", "unset", "pointer", "spoken"]
    for name in [*copies, "nan", "remote"]:
        shutil.copytree(folder / "student", folder / name)
    for step in (1, 2):
        shutil.copytree(folder / "student", folder / f"trained/checkpoints/step_{step}/model")
    (folder / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "spoken/generation_config.json").write_text('{"eos_token_id": "<end>"}')
    (folder / "config/config.json").write_text("{")
    (folder / "typeless/config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "mute" / name).unlink()
        (folder / "garbled" / name).write_text("{}")
    weights = folder / "student/model.safetensors"
    (folder / "weightless/model.safetensors").unlink()
    (folder / "short/model.safetensors").write_bytes(weights.read_bytes()[:-1000])
    (folder / "pickled/model.safetensors").unlink()
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    torch.save(lm.state_dict(), folder / "pickled/pytorch_model.bin")
    from safetensors.torch import load_file, save_file

    some = {k: v for k, v in load_file(weights).items() if "layers.1.mlp" not in k}
    save_file(some, folder / "half/model.safetensors", metadata={"format": "pt"})
    bad = {k: torch.full_like(v, torch.nan) for k, v in load_file(weights).items()}
    save_file(bad, folder / "nan/model.safetensors", metadata={"format": "pt"})
    for name, text in {
        "unlisted": "[", "binned": "pytorch_model.bin", "outside": "../student/model.safetensors",
    }.items():  # fmt: skip
        (folder / name / "model.safetensors").unlink()
        listed = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), text)}
        (folder / name / "model.safetensors.index.json").write_text(
            json.dumps(listed) if len(text) > 1 else text
        )
    torch.save(lm.state_dict(), folder / "binned/pytorch_model.bin")
    (folder / "unset/generation_config.json").write_text("{")
    layers = {"towering": 10**7, "taller": 3, "flatter": 1, "worded": "10000000"}
    for name, num in layers.items():
        layered = json.loads((folder / name / "config.json").read_text()) | {
            "num_hidden_layers": num
        }
        layered.pop("layer_types", None)
        (folder / name / "config.json").write_text(json.dumps(layered))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "endless/chat_template.jinja").write_text(loop + tinylm.TEMPLATE)
    config = json.loads((folder / "remote/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "remote/config.json").write_text(json.dumps(config))
    (folder / "remote/mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    shutil.copytree(folder / "student", folder / "t5")
    (folder / "t5/config.json").write_text('{"model_type": "t5", "vocab_size": 46}')
    (folder / "thesis").mkdir()
    (folder / "thesis/metrics.jsonl").write_text("mine")
    opd.main(argv_of(Case("", "", 0, (), ("--steps=1",), {"--run-dir": "{DIR}/used"}), folder))
    for name in ("damaged", "resumed"):
        shutil.copytree(folder / "used", folder / name)
    (folder / "damaged/checkpoints/step_1/manifest.json").write_text("[]")
    return folder


def argv_of(case: Case, world: Path) -> list[str]:
    good: dict[str, object] = {
        "--student": "{DIR}/student", "--teacher": "{teacher}", "--prompts": "{DIR}/good.jsonl",
        "--run-dir": "{DIR}/run", "--max-completion-tokens": "8", "--prompts-per-step": "3",
        "--rollouts-per-prompt": "2", "--steps": "2", "--eval-every": "0", "--device": "cpu",
    }  # fmt: skip
    argv = []
    for name, value in (good | case.changes).items():
        for each in value if isinstance(value, list) else [value]:
            argv.append(name)
            if each is not None:
                text = str(each).replace("{teacher}", "{DIR}/teacher")
                argv.append(text.replace("{DIR}", str(world)))
    return [*argv, *case.more]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and time; not those of the run folders of the cases."""
    run_folders = {folder / "run", folder / "resumed"}
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not run_folders & {*path.parents} and path.suffix != ".pyc"
    }


def outcome(case: Case, world: Path, capfd) -> tuple[object, list[str]]:
    """Exit code, and what stands on stderr but for progress bars."""
    shutil.rmtree(world / "run", ignore_errors=True)
    module = importlib.import_module(case.method)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(argv_of(case, world))
    text = capfd.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", text) if line and "it/s]" not in line]
    return stop.value.code, [line for line in lines if "?it" not in line and "s/it]" not in line]


FOUND: dict[str, str] = {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.method} {case.name}")
def test_bad_input(case, world, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = listing(world)
    code, lines = outcome(case, world, capfd)
    assert len(lines) == 1, "\n".join(lines)
    (line,) = lines
    assert code == case.code, line
    assert line.startswith("usage: " if code == 2 else "error: ")
    assert all(word in line for word in case.words), line
    assert len(line) < 1200 and "Traceback" not in line
    assert listing(world) == before  # nothing written, nothing lost
    assert not list(tmp_path.iterdir())
    FOUND[f"{case.method} {case.name}"] = line.replace(str(world), "DIR")


def test_there_are_enough_cases_and_none_twice():
    assert len(CASES) >= 60
    assert len({(case.method, case.name) for case in CASES}) == len(CASES)
    methods = {case.method for case in CASES}
    assert methods == {"opd", "sg_opd", "exopd", "topk_opd", "tropd"}


def test_debug_shows_the_traceback_and_the_line(world, capfd):
    case = Case("", "", 1, (), ("--debug",), {"--prompts": "{DIR}/broken.jsonl"})
    code, lines = outcome(case, world, capfd)
    assert code == 1 and "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("error: ") and "broken.jsonl:2" in lines[-1]


def test_the_page_has_every_case():
    """Name and exit code; the lines are examples, as they were when the page was written."""
    if os.environ.get("OPD_WRITE_ANSWERS") and len(FOUND) == len(CASES):
        write_page()
    text = PAGE.read_text()
    for case in CASES:
        assert f"| {case.method} | {case.name} | {case.code} |" in text, (
            "OPD_WRITE_ANSWERS=1 python -m pytest tests/faults/test_bad_input.py"
        )
    assert text.count("\n| ") == len(CASES) + 2 * 3  # three heads with their rules


def write_page() -> None:
    parts = [
        "# Bad inputs\n\nWhat a method answers to input that cannot be right: exit code 2 where "
        "the command line is wrong, 1 for files and models, and one line on stderr. No traceback "
        "without `--debug`, nothing written outside of the run folder, nothing lost. Generated by "
        "`tests/faults/test_bad_input.py`, which runs every row; DIR is a folder of that test.\n"
    ]
    for group in ("flags", "files", "models"):
        parts.append(
            f"## {group.title()}\n\n| method | input | code | line |\n| --- | --- | --- | --- |"
        )
        for case in (each for each in CASES if each.group == group):
            line = FOUND[f"{case.method} {case.name}"]
            line = re.sub(r"([|\\`*_<>])", r"\\\1", line if len(line) < 260 else line[:257] + "...")
            parts.append(f"| {case.method} | {case.name} | {case.code} | {line} |")
        parts.append("")
    PAGE.write_text("\n".join(parts))
