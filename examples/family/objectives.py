"""More objectives for stage 1, and options that change any of them.

Notation of stage1_extreme.py: R response tokens and S responses of one packed row. Per token
log_ratio_t = log policy(y_t) - log base(y_t) and r_t = exp(log_ratio_t). Per response
S = sum_t log_ratio_t, the verdict R (0 or 1), the advantage A, and p, the pass rate of its problem.
sg[...] is a factor that carries no gradient.

    reinforce           -A log policy                            no ratio, no bound
    dapo, dr_grpo       -min(r A, clip(r) A)                     clip as in grpo, other divisors
    gspo                -min(s A, clip(s) A)                     s = exp(mean_t log_ratio_t)
    cispo               -sg[clip(r)] A log policy                a clipped token still learns
    topr                -sg[a] (2R - 1) log policy               a = 1 right, min(ratio, 1) wrong
    bapo                -min(r A, clip(r) A), dual clip          bounds that balance right and wrong
    vespo               -sg[phi(exp S)] A log policy             phi(W) = e^k' W^k e^(-k' W)
    psr, nsr            clipped, A = 1 right / A = -1 wrong      one class only
    weighted_reinforce  clipped, A = lambda right, -1 wrong
    nft                 (1 - p) {-log r, -log((1 - p r)/(1 - p))}

Each function returns an unnormalised sum and metrics, like the five of stage1_extreme.py. The dict
DIVISORS names what the loop divides the sum by. docs/family.md says where each objective is from,
what bounds it, and how it can go wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from common import sum_and_count
from stage1_extreme import LossInputs, LossOutput, kl_penalty, safe_exp

if TYPE_CHECKING:
    from stage1 import Args

# --------------------------------------------------------------------------------------------------
# Objectives


def clipped(
    x: LossInputs, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes PPO's surrogate -min(r A, clip(r, low, high) A), and its metric `clip_share`.

    advantages [R] -> [R]. low and high are bounds of the ratio itself, not distances from 1."""
    ratio = safe_exp(x.log_ratio)
    free, bound = ratio * advantages, ratio.clamp(low, high) * advantages
    return -torch.minimum(free, bound), {"clip_share": sum_and_count((bound < free).float())}


def reinforce_loss(x: LossInputs, args: Args) -> LossOutput:
    """-A log policy: the plain gradient, however far the policy has moved already."""
    return -(x.advantages[x.sequence_ids] * x.policy_logprobs).sum(), {}


def dapo_loss(x: LossInputs, args: Args) -> LossOutput:
    """grpo as a mean over tokens instead of responses, so long responses weigh more (DAPO)."""
    advantages = x.advantages[x.sequence_ids]
    loss, metrics = clipped(x, advantages, 1 - args.clip_low, 1 + args.clip_high)
    return loss.sum(), metrics


def dr_grpo_loss(x: LossInputs, args: Args) -> LossOutput:
    """grpo with one length for all responses; with --advantages group_mean it is Dr.GRPO."""
    loss, metrics = dapo_loss(x, args)
    return loss / args.dr_grpo_length, metrics


def gspo_loss(x: LossInputs, args: Args) -> LossOutput:
    """PPO's clip on one ratio per response, the geometric mean of its tokens' ratios (GSPO)."""
    ratio = safe_exp(x.mean_over_tokens(x.log_ratio))  # [S]
    low, high = 1 - args.gspo_clip_low, 1 + args.gspo_clip_high
    free, bound = ratio * x.advantages, ratio.clamp(low, high) * x.advantages
    metrics = {"clip_share": sum_and_count((bound < free).float())}
    return -torch.minimum(free, bound).sum(), metrics


def cispo_loss(x: LossInputs, args: Args) -> LossOutput:
    """-sg[clip(r, low, high)] A log policy: the weight is bounded, and every token learns."""
    ratio = safe_exp(x.log_ratio.detach())
    weight = ratio.clamp(args.cispo_low, args.cispo_high)
    loss = -(weight * x.advantages[x.sequence_ids] * x.policy_logprobs).sum()
    return loss, {"clip_share": sum_and_count((weight != ratio).float())}


