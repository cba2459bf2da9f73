"""Stage 1: every objective against closed-form values and gradients."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import common
import stage1_extreme
from stage1_extreme import Args, LossInputs, diagnostics, group_statistics

SETTINGS = vars(Args(base="b", rollouts=Path("r"), output=Path("o")))
VARIANTS = {
    "ce": ("ce", {}),
    "ce_prior": ("ce", {"ce_prior": True}),
    "mse_verdict": ("mse", {"mse_target": "verdict"}),
    "mse_centred": ("mse", {"mse_target": "centred"}),
    "mse_soft_value": ("mse", {"mse_target": "soft_value"}),
    "mse_unlearn": ("mse", {"unlearn": True}),
    "sapo": ("sapo", {}),
    "grpo": ("grpo", {}),
    "sft": ("sft", {}),
}


def call(name, x, **changes):
    """The objective with the script's defaults, changed where asked."""
    return stage1_extreme.LOSSES[name][0](x, **(SETTINGS | changes))


def inputs(log_ratios, rewards, advantages=None, prompt=1, means=0.25, soft_values=0.3):
    """One response per list of log-ratios, each behind `prompt` masked tokens, float64."""
    behavior, policy, mask, ids = [], [], [], []
    for s, values in enumerate(log_ratios):
        old = [-0.5 - 0.1 * t for t in range(len(values))]
        behavior += [0.0] * prompt + old
        policy += [0.0] * prompt + [b + d for b, d in zip(old, values, strict=True)]
        mask += [False] * prompt + [True] * len(values)
        ids += [s] * (prompt + len(values))
    n = len(log_ratios)
    double = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    return LossInputs(
        double(policy).requires_grad_(), double(behavior), torch.tensor(mask), torch.tensor(ids),
        double(rewards), double(advantages or [0.0] * n), double([soft_values] * n),
        double([means] * n), torch.zeros(len(mask)).double(),
    )  # fmt: skip


def gradient(name, x, **changes):
    """d loss / d policy_logprobs: all tokens, and those of the responses."""
    loss, _ = call(name, x, **changes)
    (grad,) = torch.autograd.grad(loss, x.policy_logprobs)
    return loss.item(), grad, grad[x.response_mask]


# --------------------------------------------------------------------------------------------------
# Binary cross-entropy on beta S


@pytest.mark.parametrize(
    ("total", "reward", "loss", "slope"),
    [
        (0, 1, 0.693147, -0.025), (0, 0, 0.693147, 0.025), (20, 1, 0.313262, -0.013447),
        (20, 0, 1.313262, 0.036553), (100, 1, 0.006715, -0.05 * 0.0066929),
        (100, 0, 5.006715, 0.05 * 0.9933071),
    ],
)  # fmt: skip
def test_ce_value_and_gradient(total, reward, loss, slope):
    x = inputs([[total / 4] * 4], [float(reward)])
    value, _, grad = gradient("ce", x, beta=0.05)
    assert value == pytest.approx(loss, abs=1e-6)
    assert grad.tolist() == pytest.approx([slope] * 4, abs=1e-6)  # the same for every token


def test_ce_sums_over_tokens_and_never_averages():
    short, long = inputs([[1.0]], [1.0]), inputs([[1.0] * 8], [1.0])
    assert call("ce", short)[0].item() == pytest.approx(math.log1p(math.exp(-0.05)))
    assert call("ce", long)[0].item() == pytest.approx(math.log1p(math.exp(-0.4)))


def test_ce_prior_adds_the_logit_of_the_pass_rate():
    x = inputs([[2.0, 2.0]], [1.0], means=0.25)
    z = 0.05 * 4 + math.log(0.25 / 0.75)
    value, _, grad = gradient("ce", x, ce_prior=True)
    assert value == pytest.approx(math.log1p(math.exp(-z)))
    assert grad.tolist() == pytest.approx([0.05 * (1 / (1 + math.exp(-z)) - 1)] * 2)
    for mean in (0.0, 1.0):  # a problem that all or none solve: finite
        assert math.isfinite(gradient("ce", inputs([[0.0]], [mean], means=mean), ce_prior=True)[0])


