"""What a token of the own sampler costs, in this tree and in an older one, in turn.

    git worktree add --detach ../before 905645f  # version 0.1
    (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/bench_decode.py --before ../before

Each case isolates one thing that a token may pay for: the cast of the output head, a sort of the
vocabulary, the copy of a key/value cache, padding of prompts. Weights are random, no rollout ends
early. Each tree has a process of its own; they take turns. `waits` are the operations per token at
which a GPU would be waited for, counted by torch's dispatcher on this CPU, where the sampler looks
for ended rollouts at every token, on a GPU at every eighth. Rows: benchmarks/results/decode.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "case,tree,rows,tokens,vocab,dtype,median_s,least_s,most_s,waits,repeats,num_threads,load,"
    "device,torch,transformers,commit,dirty,date,command"
)
BLOCKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # and masks as indices


@dataclasses.dataclass
class Case:
    """Prompts, models and law of sampling of a row of the table."""

    title: str
    lengths: list[int]  # of the prompts, in tokens
    tokens: int  # of each completion
    law: tuple[float, float, int] = (1.0, 1.0, 0)  # temperature, top-p, top-k
    flags: tuple[str, ...] = ("--dtype", "float32")
    large: bool = False  # the vocabulary of Qwen3, one layer


CASES = {
    "head": Case("cast of the head", [8] * 4, 16, flags=("--dtype", "bfloat16"), large=True),
    "full": Case("full softmax", [8] * 4, 16, large=True),
    "top-p": Case("top-p 0.95: sort", [8] * 4, 16, (1.0, 0.95, 0), large=True),
    "greedy": Case("greedy: sort", [8] * 4, 16, (0.0, 1.0, 0), large=True),
    "cache": Case("growth of the cache", [8] * 32, 256),
    "padding": Case(
        "one long prompt in four, sampled by fours", [32] * 12 + [1024] * 4, 32,
        flags=("--dtype", "float32", "--sampler-batch-size", "4"),
    ),
}  # fmt: skip
SMALL = {"vocab": 512, "hidden_size": 128, "intermediate_size": 480, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
LARGE = SMALL | {"vocab": 151_936, "hidden_size": 512, "num_hidden_layers": 1}


def worker(tree: Path, folder: Path, vocab: int) -> None:
    """Answer each line of standard input, the name of a case, by seconds, waits and versions."""
    sys.path[:0] = [str(tree), str(tree / "methods"), str(tree / "tests")]
    import opd
    import tinylm
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = 0

    class Count(TorchDispatchMode):
        """Operations whose result Python, or the size of a tensor, depends on."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal waits
            name = function.__name__.split(".")[0]
            masks = (
                name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
            )
            waits += name in BLOCKING or (
                masks and any(each is not None and each.dtype == torch.bool for each in args[1])
            )
            return function(*args, **(kwargs or {}))

    to_list = torch.Tensor.tolist

    def counted(tensor: Any) -> Any:
        """On a CPU the dispatcher does not see it."""
        nonlocal waits
        waits += 1
        return to_list(tensor)

    torch.Tensor.tolist = counted  # type: ignore[method-assign]
    new = (tree / "opd_run").is_dir()  # since version 0.2

    def sampler(case: Case, tokens: int) -> Any:
        """A function that samples, from a model that is loaded."""
        sizes = {**LARGE, "vocab": vocab} if case.large else dict(SMALL)
        words = [*tinylm.WORDS, *(f"w{i}" for i in range(sizes.pop("vocab") - len(tinylm.WORDS)))]
        path = folder / f"{'large' if case.large else 'small'}-{new}"
        if not path.exists():
            tinylm.save_model(path, 0, words=words, max_position_embeddings=4096, **sizes)
        argv = ["--student", str(path), "--teacher", str(path), "--prompts", "none", "--device"]
        argv += ["cpu", "--max-completion-tokens", str(tokens), *case.flags]
        args = opd.parse_args(argv)
        if new:
            from opd_run import setup

            models = setup.models_of(opd, args, {"student": str(path)})[0]
            student, law = tinylm.endless(models)["student"], [case.law]
        else:
            from opd_ops import models as old

            old.prepare({"student": str(path)}, args)
            student, law, args.eos_ids = old.load_lm(str(path), False, args), list(case.law), []
        prompts = [
            opd.Prompt(tuple(4 + i % 36 for i in range(n)), "", "", "", {}) for n in case.lengths
        ]
        uniform = opd.uniforms(len(prompts), "rollouts" if new else 2, 0, args)
        return lambda: opd.sample(student, prompts, uniform, args, *law)

    ready = {}
    for line in sys.stdin:
        case = CASES[line.strip()]
        if case.title not in ready:  # the first time counts, and is not timed
            waits, counted = 0, []
            for tokens in (2, 10):
                with Count():
                    sampler(case, tokens)()
                counted.append(waits)
                waits = 0
            chunks = len(case.lengths) // 4 if case.title == CASES["padding"].title else 1
            ready[case.title] = sampler(case, case.tokens), (counted[1] - counted[0]) / 8 / chunks
            ready[case.title][0]()
        sample, per_token = ready[case.title]
        start = time.perf_counter()
        sampled = int(sample().completion_mask.sum())
        seconds = time.perf_counter() - start
        if sampled != len(case.lengths) * case.tokens:
            raise RuntimeError(f"{sampled} tokens, which are not all")
        print(json.dumps([seconds, per_token]), file=sys.__stderr__, flush=True)


