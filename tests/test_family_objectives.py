"""examples/family: every objective and option against closed forms, limits and the real loop."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import objectives
import pytest
import stage1
import tiny
import torch
from objectives import BAPO_BOUNDS, OBJECTIVES, OPTIONS, leave_out, top_tokens, with_options
from test_head_and_packing import accumulate, assert_same, layouts
from test_losses import inputs

import common
import stage1_extreme
from stage1_extreme import LossInputs

CPU = torch.device("cpu")
REQUIRED = {"base": "b", "rollouts": Path("r"), "output": Path("o")}
SETTINGS = vars(stage1.Args(**REQUIRED)) | {"previous": {}}
# Bounds wide enough that neither side of mixed_inputs is always clipped.
VARIANTS = {name: (name, {}) for name in OBJECTIVES} | {
    "gspo wide": ("gspo", {"gspo_clip_low": 0.1, "gspo_clip_high": 0.1}),
    "cispo narrow": ("cispo", {"cispo_low": 0.8, "cispo_high": 1.2}),
    "topr mean": ("topr", {"topr_ratio": "mean"}),
    "topr token": ("topr", {"topr_ratio": "token"}),
    "bapo moved": ("bapo", {"previous": {n: 0.9 for n in objectives.BAPO_SEARCH}}),
}
CHANGES = {
    "group_mean": {"advantages": "group_mean"},
    "paced": {"paced": (1.0, 2.0)},
    "ace": {"ace_alpha": 0.7},
    "mask_entropy": {"mask_entropy": 0.4},
    "mask_kl": {"mask_kl": 0.4},
    "spare": {"spare_floor": 0.3, "spare_ceiling": 0.6},
}
CHANGES["all"] = {key: value for changes in CHANGES.values() for key, value in changes.items()}


def call(name, x, options=False, **changes):
    """(value, gradient on all tokens, metrics) with the script's defaults, changed where asked."""
    loss, _ = OBJECTIVES[name]
    value, metrics = (with_options(loss) if options else loss)(x, **(SETTINGS | changes))
    (grad,) = torch.autograd.grad(value, x.policy_logprobs)
    return value.item(), grad, metrics


def slopes(name, x, **changes):
    """d loss / d policy_logprobs of the response tokens."""
    return call(name, x, **changes)[1][x.response_mask].tolist()


def one(ratio, advantage, **changes):
    """A response of one token."""
    return inputs([[math.log(ratio)]], [float(advantage > 0)], [float(advantage)], **changes)


