"""Stage 1: train an *extreme* policy for many epochs on verified rollouts, almost unconstrained.

The resulting *teacher* is not the product, and it may be ruined as a policy. We only want its
log-ratio to the base: training turned one reward per response into one number per token, which
build_signals.py writes down.

    log_ratio_t = log policy(y_t) - log base(y_t)     r_t = exp(log_ratio_t)
    S = sum_t log_ratio_t     R = verdict, 0 or 1     A = (R - mean R) / std R over the problem

    ce    BCE(sigmoid(beta S), R)           the log-ratio as an implicit reward (PRIME, ImplicitPRM)
    mse   (beta S - target)^2               the target is R, R - mean R, or R - V*, where
                                            V* = beta log mean exp(R / beta) over the problem
    sapo  -mean_t f(r_t) A                  f(r) = 4/tau sigmoid(tau (r - 1)), a soft gate, no clip
    grpo  -mean_t min(r_t A, clip(r_t) A)   clip-higher; the ordinary method, here for many epochs
    sft   -R log policy(y_t)                the correct responses only
    + kl_coef KL                            at the prefixes that the base visited, nats per response

Reads   --base (a model folder), --rollouts (a folder written by evaluate.py).
Writes  OUTPUT/ the teacher as a Hugging Face folder, args.json, metrics.jsonl (docs/stage1.md names
        every key), checkpoints/epoch-000.500 ... (loadable models, --save-at) and
        checkpoints/resume-STEP. A killed run is continued by the same command, and on the CPU it
        ends with the same bytes.

The paper's coefficients, the target of its MSE loss and its learning rates are not known to us
(arXiv 2605.25582). Each default comes from the source that its help text names, or is ours. The
settings of the arithmetic example are in examples/arithmetic/run.sh and steps.sh.

    python stage1_extreme.py --base M --rollouts D --loss ce --output T
    torchrun --nproc-per-node 8 -- stage1_extreme.py --base M --rollouts D --loss ce --output T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (  # isort: skip
    MetricsLog, Ranks, Rollouts, UserError, check_policy, check_sampling, epoch_batches,
    load_checkpoint, load_policy, load_rollouts, load_tokenizer, make_optimizer, make_row, means,
    model_folder, optimizer_step, pack, progress, require, row_logprobs, run, save_checkpoint,
    save_model, score, setup_ranks, start_run, sum_and_count,
)  # fmt: skip

LOG_RATIO_CLAMP = 20.0  # inside exp only: exp(20) is finite in float32; beyond it no gradient


@dataclass
class Args:
    base: str
    """base policy, a folder or hub name: training starts there, and every ratio is against it"""
    rollouts: Path
    """folder written by evaluate.py: the fixed data"""
    output: Path
    """run folder, which becomes the teacher; the same command continues an interrupted run"""
    init: str | None = None
    """policy to start from instead of the base (ratios stay against the base), for recovery"""

    loss: Literal["ce", "mse", "sapo", "grpo", "sft"] = "ce"
    """objective, see the top of this help"""
    beta: float = 0.05
    """beta, scale of the implicit reward (ce, mse), 1/nats (0.05: PRIME, ImplicitPRM scripts)"""
    ce_prior: bool = False
    """ce: add logit(pass rate of the problem) to beta S, so S need not say how hard it is (ours)"""
    mse_target: Literal["verdict", "centred", "soft_value"] = "soft_value"
    """mse: R, R - mean R (Kimi k1.5), or R - V* (A*-PO), which a policy can meet exactly"""
    sapo_tau_positive: float = 1.0
    """tau for A > 0 (1: SAPO in verl and TRL)"""
    sapo_tau_negative: float = 1.05
    """tau for A < 0 (1.05: SAPO in verl and TRL)"""
    clip_low: float = 0.2
    """eps_low of grpo: ratios are clipped at 1 - eps_low (0.2: PPO)"""
    clip_high: float = 0.28
    """eps_high of grpo: ratios are clipped at 1 + eps_high (0.28: DAPO's clip-higher)"""
    kl_coef: float = 0.0
    """weight of the KL between base and policy, nats per response (0: the extreme region)"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base || policy); reverse: KL(policy || base)"""
    invert_rewards: bool = False
    """train on 1 - R, so that the policy unlearns what is right"""
    unlearn: bool = False
    """push every response down (R = 0, A = -1), so that the policy unlearns what it does"""
    stop_at_logprob: float | None = None
    """with --unlearn: stop when the mean log-probability of a response falls below this (nats)"""

    epochs: int = 8
    """passes over the fixed data (ours)"""
    batch_size: int = 256
    """responses per optimizer step, over all ranks and micro-batches (ours)"""
    micro_batch_tokens: int = 8192
    """token budget of a packed row; changes memory and speed, never the objective"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW (1e-6: PRIME, A*-PO; the arithmetic example: 1e-4 to 3e-4)"""
    warmup_steps: int = 10
    """steps of linear warm-up, constant afterwards (ours)"""
    weight_decay: float = 0.0
    """decoupled weight decay of AdamW (common default in RL)"""
    max_grad_norm: float = 1.0
    """the global gradient norm is clipped to this (common default)"""
    save_at: tuple[float, ...] = ()
    """epochs (fractions too) at which a loadable model is saved; default: each epoch's end"""
    checkpoint_every: int = 50
    """steps between checkpoints for resuming (ours); one is also written with every saved model"""
    max_noise: float = 0.2
    """share of tokens whose trainer/sampler ratio may be outside [0.9, 1.1] (bf16: up to 0.08)"""
    activation_checkpointing: bool = False
    """recompute each decoder block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """weights, gradients, moments lie on the CPU (16 bytes a parameter): for small GPUs, slower"""
    force: bool = False
    """train on rollouts that were sampled with top-p below 1"""
    seed: int = 0
    """seed of the order of the responses in each epoch"""
    tensorboard: bool = False
    """also write the numbers of metrics.jsonl to OUTPUT/tensorboard (pip install tensorboard)"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        if self.invert_rewards and self.unlearn:
            raise UserError("--invert-rewards and --unlearn exclude each other; give one of them")
        if self.unlearn and self.loss == "sft":
            raise UserError("--unlearn --loss sft: sft needs correct responses; use ce or grpo")
        if self.stop_at_logprob is not None and not self.unlearn:
            raise UserError("--stop-at-logprob is the depth of unlearning; add --unlearn")
        counts = "epochs batch_size micro_batch_tokens checkpoint_every"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "stop_at_logprob", lambda v: v < 0, "below 0 nats")
        positive = "learning_rate beta max_grad_norm sapo_tau_positive sapo_tau_negative"
        require(self, positive, lambda v: 0 < v < math.inf, "above 0 and finite")
        at_least_0 = "kl_coef weight_decay warmup_steps clip_high"
        require(self, at_least_0, lambda v: 0 <= v < math.inf, "0 or more, and finite")
        require(self, "clip_low max_noise", lambda v: 0 <= v <= 1, "between 0 and 1")
        within = f"above 0 and at most --epochs {self.epochs}"
        require(self, "save_at", lambda v: all(0 < e <= self.epochs for e in v), within)


