"""Make the embedded tiny family `assets/tiny`: tokenizer, prompts and small trained models.

The stages, each skipped when its folder is complete (`--force NAME` makes one again):

    prompts       train.jsonl and test.jsonl, disjoint
    student       1 M parameters, supervised on gold working, stopped while still weak
    teacher_base  2 M parameters, supervised on gold working
    teacher       teacher_base, then GRPO with the verifier on all domains
    expert_*      student, then GRPO with the verifier on one domain

Every model is scored as shipped (bfloat16 file, computed in float32) on all test prompts.

    python tools/make_tiny.py                # everything, two processes with one thread each
    python tools/make_tiny.py --force student
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import torch  # noqa: E402
from tiny_training import (  # noqa: E402
    encode_prompts,
    evaluate,
    gold_rollout,
    grpo_step,
    load_prompts,
    sample,
    supervised_step,
    verify,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY = ROOT / "assets" / "tiny"
DOMAINS = ("add", "sub", "mul")

# ==== Words ====
NAMES = """Ada Aldo Alma Amir Anna Anton Asha Astrid Ben Bela Bruno Carla Cato Chen Clara Cora Dana
Dario Delia Dina Edda Edgar Elena Elias Emil Emma Enzo Erik Esra Eva Fatima Felix Finn Flora Freya
Gina Gita Greta Gustav Hana Hans Heidi Hugo Ida Igor Ines Ingrid Ira Isaac Ivan Jana Jaro Jonas Jun
Juno Kai Kamal Karin Kenji Kira Klara Lars Laura Leif Lena Leo Lina Lola Lucas Luna Mara Marco Maya
Mei Milo Mina Mira Nadia Nico Nina Noor Nora Odin Olga Omar Oscar Otto Pablo Paula Petra Pia Priya
Quinn Rafa Ravi Rita Rosa Ruben Sami Sara Selma Sofia Sven Tara Theo Tim Tomas Uma Ursula Vera
Viktor Vito Wanda Willa Xenia Yara Yuki Yusuf Zara Zeno Zoe""".split()
ADVERBS = """gently slowly calmly neatly boldly bravely briskly warmly kindly gladly firmly lightly
quietly quickly smoothly softly tidily proudly wisely eagerly fondly freshly keenly mildly nicely
openly plainly politely promptly readily safely simply soberly steadily sweetly swiftly tenderly
truly patiently happily""".split()
ADJECTIVES = """amber ancient azure bright broad bronze clever cosy crimson curious eager early
faint fine fresh golden grand green happy hidden humble ivory jolly late lively lucky merry mighty
modest noble pale placid polite proud quiet rare rosy round royal silent silver small snowy sunny
tall tame tidy tiny violet warm wild wise young""".split()
NOUNS = """anchor apron arrow badge barn beacon bell bridge brook candle canoe castle cedar cloud
comet copper crane dawn drum eagle ember falcon feather fern field flute forest fox garden glove
harbor hat hill horn island jar kite lake lamp lantern leaf maple meadow mill mirror moon oak
orchard otter owl path pebble pine pond prairie raven reed ribbon river rope sail shell spoon star
stone summit tower trail valley wagon whale willow window""".split()
THINGS = """apples beads books buttons cards coins cups dolls eggs keys marbles nuts pens pins plums
seeds shells stamps stones tiles""".split()
VERBS = "writes lines sets puts places lays".split()
STARTS = """First Then Next Now Here Again Onward Further Still Also Likewise Thus Well Okay Right
Good Fine Sure Alright Indeed Continue Moving Going Next""".split()
GIVES = "gives makes leaves yields".split()
READS = "Read Reading Result Together".split()


# ==== Problems ====
def draw_problem(domain: str, rng: random.Random) -> tuple[int, int]:
    if domain == "mul":
        return rng.randrange(*rng.choices([(10, 100), (100, 1000)], [2, 3])[0]), rng.randrange(
            2, 10
        )
    a = rng.randrange(*rng.choices([(100, 1000), (1000, 10000)], [7, 3])[0])
    b = rng.randrange(10, 10 ** len(str(a)))
    return (max(a, b), min(a, b)) if domain == "sub" else (a, b)


def key(domain: str, a: int, b: int) -> tuple[str, int, int]:
    return (domain, min(a, b), max(a, b))


def solve(domain: str, a: int, b: int) -> int:
    return {"add": a + b, "sub": a - b, "mul": a * b}[domain]


def word_prompt(domain: str, a: int, b: int, rng: random.Random) -> str:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    forms = {
        "add": (
            f"What is {a} + {b}?",
            f"Add {a} and {b}.",
            f"Find the sum of {a} and {b}.",
            f"{name} has {a} {things} and finds {b} more. How many {things} now?",
        ),
        "sub": (
            f"What is {a} - {b}?",
            f"Subtract {b} from {a}.",
            f"Find {a} minus {b}.",
            f"{name} has {a} {things} and loses {b}. How many {things} are left?",
        ),
        "mul": (
            f"What is {a} x {b}?",
            f"Multiply {a} by {b}.",
            f"Find {b} times {a}.",
            f"{name} fills {b} boxes with {a} {things} each. How many {things}?",
        ),
    }
    return rng.choice(forms[domain])


def word_completion(domain: str, a: int, b: int, rng: random.Random) -> str:
    """Written-out working, lowest digit first, with freely chosen words, then `#### ANSWER`."""
    width = max(len(str(a)), len(str(b)))
    if domain == "mul":
        top, joint, bottom = str(a), "by", str(b)
        width = len(top)
    else:
        top, joint, bottom = str(a).zfill(width), "over", str(b).zfill(width)
    text = f"{rng.choice(NAMES)} {rng.choice(VERBS)} {' '.join(top)} {joint} {' '.join(bottom)}"
    text += f" {rng.choice(ADVERBS)}."
    carry = 0
    for i in range(width):
        x = int(top[-1 - i])
        text += f" {rng.choice(STARTS)} "
        if domain == "mul":
            value = x * b + carry
            text += f"{x} x {b} = {x * b} + {carry} = {value}"
            digit, carry = value % 10, value // 10
        else:
            y, sign = int(bottom[-1 - i]), "+" if domain == "add" else "-"
            value = x + y + carry if domain == "add" else x - y - carry
            text += f"{x} {sign} {y} {sign} {carry}"
            digit, carry = value % 10, abs(value // 10)
        text += f" {rng.choice(GIVES)} {digit}, {'borrow' if domain == 'sub' else 'carry'} {carry}."
    if rng.random() < 0.5:
        text += f" A {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."
    answer = str(solve(domain, a, b))
    return f"{text} {rng.choice(READS)}: {' '.join(answer)}.\n#### {answer}"


def draw_rows(
    num_rows: int,
    rng: random.Random,
    avoid: set[tuple[str, int, int]],
    weights: dict[str, float] | None = None,
    completion: bool = False,
    unique: bool = False,
) -> list[dict[str, str]]:
    rows = []
    for i in range(num_rows):
        domain = DOMAINS[i % 3]
        if weights:
            domain = rng.choices(DOMAINS, [weights[d] for d in DOMAINS])[0]
        a, b = draw_problem(domain, rng)
        while key(domain, a, b) in avoid:
            a, b = draw_problem(domain, rng)
        if unique:
            avoid.add(key(domain, a, b))
        row = {"prompt": word_prompt(domain, a, b, rng), "answer": str(solve(domain, a, b))}
        row["domain"] = domain
        if completion:
            row["completion"] = word_completion(domain, a, b, rng)
        rows.append(row)
    return rows


def held_out_problems() -> set[tuple[str, int, int]]:
    """The problems of the test prompts: drawn again from their seed, they are the first ones."""
    used: set[tuple[str, int, int]] = set()
    draw_rows(NUM_TEST, random.Random(PROMPT_SEED), used, unique=True)
    return used


NUM_TEST, NUM_TRAIN, PROMPT_SEED = 306, 6000, 20


# ==== Tokenizer ====
SPECIALS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"]
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Numbers are cut into two-digit pieces from the right; a piece keeps the space before it.
PIECES = r"▁?\d{1,2}(?=(?:\d\d)*(?!\d))|▁?[A-Za-z]+|\n?#+|▁?[^\sA-Za-z\d▁]|\s|▁"


def make_tokenizer() -> Any:
    """Whole words and two-digit pieces; any other printable ASCII text falls into characters."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
        ]
    )
    pieces = [f"▁{n}" for n in range(100)] + [f"{n:02d}" for n in range(100)] + ["\n####"]
    pieces += [f"▁{n:02d}" for n in range(10)] + ["▁", "\n"] + [chr(c) for c in range(33, 127)]
    words: set[str] = set()
    for row in draw_rows(20_000, random.Random(0), set(), completion=True):
        for text in (row["prompt"], row["completion"]):
            words.update(piece for piece, _ in split.pre_tokenize_str(text))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(SPECIALS + pieces + sorted(words)))}
    wordpiece = models.WordPiece(vocab, unk_token="<|unk|>", continuing_subword_prefix="")
    tokenizer = Tokenizer(wordpiece)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always", split=False)
    build: Any = PreTrainedTokenizerFast
    fast = build(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# ==== Models ====
def make_model(tokenizer: Any, hidden: int, layers: int, mlp: int) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def load(name: str) -> Any:
    """The shipped weights (bfloat16), computed in float32."""
    return AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)


