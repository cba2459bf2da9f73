"""More objectives for stage 2, and how to fork it: put functions into its dicts, call its `main`.

    jsd    generalised Jensen-Shannon divergence over the whole vocabulary, to --teacher (GKD)
    topk   KL(teacher || policy) over the teacher's top k and "any other"; --teacher is a *file* of
           examples/family/score_topk.py, no teacher in memory
    gopd   policy gradient with A = lambda (T - ref) - (policy - ref), policy detached; lambda is
           --signal-scale, T - ref the signal, ref the signals' reference (G-OPD; above 1: ExOPD)
    trrd   GRPO whose ratio is policy / (behavior^alpha T^(1 - alpha)): rewards give the direction,
           the teacher moves the clip (RLAD)
    kdrl   GRPO + beta 1/2 (policy - T)^2: rewards and distillation together (KDRL)

T: log-probs of teacher_0 of the signals file. Besides, for any objective: --kl-target adapts the KL
coefficient, --reanchor puts the student of the epoch's start in the place of the base.

Reads and writes what stage2_distill.py does; with --reanchor also anchors/ while it runs.

    python examples/family/stage2.py --base B --rollouts D --signals F --objective gopd \\
        --signal-scale 1.25 --signal-clip inf --token-kl inf --output S
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from divergences import jsd, topk
from torch import Tensor

import stage2_distill

from common import (  # isort: skip
    Ranks, Rollouts, Row, UserError, fingerprint, load_tensors, model_folder, read_json, require,
    run, save_tensors, setup_ranks,
)  # fmt: skip
from stage1_extreme import group_statistics
from stage2_distill import DistillInputs, LossOutput, pg_loss


@dataclass
class Args(stage2_distill.Args):
    objective: Literal[
        "jsd", "topk", "gopd", "trrd", "kdrl", "regression", "pg", "forward_kl", "reverse_kl"
    ] = "gopd"
    """objective, see the top of this page"""
    jsd_beta: float = 0.5
    """jsd: weight of the teacher in the mixture; 0: forward KL, 1: reverse KL (GKD in TRL: 0.5)"""
    trrd_alpha: float = 0.5
    """trrd: share of the behavior policy in the ratio's anchor; 1: GRPO (0.5: a public script)"""
    kdrl_beta: float = 1e-3
    """kdrl: weight of 1/2 (policy - T)^2 a token (KDRL: annealed from 5e-3 to 1e-3)"""
    kl_target: float | None = None
    """KL proxy, nats a response, that --kl-coef is doubled or halved towards (PPO's adaptive KL)"""
    reanchor: bool = False
    """targets (of regression, bounds of pg and gopd) and penalty count from the epoch's start"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        super().check()
        require(self, "jsd_beta trrd_alpha", lambda v: 0 <= v <= 1, "between 0 and 1")
        require(self, "kdrl_beta", lambda v: 0 <= v < math.inf, "0 or more, and finite")
        require(self, "kl_target", lambda v: v is None or v > 0, "above 0 nats")
        if self.kl_target is not None and not self.kl_coef:
            raise UserError("--kl-target adapts --kl-coef; start it above 0, for example at 0.01")
        with_target = ("regression", "pg", "gopd")
        if self.reanchor and not self.kl_coef and self.objective not in with_target:
            raise UserError(f"--reanchor --objective {self.objective}: nothing in it counts from "
                            "the base; add --kl-coef, or drop --reanchor")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The mathematics. Policy gradients share stage 2's clip: a replaced input is a new objective.


def gopd_loss(x: DistillInputs, *, reference_logprobs: Tensor, **settings: Any) -> LossOutput:
    """A = target - (policy - reference), detached: it ends where the policy meets its target."""
    moved = (x.policy_logprobs.detach() - reference_logprobs) * x.response_mask
    return pg_loss(replace(x, target=x.target - moved), **settings)


def trrd_loss(
    x: DistillInputs, *, trrd_alpha: float, teacher_logprobs: Tensor, advantages: Tensor,
    **settings: Any,
) -> LossOutput:  # fmt: skip
    """Clip of r = exp(alpha (policy - behavior) + (1 - alpha) (policy - T)); A of the rewards."""
    anchor = trrd_alpha * x.behavior_logprobs + (1 - trrd_alpha) * teacher_logprobs
    return pg_loss(replace(x, target=advantages, behavior_logprobs=anchor), **settings)


def kdrl_loss(
    x: DistillInputs, *, kdrl_beta: float, teacher_logprobs: Tensor, advantages: Tensor,
    **settings: Any,
) -> LossOutput:  # fmt: skip
    """GRPO + beta 1/2 (policy - T)^2 (k2: its gradient is that of the reverse KL on fresh samples
    of the policy; on samples of the base only near the base)."""
    loss, metrics = pg_loss(replace(x, target=advantages), **settings)
    distance = (x.policy_logprobs - teacher_logprobs).square() / 2 * x.response_mask
    return loss + kdrl_beta * distance.sum(), metrics


LOSSES = {"gopd": gopd_loss, "trrd": trrd_loss, "kdrl": kdrl_loss}


def adapted_kl_coef(args: Args, kl_coef: float, kl_proxy: float) -> float:
    """PPO's rule: twice the weight above 1.5 targets, half below 1/1.5 of it."""
    if args.kl_target is None:
        return kl_coef
    if kl_proxy > 1.5 * args.kl_target:
        return 2 * kl_coef
    return kl_coef / 2 if kl_proxy < args.kl_target / 1.5 else kl_coef


