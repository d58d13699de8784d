"""One whole training step, ours against TRL's: same models, prompts, lengths and settings.

    make bench-step                               # equality, then time, in .venv-trl
    python benchmarks/bench_step.py --vocab 512 --completion 64 256
    python benchmarks/bench_step.py --equality    # loss and gradient on one batch, no timing
    git worktree add --detach ../before 905645f   # version 0.1; build its ops there, in place
    python benchmarks/bench_step.py --vocab 151936 --before ../before   # ours then and now
    make gpu                                      # Qwen3-0.6B <- 1.7B shapes, by benchmarks/gpu.py

A step is: sample rollouts, teacher, student's forward and backward pass, optimizer. Each
implementation lives in a process of its own; they take turns, one step each, so that all meet the
same machine, and memory is theirs alone (on a GPU, which they share: one after the other). The
models are random: time and memory do not ask what a model knows. No rollout ends early: all have
exactly `--completion` tokens. Gradient checkpointing (TRL's default) is off everywhere (by gpu.py:
on everywhere), `lmbda` is 1 (all on-policy), the learning rate is constant.

Rows go to benchmarks/results/step.csv, step_equality.csv and, of two trees in turn (`--before`,
which needs no TRL and knows no limit of memory), step_before.csv. A case with rows of this commit
is skipped unless --again. `peak_mib` is the rise over the process after its imports; an
implementation that needs more than --memory-limit-gib fails, and its row says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
from rows import (  # noqa: E402
    RESULTS,
    append,
    commit_of,
    environment,
    failure,
    read,
    resident,
    restart_peak,
)

PROMPT, ANSWER = 32, 8  # tokens of a prompt, and of the answer that the data set has for it
LR, BETA2 = 1e-5, 0.95
OBJECTIVES = ("sampled", "reverse", "jsd")
TRAINERS = ("GKDTrainer", "DistillationTrainer")
BETAS = {"reverse": 1.0, "jsd": 0.5}  # TRL's name of a divergence
LAWS = [  # divergence, beta, temperature, of --equality: a beta of 0.5 would hide swapped models
    ("reverse", 1.0, 1.0),
    ("forward", 0.0, 1.0),
    ("jsd", 0.2, 1.0),
    ("reverse", 1.0, 0.7),
    ("jsd", 0.2, 0.7),
]
ARMS = [("opd.py", "sampled")]
ARMS += [(who, what) for what in ("reverse", "jsd") for who in ("opd.py", *TRAINERS)]


def shape(hidden: int, inner: int, heads: int, kv: int, layers: int, dim: int) -> dict[str, Any]:
    """Of a Qwen3 with random weights; their size leaves the two models clearly apart."""
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv, "num_hidden_layers": layers, "head_dim": dim,
        "initializer_range": 1.1 / hidden**0.5, "max_position_embeddings": 4096,
        "eos_token_id": None,
    }  # fmt: skip


SHAPES = {  # of student and teacher: as in assets/tiny; as Qwen3-0.6B and Qwen3-1.7B
    "cpu": (shape(128, 480, 4, 2, 4, 32), shape(192, 640, 6, 2, 4, 32)),
    "cuda": (shape(1024, 3072, 16, 8, 28, 128), shape(2048, 6144, 16, 8, 28, 128)),
}
IMPORTS = (  # of every process, so that all count memory from the same base
    "opd",
    "datasets",
    "trl.experimental.gkd.gkd_trainer",
    "trl.trainer.distillation_trainer",
)
SIZES = ("vocab", "completion", "rollouts")
STEP_COLUMNS = (
    "implementation,objective,vocab,completion,rollouts,prompt,dtype,total_s,generate_s,teacher_s,"
    "student_s,every_total_s,peak_mib,num_tokens,divided_by,failed,num_threads,load,device,torch,"
    "transformers,trl,commit,dirty,date,command"
)
EQUALITY_COLUMNS = (
    "implementation,objective,beta,temperature,vocab,completion,rollouts,num_tokens,loss,"
    "loss_difference,gradient_difference,loss_error,gradient_error,num_threads,device,torch,"
    "transformers,trl,commit,dirty,date,command"
)


# ==== what all share ====


def make_inputs(folder: Path, case: argparse.Namespace) -> None:
    """Two random models with one vocabulary, and prompts of PROMPT tokens (fewer with `ragged`).

    With `case.made_on_device` the folders have no weights: `random_weights` makes them."""
    import tinylm

    words = tinylm.WORDS + [f"w{i}" for i in range(case.vocab - len(tinylm.WORDS))]
    for seed, (role, config) in enumerate(zip(("student", "teacher"), SHAPES[case.device])):
        if case.made_on_device:
            tinylm.save_config(folder / role, vocab=case.columns, words=words, **config)
        else:
            tinylm.save_model(folder / role, seed, words=words, **config)
    chance = random.Random(0)
    rows = []
    for number in range(case.rollouts * 4):
        length = PROMPT - 2 - (5 * number % 16 if case.ragged else 0)  # the template has two tokens
        text = "".join(chance.choices("0123456789abcdefghijklmnopqrstuvwxyz", k=length))
        rows.append(json.dumps({"prompt": text, "answer": text[:ANSWER]}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(rows))


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """`from_pretrained` of a folder without weights makes random ones, on the device."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    load = auto.from_pretrained

    def make(path: Any, config: Any = None, dtype: Any = None, **how: Any) -> Any:
        torch.manual_seed(0 if str(path).endswith("student") else 1)
        with torch.device(device):
            made = auto.from_config(config or transformers.AutoConfig.from_pretrained(path),
                                    dtype=dtype)  # fmt: skip
        made.eval()  # as from_pretrained does
        nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (made, nothing) if how.get("output_loading_info") else made

    auto.from_pretrained = make
    try:
        yield
    finally:
        auto.from_pretrained = load