def main() -> None:
    """Time both trees and append their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="an older tree, with its ops built")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=LARGE["vocab"], help="of the large models")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.vocab)
        return
    import rows

    trees = {"after": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    table = []
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--vocab", str(args.vocab), "--worker", tree, folder],
                stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            )
            for name, tree in trees.items()
        }  # fmt: skip

        def ask(name: str, case: str) -> list[float]:
            """Seconds and waits of one turn. What else a worker says is shown."""
            pipe_in, pipe_out = workers[name].stdin, workers[name].stderr
            assert pipe_in is not None and pipe_out is not None
            print(case, file=pipe_in, flush=True)
            for line in pipe_out:
                if line.startswith("["):
                    return list(json.loads(line))
                sys.stderr.write(line)
            raise SystemExit(f"{name}: the worker ended")

        for name in args.cases:
            case, found = CASES[name], {tree: [] for tree in trees}
            for _ in range(args.repeats):
                for tree in trees:
                    found[tree].append(ask(tree, name))
            for tree, turns in found.items():
                seconds, waits = [turn[0] for turn in turns], turns[0][1]
                seen = rows.environment(commit=rows.commit_of(trees[tree]))
                table.append(seen | {
                    "case": name, "tree": tree, "rows": len(case.lengths), "tokens": case.tokens,
                    "vocab": args.vocab if case.large else SMALL["vocab"], "dtype": case.flags[1],
                    "median_s": f"{statistics.median(seconds):.4f}", "waits": f"{waits:.3g}",
                    "least_s": f"{min(seconds):.4f}", "most_s": f"{max(seconds):.4f}",
                    "repeats": args.repeats,
                })  # fmt: skip
                print(f"{name:8s} {tree:7s} {table[-1]['median_s']} s, {waits:.3g} waits a token",
                      flush=True)  # fmt: skip
        for process in workers.values():
            process.communicate()
    if args.save:
        rows.append(rows.RESULTS / "decode.csv", table, COLUMNS)


def decode_table() -> str:
    """Markdown of the newest rows of both trees."""
    from rows import NOT_MEASURED, RESULTS, markdown, newest, read

    found = newest(read(RESULTS / "decode.csv"), ["case", "tree", "vocab"])
    lines = []
    for name, case in CASES.items():
        vocab = str((LARGE if case.large else SMALL)["vocab"])
        pair = [found.get((name, tree, vocab)) for tree in ("before", "after")]
        cells = [NOT_MEASURED] * 4
        for at, row in enumerate(pair):
            if row is not None:
                per_token = 1e3 / case.tokens
                low, mid, high = (
                    per_token * float(row[f"{w}_s"]) for w in ("least", "median", "most")
                )
                cells[at], cells[2 + at] = f"{mid:,.3g} ms [{low:.3g}, {high:.3g}]", row["waits"]
        shape = f"{len(case.lengths)} x {case.tokens}, vocabulary {int(vocab):,}"
        lines.append([case.title, shape, *cells])
    titles = [
        "what a token pays for",
        "rollouts x tokens",
        "before",
        "after",
        "waits before",
        "after",
    ]
    return str(markdown(titles, lines))


if __name__ == "__main__":
    main()
