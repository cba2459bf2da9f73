"""Keeps the problems of a rollouts folder whose responses are neither all correct nor all wrong.

A problem whose responses all have one verdict allows no comparison. Under a base that is nearly
always right most problems are like that, so many are sampled and few are trained on. DAPO's dynamic
sampling (Yu et al. 2025, section 3.2) drops such groups too and samples on until a batch is full;
here all rollouts exist already.

Reads   --rollouts (a folder written by evaluate.py).
Writes  OUTPUT: rollouts.safetensors, samples.jsonl and problems.jsonl, with the problems numbered
        anew. The metadata name the whole (mixed_of) and how many problems it had.

    python examples/family/keep_mixed.py --rollouts D --output mixed
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from split_rollouts import load_whole, write_part
from torch import Tensor

from common import Rollouts, UserError, fingerprint, run
from stage1_extreme import group_statistics


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    output: Path
    """folder to write"""


def in_mixed_groups(rollouts: Rollouts) -> Tensor:
    """Marks the responses [S] bool of the problems with both verdicts."""
    _, pass_rates = group_statistics(rollouts.rewards, rollouts.problem_index)
    return (pass_rates > 0) & (pass_rates < 1)


def main(args: Args) -> None:
    whole = load_whole(args.rollouts)
    rollouts = whole[0]
    chosen = in_mixed_groups(rollouts)
    n_problems = len(rollouts.problem_index.unique())
    if not chosen.any():
        raise UserError(
            f"{args.rollouts}: none of {n_problems} problems has correct and wrong responses; "
            "sample more"
        )
    metadata = {"mixed_of": fingerprint(rollouts.path), "mixed_from_problems": n_problems}
    print(f"{args.rollouts}: {n_problems} problems; these have both verdicts:")
    write_part(whole, chosen, args.output, metadata)


if __name__ == "__main__":
    run(main, Args, __doc__)
