"""A teacher that reads another prompt (`--teacher-prompt`), and a student that teaches itself."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
from pathlib import Path

import opd
import pytest
import tinylm
import torch
import transformers
from tablelm import TableLM, all_completions, expected_gradient, rollout_of
from tinylm import weights

from opd_run import alarms, data, diagnose, files, rollouts, setup, views
from opd_run.console import RunError
from opd_run.models import ReadAs

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["opd", "sg_opd", "exopd", "topk_opd", "tropd"]
VOCAB, LENGTH = 3, 3
OWN, OTHER = (0,), (2, 1, 2)  # the student's prompt, the teacher's


# ---------------------------------------------------------------------------------- enumeration
class ByPrompt(torch.nn.Module):
    """A teacher that is one table behind the student's prompt, and another behind its own."""

    def __init__(self, **tables: TableLM) -> None:
        super().__init__()
        self.of = {OWN: tables["own"], OTHER: tables["other"]}
        for name in ("vocab", "head", "lm", "device", "facts", "head_on"):
            setattr(self, name, getattr(tables["own"], name))
        self.role = "teacher"

    def forward(self, read, where, input_ids, attention_mask, **_):
        num_prompt = input_ids.shape[1] - LENGTH
        prompts = {
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(input_ids[:, :num_prompt], attention_mask[:, :num_prompt])
        }
        (prompt,) = prompts
        plain = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, num_prompt:]], 1)
        return self.of[prompt](read, where[:, num_prompt - 1 :], input_ids=plain)


CASES = [
    ("opd", ""),
    ("opd", "--objective full --divergence reverse"),
    ("opd", "--objective full --divergence jsd"),
    ("sg_opd", ""),
    ("sg_opd", "--gate-target reference"),
    ("exopd", "--reward-scale 1.5"),
    ("topk_opd", "--support-size 2"),
    ("tropd", ""),
]


@pytest.mark.parametrize(("method", "flags"), CASES)
def test_the_target_is_the_teacher_under_its_own_prompt(method, flags):
    """At prefixes that the student visits under its prompt; a reference reads the student's."""
    module = importlib.import_module(method)
    args = module.parse_args(flags.split())
    student, own, other = (TableLM(VOCAB, LENGTH, seed) for seed in (1, 2, 3))
    completions = all_completions(VOCAB, LENGTH)
    probs = student.token_logp(completions).sum(1).exp()

    def gradient(teacher, read):
        reference = ByPrompt(own=own, other=other)
        reference.role = "reference"
        models = {"student": student, "teacher": teacher, "reference": reference}
        prompt = data.Prompt(OWN, "", "", "", {}, views={"teacher": read} if read else {})

        def loss(i):
            zeros = torch.zeros(1, LENGTH, dtype=torch.float64)
            given = {"prompts": [prompt], "behaviour_logp": zeros}
            rollout = rollout_of(module, completions[i : i + 1], **given)
            rollout.verdict[:] = -1.0 if i % 2 else 1.0
            return module.token_loss(student, rollout, module.score(models, rollout, args), args)[0]

        return expected_gradient(student, probs, loss)

    found = gradient(ByPrompt(own=own, other=other), OTHER)
    other.role = own.role = "teacher"
    torch.testing.assert_close(found, gradient(other, None), rtol=0.0, atol=1e-9)
    assert (found - gradient(own, None)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------ real models
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("views"), eos_token_id=[1, 7])


def flags(folder, run: str, *more: str) -> list[str]:
    argv = f"--student {folder}/student --teacher {folder}/teacher --prompts {folder}/prompts.jsonl"
    argv += f" --run-dir {folder}/{run} --max-completion-tokens 6 --prompts-per-step 3 --steps 3"
    argv += " --rollouts-per-prompt 2 --save-every 1 --keep-checkpoints 0 --eval-every 0"
    argv += " --device cpu --lr 1e-2"
    return [*argv.split(), *more]


def taught_by(teacher: str, folder, run: str, *more: str) -> list[str]:
    """The flags of a run with this --teacher."""
    return [word if word != f"{folder}/teacher" else teacher for word in flags(folder, run, *more)]


