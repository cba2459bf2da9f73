"""Splits a rollouts folder into two parts by problem, for example halves for cross-fitted signals.

A teacher remembers the responses that it was trained on, so its signal on them is partly memory.
Cross-fitting trains one teacher on each half, scores each half with the *other* teacher, and joins
the two files:

    python examples/family/split_rollouts.py --rollouts D --output halves
    python stage1_extreme.py --base B --rollouts halves/0 --output T0        # and 1
    python build_signals.py --rollouts halves/0 --base B --teachers T1 --output F0.safetensors
    python examples/family/join_signals.py --rollouts D --base B --halves halves/0 halves/1 \\
        --signals F0.safetensors F1.safetensors --output F.safetensors

With --share below one half OUTPUT/1 is a small part, for a teacher that is to learn it by heart.

Reads   --rollouts (a folder written by evaluate.py).
Writes  OUTPUT/0 and OUTPUT/1: rollouts.safetensors, samples.jsonl and problems.jsonl, with the
        problems numbered anew. The metadata name the whole, the share and the seed; by these
        join_signals.py finds each response again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from common import ARRAYS, Rollouts, UserError, fingerprint, load_rollouts, require, run
from evaluate import read_jsonl, save_rollouts, write_jsonl


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    output: Path
    """folder for the two parts, OUTPUT/0 and OUTPUT/1"""
    share: float = 0.5
    """share of the problems in OUTPUT/1"""
    seed: int = 0
    """choice of the problems of each part"""


def part_of_problems(n_problems: int, share: float, seed: int) -> Tensor:
    """Assigns 0 or 1 to each problem, [n_problems] int64; floor(share n_problems) of them get 1."""
    order = torch.randperm(n_problems, generator=torch.Generator().manual_seed(seed))
    chosen = order[: int(n_problems * share)]
    return torch.zeros(n_problems, dtype=torch.int64).index_fill(0, chosen, 1)


def select(rollouts: Rollouts, chosen: Tensor, path: Path) -> Rollouts:
    """Takes the chosen responses [S] bool; problems are numbered anew, in their old order."""
    where = {"N": chosen[rollouts.sequence_ids], "S": chosen}
    arrays = {name: (getattr(rollouts, name), axis) for name, (_, axis, _) in ARRAYS.items()}
    arrays = {name: v[where[axis]] for name, (v, axis) in arrays.items() if v is not None}
    _, index = arrays["problem_index"].unique(return_inverse=True)
    cu_seqlens = F.pad(rollouts.lengths[chosen].cumsum(0), (1, 0))
    arrays |= {"problem_index": index.int(), "cu_seqlens": cu_seqlens}
    return replace(rollouts, path=path, **arrays)


Whole = tuple[Rollouts, list[dict], list[dict]]  # rollouts, problems, samples


def load_whole(folder: Path) -> Whole:
    """Reads a folder of evaluate.py. Raises UserError where its files do not belong together."""
    rollouts = load_rollouts(folder)
    problems, samples = (read_jsonl(folder / f"{name}.jsonl") for name in ("problems", "samples"))
    if len(samples) != len(rollouts.rewards):
        raise UserError(
            f"{folder}/samples.jsonl: {len(samples)} lines for {len(rollouts.rewards)} responses; "
            "copy the folder again"
        )
    return rollouts, problems, samples


def write_part(whole: Whole, chosen: Tensor, folder: Path, metadata: dict) -> None:
    """Writes FOLDER with the chosen responses [S] bool, which must be all of their problems."""
    rollouts, problems, samples = whole
    part = select(rollouts, chosen, folder / "rollouts.safetensors")
    kept = rollouts.problem_index[chosen].long().unique().tolist()
    write_jsonl(folder / "problems.jsonl", [problems[i] for i in kept])
    numbers = chosen.nonzero()[:, 0].tolist()
    write_jsonl(folder / "samples.jsonl", [samples[i] for i in numbers])
    save_rollouts(replace(part, metadata=rollouts.metadata | metadata))
    print(
        f"{folder}: {len(kept)} problems, {len(numbers)} responses, accuracy "
        f"{part.rewards.mean():.3f}"
    )


def main(args: Args) -> None:
    require(args, "share", lambda v: 0 < v < 1, "between 0 and 1")
    whole = load_whole(args.rollouts)
    rollouts = whole[0]
    index = rollouts.problem_index.long()
    half = part_of_problems(int(index.max()) + 1, args.share, args.seed)[index]
    for number in (0, 1):
        if not (half == number).any():
            raise UserError(
                f"{args.rollouts}: {len(index.unique())} problems are too few for two parts; "
                "sample more problems, or change --share"
            )
    whole_file = fingerprint(rollouts.path)
    metadata = {"half_of": whole_file, "half_seed": args.seed, "half_share": args.share}
    for number in (0, 1):
        folder = args.output / str(number)
        write_part(whole, half == number, folder, metadata | {"half": number})


if __name__ == "__main__":
    run(main, Args, __doc__)
