"""Splits a rollouts folder into two parts by problem, halves for cross-fitted signals.

A teacher remembers the responses that it was trained on; its signal on them is partly memory. So
train one teacher on each half, score each half with the *other* one, and join the two files:

    python examples/family/split_rollouts.py --rollouts D --output halves
    python stage1_extreme.py --base B --rollouts halves/0 --output T0        # and 1
    python build_signals.py --rollouts halves/0 --base B --teachers T1 --output F0.safetensors
    python examples/family/join_signals.py --rollouts D --halves halves/0 halves/1 \\
        --signals F0.safetensors F1.safetensors --output F.safetensors

With --share below one half OUTPUT/1 is a small part, for a teacher that shall learn it by heart.

Writes OUTPUT/0 and OUTPUT/1: rollouts.safetensors, samples.jsonl, problems.jsonl, problems numbered
anew; the metadata name whole, share and seed, by which join_signals.py finds each response.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from common import (  # isort: skip
    Rollouts, UserError, fingerprint, load_rollouts, read_jsonl, require, run, save_rollouts,
    write_jsonl,
)  # fmt: skip


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
    """0 or 1 for each problem [n_problems] int64; floor(share n_problems) of them 1."""
    order = torch.randperm(n_problems, generator=torch.Generator().manual_seed(seed))
    chosen = order[: int(n_problems * share)]
    return torch.zeros(n_problems, dtype=torch.int64).index_fill(0, chosen, 1)


def response_tokens(rollouts: Rollouts, chosen: Tensor) -> Tensor:
    """Places [n] of all tokens, prompts included, of the chosen responses [S] bool."""
    return chosen[rollouts.sequence_ids].nonzero()[:, 0]


def take(rollouts: Rollouts, chosen: Tensor, path: Path) -> Rollouts:
    """The chosen responses [S] bool, problems numbered anew in their old order."""
    where = response_tokens(rollouts, chosen)
    lengths = rollouts.lengths[chosen].cumsum(0)
    _, index = rollouts.problem_index[chosen].unique(return_inverse=True)
    by_token = ("tokens", "sampler_logprobs")
    by_response = ("prompt_lens", "rewards", "truncated", "first_wrong_token", "answer_class")
    arrays = {name: getattr(rollouts, name)[where] for name in by_token
              if getattr(rollouts, name) is not None}  # fmt: skip
    arrays |= {name: getattr(rollouts, name)[chosen] for name in by_response
               if getattr(rollouts, name) is not None}  # fmt: skip
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths])
    return replace(rollouts, path=path, cu_seqlens=cu_seqlens, problem_index=index.int(), **arrays)


def load_whole(folder: Path) -> tuple[Rollouts, list[dict], list[dict]]:
    """A folder of evaluate.py: rollouts, problems, samples. Raises UserError where they differ."""
    rollouts = load_rollouts(folder)
    problems, samples = (read_jsonl(folder / f"{name}.jsonl") for name in ("problems", "samples"))
    if len(samples) != len(rollouts.rewards):
        raise UserError(f"{folder}/samples.jsonl: {len(samples)} lines for "
                        f"{len(rollouts.rewards)} responses; copy the folder again")  # fmt: skip
    return rollouts, problems, samples


def write_part(
    whole: tuple[Rollouts, list[dict], list[dict]], chosen: Tensor, folder: Path, metadata: dict
) -> None:
    """Writes FOLDER: all responses of the chosen problems, given as responses [S] bool."""
    rollouts, problems, samples = whole
    made = take(rollouts, chosen, folder / "rollouts.safetensors")
    kept = rollouts.problem_index[chosen].long().unique().tolist()
    write_jsonl(folder / "problems.jsonl", [problems[i] for i in kept])
    numbers = chosen.nonzero()[:, 0].tolist()
    write_jsonl(folder / "samples.jsonl", [samples[i] for i in numbers])
    save_rollouts(replace(made, metadata=rollouts.metadata | metadata))
    print(f"{folder}: {len(kept)} problems, {len(numbers)} responses, "
          f"accuracy {made.rewards.mean():.3f}")  # fmt: skip


def main(args: Args) -> None:
    require(args, "share", lambda v: 0 < v < 1, "between 0 and 1")
    rollouts, *_ = whole = load_whole(args.rollouts)
    present = rollouts.problem_index.long().unique()
    half = part_of_problems(int(rollouts.problem_index.max()) + 1, args.share, args.seed)
    for number in (0, 1):
        chosen = half[rollouts.problem_index.long()] == number
        if not chosen.any():
            raise UserError(f"{args.rollouts}: {len(present)} problems; too few for two parts")
        part = {"half_of": fingerprint(rollouts.path), "half": number, "half_seed": args.seed,
                "half_share": args.share}  # fmt: skip
        write_part(whole, chosen, args.output / str(number), part)


if __name__ == "__main__":
    run(main, Args, __doc__)
