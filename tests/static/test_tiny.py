"""The embedded tiny family is what its table says."""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny  # noqa: E402
import tiny_training  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TINY = ROOT / "assets" / "tiny"
TEST = tiny_training.load_prompts(TINY / "prompts" / "test.jsonl")
TRAIN = tiny_training.load_prompts(TINY / "prompts" / "train.jsonl")
LOG = tiny_training.load_prompts(TINY / "log.jsonl")
SCORES = {row["model"]: row for row in LOG if "score" in row}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "student")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval()


def problem(row: dict[str, str]) -> tuple[str, int, int]:
    a, b = sorted(int(number) for number in re.findall(r"\d+", row["prompt"]))
    return row["domain"], a, b


def test_size() -> None:
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 20 * 2**20


def test_prompts() -> None:
    assert len(TEST) >= 300 and len(TRAIN) >= 3000
    assert (
        {row["domain"] for row in TEST} == {row["domain"] for row in TRAIN} == {*make_tiny.DOMAINS}
    )
    assert not {problem(row) for row in TEST} & {problem(row) for row in TRAIN}
    held_out = make_tiny.held_out_problems()
    for row in TEST + TRAIN:
        domain, a, b = problem(row)
        assert row["answer"] == str({"add": a + b, "sub": b - a, "mul": a * b}[domain])
        assert ((domain, a, b) in held_out) == (row in TEST)


@pytest.mark.parametrize("name", make_tiny.STAGES)
def test_models_load_and_share_the_tokenizer(name: str, tokenizer: Any) -> None:
    model, own = load(name), AutoTokenizer.from_pretrained(TINY / name)
    assert own.get_vocab() == tokenizer.get_vocab() == make_tiny.make_tokenizer().get_vocab()
    assert own.chat_template == tokenizer.chat_template
    assert model.config.vocab_size == len(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == SCORES[name]["parameters"] <= 3_000_000
    assert f"| `{name}` | {parameters:,} |" in (TINY / "README.md").read_text(encoding="utf-8")


def test_tokenizer(tokenizer: Any) -> None:
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    used: set[int] = set()
    for row in make_tiny.draw_rows(1500, random.Random(1), set(), completion=True):
        for text in (row["prompt"], row["completion"]):
            encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(encoded) == text
            assert tokenizer.unk_token_id not in encoded
            used.update(encoded)
        assert 20 <= len(encoded) + 1 <= 120
    assert len(used) >= 256
    odd = "def f(x): return 12345 ** 07\n  ok ~ x"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]) == odd


def test_support_is_a_truncation(tokenizer: Any) -> None:
    """The teacher's probability on its own eight likeliest tokens, over its own completions."""
    teacher = load("teacher")
    prompts = tiny_training.encode_prompts(tokenizer, [row["prompt"] for row in TEST[:60]])
    rollout = tiny_training.sample(teacher, tokenizer, prompts, torch.Generator().manual_seed(0))
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
    with torch.no_grad():
        logits = teacher(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        ).logits[:, rollout.prompt_ids.shape[1] - 1 : -1][rollout.completion_mask]
    teacher_mass = logits.softmax(-1).topk(8).values.sum(-1)  # [N]
    assert teacher_mass.mean() < 0.999


def check_score(name: str, tokenizer: Any, rows: list[dict[str, str]], samples: int) -> None:
    """Another seed than the table's: both means are noisy. The variance between prompts is part
    of p (1 - p), which bounds it for one sample per prompt; four standard deviations."""
    said = SCORES[name]["score"]["avg"]
    got = tiny_training.evaluate(load(name), tokenizer, rows, samples, seed=1)["avg"]
    deviation = (said * (1 - said) / len(rows)) ** 0.5
    assert abs(got - said) < 4 * deviation, f"{name}: {got:.3f}, the table says {said:.3f}"


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_score_quick(name: str, tokenizer: Any) -> None:
    check_score(name, tokenizer, TEST, samples=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", make_tiny.STAGES)
def test_score_of_the_table(name: str, tokenizer: Any) -> None:
    """Same seed, same samples: equal up to rounding of another machine's arithmetic."""
    score = SCORES[name]["score"]
    got = tiny_training.evaluate(load(name), tokenizer, TEST, 8, seed=0)
    for key, value in got.items():
        assert got[key] == pytest.approx(score[key], abs=0.02 if "mean" not in key else 1.0), value


def test_table_shows_the_log() -> None:
    text = (TINY / "README.md").read_text(encoding="utf-8")
    for name, row in SCORES.items():
        line = next(x for x in text.splitlines() if x.startswith(f"| `{name}` |"))
        for key in ("avg", "avg_add", "avg_sub", "avg_mul", "pass"):
            assert f" {100 * row['score'][key]:.1f} % " in line
    assert set(SCORES) == set(make_tiny.STAGES)
    assert 0.20 <= SCORES["student"]["score"]["avg"] <= 0.45
    assert SCORES["teacher_base"]["score"]["avg"] < SCORES["teacher"]["score"]["avg"]


def test_verifier(tokenizer: Any) -> None:
    texts = ["x\n#### 643", "643", "#### 1\n#### 643", "#### 64 3"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completion, mask = tiny_training.pad(ids, tokenizer.pad_token_id, left=False)
    rollout = tiny_training.Rollout(completion[:, :0], mask[:, :0], completion, mask)
    assert tiny_training.verify(tokenizer, rollout, ["643"] * 4).tolist() == [1, -1, 1, -1]


def test_log_is_plain_json() -> None:
    for line in (TINY / "log.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["model"] in make_tiny.STAGES
