"""Stage 2: start at the base again and follow the signals as far as a trust region allows.

    target_t = clip(scale signal_t, -c, c); 0 where its size is below a floor, or the step alone
               costs more than delta nats: d(p exp(target_t) || p) > delta, p = base(y_t)
    log_ratio_t = log policy(y_t) - log base(y_t)     r_t = exp(log_ratio_t)

    regression  (log_ratio_t - target_t)^2               a clipped regression: no signal, no move
    pg          -min(r_t target_t, clip(r_t) target_t)   policy gradient; r_t to behavior here
    forward_kl  KL(teacher || policy), whole vocabulary  plain distillation baselines: clone the
    reverse_kl  KL(policy || teacher), whole vocabulary  teacher (need --teacher, read no signal)
    + kl_coef KL                                         per token at the prefixes the base visited

Trust region. Per token: signal clip c and floor, the bound delta on its KL, ratio clip (pg),
probability-difference mask (pg). Delta matters most with a ruined teacher: a bounded log-ratio is
not a bounded step. Where the base is sure (p near 1) a target of -3 moves nearly all probability to
tokens the base never writes, at many nats; on a rare token the same target costs nearly nothing.
For the whole: KL penalty, and a KL budget in nats a response: sum_t r - 1 - log r on responses to
*held-out problems of the rollouts*, never trained on. It is a proxy, at the base's prefixes; the KL
that is reported is evaluate.py's, on the student's own samples. Past the budget the run goes back
to its last policy within it, and ends (stop) or goes on with half the learning rate (rollback).

Reads   --base (a model folder), --rollouts (of evaluate.py), --signals (of build_signals.py, for
        the same rollouts).
Writes  OUTPUT/ the student as a Hugging Face folder, args.json, metrics.jsonl (docs/stage2.md names
        every key), and while it runs checkpoints/resume-STEP: the same command continues there and
        ends with the same bits on the CPU.

What is not known of the paper (2605.25582): its trust-region rule and the pair of distillation
objectives it compares. A default comes from the source that its help text names, or is ours; what
the arithmetic example was tuned to stands in run.sh and steps.sh of examples/arithmetic.

    python stage2_distill.py --base B --rollouts D --signals F --objective regression --output S
    torchrun --nproc-per-node 8 -- stage2_distill.py --base B --rollouts D --signals F --output S
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common import (  # isort: skip
    MetricsLog, Policy, Ranks, Rollouts, Row, UserError, catch_sigterm, check_noise, check_sampling,
    check_tensorboard, check_vocabulary, chunked_kl, clip_gradients, epoch_batches, exit_by_sigterm,
    fingerprint, kl_penalty, load_checkpoint, load_policy, load_rollouts, load_tensors,
    load_tokenizer, make_optimizer, make_row, mean_metrics, model_folder, noise_sums,
    optimizer_step, pack, progress, remove_checkpoint, require, row_logprobs, run, safe_exp,
    save_checkpoint, save_model, score, setup_ranks, start_run, sum_and_count, sync_gradients,
    to_device,
)  # fmt: skip

ARRAYS = ("behavior_logprobs", "base_logprobs", "signal")  # what is read of a signals file
MIN_LEARNING_RATE_FACTOR = 1 / 16  # rollback: at the fourth halving the budget is spent


@dataclass
class Args:
    base: str
    """base policy: where the student starts (but see --init), and what its KL is measured from"""
    rollouts: Path
    """folder written by evaluate.py: the same fixed data as stage 1"""
    output: Path
    """run folder; the student is in it; the same command continues an interrupted run"""
    signals: Path | None = None
    """file written by build_signals.py for these rollouts"""
    teacher: str | None = None
    """policy to clone, for forward_kl and reverse_kl"""
    init: str | None = None
    """policy to start from instead of the base (targets, ratios and KL stay against the base)"""

    objective: Literal["regression", "pg", "forward_kl", "reverse_kl"] = "regression"
    """objective, see the top of this page"""
    signal_scale: float = 1.0
    """factor on the signal (lambda of G-OPD, whose scripts use 1 and 1.25)"""
    signal_clip: float = 2.0
    """c, bound of the scaled signal, nats a token (2: ours; the arithmetic example: 2.5 and 3)"""
    signal_floor: float = 0.0
    """scaled |signal| below this, nats a token, counts as 0 (0: off; arithmetic: 0.5 to 1.5)"""
    token_kl: float = 0.2
    """delta, nats: tokens whose target alone costs more are held at the base; inf: off (ours)"""
    clip_low: float = 0.2
    """eps_low of pg: ratios are clipped at 1 - eps_low (PPO)"""
    clip_high: float = 0.28
    """eps_high of pg: ratios are clipped at 1 + eps_high (DAPO's clip-higher)"""
    prob_mask: float | None = None
    """pg: drop tokens whose probability moved further than this along the signal (DPPO: 0.2)"""
    kl_coef: float = 0.0
    """weight of the KL between base and policy, nats a response; 0: none (ours)"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base || policy); reverse: KL(policy || base)"""
    kl_budget: float | None = None
    """KL proxy the student may spend, nats a response; default: no budget"""
    kl_budget_action: Literal["stop", "rollback"] = "stop"
    """past the budget: end with the last policy within it, or go on from it at half the rate"""
    kl_every: int = 16
    """steps between measurements of the KL proxy (ours); one also ends every run"""
    kl_holdout: float = 0.05
    """share of the problems held out of training to measure the KL proxy on (ours)"""

    epochs: int = 2
    """passes over the fixed data (ours)"""
    batch_size: int = 256
    """responses per optimiser step, over all ranks and micro-batches (ours)"""
    micro_batch_tokens: int = 8192
    """token budget of a packed row; changes memory and speed, never the objective"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW (1e-6: common in RL; the arithmetic example: 1e-4 to 3e-4)"""
    warmup_steps: int = 10
    """steps of linear warm-up, then constant (ours)"""
    weight_decay: float = 0.0
    """decoupled weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """global gradient norm is clipped to this (common default)"""
    max_noise: float = 0.2
    """share of held-out tokens whose student/base ratio may start outside [0.9, 1.1]"""
    activation_checkpointing: bool = False
    """decoder blocks keep their input only, and run again in the backward: memory for a third"""
    defer_gradient_sync: bool = False
    """reduce gradients once a step, not a micro-batch; each rank holds them whole, in float32"""
    shard_size: int | None = None
    """ranks that share one copy of the model (8: within a node of 8 GPUs); default: all"""
    force: bool = False
    """train on rollouts that were sampled with top-p below 1"""
    seed: int = 0
    """choice of the held-out problems and order of the responses in each epoch"""
    tensorboard: bool = False
    """also write the numbers of metrics.jsonl to OUTPUT/tensorboard (its package is optional)"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        clones = self.objective in CLONES
        if clones and not self.teacher:
            raise UserError(f"--objective {self.objective} clones a policy over the whole "
                            "vocabulary; name it with --teacher")  # fmt: skip
        if clones and self.signals:
            raise UserError(f"--objective {self.objective} reads no signal; "
                            "drop --signals or use regression or pg")  # fmt: skip
        if not clones and not self.signals:
            needed = "needs --signals, a file of build_signals.py"
            raise UserError(f"--objective {self.objective} {needed}")
        if not clones and self.teacher:
            raise UserError(f"--teacher is not read by --objective {self.objective}; "
                            "its signal is in --signals")  # fmt: skip
        if self.prob_mask is not None and self.objective != "pg":
            raise UserError("--prob-mask belongs to --objective pg")
        counts = "epochs batch_size micro_batch_tokens kl_every"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "shard_size", lambda v: v is None or v >= 1, "1 or more")
        require(self, "kl_budget", lambda v: v is None or v > 0, "above 0 nats")
        require(self, "prob_mask", lambda v: v is None or v >= 0, "0 or more")
        require(self, "max_noise", lambda v: 0 <= v <= 1, "between 0 and 1")
        above_0 = "learning_rate signal_clip token_kl max_grad_norm"
        require(self, above_0, lambda v: v > 0, "above 0")
        zero_up = "signal_floor kl_coef weight_decay warmup_steps clip_high"
        require(self, zero_up, lambda v: v >= 0, "0 or more")
        require(self, "clip_low", lambda v: 0 <= v <= 1, "between 0 and 1")
        require(self, "kl_holdout", lambda v: 0 < v < 1, "between 0 and 1")
        require(self, "signal_scale", math.isfinite, "finite")
        low_enough = f"at most --signal-clip {self.signal_clip:g}, else no target is left"
        require(self, "signal_floor", lambda v: v <= self.signal_clip, low_enough)
        if self.tensorboard:
            check_tensorboard()


