"""Stage 2: start at the base again and follow the signals as far as a trust region allows.

    target_t = clip(scale signal_t, -c, c); 0 where its size is below a floor, or where the step
               alone costs more than delta nats: d(p exp(target_t) || p) > delta, p = base(y_t)
    log_ratio_t = log policy(y_t) - log base(y_t)     r_t = exp(log_ratio_t)

    generalized_kl  exp(target_t)(target_t - log_ratio_t) - exp(target_t) + r_t
    regression      (log_ratio_t - target_t)^2                 without signal the student stays
    pg              -min(r_t target_t, clip(r_t) target_t)     here r_t is to the behavior policy
    + kl_coef KL    at the prefixes that the base visited

Each token is bounded by the clip c, the floor and the bound delta on its KL, and in pg by the ratio
clip and a mask on the difference in probability. Scale and bounds can be chosen by the forecast of
build_signals.py (--within-kl, --reach-accuracy). Delta matters most with a ruined teacher, because
a bounded log-ratio is not a bounded step. Where the base is sure (p near 1), a target of -3 moves
nearly all probability to tokens that the base never writes, and costs many nats; on a rare token
the same target costs nearly nothing.

The whole policy is bounded by a KL penalty and by a KL budget. The budget is in nats per response;
it is measured on held-out problems as the mean of sum_t (r_t - 1 - log r_t). When a measurement
exceeds it, the run returns to its last checkpoint within the budget, and ends there. This is a
proxy at the base's prefixes. The KL to report is evaluate.py's, on the student's own samples.

Reads   --base (a model folder), --rollouts (written by evaluate.py), --signals (written by
        build_signals.py for the same rollouts).
Writes  OUTPUT/ the student as a Hugging Face folder, args.json, metrics.jsonl (docs/stage2.md names
        every key) and checkpoints/resume-STEP. A killed run is continued by the same command, and
        on the CPU it ends with the same bytes.

The paper's trust-region rule and the pair of distillation objectives that it compares are not known
to us (arXiv 2605.25582). Each default comes from the source that its help text names, or is ours.
The settings of the arithmetic example are in examples/arithmetic/run.sh and steps.sh.

    python stage2_distill.py --base B --rollouts D --signals F --within-kl 1 --output S
    torchrun --nproc-per-node 8 -- stage2_distill.py --base B --rollouts D --signals F --output S
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from common import (  # isort: skip
    MetricsLog, Policy, Ranks, Rollouts, UserError, check_policy, check_sampling, epoch_batches,
    fingerprint, load_checkpoint, load_policy, load_rollouts, load_tensors, load_tokenizer,
    make_optimizer, make_row, means, model_folder, optimizer_step, pack, progress, read_json,
    require, row_logprobs, run, save_checkpoint, save_model, setup_ranks, start_run,
    sum_and_count, take,
)  # fmt: skip

LOG_RATIO_CLAMP = 20.0  # inside exp only: exp(20) is finite in float32; beyond it no gradient
SPENDS_TOO_MUCH = 1.25  # times the KL that the targets need
BOUNDS = ("signal_scale", "signal_clip", "signal_floor", "token_kl")


@dataclass
class Args:
    base: str
    """base policy, a folder or hub name: training starts there, and the KL is measured from it"""
    rollouts: Path
    """folder written by evaluate.py: the same fixed data as in stage 1"""
    signals: Path
    """file written by build_signals.py for these rollouts"""
    output: Path
    """run folder, which becomes the student; the same command continues an interrupted run"""
    init: str | None = None
    """policy to start from instead of the base (targets, ratios and KL stay against the base)"""

    objective: Literal["regression", "generalized_kl", "pg"] = "regression"
    """objective, see the top of this help"""
    signal_scale: float = 1.0
    """factor on the signal (lambda of G-OPD, whose scripts use 1 and 1.25)"""
    signal_clip: float = 3.0
    """c, bound of the scaled signal, nats per token (ours)"""
    signal_floor: float = 0.3
    """a scaled |signal| below this, nats per token, counts as 0 (0: off; ours)"""
    token_kl: float = 1.5
    """delta, nats: a token whose target alone costs more is held at the base (inf: off; ours)"""
    within_kl: float | None = None
    """choose the four bounds above: the largest forecast accuracy within this KL, nats"""
    reach_accuracy: float | None = None
    """choose the four bounds above: the least forecast KL that reaches this accuracy"""
    clip_low: float = 0.2
    """eps_low of pg: ratios are clipped at 1 - eps_low (0.2: PPO)"""
    clip_high: float = 0.28
    """eps_high of pg: ratios are clipped at 1 + eps_high (0.28: DAPO's clip-higher)"""
    prob_mask: float | None = None
    """pg: drop tokens whose probability moved further than this along the signal (DPPO: 0.2)"""
    kl_coef: float = 0.0
    """weight of the KL between base and policy, nats per response (0: none; ours)"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base || policy); reverse: KL(policy || base)"""
    kl_budget: float = math.inf
    """KL proxy that the student may spend, nats per response (inf: no budget; ours)"""
    kl_every: int = 16
    """steps between measurements of the KL proxy (ours); the last step is measured too"""
    kl_holdout: float = 0.05
    """share of the problems held out of training to measure the KL proxy on (ours)"""

    epochs: int = 2
    """passes over the fixed data (ours)"""
    batch_size: int = 256
    """responses per optimizer step, over all ranks and micro-batches (ours)"""
    micro_batch_tokens: int = 8192
    """token budget of a packed row; changes memory and speed, never the objective"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW (1e-6: common in RL; the arithmetic example: 1e-4 to 3e-4)"""
    warmup_steps: int = 10
    """steps of linear warm-up, constant afterwards (ours)"""
    weight_decay: float = 0.0
    """decoupled weight decay of AdamW (common default in RL)"""
    max_grad_norm: float = 1.0
    """the global gradient norm is clipped to this (common default)"""
    activation_checkpointing: bool = False
    """recompute each decoder block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """weights, gradients, moments lie on the CPU (16 bytes a parameter): for small GPUs, slower"""
    force: bool = False
    """train on rollouts that were sampled with top-p below 1"""
    seed: int = 0
    """choice of the held-out problems, and order of the responses in each epoch"""
    tensorboard: bool = False
    """also write the numbers of metrics.jsonl to OUTPUT/tensorboard (pip install tensorboard)"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        if self.prob_mask is not None and self.objective != "pg":
            raise UserError("--prob-mask belongs to --objective pg; drop it")
        counts = "epochs batch_size micro_batch_tokens kl_every"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "learning_rate max_grad_norm", lambda v: 0 < v < math.inf, "above 0, finite")
        require(self, "signal_clip token_kl kl_budget", lambda v: v > 0, "above 0 nats")
        at_least_0 = "signal_floor kl_coef weight_decay warmup_steps clip_high prob_mask"
        require(self, at_least_0, lambda v: 0 <= v < math.inf, "0 or more, and finite")
        require(self, "clip_low", lambda v: 0 <= v <= 1, "between 0 and 1")
        require(self, "kl_holdout reach_accuracy", lambda v: 0 < v < 1, "between 0 and 1")
        require(self, "within_kl", lambda v: 0 < v < math.inf, "above 0 nats, finite")
        if self.within_kl is not None and self.reach_accuracy is not None:
            raise UserError("--reach-accuracy: not together with --within-kl; drop one")
        require(self, "signal_scale", math.isfinite, "finite")
        low_enough = f"at most --signal-clip {self.signal_clip:g}, else no target is left"
        require(self, "signal_floor", lambda v: v <= self.signal_clip, low_enough)