def losses(folder, run: str) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "log_ratio_mean", "reverse_kl")
    rows = files.read_metrics(folder / run)
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.mark.parametrize("lengths", [(1, 2, 1), (9, 3, 5)], ids=["shorter", "longer"])
def test_completions_are_aligned_whatever_the_prompts_length(folder, lengths):
    """Each row of a padded batch is what the model says of [its prompt, completion] alone."""
    args = opd.parse_args(flags(folder, "aligned"))
    models, tokenizer = tinylm.load(opd, args)
    facts = models["student"].facts
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, facts, args)[:3]
    read = [tuple(range(3, 3 + length)) for length in lengths]
    prompts = [
        data.Prompt(p.ids, p.text, p.answer, "", p.row, views={"teacher": ids})
        for p, ids in zip(prompts, read)
    ]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(3, "rollouts", 0, args), args)
    teacher, student = models["teacher"], models["student"]
    found = opd.token_logp(teacher, rollout, args)
    alone = torch.zeros_like(found)
    for row, ids in enumerate(read):
        kept = rollout.completion_ids[row][rollout.completion_mask[row]]
        whole = torch.cat([torch.tensor(ids), kept])
        logits = teacher.lm(whole[None]).logits[0, len(ids) - 1 : -1, : facts.valid_vocab]
        logp = logits.log_softmax(-1).gather(1, kept[:, None])[:, 0]
        alone[row, : len(kept)] = logp
    torch.testing.assert_close(found, alone, rtol=0.0, atol=1e-5)
    plain = opd.replace(rollout, prompts=[opd.replace(each, views={}) for each in prompts])
    assert (opd.token_logp(teacher, plain, args) - found).abs().max() > 1e-3
    read_by_student = opd.token_logp(student, rollout, args)
    assert torch.equal(read_by_student, opd.token_logp(student, plain, args))


def test_a_teacher_samples_under_its_own_prompt_and_the_student_gets_its_own_back(folder):
    args = opd.parse_args(flags(folder, "sampled"))
    models, _ = tinylm.load(opd, args)
    own, other = ((4, 5, 6), (7, 8, 9, 10, 11))
    uniform = opd.uniforms(1, "rollouts", 0, args)
    seen = data.Prompt(own, "", "", "", {}, views={"teacher": other})
    plain = data.Prompt(other, "", "", "", {})
    one, two = (opd.sample(models["teacher"], [each], uniform, args) for each in (seen, plain))
    assert torch.equal(one.completion_ids, two.completion_ids)
    assert torch.equal(one.behaviour_logp, two.behaviour_logp)
    assert one.prompt_ids.tolist() == [list(own)]
    mine = opd.sample(models["student"], [seen], uniform, args)
    same = opd.sample(models["student"], [data.Prompt(own, "", "", "", {})], uniform, args)
    assert torch.equal(mine.behaviour_logp, same.behaviour_logp)


@pytest.mark.parametrize("method", METHODS)
def test_a_template_that_says_the_same_is_the_plain_run_and_another_is_not(folder, method, capsys):
    module = importlib.import_module(method)
    told = {"same": "{prompt}", "other": "{answer} {prompt}"}
    for name, more in {
        "plain": [],
        **{k: ["--teacher-prompt", v] for k, v in told.items()},
    }.items():
        module.main(flags(folder, f"{method}_{name}", *more))
        said = "! --teacher-prompt: the teacher reads what the student reads, in all prompts of"
        assert (said in capsys.readouterr().out) == (name == "same")
    assert losses(folder, f"{method}_plain") == losses(folder, f"{method}_same")
    assert losses(folder, f"{method}_plain") != losses(folder, f"{method}_other")
    plain, same, other = (
        weights(folder, f"{method}_{each}") for each in ("plain", "same", "other")
    )
    assert tinylm.equal(plain, same) and not tinylm.equal(plain, other)


