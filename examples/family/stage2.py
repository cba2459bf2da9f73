"""Stage 2 with more objectives, and the lesson in how to fork a whole script: a copy of its main.

    gopd        policy gradient with A = lambda (T - ref) - (policy - ref), the policy detached;
                lambda is --signal-scale, and T - ref is the signal (G-OPD; above 1: ExOPD)
    trrd        GRPO whose ratio is policy / (behavior^alpha T^(1 - alpha)): the rewards give the
                direction, and the teacher moves the clip (RLAD)
    kdrl        GRPO + beta 1/2 (policy - T)^2: rewards and distillation together (KDRL)
    forward_kl  KL(T || policy), reverse_kl KL(policy || T) and jsd, the generalized Jensen-Shannon
                divergence (GKD), over the whole vocabulary: they clone --teacher
    topk        KL(T || policy) over the teacher's top k tokens and "any other"; --teacher is a file
                of examples/family/score_topk.py, and no teacher is in memory

Here T and ref are log-probs of the first teacher and reference of the signals file, and policy is
the student's. regression and pg of stage2_distill.py are available too. With any objective,
--kl-target adapts the weight of the KL penalty, and --reanchor puts the student of each epoch's
start in the place of the base.

Reads   what stage2_distill.py reads; of a clone --teacher instead of --signals.
Writes  what stage2_distill.py writes; with --reanchor also OUTPUT/anchors/, which only a resumed
        run reads.

`diff stage2_distill.py examples/family/stage2.py` shows the fork. What is unchanged is imported.
The main is a copy, in which a comment that begins with "Family:" says what is changed.

    python examples/family/stage2.py --base B --rollouts D --signals F --objective gopd \\
        --signal-scale 1.25 --signal-clip inf --token-kl inf --output S
    python examples/family/stage2.py --base B --rollouts D --teacher T --objective jsd --output S
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from divergences import Head, forward_kl, jsd, reverse_kl, topk
from signals import score_role

import stage2_distill
from build_signals import check_vocabularies
from common import (
    MetricsLog,
    Output,
    Policy,
    Ranks,
    Rollouts,
    Row,
    UserError,
    check_policy,
    check_sampling,
    epoch_batches,
    fingerprint,
    head_logprobs,
    load_checkpoint,
    load_policy,
    load_rollouts,
    load_tensors,
    load_tokenizer,
    make_optimizer,
    make_row,
    means,
    model_folder,
    optimizer_step,
    pack,
    progress,
    require,
    row_logprobs,
    run,
    save_checkpoint,
    save_model,
    save_tensors,
    score,
    setup_ranks,
    start_run,
    text_config,
)
from stage1_extreme import group_statistics
from stage2_distill import (
    DistillInputs,
    LossOutput,
    bounded_target,
    choose_bounds,
    diagnostics,
    kl_penalty,
    load_signals,
    measure,
    pg_loss,
    print_targets,
    split_problems,
)

CLONES = ("jsd", "topk", "forward_kl", "reverse_kl")


@dataclass(kw_only=True)
class Args(stage2_distill.Args):
    signals: Path | None = None
    """file written by build_signals.py for these rollouts; clones have none"""
    teacher: str | None = None
    """policy to clone, a folder or hub name; for topk a file written by score_topk.py"""

    objective: Literal[
        "gopd",
        "trrd",
        "kdrl",
        "jsd",
        "topk",
        "forward_kl",
        "reverse_kl",
        "regression",
        "generalized_kl",
        "pg",
    ] = "gopd"
    """objective, see the top of this page"""
    jsd_beta: float = 0.5
    """jsd: weight of the teacher in the mixture; 0: forward KL, 1: reverse KL (GKD in TRL: 0.5)"""
    trrd_alpha: float = 0.5
    """trrd: share of the behavior policy in the ratio's anchor; 1: GRPO (0.5: a public script)"""
    kdrl_beta: float = 1e-3
    """kdrl: weight of 1/2 (policy - T)^2 per token (KDRL: annealed from 5e-3 to 1e-3)"""
    kl_target: float | None = None
    """KL proxy, nats per response, that --kl-coef is doubled or halved towards (PPO; ours: off)"""
    reanchor: bool = False
    """targets (of regression, bounds of pg and gopd) and penalty count from the epoch's start"""

    @property
    def source(self) -> Path:
        """The file or model folder that the student learns from."""
        if self.signals is not None:
            return self.signals
        return Path(self.teacher) if self.objective == "topk" else model_folder(self.teacher)

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        super().check()
        clones = self.objective in CLONES
        needed, other = ("teacher", "signals") if clones else ("signals", "teacher")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise UserError(
                f"--objective {self.objective} reads --{needed} and not --{other}; give the first "
                "and drop the second"
            )
        require(self, "jsd_beta trrd_alpha", lambda v: 0 <= v <= 1, "between 0 and 1")
        require(self, "kdrl_beta", lambda v: 0 <= v < math.inf, "0 or more, and finite")
        require(self, "kl_target", lambda v: v > 0, "above 0 nats")
        if self.kl_target is not None and not self.kl_coef:
            raise UserError("--kl-target adapts --kl-coef; start it above 0, for example at 0.01")
        if clones and (self.within_kl, self.reach_accuracy) != (None, None):
            raise UserError(f"--objective {self.objective}: has no signals to forecast from")
        with_target = ("regression", "generalized_kl", "pg", "gopd")
        if self.reanchor and not self.kl_coef and self.objective not in with_target:
            raise UserError(
                f"--reanchor --objective {self.objective}: nothing in it counts from the base; add "
                "--kl-coef, or drop --reanchor"
            )


