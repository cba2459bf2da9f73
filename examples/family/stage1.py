"""Stage 1 with more objectives, and the lesson in how to fork it: stage1_extreme.py is unchanged.

A fork consists of three things, and this file has nothing else.
1. Functions (LossInputs, Args) -> (unnormalised sum, metrics). Here they are in objectives.py.
2. An Args that extends stage1_extreme.Args. The Literal of `loss` is widened, and every new flag
   has a field.
3. New entries in the dict LOSSES, from a name to its function, and in DIVISORS, from a name to what
   divides the sum over the global batch: tokens, correct_tokens or wrong_tokens; without an entry
   it is the number of responses. Then stage1_extreme.main runs.

Data, packing, ranks, KL penalty, checkpoints, metrics and the files written are those of stage 1.
docs/family.md compares the objectives.

    python examples/family/stage1.py --base M --rollouts D --loss cispo --output T
    torchrun --nproc-per-node 8 -- examples/family/stage1.py --base M --rollouts D --output T
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from objectives import DIVISORS, OBJECTIVES, with_options

import stage1_extreme
from common import UserError, require, run


@dataclass
class Args(stage1_extreme.Args):
    loss: Literal[
        "ce",
        "mse",
        "sapo",
        "grpo",
        "sft",
        "reinforce",
        "dapo",
        "dr_grpo",
        "gspo",
        "cispo",
        "topr",
        "bapo",
        "vespo",
        "psr",
        "nsr",
        "weighted_reinforce",
        "nft",
    ] = "reinforce"
    """objective, see the top of objectives.py and of stage1_extreme.py"""
    dr_grpo_length: int = 1024
    """dr_grpo: divisor of a response's sum, tokens (verl, TRL: the longest response allowed)"""
    gspo_clip_low: float = 3e-4
    """gspo: the mean ratio is clipped at 1 - this (3e-4: GSPO's author)"""
    gspo_clip_high: float = 4e-4
    """gspo: the mean ratio is clipped at 1 + this (4e-4: GSPO's author)"""
    cispo_low: float = 0.0
    """cispo: the least weight, a ratio (0: TRL, open-instruct; above 0 it harms off-policy)"""
    cispo_high: float = 5.0
    """cispo: the greatest weight, a ratio (5: TRL's advice; ScaleRL: 4 to 8 are alike)"""
    topr_ratio: Literal["sequence", "mean", "token"] = "sequence"
    """topr: ratio of the response (paper), its geometric mean, or each token's (Trinity, ROLL)"""
    bapo_target: float = 1.0
    """bapo: wanted contribution of right over wrong tokens, a ratio (1: the authors' yaml)"""
    bapo_dual_clip: float = 3.0
    """bapo: the loss of a wrong token is held at this times |A| (3: verl's default)"""
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    """vespo: k and lambda of the weight W^k exp(-lambda W) for A >= 0 (VESPO's code, TRL)"""
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    """vespo: k and lambda for A < 0 (VESPO's code, TRL)"""
    positive_weight: float = 0.1
    """weighted_reinforce: lambda, the advantage of right responses (0.1: its authors)"""
    nft_negative_weight: float = 1.0
    """nft: weight of wrong responses (1: NFT; 0: RFT)"""

    advantages: Literal["group_std", "group_mean"] = "group_std"
    """(R - mean) / deviation over the problem (GRPO), or R - mean (Dr.GRPO)"""
    paced: tuple[float, float] = (0.0, 0.0)
    """a and b: weigh responses by p^a (1 - p)^b, p the pass rate (PACED: 1 1); 0 0: off"""
    ace_alpha: float = 0.0
    """alpha: weigh wrong responses by 1 + alpha softplus(S), our reading of ACE; 0: off"""
    mask_entropy: float = 0.0
    """leave out this share of a response's tokens, highest entropy first (EKSFT: 0.2); 0: off"""
    mask_kl: float = 0.0
    """leave out this share of a response's tokens, furthest from the base first (EKSFT: 0.2)"""
    spare_floor: float = 0.02
    """with --spare-ceiling: a token less probable than this is noise (0.02: Lp-Reg)"""
    spare_ceiling: float = 0.0
    """leave out tokens of wrong responses with a probability from the floor to this; 0: off"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        super().check()
        if self.unlearn and self.loss in ("psr", "nft"):
            raise UserError(
                f"--unlearn --loss {self.loss}: it needs correct responses, and under --unlearn "
                "there are none; use --loss nsr or ce"
            )
        if self.unlearn and any(self.paced):
            raise UserError("--unlearn --paced: every R is 0, so every weight is 0; drop --paced")
        positive = "cispo_high bapo_target bapo_dual_clip dr_grpo_length"
        require(self, positive, lambda v: v > 0, "above 0")
        at_least_0 = "gspo_clip_high cispo_low positive_weight nft_negative_weight ace_alpha"
        require(self, at_least_0, lambda v: 0 <= v < math.inf, "0 or more, and finite")
        shares = "gspo_clip_low mask_entropy mask_kl spare_floor spare_ceiling"
        require(self, shares, lambda v: 0 <= v <= 1, "between 0 and 1")
        pairs = "paced vespo_positive vespo_negative"
        require(self, pairs, lambda v: all(0 <= x < math.inf for x in v), "two numbers, 0 or more")
        least = f"at least --cispo-low {self.cispo_low:g}"
        require(self, "cispo_high", lambda v: v >= self.cispo_low, least)
        least = f"0, or above --spare-floor {self.spare_floor:g}: no probability is in between"
        require(self, "spare_ceiling", lambda v: v == 0 or v > self.spare_floor, least)


LOSSES = {name: with_options(loss) for name, loss in (stage1_extreme.LOSSES | OBJECTIVES).items()}


def main(args: Args) -> None:
    stage1_extreme.LOSSES.update(LOSSES)
    stage1_extreme.DIVISORS.update(DIVISORS)
    stage1_extreme.main(args)


if __name__ == "__main__":
    run(main, Args, __doc__)