FUNCTIONS = """
import json
def feedback(row, completions, verdicts, index):
    with open(row["log"] if "log" in row else "{log}", "a") as out:
        out.write(json.dumps([row["prompt"], completions, verdicts, index]) + "\\n")
    if index is None:
        return None
    return row["prompt"] + " " + " ".join(completions[:index])
def turns(row, completions, verdicts, index):
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": row["prompt"]}]
def number(row, completions, verdicts, index):
    return 3
calls = []
def late(row, completions, verdicts, index):
    calls.append(index)
    if sum(each is not None for each in calls) > 6:  # in the second step
        raise ValueError("no sibling has it")
def few(row):
    return None
def nothing(row, completions, verdicts, index):
    return [{"role": "user", "content": None}]
def half(row, completions, verdicts, index):
    return [{"role": "user", "content": "\\ud800"}]
def spoils(row, completions, verdicts, index):
    row["prompt"] = "7"
    return [{"from": "human", "value": [{"type": "text", "text": row["prompt"]}]}]
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_function_is_told_what_the_group_wrote(folder, method, monkeypatch):
    module, log = importlib.import_module(method), folder / f"{method}.log"
    log.unlink(missing_ok=True)
    (folder / "told.py").write_text(FUNCTIONS.replace("{log}", str(log)))
    views.function_of.cache_clear()
    for run, spec in (("told", f"{folder}/told.py:feedback"), ("turns", f"{folder}/told.py:turns")):
        module.main(flags(folder, f"{method}_{run}", "--teacher-prompt", spec, "--steps", "1"))
    module.main(flags(folder, f"{method}_untold", "--steps", "1"))
    learnt = [weights(folder, f"{method}_{run}", 1) for run in ("told", "turns", "untold")]
    assert not any(tinylm.equal(*pair) for pair in itertools.combinations(learnt, 2))
    shown = json.loads((folder / f"{method}_turns/samples.jsonl").read_text().splitlines()[0])
    assert shown["teacher_prompt"].startswith("<user> a <user> b <user>")
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    before = [call for call in calls if call[3] is None]
    after = [call for call in calls if call[3] is not None]
    assert all(call[1:] == [[], [], None] for call in before) and len(before) >= 12
    groups = {}
    for prompt, completions, verdicts, index in after:
        groups.setdefault(prompt, []).append((completions, verdicts, index))
    assert len(groups) == 3
    for group in groups.values():
        assert [index for _, _, index in group] == list(range(len(group)))
        assert all(each[:2] == group[0][:2] for each in group)
        assert len(group[0][0]) == len(group[0][1]) == len(group) >= 2
        assert set(group[0][1]) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "live"], "under its own prompt has nothing to teach"),
        (["--teacher", "ema:1.0"], "expected a number in (0, 1)"),
        (["--teacher", "ema:x"], "expected a number in (0, 1)"),
        (["--teacher", "ema:"], "expected a number in (0, 1)"),
        (["--teacher", "a=live"], "a student that teaches itself has no name"),
        (["--teacher", "a=ema:0.9"], "a student that teaches itself has no name"),
        (["--teacher", "live", "--teacher-prompt", "{prompt}"], "has nothing to teach"),
        (["--teacher", "live", "--teacher-template-args", '{"no": 1}'], "has nothing to teach"),
        (["--teacher", "live", "--teacher-url", "http://localhost:1"], "leave --teacher-url out"),
        (["--teacher", "ema:0.9", "--teacher-offload", ""], "leave --teacher-offload out"),
        (["--teacher-template-args", "[1]"], "must be a JSON object"),
        (["--teacher-prompt", "{nothing}"], "no field 'nothing'"),
        (["--teacher-prompt", "no_module:f"], "expected a template, or module:function"),
        (["--teacher-prompt", "{folder}/told.py:few"], "(row, completions, verdicts, index)"),
        (["--teacher-prompt", "{folder}/told.py:number"], "expected text, a list of chat messages"),
        (["--teacher-prompt", "{folder}/told.py:nothing"], "nothing: expected messages with role"),
        (["--teacher-prompt", "{folder}/told.py:half"], "half: expected text, got half a char"),
        (["--eval-teacher", ""], "--eval-teacher: leave --eval-every 0 out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, more, message, capsys):
    (folder / "told.py").write_text(FUNCTIONS.replace("{log}", str(folder / "log")))
    views.function_of.cache_clear()
    argv = flags(folder, "refused")
    for flag, value in zip(more[::2], more[1::2]):
        if not value:
            argv += [flag]
            continue
        value = value.replace("{folder}", str(folder))
        argv = [*argv, flag, value] if flag not in argv else [
            value if argv[i - 1] == flag else word for i, word in enumerate(argv)
        ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        opd.main(argv)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "usage"))
    ]
    assert stop.value.code in (1, 2) and len(lines) == 1 and message in lines[0], lines
    assert not (folder / "refused").exists()


ROLES = "{% for m in messages %}<user>{{ m['role'] }} {{ m['content'] }}{% endfor %}<bot>"
TEMPLATES = {
    "drops": (ROLES.replace("messages %}", "messages if m['role'] != 'system' %}"),
              "the chat template drops system messages: put it into --teacher-prompt"),
    "refuses": (ROLES.replace("<user>", "{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
                              "{% endif %}<user>"), "the chat template refuses it: no"),
    "none": (None, "needs a chat template"),
    "has its own": ("{% if messages[0]['role'] != 'system' %}<user>system be brief{% endif %}"
                    + ROLES, ""),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--teacher-system", "--system"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_system_message_that_no_template_shows_is_refused(
    folder, kind, flag, capsys, monkeypatch
):
    """Before a weight is read; not where it is what the template says by itself."""
    template, message = TEMPLATES[kind]
    shutil.copytree(folder / "student", folder / kind, dirs_exist_ok=True)
    tokenizer = tinylm.tokenizer()
    tokenizer.chat_template = template
    (folder / kind / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder / kind)
    argv = [str(folder / kind) if word == f"{folder}/student" else word
            for word in flags(folder, "system", flag, "be brief")]  # fmt: skip

    def weights_are_read(*_):
        raise RunError("weights are read")

    monkeypatch.setattr("opd_run.setup.load_models", weights_are_read)
    with pytest.raises(SystemExit) as stop:
        opd.main(argv)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith(("error", "usage"))]
    message = (
        message if flag != "--system" else message.replace("teacher-prompt", "prompt-template")
    )
    assert (f"{flag}: {message}" if message else "weights are read") in line
    assert stop.value.code == (2 if message else 1)


def test_a_function_may_return_messages_of_any_form_and_does_not_change_the_row(folder):
    (folder / "told.py").write_text(FUNCTIONS)
    views.function_of.cache_clear()
    args = opd.parse_args(flags(folder, "spoilt", "--teacher-prompt", f"{folder}/told.py:spoils"))
    models, tokenizer = tinylm.load(opd, args)
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, models["student"].facts, args)
    told = tuple(tokenizer.encode("<user>7<bot>", add_special_tokens=False))
    assert all(prompt.views == {"teacher": told} for prompt in prompts)
    assert all(prompt.row["prompt"] == prompt.text != "7" for prompt in prompts)


def test_what_changes_nothing_is_said(folder, capsys):
    """An argument that the template does not know; an average under the student's own prompt."""
    template = tinylm.TEMPLATE + "{% if hint %}{{ hint }}{% endif %}"
    shutil.copytree(folder / "student", folder / "hints", dirs_exist_ok=True)
    (folder / "hints/chat_template.jinja").write_text(template)
    more = ["--chat-template-args", '{"hint": 1}']
    more += ["--teacher-template-args", '{"hint": 2, "no": 3}']
    argv = flags(folder, "idle", *more, "--teacher-prompt", "{answer} {prompt}", "--dry-run")
    opd.main([word.replace(f"{folder}/student", f"{folder}/hints") for word in argv])
    said = capsys.readouterr().out
    assert "! --teacher-template-args: 'no' changes nothing" in said
    assert "'hint' changes" not in said
    for told in (False, True):
        more = ["--teacher-prompt", "{answer} {prompt}"] * told
        opd.main(taught_by("ema:0.9", folder, "idle", "--dry-run", *more))
        assert ("reads what the student reads" in capsys.readouterr().out) == (not told)