def mixed_inputs():
    """Five responses of different lengths, all kinds of verdict, pass rate and ratio; entropies."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 5, 1, 4, 6)
    rows = [(torch.randn(n, generator=generator) * 0.5).tolist() for n in lengths]
    x = inputs(rows, [1.0, 0.0, 0.0, 1.0, 0.0], [1.5, -0.5, -1.0, 0.7, 0.0], prompt=2)
    entropy = torch.rand(len(x.behavior_logprobs), generator=generator).double() * x.response_mask
    means = torch.tensor([0.25, 0.25, 0.4, 0.6, 0.0], dtype=torch.float64)
    return dataclasses.replace(x, group_means=means, entropy=entropy)


def with_policy(x, policy_logprobs):
    return dataclasses.replace(x, policy_logprobs=policy_logprobs)


# --------------------------------------------------------------------------------------------------
# The gradient that each states, token by token, in plain arithmetic


def clip_slope(r, a, low, high):
    """Of -min(r a, clip(r) a) by log policy: nothing beyond the bound on the side a pushes to."""
    return 0.0 if (a > 0 and r > high) or (a < 0 and r < low) or a == 0 else -a * r


def phi(s, k, scale):
    w = math.exp(min(max(s, math.log(1e-8)), 20))
    return math.exp(scale) * w**k * math.exp(-scale * w)


def nft_slope(r, right, p):
    if p in (0, 1):
        return 0.0
    if right:
        return -(1 - p)
    return (1 - p) * p * r / (1 - p) if r > 1 else (1 - p) * p * r / (1 - p * r)


# r: of the token, g: geometric mean of the response, s: its log-ratio, n: its tokens, a: advantage
STATED = {
    "reinforce": lambda r, g, s, n, a, right, p: -a,
    "dapo": lambda r, g, s, n, a, right, p: clip_slope(r, a, 0.8, 1.28),
    "dr_grpo": lambda r, g, s, n, a, right, p: clip_slope(r, a, 0.8, 1.28) / 1024,
    "gspo": lambda r, g, s, n, a, right, p: clip_slope(g, a, 1 - 3e-4, 1 + 4e-4) / n,
    "gspo wide": lambda r, g, s, n, a, right, p: clip_slope(g, a, 0.9, 1.1) / n,
    "cispo": lambda r, g, s, n, a, right, p: -a * min(r, 5),
    "cispo narrow": lambda r, g, s, n, a, right, p: -a * min(max(r, 0.8), 1.2),
    "topr": lambda r, g, s, n, a, right, p: -1 if right else min(math.exp(s), 1),
    "topr mean": lambda r, g, s, n, a, right, p: -1 if right else min(g, 1),
    "topr token": lambda r, g, s, n, a, right, p: -1 if right else min(r, 1),
    "bapo": lambda r, g, s, n, a, right, p: clip_slope(r, a, 0.6, 1.2) * (a > 0 or r < 3),
    "bapo moved": lambda r, g, s, n, a, right, p: clip_slope(r, a, 0.8, 2) * (a > 0 or r < 3),
    "vespo": lambda r, g, s, n, a, right, p: -a * (phi(s, 2, 3) if a >= 0 else phi(s, 3, 2)),
    "psr": lambda r, g, s, n, a, right, p: clip_slope(r, float(right), 0.8, 1.28),
    "nsr": lambda r, g, s, n, a, right, p: clip_slope(r, right - 1.0, 0.8, 1.28),
    "weighted_reinforce": lambda r, g, s, n, a, right, p: clip_slope(
        r, 0.1 if right else -1, 0.8, 1.28
    ),
    "nft": lambda r, g, s, n, a, right, p: nft_slope(r, right, p),
}


def stated(variant, x):
    """Gradient of every token by STATED; prompts 0."""
    found = []
    for t, s in enumerate(x.sequence_ids.tolist()):
        d = x.log_ratio[(x.sequence_ids == s) & x.response_mask].tolist()
        mean, total = sum(d) / len(d), sum(d)
        found.append(STATED[variant](
            math.exp(x.log_ratio[t].item()), math.exp(mean), total, len(d), x.advantages[s].item(),
            bool(x.rewards[s]), x.group_means[s].item(),
        ) if x.response_mask[t] else 0.0)  # fmt: skip
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_stated_one(variant):
    name, changes = VARIANTS[variant]
    x = mixed_inputs()
    grad = call(name, x, **changes)[1]
    assert grad.tolist() == pytest.approx(stated(variant, x), abs=1e-12)
    assert (grad[~x.response_mask] == 0).all()
    assert (grad != 0).any()


WEIGHTED = ("cispo", "topr", "vespo", "nft")  # their value is no integral of their gradient


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.split()[0] not in WEIGHTED])
def test_gradcheck(variant):
    name, changes = VARIANTS[variant]
    x = mixed_inputs()

    def loss(policy_logprobs):
        return OBJECTIVES[name][0](with_policy(x, policy_logprobs), **(SETTINGS | changes))[0]

    assert torch.autograd.gradcheck(loss, (x.policy_logprobs,))


# --------------------------------------------------------------------------------------------------
# Values and single tokens


@pytest.mark.parametrize("name", ["dapo", "dr_grpo"])
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1, 0.5, -0.5, -0.5), (1, 1, -1, -1), (1, 1.25, -1.25, -1.25), (1, 1.35, -1.28, 0),
     (-1, 0.5, 0.8, 0), (-1, 1, 1, 1), (-1, 1.35, 1.35, 1.35), (-1, 4, 4, 4)],
)  # fmt: skip
def test_clip(name, advantage, ratio, loss, slope):
    value, grad, metrics = call(name, one(ratio, advantage), dr_grpo_length=1)
    assert value == pytest.approx(loss)
    assert grad[1].item() == pytest.approx(slope)
    assert metrics["clip_share"].tolist() == [int(slope == 0), 1]


def test_aggregation():
    """Lengths 1 and 3, a loss of 1 and 0 a token: token mean 1/4; one length of 2 for all: 1/4."""
    x = inputs([[0.0], [0.0] * 3], [0.0, 1.0], [-1.0, 0.0])
    assert call("dapo", x)[0] / 4 == pytest.approx(0.25)
    assert call("dr_grpo", x, dr_grpo_length=2)[0] / 2 == pytest.approx(0.25)
    units = {name: unit for name, (_, unit) in OBJECTIVES.items()}
    assert {n for n, u in units.items() if u == "responses"} == {"gspo", "dr_grpo"}
    assert (units.pop("psr"), units.pop("nsr")) == ("positive_tokens", "negative_tokens")
    assert {u for u in units.values()} == {"tokens", "responses"}


def test_reinforce_value():
    x = inputs([[0.2, 0.3], [0.4]], [1.0, 0.0], [2.0, -1.0])
    assert call("reinforce", x)[0] == pytest.approx(-2 * (-0.5 - 0.6 + 0.5) + (-0.5 + 0.4))


def test_gspo_ratio_is_the_geometric_mean():
    x = inputs([[0.3, -0.1, 0.1]], [1.0], [1.0])
    value, _, metrics = call("gspo", x, gspo_clip_high=0.2)
    assert value == pytest.approx(-1.10517, abs=1e-5)
    assert metrics["clip_share"].tolist() == [0, 1]
    value, grad, metrics = call("gspo", x)  # its own bounds
    assert value == pytest.approx(-1.0004)
    assert not grad.any()
    assert metrics["clip_share"].tolist() == [1, 1]
    balanced = inputs([[2.0, -2.0]], [1.0], [1.0])  # each token far outside, their mean is 1
    assert slopes("gspo", balanced) == pytest.approx([-0.5, -0.5])


@pytest.mark.parametrize(
    ("ratio", "low", "slope"), [(6, 0, -5), (4, 0, -4), (0.1, 0, -0.1), (0.1, 0.8, -0.8)]
)
def test_cispo_bounds_the_weight_only(ratio, low, slope):
    x = one(ratio, 1)
    assert slopes("cispo", x, cispo_low=low) == pytest.approx([slope])
    share = call("cispo", x, cispo_low=low)[2]["clip_share"].tolist()
    assert share == [int(abs(slope) != ratio), 1]


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1, 3])
@pytest.mark.parametrize("kind", ["sequence", "mean", "token"])
def test_topr_right_responses_have_no_ratio(ratio, kind):
    assert slopes("topr", one(ratio, 1), topr_ratio=kind) == [-1]


def test_topr_wrong_responses_taper():
    token = {"topr_ratio": "token"}
    assert slopes("topr", one(0.5, -1), **token) == pytest.approx([0.5])
    assert slopes("topr", one(3, -1), **token) == [1]
    x = inputs([[math.log(0.5)] * 2], [0.0], [-1.0])
    assert slopes("topr", x) == pytest.approx([0.25, 0.25])
    assert slopes("topr", x, topr_ratio="mean") == pytest.approx([0.5, 0.5])
    assert call("topr", x)[2]["weight_wrong"].tolist() == pytest.approx([0.5, 2])
    gone = inputs([[-0.1] * 300], [0.0], [-1.0])  # 30 nats: a whole response is left in peace
    assert max(slopes("topr", gone)) < 1e-8
    assert min(slopes("topr", gone, topr_ratio="token")) > 0.9


@pytest.mark.parametrize(
    ("ratio", "positive", "negative"),
    [(1, 1, 1), (0.5, 1.1204, 0.3398), (2, 0.1991, 1.0827), (2 / 3, 1.2081, None),
     (1.5, None, 1.2416)],
)  # fmt: skip
def test_vespo_weight(ratio, positive, negative):
    half = [math.log(ratio) / 2] * 2  # W is a product over tokens
    for advantage, weight in ((1.0, positive), (-1.0, negative)):
        if weight is not None:
            x = inputs([half], [1.0], [advantage])
            assert slopes("vespo", x) == pytest.approx([-advantage * weight] * 2, abs=6e-5)
            assert call("vespo", x)[2]["weight"].tolist() == pytest.approx([weight, 1], abs=6e-5)


def test_vespo_dies_some_nats_away():
    for total in (-5.0, 2.5):
        for advantage in (1.0, -1.0):
            assert abs(slopes("vespo", inputs([[total]], [1.0], [advantage]))[0]) < 1e-3
    # W is held at 1e-8, and A = 0 has the weight of A > 0, as in the sources.
    gone = slopes("vespo", inputs([[-100.0]], [1.0], [1.0]))
    assert gone == pytest.approx([-math.exp(3) * 1e-16], rel=1e-6)
    assert call("vespo", one(2, 0))[2]["weight"][0].item() == pytest.approx(0.1991, abs=6e-5)


def test_one_class_alone():
    x = inputs([[0.0, 0.1], [0.0], [-0.1]], [1.0, 0.0, 0.0], [9.0, 9.0, 9.0])  # A is not looked at
    assert slopes("psr", x) == pytest.approx([-1, -math.exp(0.1), 0, 0])
    assert slopes("nsr", x) == pytest.approx([0, 0, 1, math.exp(-0.1)])
    both = slopes("weighted_reinforce", x, positive_weight=1.0)
    assert both == pytest.approx([-1, -math.exp(0.1), 1, math.exp(-0.1)])
    assert slopes("weighted_reinforce", x) == pytest.approx([-0.1, -0.1 * math.exp(0.1), *both[2:]])
    assert slopes("weighted_reinforce", x, positive_weight=0.0) == slopes("nsr", x)
    no_clip = {"clip_low": 1.0, "clip_high": 1e9}
    level = inputs([[0.0, 0.0], [0.0]], [1.0, 0.0])
    sft, _ = stage1_extreme.sft_loss(level)
    (expected,) = torch.autograd.grad(sft, level.policy_logprobs)
    assert slopes("psr", level, **no_clip) == expected[level.response_mask].tolist()


@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
def test_nft_is_dr_grpo_at_ratio_one(p):
    assert slopes("nft", one(1, 1, means=p)) == pytest.approx([-(1 - p)])
    assert slopes("nft", one(1, -1, means=p)) == pytest.approx([p])


def test_nft_values():
    p = 0.25
    value, grad, metrics = call("nft", one(0.5, -1, means=p))
    assert value == pytest.approx(-0.75 * math.log(0.875 / 0.75))
    assert grad[1].item() == pytest.approx(0.75 * 0.125 / 0.875)
    assert metrics["held_share"].tolist() == [0, 1]
    value, grad, metrics = call("nft", one(2, -1, means=p))  # held: value 0, slope p r, no pole
    assert value == pytest.approx(0)
    assert grad[1].item() == pytest.approx(0.5)
    assert metrics["held_share"].tolist() == [1, 1]
    assert call("nft", one(2, 1, means=p))[0] == pytest.approx(-0.75 * math.log(2))
    assert slopes("nft", one(0.5, -1, means=p), nft_negative_weight=0.0) == [0]  # RFT
    for extreme in (0.0, 1.0):  # left out, not clamped
        assert slopes("nft", one(0.5, 1, means=extreme)) == [0]
    assert slopes("nft", one(1, -1, means=0.999)) == pytest.approx([0.98])  # clamped


# --------------------------------------------------------------------------------------------------
# BAPO


def searched(x, target):
    """The authors' search, on one batch: raise the lower bound, then the upper."""
    ratio = x.log_ratio.exp().tolist()
    advantages = [x.advantages[s].item() for s in x.sequence_ids.tolist()]
    tokens = [(r, a) for r, a, m in zip(ratio, advantages, x.response_mask.tolist(), strict=True)
              if m]  # fmt: skip

    def balance():
        right = sum(min(r, high) * a for r, a in tokens if a > 0)
        return right / (-sum(max(r, low) * a for r, a in tokens if a < 0) + 1e-8)

    low, high = 0.6, 1.2
    while balance() < target and low < 0.8 - 1e-9:
        low = min(low + 0.05, 0.8)
    while balance() < target and high < 2 - 1e-9:
        high = min(high + 0.05, 2.0)
    return low, high