# --------------------------------------------------------------------------------------------------
# The mathematics. T tokens of one packed row; an objective returns an unnormalised sum, the loop
# divides.


@dataclass(frozen=True)
class DistillInputs:
    """What an objective may look at."""

    policy_logprobs: Tensor  # [T] float32, carries the gradient; zero on prompts
    behavior_logprobs: Tensor  # [T] float32; zero on prompts
    base_logprobs: Tensor  # [T] float32; zero on prompts
    target: Tensor  # [T] float32, the bounded signal; zero on prompts
    response_mask: Tensor  # [T] bool
    teacher_kl: Tensor  # [T] whole-vocabulary KL to the teacher; zero for regression and pg


LossOutput = tuple[Tensor, dict[str, Tensor]]  # unnormalised sum; {metric: tensor [sum, count]}


def bernoulli_kl(a_logprobs: Tensor, p_logprobs: Tensor) -> Tensor:
    """d(a || p) of coins given by log a and log p: the least KL of moving a token's probability
    from p to a, whatever becomes of the other tokens; a above 1 counts as 1. Same shape, nats."""
    log_a, log_p = a_logprobs.clamp(max=-1e-7), p_logprobs.clamp(max=-1e-7)  # log(1 - p) is finite
    log_not_a, log_not_p = torch.log(-torch.expm1(log_a)), torch.log(-torch.expm1(log_p))
    return log_a.exp() * (log_a - log_p) - torch.expm1(log_a) * (log_not_a - log_not_p)


