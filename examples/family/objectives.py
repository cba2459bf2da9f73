"""More objectives for stage 1, and options that any of them takes: pure functions on LossInputs.

Notation of stage1_extreme.py: T tokens and S responses of a packed row, r_t = exp(log_ratio_t),
S = sum_t log_ratio_t, R in {0, 1}, A = advantage, p = pass rate of the problem, sg = stop-gradient.

    reinforce           -A log policy                            no ratio, no bound
    dapo, dr_grpo       -min(r A, clip(r) A)                     clip as grpo; other divisors
    gspo                -min(s A, clip(s) A)                     s = exp(mean_t log_ratio)
    cispo               -sg[clip(r)] A log policy                a clipped token still learns
    topr                -sg[a] (2R - 1) log policy               a = 1 right, min(ratio, 1) wrong
    bapo                -min(r A, clip(r) A), dual clip          bounds from the step before
    vespo               -sg[phi(exp S)] A log policy             phi(W) = e^k' W^k e^(-k' W)
    psr, nsr            clipped, A = 1 right / A = -1 wrong      one class only
    weighted_reinforce  clipped, A = lambda right, -1 wrong
    nft                 (1 - p) {-log r, -log((1 - p r)/(1 - p))}

docs/family.md says what bounds each, where it comes from and how it bites. Each returns an
unnormalised sum and metrics, as the five of stage1_extreme.py do; OBJECTIVES names the divisor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import kl_penalty, safe_exp, sum_and_count
from stage1_extreme import LossInputs, LossOutput

# --------------------------------------------------------------------------------------------------
# Objectives


def clipped(
    x: LossInputs, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's surrogate -min(r A, clip(r, low, high) A) per token [T], zero on prompts, and its
    `clip_share`. advantages [T]; low and high are bounds of the ratio itself, not epsilons."""
    ratio = safe_exp(x.log_ratio)
    free, bound = ratio * advantages, ratio.clamp(low, high) * advantages
    loss = -torch.minimum(free, bound) * x.response_mask
    return loss, {"clip_share": sum_and_count(bound < free, x.response_mask)}


def reinforce_loss(x: LossInputs, **_: Any) -> LossOutput:
    """-A log policy: the plain gradient, blind to how far the policy has gone."""
    loss = -x.advantages[x.sequence_ids] * x.policy_logprobs * x.response_mask
    return loss.sum(), {}


def dapo_loss(x: LossInputs, *, clip_low: float, clip_high: float, **_: Any) -> LossOutput:
    """grpo as a mean over tokens, not over responses: long responses weigh more (DAPO)."""
    advantages = x.advantages[x.sequence_ids]
    loss, metrics = clipped(x, advantages, 1 - clip_low, 1 + clip_high)
    return loss.sum(), metrics


def dr_grpo_loss(
    x: LossInputs, *, clip_low: float, clip_high: float, dr_grpo_length: int, **_: Any
) -> LossOutput:
    """grpo with one length for all responses; with --advantages group_mean it is Dr.GRPO."""
    loss, metrics = dapo_loss(x, clip_low=clip_low, clip_high=clip_high)
    return loss / dr_grpo_length, metrics


def gspo_loss(
    x: LossInputs, *, gspo_clip_low: float, gspo_clip_high: float, **_: Any
) -> LossOutput:
    """PPO's clip on one ratio a response, the geometric mean of its tokens' (GSPO)."""
    ratio = safe_exp(x.mean_over_tokens(x.log_ratio))  # [S]
    free = ratio * x.advantages
    bound = ratio.clamp(1 - gspo_clip_low, 1 + gspo_clip_high) * x.advantages
    responses = x.per_response(x.response_mask.float()) > 0
    return -torch.minimum(free, bound).sum(), {"clip_share": sum_and_count(bound < free, responses)}


def cispo_loss(x: LossInputs, *, cispo_low: float, cispo_high: float, **_: Any) -> LossOutput:
    """-sg[clip(r, low, high)] A log policy: a bounded weight, and no token falls silent (CISPO)."""
    ratio = safe_exp(x.log_ratio.detach())
    weight = ratio.clamp(cispo_low, cispo_high)
    loss = -weight * x.advantages[x.sequence_ids] * x.policy_logprobs * x.response_mask
    return loss.sum(), {"clip_share": sum_and_count(weight != ratio, x.response_mask)}