def test_ce_counts_what_it_classifies_right():
    x = inputs([[1.0], [-1.0], [1.0], [-1.0]], [1.0, 1.0, 0.0, 0.0])
    assert call("ce", x)[1]["classified"].tolist() == [2, 4]


# --------------------------------------------------------------------------------------------------
# Squared error of beta S


@pytest.mark.parametrize(
    ("total", "reward", "loss", "slope"),
    [(0, 1, 1, -0.1), (10, 1, 0.25, -0.05), (20, 1, 0, 0), (0, 0, 0, 0), (10, 0, 0.25, 0.05),
     (20, 0, 1, 0.1)],
)  # fmt: skip
def test_mse_verdict_value_and_gradient(total, reward, loss, slope):
    x = inputs([[total / 2] * 2], [float(reward)])
    value, _, grad = gradient("mse", x, beta=0.05, mse_target="verdict")
    assert value == pytest.approx(loss)
    assert grad.tolist() == pytest.approx([slope] * 2)


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [("verdict", 20.0, 0.0), ("centred", 15.0, -5.0), ("soft_value", 1.386, -18.614)],
)
def test_mse_is_zero_at_the_log_ratio_its_target_asks_for(target, right, wrong):
    rewards, index = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int32)
    _, means, soft_values = group_statistics(rewards, index, 0.05)
    for total, reward in ((right, 1.0), (wrong, 0.0)):
        x = inputs([[total]], [reward], means=means[0].item(), soft_values=soft_values[0].item())
        value, _, grad = gradient("mse", x, beta=0.05, mse_target=target)
        assert value == pytest.approx(0, abs=1e-8)
        assert grad.item() == pytest.approx(0, abs=1e-5)


def test_soft_value_target_is_a_distribution():
    """E_base exp(S) = 1 at the minimum, for any pass rate: only this target can be met."""
    for correct in (1, 3, 7):
        rewards = torch.tensor([1.0] * correct + [0.0] * (8 - correct))
        _, _, soft_values = group_statistics(rewards, torch.zeros(8, dtype=torch.int32), 0.5)
        total = (rewards - soft_values) / 0.5
        assert total.exp().mean().item() == pytest.approx(1, abs=1e-5)


def test_mse_unlearn_asks_every_response_down():
    x = inputs([[-10.0, -10.0], [0.0, 0.0]], [1.0, 0.0])
    value, _, grad = gradient("mse", x, beta=0.05, unlearn=True)
    assert value == pytest.approx(1.0)  # the first is at S = -20 = -1/beta, the second at 0
    assert grad.tolist() == pytest.approx([0, 0, 0.1, 0.1])


def test_mse_gradient_at_the_start_is_reinforce_times_two_beta():
    x = inputs([[0.0, 0.0], [0.0]], [1.0, 0.0], means=0.25)
    _, _, grad = gradient("mse", x, beta=0.05, mse_target="centred")
    assert grad.tolist() == pytest.approx([-0.1 * 0.75, -0.1 * 0.75, 0.1 * 0.25])


# --------------------------------------------------------------------------------------------------
# Ratio objectives


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [(0.01, 0.0079), (0.5, 0.47), (1, 1), (1.2, 1.1881), (2, 1.5729), (3, 1.2599), (5, 0.3533),
     (2.06, 1.5747)],
)  # fmt: skip
def test_sapo_weight_of_a_correct_token(ratio, weight):
    value, _, grad = gradient("sapo", inputs([[math.log(ratio)]], [1.0], [1.0]))
    assert -grad.item() == pytest.approx(weight, abs=6e-5)
    assert -value == pytest.approx(4 / (1 + math.exp(1 - ratio)))