def our_args(folder: Path, case: argparse.Namespace, objective: str) -> argparse.Namespace:
    """Arguments of methods/opd.py."""
    import opd

    argv = ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    argv += ["--prompts", f"{folder}/prompts.jsonl", "--device", case.device]
    argv += ["--prompts-per-step", str(case.rollouts), "--rollouts-per-prompt", "1"]
    argv += ["--max-completion-tokens", str(case.completion), "--lr", str(LR)]
    if objective != "sampled":
        argv += ["--objective", "full", "--divergence", objective]
    if case.checkpointing:
        argv += ["--gradient-checkpointing"]
    args: argparse.Namespace = opd.parse_args([*argv, "--adam-beta2", str(BETA2)])
    return args


def load_ours(folder: Path, case: argparse.Namespace, objective: str) -> tuple[Any, ...]:
    """Arguments, tokenizer, models and prompts of methods/opd.py."""
    import opd

    from opd_run import setup

    args = our_args(folder, case, objective)
    models, tokenizer, facts = setup.models_of(opd, args)
    for model in models.values():
        model.facts = dataclasses.replace(facts, eos_ids={})  # nothing ends a rollout
    prompts = setup.prompts_of(opd, args.prompts, tokenizer, facts, args)
    return args, tokenizer, models, prompts


def load_student(args: argparse.Namespace) -> Any:
    """The model that is trained, alone; nothing ends a rollout. And its tokenizer."""
    import opd

    from opd_run import setup

    models, tokenizer, facts = setup.models_of(opd, args, {"student": args.student})
    models["student"].facts = dataclasses.replace(facts, eos_ids={})
    return models["student"], tokenizer


def warm_up(student: Any, teacher: Any, device: str) -> None:
    """A few tokens through two models: libraries are loaded and kernels chosen, on a GPU."""
    import torch

    ids = torch.zeros(4, 8, dtype=torch.int64, device=device)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.autocast(device, kind, device == "cuda"):
        how = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "eos_token_id": None}
        student.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        student(ids).logits.float().logsumexp(-1).sum().backward()
        with torch.no_grad():
            teacher(ids)
    student.zero_grad()