# --------------------------------------------------------------------------------------------------
# The mathematics. The policy gradients share the clip of stage 2: with another input it is another
# objective.


@dataclass(frozen=True)
class Inputs(DistillInputs):
    """What an objective may look at; the new fields are None unless it needs them."""

    divergence: Tensor | None = None  # [R] nats, from the teacher's distribution to the student's
    teacher_logprobs: Tensor | None = None  # [R] float32, T
    reference_logprobs: Tensor | None = None  # [R] float32, ref
    advantages: Tensor | None = None  # [R] float32, GRPO's, of the rewards


def gopd_loss(x: Inputs, args: Args) -> LossOutput:
    """A = target - (policy - reference), detached: it ends where the policy meets its target."""
    moved = x.policy_logprobs.detach() - x.reference_logprobs
    return pg_loss(replace(x, target=x.target - moved), args)


def trrd_loss(x: Inputs, args: Args) -> LossOutput:
    """Clip of r = exp(alpha (policy - behavior) + (1 - alpha) (policy - T)); A of the rewards."""
    anchor = args.trrd_alpha * x.behavior_logprobs + (1 - args.trrd_alpha) * x.teacher_logprobs
    return pg_loss(replace(x, target=x.advantages, behavior_logprobs=anchor), args)


def kdrl_loss(x: Inputs, args: Args) -> LossOutput:
    """GRPO + beta 1/2 (policy - T)^2, the estimator k2.

    Its gradient is that of the reverse KL on fresh samples of the policy; on samples of the base it
    is so only near the base."""
    loss, metrics = pg_loss(replace(x, target=x.advantages), args)
    distance = (x.policy_logprobs - x.teacher_logprobs).square() / 2
    return loss + args.kdrl_beta * distance.sum(), metrics


def clone_loss(x: Inputs, args: Args) -> LossOutput:
    """Sum of the divergence from the teacher, which the forward has computed."""
    return x.divergence.sum(), {}


OBJECTIVES: dict[str, Callable[[Inputs, Args], LossOutput]] = {
    **stage2_distill.OBJECTIVES,
    "gopd": gopd_loss,
    "trrd": trrd_loss,
    "kdrl": kdrl_loss,
    **dict.fromkeys(CLONES, clone_loss),
}


def adapted_kl_coef(args: Args, kl_coef: float, kl_proxy: float) -> float:
    """PPO's rule: the weight doubles above 1.5 targets and halves below 1/1.5 of the target."""
    if args.kl_target is None:
        return kl_coef
    if not kl_proxy <= 1.5 * args.kl_target:
        return 2 * kl_coef
    return kl_coef / 2 if kl_proxy < args.kl_target / 1.5 else kl_coef


# --------------------------------------------------------------------------------------------------
# Data

Teacher = Callable[[Row], Any]  # gives the teacher's side of a divergence at R positions


def signal_arrays(args: Args, rollouts: Rollouts, ranks: Ranks) -> dict[str, Tensor]:
    """Loads the signal and what an objective reads besides: {field of Inputs, or "signal": [N]}.

    A clone has no signal. gopd, trrd and kdrl need the log-probs of the signal's own policies."""
    budget = args.micro_batch_tokens
    if args.signals is None:
        check_vocabularies([args.base] if args.objective == "topk" else [args.base, args.teacher])
        base = score(args.base, rollouts, budget, ranks)
        return {"behavior_logprobs": base, "base_logprobs": base, "signal": torch.zeros_like(base)}
    names = ("behavior_logprobs", "base_logprobs", "signal")
    arrays = dict(zip(names, load_signals(args, rollouts), strict=True))
    if args.objective == "gopd":
        reference = score_role(args.signals, "reference_0", rollouts, budget, ranks)
        arrays["reference_logprobs"] = reference
    elif args.objective in ("trrd", "kdrl"):
        advantages, _ = group_statistics(rollouts.rewards, rollouts.problem_index)
        arrays["advantages"] = advantages[rollouts.sequence_ids]
        arrays["teacher_logprobs"] = score_role(args.signals, "teacher_0", rollouts, budget, ranks)
    return arrays