# --------------------------------------------------------------------------------------------------
# The mathematics. An objective sees the R response tokens of one packed row and returns an
# unnormalised sum, which the loop divides. Prompt tokens do not exist here.


@dataclass(frozen=True)
class DistillInputs:
    """Holds what an objective may look at."""

    policy_logprobs: Tensor  # [R] float32, carries the gradient
    base_logprobs: Tensor  # [R] float32
    entropy: Tensor  # [R] float32, of the policy, without gradient
    behavior_logprobs: Tensor  # [R] float32, of the policy that sampled the tokens
    target: Tensor  # [R] float32, the bounded signal

    @property
    def log_ratio(self) -> Tensor:
        """[R]: log policy - log base."""
        return self.policy_logprobs - self.base_logprobs


LossOutput = tuple[Tensor, dict[str, Tensor]]  # unnormalised sum, {metric: tensor [sum, count]}


def safe_exp(log_ratio: Tensor) -> Tensor:
    """Returns exp of the argument clamped to +-20, which is finite; no gradient beyond it."""
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()


def kl_penalty(log_ratio: Tensor, direction: str) -> Tensor:
    """Returns the KL between base and policy per token [R], on tokens that the *base* sampled.

    forward: r - 1 - log r, whose mean is KL(base || policy); reverse: r log r - r + 1, whose mean
    is KL(policy || base). Both means are exact, no term is negative, and r = 1 is the minimum."""
    ratio = safe_exp(log_ratio)
    return ratio - 1 - log_ratio if direction == "forward" else ratio * log_ratio - ratio + 1


