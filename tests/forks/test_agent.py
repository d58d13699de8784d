"""forks/agent_opd.py: masks by hand, what goes on after an observation, and the gradient."""

from __future__ import annotations

import json
from itertools import product

import agent_opd
import pytest
import tinylm
import torch
from tablelm import TableLM, all_completions, expected_gradient, rollout_of

from opd_run import environments, rollouts
from opd_run.console import RunError

VOCAB = 3
SAYS = (2, 0, 1)  # the token that the environment answers to each token
GAME = """class Game:
    def reset(self, row):
        return "go"
    def step(self, text):
        if getattr(self, "before", None) is not None:
            return "", True, text < self.before
        self.before = text
        return f"you said {text}", False, False
"""


class Echo:
    """Says SAYS[a] to the first token a, and is done after the second."""

    def reset(self, row):
        self.num = 0
        return ""

    def step(self, text):
        self.num += 1
        return str(SAYS[int(text)]), self.num == 2, int(text) == 2


TOLD = tinylm.Verdicts(lambda items: [2.0 * row["success"] - 1.0 for _, _, row, _ in items])


class Digits:
    """A tokenizer of the digits."""

    chat_template = None

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(map(str, row.tolist())) for row in rows]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(str, ids))

    def encode(self, text, add_special_tokens=False):
        return [int(each) for each in text.strip()]


def played(monkeypatch, actions: list[tuple[int, int]]):
    """The rollouts of `generate` in which the model takes these two actions, one token each."""
    args = agent_opd.parse_args(["--max-turn-tokens", "1"])
    begun: list[list[tuple[int, ...]]] = []

    def sample(model, prompts, uniform, args, how, prefixes):
        begun.append(list(prefixes))
        width = uniform.shape[1]
        out = rollouts.blank(agent_opd.Rollout, prompts, width, model.device)
        out.completion_ids, out.prefix_mask = rollouts.right_padded(prefixes, width, model.device)
        for row, prefix in enumerate(prefixes):
            out.completion_ids[row, len(prefix)] = actions[row][len(begun) - 1]
            out.completion_mask[row, : len(prefix) + 1] = True
            out.response_mask[row, len(prefix)] = True
        return out

    monkeypatch.setattr(agent_opd, "sample", sample)
    monkeypatch.setattr(agent_opd, "environments_of", lambda args: Echo)
    models = {"student": TableLM(VOCAB, 3, 1)}
    prompts = [agent_opd.Prompt((0,), "", "", "", {})] * len(actions)
    uniform = torch.zeros(len(actions), 5)
    how = (1.0, 1.0, 0)
    out = agent_opd.generate(models, "student", prompts, uniform, args, how, Digits(), TOLD)
    return out, begun


ACTIONS = list(product(range(VOCAB), repeat=2))


def test_a_rollout_is_turn_observation_turn(monkeypatch):
    out, begun = played(monkeypatch, ACTIONS)
    want = torch.tensor([[a, SAYS[a], b] for a, b in ACTIONS])
    assert torch.equal(out.completion_ids, want)
    assert begun == [[()] * 9, [(a, SAYS[a]) for a, _ in ACTIONS]]
    turns = torch.tensor([[1.0, 0.0, 2.0]]).expand(9, 3)
    assert torch.equal(out.response_mask, turns > 0)
    assert torch.equal(out.extra["turn"], turns)
    assert out.completion_mask.all() and not out.prefix_mask.any() and out.ended.all()
    assert len(set(map(id, out.prompts))) == 1, "a group has one prompt object"
    assert (out.verdict > 0).tolist() == [b == 2 for _, b in ACTIONS]