def batch(seed):
    """Random responses; right ones have been pushed up, so that the upper bound decides."""
    generator = torch.Generator().manual_seed(seed)
    rows, advantages = [], []
    for s in range(6):
        advantages.append(1.0 if s % 2 else -1.0)
        shift = torch.rand(1, generator=generator).item() * advantages[-1]
        rows.append((torch.randn(4, generator=generator) * 0.4 + shift).tolist())
    return inputs(rows, [float(a > 0) for a in advantages], advantages)


def means_of(metrics):
    """What the loop makes of them."""
    return common.mean_metrics(metrics, common.Ranks(0, 1, CPU)) if metrics else {}


def test_bapo_takes_the_bounds_that_the_search_finds():
    found = set()
    for seed in range(60):
        x, target = batch(seed), 0.8 + 0.02 * seed
        previous = means_of(call("bapo", x)[2])
        metrics = call("bapo", x, previous=previous, bapo_target=target)[2]
        bounds = means_of(metrics)["bapo_low"], means_of(metrics)["bapo_high"]
        assert bounds == pytest.approx(searched(x, target))
        found.add(round(bounds[1], 2))
    assert {1.2, 2.0} < found  # at once, never, and between


def test_bapo_bounds():
    assert len(BAPO_BOUNDS) == 21
    assert BAPO_BOUNDS[0] == (0.6, 1.2)
    assert BAPO_BOUNDS[4] == (0.8, 1.2)
    assert BAPO_BOUNDS[-1] == pytest.approx((0.8, 2.0))
    start = call("bapo", batch(0))[2]  # nothing measured yet
    assert (start["bapo_low"].tolist(), start["bapo_high"].tolist()) == (
        pytest.approx([0.6, 1]), pytest.approx([1.2, 1])
    )  # fmt: skip
    none_wrong = means_of(call("bapo", one(1, 1))[2])
    assert math.isnan(none_wrong["bapo_balance_00"])
    assert call("bapo", batch(0), previous=none_wrong)[2]["bapo_low"][0] == pytest.approx(0.6)