def load_teacher(args: Args, rollouts: Rollouts, ranks: Ranks) -> Teacher | None:
    """Loads the policy to clone, or the file of its top k tokens; None without --teacher."""
    if args.teacher is None:
        return None
    if args.objective == "topk":
        return load_topk(args, rollouts, ranks)
    policy = load_policy(args.teacher, ranks, train=False)
    check_policy(policy, rollouts, args.teacher, ranks)

    def copied(hidden: Tensor, output: Output) -> Head:
        """Copies what FSDP frees after the forward."""
        bias = None if output.bias is None else output.bias.clone()
        return hidden, replace(output, weight=output.weight.clone(), bias=bias)

    @torch.no_grad()
    def at_row(row: Row) -> Head:
        """Returns hidden states [R, D] and output."""
        return policy(row, copied)

    return at_row


def load_topk(args: Args, rollouts: Rollouts, ranks: Ranks) -> Teacher:
    """Reads a file of score_topk.py. Raises UserError where it is of other rollouts or tokens."""
    arrays, metadata = load_tensors(Path(args.teacher))
    if metadata.get("rollouts") != fingerprint(rollouts.path) or "topk_ids" not in arrays:
        raise UserError(
            f"--teacher {args.teacher}: not made by score_topk.py for {rollouts.path}; run it on "
            "these rollouts"
        )
    ids, logprobs = arrays["topk_ids"].long(), arrays["topk_logprobs"]
    size = text_config(args.base).vocab_size
    if ids.max() >= size:
        raise UserError(
            f"--teacher {args.teacher}: has token {ids.max()}, but the vocabulary of "
            f"'{args.base}' has {size}; use models of one family"
        )
    return lambda row: (ids[row.flat].to(ranks.device), logprobs[row.flat].to(ranks.device))


def forward_row(
    policy: Policy, teacher: Teacher | None, row: Row, temperature: float, args: Args
) -> dict[str, Tensor]:
    """Computes policy_logprobs and entropy of a row, and of a clone the divergence: [R] each."""
    if teacher is None:
        logprobs, entropy = row_logprobs(policy, row, temperature)
        return {"policy_logprobs": logprobs, "entropy": entropy}
    given, targets = teacher(row), row.tokens[row.response_index]

    def head(hidden: Tensor, output: Output) -> dict[str, Tensor]:
        """Computes all three from the student's hidden states and output."""
        student = (hidden, output)
        if args.objective == "jsd":
            divergence = jsd(given, student, temperature, args.jsd_beta)
        else:
            kinds = {"topk": topk, "forward_kl": forward_kl, "reverse_kl": reverse_kl}
            divergence = kinds[args.objective](given, student, temperature)
        logprobs, entropy = head_logprobs(hidden, output, targets, temperature)
        return {"policy_logprobs": logprobs, "entropy": entropy, "divergence": divergence}

    return policy(row, head)