def bernoulli_kl(a_logprobs: Tensor, p_logprobs: Tensor) -> Tensor:
    """Returns d(a || p) in nats of two coins, from log a and log p. An a above 1 counts as 1.

    No distribution that moves a token's probability from p to a costs less."""
    log_a, log_p = a_logprobs.clamp(max=-1e-7), p_logprobs.clamp(max=-1e-7)  # log(1 - p) is finite
    log_not_a, log_not_p = torch.log(-torch.expm1(log_a)), torch.log(-torch.expm1(log_p))
    # a log(a/p) + (1 - a) log((1 - a)/(1 - p))
    return log_a.exp() * (log_a - log_p) - torch.expm1(log_a) * (log_not_a - log_not_p)


def bounded_target(signal: Tensor, base_logprobs: Tensor, args: Args) -> Tensor:
    """clip(scale signal, -c, c), and 0 (hold the base) where its size is below the floor or where
    the step alone costs more than delta: d(base exp(target) || base) > delta."""
    target = (args.signal_scale * signal).clamp(-args.signal_clip, args.signal_clip)
    # Where the base is sure of its token, any step down is expensive: such tokens stay forced.
    cost = bernoulli_kl(base_logprobs + target, base_logprobs)
    return torch.where((target.abs() < args.signal_floor) | (cost > args.token_kl), 0.0, target)


def regression_loss(x: DistillInputs, args: Args) -> LossOutput:
    """(log policy - log base - target)^2: without signal the student is held at the base."""
    return (x.log_ratio - x.target).square().sum(), {}


def generalized_kl_loss(x: DistillInputs, args: Args) -> LossOutput:
    """exp(target)(target - log_ratio) - exp(target) + exp(log_ratio): the KL of base exp(target) to
    the policy, as of measures that need not sum to 1. On tokens that the base sampled, the policy
    that minimises it is base exp(target) / Z; squared error has another optimum unless Z is 1."""
    weight = safe_exp(x.target)  # [R]
    return (weight * (x.target - x.log_ratio) - weight + safe_exp(x.log_ratio)).sum(), {}