def test_gradient_is_the_reverse_kl_of_the_turns(monkeypatch):
    """At the first prefix, and at that of the second turn, which the first action decides."""
    out, _ = played(monkeypatch, ACTIONS)
    student, teacher = TableLM(VOCAB, 3, 1), TableLM(VOCAB, 3, 2)
    args = agent_opd.parse_args([])
    logp, teacher_logp = (each.logp(out.completion_ids) for each in (student, teacher))
    token_logp = student.token_logp(out.completion_ids).detach()
    probs = token_logp[:, [0, 2]].sum(1).exp()  # the environment's token is certain

    def loss(i: int) -> torch.Tensor:
        one = rollouts.select(out, torch.tensor([i]))
        scores = agent_opd.score({"teacher": teacher}, one, args)
        return agent_opd.token_loss(student, one, scores, args)[0]

    divergence = (logp.exp() * (logp - teacher_logp.detach())).sum(-1)[:, [0, 2]]
    want = torch.autograd.grad((probs[:, None] * divergence).sum(), student.table)[0]
    found = expected_gradient(student, probs, loss)
    assert torch.allclose(found, want, atol=1e-6)
    reached = student.prefix_index(all_completions(VOCAB, 3))[:, 1].unique()  # before observations
    assert found[reached].abs().max() == 0


def test_one_turn_is_opd():
    """Everything in one turn: the loss of opd.py."""
    import opd

    student, teacher = TableLM(VOCAB, 3, 1), TableLM(VOCAB, 3, 2)
    found = []
    for module in (agent_opd, opd):
        rollout = rollout_of(module, all_completions(VOCAB, 3), extra={"turn": torch.ones(27, 3)})
        args = module.parse_args([])
        scores = module.score({"teacher": teacher}, rollout, args)
        loss, _ = module.token_loss(student, rollout, scores, args)
        found.append(torch.autograd.grad(loss, student.table)[0])
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tinylm.save_family(tmp_path_factory.mktemp("agent"))
    (folder / "game.py").write_text(GAME)
    return folder


def flags(folder, *more: str) -> list[str]:
    paths = {"--student": "student", "--teacher": "teacher", "--prompts": "prompts.jsonl"}
    paths |= {"--run-dir": "run", "--test-prompts": "prompts.jsonl"}
    named = [item for flag, name in paths.items() for item in (flag, str(folder / name))]
    sizes = "--max-turn-tokens 4 --max-completion-tokens 40 --prompts-per-step 2 --steps 2"
    few = "--rollouts-per-prompt 2 --eval-every 2 --eval-samples 2 --device cpu --overwrite"
    game = f"--environment {folder / 'game.py'}:Game"
    return [*named, *sizes.split(), *few.split(), *game.split(), *more]


def test_turns_of_a_real_model(folder):
    """Its log-probs over the whole are those that it sampled with, so the cache and the reading
    anew agree; an observation is in the chat format and untrained."""
    args = agent_opd.parse_args(flags(folder))
    models, tokenizer = tinylm.load(agent_opd, args)
    source = agent_opd.data.source_of(args.prompts, 0, args)
    prompts = agent_opd.data.load(
        source, lambda row, of: agent_opd.make_prompt(row, of, tokenizer, args)
    )[:6]
    uniform = agent_opd.uniforms(6, "rollouts", 0, args)
    how = (1.0, 1.0, 0)
    out = agent_opd.generate(models, "student", prompts, uniform, args, how, tokenizer, TOLD)
    logp = agent_opd.token_logp(models["student"], out, args)
    mask = out.response_mask
    assert mask.any() and torch.allclose(logp[mask], out.behaviour_logp[mask], atol=1e-4)
    for row in range(6):
        assert "go" in tokenizer.decode(out.prompts[row].ids).replace(" ", "")
        ids, turn = out.completion_ids[row], out.extra["turn"][row]
        first, between = ids[turn == 1].tolist(), ids[out.completion_mask[row] & (turn == 0)]
        assert 1 <= len(first) <= 4 and (turn == 2).any()
        said = tokenizer.decode(first, skip_special_tokens=True)
        text = tokenizer.decode(between).replace(" ", "")
        assert text == f"<user>yousaid{said}<bot>".replace(" ", "")
    again = agent_opd.generate(
        models, "student", prompts[:2], uniform[:2], args, how, tokenizer, TOLD
    )
    width = again.completion_ids.shape[1]
    assert torch.equal(again.completion_ids, out.completion_ids[:2, :width])