def bounded_target(
    signal: Tensor, base_logprobs: Tensor, *, signal_scale: float, signal_clip: float,
    signal_floor: float, token_kl: float, **_: Any,
) -> Tensor:  # fmt: skip
    """clip(scale signal, -c, c), and 0 (hold the base) where its size is below the floor, or where
    the step alone costs more than delta: d(base exp(target) || base) > delta."""
    target = (signal_scale * signal).clamp(-signal_clip, signal_clip)
    cost = bernoulli_kl(base_logprobs + target, base_logprobs)
    return torch.where((target.abs() < signal_floor) | (cost > token_kl), 0.0, target)


def regression_loss(x: DistillInputs, **_: Any) -> LossOutput:
    """(log policy - log base - target)^2: without signal the student is held at the base."""
    error = (x.policy_logprobs - x.base_logprobs - x.target) * x.response_mask
    return error.square().sum(), {}


def pg_loss(
    x: DistillInputs, *, clip_low: float, clip_high: float, prob_mask: float | None, **_: Any
) -> LossOutput:
    """-min(r A, clip(r) A), A = target, r against the behavior policy, inside the trust region."""
    advantages = x.target
    ratio = safe_exp(x.policy_logprobs - x.behavior_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    keep = x.response_mask
    if prob_mask is not None:  # DPPO: distance in probability: rare tokens not clipped for noise
        moved = x.policy_logprobs.detach().exp() - x.behavior_logprobs.exp()
        keep = keep & (moved * advantages.sign() <= prob_mask)
    loss = -(torch.minimum(ratio * advantages, clipped * advantages) * keep).sum()
    held = ((clipped * advantages < ratio * advantages) | ~keep) & x.response_mask
    return loss, {"clip_share": sum_and_count(held, x.response_mask)}


def clone_loss(x: DistillInputs, **_: Any) -> LossOutput:
    """Sum of the divergence that CLONES names; the forward has computed it."""
    return x.teacher_kl.sum(), {}


Head = tuple[Tensor, Tensor]  # hidden [R, D] and weight [V, D]: logits are their product


def forward_kl(teacher: Head, student: Head, temperature: float, /, **_: Any) -> Tensor:
    """KL(teacher || student) at R positions -> [R]."""
    return chunked_kl(*teacher, *student, temperature)


def reverse_kl(teacher: Head, student: Head, temperature: float, /, **_: Any) -> Tensor:
    """KL(student || teacher) at R positions -> [R]."""
    return chunked_kl(*student, *teacher, temperature)


# Each is divided by the response tokens of the global batch.
OBJECTIVES: dict[str, Callable[..., LossOutput]] = {
    "regression": regression_loss,
    "pg": pg_loss,
    "forward_kl": clone_loss,
    "reverse_kl": clone_loss,
}


# Two choices of the loop that a fork may replace (examples/family/stage2.py does).


def next_kl_coef(args: Args, kl_coef: float, kl_proxy: float) -> float:
    """Weight of the KL penalty after a measurement of the KL proxy, nats; here it stays."""
    return kl_coef


def epoch_anchor(
    args: Args, epoch: int, base_logprobs: Tensor, score_now: Callable[[], Tensor], ranks: Ranks
) -> Tensor:
    """What targets, losses and penalty count from in an epoch, log-probs [N]; here the base.

    Asked at an epoch's start and where a run is resumed; score_now() gives the policy's own."""
    return base_logprobs


@torch.no_grad()
def diagnostics(x: DistillInputs, entropy: Tensor) -> dict[str, Tensor]:
    """What one watches while a student moves -> {name: [sum, count]}."""
    log_ratio, mask = x.policy_logprobs - x.base_logprobs, x.response_mask
    return {
        "ratio": sum_and_count(safe_exp(log_ratio), mask),
        "entropy": sum_and_count(entropy, mask),
        "target_share": sum_and_count((x.target != 0).float(), mask),
        "log_ratio_credit": sum_and_count(log_ratio, mask & (x.target > 0)),  # follows the signal
        "log_ratio_blame": sum_and_count(log_ratio, mask & (x.target < 0)),  # up, and down
    }


# --------------------------------------------------------------------------------------------------
# Data


def load_signals(args: Args, rollouts: Rollouts, inputs: dict[str, str]) -> tuple[Tensor, ...]:
    """behavior_logprobs, base_logprobs, signal: three [N] float32.

    Raises UserError where the file belongs to other rollouts or another base than `inputs` does,
    the fingerprints of both."""
    tensors, metadata = load_tensors(args.signals, dict.fromkeys(ARRAYS, torch.float32))
    if metadata.get("rollouts") != inputs["rollouts"]:
        raise UserError(f"--signals {args.signals}: made for other rollouts than {rollouts.path}; "
                        "run build_signals.py on these")  # fmt: skip
    made_with = metadata["models"]["base"]
    if made_with["fingerprint"] != inputs["base"]:
        raise UserError(f"--signals {args.signals}: made with base {made_with['path']}, "
                        f"not --base {args.base}; run build_signals.py with it")  # fmt: skip
    for name in ARRAYS:
        if tensors[name].shape != rollouts.tokens.shape or not tensors[name].isfinite().all():
            raise UserError(f"--signals {args.signals}: '{name}' is not finite or not aligned with "
                            "the rollouts; make it again")  # fmt: skip
    return tuple(tensors[name] for name in ARRAYS)


def load_teacher(args: Args, rollouts: Rollouts, ranks: Ranks) -> Policy:
    """The policy to clone, beside the student."""
    check_vocabulary([args.base, args.teacher], rollouts)
    return load_policy(args.teacher, ranks, train=False)


# objective -> (loader of what is cloned, its divergence from the student)
CLONES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "forward_kl": (load_teacher, forward_kl),
    "reverse_kl": (load_teacher, reverse_kl),
}