def pg_loss(x: DistillInputs, args: Args) -> LossOutput:
    """-min(r A, clip(r) A) with A = target and r to the behavior policy."""
    ratio = safe_exp(x.policy_logprobs - x.behavior_logprobs)  # [R], 1 before the first step
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    keep = torch.ones_like(x.target)  # [R]
    if args.prob_mask is not None:  # DPPO: bounds the change in probability, whatever the ratio
        moved = x.policy_logprobs.detach().exp() - x.behavior_logprobs.exp()
        keep = (moved * x.target.sign() <= args.prob_mask).float()
    loss = -(torch.minimum(ratio * x.target, clipped * x.target) * keep).sum()
    no_gradient = (clipped * x.target < ratio * x.target) | (keep == 0)  # [R] bool
    return loss, {"clip_share": sum_and_count(no_gradient.float())}


# The loop divides each sum by the response tokens of the global batch.
OBJECTIVES: dict[str, Callable[[DistillInputs, Args], LossOutput]] = {
    "regression": regression_loss,
    "generalized_kl": generalized_kl_loss,
    "pg": pg_loss,
}


def forecast(total: Tensor, rewards: Tensor, problem_index: Tensor) -> Tensor:
    """What the base is with its responses re-weighted by exp(total); three arguments, [S] each.

    w = exp(total) / sum exp(total) over the n samples of a problem. Returns accuracy sum w R, KL
    sum w log(n w) and effective samples 1 / sum w^2 of each problem: [3, P]. As build_signals'."""
    _, problem, count = problem_index.unique(return_inverse=True, return_counts=True)

    def sums(values: Tensor) -> Tensor:
        """Sums over the responses to each problem: [S] -> [P]."""
        return torch.zeros(len(count), dtype=torch.float64).index_add(0, problem, values)

    total = total.double()
    largest = total.new_full((len(count),), -math.inf).scatter_reduce(0, problem, total, "amax")
    weight = (total - largest[problem]).exp()
    w = weight / sums(weight)[problem]
    kl = sums(torch.special.xlogy(w, w * count[problem]))
    return torch.stack([sums(w * rewards), kl, 1 / sums(w.square())])


@torch.no_grad()
def diagnostics(x: DistillInputs) -> dict[str, Tensor]:
    """Measures what one watches while a student moves: {name: [sum, count]}."""
    return {
        "ratio": sum_and_count(safe_exp(x.log_ratio)),
        "entropy": sum_and_count(x.entropy),
        "target_share": sum_and_count((x.target != 0).float()),
        "log_ratio_credit": sum_and_count(x.log_ratio, x.target > 0),  # goes up with the signal
        "log_ratio_blame": sum_and_count(x.log_ratio, x.target < 0),  # goes down with it
    }


# --------------------------------------------------------------------------------------------------
# Data