@torch.no_grad()
def anchor_logprobs(
    policy: Policy, rollouts: Rollouts, epoch: int, at_start: bool, args: Args, ranks: Ranks
) -> Tensor:
    """Log-probs [N] of the student at the start of an epoch.

    They are kept in a file, because a run that is resumed within the epoch has moved on."""
    path = args.output / "anchors" / f"epoch-{epoch:03d}.safetensors"
    if at_start:
        logprobs = torch.zeros(len(rollouts.tokens), device=ranks.device)
        temperature, lengths = check_sampling(rollouts, force=True), rollouts.lengths.tolist()
        budget = policy.budget(args.micro_batch_tokens)
        for members in pack(lengths, budget, ranks.world_size)[ranks.rank]:
            row = make_row(rollouts, members, ranks.device)
            logprobs[row.flat.to(ranks.device)] = row_logprobs(policy, row, temperature)[0]
        dist.all_reduce(logprobs)
        if ranks.rank == 0:
            save_tensors(path, {"logprobs": logprobs.cpu()}, {})
        dist.barrier()
    return load_tensors(path)[0]["logprobs"]


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks(args.cpu_offload)
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    args = choose_bounds(args, ranks)
    arrays = signal_arrays(args, rollouts, ranks)  # Family: {field of Inputs: [N]}
    signal, base_logprobs = arrays.pop("signal"), arrays["base_logprobs"]
    target = arrays["target"] = bounded_target(signal, base_logprobs, args)  # [N]
    trained, held_out = split_problems(rollouts, args.kl_holdout, args.seed)
    steps_per_epoch = math.ceil(len(trained) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    start = args.init or args.base
    tokenizer = load_tokenizer(args.base)
    inputs = {"rollouts": rollouts.path, "base": model_folder(args.base)}
    inputs |= {"init": model_folder(start), "source": args.source}
    teacher = load_teacher(args, rollouts, ranks)  # Family: None, unless a teacher is cloned
    memory = {"checkpointing": args.activation_checkpointing, "cpu_offload": args.cpu_offload}
    policy = load_policy(start, ranks, train=True, **memory)
    check_policy(policy, rollouts, start, ranks)
    if not start_run(args.output, args, inputs, ranks):  # all input is checked before this
        return
    if teacher is None:
        print_targets(args, signal, target, rollouts, ranks)
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    state = load_checkpoint(args.output, policy, optimizer, ranks) or {"step": 0}
    of_base = torch.equal(arrays["behavior_logprobs"], base_logprobs)
    watched = (policy, rollouts, held_out, base_logprobs, target, of_base, args, ranks)
    if state["step"] == 0:
        spent = measure(*watched)[0]["kl_proxy"]
        if not spent <= args.kl_budget:
            raise UserError(f"--kl-budget {args.kl_budget}: {start} starts at {spent:.3f} nats")
        ranks.print(f"KL proxy at the start: {spent:.4f} nats per response")
        state |= {"kl_proxy": spent, "kl_coef": args.kl_coef}  # Family: the weight may change
        save_checkpoint(args.output, state, policy, optimizer, ranks)  # the first within the budget
    spent, kl_coef = state["kl_proxy"], state["kl_coef"]
    log = MetricsLog(args.output, state["step"], ranks, args.tensorboard)
    bar = progress(ranks, total_steps, state["step"], f"stage 2 {args.objective}")

    for step in range(state["step"] + 1, total_steps + 1):
        # The responses of this step, packed into rows; every rank has equally many rows.
        epoch, within = divmod(step - 1, steps_per_epoch)
        batch = trained[epoch_batches(len(trained), args.batch_size, args.seed, epoch)[within]]
        lengths = rollouts.lengths[batch].tolist()
        rows = pack(lengths, policy.budget(args.micro_batch_tokens), ranks.world_size)[ranks.rank]

        # Family: from the second epoch on the student itself may take the base's place.
        if args.reanchor and epoch and (within == 0 or arrays["base_logprobs"] is base_logprobs):
            anchor = anchor_logprobs(policy, rollouts, epoch, within == 0, args, ranks)
            arrays |= {"base_logprobs": anchor, "target": bounded_target(signal, anchor, args)}

        # Losses are sums. One count over the whole batch divides them, so that neither the number
        # of rows nor that of ranks changes the objective.
        divisor = int(rollouts.response_lens[batch].sum())
        metrics = []
        for members in rows:
            row = make_row(rollouts, batch[members].tolist(), ranks.device)
            student = forward_row(policy, teacher, row, temperature, args)  # [R] each
            others = {name: v[row.flat].to(ranks.device) for name, v in arrays.items()}  # [R] each
            x = Inputs(**student, **others)  # Family: more fields
            loss_sum, measured = OBJECTIVES[args.objective](x, args)
            loss = loss_sum / divisor
            if kl_coef:
                penalty = kl_penalty(x.log_ratio, args.kl_direction).sum() / len(batch)
                loss = loss + kl_coef * penalty
            (loss * ranks.world_size).backward()  # FSDP averages over ranks; the objective is a sum
            share = 1 / (len(rows) * ranks.world_size)  # so that the losses of the rows add up
            measured["loss"] = torch.stack([loss.detach(), loss.new_tensor(share)])
            metrics.append(measured | diagnostics(x))

        # One optimizer step, logged as means over the global batch.
        values = means(metrics)
        learning_rate = args.learning_rate * min(1.0, step / max(1, args.warmup_steps))
        grad_norm = optimizer_step(policy, optimizer, learning_rate, args.max_grad_norm)
        values |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        measured_now = step % args.kl_every == 0 or step == total_steps
        if measured_now:
            values |= measure(*watched)[0]
            spent = values["kl_proxy"]
            kl_coef = values["kl_coef"] = adapted_kl_coef(args, kl_coef, spent)  # Family
        log.write({"step": step, "epoch": step / steps_per_epoch} | values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", kl=f"{spent:.2f}", refresh=False)
        bar.update()

        # The KL budget bounds the whole policy: past it, back to the last policy within it.
        if measured_now and not spent <= args.kl_budget:
            good = load_checkpoint(args.output, policy, optimizer, ranks)["step"]
            ranks.print(f"step {step}: KL proxy {spent:.3f} nats, past the budget; back to {good}")
            break
        if measured_now:
            state = {"step": step, "kl_proxy": spent, "kl_coef": kl_coef}
            save_checkpoint(args.output, state, policy, optimizer, ranks)

    bar.close()
    save_model(policy, tokenizer, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