def save(model: Any, tokenizer: Any, name: str) -> None:
    """Complete or absent: written beside its place, then renamed."""
    beside = TINY / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)
    copy: Any = Qwen3ForCausalLM(model.config)
    copy.to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.config.dtype = torch.bfloat16
    settings: Any = GenerationConfig
    copy.generation_config = settings(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(TINY / name, ignore_errors=True)
    beside.rename(TINY / name)


def record(name: str, lines: list[dict[str, Any]]) -> None:
    """Put the lines of one model into log.jsonl, in place of its former ones."""
    path = TINY / "log.jsonl"
    folder = os.open(TINY, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # two stages may end together
    try:
        old = load_prompts(path) if path.exists() else []
        rows = [row for row in old if row["model"] != name] + [{"model": name} | x for x in lines]
        order = {model: i for i, model in enumerate(STAGES)}
        rows.sort(key=lambda row: order[row["model"]])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finally:
        os.close(folder)


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in numbers.items()}


def train_supervised(
    model: Any,
    tokenizer: Any,
    name: str,
    steps: int,
    lr: float,
    batch: int,
    stop_at: float,
    weights: dict[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """Gold working of fresh problems; stops when the sampled accuracy on other fresh problems
    passes `stop_at`."""
    avoid, rng = held_out_problems(), random.Random(seed)
    dev = draw_rows(192, random.Random(seed + 1), avoid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    curve, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50, 4 * (steps - step + 1) / steps)
        rows = draw_rows(batch, rng, avoid, weights, completion=True)
        loss = supervised_step(model, optimizer, gold_rollout(tokenizer, rows))
        if step % 25 == 0 or step == steps:
            line: dict[str, Any] = {"step": step, "loss": round(loss, 4)}
            line |= rounded(evaluate(model, tokenizer, dev, samples=1, seed=seed))
            print(f"{name} {line} {time.perf_counter() - start:.0f} s", flush=True)
            curve.append(line)
            if line["avg"] >= stop_at:
                break
    return curve


def train_grpo(
    model: Any,
    tokenizer: Any,
    name: str,
    steps: int,
    lr: float,
    prompts: int,
    group: int,
    domains: tuple[str, ...],
    stop_at: float,
    seed: int,
) -> list[dict[str, Any]]:
    """GRPO on train.jsonl; learning rate linear to a tenth in the second half; stops when the
    share of right samples in the last five steps passes `stop_at`."""
    rows = [r for r in load_prompts(TINY / "prompts" / "train.jsonl") if r["domain"] in domains]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    curve, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        for slot in optimizer.param_groups:
            slot["lr"] = lr * min(1.0, step / 5, 0.1 + 1.8 * (1 - step / steps))
        picks = torch.randint(len(rows), (prompts,), generator=generator).tolist()
        batch = [rows[i] for i in picks for _ in range(group)]
        ids = encode_prompts(tokenizer, [row["prompt"] for row in batch])
        rollout = sample(model, tokenizer, ids, generator)
        verdict = verify(tokenizer, rollout, [row["answer"] for row in batch])
        grpo_step(model, optimizer, rollout, verdict, group)
        right = (verdict > 0).float().mean().item()
        length = rollout.completion_mask.sum(-1).float().mean().item()
        line: dict[str, Any] = {"step": step} | rounded({"right": right, "length": length})
        print(f"{name} {line} {time.perf_counter() - start:.0f} s", flush=True)
        curve.append(line)
        if step >= 5 and sum(x["right"] for x in curve[-5:]) / 5 >= stop_at:
            break
    return curve


# ==== Stages ====
SUPERVISED: dict[str, dict[str, Any]] = {
    "student": {
        "shape": (128, 4, 480),
        "steps": 1000,
        "lr": 3e-3,
        "batch": 64,
        "stop_at": 0.33,
        "seed": 1,
        "weights": {"add": 1.0, "sub": 1.0, "mul": 1.0},
    },
    "teacher_base": {
        "shape": (192, 4, 640),
        "steps": 640,
        "lr": 2e-3,
        "batch": 64,
        "stop_at": 2.0,
        "seed": 2,
        "weights": {"add": 1.0, "sub": 1.0, "mul": 1.0},
    },
}
GRPO: dict[str, dict[str, Any]] = {
    "teacher": {
        "parent": "teacher_base",
        "steps": 36,
        "lr": 6e-5,
        "stop_at": 0.97,
        "prompts": 32,
        "group": 8,
        "domains": DOMAINS,
        "seed": 3,
    },
    "expert_add": {
        "parent": "student",
        "steps": 90,
        "lr": 4e-4,
        "stop_at": 0.92,
        "prompts": 32,
        "group": 8,
        "domains": ("add",),
        "seed": 4,
    },
    "expert_sub": {
        "parent": "student",
        "steps": 90,
        "lr": 4e-4,
        "stop_at": 0.92,
        "prompts": 32,
        "group": 8,
        "domains": ("sub",),
        "seed": 5,
    },
    "expert_mul": {
        "parent": "student",
        "steps": 90,
        "lr": 4e-4,
        "stop_at": 0.92,
        "prompts": 32,
        "group": 8,
        "domains": ("mul",),
        "seed": 6,
    },
}
STAGES = [*SUPERVISED, *GRPO]
HOW = {
    "student": "supervised on gold working, stopped early",
    "teacher_base": "supervised on gold working",
    "teacher": "`teacher_base`, then GRPO with the verifier on all domains",
    "expert_add": "`student`, then GRPO with the verifier on `add`",
    "expert_sub": "`student`, then GRPO with the verifier on `sub`",
    "expert_mul": "`student`, then GRPO with the verifier on `mul`",
}


def make_prompts() -> None:
    folder = TINY / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    used: set[tuple[str, int, int]] = set()
    test = draw_rows(NUM_TEST, random.Random(PROMPT_SEED), used, unique=True)
    train = draw_rows(NUM_TRAIN, random.Random(PROMPT_SEED + 1), used, unique=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def make(name: str) -> None:
    """One model from its seed: train, save, load what was saved, score it, log it."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    plan = dict(SUPERVISED.get(name) or GRPO[name])
    torch.manual_seed(plan["seed"])
    if name in SUPERVISED:
        model = make_model(tokenizer, *plan.pop("shape"))
        curve = train_supervised(model, tokenizer, name, **plan)
    else:
        model = load(plan.pop("parent"))
        curve = train_grpo(model, tokenizer, name, **plan)
    seconds = time.perf_counter() - start
    save(model, tokenizer, name)
    test = load_prompts(TINY / "prompts" / "test.jsonl")
    score = evaluate(load(name), tokenizer, test, samples=8, seed=0)
    parameters = sum(weight.numel() for weight in model.parameters())
    result = {"parameters": parameters, "minutes": round(seconds / 60, 1), "score": rounded(score)}
    record(name, [*curve, result])
    print(f"{name} {result}", flush=True)


def write_readme() -> None:
    rows = [row for row in load_prompts(TINY / "log.jsonl") if "score" in row]
    table = [
        "| model | parameters | trained by | avg@8 | add | sub | mul | pass@8 | mean length "
        "| truncated | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s = row["score"]
        accuracies = [s[k] for k in ("avg", "avg_add", "avg_sub", "avg_mul", "pass")]
        cells = [f"`{row['model']}`", f"{row['parameters']:,}", HOW[row["model"]]]
        cells += [f"{100 * x:.1f} %" for x in accuracies] + [f"{s['mean_length']:.1f}"]
        cells += [f"{100 * s['truncated']:.1f} %", f"{row['minutes']}"]
        table.append("| " + " | ".join(cells) + " |")
    example = draw_rows(3, random.Random(7), set(), completion=True)
    shown = "\n\n".join(f"{row['prompt']}\n{row['completion']}" for row in example)
    (TINY / "README.md").write_text(README.format(table="\n".join(table), examples=shown))


README = """# The embedded tiny family

Written by `python tools/make_tiny.py`; do not edit. Small trained models (Qwen3 architecture, one
shared tokenizer, bfloat16) for demos, tests and comparisons: a weak student, a strong teacher that
is still wrong now and then, its supervised base, and one expert per domain.

{table}

Scores: the shipped files computed in float32, all 306 test prompts, 8 samples each, temperature 1,
top-p 1, at most 128 completion tokens, seed 0. Minutes: wall time of training on one thread of a
busy two-core machine, without the parent's. `log.jsonl` has the training curves.

Aims: student 20 to 45 %, teacher 85 to 97 % and above `teacher_base`, each expert 90 % in its own
domain. A score outside its aim is what the budget gave.

`prompts/train.jsonl` (6,000) and `prompts/test.jsonl` (306) share no problem: `prompt`, `answer`,
`domain` (`add`, `sub`, `mul`). An output is right if the text after its last `####` is the answer.
Numbers are cut into two-digit pieces from the right, so a model has to learn to spell a number
out and to join the digits of its answer. Words such as names and adverbs are chosen freely: on
average the teacher's 8 likeliest tokens hold about 93 % of its probability, 32 hold 98 %.

Gold working:

```
{examples}
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="NAME",
        choices=STAGES,
        help="make this model again (children of it are not made again)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--stage", choices=STAGES, help="make only this model, in this process")
    args = parser.parse_args(argv)
    if not (TINY / "prompts" / "test.jsonl").exists():
        make_prompts()
    if args.stage:
        return make(args.stage)
    start = time.perf_counter()
    waiting = [name for name in STAGES if name in args.force or not (TINY / name).exists()]
    waiting.sort(key=lambda name: name not in ("teacher_base", "teacher"))  # the longest first
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    total = len(waiting)
    while waiting or running:
        for name in list(waiting):
            parent = GRPO.get(name, {}).get("parent")
            if len(running) < args.jobs and parent not in [*waiting, *running]:
                waiting.remove(name)
                command = [sys.executable, __file__, "--stage", name]
                running[name] = subprocess.Popen(command, env=environment)
        time.sleep(1)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    for other in running.values():
                        other.terminate()
                    sys.exit(f"{name} failed with exit code {process.returncode}")
                done = total - len(waiting) - len(running)
                print(
                    f"{done}/{total} made, {(time.perf_counter() - start) / 60:.0f} min", flush=True
                )
    write_readme()


if __name__ == "__main__":
    main()