def load_signals(args: Args, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Returns behavior_logprobs, base_logprobs and signal, each [N] float32.

    Raises UserError if the file belongs to other rollouts or to another base."""
    tensors, metadata = load_tensors(args.signals)
    # Signals of other data or of another base would train without an error, towards nothing.
    if "models" not in metadata or metadata["rollouts"] != fingerprint(rollouts.path):
        raise UserError(
            f"--signals {args.signals}: made for other rollouts than {rollouts.path}; "
            "run build_signals.py on these"
        )
    made_with = metadata["models"]["base"]
    if made_with["fingerprint"] != fingerprint(model_folder(args.base)):
        raise UserError(
            f"--signals {args.signals}: made with base {made_with['path']}, not --base "
            f"{args.base}; run build_signals.py with it"
        )
    arrays = []
    for name in ("behavior_logprobs", "base_logprobs", "signal"):
        n_tokens = len(rollouts.tokens)
        arrays.append(take(tensors, name, torch.float32, n_tokens, args.signals))
        if not arrays[-1].isfinite().all():
            raise UserError(f"--signals {args.signals}: '{name}' is not finite; make it again")
    return tuple(arrays)


def choose_bounds(args: Args, ranks: Ranks) -> Args:
    """Takes the bounds from the forecast of build_signals.py, by --within-kl or --reach-accuracy,
    if one of them is given.

    Of settings whose accuracies are equal within their error, the one of least KL is taken. Raises
    UserError if the forecast does not reach what is asked, or promises nothing."""
    if args.within_kl is None and args.reach_accuracy is None:
        return args
    report = args.signals.with_suffix(".json")
    found = read_json(report).get("forecast") if report.is_file() else None
    if found is None:
        raise UserError(f"--signals {args.signals}: {report} has no forecast; run build_signals.py")
    rows = found["frontier"]  # by KL; the base first
    if args.within_kl is not None:
        asked = f"--within-kl {args.within_kl:g}"
        best = [i for i, row in enumerate(rows) if row["kl"] <= args.within_kl][-1]
    else:
        asked = f"--reach-accuracy {args.reach_accuracy:g}"
        reaching = [i for i, row in enumerate(rows) if row["accuracy"] >= args.reach_accuracy]
        if not reaching:
            most = f"{rows[-1]['accuracy']:.3f} at {rows[-1]['kl']:.2f} nats"
            raise UserError(f"{asked}: the forecast of {args.signals} ends at {most}; ask for less")
        best = reaching[0]
    top, base = rows[best], rows[0]["accuracy"]
    if best == 0 and (len(rows) > 1 or args.within_kl is None):
        raise UserError(f"{asked}: the base itself, {base:.3f} right, is the choice; raise it")
    gaps = [top["accuracy"] - row["accuracy"] for row in rows[:best]]
    equal = [i for i, gap in enumerate(gaps) if gap <= top["difference_se"][i]]
    chosen = rows[equal[0] if equal else best]
    if chosen is rows[0]:
        raise UserError(
            f"--signals {args.signals}: promises nothing: its best forecast is "
            f"{top['accuracy']:.3f}, the base {base:.3f}, and their difference is within its "
            "error; build another signal, or sample more"
        )
    where = "held-out problems" if found["held_out"] else "the training problems, so partly memory"
    told = "chosen by the forecast on {}: {accuracy:.3f} at {kl:.2f} nats"
    ranks.print(told.format(where, **chosen))
    return replace(args, **{name: chosen[name] for name in BOUNDS})


def print_targets(
    args: Args, signal: Tensor, target: Tensor, rollouts: Rollouts, ranks: Ranks
) -> None:
    """Prints what the trust region makes of the signal, as shares of the response tokens."""
    mask = rollouts.response_mask
    size, target = (args.signal_scale * signal[mask]).abs(), target[mask]
    kept = target != 0

    def share(tokens: Tensor) -> str:
        """Formats the share of the response tokens for which `tokens` (bool) holds."""
        return f"{tokens.float().mean():.1%}"

    ranks.print(
        f"targets: {share(kept)} of response tokens have one ({share(target < 0)} down), "
        f"{share(kept & (size > args.signal_clip))} are clipped at {args.signal_clip:g}; held at "
        f"the base for --token-kl {args.token_kl:g}: "
        f"{share(~kept & (size >= args.signal_floor) & (size > 0))}"
    )


def split_problems(rollouts: Rollouts, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the responses to train on, and of those to held-out problems."""
    n_problems = int(rollouts.problem_index.max()) + 1
    n_held_out = max(1, round(share * n_problems))
    if n_held_out >= n_problems:
        raise UserError(f"--kl-holdout {share}: leaves none of {n_problems} problems to train on")
    # Whole problems are held out: other responses to a trained problem would not be fresh data.
    order = torch.randperm(n_problems, generator=torch.Generator().manual_seed(seed))
    is_held_out = torch.isin(rollouts.problem_index.long(), order[:n_held_out])
    return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]


