"""`tokens.jsonl`: what both models make of every token, under the eyes of plain PyTorch."""

from __future__ import annotations

import importlib
import json

import pytest
import tinylm
import torch
import transformers

from opd_run import diagnose, files

METHODS = ("opd", "sg_opd", "exopd", "topk_opd", "tropd")
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinylm.save_family(tmp_path_factory.mktemp("trace"))


def train(folder, method: str, name: str, *more: str) -> None:
    paths = {"student": "student", "teacher": "teacher", "prompts": "prompts.jsonl"}
    paths |= {"test-prompts": "prompts.jsonl", "run-dir": name}
    flags = [item for flag, to in paths.items() for item in (f"--{flag}", str(folder / to))]
    flags += "--steps 2 --prompts-per-step 3 --rollouts-per-prompt 2 --eval-every 2".split()
    flags += f"--max-completion-tokens {LENGTH} --eval-samples 1 --device cpu --overwrite".split()
    if method == "topk_opd":
        flags += ["--support-size", "4"]
    importlib.import_module(method).main([*flags, *more])


def read(folder, name: str) -> list[dict]:
    lines = (folder / name / "tokens.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_a_row_is_that_of_the_models(folder, method):
    """Before the first update, from logits of `transformers`: both log-probs, support, text."""
    train(folder, method, method)
    rows = read(folder, method)
    lm = {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        for name in ("student", "teacher")
    }
    tokenizer = tinylm.tokenizer()
    first = [row for row in rows if row["step"] == 0 or (row["step"], row["phase"]) == (1, "train")]
    assert {row["phase"] for row in first} == {"eval", "train"}
    for row in first:
        ids, num = row["ids"], len(row["ids"])
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer.encode(shown, add_special_tokens=False)
        with torch.no_grad():
            logp = {
                name: model(torch.tensor([prompt + ids])).logits[0, -num - 1 : -1].log_softmax(-1)
                for name, model in lm.items()
            }
        places = torch.arange(num)
        for name in logp:
            want = logp[name][places, ids].tolist()
            assert row[f"{name}_logp"] == pytest.approx(want, abs=2e-4)
            want = logp[name].gather(1, torch.tensor(row["support_ids"])).tolist()
            for got, wanted in zip(row[f"support_{name}_logp"], want):
                assert got == pytest.approx(wanted, abs=2e-4)
        top = logp["teacher"].topk(diagnose.SUPPORT_SIZE).values
        assert torch.allclose(torch.tensor(row["support_teacher_logp"]), top, atol=2e-4)
        text = "".join(row["pieces"][str(each)] for each in ids).replace(" ", "")
        assert text == row["completion"].replace(" ", "")  # a word-level decoder adds them
        assert {str(each) for row_ids in row["support_ids"] for each in row_ids} <= set(
            row["pieces"]
        )


@pytest.mark.parametrize("method, name", [("sg_opd", "gate"), ("tropd", "accepted")])
def test_what_a_method_logs_of_a_token_is_in_its_rows(folder, method, name):
    train(folder, method, f"logged-{method}")
    rows = [row for row in read(folder, f"logged-{method}") if row["phase"] == "train"]
    assert len(rows) == 2 * diagnose.NUM_TRAINED
    for row in rows:
        assert len(row["logged"][name]) == len(row["ids"]) == len(row["trained"])
    guided = {row["row"] for row in rows if row["num_prefix_tokens"]}
    assert guided == ({0} if method == "tropd" else set())  # the first rollout of each prompt
    seen = {value for row in rows for value in row["logged"][name]}
    prefix = {"nan"}  # neither accepted nor an outlier
    assert seen <= ({1.0, 1.8} if name == "gate" else {0.0, 1.0} | prefix) and seen - prefix


def test_an_evaluation_has_the_same_prompts_before_and_after(folder):
    train(folder, "opd", "pairs")
    rows = [row for row in read(folder, "pairs") if row["phase"] == "eval"]
    by_step = {step: [row["row"] for row in rows if row["step"] == step] for step in (0, 2)}
    assert by_step[0] == by_step[2] == [0, 1, 3, 4, 6, 7, 9, 10]  # 8 of 12, spread


def test_tracing_changes_no_number_and_stops_where_it_is_told_to(folder):
    """Off and cut: the same losses, the same evaluation; what is cut are tokens of the rows."""
    for name, num in (("whole", 512), ("cut", 3), ("off", 0)):
        train(folder, "opd", name, "--diagnostic-tokens", str(num))
    kept = ("loss", "grad_norm", "log_ratio_mean", "eval/student/reverse_kl")
    whole, cut, off = (
        [{k: row[k] for k in kept if k in row} for row in files.read_metrics(folder / name)]
        for name in ("whole", "cut", "off")
    )
    assert whole == cut == off
    long, short, none = (
        [row for row in read(folder, name) if row["phase"] == "train"]
        for name in ("whole", "cut", "off")
    )
    assert none == [] and len(long) == len(short)
    for row, part in zip(long, short):
        assert part["ids"] == row["ids"][:3]
        assert part["logged"]["advantage"] == row["logged"]["advantage"][:3]


def test_resume_drops_rows_that_will_be_written_again(folder):
    train(folder, "opd", "resumed", "--save-every", "1")
    whole = read(folder, "resumed")
    train(folder, "opd", "resumed", "--save-every", "1", "--no-overwrite", "--resume")
    assert read(folder, "resumed") == whole
    later = folder / "resumed/checkpoints/step_2/manifest.json"
    later.write_text("damaged")
    train(folder, "opd", "resumed", "--save-every", "1", "--no-overwrite", "--resume")
    assert read(folder, "resumed") == whole


def test_pieces_keep_the_space_that_sentencepiece_drops():
    class Words:
        def decode(self, ids):
            return "word"

        def convert_ids_to_tokens(self, token_id):
            return ("▁word", "word")[token_id]

    assert [diagnose.piece(Words(), each) for each in (0, 1)] == [" word", "word"]


def test_what_json_has_no_number_for_is_text():
    assert diagnose.rounded([0.12345, float("-inf"), float("nan")]) == [0.1235, "-inf", "nan"]