def topr_loss(x: LossInputs, *, topr_ratio: str, **_: Any) -> LossOutput:
    """Right responses: plain likelihood. Wrong: pushed down with the weight min(ratio, 1), which
    tapers off as they become unlikely (TOPR). The ratio is that of the whole response (the paper),
    its geometric mean over tokens, or each token's own: topr_ratio sequence, mean, token."""
    log_ratio = x.log_ratio.detach() * x.response_mask
    log_weight = {
        "sequence": x.per_response(log_ratio)[x.sequence_ids],
        "mean": x.mean_over_tokens(log_ratio)[x.sequence_ids],
        "token": log_ratio,
    }[topr_ratio]  # [T]
    sign = 2 * x.rewards[x.sequence_ids] - 1  # [T], a verdict and no baseline
    weight = torch.where(sign > 0, 1.0, safe_exp(log_weight).clamp(max=1))
    wrong = x.response_mask & (sign < 0)
    loss = -weight * sign * x.policy_logprobs * x.response_mask
    return loss.sum(), {"weight_wrong": sum_and_count(weight, wrong)}


# The bounds that BAPO tries in turn, low up to 0.8, then high up to 2, under their metric's name.
BAPO_BOUNDS = [(0.6 + 0.05 * k, 1.2) for k in range(4)] + [(0.8, 1.2 + 0.05 * k) for k in range(17)]
BAPO_SEARCH = {f"bapo_balance_{k:02d}": bounds for k, bounds in enumerate(BAPO_BOUNDS)}


def bapo_balances(x: LossInputs, advantages: Tensor) -> dict[str, Tensor]:
    """For all bounds: [what right tokens contribute to the surrogate, what wrong ones do]; summed
    over micro-batches and ranks, sum / count is the balance that BAPO steers."""
    ratio, advantages = safe_exp(x.log_ratio.detach()), advantages * x.response_mask

    def balance(low: float, high: float) -> Tensor:
        """[right, wrong] within these bounds."""
        right = (ratio.clamp(max=high) * advantages.clamp(min=0)).sum()
        return torch.stack([right, (ratio.clamp(min=low) * -advantages.clamp(max=0)).sum()])

    return {name: balance(*bounds) for name, bounds in BAPO_SEARCH.items()}


def bapo_loss(
    x: LossInputs, *, previous: dict[str, float], bapo_target: float, bapo_dual_clip: float,
    **_: Any,
) -> LossOutput:  # fmt: skip
    """PPO's clip within the first bounds that balanced right against wrong tokens, over the whole
    batch *of the step before*: searched in a micro-batch they would depend on its size (BAPO)."""
    bounds = BAPO_BOUNDS[0]
    if previous:
        # NaN, a batch without a wrong token, is no reason to move.
        balanced = [b for n, b in BAPO_SEARCH.items() if not previous[n] < bapo_target]
        bounds = (balanced or BAPO_BOUNDS[-1:])[0]
    advantages = x.advantages[x.sequence_ids]
    loss, metrics = clipped(x, advantages, *bounds)
    loss = torch.where(advantages < 0, torch.minimum(loss, -bapo_dual_clip * advantages), loss)
    metrics |= bapo_balances(x, advantages)
    for name, bound in zip(("bapo_low", "bapo_high"), bounds, strict=True):
        metrics[name] = x.rewards.new_tensor([bound, 1.0])
    return loss.sum(), metrics


def vespo_loss(
    x: LossInputs, *, vespo_positive: tuple[float, float], vespo_negative: tuple[float, float],
    **_: Any,
) -> LossOutput:  # fmt: skip
    """-sg[phi(W)] A log policy, W = exp(S) unnormalised, phi(W) = exp(l) W^k exp(-l W) (VESPO):
    phi(1) = 1, and a response some nats away from the base has nearly no weight."""
    log_w = x.per_response(x.log_ratio.detach()).clamp(math.log(1e-8), 20)  # [S]
    positive = x.advantages >= 0
    k, scale = (
        torch.where(positive, log_w.new_tensor(a), b)
        for a, b in zip(vespo_positive, vespo_negative, strict=True)
    )
    weight = (scale + k * log_w - scale * log_w.exp()).exp()
    loss = -(weight * x.advantages)[x.sequence_ids] * x.policy_logprobs * x.response_mask
    responses = x.per_response(x.response_mask.float()) > 0
    return loss.sum(), {"weight": sum_and_count(weight, responses)}