@torch.no_grad()
def measure(
    policy: Policy, rollouts: Rollouts, held_out: Tensor, base_logprobs: Tensor, target: Tensor,
    of_base: bool, args: Args, ranks: Ranks,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """Measures the student on held-out responses: `compare_with_targets`, and what each entry of
    the vocabulary costs where it has no target [V], in nats of KL(policy || base) per response."""
    taken = torch.isin(rollouts.sequence_ids, held_out) & rollouts.response_mask  # [N], H are True
    place = taken.cumsum(0) - 1  # [N]: of the H tokens
    log_ratio = torch.zeros(int(taken.sum()), device=ranks.device)
    temperature = check_sampling(rollouts, force=True)
    lengths, budget = rollouts.lengths[held_out].tolist(), policy.budget(args.micro_batch_tokens)
    for members in pack(lengths, budget, ranks.world_size)[ranks.rank]:
        row = make_row(rollouts, held_out[members].tolist(), ranks.device)
        base = base_logprobs[row.flat].to(ranks.device)
        at = place[row.flat].to(ranks.device)
        log_ratio[at] = row_logprobs(policy, row, temperature)[0] - base
    dist.all_reduce(log_ratio)  # each rank has filled in its own rows
    log_ratio, target = log_ratio.cpu(), target[taken]
    measured = compare_with_targets(log_ratio, target, rollouts, held_out, of_base)
    cost = kl_penalty(log_ratio, "reverse") * (target == 0) / len(held_out)  # [H]
    return measured, torch.bincount(rollouts.tokens[taken].long(), cost)


def compare_with_targets(
    log_ratio: Tensor, target: Tensor, rollouts: Rollouts, held_out: Tensor, of_base: bool
) -> dict[str, float]:
    """Compares log-ratios [H] with targets [H], on the response tokens of the held-out responses.

    kl_proxy: the mean of sum_t (r - 1 - log r), KL(base || policy); realised: the slope of the
    log-ratios on the targets; accuracy and KL of the base's samples re-weighted by the student and
    by its targets, as in the forecast of build_signals.py. of_base: the base sampled the responses;
    samples of another policy re-weighted so would be neither's."""
    owner = held_out.repeat_interleave(rollouts.response_lens[held_out])  # [H]
    measured = {"kl_proxy": kl_penalty(log_ratio, "forward").sum().item() / len(held_out)}
    power = target.square().sum()
    measured["realised"] = ((log_ratio * target).sum() / power).item() if power else 0.0
    rewards, problems = rollouts.rewards[held_out], rollouts.problem_index[held_out]
    for role, values in [("student", log_ratio), ("target", target)] if of_base else []:
        total = torch.zeros(len(rollouts.rewards)).index_add(0, owner, values)[held_out]
        accuracy, kl, _ = forecast(total, rewards, problems).mean(1).tolist()
        measured |= {f"{role}_accuracy": accuracy, f"{role}_kl": kl}
    return measured


def print_end(measured: dict[str, float], cost: Tensor, tokenizer: Any, ranks: Ranks) -> None:
    """Says how near the student came to its targets, and which tokens pay where it spends more."""
    ranks.print(
        "on held-out problems {realised:.0%} of the targets are realised".format(**measured)
    )
    if "student_kl" not in measured:  # the base did not sample
        return
    ranks.print(
        "forecast of the targets: {target_accuracy:.3f} at {target_kl:.2f} nats, of the student as "
        "it is: {student_accuracy:.3f} at {student_kl:.2f}".format(**measured)
    )
    if measured["student_kl"] > SPENDS_TOO_MUCH * measured["target_kl"]:
        dearest = cost.argsort(descending=True)[:8].tolist()
        paid = "  ".join(f"{tokenizer.decode([i])!r} {cost[i]:.3f}" for i in dearest)
        ranks.print(f"warning: more than forecast; tokens that pay without a target, nats: {paid}")


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks(args.cpu_offload)
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    behavior_logprobs, base_logprobs, signal = load_signals(args, rollouts)  # [N] each
    args = choose_bounds(args, ranks)
    target = bounded_target(signal, base_logprobs, args)  # [N]
    trained, held_out = split_problems(rollouts, args.kl_holdout, args.seed)
    steps_per_epoch = math.ceil(len(trained) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    start = args.init or args.base
    tokenizer = load_tokenizer(args.base)
    inputs = {"rollouts": rollouts.path, "base": model_folder(args.base)}
    inputs |= {"init": model_folder(start), "signals": args.signals}
    memory = {"checkpointing": args.activation_checkpointing, "cpu_offload": args.cpu_offload}
    policy = load_policy(start, ranks, train=True, **memory)
    check_policy(policy, rollouts, start, ranks)
    budget = policy.budget(args.micro_batch_tokens)
    if not start_run(args.output, args, inputs, ranks):  # all input is checked before this
        return
    print_targets(args, signal, target, rollouts, ranks)
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    state = load_checkpoint(args.output, policy, optimizer, ranks) or {"step": 0}
    of_base = torch.equal(behavior_logprobs, base_logprobs)
    watched = (policy, rollouts, held_out, base_logprobs, target, of_base, args, ranks)
    at_end = None  # the measurement of the policy as it is
    if state["step"] == 0:
        spent = measure(*watched)[0]["kl_proxy"]
        if not spent <= args.kl_budget:
            raise UserError(
                f"--kl-budget {args.kl_budget}: {start} starts at {spent:.3f}; raise it"
            )
        ranks.print(f"KL proxy at the start: {spent:.4f} nats per response")
        state["kl_proxy"] = spent
        save_checkpoint(args.output, state, policy, optimizer, ranks)  # the first within the budget
    spent = state["kl_proxy"]
    log = MetricsLog(args.output, state["step"], ranks, args.tensorboard)
    bar = progress(ranks, total_steps, state["step"], f"stage 2 {args.objective}")

    for step in range(state["step"] + 1, total_steps + 1):
        # The responses of this step, packed into rows; every rank has equally many rows.
        epoch, within = divmod(step - 1, steps_per_epoch)
        batch = trained[epoch_batches(len(trained), args.batch_size, args.seed, epoch)[within]]
        lengths = rollouts.lengths[batch].tolist()
        rows = pack(lengths, budget, ranks.world_size)[ranks.rank]

        # Losses are sums. One count over the whole batch divides them, so that neither the number
        # of rows nor that of ranks changes the objective.
        divisor = int(rollouts.response_lens[batch].sum())
        metrics = []
        for members in rows:
            row = make_row(rollouts, batch[members].tolist(), ranks.device)
            policy_logprobs, entropy = row_logprobs(policy, row, temperature)  # [R] each
            base = base_logprobs[row.flat].to(ranks.device)  # [R]
            others = (v[row.flat].to(ranks.device) for v in (behavior_logprobs, target))  # [R] each
            x = DistillInputs(policy_logprobs, base, entropy, *others)
            loss_sum, measured = OBJECTIVES[args.objective](x, args)
            loss = loss_sum / divisor
            if args.kl_coef:
                penalty = kl_penalty(x.log_ratio, args.kl_direction).sum() / len(batch)
                loss = loss + args.kl_coef * penalty
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
            at_end = measure(*watched)
            values |= at_end[0]
            spent = values["kl_proxy"]
        log.write({"step": step, "epoch": step / steps_per_epoch} | values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", kl=f"{spent:.2f}", refresh=False)
        bar.update()

        # The KL budget bounds the whole policy: past it, back to the last policy within it.
        if measured_now and not spent <= args.kl_budget:
            good = load_checkpoint(args.output, policy, optimizer, ranks)["step"]
            ranks.print(f"step {step}: KL proxy {spent:.3f} nats, past the budget; back to {good}")
            at_end = None
            break
        if measured_now:
            state = {"step": step, "kl_proxy": spent}
            save_checkpoint(args.output, state, policy, optimizer, ranks)

    bar.close()
    print_end(*(at_end or measure(*watched)), tokenizer, ranks)
    save_model(policy, tokenizer, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