def test_bapo_balance_is_one_at_the_start_and_length_moves_it():
    rewards, index = torch.tensor([1.0, 0, 0, 0]).double(), torch.zeros(4, dtype=torch.int32)
    advantages = stage1_extreme.group_statistics(rewards, index, 0.05)[0].tolist()
    level = inputs([[0.0] * 3] * 4, rewards.tolist(), advantages)
    assert means_of(call("bapo", level)[2])["bapo_balance_00"] == pytest.approx(1)
    longer = inputs([[0.0] * 3] + [[0.0] * 5] * 3, rewards.tolist(), advantages)
    assert means_of(call("bapo", longer)[2])["bapo_balance_00"] == pytest.approx(0.6)


def test_bapo_lower_bound_moves_the_balance_the_wrong_way():
    """A trap of its source: max(r, low) grows with low, and so do the wrong tokens."""
    values = means_of(call("bapo", mixed_inputs())[2])
    balances = [values[name] for name in objectives.BAPO_SEARCH]
    assert balances[:5] == sorted(balances[:5], reverse=True) and balances[0] > balances[4]
    assert balances[4:] == sorted(balances[4:]) and balances[4] < balances[-1]


@pytest.mark.parametrize(("ratio", "loss", "slope"), [(2, 2, 2), (4, 3, 0)])
def test_bapo_dual_clip(ratio, loss, slope):
    value, grad, _ = call("bapo", one(ratio, -1))
    assert value == pytest.approx(loss)
    assert grad[1].item() == pytest.approx(slope)


def test_bapo_searched_in_a_micro_batch_would_depend_on_it():
    x = batch(1)
    whole = means_of(call("bapo", x)[2])
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        tokens = (x.sequence_ids >= part.start) & (x.sequence_ids < part.stop)
        halves.append(LossInputs(
            x.policy_logprobs[tokens].detach().requires_grad_(), x.behavior_logprobs[tokens],
            x.response_mask[tokens], x.sequence_ids[tokens] - part.start,
            *(v[part] for v in (x.rewards, x.advantages, x.soft_values, x.group_means)),
            x.entropy[tokens],
        ))  # fmt: skip
    metrics = [call("bapo", half)[2] for half in halves]
    summed = {name: metrics[0][name] + metrics[1][name] for name in metrics[0]}
    assert means_of(summed) == pytest.approx(whole, rel=1e-6)
    bounds = [searched(half, 1.3) for half in (*halves, x)]
    assert len(set(bounds)) > 1


