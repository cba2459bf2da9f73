"""Writes a model at a temperature as a model folder: the rival that costs no training.

    log p_T(v) = log softmax(h . w_v / T)        h: the last hidden state, after the final norm

Dividing the final norm's weight (and its bias) by T divides every logit by T, exactly, if nothing
but a bare matrix follows. Sampling the new folder at temperature 1 is then sampling the old one at
temperature T, so that evaluate.py measures its accuracy and its exact KL like any policy's. What
does not lie above this curve has sharpened the base and learnt nothing from the verdicts
(arXiv 2510.14901).

Reads   --model (a folder or hub name).
Writes  OUTPUT/T of every temperature T, the same model with another final norm; complete when its
        config.json is there.

    python examples/temper.py --model RUN/base --temperatures 0.8 0.6 --output RUN/temperature
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from common import UserError


@dataclass
class Args:
    model: str
    """model to temper, a folder or hub name"""
    temperatures: tuple[float, ...]
    """T by which every logit is divided; below 1 sharpens"""
    output: Path
    """folder to write one model folder a temperature into"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        for temperature in self.temperatures:
            if not 0 < temperature < math.inf:
                raise UserError(f"--temperatures {temperature:g}: must be above 0 and finite")


@torch.no_grad()
def temper(lm: torch.nn.Module, temperature: float, name: str) -> None:
    """Divides the final norm of a causal language model by the temperature, in place.

    Raises UserError if that does not divide the logits, which it tries on random tokens."""
    norm = getattr(lm.get_decoder(), "norm", None)
    tokens = torch.randint(lm.config.get_text_config().vocab_size, (2, 8), device=lm.device)
    wanted = lm(tokens).logits / temperature
    for parameter in [] if norm is None else norm.parameters():
        parameter /= temperature
    off = (lm(tokens).logits - wanted).abs().max() / wanted.abs().max()
    if not off <= 1e-4:
        raise UserError(
            f"--model {name}: its type {lm.config.model_type} does not end in a norm before a bare "
            "output matrix, so its folder cannot be tempered; sample it with --temperature instead"
        )


def main(args: Args) -> None:
    args.check()
    ranks = common.setup_ranks()
    for temperature in args.temperatures:
        folder = args.output / f"{temperature:g}"
        if (folder / "config.json").is_file():
            print(f"{folder} is complete; nothing to do")
            continue
        lm = common.load_lm(args.model, ranks.device, torch.float32, attention="sdpa")
        temper(lm, temperature, args.model)
        tokenizer = common.load_tokenizer(args.model)
        common.save_model(common.Policy(lm), tokenizer, folder, ranks)


if __name__ == "__main__":
    common.run(main, Args, __doc__)