def load_trl(folder: Path, case: argparse.Namespace, who: str, objective: str) -> Any:
    """One of TRL's trainers, with the settings of `load_ours`."""
    import datasets
    import opd
    import torch
    import transformers
    import trl
    import trl.experimental.gkd

    cuda = case.device == "cuda"
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    student = load(folder / "student")
    teacher = load(folder / "teacher", **({"dtype": torch.bfloat16} if cuda else {}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": case.rollouts,
        "max_steps": case.warm_up + case.rounds + 1, "learning_rate": LR, "adam_beta2": BETA2,
        "lr_scheduler_type": "constant", "gradient_checkpointing": case.checkpointing, "bf16": cuda,
        "use_cpu": not cuda, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "beta": BETAS[objective], "temperature": 1.0,
    }  # fmt: skip
    rows = []
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = opd.render(tokenizer, row["prompt"], opd.parse_args([]))
        ids, answer = tokenizer.encode(text), tokenizer.encode(row["answer"])
        mask = [0] * len(ids) + [1] * len(answer)
        rows.append({"prompt": text, "input_ids": ids + answer, "completion_mask": mask})
    if who == "GKDTrainer":
        config = trl.experimental.gkd.GKDConfig(
            **settings, lmbda=1.0, max_new_tokens=case.completion
        )
        kind = trl.experimental.gkd.GKDTrainer
    else:
        how = {
            "max_completion_length": case.completion,
            "generation_kwargs": {"eos_token_id": None},
        }
        config, kind = trl.DistillationConfig(**settings, **how), trl.DistillationTrainer
        rows = [{"prompt": row["prompt"]} for row in rows]
    trainer = kind(
        model=student, teacher_model=teacher, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.eos_token_ids = [-1]  # DistillationTrainer cuts completions there: never
    return trainer


class Clock:
    """Seconds by phase, and the peak of memory, of the step between `begin` and `end`."""

    def __init__(self, pipe: Any, device: str) -> None:
        import torch

        self.pipe, self.cuda = pipe, torch.cuda if device == "cuda" else None
        self.phases: dict[str, float] = {}
        self.start, self.base = 0.0, resident("VmRSS")

    def now(self) -> float:
        """After what the GPU still has to do."""
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """Wait for one's turn."""
        self.pipe.recv()
        self.phases = {"generate": 0.0, "teacher": 0.0}
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        else:
            restart_peak()
        self.start = self.now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        start = self.now()
        yield
        self.phases[name] += self.now() - start

    def end(self, num_tokens: int, divided_by: int) -> None:
        """Report the step."""
        total = self.now() - self.start
        peak = self.cuda.max_memory_allocated() if self.cuda else resident("VmHWM") - self.base
        student = total - self.phases["generate"] - self.phases["teacher"]
        self.pipe.send(
            {f"{name}_s": value for name, value in self.phases.items()}
            | {"student_s": student, "total_s": total, "peak_mib": peak / 2**20}
            | {"num_tokens": num_tokens, "divided_by": divided_by}
        )


# ==== the steps ====


class Unverified:
    """A verifier that has no verdict on anything."""

    judges_cut = True

    def ahead(self, items: Any) -> None:
        pass

    def __call__(self, items: Any) -> list[float]:
        return [0.0] * len(items)


def run_ours(clock: Clock, folder: Path, case: argparse.Namespace, objective: str) -> None:
    """The main loop of methods/opd.py, without verifier, diagnostics and log."""
    import opd

    from opd_run import retry

    args, tokenizer, models, prompts = load_ours(folder, case, objective)
    optimizer = opd.make_optimizer(models["student"], args)
    if case.made_on_device:
        warm_up(models["student"].lm, models["teacher"].lm, case.device)

    for step in range(case.warm_up + case.rounds):
        chosen = opd.prompts_of_step(prompts, step, args)
        clock.begin()
        with clock.phase("generate"):
            rollout, _ = opd.collect(models, tokenizer, Unverified(), chosen, args, step)
        with clock.phase("teacher"):
            batch = [
                (micro, opd.score(models, micro, args))
                for micro in retry.micro_batches(rollout, args)
            ]
        opd.train_step(models["student"], optimizer, batch, args, step)
        num_tokens = int(rollout.trained_mask.sum())
        clock.end(num_tokens, num_tokens)


def run_trl(clock: Clock, folder: Path, case: argparse.Namespace, who: str, objective: str) -> None:
    """`trainer.train()`, timed from outside."""
    import transformers

    trainer = load_trl(folder, case, who, objective)
    if case.made_on_device:
        warm_up(trainer.model, trainer.teacher_model, case.device)
    generate, compute_loss = trainer.model.generate, trainer.compute_loss
    tokens: dict[str, int] = {}

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        with clock.phase("generate"):
            return generate(*args, **kwargs)

    def watched_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"]
        items = inputs.get("num_items_in_batch", kwargs.get("num_items_in_batch"))
        tokens.update(num_tokens=int(found.sum()), divided_by=int(items))
        return compute_loss(model, inputs, *args, **kwargs)

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.model.generation_config.eos_token_id = None  # `train` takes the tokenizer's
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end(**tokens)

    starts: list[float] = []
    trainer.model.generate, trainer.compute_loss = timed_generate, watched_loss
    trainer.teacher_model.register_forward_pre_hook(lambda *_: starts.append(clock.now()))
    trainer.teacher_model.register_forward_hook(
        lambda *_: clock.phases.update(teacher=clock.phases["teacher"] + clock.now() - starts.pop())
    )
    trainer.add_callback(Turns())
    trainer.train()


def work(pipe: Any, folder: Path, case: argparse.Namespace, who: str, objective: str) -> None:
    """A process: one implementation, one step at each word from the parent."""
    import transformers

    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # transformers and trl wrap it in the latter
            if who != "opd.py" or not case.go_on:
                pipe.send({"failed": f"{name} cannot be imported: {failure(error)}"})
                return
            print(f"{name} cannot be imported: {failure(error)}", flush=True)
    sys.stdout = open(os.devnull, "w")  # the parent reports
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if case.device == "cpu":
        limit = resident("VmData") + int(case.memory_limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    clock = Clock(pipe, case.device)
    try:
        with random_weights(case.device) if case.made_on_device else nullcontext():
            if who == "opd.py":
                run_ours(clock, folder, case, objective)
            else:
                run_trl(clock, folder, case, who, objective)
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and "memory" in f"{error!r}".lower():
            limit = f" at {case.memory_limit_gib:g} GiB" if case.device == "cpu" else ""
            pipe.send({"failed": f"out of memory{limit}"})
            return
        if case.go_on:
            pipe.send({"failed": failure(error)})
        raise


def work_of_tree(
    pipe: Any, folder: Path, case: argparse.Namespace, which: str, objective: str
) -> None:
    """A process: methods/opd.py of a checkout, by that checkout's own bench_step.py."""
    tree = case.trees[which]
    sys.path[:0] = [str(tree / name) for name in (".", "methods", "tests", "benchmarks")]
    for name in ("rows", "bench_step"):  # this tree's
        sys.modules.pop(name, None)
    theirs = importlib.import_module("bench_step")
    for name in ("opd", "opd_ops"):
        place = importlib.import_module(name).__file__ or ""
        if not Path(place).is_relative_to(tree):
            raise SystemExit(f"{name} of {tree} came from {place}")
    sys.stdout = open(os.devnull, "w")  # the parent reports
    theirs.run_ours(Clock(pipe, case.device), folder, case, objective)


def measure(folder: Path, case: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one case: all implementations in turn; on a GPU one after the other."""
    make_inputs(folder, case)
    context = multiprocessing.get_context("spawn")
    arms = case.arms
    pipes, workers = {}, {}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {arm: [] for arm in arms}
    for arm in arms:
        pipes[arm], end = context.Pipe()
        target = work_of_tree if case.trees else work
        worker = context.Process(target=target, args=(end, folder, case, *arm), daemon=True)
        workers[arm] = worker
        worker.start()
        end.close()
    steps = range(case.warm_up + case.rounds)
    turns = [(arm, step) for step in steps for arm in arms]
    if case.device == "cuda":
        turns.sort(key=lambda turn: arms.index(turn[0]))
    for arm, step in turns:
        if arm not in pipes:
            continue
        try:
            with suppress(OSError):  # one that has ended may have said why
                pipes[arm].send("step")
            if pipes[arm].poll(case.limit_s):
                report = pipes[arm].recv()
            else:
                report = {"failed": f"not done after {case.limit_s} s"}
        except (EOFError, OSError):
            if not case.go_on:
                raise SystemExit(f"{arm}: its process died") from None
            report = {"failed": "its process died"}
        if "failed" in report:
            found[arm] = [report]
        elif report["num_tokens"] != case.rollouts * case.completion:
            raise SystemExit(f"{arm}: rollouts ended early: {report['num_tokens']} tokens")
        elif step >= case.warm_up:
            found[arm].append(report)
        print(step, *arm, {k: v if k == "failed" else round(v, 2) for k, v in report.items()})
        if "failed" in report or step == steps[-1]:
            del pipes[arm]
            workers[arm].kill()
            workers[arm].join()
            yield row_of(case, arm, found[arm])


def row_of(case: argparse.Namespace, arm: tuple[str, str], steps: list[dict[str, Any]]) -> Any:
    """The row of an implementation, from the reports of its steps."""
    row: dict[str, Any] = dict(zip(("implementation", "objective"), arm))
    row |= {key: getattr(case, key) for key in SIZES}
    row |= {"prompt": PROMPT, "dtype": "bfloat16" if case.device == "cuda" else "float32"}
    if "failed" in steps[0]:
        return row | steps[0]
    for key in ("total_s", "generate_s", "teacher_s", "student_s"):
        row[key] = f"{statistics.median(step[key] for step in steps):.4f}"
    row["every_total_s"] = " ".join(f"{step['total_s']:.4f}" for step in steps)
    row["peak_mib"] = round(max(step["peak_mib"] for step in steps))
    return row | {key: steps[0][key] for key in ("num_tokens", "divided_by")}


# ==== equality ====


def compare(pipe: Any, folder: Path, case: argparse.Namespace) -> None:
    """Loss and gradient of each implementation on one ragged batch, and their error."""
    import opd
    import torch
    import transformers

    from opd_run import retry

    transformers.utils.logging.set_verbosity_error()
    args, tokenizer, models, prompts = load_ours(folder, case, "reverse")
    rollout, _ = opd.collect(models, tokenizer, Unverified(), prompts[: case.rollouts], args, 0)
    for row in range(case.rollouts):  # completions of different lengths
        rollout.completion_mask[row, case.completion - 7 * row :] = False
    rollout.completion_ids[~rollout.completion_mask] = 0
    rollout.response_mask = rollout.completion_mask.clone()
    num_tokens = int(rollout.trained_mask.sum())
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    labels = ids.clone()
    labels[:, : rollout.prompt_ids.shape[1]] = -100
    attention_mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    labels[~attention_mask] = -100
    gkd, chunked = (load_trl(folder, case, who, "jsd") for who in TRAINERS)
    exact = [load_double(folder / name) for name in ("student", "teacher")]

    def ours() -> Any:
        student, losses = models["student"], []
        for micro in retry.micro_batches(rollout, args):
            losses.append(opd.token_loss(student, micro, opd.score(models, micro, args), args)[0])
        return sum(losses)

    for objective, beta, temperature in LAWS:
        args.divergence, args.loss_temperature = objective, temperature
        args.jsd_beta = beta
        for trainer in (gkd, chunked):
            trainer.beta, trainer.temperature = beta, temperature
            trainer.model.train()
        calls: dict[str, tuple[Any, Callable[[], Any]]] = {
            "float64": (
                exact[0],
                lambda: plain_divergence(exact, rollout, args) / num_tokens,
            ),
            "opd.py": (models["student"].lm, lambda: ours() / num_tokens),
            "GKDTrainer": (
                gkd.model,
                lambda: gkd.compute_loss(
                    gkd.model,
                    {"input_ids": ids, "attention_mask": attention_mask.long(),
                     "labels": labels},
                ),
            ),
            "DistillationTrainer": (
                chunked.model,
                lambda: chunked.compute_loss(
                    chunked.model,
                    {"prompt_ids": rollout.prompt_ids, "prompt_mask": rollout.prompt_mask.long(),
                     "completion_ids": rollout.completion_ids,
                     "completion_mask": rollout.completion_mask.long()},
                    num_items_in_batch=num_tokens,
                ),
            ),
        }  # fmt: skip
        losses, gradients = {}, {}
        for name, (model, call) in calls.items():
            model.zero_grad()
            loss = call()
            loss.backward()
            losses[name] = float(loss.detach())
            gradients[name] = torch.cat([w.grad.double().flatten() for w in model.parameters()])
            model.zero_grad()

        for name in ("opd.py", *TRAINERS):
            found: dict[str, Any] = {"implementation": name, "objective": objective, "beta": beta}
            found |= {"temperature": temperature, "num_tokens": num_tokens}
            found["loss"] = f"{losses[name]:.9g}"
            for other, kind in (("opd.py", "difference"), ("float64", "error")):
                truth = gradients[other]
                found[f"loss_{kind}"] = f"{abs(losses[name] - losses[other]):.2e}"
                found[f"gradient_{kind}"] = f"{(gradients[name] - truth).norm() / truth.norm():.2e}"
            pipe.send(found | {key: getattr(case, key) for key in SIZES})
    pipe.send(None)


def load_double(folder: Path) -> Any:
    """A model in float64: the truth."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def plain_divergence(models: list[Any], rollout: Any, args: argparse.Namespace) -> Any:
    """The full divergence, summed over trained tokens, as its definition says."""
    import torch

    width = rollout.prompt_ids.shape[1]
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    inputs = {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.completion_ids], 1),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    logits = [model(**inputs).logits[:, width - 1 : -1][rollout.trained_mask] for model in models]
    student, teacher = ((each / args.loss_temperature).log_softmax(-1) for each in logits)
    teacher = teacher.detach()

    def divergence(this: Any, that: Any) -> Any:
        return (this.exp() * (this - that)).sum()

    if args.divergence != "jsd":
        pair = (student, teacher) if args.divergence == "reverse" else (teacher, student)
        return divergence(*pair)
    b = args.jsd_beta
    middle = torch.logaddexp(student + math.log(1 - b), teacher + math.log(b))
    return b * divergence(teacher, middle) + (1 - b) * divergence(student, middle)


def measure_equality(folder: Path, case: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one batch, from a process of its own."""
    make_inputs(folder, case)
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    context.Process(target=compare, args=(end, folder, case), daemon=True).start()
    end.close()
    rows = []
    while (row := pipe.recv()) is not None:
        print(row)
        rows.append(row)
    return rows


def main() -> None:
    """Measure what has no rows of this commit yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[512, 151936])
    parser.add_argument("--completion", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[4, 2, 1], help="of each length")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before these")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--memory-limit-gib", type=float, default=10.0, help="of a process, on CPU")
    parser.add_argument("--equality", action="store_true", help="of loss and gradient, not time")
    parser.add_argument("--before", type=Path, help="an older tree, with its ops built")
    parser.add_argument("--again", action="store_true", help="measure what has rows already")
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "after": ROOT} if args.before else {}
    if args.before and args.equality:
        parser.error("--equality: of one tree; leave out --before")
    name = "step_equality" if args.equality else "step_before" if trees else "step"
    path = RESULTS / f"{name}.csv"
    columns = EQUALITY_COLUMNS if args.equality else STEP_COLUMNS
    for vocab, (completion, rollouts) in itertools.product(
        args.vocab, zip(args.completion, itertools.cycle(args.rollouts))
    ):
        sizes = dict(zip(SIZES, (vocab, completion, rollouts)))
        case = argparse.Namespace(**vars(args) | sizes | {"ragged": args.equality})
        case.device, case.made_on_device, case.go_on = "cpu", False, False
        case.checkpointing, case.limit_s, case.trees = False, None, trees
        seen = environment()
        same = sizes | {key: seen[key] for key in ("commit", "device", "num_threads")}
        done = {
            row["objective"]
            for row in read(path)
            if not args.again and all(row[key] == str(value) for key, value in same.items())
        }
        case.objectives = [] if args.equality and done else set(args.objectives) - done
        if not case.objectives:
            print(f"{sizes}: has rows of this commit")
            continue
        arms = itertools.product(trees, OBJECTIVES) if trees else ARMS
        case.arms = [arm for arm in arms if arm[1] in case.objectives]
        with tempfile.TemporaryDirectory() as folder:
            rows = list((measure_equality if args.equality else measure)(Path(folder), case))
        for row in rows if trees else []:
            commit = commit_of(trees[row["implementation"]])
            row |= {"commit": commit[:10], "dirty": commit.endswith("-dirty")}
        append(path, [seen | row for row in rows], columns)


if __name__ == "__main__":
    main()