def more_arrays(args: Args, rollouts: Rollouts) -> dict[str, Tensor]:
    """What an objective reads besides the signals, {its keyword: [N]}; here nothing."""
    return {}


def print_targets(
    args: Args, signal: Tensor, target: Tensor, rollouts: Rollouts, ranks: Ranks
) -> None:
    """What the trust region makes of the signal, as shares of the response tokens."""
    mask = rollouts.response_mask
    scaled, kept = (args.signal_scale * signal[mask]).abs(), target[mask] != 0

    def share(tokens: Tensor) -> str:
        """Of the response tokens, in per cent."""
        return f"{tokens.float().mean():.1%}"

    ranks.print(
        f"targets: {share(kept)} of response tokens get one ({share(kept & (target[mask] < 0))} "
        f"down), {share(kept & (scaled > args.signal_clip))} clipped at {args.signal_clip:g}; held "
        f"at the base for --token-kl {args.token_kl:g}: "
        f"{share(~kept & (scaled >= args.signal_floor) & (scaled > 0))}"
    )


def split_problems(rollouts: Rollouts, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the responses to train on, and of those to problems held out for the KL budget."""
    n_problems = int(rollouts.problem_index.max()) + 1
    held_out = max(1, round(share * n_problems))
    if held_out >= n_problems:
        raise UserError(f"--kl-holdout {share}: leaves none of {n_problems} problems to train on")
    order = torch.randperm(n_problems, generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(rollouts.problem_index.long(), order[:held_out])
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


@torch.no_grad()
def measure_kl_proxy(
    policy: Policy, rollouts: Rollouts, held_out: Tensor, base_logprobs: Tensor,
    temperature: float, args: Args, ranks: Ranks,
) -> tuple[float, Tensor]:  # fmt: skip
    """sum_t r - 1 - log r, mean over held-out responses, nats: KL(base || policy) there; and the
    noise_sums of log r, which are the noise floor before the first step."""
    total = torch.zeros(5, device=ranks.device)
    lengths, budget = rollouts.lengths[held_out].tolist(), args.micro_batch_tokens
    for members in pack(lengths, budget, ranks.world_size, policy.attention_cost)[ranks.rank]:
        row = make_row(rollouts, held_out[members].tolist(), ranks.device)
        base = to_device(base_logprobs[row.flat], ranks.device)
        log_ratio = row_logprobs(policy, row, temperature)[0] - base
        total[0] += (kl_penalty(log_ratio, "forward") * row.response_mask).sum()
        total[1:] += noise_sums(log_ratio, row.response_mask)
    total = ranks.sum(total).cpu()
    return total[0].item() / len(held_out), total[1:]


def check_start(args: Args, spent: float, ranks: Ranks) -> None:
    """Prints the KL proxy that --init has, nats. Raises UserError where it is past the budget."""
    ranks.print(f"--init {args.init}: starts at a KL proxy of {spent:.3f} nats")
    if args.kl_budget is not None and not spent <= args.kl_budget:
        raise UserError(f"--kl-budget {args.kl_budget}: --init {args.init} starts past it, at "
                        f"{spent:.3f} nats; raise it, or start nearer to --base")  # fmt: skip


def forward_row(
    policy: Policy, teacher: Callable[..., Any] | None, row: Row, temperature: float,
    /, objective: str, **settings: Any,  # the slash: settings hold Args.teacher too
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Student log-probs, entropy, divergence from the teacher (zero without one): three [T]."""
    if teacher is None:
        logprobs, entropy = row_logprobs(policy, row, temperature)
        return logprobs, entropy, torch.zeros_like(entropy)
    with torch.no_grad():
        given = teacher(row, lambda hidden, weight: (hidden, weight))  # a Head, if not a fork's

    def divergence(hidden: Tensor, weight: Tensor) -> Tensor:
        """From the teacher's head to the student's, at each response token."""
        return CLONES[objective][1](given, (hidden, weight), temperature, **settings)

    return row_logprobs(policy, row, temperature, divergence)


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    torch.manual_seed(args.seed)
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    inputs = {"base": fingerprint(model_folder(args.base)), "rollouts": fingerprint(rollouts.path)}
    teacher = None
    if args.signals:
        behavior_logprobs, base_logprobs, signal = load_signals(args, rollouts, inputs)
        inputs["signals"] = fingerprint(args.signals)
    else:
        path = Path(args.teacher)  # a file: a fork's
        inputs["teacher"] = fingerprint(path if path.is_file() else model_folder(args.teacher))
        teacher = CLONES[args.objective][0](args, rollouts, ranks)
    if args.init:
        inputs["init"] = fingerprint(model_folder(args.init))
    check_vocabulary([args.base, args.init or args.base], rollouts)
    trained, held_out = split_problems(rollouts, args.kl_holdout, args.seed)
    tokenizer = load_tokenizer(args.base)
    policy = load_policy(args.base, ranks, train=True, **vars(args))
    if not start_run(args.output, args, inputs, ranks):
        return
    if teacher is not None:
        row_budget, what = args.micro_batch_tokens, "score the base"
        base_logprobs = score(policy, rollouts, temperature, row_budget, ranks, what)
        behavior_logprobs, signal = base_logprobs, torch.zeros_like(base_logprobs)
    targets = bounded_target(signal, base_logprobs, **vars(args))
    arrays = (behavior_logprobs, base_logprobs, targets)
    more = more_arrays(args, rollouts)
    if args.signals:
        print_targets(args, signal, targets, rollouts, ranks)

    if args.init:
        del policy  # one model in memory at a time
        policy = load_policy(args.init, ranks, train=True, **vars(args))
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    state = load_checkpoint(args.output, policy, optimizer, ranks)
    measure = functools.partial(
        measure_kl_proxy, policy, rollouts, held_out, base_logprobs, temperature, args, ranks
    )
    if not state:
        spent, noise = measure()
        if args.init:
            check_start(args, spent, ranks)
        else:
            check_noise(noise, "student minus base log-probs", args.max_noise, ranks)
        state = {"step": 0, "learning_rate_factor": 1.0, "kl_coef": args.kl_coef}
        save_checkpoint(args.output, state, policy, optimizer, ranks)  # the first way back
    step = state["step"]
    log = MetricsLog(args.output, step, ranks, args.tensorboard)
    steps_per_epoch = -(-len(trained) // args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    loss_function = OBJECTIVES[args.objective]
    score_now = functools.partial(
        score, policy, rollouts, temperature, args.micro_batch_tokens, ranks, "score the student"
    )
    anchor, first_step = base_logprobs, step  # the anchor stays the base, unless in a fork
    bar = progress(ranks, total_steps, step, f"stage 2 {args.objective}")
    sigterm = catch_sigterm()

    while step < total_steps and state["learning_rate_factor"] > MIN_LEARNING_RATE_FACTOR:
        epoch, within = divmod(step, steps_per_epoch)
        if within == 0 or step == first_step:
            before, anchor = anchor, epoch_anchor(args, epoch, base_logprobs, score_now, ranks)
            if anchor is not before:
                arrays = (behavior_logprobs, anchor, bounded_target(signal, anchor, **vars(args)))
        batch = trained[epoch_batches(len(trained), args.batch_size, args.seed, epoch)[within]]
        # One count over the global batch: neither micro-batches nor ranks change the objective.
        n_tokens, n_responses = int(rollouts.response_lens[batch].sum()), len(batch)
        lengths, budget = rollouts.lengths[batch].tolist(), args.micro_batch_tokens
        rows = pack(lengths, budget, ranks.world_size, policy.attention_cost)[ranks.rank]
        sums: dict[str, Tensor] = {}
        for i, members in enumerate(rows):
            row = make_row(rollouts, batch[members].tolist(), ranks.device)
            policy_logprobs, entropy, teacher_kl = forward_row(
                policy, teacher, row, temperature, **vars(args)
            )
            mask = row.response_mask
            behavior, base, target = (to_device(a[row.flat], ranks.device) * mask for a in arrays)
            x = DistillInputs(policy_logprobs, behavior, base, target, mask, teacher_kl)
            own = {name: to_device(a[row.flat], ranks.device) for name, a in more.items()}
            loss_sum, metrics = loss_function(x, **vars(args), **own)
            loss = loss_sum / n_tokens
            if state["kl_coef"]:
                kl = kl_penalty(policy_logprobs - base, args.kl_direction)
                kl_sum = (kl * mask).sum()
                loss = loss + state["kl_coef"] * kl_sum / n_responses
            sync_gradients(policy, i + 1 == len(rows), args.defer_gradient_sync)
            (loss * ranks.world_size).backward()  # FSDP averages over ranks; the objective is a sum
            metrics |= diagnostics(x, entropy)
            share = 1 / (len(rows) * ranks.world_size)  # so that the micro-batches' losses add up
            metrics["loss"] = torch.stack([loss.detach(), loss.new_tensor(share)])
            sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}

        grad_norm = clip_gradients(policy, args.max_grad_norm)
        sums["grad_norm"] = torch.stack([grad_norm, torch.ones_like(grad_norm)])
        sums["sigterm"] = torch.ones_like(sums["loss"]) * bool(sigterm)  # any rank: 1, none: nan
        values = mean_metrics(sums, ranks)
        warmup = min(1.0, (step + 1) / max(1, args.warmup_steps))
        learning_rate = args.learning_rate * warmup * state["learning_rate_factor"]
        optimizer_step(optimizer, learning_rate, values, state, args.output)
        state["step"] = step = step + 1
        stop = values.pop("sigterm") > 0
        bar.update()

        within_budget = args.kl_budget is None  # not known under a budget, until measured
        if step % args.kl_every == 0 or step == total_steps:
            spent = values["kl_proxy"] = measure()[0]
            state["kl_coef"] = values["kl_coef"] = next_kl_coef(args, state["kl_coef"], spent)
            skipped = {"skipped": state["skipped"]} if state["skipped"] else {}
            bar.set_postfix(kl_proxy=f"{spent:.3f}", **skipped, refresh=False)
            kl_budget = math.inf if args.kl_budget is None else args.kl_budget
            within_budget = math.isfinite(spent) and spent <= kl_budget
            if not within_budget:
                # To the last policy within the budget.
                good = load_checkpoint(args.output, policy, optimizer, ranks)["step"]
                ranks.print(f"step {step}: KL proxy of {spent:.3f} nats, budget {kl_budget}; "
                            f"back to the checkpoint of step {good}")  # fmt: skip
                state["learning_rate_factor"] /= 2
        done = {"step": step, "epoch": step / steps_per_epoch, "learning_rate": learning_rate}
        log.write(done | values)
        measured = "kl_proxy" in values
        rolled_back = measured and not within_budget and args.kl_budget_action == "rollback"
        if rolled_back or (within_budget and (measured or stop)):  # log first: resume keeps it
            save_checkpoint(args.output, state, policy, optimizer, ranks)
        if args.kl_budget_action == "stop" and state["learning_rate_factor"] < 1:
            break
        if stop and step < total_steps:
            exit_by_sigterm(args.output, ranks)

    bar.close()
    save_model(policy, tokenizer, args.output, ranks)
    remove_checkpoint(args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
