"""What tests/test_scale.py compares between one process and several: run by torchrun.

    torchrun --nproc-per-node 2 -- tests/two_ranks.py JOBS.json

For each job {model, rollouts, budget, flags, output} it writes the loaded parameters and buffers,
the scores, the loss and the gradient of one grpo step, as one process would hold them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import stage1_extreme  # noqa: E402


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor; all ranks call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def one_step(
    model: str, rollouts: common.Rollouts, budget: int, ranks: common.Ranks, **flags: Any
) -> dict[str, Tensor]:
    """{parameter.NAME, buffer.NAME, gradient.NAME, scores, loss}."""
    policy = common.load_policy(model, ranks, train=True, **flags)
    found = {f"parameter.{k}": whole(v) for k, v in policy.lm.named_parameters()}
    found |= {f"buffer.{k}": v.clone() for k, v in policy.lm.named_buffers()}
    found["scores"] = common.score(policy, rollouts, 1.0, budget, ranks, "score")
    behavior = found["scores"] + 0.3 * torch.sin(torch.arange(len(rollouts.tokens)))  # ratios not 1
    args = stage1_extreme.Args(base=model, rollouts=Path("r"), output=Path("o"), loss="grpo")
    rewards, advantages, means, values = stage1_extreme.training_targets(args, rollouts)
    lengths = rollouts.lengths.tolist()
    rows = common.pack(lengths, budget, ranks.world_size, policy.attention_cost)[ranks.rank]
    loss_sum = torch.zeros(())
    for i, members in enumerate(rows):
        row = common.make_row(rollouts, members, ranks.device)
        per_response = (v[row.sequences] for v in (rewards, advantages, values, means))
        logprobs, entropy = common.row_logprobs(policy, row, 1.0)
        x = stage1_extreme.LossInputs(
            logprobs, behavior[row.flat] * row.response_mask, row.response_mask, row.sequence_ids,
            *per_response, entropy,
        )  # fmt: skip
        loss = stage1_extreme.grpo_loss(x, **vars(args))[0] / len(rewards) * bool(members)
        common.sync_gradients(policy, i + 1 == len(rows), flags.get("defer_gradient_sync", False))
        (loss * ranks.world_size).backward()
        loss_sum += loss.detach()
    found["loss"] = ranks.sum(loss_sum)
    found["grad_norm"] = common.clip_gradients(policy, 1e9)
    found["micro_batches"] = torch.tensor(len(rows))
    return found | {f"gradient.{k}": whole(v.grad) for k, v in policy.lm.named_parameters()}


def main() -> None:
    ranks = common.setup_ranks()
    for job in common.read_json(Path(sys.argv[1])):
        rollouts = common.load_rollouts(Path(job["rollouts"]))
        found = one_step(job["model"], rollouts, job["budget"], ranks, **job["flags"])
        if ranks.rank == 0:
            common.save_tensors(Path(job["output"]), found, {})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