# --------------------------------------------------------------------------------------------------
# Limits


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_policy_limit(variant):
    """At r = 1 the gradient of REINFORCE, with the advantage that is each objective's own."""
    name, changes = VARIANTS[variant]
    changes = {"dr_grpo_length": 1} | changes
    x = inputs([[0.0] * 3, [0.0] * 5], [1.0, 0.0], [1.5, -0.5], means=0.25)
    own = {"topr": (1, -1), "psr": (1, 0), "nsr": (0, -1), "weighted_reinforce": (0.1, -1),
           "nft": (0.75, -0.25)}  # fmt: skip
    right, wrong = own.get(name, (1.5, -0.5))
    n = (3, 5) if name == "gspo" else (1, 1)
    expected = [-right / n[0]] * 3 + [-wrong / n[1]] * 5
    assert slopes(name, x, **changes) == pytest.approx(expected)


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("verdict", [0.0, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_that_agree(name, verdict, change):
    """Nothing is learnt from all-correct and all-wrong groups, but by those that ask no group; and
    by them neither where p (1 - p) is the weight."""
    x = inputs([[0.1, -0.1], [0.2]], [verdict] * 2, [0.0, 0.0], means=verdict)
    learns = {"topr": (True, True), "psr": (False, True), "nsr": (True, False),
              "weighted_reinforce": (True, True)}  # fmt: skip
    expected = learns.get(name, (False, False))[int(verdict)] and change not in ("paced", "all")
    grad = call(name, x, options=True, **CHANGES.get(change, {}))[1]
    assert grad.any() == expected
    assert grad.isfinite().all()


@pytest.mark.parametrize("extreme", [1e4, -1e4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_log_ratios_stay_finite(variant, extreme):
    name, changes = VARIANTS[variant]
    wide = mixed_inputs()
    fields = {k: v.detach().float() if v.is_floating_point() else v for k, v in vars(wide).items()}
    shifted = "policy_logprobs" if extreme < 0 else "behavior_logprobs"
    fields[shifted] = fields[shifted] - abs(extreme) * wide.response_mask
    fields["policy_logprobs"].requires_grad_()
    for flags in (changes, changes | CHANGES["all"]):
        value, grad, metrics = call(name, LossInputs(**fields), options=True, **flags)
        assert math.isfinite(value)
        assert grad.isfinite().all()
        assert all(v.isfinite().all() for v in metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_tokens_do_not_count(variant):
    name, changes = VARIANTS[variant]
    rows, rewards, advantages = [[0.3, -0.2, 0.1], [-0.4]], [1.0, 0.0], [1.0, -1.0]
    for flags in (changes, *(changes | change for change in CHANGES.values())):
        few, many = (inputs(rows, rewards, advantages, prompt=n) for n in (1, 9))
        results = []
        for x in (few, many):
            entropy = torch.rand(4, generator=torch.Generator().manual_seed(0)).double()
            entropy = x.entropy.masked_scatter(x.response_mask, entropy)
            x = dataclasses.replace(x, entropy=entropy)
            value, grad, _ = call(name, x, options=True, **flags)
            assert (grad[~x.response_mask] == 0).all()
            results.append((value, *grad[x.response_mask].tolist()))
        assert results[0] == pytest.approx(results[1], abs=1e-12)


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_inputs_are_left_unchanged(name, change):
    x = mixed_inputs()
    before = {field: value.detach().clone() for field, value in vars(x).items()}
    call(name, x, options=True, **CHANGES.get(change, {}))
    assert all(torch.equal(before[field], value) for field, value in vars(x).items())


# --------------------------------------------------------------------------------------------------
# Options


def test_options_are_off_by_default():
    x = mixed_inputs()
    assert all(option(x, **SETTINGS) is x for option in OPTIONS)


def test_advantages_without_deviation():
    x = mixed_inputs()
    changed = objectives.choose_advantages(x, advantages="group_mean", unlearn=False)
    assert changed.advantages.tolist() == pytest.approx([0.75, -0.25, -0.4, 0.4, 0.0])
    assert objectives.choose_advantages(x, advantages="group_mean", unlearn=True) is x


@pytest.mark.parametrize(
    ("p", "exponents", "weight"),
    [(0.5, (1, 1), 0.25), (0, (1, 1), 0), (1, (1, 1), 0), (1 / 16, (1, 1), 0.0586),
     (0.25, (2, 1), 0.046875), (0.25, (0, 1), 0.75)],
)  # fmt: skip
def test_pass_rate_weights(p, exponents, weight):
    x = one(1, 1, means=p)
    assert call("reinforce", x, options=True, paced=exponents)[1][1].item() == pytest.approx(
        -weight, abs=5e-5
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_multiply_the_gradient_and_leave_the_value(name):
    x = mixed_inputs()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    value, grad, _ = call(name, x)
    loss, _ = OBJECTIVES[name][0](objectives.weigh_responses(x, weights), **SETTINGS)
    assert loss.item() == value
    (weighted,) = torch.autograd.grad(loss, x.policy_logprobs)
    assert torch.allclose(weighted, grad * weights[x.sequence_ids], atol=1e-14)


@pytest.mark.parametrize("name", ["reinforce", "dapo", "gspo", "cispo", "bapo", "vespo"])
def test_weights_are_those_of_advantages_where_the_objective_is_linear(name):
    x = mixed_inputs()
    weights = torch.tensor([0.5, 2.0, 0.3, 1.0, 3.0], dtype=torch.float64)
    loss, _ = OBJECTIVES[name][0](objectives.weigh_responses(x, weights), **SETTINGS)
    by_advantage = dataclasses.replace(x, advantages=x.advantages * weights)
    expected = call(name, by_advantage)[1]
    assert torch.allclose(torch.autograd.grad(loss, x.policy_logprobs)[0], expected, atol=1e-14)


def test_confident_errors_weigh_more():
    x = inputs([[1.0, 1.0], [1.0, 1.0], [-3.0, -3.0]], [1.0, 0.0, 0.0], [1.0, -1.0, -1.0])
    found = call("reinforce", x, options=True, ace_alpha=0.5)[1][x.response_mask].tolist()
    confident, timid = 1 + 0.5 * math.log1p(math.exp(2)), 1 + 0.5 * math.log1p(math.exp(-6))
    assert found == pytest.approx([-1, -1, confident, confident, timid, timid])


def test_ace_shift_carries_no_gradient():
    x = inputs([[1.0]], [0.0], [-1.0])
    found = call("nsr", x, options=True, ace_alpha=1.0)[1][1].item()
    assert found == pytest.approx(math.e * (1 + math.log1p(math.e)))


def test_top_tokens_go_by_response():
    x = inputs([[0.0] * 5, [0.0] * 2, [0.0] * 10], [1.0, 0.0, 1.0], prompt=2)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(len(x.sequence_ids), generator=generator).double()
    values[0] = 9.0  # a prompt token is never among them
    for fraction in (0.0, 0.2, 0.5, 1.0):
        found = top_tokens(x, values, fraction)
        for s in range(3):
            tokens = ((x.sequence_ids == s) & x.response_mask).nonzero()[:, 0].tolist()
            ranked = sorted(tokens, key=lambda t: -values[t])[: int(fraction * len(tokens))]
            chosen = (found & (x.sequence_ids == s)).nonzero()[:, 0].tolist()
            assert sorted(ranked) == chosen
    ties = top_tokens(x, torch.ones_like(values), 0.4)
    assert ties.nonzero()[:, 0].tolist() == [2, 3, 13, 14, 15, 16]
    assert not top_tokens(x, torch.zeros_like(values), 1.0).any()  # at r = 1 no token is far


def test_left_out_tokens_are_as_if_they_were_prompt():
    """mask_entropy and mask_kl on hand-made values: the rest keeps its loss; S and means forget."""
    x = inputs([[0.5, -0.2, 0.1, 0.3, -2.0]], [0.0], [-1.0])
    entropy = torch.tensor([0, 0.1, 0.9, 0.2, 0.3, 0.4], dtype=torch.float64)
    x = dataclasses.replace(x, entropy=entropy)
    masks = {"mask_entropy": 0.2, "mask_kl": 0.2}  # tokens 2 (entropy) and 5 (r = 0.14)
    found = call("topr", x, options=True, **masks)[1].tolist()
    assert found == pytest.approx([0, 1, 0, 1, 1, 0])  # S = 0.9: the weight is 1
    changed = objectives.mask_tokens(x, **masks)
    assert changed.per_response(changed.log_ratio).item() == pytest.approx(0.9)
    assert changed.mean_over_tokens(changed.log_ratio).item() == pytest.approx(0.3)
    none = leave_out(x, x.response_mask)
    assert call("gspo", dataclasses.replace(none, policy_logprobs=x.policy_logprobs * 0))[0] == 1
    for name in OBJECTIVES:
        assert not call(name, x, options=True, mask_entropy=1.0)[1].any()


def test_the_furthest_token_is_that_of_the_reverse_kl():
    """r log r - r + 1 is 1 at a log-ratio of +1 and 0.48 at -1.6; by the forward KL, r - 1 - log r,
    or by its size the second would be further."""
    x = inputs([[1.0, -1.6]], [0.0], [-1.0], prompt=1)
    kept = objectives.mask_tokens(x, mask_entropy=0.0, mask_kl=0.5).response_mask
    assert kept.tolist() == [False, False, True]


def test_rare_tokens_of_wrong_responses_are_spared():
    policy = [math.log(v) for v in (0.01, 0.02, 0.05, 0.1, 0.5)]
    x = inputs([[0.0] * 5, [0.0] * 5], [0.0, 1.0], [-1.0, 1.0], prompt=0)
    x = with_policy(x, torch.tensor(policy * 2, dtype=torch.float64, requires_grad=True))
    found = call("reinforce", x, options=True, spare_ceiling=0.1)[1].tolist()
    # 0.02 itself may fall on either side of the floor by rounding; it is not looked at.
    assert [found[0], *found[2:5]] == [1, 0, 1, 1]
    assert found[5:] == [-1] * 5


# --------------------------------------------------------------------------------------------------
# Through the model: prompts, micro-batches


def loop_inputs(policy, behavior, targets, rollouts, members):
    """What the loop of stage1_extreme.py passes, for one packed row."""
    row = common.make_row(rollouts, members, CPU)
    logprobs, entropy = common.row_logprobs(policy, row, 1.0)
    rewards, advantages, means, soft_values = targets
    return LossInputs(
        logprobs, behavior[row.flat] * row.response_mask, row.response_mask, row.sequence_ids,
        *(v[row.sequences] for v in (rewards, advantages, soft_values, means)), entropy,
    )  # fmt: skip


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_do_not_change_it(name, change, policy, other_policy, rollouts, ranks):
    flags = {"gspo_clip_low": 0.1, "gspo_clip_high": 0.1} | CHANGES.get(change, {})
    args = stage1.Args(**REQUIRED, loss=name, **flags)
    targets = stage1_extreme.training_targets(args, rollouts)
    # Near the policy: the weights of topr and vespo are then not all nought.
    own = common.score(policy.requires_grad_(False), rollouts, 1.0, 10**6, ranks, "")
    behavior = 0.97 * own + 0.03 * common.score(other_policy, rollouts, 1.0, 10**6, ranks, "")
    policy.requires_grad_(True)
    lens, rewards = rollouts.response_lens, targets[0]
    count = {"responses": len(rewards), "tokens": int(lens.sum()),
             "positive_tokens": int((lens * rewards).sum()),
             "negative_tokens": int((lens * (1 - rewards)).sum())}  # fmt: skip
    loss, unit = stage1.LOSSES[name]
    seen = []

    def losses(rows):
        for members in rows:
            x = loop_inputs(policy, behavior, targets, rollouts, members)
            value, metrics = loss(x, previous={}, **vars(args))
            seen.append(metrics)
            yield value / count[unit]

    one_row, many, idle = layouts(rollouts)
    whole = accumulate(policy, losses(one_row))
    at_once = means_of(seen.pop())
    scale = 1e3 if name == "dr_grpo" else 1  # its divisor is 1024 tokens
    whole, split = (
        (total * scale, [g * scale for g in grads])
        for total, grads in (whole, accumulate(policy, losses(many)))
    )
    assert_same(whole, split)
    summed = {key: sum(metrics[key] for metrics in seen) for key in seen[0]}
    assert means_of(summed) == pytest.approx(at_once, rel=1e-4, abs=1e-6, nan_ok=True)
    for a, b in zip(accumulate(policy, losses(idle))[1], split[1], strict=True):
        assert torch.equal(a * scale, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prompt_tokens_of_a_model_get_exactly_zero_gradient(name, policy, rollouts):
    targets = [torch.rand(len(rollouts.rewards), generator=torch.Generator().manual_seed(i))
               for i in range(4)]  # fmt: skip
    targets[0] = rollouts.rewards
    behavior = torch.full((len(rollouts.tokens),), -1.0)
    x = loop_inputs(policy, behavior, targets, rollouts, [0, 8, 9])
    x.policy_logprobs.retain_grad()
    stage1.LOSSES[name][0](x, **(SETTINGS | CHANGES["all"]))[0].backward()
    assert (x.policy_logprobs.grad[~x.response_mask] == 0).all()


# --------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def family_losses(monkeypatch):
    """Puts stage1_extreme's own dict back after the test."""
    monkeypatch.setattr(stage1_extreme, "LOSSES", stage1_extreme.LOSSES)


def run_args(output, **changes):
    folder = tiny.setting()
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 0,
                "micro_batch_tokens": 256, "save_at": (2.0,)}  # fmt: skip
    return stage1.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output, **settings | changes
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_run(name, tmp_path, family_losses):
    """Four steps on the tiny setting, at a rate at which right and wrong responses come apart. nsr
    and weighted_reinforce push a barely trained base down as a whole; gspo clips after one step."""
    stage1.main(run_args(tmp_path / "run", loss=name))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in found)
    assert (tmp_path / "run" / "config.json").is_file()
    first, last = found[0], found[-1]
    if name in ("psr", "nsr"):  # each token's share of its class is 1 at the start
        assert first["loss"] == pytest.approx({"psr": -1, "nsr": 1}[name], rel=1e-4)
    if name in ("nsr", "weighted_reinforce"):
        assert last["log_ratio_wrong"] < -1
    elif name == "gspo":
        assert (first["clip_share"], last["clip_share"] > 0.2) == (0, True)
    else:
        assert last["log_ratio_correct"] > last["log_ratio_wrong"]


def test_run_with_all_options(tmp_path, family_losses):
    stage1.main(run_args(tmp_path / "plain", loss="cispo"))
    few = {"epochs": 1, "save_at": (1.0,)}
    stage1.main(run_args(tmp_path / "masked", loss="cispo", mask_entropy=0.5, **few))
    stage1.main(run_args(tmp_path / "run", loss="cispo", **CHANGES["all"]))
    plain, masked, changed = (rows(tmp_path / name) for name in ("plain", "masked", "run"))
    assert masked[0]["grad_norm"] != plain[0]["grad_norm"]  # the loop passes entropies on
    assert masked[0]["entropy"] == plain[0]["entropy"]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in changed)
    assert changed[0]["grad_norm"] < plain[0]["grad_norm"]


def test_stage_1_objectives_run_unchanged_here(tmp_path, family_losses):
    """The widened script is stage 1 where nothing new is asked for: the same bits."""
    plain = {f.name: getattr(run_args(tmp_path / "plain", loss="grpo"), f.name)
             for f in dataclasses.fields(stage1_extreme.Args)}  # fmt: skip
    stage1_extreme.main(stage1_extreme.Args(**plain))
    stage1.main(run_args(tmp_path / "family", loss="grpo"))
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "family" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_bapo_resumes_with_the_same_bits(tmp_path, family_losses, monkeypatch):
    """Its bounds come from the step before, so a checkpoint must hold that step's metrics."""
    flags = {"loss": "bapo", "epochs": 3, "save_at": (3.0,), "checkpoint_every": 1}
    stage1.main(run_args(tmp_path / "whole", **flags))
    save = stage1_extreme.save_checkpoint

    def save_and_die(output, state, *rest):
        save(output, state, *rest)
        if state["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage1_extreme, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage1.main(run_args(tmp_path / "again", **flags))
    monkeypatch.setattr(stage1_extreme, "save_checkpoint", save)
    stage1.main(run_args(tmp_path / "again", **flags))
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    highs = {row["bapo_high"] for row in rows(tmp_path / "whole")}
    assert len(highs) > 1  # they did move


def test_two_ranks_are_one(tmp_path, family_losses):
    """torchrun, with the objective that looks at a whole batch; to float32 accuracy."""
    flags = {"loss": "bapo", "epochs": 2}
    stage1.main(run_args(tmp_path / "one", **flags))
    args = run_args(tmp_path / "two", **flags)
    script = Path(stage1.__file__)
    words = [w for f in ("base", "rollouts", "output", "loss", "epochs", "batch_size", "save_at",
                         "learning_rate", "warmup_steps", "micro_batch_tokens")
             for w in (f"--{f.replace('_', '-')}", str(getattr(args, f)).strip("(),"))]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), *words], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=2e-4)
    assert one[-1]["bapo_high"] > 1.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "psr", "unlearn": True}, ("--unlearn", "psr", "nsr")),
        ({"loss": "nft", "unlearn": True}, ("--unlearn", "nft", "nsr")),
        ({"paced": (1.0, 1.0), "unlearn": True}, ("--paced", "--unlearn")),
        ({"cispo_high": 0.0}, ("--cispo-high 0.0", "above 0")),
        ({"ace_alpha": -1.0}, ("--ace-alpha -1.0", "0 or more")),
        ({"mask_kl": 1.5}, ("--mask-kl 1.5", "between 0 and 1")),
        ({"paced": (-1.0, 1.0)}, ("--paced (-1.0, 1.0)", "0 or more")),
        ({"paced": (1.0, math.nan)}, ("--paced (1.0, nan)", "0 or more")),
        ({"vespo_negative": (math.inf, 1.0)}, ("--vespo-negative (inf, 1.0)", "0 or more")),
        ({"ace_alpha": math.inf}, ("--ace-alpha inf", "finite")),
        ({"cispo_low": 6.0}, ("--cispo-high 5.0", "--cispo-low 6")),
        ({"spare_ceiling": 0.01}, ("--spare-ceiling 0.01", "--spare-floor 0.02")),
        ({"beta": 0.0}, ("--beta 0.0", "above 0")),  # stage 1's own checks run too
    ],
)
def test_impossible_flags(changes, words):
    with pytest.raises(common.UserError) as error:
        stage1.Args(**REQUIRED, **changes).check()
    assert all(word in str(error.value) for word in words)