def topr_loss(x: LossInputs, args: Args) -> LossOutput:
    """Likelihood of right responses; wrong ones are pushed down with the weight min(ratio, 1).

    The weight falls as a wrong response becomes unlikely (TOPR). --topr-ratio says which ratio it
    is: that of the whole response (as in the paper), its geometric mean over tokens, or each
    token's own."""
    log_ratio = x.log_ratio.detach()
    log_weight = {
        "sequence": x.per_response(log_ratio)[x.sequence_ids],
        "mean": x.mean_over_tokens(log_ratio)[x.sequence_ids],
        "token": log_ratio,
    }[args.topr_ratio]  # [R]
    sign = 2 * x.rewards[x.sequence_ids] - 1  # [R], the verdict without any baseline
    weight = torch.where(sign > 0, 1.0, safe_exp(log_weight).clamp(max=1))
    loss = -(weight * sign * x.policy_logprobs).sum()
    return loss, {"weight_wrong": sum_and_count(weight, sign < 0)}


# The bounds that BAPO tries in turn: the lower one rises to 0.8, then the upper one to 2.
BAPO_BOUNDS = [(0.6 + 0.05 * k, 1.2) for k in range(4)] + [(0.8, 1.2 + 0.05 * k) for k in range(17)]


def bapo_bounds(x: LossInputs, advantages: Tensor, target: float) -> tuple[float, float, Tensor]:
    """Searches the first bounds at which right tokens contribute `target` times as much as wrong
    ones; the last ones where none do. Returns low, high and the two contributions [right, wrong].
    """
    ratio = safe_exp(x.log_ratio.detach())
    for low, high in BAPO_BOUNDS:
        right = (ratio.clamp(max=high) * advantages.clamp(min=0)).sum()
        wrong = (ratio.clamp(min=low) * -advantages.clamp(max=0)).sum()
        if right >= target * wrong:
            break
    return low, high, torch.stack([right, wrong])


def bapo_loss(x: LossInputs, args: Args) -> LossOutput:
    """PPO's clip within bounds that balance right against wrong tokens, and a dual clip (BAPO).

    As in its authors' code the bounds are searched in each packed row. So this one objective
    depends on --micro-batch-tokens and on the number of ranks."""
    advantages = x.advantages[x.sequence_ids]
    low, high, balance = bapo_bounds(x, advantages, args.bapo_target)
    loss, metrics = clipped(x, advantages, low, high)
    # Dual clip: the loss of a wrong token stays below a multiple of |A|, whatever its ratio.
    bounded = torch.minimum(loss, -args.bapo_dual_clip * advantages)
    metrics |= {
        "bapo_low": sum_and_count(torch.full_like(x.rewards, low)),
        "bapo_high": sum_and_count(torch.full_like(x.rewards, high)),
        "bapo_balance": balance,  # sum / count is right over wrong
    }
    return torch.where(advantages < 0, bounded, loss).sum(), metrics


def vespo_loss(x: LossInputs, args: Args) -> LossOutput:
    """-sg[phi(W)] A log policy with W = exp(S) and phi(W) = exp(l) W^k exp(-l W) (VESPO).

    phi(1) = 1, and a response some nats away from the base has almost no weight."""
    log_w = x.per_response(x.log_ratio.detach()).clamp(math.log(1e-8), 20)  # [S]
    positive = x.advantages >= 0
    k = torch.where(positive, args.vespo_positive[0], args.vespo_negative[0])
    scale = torch.where(positive, args.vespo_positive[1], args.vespo_negative[1])
    weight = (scale + k * log_w - scale * log_w.exp()).exp()
    loss = -((weight * x.advantages)[x.sequence_ids] * x.policy_logprobs).sum()
    return loss, {"weight": sum_and_count(weight)}