def test_a_turn_ends_once(folder):
    """The end that the chat format writes after a turn is not repeated after the model's own."""
    args = agent_opd.parse_args(flags(folder))
    tokenizer = tinylm.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<end>"
        "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}<bot>"
    )
    end, word = tokenizer.convert_tokens_to_ids(["<end>", "a"])
    said = tokenizer.encode("<user>no<bot>")
    for last, want in ((end, said), (word, [end, *said])):
        game = agent_opd.Game(None, ids=[word, last], size=2)
        game.hear("no", tokenizer, args)
        assert game.ids[2:] == want and game.trained == [False] * len(want)


def test_a_template_that_leaves_out_turns_is_refused(folder):
    args = agent_opd.parse_args(flags(folder))
    tokenizer = tinylm.tokenizer()
    assert not agent_opd.check_method_data(tokenizer, [], None, args)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    (said,) = agent_opd.check_method_data(tokenizer, [], None, args)
    assert "--chat-template" in said


def test_a_long_prompt_of_reset_is_refused(folder, capsys):
    """It would run beyond the positions of the models; prompts of the file are checked before."""
    (folder / "long.py").write_text(GAME.replace('"go"', '"go " * 40'))
    game = f"--environment={folder / 'long.py'}:Game"
    with pytest.raises(SystemExit) as stop:
        agent_opd.main(flags(folder, game, "--max-prompt-tokens=30"))
    assert stop.value.code == 2
    assert "--environment: a prompt with what reset says has" in capsys.readouterr().err


def test_a_run_logs_turns_and_success(folder):
    agent_opd.main(flags(folder))
    rows = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["turns_mean"] == 2.0 and row["num_untrained_tokens"] > 0
        assert row["in_turn_1_mean"] + row["in_turn_2_mean"] == pytest.approx(1.0)
        both = row["log_ratio_in_turn_1_mean"] + row["log_ratio_in_turn_2_mean"]
        assert both == pytest.approx(row["log_ratio_mean"], abs=1e-5)
    assert any("eval/student/avg@2" in row for row in rows)


def test_bad_environments_are_refused(folder):
    half = "class Half:\n    def reset(self, row): return ''\n"
    full = GAME.replace("Game", "Full") + "    def __init__(self, path): pass\n"
    (folder / "half.py").write_text(f"{half}{full}{GAME}game = Game()\n")
    words = {"Half": "no method step", "Full": "argument: 'path'", "game": "is no class"}
    specs = {f"{folder / 'half.py'}:{name}": word for name, word in words.items()}
    for spec, word in ({"nowhere:X": "nowhere"} | specs).items():
        with pytest.raises(RunError, match=word) as stop:
            agent_opd.parse_args(["--environment", spec])
        assert stop.value.code == 2


def test_the_verdict_is_the_environments():
    with pytest.raises(RunError, match="--verifier: the verdict is the environment's success"):
        agent_opd.parse_args(["--verifier", "math"])


WORDS = """import numpy
class Says:
    def reset(self, row): return row.get("first")
    def step(self, text): return eval(text)
"""


def test_what_an_environment_says_is_checked(folder):
    """numpy's bool and None are words; what Python would read as true, or as text, is none."""
    (folder / "says.py").write_text(WORDS)
    made = environments.of(f"{folder / 'says.py'}:Says")
    game = made()
    assert game.reset({}) == "" and game.reset({"first": "go"}) == "go"
    assert game.step("'x', numpy.bool_(True), None") == ("x", True, False)
    assert game.step("[None, 0, numpy.bool_(True)]") == ("", False, True)
    bad = {"'x', 1.0, False, False, {}": "expected .observation, done, success.", "'xyz'": "xyz"}
    bad |= {"5, False, False": "step said 5; expected text", "b'x', True, True": "expected text"}
    bad |= {"'a half' + chr(0xD83D), False, False": "step said 'a half.ud83d'; expected text"}
    bad |= {"'x', 'no', True": "done: returned str", "'x', False, 'False'": "success: returned str"}
    for text, word in bad.items():
        with pytest.raises(RunError, match=rf"--environment .*says.py:Says: ?.*{word}"):
            game.step(text)
    with pytest.raises(RunError, match=r"reset said .*expected text"):
        game.reset({"first": [{"role": "user", "content": "go"}]})
    again = environments.of(f"{folder / 'says.py'}:Says")
    assert again is made, "a file is executed once"