def verdict_loss(
    x: LossInputs, right: float, wrong: float, clip_low: float, clip_high: float
) -> LossOutput:
    """PPO's clip with a fixed advantage for each verdict: no baseline, no group."""
    advantages = (wrong + (right - wrong) * x.rewards)[x.sequence_ids]
    loss, metrics = clipped(x, advantages, 1 - clip_low, 1 + clip_high)
    return loss.sum(), metrics


def psr_loss(x: LossInputs, *, clip_low: float, clip_high: float, **_: Any) -> LossOutput:
    """Positive sample reinforcement: A = 1 on right responses, nothing on wrong ones."""
    return verdict_loss(x, 1.0, 0.0, clip_low, clip_high)


def nsr_loss(x: LossInputs, *, clip_low: float, clip_high: float, **_: Any) -> LossOutput:
    """Negative sample reinforcement: A = -1 on wrong responses, nothing on right ones."""
    return verdict_loss(x, 0.0, -1.0, clip_low, clip_high)


def weighted_reinforce_loss(
    x: LossInputs, *, positive_weight: float, clip_low: float, clip_high: float, **_: Any
) -> LossOutput:
    """A = lambda on right responses, -1 on wrong ones: NSR with some PSR (W-REINFORCE)."""
    return verdict_loss(x, positive_weight, -1.0, clip_low, clip_high)


def nft_loss(x: LossInputs, *, nft_negative_weight: float, **_: Any) -> LossOutput:
    """Likelihood of right responses, and on wrong ones of the *implicit* negative policy
    (base - p policy) / (1 - p); times 1 - p, without problems that all or none solve (NFT)."""
    p = x.group_means[x.sequence_ids].clamp(0.02, 0.98)  # [T]
    ratio = x.log_ratio.clamp(max=10).exp()
    inner = (1 - p * ratio) / (1 - p)
    # Its value is held at 1 or above, its gradient kept: p r / (1 - p) for r > 1, not a pole.
    held = inner + (inner.clamp(min=1) - inner).detach()
    right = x.rewards[x.sequence_ids] > 0.5
    loss = torch.where(right, -x.log_ratio, -nft_negative_weight * held.log()) * (1 - p)
    mixed = ((x.group_means > 0) & (x.group_means < 1))[x.sequence_ids] & x.response_mask
    return (loss * mixed).sum(), {"held_share": sum_and_count(inner < 1, mixed & ~right)}


# objective -> (function, what the loop divides its sum by), as stage1_extreme.LOSSES
OBJECTIVES: dict[str, tuple[Callable[..., LossOutput], str]] = {
    "reinforce": (reinforce_loss, "tokens"),
    "dapo": (dapo_loss, "tokens"),
    "dr_grpo": (dr_grpo_loss, "responses"),
    "gspo": (gspo_loss, "responses"),
    "cispo": (cispo_loss, "tokens"),
    "topr": (topr_loss, "tokens"),
    "bapo": (bapo_loss, "tokens"),
    "vespo": (vespo_loss, "tokens"),
    "psr": (psr_loss, "positive_tokens"),
    "nsr": (nsr_loss, "negative_tokens"),
    "weighted_reinforce": (weighted_reinforce_loss, "tokens"),
    "nft": (nft_loss, "tokens"),
}


# --------------------------------------------------------------------------------------------------
# Options: LossInputs -> LossInputs, for any objective. Each looks at one response at a time, so
# micro-batches do not change it, and gives back what it got where its flags are at their default.


def choose_advantages(x: LossInputs, *, advantages: str, unlearn: bool, **_: Any) -> LossInputs:
    """group_mean: A = R - mean, without the deviation that lifts nearly agreeing groups (Dr.GRPO).
    Under --unlearn A stays -1."""
    if advantages == "group_std" or unlearn:
        return x
    return dataclasses.replace(x, advantages=x.rewards - x.group_means)