def verdict_loss(x: LossInputs, right: float, wrong: float, args: Args) -> LossOutput:
    """PPO's clip with one fixed advantage for each verdict: there is no baseline and no group."""
    advantages = (wrong + (right - wrong) * x.rewards)[x.sequence_ids]
    loss, metrics = clipped(x, advantages, 1 - args.clip_low, 1 + args.clip_high)
    return loss.sum(), metrics


def psr_loss(x: LossInputs, args: Args) -> LossOutput:
    """Positive sample reinforcement: A = 1 on right responses, nothing on wrong ones."""
    return verdict_loss(x, 1.0, 0.0, args)


def nsr_loss(x: LossInputs, args: Args) -> LossOutput:
    """Negative sample reinforcement: A = -1 on wrong responses, nothing on right ones."""
    return verdict_loss(x, 0.0, -1.0, args)


def weighted_reinforce_loss(x: LossInputs, args: Args) -> LossOutput:
    """A = lambda on right responses and -1 on wrong ones: NSR with some PSR (W-REINFORCE)."""
    return verdict_loss(x, args.positive_weight, -1.0, args)


def nft_loss(x: LossInputs, args: Args) -> LossOutput:
    """Likelihood of right responses; of wrong ones that of the *implicit* negative policy (NFT).

    That policy is (base - p policy) / (1 - p). The sum is weighted by 1 - p. Problems that all or
    none of the responses solve are left out."""
    p = x.pass_rates[x.sequence_ids].clamp(0.02, 0.98)  # [R]
    ratio = x.log_ratio.clamp(max=10).exp()
    inner = (1 - p * ratio) / (1 - p)
    # Its value is held at 1 or above and its gradient kept: p r / (1 - p) for r > 1, not a pole.
    held = inner + (inner.clamp(min=1) - inner).detach()
    right = x.rewards[x.sequence_ids] > 0.5
    loss = torch.where(right, -x.log_ratio, -args.nft_negative_weight * held.log()) * (1 - p)
    mixed = ((x.pass_rates > 0) & (x.pass_rates < 1))[x.sequence_ids]
    return (loss * mixed).sum(), {"held_share": sum_and_count((inner < 1).float(), mixed & ~right)}


Objective = Callable[[LossInputs, "Args"], LossOutput]
OBJECTIVES: dict[str, Objective] = {
    "reinforce": reinforce_loss,
    "dapo": dapo_loss,
    "dr_grpo": dr_grpo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "topr": topr_loss,
    "bapo": bapo_loss,
    "vespo": vespo_loss,
    "psr": psr_loss,
    "nsr": nsr_loss,
    "weighted_reinforce": weighted_reinforce_loss,
    "nft": nft_loss,
}
# What divides the sum, as in stage1_extreme.DIVISORS; of dr_grpo and gspo it is the responses.
DIVISORS = {
    "reinforce": "tokens",
    "dapo": "tokens",
    "cispo": "tokens",
    "topr": "tokens",
    "bapo": "tokens",
    "vespo": "tokens",
    "psr": "correct_tokens",
    "nsr": "wrong_tokens",
    "weighted_reinforce": "tokens",
    "nft": "tokens",
}


# --------------------------------------------------------------------------------------------------
# Options. Each changes the LossInputs that an objective sees, and returns them as they are where
# its flags have their defaults. It looks at one response at a time, so micro-batches do not matter.


def choose_advantages(x: LossInputs, args: Args) -> LossInputs:
    """group_mean: A = R - mean R, without the deviation that lifts nearly agreeing groups.

    This is Dr.GRPO's advantage. Under --unlearn A stays -1."""
    if args.advantages == "group_std" or args.unlearn:
        return x
    return dataclasses.replace(x, advantages=x.rewards - x.pass_rates)


def weigh_responses(x: LossInputs, weights: Tensor) -> LossInputs:
    """Multiplies the gradient of each response by weights [S]; the loss's *value* stays the same.

    Every objective is a sum over responses, so this is the gradient of the weighted sum, also for
    those that look at no advantage. For those linear in A it equals weighing A."""
    fixed = x.policy_logprobs.detach()
    scaled = fixed + weights[x.sequence_ids] * (x.policy_logprobs - fixed)  # the difference is 0
    return dataclasses.replace(x, policy_logprobs=scaled)