def test_a_prompt_that_is_too_long_for_the_teacher_alone_is_said_to_be(folder, capsys):
    told = "a" * 300
    with pytest.raises(SystemExit):
        opd.main(flags(folder, "told_long", "--teacher-prompt", told, "--max-prompt-tokens", "40"))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "all 12 are longer than --max-prompt-tokens 40, or, 12 of them, as the teacher" in line
    assert "than 250 tokens, which is what --max-completion-tokens 6 leaves" in line


def test_the_function_of_the_recipe(folder):
    """SDPO's, as it stands in the page: a sibling that is right, else what was wrong; in a run."""
    page = (ROOT / "docs/recipes.md").read_text()
    (text,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.S) if "hint(" in each]
    (folder / "hint.py").write_text(text)
    views.function_of.cache_clear()
    hint = views.function_of(f"{folder}/hint.py:hint", "teacher")
    row, wrote = {"prompt": "1+1="}, ["A", "B", "C"]
    assert hint(row, [], [], None) is None
    told = [hint(row, wrote, [-1.0, 1.0, 0.0], index) for index in range(3)]
    assert told[0] == told[2] and "A correct solution:\nB\n" in told[0] and told[1] is None
    told = [hint(row, wrote, [-1.0, 0.0, -1.0], index) for index in range(3)]
    assert "A" in told[0] and told[1] is None and "C" in told[2]
    assert all(each.startswith("1+1=") for each in told if each)
    topk_opd = importlib.import_module("topk_opd")
    more = ["--teacher-prompt", f"{folder}/hint.py:hint"]
    more += "--support student --tail bucket --steps 1".split()
    topk_opd.main(taught_by("ema:0.99", folder, "recipe", *more))
    shown = json.loads((folder / "recipe/samples.jsonl").read_text().splitlines()[0])
    assert "T h i s" not in shown["prompt"] and len(shown["teacher_prompt"]) > 40