def weigh_responses(x: LossInputs, weights: Tensor) -> LossInputs:
    """Multiplies the gradient of each response by weights [S]; the loss's *value* stays unweighted.

    Every objective is a sum over responses, so this is the gradient of the weighted sum, for those
    too that look at no advantage. For those linear in A it equals weighing A."""
    fixed = x.policy_logprobs.detach()
    scaled = fixed + weights[x.sequence_ids] * (x.policy_logprobs - fixed)  # the difference is 0
    return dataclasses.replace(x, policy_logprobs=scaled)


def weigh_by_pass_rate(x: LossInputs, *, paced: tuple[float, float], **_: Any) -> LossInputs:
    """p^a (1 - p)^b: most weight on problems that are solved sometimes (PACED); (0, 0): none."""
    a, b = paced
    if a == b == 0:
        return x
    return weigh_responses(x, x.group_means**a * (1 - x.group_means) ** b)


def weigh_confident_errors(x: LossInputs, *, ace_alpha: float, **_: Any) -> LossInputs:
    """Wrong responses that have become likelier weigh more: 1 + alpha softplus(sg[S]) (ACE)."""
    if ace_alpha == 0:
        return x
    shift = x.per_response(x.log_ratio.detach() * x.response_mask)  # [S]
    return weigh_responses(x, torch.where(x.rewards > 0.5, 1.0, 1 + ace_alpha * F.softplus(shift)))


def leave_out(x: LossInputs, tokens: Tensor) -> LossInputs:
    """Makes `tokens` [T] bool look like prompt tokens: no loss, no gradient, no part in S."""
    return dataclasses.replace(
        x,
        policy_logprobs=x.policy_logprobs.masked_fill(tokens, 0.0),
        behavior_logprobs=x.behavior_logprobs.masked_fill(tokens, 0.0),
        response_mask=x.response_mask & ~tokens,
    )


def top_tokens(x: LossInputs, values: Tensor, fraction: float) -> Tensor:
    """[T] bool: of each response the floor(fraction x tokens) with the largest positive `values`.

    By response, for a rank within the row would depend on what else is packed into it."""
    values = values.masked_fill(~x.response_mask, -math.inf)
    order = values.argsort(descending=True, stable=True)
    order = order[x.sequence_ids[order].argsort(stable=True)]  # by response, then by value
    lengths = x.per_response(torch.ones_like(values))  # [S], prompts included
    starts = (lengths.cumsum(0) - lengths)[x.sequence_ids]
    rank = torch.empty_like(values).index_put((order,), torch.arange(len(values)).to(values))
    allowed = (fraction * x.per_response(x.response_mask.to(values))).floor()[x.sequence_ids]
    return (rank - starts < allowed) & (values > 0)


def mask_tokens(x: LossInputs, *, mask_entropy: float, mask_kl: float, **_: Any) -> LossInputs:
    """Leaves out the most uncertain tokens, and those furthest from the base (after EKSFT)."""
    if mask_entropy == mask_kl == 0:
        return x
    left_out = top_tokens(x, x.entropy, mask_entropy)
    left_out |= top_tokens(x, kl_penalty(x.log_ratio.detach(), "reverse"), mask_kl)
    return leave_out(x, left_out)


def spare_unlikely(
    x: LossInputs, *, spare_floor: float, spare_ceiling: float, **_: Any
) -> LossInputs:
    """Leaves out tokens of wrong responses with floor <= probability < ceiling: rare words that no
    punishment should stamp out, above what is taken for noise (after Lp-Reg)."""
    if spare_ceiling == 0:
        return x
    probability = x.policy_logprobs.detach().exp()
    rare = (probability >= spare_floor) & (probability < spare_ceiling)
    return leave_out(x, rare & (x.rewards < 0.5)[x.sequence_ids] & x.response_mask)


# Masks last: weights are those of whole responses.
OPTIONS = (
    choose_advantages, weigh_by_pass_rate, weigh_confident_errors, mask_tokens, spare_unlikely,
)  # fmt: skip


def with_options(loss: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """The objective behind all options, which the flags switch on."""

    def changed(x: LossInputs, **flags: Any) -> LossOutput:
        """Options first, each on what the one before has left."""
        for option in OPTIONS:
            x = option(x, **flags)
        return loss(x, **flags)

    return changed
