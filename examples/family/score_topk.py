"""Stores a teacher's k likeliest tokens at every response token.

With this file stage 2 can clone the teacher without holding it in memory
(examples/family/stage2.py --objective topk).

Reads   --rollouts (a folder written by evaluate.py), --teacher (a model folder).
Writes  OUTPUT (.safetensors): topk_ids int32 [N, k] and topk_logprobs float32 [N, k + 1], whose
        last entry is all other tokens together. Both are zero on prompts. It takes 8 k + 4 bytes
        per token of the rollouts.

    python examples/family/score_topk.py --rollouts D --teacher T --k 64 --output topk.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from divergences import topk_logprobs
from torch import Tensor

from common import (
    Policy,
    Ranks,
    Rollouts,
    UserError,
    check_policy,
    check_sampling,
    fingerprint,
    load_policy,
    load_rollouts,
    make_row,
    model_folder,
    pack,
    progress,
    require,
    run,
    save_tensors,
    setup_ranks,
    text_config,
)


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    teacher: str
    """policy to clone"""
    output: Path
    """file to write, name ending in .safetensors"""
    k: int = 64
    """tokens stored at each position, below the vocabulary size (NeMo-RL: 64, verl: 32)"""
    micro_batch_tokens: int = 16384
    """token budget of a packed row"""
    force: bool = False
    """score rollouts that were sampled with top-p below 1"""

    def check(self, rollouts: Rollouts) -> None:
        """Raises UserError on impossible values, and on tokens that the teacher does not know."""
        require(self, "k micro_batch_tokens", lambda v: v >= 1, "1 or more")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        size = text_config(self.teacher).vocab_size
        if self.k >= size:
            raise UserError(
                f"--k {self.k}: must be below the vocabulary of {size} tokens; {size - 1} is exact"
            )
        if rollouts.tokens.max() >= size:
            raise UserError(
                f"--teacher {self.teacher}: has {size} tokens, and {rollouts.path} others; give a "
                "teacher of the base's family"
            )


@torch.no_grad()
def score_topk(
    policy: Policy, rollouts: Rollouts, k: int, budget: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Scores all tokens: ids int32 [N, k] and log-probs float32 [N, k + 1], zero on prompts."""
    n, temperature = len(rollouts.tokens), check_sampling(rollouts, force=True)
    ids = torch.zeros(n, k, dtype=torch.int32, device=ranks.device)
    logprobs = torch.zeros(n, k + 1, device=ranks.device)
    lengths = rollouts.lengths.tolist()
    with progress(ranks, len(rollouts.rewards), 0, "score the teacher") as bar:
        for members in pack(lengths, policy.budget(budget), ranks.world_size)[ranks.rank]:
            row = make_row(rollouts, members, ranks.device)
            top, values = policy(row, lambda h, output: topk_logprobs(h, output, temperature, k))
            where = row.flat.to(ranks.device)
            ids[where], logprobs[where] = top.int(), values.float()
            bar.update(len(members) * ranks.world_size)
    dist.all_reduce(ids)  # each rank has filled in its own tokens
    dist.all_reduce(logprobs)
    return ids.cpu(), logprobs.cpu()


def main(args: Args) -> None:
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    args.check(rollouts)
    temperature = check_sampling(rollouts, args.force)
    teacher = load_policy(args.teacher, ranks, train=False)
    check_policy(teacher, rollouts, args.teacher, ranks)
    ids, logprobs = score_topk(teacher, rollouts, args.k, args.micro_batch_tokens, ranks)
    if not logprobs.isfinite().all():
        raise UserError(
            f"model '{args.teacher}': its log-probs are not finite; train it again with a lower "
            "--learning-rate"
        )
    model = {"path": args.teacher, "fingerprint": fingerprint(model_folder(args.teacher))}
    metadata = {"rollouts": fingerprint(rollouts.path), "temperature": temperature}
    if ranks.rank == 0:
        arrays = {"topk_ids": ids, "topk_logprobs": logprobs}
        save_tensors(args.output, arrays, metadata | {"teacher": model})
    other = logprobs[rollouts.response_mask, -1].exp()
    ranks.print(
        f"{args.output}: beyond the top {args.k}: {other.mean():.2%} of the probability, "
        f"{other.max():.1%} at the most"
    )


if __name__ == "__main__":
    run(main, Args, __doc__)