def test_a_function_that_fails_ends_the_run_saved(folder, capsys):
    (folder / "told.py").write_text(FUNCTIONS)
    views.function_of.cache_clear()
    with pytest.raises(SystemExit):
        opd.main(flags(folder, "late", "--teacher-prompt", f"{folder}/told.py:late"))
    said = capsys.readouterr()
    assert "no sibling has it" in said.err and "saved" in said.out + said.err
    assert (folder / "late/checkpoints/step_1/manifest.json").is_file()


def test_rows_of_a_test_set_may_lack_a_field(folder, capsys):
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (folder / "hints.jsonl").write_text("".join(json.dumps(r | {"hint": "x"}) + "\n" for r in rows))
    args = opd.parse_args(
        flags(folder, "lenient", "--teacher-prompt", "{hint} {prompt}",
              "--test-prompts", f"{folder}/prompts.jsonl")
    )  # fmt: skip
    models, tokenizer = tinylm.load(opd, args)
    facts = models["student"].facts
    train = setup.prompts_of(opd, f"{folder}/hints.jsonl", tokenizer, facts, args)
    assert all(prompt.views for prompt in train)
    with pytest.raises(RunError, match="no field 'hint'"):
        setup.prompts_of(opd, f"{folder}/prompts.jsonl", tokenizer, facts, args)
    test = setup.prompts_of(opd, f"{folder}/prompts.jsonl", tokenizer, facts, args, test="")
    assert not any(prompt.views for prompt in test)
    assert f"{len(rows)} rows lack a field of --teacher-prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "more"), [("exopd", []), ("sg_opd", ["--gate-target", "reference"])]
)
def test_a_reference_reads_its_own_prompt_where_it_has_one(folder, method, more):
    """And the teacher the student's, as `--teacher-prompt` is not given."""
    module = importlib.import_module(method)
    more = [*more, "--reference-prompt", "{answer} {prompt}"]
    args = module.parse_args(flags(folder, "referred", *more))
    models, tokenizer = tinylm.load(module, args)
    facts = models["student"].facts
    prompts = setup.prompts_of(module, f"{folder}/prompts.jsonl", tokenizer, facts, args)[:4]
    uniform = module.uniforms(4, "rollouts", 0, args)
    rollout = module.sample(models["student"], prompts, uniform, args)
    bare = [module.replace(each, views={}) for each in prompts]
    told = [each.views["reference"] for each in prompts]
    ids, mask = rollouts.left_padded(told, rollout.prompt_ids.device)
    read = {"own": rollout, "plain": module.replace(rollout, prompts=bare)}
    read["swapped"] = module.replace(read["plain"], prompt_ids=ids, prompt_mask=mask)
    found = {
        (name, role): module.token_logp(models[role], each, args)
        for name, each in read.items()
        for role in ("teacher", "reference")
    }
    torch.testing.assert_close(found["own", "reference"], found["swapped", "reference"])
    assert (found["own", "reference"] - found["plain", "reference"]).abs().max() > 1e-3
    torch.testing.assert_close(found["own", "teacher"], found["plain", "teacher"])