# --------------------------------------------------------------------------------------------------
# Data


def rewards_and_policies(args: Args, rollouts: Rollouts) -> dict[str, Tensor]:
    """teacher_logprobs, reference_logprobs of the signals' first term, GRPO's advantages: 3 [N].
    Only for the objectives that read them."""
    if args.objective not in LOSSES:
        return {}
    needed = dict.fromkeys(("teacher_0_logprobs", "reference_0_logprobs"), torch.float32)
    arrays = load_tensors(args.signals, needed)[0]
    advantages, _, _ = group_statistics(rollouts.rewards, rollouts.problem_index, beta=1.0)
    return {
        "teacher_logprobs": arrays["teacher_0_logprobs"],
        "reference_logprobs": arrays["reference_0_logprobs"],
        "advantages": advantages[rollouts.sequence_ids] * rollouts.response_mask,
    }


def vocabulary_size(model: str) -> int | None:
    """As its config has it."""
    return read_json(model_folder(model) / "config.json").get("vocab_size")


def load_topk(
    args: Args, rollouts: Rollouts, ranks: Ranks
) -> Callable[[Row, Any], tuple[Tensor, Tensor]]:
    """Stands in the place of the teacher: row -> ids [R, k], log-probs [R, k + 1].

    Raises UserError where the file is of other rollouts."""
    needed = {"topk_ids": torch.int32, "topk_logprobs": torch.float32}
    arrays, metadata = load_tensors(Path(args.teacher), needed)
    if metadata.get("rollouts") != fingerprint(rollouts.path):
        raise UserError(f"--teacher {args.teacher}: made for other rollouts than {rollouts.path}; "
                        "run examples/family/score_topk.py on these")  # fmt: skip
    size, highest = vocabulary_size(args.base), int(arrays["topk_ids"].max())
    if size is not None and highest >= size:
        raise UserError(f"--teacher {args.teacher}: has token {highest}, but the vocabulary of "
                        f"'{args.base}' has {size}; use one family")  # fmt: skip

    def at_row(row: Row, _: Any) -> tuple[Tensor, Tensor]:
        """Those of its response tokens."""
        where = row.flat[row.response_index.cpu()]
        return tuple(arrays[name][where].to(ranks.device) for name in needed)

    return at_row


def anchor(
    args: Args, epoch: int, base_logprobs: Tensor, score_now: Callable[[], Tensor], ranks: Ranks
) -> Tensor:
    """The student's log-probs [N] at the start of the epoch, stored, for a run that is resumed
    within it has moved on."""
    if not args.reanchor or epoch == 0:
        return base_logprobs
    path = args.output / "anchors" / f"epoch-{epoch:03d}.safetensors"
    if not path.is_file():
        logprobs = score_now()
        if ranks.rank == 0:
            save_tensors(path, {"logprobs": logprobs}, {})
        ranks.barrier()
    return load_tensors(path, {"logprobs": torch.float32})[0]["logprobs"]


def main(args: Args) -> None:
    clones = {"jsd": (stage2_distill.load_teacher, jsd), "topk": (load_topk, topk)}
    stage2_distill.CLONES.update(clones)
    stage2_distill.OBJECTIVES.update(LOSSES | dict.fromkeys(clones, stage2_distill.clone_loss))
    stage2_distill.more_arrays = rewards_and_policies
    stage2_distill.next_kl_coef = adapted_kl_coef
    stage2_distill.epoch_anchor = anchor
    stage2_distill.main(args)
    if setup_ranks().rank == 0:
        shutil.rmtree(args.output / "anchors", ignore_errors=True)  # of a finished run


if __name__ == "__main__":
    run(main, Args, __doc__)
