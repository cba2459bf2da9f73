"""Stage 1: train an *extreme* policy for many epochs on fixed, verified rollouts, barely bound.

The result (the teacher) is not the product and may be ruined. What counts is its log-ratio to the
base, token by token: the verdict on a whole response has become a verdict on each of its tokens
(build_signals.py writes it down).

    log_ratio_t = log policy(y_t) - log behavior(y_t)     r_t = exp(log_ratio_t)
    S = sum_t log_ratio_t     R = verdict, 0 or 1     A = (R - mean R) / std R over the problem

    ce    BCE(sigmoid(beta S), R)           the log-ratio as implicit reward (PRIME, ImplicitPRM)
    mse   (beta S - target)^2               target R, R - mean R, or R - V*, where
                                            V* = beta log mean exp(R / beta) over the problem
    sapo  -mean_t f(r_t) A                  f(r) = 4/tau sigmoid(tau (r - 1)), a soft gate, no clip
    grpo  -mean_t min(r_t A, clip(r_t) A)   clip-higher; the ordinary method, here for many epochs
    sft   -R log policy(y_t)                positives only
    + kl_coef KL                            per token at the base's prefixes, nats a response

Reads   --base (a model folder), --rollouts (a folder of evaluate.py).
Writes  OUTPUT/ the teacher as a Hugging Face folder, args.json, metrics.jsonl (docs/stage1.md names
        every key), checkpoints/behavior_logprobs.safetensors, checkpoints/epoch-000.500 ...
        (loadable models, --save-at), and while it runs checkpoints/resume-STEP: the same command
        continues there and ends with the same bits on the CPU.

What is not known of the paper (2605.25582): its coefficients, the target of its MSE loss, its
learning rates. A default comes from the source that its help text names, or is ours; what the
arithmetic example uses stands in run.sh and steps.sh of examples/arithmetic.

    python stage1_extreme.py --base M --rollouts D --loss ce --output T
    torchrun --nproc-per-node 8 -- stage1_extreme.py --base M --rollouts D --loss ce --output T
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (  # isort: skip
    LOG_RATIO_CLAMP, MetricsLog, Policy, Ranks, Rollouts, UserError, catch_sigterm, check_noise,
    check_sampling, check_tensorboard, check_vocabulary, clip_gradients, epoch_batches,
    exit_by_sigterm, fingerprint, kl_penalty, load_checkpoint, load_policy, load_rollouts,
    load_tensors, load_tokenizer, make_optimizer, make_row, mean_metrics, model_folder, noise_sums,
    optimizer_step, pack, progress, remove_checkpoint, require, row_logprobs, run, safe_exp,
    save_checkpoint, save_model, save_tensors, score, sequence_sum, setup_ranks, start_run,
    sum_and_count, sync_gradients, to_device,
)  # fmt: skip


@dataclass
class Args:
    base: str
    """base policy: where training starts, and the behavior policy under every ratio"""
    rollouts: Path
    """folder written by evaluate.py: the fixed data"""
    output: Path
    """run folder; the teacher is in it; the same command continues an interrupted run"""
    init: str | None = None
    """policy to start from instead of the base (ratios stay against the base): recovery"""

    loss: Literal["ce", "mse", "sapo", "grpo", "sft"] = "ce"
    """objective, see the top of this page"""
    beta: float = 0.05
    """beta, scale of the implicit reward (ce, mse), 1/nats (0.05: PRIME, ImplicitPRM scripts)"""
    ce_prior: bool = False
    """ce: add logit(pass rate of the problem) to beta S: S need not say how hard the problem is"""
    mse_target: Literal["verdict", "centred", "soft_value"] = "soft_value"
    """R, R - mean R (Kimi k1.5), or R - V* (A*-PO): a policy can meet it, for E_base exp(S) = 1"""
    sapo_tau_positive: float = 1.0
    """tau for A > 0 (SAPO in verl and TRL)"""
    sapo_tau_negative: float = 1.05
    """tau for A < 0 (SAPO in verl and TRL)"""
    clip_low: float = 0.2
    """eps_low of grpo: ratios are clipped at 1 - eps_low (PPO)"""
    clip_high: float = 0.28
    """eps_high of grpo: ratios are clipped at 1 + eps_high (DAPO's clip-higher)"""
    kl_coef: float = 0.0
    """weight of the KL between base and policy, nats a response; 0: none (the extreme region)"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base || policy); reverse: KL(policy || base)"""
    invert_rewards: bool = False
    """train on 1 - R: the policy unlearns what is right"""
    unlearn: bool = False
    """push every response down (R = 0, A = -1): the policy unlearns what it does"""
    stop_at_logprob: float | None = None
    """end once the mean of a step's log policy(response), nats, is this low: depth of unlearning"""

    epochs: int = 8
    """passes over the fixed data (ours)"""
    batch_size: int = 256
    """responses per optimiser step, over all ranks and micro-batches (ours)"""
    micro_batch_tokens: int = 8192
    """token budget of a packed row; changes memory and speed, never the objective"""
    learning_rate: float = 1e-6
    """peak learning rate of AdamW (1e-6: PRIME, A*-PO; the arithmetic example: 1e-4 to 3e-4)"""
    warmup_steps: int = 10
    """steps of linear warm-up, then constant (ours)"""
    weight_decay: float = 0.0
    """decoupled weight decay of AdamW"""
    max_grad_norm: float = 1.0
    """global gradient norm is clipped to this (common default)"""
    save_at: tuple[float, ...] = ()
    """epochs, also fractions, at which a loadable model is saved; default: every epoch's end"""
    checkpoint_every: int = 50
    """steps between checkpoints for resuming (ours); one is also written with every saved model"""
    max_noise: float = 0.2
    """share of tokens whose trainer/sampler ratio may lie outside [0.9, 1.1] (bf16: up to 0.08)"""
    activation_checkpointing: bool = False
    """decoder blocks keep their input only, and run again in the backward: memory for a third"""
    defer_gradient_sync: bool = False
    """reduce gradients once a step, not a micro-batch; each rank holds them whole, in float32"""
    shard_size: int | None = None
    """ranks that share one copy of the model (8: within a node of 8 GPUs); default: all"""
    force: bool = False
    """train on rollouts that were sampled with top-p below 1"""
    seed: int = 0
    """order of the responses in each epoch"""
    tensorboard: bool = False
    """also write the numbers of metrics.jsonl to OUTPUT/tensorboard (its package is optional)"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        if self.invert_rewards and self.unlearn:
            raise UserError("--invert-rewards and --unlearn exclude each other: "
                            "one inverts verdicts, one ignores them")  # fmt: skip
        if self.unlearn and self.loss == "sft":
            raise UserError("--unlearn --loss sft: sft trains on correct responses only; "
                            "use --loss ce or grpo")  # fmt: skip
        if self.stop_at_logprob is not None and not self.unlearn:
            raise UserError("--stop-at-logprob is the depth of unlearning; add --unlearn")
        counts = "epochs batch_size micro_batch_tokens checkpoint_every"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "shard_size", lambda v: v is None or v >= 1, "1 or more")
        require(self, "stop_at_logprob", lambda v: v is None or v < 0, "below 0 nats")
        require(self, "max_noise", lambda v: 0 <= v <= 1, "between 0 and 1")
        positive = "learning_rate beta max_grad_norm sapo_tau_positive sapo_tau_negative"
        require(self, positive, lambda v: v > 0, "above 0")
        require(self, "kl_coef weight_decay warmup_steps clip_high", lambda v: v >= 0, "0 or more")
        require(self, "clip_low", lambda v: 0 <= v <= 1, "between 0 and 1")
        if bad := [e for e in self.save_at if not 0 < e <= self.epochs]:
            raise UserError(f"--save-at {bad[0]}: must lie within 0 and --epochs {self.epochs}")
        if self.tensorboard:
            check_tensorboard()


# --------------------------------------------------------------------------------------------------
# The mathematics. T tokens and S responses of one packed row; a loss returns an unnormalised sum,
# the loop divides.


@dataclass(frozen=True)
class LossInputs:
    """What an objective may look at."""

    policy_logprobs: Tensor  # [T] float32, carries the gradient; zero on prompts
    behavior_logprobs: Tensor  # [T] float32; zero on prompts
    response_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64, 0 ... S-1
    rewards: Tensor  # [S] float32, 0 or 1
    advantages: Tensor  # [S] float32
    soft_values: Tensor  # [S] float32, V* of the problem
    group_means: Tensor  # [S] float32, pass rate of the problem
    entropy: Tensor  # [T] float32, of the policy, no gradient; zero on prompts

    @property
    def log_ratio(self) -> Tensor:
        """[T]: log policy - log behavior, zero on prompts."""
        return self.policy_logprobs - self.behavior_logprobs

    def per_response(self, values: Tensor) -> Tensor:
        """[T] -> [S]: sum over the tokens of each response."""
        return sequence_sum(values, self.sequence_ids, len(self.rewards))

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """[T] -> [S]: mean over the response tokens of each response."""
        mask = self.response_mask.float()
        return self.per_response(values * mask) / self.per_response(mask).clamp(min=1)


LossOutput = tuple[Tensor, dict[str, Tensor]]  # unnormalised sum; {metric: tensor [sum, count]}


def group_statistics(
    rewards: Tensor, problem_index: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per response: GRPO advantage (R - mean)/(std + 1e-6), pass rate of its problem, V* -> 3 [S].

    std is the unbiased one (torch, verl, TRL); groups that all agree get exactly zero.
    V* = beta log mean exp(R / beta) over the group: the value at which E_base exp(S) = 1 is met."""
    n_problems = int(problem_index.max()) + 1
    zeros, index = rewards.new_zeros(n_problems), problem_index.long()
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    mean = zeros.index_add(0, index, rewards) / count.clamp(min=1)
    centred = rewards - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    mixed = (mean > 0) & (mean < 1)  # verdicts compared, not a float deviation
    advantages = torch.where(mixed[index], centred / (variance.sqrt()[index] + 1e-6), 0.0)
    # beta log(p exp(1/beta) + 1 - p), exp(1/beta) (5e8 at beta 0.05) taken out of the logarithm
    soft_values = 1 + beta * torch.log(mean + (1 - mean) * torch.tensor(-1 / beta).exp())
    soft_values = torch.where(mean > 0, soft_values, 0.0)  # p = 0: may be log 0 above
    return advantages, mean[index], soft_values[index]


def ce_loss(x: LossInputs, *, beta: float, ce_prior: bool, **_: Any) -> LossOutput:
    """Binary cross-entropy of sigmoid(beta S) against R, from logits: no sigmoid rounds to 1."""
    logits = beta * x.per_response(x.log_ratio)  # [S], sum over tokens, not mean
    if ce_prior:
        logits = logits + torch.logit(x.group_means, eps=0.02)
    loss = F.binary_cross_entropy_with_logits(logits, x.rewards, reduction="sum")
    right = ((logits > 0) == (x.rewards > 0.5)).float()
    return loss, {"classified": torch.stack([right.sum(), right.new_tensor(len(right))])}


def mse_loss(x: LossInputs, *, beta: float, mse_target: str, unlearn: bool, **_: Any) -> LossOutput:
    """(beta S - target)^2; under --unlearn the target is -1 for every response."""
    targets = {
        "verdict": x.rewards,  # asks for S = 1/beta or 0
        "centred": x.rewards - x.group_means,  # Kimi k1.5, PMD-mean
        "soft_value": x.rewards - x.soft_values,  # A*-PO with b1 = beta: realisable
    }
    target = torch.full_like(x.rewards, -1.0) if unlearn else targets[mse_target]
    error = beta * x.per_response(x.log_ratio) - target  # [S]
    count = target.new_tensor(len(target))
    return error.square().sum(), {"target": torch.stack([target.sum(), count])}


def sapo_loss(
    x: LossInputs, *, sapo_tau_positive: float, sapo_tau_negative: float, **_: Any
) -> LossOutput:
    """-f(r) A, f(r) = 4/tau sigmoid(tau (r - 1)); r f'(r) is 1 at r = 1, largest near 2 (SAPO)."""
    advantages = x.advantages[x.sequence_ids]  # [T]
    tau = torch.where(advantages > 0, sapo_tau_positive, sapo_tau_negative)
    gate = torch.sigmoid(tau * (safe_exp(x.log_ratio) - 1)) * 4 / tau
    return -x.mean_over_tokens(gate * advantages).sum(), {}


def grpo_loss(x: LossInputs, *, clip_low: float, clip_high: float, **_: Any) -> LossOutput:
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO's clip with DAPO's higher ceiling."""
    advantages = x.advantages[x.sequence_ids]  # [T]
    ratio = safe_exp(x.log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -x.mean_over_tokens(torch.minimum(ratio * advantages, clipped * advantages)).sum()
    held = (clipped * advantages < ratio * advantages) & x.response_mask  # these get no gradient
    return loss, {"clip_share": sum_and_count(held, x.response_mask)}


def sft_loss(x: LossInputs, **_: Any) -> LossOutput:
    """-R log policy(y_t): likelihood of the correct responses, every token alike."""
    return -(x.rewards[x.sequence_ids] * x.policy_logprobs).sum(), {}


# objective -> (function, what the loop divides its sum by, counted over the whole global batch)
# A function gets all Args by name, and `previous`, the metrics of the step before (at first {}):
# its view of a whole global batch, whatever the micro-batches and ranks; kept in checkpoints.
LOSSES: dict[str, tuple[Callable[..., LossOutput], str]] = {
    "ce": (ce_loss, "responses"),
    "mse": (mse_loss, "responses"),
    "sapo": (sapo_loss, "responses"),  # mean of per-response token means
    "grpo": (grpo_loss, "responses"),
    "sft": (sft_loss, "positive_tokens"),
}


@torch.no_grad()
def diagnostics(x: LossInputs, verdicts: Tensor) -> dict[str, Tensor]:
    """What one watches while a policy goes to extremes -> {name: [sum, count]}.

    verdicts [S] are the true ones, also where training inverts or ignores them."""
    mask, positive = x.response_mask, verdicts > 0.5
    log_ratio, ratio = x.log_ratio, safe_exp(x.log_ratio)
    summed, logprob = x.per_response(log_ratio), x.per_response(x.policy_logprobs)  # [S]
    mean_prob = x.mean_over_tokens(x.policy_logprobs).exp()  # geometric mean of token probabilities
    kl = x.per_response(kl_penalty(log_ratio, "forward") * mask)  # [S]
    responses = x.per_response(mask.float()) > 0  # [S]; false: stand-in of a rank without work
    return {
        "ratio": sum_and_count(ratio, mask),
        "ratio_outside_0.8_1.28": sum_and_count(((ratio < 0.8) | (ratio > 1.28)).float(), mask),
        "log_ratio_clamped": sum_and_count((log_ratio.abs() > LOG_RATIO_CLAMP).float(), mask),
        "entropy": sum_and_count(x.entropy, mask),
        "log_ratio_correct": sum_and_count(summed, responses & positive),
        "log_ratio_wrong": sum_and_count(summed, responses & ~positive),
        "prob_correct": sum_and_count(mean_prob, responses & positive),
        "prob_wrong": sum_and_count(mean_prob, responses & ~positive),
        "logprob": sum_and_count(logprob, responses),
        "kl_proxy": sum_and_count(kl, responses),
    }


# --------------------------------------------------------------------------------------------------
# Data


def training_targets(args: Args, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards (inverted or set to 0 as asked), advantages, group means, soft values: [S] float32.

    Raises UserError where no problem has both verdicts (sft: where no response is correct)."""
    rewards = rollouts.rewards
    if args.unlearn:
        rewards = torch.zeros_like(rewards)
    elif args.invert_rewards:
        rewards = 1 - rewards
    advantages, means, soft_values = group_statistics(rewards, rollouts.problem_index, args.beta)
    if args.unlearn:
        return rewards, -torch.ones_like(rewards), means, soft_values
    if args.loss == "sft" and not rewards.any():
        raise UserError(f"{rollouts.path}: no correct response to train sft on; "
                        "sample an easier set or a stronger base")  # fmt: skip
    if args.loss != "sft" and not advantages.any():
        raise UserError(f"{rollouts.path}: zero usable groups: in every problem all responses have "
                        "the same verdict. Sample more responses per problem (--n) or problems "
                        "nearer the base's level")  # fmt: skip
    return rewards, advantages, means, soft_values


def save_steps(args: Args, steps_per_epoch: int) -> dict[int, str]:
    """{step: folder name} of the models to save on the way. Raises UserError where two coincide."""
    epochs = args.save_at or tuple(float(e) for e in range(1, args.epochs + 1))
    names = {max(1, round(e * steps_per_epoch)): f"epoch-{e:07.3f}" for e in epochs}
    if len(names) < len(epochs):
        raise UserError(f"--save-at {' '.join(map(str, epochs))}: two of them are the same step, "
                        f"for an epoch has {steps_per_epoch}; leave one out")  # fmt: skip
    return names


def score_behavior(
    args: Args, rollouts: Rollouts, temperature: float, base: Policy, ranks: Ranks
) -> Tensor:
    """Log-probs of the base by the training forward -> [N]; kept in the run folder for a restart.

    The gap to the sampler's own numbers is the noise floor of every ratio; it is printed."""
    # Not beside the model: vLLM takes every safetensors file of a folder for weights.
    path = args.output / "checkpoints" / "behavior_logprobs.safetensors"
    if path.is_file():
        return load_tensors(path, {"behavior_logprobs": torch.float32})[0]["behavior_logprobs"]
    logprobs = score(base, rollouts, temperature, args.micro_batch_tokens, ranks, "score the base")
    if rollouts.sampler_logprobs is not None:
        sums = noise_sums(logprobs - rollouts.sampler_logprobs, rollouts.response_mask)
        check_noise(sums, "trainer minus sampler log-probs", args.max_noise, ranks)
    if ranks.rank == 0:
        save_tensors(path, {"behavior_logprobs": logprobs}, {})
    ranks.barrier()
    return logprobs


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    torch.manual_seed(args.seed)
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    rewards, advantages, group_means, soft_values = training_targets(args, rollouts)
    inputs = {"base": fingerprint(model_folder(args.base)), "rollouts": fingerprint(rollouts.path)}
    if args.init:
        inputs["init"] = fingerprint(model_folder(args.init))
    check_vocabulary([args.base, args.init or args.base], rollouts)
    tokenizer = load_tokenizer(args.base)
    policy = load_policy(args.base, ranks, train=True, **vars(args))
    n = len(rewards)
    steps_per_epoch = -(-n // args.batch_size)
    total_steps, saves = args.epochs * steps_per_epoch, save_steps(args, steps_per_epoch)
    if not start_run(args.output, args, inputs, ranks):
        return
    behavior_logprobs = score_behavior(args, rollouts, temperature, policy, ranks)  # the base's
    if args.init:
        del policy  # one model in memory at a time
        policy = load_policy(args.init, ranks, train=True, **vars(args))

    optimizer = make_optimizer(policy, args.learning_rate, args.weight_decay)
    state = load_checkpoint(args.output, policy, optimizer, ranks) or {"step": 0}
    step = state["step"]
    log = MetricsLog(args.output, step, ranks, args.tensorboard)
    loss_function, unit = LOSSES[args.loss]
    bar = progress(ranks, total_steps, step, f"stage 1 {args.loss}")
    sigterm = catch_sigterm()

    while step < total_steps:
        epoch, within = divmod(step, steps_per_epoch)
        batch = epoch_batches(n, args.batch_size, args.seed, epoch)[within]
        # One count over the global batch: neither micro-batches nor ranks change the objective.
        tokens = rollouts.response_lens[batch]
        counts = {  # LOSSES names the one that divides; some are for forks
            "responses": len(batch),
            "tokens": int(tokens.sum()),
            "positive_tokens": max(1, int((tokens * rewards[batch]).sum())),
            "negative_tokens": max(1, int((tokens * (1 - rewards[batch])).sum())),
        }
        lengths, budget = rollouts.lengths[batch].tolist(), args.micro_batch_tokens
        rows = pack(lengths, budget, ranks.world_size, policy.attention_cost)[ranks.rank]
        sums: dict[str, Tensor] = {}
        for i, members in enumerate(rows):
            row = make_row(rollouts, batch[members].tolist(), ranks.device)
            at = row.sequences  # batch[members]; a stand-in where the rank has no work
            policy_logprobs, entropy = row_logprobs(policy, row, temperature)
            behavior = to_device(behavior_logprobs[row.flat], ranks.device) * row.response_mask
            of_responses = {
                "rewards": rewards, "advantages": advantages, "soft_values": soft_values,
                "group_means": group_means,
            }  # fmt: skip
            x = LossInputs(
                policy_logprobs, behavior, row.response_mask, row.sequence_ids, entropy=entropy,
                **{name: to_device(v[at], ranks.device) for name, v in of_responses.items()},
            )  # fmt: skip
            loss_sum, metrics = loss_function(x, previous=state.get("metrics", {}), **vars(args))
            loss = loss_sum / counts[unit] * bool(members)  # a rank without work adds nothing
            if args.kl_coef:
                kl_sum = (kl_penalty(x.log_ratio, args.kl_direction) * x.response_mask).sum()
                loss = loss + args.kl_coef * kl_sum / counts["responses"]
            sync_gradients(policy, i + 1 == len(rows), args.defer_gradient_sync)
            (loss * ranks.world_size).backward()  # FSDP averages over ranks; the objective is a sum
            metrics |= diagnostics(x, to_device(rollouts.rewards[at], ranks.device))
            metrics = {name: value * bool(members) for name, value in metrics.items()}
            share = 1 / (len(rows) * ranks.world_size)  # so that the micro-batches' losses add up
            metrics["loss"] = torch.stack([loss.detach(), loss.new_tensor(share)])
            sums = {k: sums.get(k, 0) + v for k, v in metrics.items()}

        grad_norm = clip_gradients(policy, args.max_grad_norm)
        sums["grad_norm"] = torch.stack([grad_norm, torch.ones_like(grad_norm)])
        sums["sigterm"] = torch.ones_like(sums["loss"]) * bool(sigterm)  # any rank: 1, none: nan
        values = mean_metrics(sums, ranks)
        learning_rate = args.learning_rate * min(1.0, (step + 1) / max(1, args.warmup_steps))
        optimizer_step(optimizer, learning_rate, values, state, args.output)
        state["step"] = step = step + 1
        stop = values.pop("sigterm") > 0
        state["metrics"] = values
        done = {"step": step, "epoch": step / steps_per_epoch, "learning_rate": learning_rate}
        log.write(done | values)
        correct, wrong = values["log_ratio_correct"], values["log_ratio_wrong"]
        skipped = {"skipped": state["skipped"]} if state["skipped"] else {}
        bar.set_postfix(correct=f"{correct:+.2f}", wrong=f"{wrong:+.2f}", **skipped, refresh=False)
        bar.update()
        if args.stop_at_logprob is not None and values["logprob"] <= args.stop_at_logprob:
            ranks.print(f"mean log-prob of a response is {values['logprob']:.1f} nats: "
                        "unlearned, stopping")  # fmt: skip
            break
        if step in saves:
            save_model(policy, tokenizer, args.output / "checkpoints" / saves[step], ranks)
        if step in saves or step % args.checkpoint_every == 0 or stop:
            save_checkpoint(args.output, state, policy, optimizer, ranks)
        if stop and step < total_steps:
            exit_by_sigterm(args.output, ranks)

    bar.close()
    save_model(policy, tokenizer, args.output, ranks)
    remove_checkpoint(args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