def test_the_divergence_of_an_evaluation_is_to_the_teacher_under_its_prompt(folder):
    """The teacher is the student here, so that nothing but its prompt is between them."""
    for run, spec in (("alike", "{prompt}"), ("unlike", "{answer} {prompt}")):
        argv = flags(
            folder,
            run,
            "--teacher-prompt",
            spec,
            "--eval-every",
            "1",
            "--steps",
            "1",
            "--test-prompts",
            f"{folder}/prompts.jsonl",
            "--eval-samples",
            "1",
        )
        opd.main([word.replace(f"{folder}/teacher", f"{folder}/student") for word in argv])
        first = next(row for row in files.read_metrics(folder / run) if row["step"] == 0)
        (found,) = (value for name, value in first.items() if name.endswith("student/reverse_kl"))
        assert (abs(found) < 1e-5) == (run == "alike") and found > -1e-5


def test_packing_counts_the_longer_prompt(folder):
    args = opd.parse_args(flags(folder, "packed"))
    models, _ = tinylm.load(opd, args)
    prompts = [data.Prompt((3, 4), "", "", "", {}, views={"teacher": (5,) * n}) for n in (20, 2, 2)]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(3, "rollouts", 0, args), args)
    rollout.completion_mask[:] = True
    groups, _, _ = rollouts.pack(rollout, 10**6)
    assert [0] in groups and sorted(map(len, groups)) == [1, 2]


def test_what_does_not_fit_behind_a_prompt_is_not_trained(folder):
    args = opd.parse_args(flags(folder, "long"))
    models, _ = tinylm.load(opd, args)
    prompts = [data.Prompt((3, 4), "", "", "", {}, views={"teacher": (5,) * n}) for n in (90, 2)]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(2, "rollouts", 0, args), args)
    found = views.leave_out_long(rollout, 90)
    assert found == {"num_teacher_prompts_too_long": 1.0}
    assert rollout.response_mask.any(1).tolist() == [False, True]


# --------------------------------------------------------------------- the student as its teacher
def test_a_live_teacher_is_a_copy_of_the_student_now(folder):
    more = ["--teacher-prompt", "{answer} {prompt}"]
    args = opd.parse_args(taught_by("live", folder, "live", *more))
    models, tokenizer = tinylm.load(opd, args)
    assert isinstance(models["teacher"], ReadAs) and models["teacher"].lm is models["student"].lm
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, models["student"].facts, args)
    optimizer = opd.make_optimizer(models["student"], args)
    copied = opd.parse_args(flags(folder, "copy", *more))
    for step in range(2):
        chosen = opd.prompts_of_step(prompts, step, args)
        rollout = opd.sample(
            models["student"], chosen, opd.uniforms(len(chosen), "rollouts", step, args), args
        )
        frozen, _ = tinylm.load(opd, copied)
        frozen["teacher"].lm.load_state_dict(models["student"].lm.state_dict())
        one = opd.score(models, rollout, args)["teacher_logp"]
        two = opd.score({**frozen, "student": models["student"]}, rollout, copied)["teacher_logp"]
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-5)
        assert not one.requires_grad
        opd.train_step(models["student"], optimizer, [(rollout, {"teacher_logp": one})], args, step)


@pytest.mark.parametrize("teacher", ["live", "ema:0.5"])
def test_a_teacher_that_moves_stays_as_it_was_when_it_scored(folder, teacher):
    """With --updates-per-rollout 2, and a full divergence: hidden states and head of one moment;
    the next step has the next one's, though scores of this one are still held."""
    more = ["--objective", "full", "--updates-per-rollout", "2"]
    more += ["--teacher-prompt", "{answer} {prompt}"]
    args = opd.parse_args(taught_by(teacher, folder, "moves", *more))
    models, tokenizer = tinylm.load(opd, args)
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, models["student"].facts, args)[:3]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(3, "rollouts", 0, args), args)

    def logits(scores):
        return scores["teacher_hidden"] @ scores["teacher_head"]().T

    optimizer = opd.make_optimizer(models["student"], args)
    one = opd.score(models, rollout, args)
    before = logits(one)
    opd.train_step(models["student"], optimizer, [(rollout, one)], args, 0)
    if teacher != "live":
        opd.move_average(models, 0.5)
    assert torch.equal(logits(one), before)
    with torch.no_grad():
        now = opd.read_tokens(models["teacher"], rollout, lambda hidden, head: hidden @ head.T)
    torch.testing.assert_close(logits(opd.score(models, rollout, args)), now, rtol=0.0, atol=1e-5)
    assert (now - before).abs().max() > 1e-3