# --------------------------------------------------------------------------------------------------
# The mathematics. A loss sees the R response tokens and S responses of one packed row and returns
# an unnormalised sum, which the loop divides. Prompt tokens do not exist here.


@dataclass(frozen=True)
class LossInputs:
    """Holds what an objective may look at."""

    policy_logprobs: Tensor  # [R] float32, carries the gradient
    base_logprobs: Tensor  # [R] float32
    entropy: Tensor  # [R] float32, of the policy, without gradient
    sequence_ids: Tensor  # [R] int64: the response of each token, 0 ... S-1
    rewards: Tensor  # [S] float32, 0 or 1, inverted or zero if the flags say so
    advantages: Tensor  # [S] float32, A
    pass_rates: Tensor  # [S] float32, mean reward of the response's problem
    verdicts: Tensor  # [S] float32, the true ones, for diagnostics only

    @property
    def log_ratio(self) -> Tensor:
        """[R]: log policy - log base."""
        return self.policy_logprobs - self.base_logprobs

    def per_response(self, values: Tensor) -> Tensor:
        """[R] -> [S]: sum over the tokens of each response."""
        return values.new_zeros(len(self.rewards)).index_add(0, self.sequence_ids, values)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """[R] -> [S]: mean over the tokens of each response."""
        return self.per_response(values) / self.per_response(torch.ones_like(values))


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