def test_sapo_wrong_tokens_have_their_own_temperature():
    value, _, grad = gradient("sapo", inputs([[0.0]], [0.0], [-1.0]))
    assert value == pytest.approx(1.904762, abs=1e-5)  # f(1) = 2 / 1.05
    assert grad.item() == pytest.approx(1, abs=1e-6)
    _, _, peak = gradient("sapo", inputs([[math.log(1.992)]], [0.0], [-1.0]))
    assert peak.item() == pytest.approx(1.5363, abs=6e-5)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1, 0.5, -0.5, -0.5), (1, 1, -1, -1), (1, 1.25, -1.25, -1.25), (1, 1.35, -1.28, 0),
     (-1, 0.5, 0.8, 0), (-1, 1, 1, 1), (-1, 1.35, 1.35, 1.35), (-1, 4, 4, 4)],
)  # fmt: skip
def test_grpo_clips_only_where_it_would_go_further(advantage, ratio, loss, slope):
    x = inputs([[math.log(ratio)]], [1.0], [float(advantage)])
    value, _, grad = gradient("grpo", x, clip_low=0.2, clip_high=0.28)
    assert value == pytest.approx(loss)
    assert grad.item() == pytest.approx(slope)
    share = call("grpo", x)[1]["clip_share"].tolist()
    assert share == [int(slope == 0), 1]  # the prompt token is not counted


@pytest.mark.parametrize("name", ["sapo", "grpo"])
def test_gradient_is_minus_advantage_at_ratio_one(name):
    """On-policy, every token of a response of length L gets -A / L."""
    x = inputs([[0.0] * 3, [0.0] * 5], [1.0, 0.0], [1.5, -0.5])
    _, _, grad = gradient(name, x)
    assert grad.tolist() == pytest.approx([-1.5 / 3] * 3 + [0.5 / 5] * 5, abs=1e-6)


def test_token_mean_inside_response_mean():
    """Lengths 1 and 3, per-token losses 1 and 0: mean of per-response means is a half."""
    x = inputs([[0.0], [0.0] * 3], [0.0, 1.0], [-1.0, 0.0])
    assert call("grpo", x)[0].item() / 2 == pytest.approx(0.5)


def test_sft_trains_on_positives_only():
    x = inputs([[0.0, 0.3], [0.1, 0.2]], [1.0, 0.0])
    value, _, grad = gradient("sft", x)
    assert value == pytest.approx(0.5 + 0.6 - 0.3)  # minus the sum of the first one's log-probs
    assert grad.tolist() == [-1, -1, 0, 0]


# --------------------------------------------------------------------------------------------------
# Advantages and soft values


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0] + [1.0] * 4 + [0.0] * 12)
    index = torch.tensor([0] * 4 + [1, 2, 1, 2] + [3] * 16, dtype=torch.int32)
    advantages, means, _ = group_statistics(rewards, index, 0.05)
    assert advantages[:4].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages[4:8].tolist() == pytest.approx([0.70711, 0.70711, -0.70711, -0.70711],
                                                     abs=1e-5)  # fmt: skip
    assert advantages[8].item() == pytest.approx(1.6771, abs=1e-4)
    assert advantages[-1].item() == pytest.approx(-0.5590, abs=1e-4)
    assert means.tolist() == pytest.approx([0.25] * 4 + [0.5] * 4 + [0.25] * 16)


def test_groups_that_agree_get_exactly_zero():
    for size in (1, 3, 7):  # 1/3 and 1/7 are not exact in floating point
        for verdict in (0.0, 1.0):
            rewards, index = torch.full((size,), verdict), torch.zeros(size, dtype=torch.int32)
            assert group_statistics(rewards, index, 0.05)[0].tolist() == [0.0] * size
    for name in ("sapo", "grpo"):
        assert gradient(name, inputs([[0.5, -0.5]], [1.0], [0.0]))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("correct", "value"), [(0, 0), (1, 0.4772), (2, 0.7169), (3, 0.8782), (4, 1)]
)
def test_soft_values(correct, value):
    rewards = torch.tensor([1.0] * correct + [0.0] * (4 - correct))
    index = torch.zeros(4, dtype=torch.int32)
    assert group_statistics(rewards, index, 0.5)[2].tolist() == pytest.approx([value] * 4, abs=5e-5)