def of_average(folder, run: str, decay: float, *more: str) -> list[str]:
    more = ("--teacher-prompt", "{answer} {prompt}", *more)
    return taught_by(f"ema:{decay}", folder, run, *more)


@pytest.mark.parametrize("adapters", [[], ["--lora-rank", "2"]], ids=["weights", "adapters"])
def test_the_average_moves_and_is_resumed_bit_for_bit(folder, adapters):
    decay, whole, parts = 0.5, f"whole{len(adapters)}", f"parts{len(adapters)}"
    opd.main(of_average(folder, whole, decay, *adapters))
    opd.main(of_average(folder, parts, decay, *adapters, "--steps", "2"))
    opd.main(of_average(folder, parts, decay, *adapters, "--resume"))
    assert losses(folder, whole) == losses(folder, parts)
    assert tinylm.equal(weights(folder, whole), weights(folder, parts))

    def average(run, step):
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

        reader = FileSystemReader(folder / run / f"checkpoints/step_{step}/trainer")
        return _load_state_dict_from_keys(storage_reader=reader)["average"]

    steps = (1, 2, 3)
    saved = {step: average(whole, step) for step in steps}
    students = {step: weights(folder, whole, step) for step in steps}
    first = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/student").state_dict()
    saved[0] = {f"lm.{name}": value for name, value in first.items()}
    for step in steps:
        for name, value in saved[step].items():
            short = name.removeprefix("lm.")
            if short in students[step] and name in saved[step - 1]:
                want = decay * saved[step - 1][name] + (1 - decay) * students[step][short]
                torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(saved[3].values(), average(parts, 3).values()))
    assert not tinylm.equal(saved[3], saved[1])


def test_a_run_without_an_average_cannot_go_on_with_one(folder, capsys):
    more = ["--teacher-prompt", "{answer} {prompt}", "--steps", "1"]
    opd.main(taught_by("live", folder, "moved", *more))
    with pytest.raises(SystemExit):
        opd.main(of_average(folder, "moved", 0.5, "--resume"))
    assert "does not fit --student and --teacher" in capsys.readouterr().err


def test_the_average_of_adapters_is_that_of_their_factors(folder):
    """Not that of their products; what is frozen stays as it is."""
    args = opd.parse_args(of_average(folder, "factors", 0.5, "--lora-rank", "2"))
    models, tokenizer = tinylm.load(opd, args)
    student, teacher = (dict(models[each].named_parameters()) for each in ("student", "teacher"))
    assert tinylm.equal(student, teacher)
    first = {name: weight.detach().clone() for name, weight in teacher.items()}
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, models["student"].facts, args)[:3]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(3, "rollouts", 0, args), args)
    optimizer = opd.make_optimizer(models["student"], args)
    for step in range(2):
        batch = [(rollout, opd.score(models, rollout, args))]
        opd.train_step(models["student"], optimizer, batch, args, step)
    opd.move_average(models, 0.5)
    for name, weight in teacher.items():
        if ".lora_" in name:
            want = 0.5 * first[name] + 0.5 * student[name]
            torch.testing.assert_close(weight, want.detach(), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weight, first[name]) and torch.equal(weight, student[name])
    down = next(name for name in teacher if "lora_A" in name)
    up = down.replace("lora_A", "lora_B")
    products = [of[up] @ of[down] for of in (first, student, teacher)]
    assert (products[2] - 0.5 * (products[0] + products[1])).abs().max() > 1e-6


