"""Put prompts to a checkpoint, from the terminal.

    python tools/chat.py runs/demo                       # the newest checkpoint; asks for prompts
    python tools/chat.py runs/demo --prompt "What is 12 + 34?"
    python tools/chat.py assets/tiny/teacher --temperature 0

Chat template, system message and prompt lengths are those of the run, where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from opd_run.console import RunError, one_line, printable  # noqa: E402
from opd_run.files import check_manifest, step_of  # noqa: E402


def model_of(folder: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """The model's folder, and the flags of its run; none for a plain model folder.

    Args:
        folder: a run folder, a checkpoint, or a model.  step: which checkpoint; None: the newest.

    Raises:
        RunError: there is no model.
    """
    if (folder / "config.json").is_file():
        return folder, _flags(folder.parents[2]) if folder.name == "model" else {}
    if (folder / "model/config.json").is_file():
        return folder / "model", _flags(folder.parents[1])
    steps = [path for path in folder.glob("checkpoints/step_*") if check_manifest(path) is None]
    chosen = [path for path in steps if step is None or step_of(path) == step]
    if not chosen:
        there = sorted(map(step_of, steps))
        raise RunError(f"{folder}: no model, and no such checkpoint (complete ones: {there})", 2)
    return max(chosen, key=step_of) / "model", _flags(folder)


def _flags(run: Path) -> dict[str, Any]:
    try:
        flags: dict[str, Any] = json.loads((run / "args.json").read_text())["args"]
    except (OSError, ValueError, KeyError):
        return {}  # a model without a run
    return flags


def answer(lm: Any, tokenizer: Any, messages: list[dict[str, str]], args: Any, flags: Any) -> str:
    """What the model says to these messages, printed as it comes."""
    import transformers

    if tokenizer.chat_template is not None and flags.get("chat_template", True):
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        found = tokenizer.apply_chat_template(
            messages, **how | (flags.get("chat_template_args") or {})
        )
    else:
        found = tokenizer(messages[-1]["content"], return_tensors="pt")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    ids = lm.generate(
        **found.to(lm.device),
        max_new_tokens=args.max_completion_tokens,
        streamer=transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **(sampling if args.temperature else {"do_sample": False}),
    )
    new = ids[0, found["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one prompt, or all that are typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder, checkpoint or model")
    parser.add_argument("--step", type=int, help="which checkpoint [the newest]")
    parser.add_argument("--prompt", help="answer this, and end [ask for prompts]")
    parser.add_argument("--system", help="system message [that of the run]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy [1.0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much mass [1.0]")
    parser.add_argument("--max-completion-tokens", type=int, default=512, help="at most [512]")
    parser.add_argument("--device", help="[cuda if there is one]")
    args = parser.parse_args(argv)
    import torch
    import transformers

    try:
        path, flags = model_of(args.folder, args.step)
        print(f"model: {path}", file=sys.stderr)
        if template := flags.get("prompt_template"):
            print(
                f"! what you type is not put into --prompt-template {template!r}", file=sys.stderr
            )
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        lm = transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    except RunError as error:
        parser.error(str(error))
    except (OSError, ValueError) as error:
        parser.error(f"{args.folder}: cannot be loaded: {one_line(error)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = lm.to(device).eval()
    lm.generation_config = transformers.GenerationConfig(
        eos_token_id=lm.generation_config.eos_token_id
    )
    system = args.system if args.system is not None else flags.get("system")
    messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            text = args.prompt if args.prompt is not None else input("> ")
        except (EOFError, KeyboardInterrupt):
            return 0
        messages.append({"role": "user", "content": text})
        said = answer(lm, tokenizer, messages, args, flags)
        messages.append({"role": "assistant", "content": printable(said)})
        if args.prompt is not None:
            return 0


if __name__ == "__main__":
    sys.exit(main())