def test_soft_value_limits():
    rewards, index = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int32)
    assert group_statistics(rewards, index, 1e3)[2][0].item() == pytest.approx(0.25, abs=1e-3)
    for beta in (1e-3, 1e-6):  # exp(1/beta) overflows; the limit is the best verdict
        assert group_statistics(rewards, index, beta)[2][0].item() == pytest.approx(1, abs=2e-3)
        assert group_statistics(torch.zeros(4), index, beta)[2].tolist() == [0.0] * 4


# --------------------------------------------------------------------------------------------------
# All objectives


def mixed_inputs():
    """Four responses of different lengths, both verdicts, ratios on all sides of the clip."""
    torch.manual_seed(0)
    rows = [(torch.randn(n) * 0.6).tolist() for n in (3, 5, 1, 4)]
    return inputs(rows, [1.0, 0.0, 0.0, 1.0], [1.5, -0.5, -1.0, 0.7], prompt=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    name, changes = VARIANTS[variant]
    x = mixed_inputs()

    def loss(policy_logprobs):
        return call(name, LossInputs(policy_logprobs, *list(vars(x).values())[1:]), **changes)[0]

    assert torch.autograd.gradcheck(loss, (x.policy_logprobs,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_tokens_do_not_count(variant):
    """Masked tokens are zero in the policy's and the behavior's log-probs, as row_logprobs and
    score leave them: they change no response-level sum and no mean."""
    name, changes = VARIANTS[variant]
    rows, rewards, advantages = [[0.3, -0.2, 0.1], [-0.4]], [1.0, 0.0], [1.0, -1.0]
    few = inputs(rows, rewards, advantages, prompt=1)
    many = inputs(rows, rewards, advantages, prompt=9)
    value, _, grad = gradient(name, few, **changes)
    other_value, _, other_grad = gradient(name, many, **changes)
    assert value == pytest.approx(other_value, abs=1e-12)
    assert torch.allclose(grad, other_grad, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_tokens_of_a_model_get_exactly_zero_gradient(variant, policy, rollouts):
    """Whatever an objective's gradient at a prompt token, the model sees none of it."""
    name, changes = VARIANTS[variant]
    row = common.make_row(rollouts, [0, 8, 9], torch.device("cpu"))
    logprobs, entropy = common.row_logprobs(policy, row, 1.0)
    logprobs.retain_grad()
    assert (logprobs[~row.response_mask] == 0).all()
    behavior = (logprobs.detach() - 0.1) * row.response_mask
    verdicts = [torch.tensor(v) for v in ([1.0, 0, 1], [1.0, -1, 0.5], [0.3] * 3, [0.5] * 3)]
    x = LossInputs(
        logprobs, behavior, row.response_mask, row.sequence_ids, *verdicts, entropy
    )  # fmt: skip
    loss, _ = call(name, x, **changes)
    loss.backward()
    grads = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    again = common.row_logprobs(policy, row, 1.0)[0]
    (again * (logprobs.grad * row.response_mask)).sum().backward()
    for grad, parameter in zip(grads, policy.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_log_ratios_stay_finite(variant, extreme):
    name, changes = VARIANTS[variant]
    wide = mixed_inputs()
    fields = {k: v.detach().float() if v.is_floating_point() else v for k, v in vars(wide).items()}
    shifted = "policy_logprobs" if extreme < 0 else "behavior_logprobs"  # log-probs are negative
    fields[shifted] = fields[shifted] - abs(extreme) * wide.response_mask
    fields["policy_logprobs"].requires_grad_()
    x = LossInputs(**fields)
    assert x.log_ratio[x.response_mask].abs().min() > 9e3
    loss, grad, _ = gradient(name, x, **changes)
    assert math.isfinite(loss)
    assert grad.isfinite().all()
    watched = diagnostics(x, x.rewards)
    assert all(v.isfinite().all() for v in watched.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_are_left_unchanged(variant):
    name, changes = VARIANTS[variant]
    x = mixed_inputs()
    before = {field: value.detach().clone() for field, value in vars(x).items()}
    call(name, x, **changes)[0].backward()
    diagnostics(x, x.rewards)
    assert all(torch.equal(before[field], value) for field, value in vars(x).items())


def test_group_statistics_leave_inputs_unchanged():
    rewards, index = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    before = rewards.clone(), index.clone()
    group_statistics(rewards, index, 0.05)
    assert torch.equal(rewards, before[0])
    assert torch.equal(index, before[1])


def test_what_the_loop_divides_by():
    """Responses wherever the response is the unit, and the tokens that sft learns from."""
    units = {name: unit for name, (_, unit) in stage1_extreme.LOSSES.items()}
    assert units.pop("sft") == "positive_tokens"
    assert set(units.values()) == {"responses"}


def test_every_objective_is_tested_here():
    assert {name for name, _ in VARIANTS.values()} == set(stage1_extreme.LOSSES)


# --------------------------------------------------------------------------------------------------
# Diagnostics and verdicts


def test_diagnostics_equal_brute_force():
    torch.manual_seed(1)
    # Trained on inverted verdicts; what is watched goes by the true ones: right, wrong, wrong.
    x = inputs([[0.5, -0.1], [25.0, 0.1, -0.4], [-0.9]], [0.0, 1.0, 1.0], prompt=2)
    entropy = torch.rand(len(x.behavior_logprobs), dtype=torch.float64)
    x = dataclasses.replace(x, entropy=entropy)
    watched = diagnostics(x, torch.tensor([1.0, 0.0, 0.0]))
    means = {k: (v[0] / v[1]).item() for k, v in watched.items()}
    responses = [
        [t for t in range(len(x.sequence_ids)) if x.sequence_ids[t] == s and x.response_mask[t]]
        for s in range(3)
    ]
    d = (x.policy_logprobs - x.behavior_logprobs).tolist()
    log_p = x.policy_logprobs.tolist()
    tokens = sum(responses, [])
    ratios = [math.exp(min(d[t], 20)) for t in tokens]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = {
        "ratio": mean(ratios),
        "ratio_outside_0.8_1.28": 4 / 6,
        "log_ratio_clamped": 1 / 6,
        "entropy": mean([entropy[t].item() for t in tokens]),
        "log_ratio_correct": 0.4,
        "log_ratio_wrong": (24.7 - 0.9) / 2,
        "prob_correct": math.exp(mean([log_p[t] for t in responses[0]])),
        "prob_wrong": mean([math.exp(mean([log_p[t] for t in r])) for r in responses[1:]]),
        "logprob": mean([sum(log_p[t] for t in r) for r in responses]),
        "kl_proxy": sum(r - 1 - d[t] for r, t in zip(ratios, tokens, strict=True)) / 3,
    }
    assert means == pytest.approx(expected, rel=1e-6)


def test_training_targets(rollouts):
    args = {"base": "b", "rollouts": Path("r"), "output": Path("o")}
    plain = stage1_extreme.training_targets(Args(**args), rollouts)
    inverted = stage1_extreme.training_targets(Args(**args, invert_rewards=True), rollouts)
    unlearned = stage1_extreme.training_targets(Args(**args, unlearn=True), rollouts)
    assert torch.equal(plain[0], rollouts.rewards)
    assert torch.equal(inverted[0], 1 - rollouts.rewards)
    assert torch.allclose(inverted[1], -plain[1])
    assert torch.allclose(inverted[2], 1 - plain[2])
    assert not unlearned[0].any()
    assert (unlearned[1] == -1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_without_work_adds_no_gradient(variant, policy, rollouts):
    """It evaluates the stand-in row of an empty list of sequences."""
    name, changes = VARIANTS[variant]
    row = common.make_row(rollouts, [], torch.device("cpu"))
    behavior = torch.full((len(rollouts.tokens),), -0.7) * rollouts.response_mask
    logprobs, entropy = common.row_logprobs(policy, row, 1.0)
    x = LossInputs(
        logprobs, behavior[row.flat], row.response_mask, row.sequence_ids,
        *(torch.ones(1) for _ in range(4)), entropy,
    )  # fmt: skip
    call(name, x, **changes)[0].backward()
    assert all((p.grad == 0).all() for p in policy.parameters())