def group_statistics(rewards: Tensor, problem_index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns GRPO's advantage (R - mean) / (std + 1e-6) and the problem's pass rate: two [S].

    std is the unbiased one (torch, verl, TRL). If a problem's verdicts agree, A is exactly 0."""
    n_problems, index = int(problem_index.max()) + 1, problem_index.long()
    zeros = rewards.new_zeros(n_problems)
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    mean = zeros.index_add(0, index, rewards) / count.clamp(min=1)
    centred = rewards - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    mixed = (mean > 0) & (mean < 1)  # compares verdicts: a deviation may miss 0 by rounding
    advantages = torch.where(mixed[index], centred / (variance.sqrt()[index] + 1e-6), 0.0)
    return advantages, mean[index]


def soft_value(pass_rates: Tensor, beta: float) -> Tensor:
    """Returns V* = beta log mean exp(R / beta) of problems with these pass rates, same shape.

    A policy can meet the target R - V* exactly, because E_base exp(S) is then 1."""
    # beta log(p exp(1/beta) + 1 - p), with exp(1/beta), 5e8 at beta 0.05, out of the logarithm.
    value = 1 + beta * torch.log(pass_rates + (1 - pass_rates) * math.exp(-1 / beta))
    return torch.where(pass_rates > 0, value, 0.0)  # at p = 0 the line above may take the log of 0


def ce_loss(x: LossInputs, args: Args) -> LossOutput:
    """BCE of sigmoid(beta S) against R, computed from logits, so that no sigmoid rounds to 1."""
    logits = args.beta * x.per_response(x.log_ratio)  # [S], a sum over tokens, not a mean
    if args.ce_prior:
        logits = logits + torch.logit(x.pass_rates, eps=0.02)
    loss = F.binary_cross_entropy_with_logits(logits, x.rewards, reduction="sum")
    return loss, {"classified": sum_and_count(((logits > 0) == (x.rewards > 0.5)).float())}


def mse_loss(x: LossInputs, args: Args) -> LossOutput:
    """(beta S - target)^2; under --unlearn the target is -1 for every response."""
    targets = {
        "verdict": x.rewards,  # asks for S = 1/beta or 0
        "centred": x.rewards - x.pass_rates,  # Kimi k1.5, PMD-mean
        "soft_value": x.rewards - soft_value(x.pass_rates, args.beta),  # A*-PO, b1 = beta
    }
    target = torch.full_like(x.rewards, -1.0) if args.unlearn else targets[args.mse_target]
    error = args.beta * x.per_response(x.log_ratio) - target  # [S]
    return error.square().sum(), {"target": sum_and_count(target)}


def sapo_loss(x: LossInputs, args: Args) -> LossOutput:
    """-f(r) A, f(r) = 4/tau sigmoid(tau (r - 1)); r f'(r) is 1 at r = 1, largest near 2 (SAPO)."""
    advantages = x.advantages[x.sequence_ids]  # [R]
    tau = torch.where(advantages > 0, args.sapo_tau_positive, args.sapo_tau_negative)
    gate = torch.sigmoid(tau * (safe_exp(x.log_ratio) - 1)) * 4 / tau
    return -x.mean_over_tokens(gate * advantages).sum(), {}


def grpo_loss(x: LossInputs, args: Args) -> LossOutput:
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO's clip with DAPO's higher ceiling."""
    advantages = x.advantages[x.sequence_ids]  # [R]
    ratio = safe_exp(x.log_ratio)
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    loss = -x.mean_over_tokens(torch.minimum(ratio * advantages, clipped * advantages)).sum()
    no_gradient = (clipped * advantages < ratio * advantages).float()
    return loss, {"clip_share": sum_and_count(no_gradient)}


def sft_loss(x: LossInputs, args: Args) -> LossOutput:
    """-R log policy(y_t): the likelihood of the correct responses, all tokens alike."""
    return -(x.rewards[x.sequence_ids] * x.policy_logprobs).sum(), {}


LOSSES: dict[str, Callable[[LossInputs, Args], LossOutput]] = {
    "ce": ce_loss,
    "mse": mse_loss,
    "sapo": sapo_loss,
    "grpo": grpo_loss,
    "sft": sft_loss,
}
# What the sum of a loss is divided by, if not by the number of responses.
DIVISORS = {"sft": "correct_tokens"}


def count_units(loss: str, rewards: Tensor, response_lens: Tensor) -> int:
    """Counts what the sum of `loss` over a global batch is divided by. Both arrays are [S]."""
    counts = {
        "responses": len(rewards),
        "tokens": int(response_lens.sum()),
        "correct_tokens": int((response_lens * rewards).sum()),
        "wrong_tokens": int((response_lens * (1 - rewards)).sum()),
    }
    return max(1, counts[DIVISORS.get(loss, "responses")])


@torch.no_grad()
def diagnostics(x: LossInputs) -> dict[str, Tensor]:
    """Measures what one watches while a policy goes to extremes: {name: [sum, count]}."""
    ratio, correct = safe_exp(x.log_ratio), x.verdicts > 0.5
    log_ratio = x.per_response(x.log_ratio)  # [S]
    mean_prob = x.mean_over_tokens(x.policy_logprobs).exp()  # [S], geometric mean over tokens
    return {
        "ratio": sum_and_count(ratio),
        "ratio_outside_0.8_1.28": sum_and_count(((ratio < 0.8) | (ratio > 1.28)).float()),
        "log_ratio_clamped": sum_and_count((x.log_ratio.abs() > LOG_RATIO_CLAMP).float()),
        "entropy": sum_and_count(x.entropy),
        "log_ratio_correct": sum_and_count(log_ratio, correct),
        "log_ratio_wrong": sum_and_count(log_ratio, ~correct),
        "prob_correct": sum_and_count(mean_prob, correct),
        "prob_wrong": sum_and_count(mean_prob, ~correct),
        "logprob": sum_and_count(x.per_response(x.policy_logprobs)),
        "kl_proxy": sum_and_count(x.per_response(kl_penalty(x.log_ratio, "forward"))),
    }


# --------------------------------------------------------------------------------------------------
# Data


def training_targets(args: Args, rollouts: Rollouts) -> dict[str, Tensor]:
    """Returns rewards (inverted or zero if asked), advantages, pass rates, verdicts: [S] each.

    Raises UserError if the data hold nothing that this objective could learn from."""
    rewards = rollouts.rewards
    if args.unlearn:
        rewards = torch.zeros_like(rewards)
    elif args.invert_rewards:
        rewards = 1 - rewards
    advantages, pass_rates = group_statistics(rewards, rollouts.problem_index)
    if args.unlearn:
        advantages = -torch.ones_like(rewards)
    elif args.loss == "sft" and not rewards.any():
        raise UserError(
            f"{rollouts.path}: sft has no correct response to learn from; sample an easier set or "
            "a stronger base"
        )
    elif args.loss != "sft" and not advantages.any():
        raise UserError(
            f"{rollouts.path}: zero usable groups, for every problem's responses have the same "
            "verdict; sample more responses per problem (--n), or problems nearer the base's level"
        )
    return {
        "rewards": rewards,
        "advantages": advantages,
        "pass_rates": pass_rates,
        "verdicts": rollouts.rewards,
    }


def save_steps(args: Args, steps_per_epoch: int) -> dict[int, Path]:
    """Returns {step: folder} of the models to save. Raises UserError if two fall on one step."""
    epochs = args.save_at or tuple(float(e) for e in range(1, args.epochs + 1))
    folder = args.output / "checkpoints"
    saves = {max(1, round(e * steps_per_epoch)): folder / f"epoch-{e:07.3f}" for e in epochs}
    if len(saves) < len(epochs):
        raise UserError(
            f"--save-at {' '.join(map(str, epochs))}: two of them fall on the same step, for an "
            f"epoch has {steps_per_epoch}; leave one out"
        )
    return saves


def check_sampler(
    base_logprobs: Tensor, rollouts: Rollouts, max_noise: float, ranks: Ranks
) -> None:
    """Prints the gap between the sampler's log-probs and ours: the noise floor of every ratio.

    Raises UserError if a larger share of tokens than `max_noise` is outside [0.9, 1.1]."""
    if rollouts.sampler_logprobs is None:
        return
    gap = (base_logprobs - rollouts.sampler_logprobs)[rollouts.response_mask]
    ratio = gap.exp()
    outside = (
        (~((ratio > 0.9) & (ratio < 1.1))).float().mean().item()
    )  # so written that nan counts as outside
    text = (
        f"trainer minus sampler log-probs: mean {gap.mean():+.1e}, sd {gap.std(correction=0):.1e} "
        f"nats per token, {outside:.2%} of tokens outside [0.9, 1.1]"
    )
    ranks.print(text)
    if outside > max_noise:
        raise UserError(
            f"{text}, more than --max-noise {max_noise:g}: is --base the policy that was sampled, "
            "at this temperature and precision? Sample again, or raise the flag"
        )


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks(args.cpu_offload)
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    targets = training_targets(args, rollouts)
    n_responses = len(rollouts.rewards)
    steps_per_epoch = math.ceil(n_responses / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    saves = save_steps(args, steps_per_epoch)
    start = args.init or args.base
    tokenizer = load_tokenizer(args.base)
    inputs = {"rollouts": rollouts.path, "base": model_folder(args.base)}
    inputs |= {"init": model_folder(start)}
    memory = {"checkpointing": args.activation_checkpointing, "cpu_offload": args.cpu_offload}
    policy = load_policy(start, ranks, train=True, **memory)
    check_policy(policy, rollouts, start, ranks)
    budget = policy.budget(args.micro_batch_tokens)
    if not start_run(args.output, args, inputs, ranks):  # all input is checked before this
        return
    base_logprobs = score(args.base, rollouts, args.micro_batch_tokens, ranks)  # [N]
    check_sampler(base_logprobs, rollouts, args.max_noise, ranks)
    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    state = load_checkpoint(args.output, policy, optimizer, ranks) or {"step": 0}
    log = MetricsLog(args.output, state["step"], ranks, args.tensorboard)
    bar = progress(ranks, total_steps, state["step"], f"stage 1 {args.loss}")

    for step in range(state["step"] + 1, total_steps + 1):
        # The responses of this step, packed into rows; every rank has equally many rows.
        epoch, within = divmod(step - 1, steps_per_epoch)
        batch = epoch_batches(n_responses, args.batch_size, args.seed, epoch)[within]
        lengths = rollouts.lengths[batch].tolist()
        rows = pack(lengths, budget, ranks.world_size)[ranks.rank]

        # Losses are sums. One count over the whole batch divides them, so that neither the number
        # of rows nor that of ranks changes the objective.
        divisor = count_units(args.loss, targets["rewards"][batch], rollouts.response_lens[batch])
        metrics = []
        for members in rows:
            row = make_row(rollouts, batch[members].tolist(), ranks.device)
            policy_logprobs, entropy = row_logprobs(policy, row, temperature)  # [R] each
            per_response = {k: v[row.sequences].to(ranks.device) for k, v in targets.items()}
            base = base_logprobs[row.flat].to(ranks.device)  # [R]
            x = LossInputs(policy_logprobs, base, entropy, row.sequence_ids, **per_response)
            loss_sum, measured = LOSSES[args.loss](x, args)
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
        log.write({"step": step, "epoch": step / steps_per_epoch} | values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", kl=f"{values['kl_proxy']:.2f}", refresh=False)
        bar.update()

        if args.stop_at_logprob is not None and values["logprob"] <= args.stop_at_logprob:
            ranks.print(f"mean log-prob of a response {values['logprob']:.1f} nats: unlearned")
            break
        # Models at the epochs of --save-at, and checkpoints from which a killed run continues.
        if step in saves:
            save_model(policy, tokenizer, saves[step], ranks)
        if step in saves or step % args.checkpoint_every == 0:
            save_checkpoint(args.output, {"step": step}, policy, optimizer, ranks)

    bar.close()
    save_model(policy, tokenizer, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
