"""Stores a teacher's k likeliest tokens at every response token, so that stage 2 can clone it
without holding it in memory (examples/family/stage2.py --objective topk).

Reads   --rollouts (a folder of evaluate.py), --teacher (a model folder).
Writes  OUTPUT (.safetensors): topk_ids int32 [N, k]; topk_logprobs float32 [N, k + 1], the last
        being all other tokens together; zero on prompts. 8 k + 4 bytes a token of the rollouts.

    python examples/family/score_topk.py --rollouts D --teacher T --k 64 --output topk.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from common import (  # isort: skip
    Policy, Ranks, Rollouts, UserError, check_sampling, check_vocabulary, fingerprint, load_policy,
    load_rollouts, make_row, model_folder, pack, progress, read_json, require, run, save_tensors,
    setup_ranks,
)  # fmt: skip
from divergences import topk_logprobs


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

    def check(self) -> None:
        """Raises UserError on impossible values."""
        require(self, "k micro_batch_tokens", lambda v: v >= 1, "1 or more")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        size = read_json(model_folder(self.teacher) / "config.json").get("vocab_size")
        if size is not None and self.k >= size:
            raise UserError(f"--k {self.k}: must be below the vocabulary of {size} tokens, "
                            f"--k {size - 1} is exact")  # fmt: skip


@torch.no_grad()
def score_topk(
    policy: Policy, rollouts: Rollouts, temperature: float, k: int, budget: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ids int32 [N, k] and log-probs float32 [N, k + 1] of all tokens, zero on prompts."""
    n = len(rollouts.tokens)
    ids, logprobs = torch.zeros(n, k, dtype=torch.int32), torch.zeros(n, k + 1)
    with progress(ranks, len(rollouts.rewards), 0, "score the teacher") as bar:
        for sequences in pack(rollouts.lengths.tolist(), budget, ranks.world_size)[ranks.rank]:
            row = make_row(rollouts, sequences, ranks.device)
            top, values = policy(row, lambda h, w: topk_logprobs(h, w, temperature, k))
            where = row.flat[row.response_index.cpu()]
            ids[where], logprobs[where] = top.int().cpu(), values.float().cpu()
            bar.update(len(sequences) * ranks.world_size)
    return tuple(ranks.sum(x.to(ranks.device)).cpu() for x in (ids, logprobs))


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    check_vocabulary([args.teacher], rollouts)
    teacher = load_policy(args.teacher, ranks, train=False)
    budget = args.micro_batch_tokens
    ids, logprobs = score_topk(teacher, rollouts, temperature, args.k, budget, ranks)
    mask = rollouts.response_mask
    if not logprobs.isfinite().all():
        raise UserError(f"model '{args.teacher}': its log-probs are not finite; "
                        "train it again with a lower learning rate")  # fmt: skip
    metadata = {
        "rollouts": fingerprint(rollouts.path), "temperature": temperature,
        "teacher": {"path": args.teacher, "fingerprint": fingerprint(model_folder(args.teacher))},
    }  # fmt: skip
    if ranks.rank == 0:
        save_tensors(args.output, {"topk_ids": ids, "topk_logprobs": logprobs}, metadata)
    other = logprobs[mask, -1].exp()
    ranks.print(f"{args.output}: beyond the top {args.k}: {other.mean():.2%} of the probability, "
                f"{other.max():.1%} at the most")  # fmt: skip


if __name__ == "__main__":
    run(main, Args, __doc__)