def weigh_by_pass_rate(x: LossInputs, args: Args) -> LossInputs:
    """p^a (1 - p)^b: the most weight goes to problems that are solved sometimes (PACED)."""
    a, b = args.paced
    if a == b == 0:
        return x
    return weigh_responses(x, x.pass_rates**a * (1 - x.pass_rates) ** b)


def weigh_confident_errors(x: LossInputs, args: Args) -> LossInputs:
    """Wrong responses that have become likelier weigh more: 1 + alpha softplus(sg[S]) (ACE)."""
    if args.ace_alpha == 0:
        return x
    shift = x.per_response(x.log_ratio.detach())  # [S]
    weights = torch.where(x.rewards > 0.5, 1.0, 1 + args.ace_alpha * F.softplus(shift))
    return weigh_responses(x, weights)


def leave_out(x: LossInputs, tokens: Tensor) -> LossInputs:
    """Returns the row without `tokens` [R] bool, and without responses that lose all of theirs."""
    kept = ~tokens
    responses, sequence_ids = x.sequence_ids[kept].unique(return_inverse=True)
    per_token = ("policy_logprobs", "base_logprobs", "entropy")
    per_response = ("rewards", "advantages", "pass_rates", "verdicts")
    left = {name: getattr(x, name)[kept] for name in per_token}
    left |= {name: getattr(x, name)[responses] for name in per_response}
    return dataclasses.replace(x, sequence_ids=sequence_ids, **left)


def top_tokens(x: LossInputs, values: Tensor, fraction: float) -> Tensor:
    """Marks, in each response, the floor(fraction * tokens) with the largest positive `values`.

    values [R] -> [R] bool. The rank is within the response: within the row it would depend on what
    else is packed there."""
    order = values.argsort(descending=True, stable=True)
    order = order[x.sequence_ids[order].argsort(stable=True)]  # by response, then by value
    lengths = x.per_response(torch.ones_like(values))  # [S]
    starts = (lengths.cumsum(0) - lengths)[x.sequence_ids]
    rank = torch.empty_like(values)
    rank[order] = torch.arange(len(values)).to(values)
    allowed = (fraction * lengths).floor()[x.sequence_ids]
    return (rank - starts < allowed) & (values > 0)


def mask_tokens(x: LossInputs, args: Args) -> LossInputs:
    """Leaves out the most uncertain tokens, and those furthest from the base (after EKSFT)."""
    if args.mask_entropy == args.mask_kl == 0:
        return x
    uncertain = top_tokens(x, x.entropy, args.mask_entropy)
    far = top_tokens(x, kl_penalty(x.log_ratio.detach(), "reverse"), args.mask_kl)
    return leave_out(x, uncertain | far)


def spare_unlikely(x: LossInputs, args: Args) -> LossInputs:
    """Leaves out tokens of wrong responses with floor <= probability < ceiling (after Lp-Reg).

    Such tokens are rare words that no punishment should remove; below the floor they are noise."""
    if args.spare_ceiling == 0:
        return x
    probability = x.policy_logprobs.detach().exp()
    rare = (probability >= args.spare_floor) & (probability < args.spare_ceiling)
    return leave_out(x, rare & (x.rewards < 0.5)[x.sequence_ids])


# Tokens are left out last, because weights are those of whole responses.
OPTIONS = (
    choose_advantages,
    weigh_by_pass_rate,
    weigh_confident_errors,
    mask_tokens,
    spare_unlikely,
)


def with_options(loss: Objective) -> Objective:
    """Returns the objective behind all options, which the flags switch on."""

    def changed(x: LossInputs, args: Args) -> LossOutput:
        """Applies the options, each to what the one before has left, and then the objective."""
        for option in OPTIONS:
            x = option(x, args)
        return loss(x, args)

    return changed