def test_what_the_prompt_does_to_the_signal_is_logged(folder, capsys):
    """By hand: mean log teacher - log student of right rollouts, less that of wrong ones."""
    args = opd.parse_args(flags(folder, "signal"))
    models, _ = tinylm.load(opd, args)
    prompts = [
        data.Prompt((3, 4), "", "", "", {}, views={"teacher": (5, 6, 7 + n)}) for n in range(4)
    ]
    rollout = opd.sample(models["student"], prompts, opd.uniforms(4, "rollouts", 0, args), args)
    rollout.verdict = torch.tensor([1.0, -1.0, 0.0, 1.0])
    functions = {name: getattr(opd, name) for name in ("read_tokens", "loss_law", "teacher_of")}
    found = diagnose.right_minus_wrong(models, [rollout], args, **functions)
    plain = opd.replace(rollout, prompts=[opd.replace(each, views={}) for each in prompts])
    student = opd.token_logp(models["student"], rollout, args)
    want = []
    for of in (rollout, plain):
        gap, mask = opd.token_logp(models["teacher"], of, args) - student, rollout.trained_mask
        right = torch.cat([gap[0][mask[0]], gap[3][mask[3]]]).mean()
        want.append(float((right - gap[1][mask[1]].mean()).detach()))
    names = ("right_minus_wrong", "right_minus_wrong_without_prompt")
    assert [found[name] for name in names] == pytest.approx(want, abs=1e-5)
    assert want[0] != pytest.approx(want[1], abs=1e-3)
    opd.main(flags(folder, "signal", "--teacher-prompt", "{answer} {prompt}", "--steps", "1"))
    row = files.read_metrics(folder / "signal")[0]
    assert set(names) <= row.keys()
    sample = json.loads((folder / "signal/samples.jsonl").read_text().splitlines()[0])
    assert sample["teacher_prompt"].startswith("<user> ") and len(sample["prompt"]) > 3


def test_the_gap_is_said_before_a_step_is_made(folder, capsys):
    """Teacher under its prompt less student under its own; and where there is little to learn."""
    (folder / "even.py").write_text("def even(completion, answer, row): return len(completion) % 2")
    more = ["--teacher-prompt", "{answer} {prompt}", "--test-prompts", f"{folder}/prompts.jsonl"]
    more += ["--verifier", f"{folder}/even.py:even", "--eval-teacher", "--eval-every", "1"]
    for teacher, few in (("teacher", False), ("student", True)):
        more += ["--teacher-prompt", "{prompt}"] if few else []
        argv = flags(folder, "gap", *more, "--overwrite", "--steps", "1", "--eval-samples", "8")
        opd.main([word.replace(f"{folder}/teacher", f"{folder}/{teacher}") for word in argv])
        said = capsys.readouterr().out
        found = re.search(r"(! )?gap: test: teacher (\S+), student (\S+): (\S+) \(.*", said)
        rows = {key: value for row in files.read_metrics(folder / "gap")
                for key, value in row.items() if row["step"] == 0}  # fmt: skip
        one, two = (rows[f"eval/{who}/avg@8"] for who in ("teacher", "student"))
        shown = [float(text) for text in found.groups()[1:]]
        assert shown == pytest.approx([one, two, one - two], abs=1e-3)
        assert found.start() < said.index("step 1/1")
        assert (one == two) == few and ("little to learn" in found[0]) == bool(found[1])
        assert found[1] or not few


def test_an_alarm_says_that_prompts_outgrow_the_teacher():
    for num, names in ((5, []), (6, ["prompt_too_long"])):
        row = {"num_teacher_prompts_too_long": num, "num_rollouts": 100.0}
        assert [alarm.name for alarm, _ in alarms.Alarms([]).check(row)] == names


def test_an_alarm_says_that_the_prompt_misleads():
    alarm = next(each for each in alarms.ALARMS if each.name == "prompt_misleads")

    def found(told, without):
        seen = alarms.History()
        for value in told:
            seen.add({"right_minus_wrong": value, "right_minus_wrong_without_prompt": without})
        return alarm.found(seen)

    assert found([-0.1] * 10, 0.2) and "10 steps in a row" in found([-0.1] * 10, 0.2)
    assert not found([-0.1] * 9, 0.2)
    assert not found([-0.1] * 5 + [0.1] + [-0.1] * 9, 0.2)
    assert not found([-0.1] * 12, -0.3)  # the prompt helps, if too little