def test_everything_is_tested_here():
    assert {name for name, _ in VARIANTS.values()} == set(OBJECTIVES)
    assert set(STATED) == set(VARIANTS)
    loss = typing.get_args(typing.get_type_hints(stage1.Args)["loss"])
    assert set(stage1.LOSSES) == set(stage1_extreme.LOSSES) | set(OBJECTIVES)
    assert set(loss) == set(stage1.LOSSES)
    flags = {f.name for f in dataclasses.fields(stage1.Args)}
    assert set().union(*CHANGES.values()) <= flags


def test_every_metric_is_documented():
    page = (Path(__file__).resolve().parents[1] / "docs" / "family.md").read_text()
    section = page.split("### Metrics of the objectives\n", 1)[1].split("\n#", 1)[0]
    heads = re.findall(r"^- (`[^`]+`(?:(?:, | to )`[^`]+`)*)", section, re.MULTILINE)
    written = {key for head in heads for key in re.findall(r"`([^`]+)`", head)}
    found = {key for name in OBJECTIVES for key in call(name, mixed_inputs())[2]}
    assert {"bapo_balance_00", "bapo_balance_20"} <= written
    assert written == found - {n for n in objectives.BAPO_SEARCH if n not in written}
    rows = {row.split("`")[1] for row in page.splitlines() if row.startswith("| `")}
    assert set(OBJECTIVES) <= rows
