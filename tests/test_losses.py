"""Stage 1: objectives, advantages and targets, against values in closed form."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import checks
import pytest
import tiny
import torch

import common
import stage1_extreme as stage1
import stage2_distill as stage2
from stage1_extreme import LOSSES, Args, LossInputs, group_statistics

PATHS = {"base": "b", "rollouts": Path("r"), "output": Path("o")}
VARIANTS = {
    "ce with prior": {"ce_prior": True},
    "mse verdict": {"mse_target": "verdict"},
    "mse centred": {"mse_target": "centred"},
    "mse unlearn": {"unlearn": True},
} | dict.fromkeys(("ce", "mse", "sapo", "grpo", "sft"), {})


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def inputs(log_ratios, rewards, advantages=None, pass_rate=0.25):
    """One response per list of log-ratios, float64. Token t of each has log base -0.5 - 0.1 t."""
    base = double([-0.5 - 0.1 * t for response in log_ratios for t in range(len(response))])
    policy = (base + double(sum(log_ratios, []))).requires_grad_()
    n, lengths = len(log_ratios), torch.tensor([len(response) for response in log_ratios])
    ids, rates = torch.arange(n).repeat_interleave(lengths), double([pass_rate] * n)
    per_response = double(rewards), double(advantages or [0.0] * n), rates, double(rewards)
    return LossInputs(policy, base, torch.zeros_like(base), ids, *per_response)


def gradient(name, x, **changes):
    """Value of the objective with the script's defaults, and its gradient by each token."""
    loss, _ = LOSSES[name](x, Args(**PATHS, **changes))
    return loss.item(), torch.autograd.grad(loss, x.policy_logprobs)[0].tolist()


def metric(name, x, key, **changes):
    """[sum, count] of a metric that the objective itself reports."""
    return LOSSES[name](x, Args(**PATHS, **changes))[1][key].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_objective_keeps_what_it_must(variant):
    torch.manual_seed(0)
    log_ratios = [(torch.randn(n) * 0.6).tolist() for n in (3, 5, 1, 4)]
    x = inputs(log_ratios, [1.0, 0.0, 0.0, 1.0], [1.5, -0.5, -1.0, 0.7])
    args = Args(**PATHS, **VARIANTS[variant])
    checks.check_objective(LOSSES[variant.split()[0]], x, args)
    assert set(LOSSES) == {name.split()[0] for name in VARIANTS}


# --------------------------------------------------------------------------------------------------
# Objectives that see a response as a whole


@pytest.mark.parametrize("n", [1, 4])
def test_ce_value_and_gradient(n):
    """The default beta is 0.05; the log-ratio is summed over the tokens, never averaged."""
    totals, rewards = [0, 0, 20, 20, 100, 100], [1.0, 0.0] * 3
    losses = [0.693147, 0.693147, 0.313262, 1.313262, 0.006715, 5.006715]
    slopes = [-0.025, 0.025, -0.013447, 0.036553, -0.000335, 0.049665]
    value, grad = gradient("ce", inputs([[total / n] * n for total in totals], rewards))
    assert value == pytest.approx(sum(losses), abs=4e-6)
    assert grad[::n] == pytest.approx(slopes, abs=1e-6)
    assert grad[::n] == grad[n - 1 :: n]  # the same for every token of a response


def test_ce_prior_adds_the_logit_of_the_pass_rate():
    z = 0.05 * 4 + math.log(0.25 / 0.75)
    value, grad = gradient("ce", inputs([[2.0, 2.0]], [1.0]), ce_prior=True)
    assert value == pytest.approx(math.log1p(math.exp(-z)))
    assert grad == pytest.approx([0.05 * (1 / (1 + math.exp(-z)) - 1)] * 2)
    for rate in (0.0, 1.0):  # a problem that all or none solve counts as 0.98 or 0.02
        value, _ = gradient("ce", inputs([[0.0]], [rate], pass_rate=rate), ce_prior=True)
        assert value == pytest.approx(-math.log(0.98))
    x = inputs([[1.0], [-1.0], [1.0], [-1.0], [0.0]], [1.0, 1.0, 0.0, 0.0, 0.0])
    assert metric("ce", x, "classified") == [3, 5]  # at 0 the guess is "wrong"


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [("verdict", 20.0, 0.0), ("centred", 15.0, -5.0), ("soft_value", 1.3863, -18.6137)],
)
def test_mse_is_zero_at_the_log_ratio_its_target_asks_for(target, right, wrong):
    """A pass rate of 1/4 at beta = 0.05."""
    x = inputs([[right], [wrong]], [1.0, 0.0])
    value, grad = gradient("mse", x, mse_target=target)
    assert value == pytest.approx(0, abs=1e-8)
    assert grad == pytest.approx([0, 0], abs=1e-5)
    wanted = 0.05 * (right + wrong)
    assert metric("mse", x, "target", mse_target=target) == pytest.approx([wanted, 2], abs=1e-5)


def test_mse_unlearn_asks_every_response_down():
    x = inputs([[-10.0, -10.0], [0.0, 0.0]], [1.0, 0.0])
    value, grad = gradient("mse", x, unlearn=True)
    assert value == pytest.approx(1.0)  # the first is at S = -20 = -1/beta, the second at 0
    assert grad == pytest.approx([0, 0, 0.1, 0.1])


# --------------------------------------------------------------------------------------------------
# Objectives that see the ratio of each token


def test_sapo_weight_of_a_correct_token():
    ratios = [0.01, 0.5, 1, 1.2, 2, 2.06, 5]
    x = inputs([[math.log(r)] for r in ratios], [1.0] * 7, [1.0] * 7)
    value, grad = gradient("sapo", x)
    weights = [0.0079, 0.47, 1, 1.1881, 1.5729, 1.5747, 0.3533]
    assert grad == pytest.approx([-w for w in weights], abs=6e-5)
    assert value == pytest.approx(-sum(4 / (1 + math.exp(1 - r)) for r in ratios))


def test_sapo_wrong_tokens_have_their_own_temperature():
    value, grad = gradient("sapo", inputs([[0.0]], [0.0], [-1.0]))
    assert value == pytest.approx(2 / 1.05)  # f(1) = 2 / tau
    assert grad == pytest.approx([1])
    _, peak = gradient("sapo", inputs([[math.log(1.992)]], [0.0], [-1.0]))
    assert peak == pytest.approx([1.5363], abs=6e-5)
    value, _ = gradient("sapo", inputs([[0.0]], [1.0], [1.0]), sapo_tau_positive=2.0)
    assert value == pytest.approx(-1)


def test_grpo_clips_only_where_it_would_go_further():
    """By default outside [0.8, 1.28], and only on the side that the advantage pushes to."""
    ratios, advantages = [0.5, 1, 1.25, 1.35, 0.5, 0.85, 1.35, 4], [1.0] * 4 + [-1.0] * 4
    x = inputs([[math.log(r)] for r in ratios], [1.0] * 8, advantages)
    value, grad = gradient("grpo", x)
    assert value == pytest.approx(-0.5 - 1 - 1.25 - 1.28 + 0.8 + 0.85 + 1.35 + 4)
    assert grad == pytest.approx([-0.5, -1, -1.25, 0, 0, 0.85, 1.35, 4])
    assert metric("grpo", x, "clip_share") == [2, 8]


@pytest.mark.parametrize("name", ["sapo", "grpo"])
def test_the_mean_is_over_the_tokens_of_each_response(name):
    """On-policy, every token of a response of length L gets -A / L."""
    x = inputs([[0.0] * 3, [0.0] * 5], [1.0, 0.0], [1.5, -0.5])
    assert gradient(name, x)[1] == pytest.approx([-1.5 / 3] * 3 + [0.5 / 5] * 5)
    agreeing = inputs([[0.5, -0.5]], [1.0], [0.0])
    assert gradient(name, agreeing) == (0, [0, 0])


# --------------------------------------------------------------------------------------------------
# Ratios, penalties, group statistics


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_the_exponential_is_clamped_at_20_nats(stage):
    x = torch.tensor([-1e4, -20.0, 0.0, 19.0, 20.0, 21.0, 1e4], dtype=torch.float64)
    x.requires_grad_()
    expected = [math.exp(v) for v in (-20, -20, 0, 19, 20, 20, 20)]
    assert stage.safe_exp(x).tolist() == pytest.approx(expected)
    (grad,) = torch.autograd.grad(stage.safe_exp(x).sum(), x)
    assert (grad == 0).tolist() == [True, False, False, False, False, True, True]
    # The log-ratio itself is not clamped, so the penalty goes on growing.
    assert stage.kl_penalty(x, "forward")[0].item() == pytest.approx(9999)


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0] + [1.0] * 4 + [0.0] * 12)
    index = torch.tensor([0] * 4 + [1, 2, 1, 2] + [4] * 16, dtype=torch.int32)
    advantages, means = group_statistics(rewards, index)
    expected = [1.5, -0.5, -0.5, -0.5, *[0.707106] * 2, *[-0.707106] * 2]
    expected += [1.677047] * 4 + [-0.559016] * 12  # 16 responses, 4 correct
    assert advantages.tolist() == pytest.approx(expected, abs=2e-5)
    # 1e-6 is added to the deviation, which is 1/2 in the first group.
    exact = double([0.75 / (0.5 + 1e-6)]).float().item()
    assert advantages[0].item() == pytest.approx(exact, rel=1e-7)
    assert means.tolist() == [0.25] * 4 + [0.5] * 4 + [0.25] * 16


@pytest.mark.parametrize("size", [1, 3, 7])  # 1/3 and 1/7 are not exact in floating point
@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_groups_that_agree_get_exactly_zero(size, verdict):
    rewards, index = torch.full((size,), verdict), torch.zeros(size, dtype=torch.int32)
    advantages, means = group_statistics(rewards, index)
    assert advantages.tolist() == [0.0] * size
    assert means.tolist() == pytest.approx([verdict] * size)


def test_soft_value():
    rates = double([0, 0.25, 0.5, 0.75, 1])
    values = [0, 0.4772, 0.7169, 0.8782, 1]
    assert stage1.soft_value(rates, 0.5).tolist() == pytest.approx(values, abs=5e-5)
    direct = 0.5 * torch.log(rates * math.exp(2) + 1 - rates)
    torch.testing.assert_close(stage1.soft_value(rates, 0.5), direct)
    assert stage1.soft_value(rates, 1e3).tolist() == pytest.approx(rates.tolist(), abs=1e-3)
    for beta in (1e-3, 1e-6):  # exp(1 / beta) overflows; the limit is the best verdict
        best = [0, 1, 1, 1, 1]
        assert stage1.soft_value(rates, beta).tolist() == pytest.approx(best, abs=2e-3)


# --------------------------------------------------------------------------------------------------
# What the loop is given


def test_what_a_sum_is_divided_by(monkeypatch):
    """Responses, but for sft the correct tokens; other objectives may name other units."""
    rewards, lengths = torch.tensor([1.0, 0, 1, 0]), torch.tensor([3, 5, 2, 1])
    counts = dict.fromkeys(LOSSES, 4) | {"sft": 5, "tokens": 11, "wrong_tokens": 6}
    units = {name: name for name in ("tokens", "wrong_tokens")}
    monkeypatch.setattr(stage1, "DIVISORS", stage1.DIVISORS | units)
    assert {name: stage1.count_units(name, rewards, lengths) for name in counts} == counts
    assert stage1.count_units("sft", torch.zeros(4), lengths) == 1  # nothing to divide by


def test_training_targets(rollouts):
    plain = stage1.training_targets(Args(**PATHS), rollouts)
    advantages, pass_rates = group_statistics(rollouts.rewards, rollouts.problem_index)
    expected = {"rewards": rollouts.rewards, "advantages": advantages, "pass_rates": pass_rates}
    assert plain.keys() == expected.keys() | {"verdicts"}
    assert all(torch.equal(plain[name], value) for name, value in expected.items())
    inverted = stage1.training_targets(Args(**PATHS, invert_rewards=True), rollouts)
    assert torch.equal(inverted["rewards"], 1 - rollouts.rewards)
    torch.testing.assert_close(inverted["advantages"], -advantages)
    torch.testing.assert_close(inverted["pass_rates"], 1 - pass_rates)
    unlearned = stage1.training_targets(Args(**PATHS, unlearn=True), rollouts)
    assert not unlearned["rewards"].any() and (unlearned["advantages"] == -1).all()
    for targets in (plain, inverted, unlearned):  # what is watched goes by the true verdicts
        assert torch.equal(targets["verdicts"], rollouts.rewards)


def test_rollouts_that_teach_nothing_are_refused(rollouts):
    for reward, loss, allowed in [(1.0, "ce", False), (0.0, "sft", False), (1.0, "sft", True)]:
        same = dataclasses.replace(rollouts, rewards=torch.full_like(rollouts.rewards, reward))
        args = Args(**PATHS, loss=loss)
        if allowed:
            stage1.training_targets(args, same)
        else:
            with pytest.raises(common.UserError, match=r"rollouts\.safetensors"):
                stage1.training_targets(args, same)
        stage1.training_targets(Args(**PATHS, unlearn=True), same)  # needs no mixed verdicts


def test_save_steps():
    args = Args(**PATHS, epochs=2)
    folder = Path("o/checkpoints")
    expected = {10: folder / "epoch-001.000", 20: folder / "epoch-002.000"}
    assert stage1.save_steps(args, 10) == expected
    args = Args(**PATHS, epochs=2, save_at=(0.01, 0.5, 1.24))
    assert [*stage1.save_steps(args, 10)] == [1, 5, 12]  # rounded, and step 1 at the earliest
    assert stage1.save_steps(args, 10)[5] == folder / "epoch-000.500"
    with pytest.raises(common.UserError, match="--save-at 0.01 0.5 1.24: .* has 1;"):
        stage1.save_steps(args, 1)


def test_sampler_and_trainer_must_agree(ranks, capsys):
    """As many response tokens not within 0.9 and 1.1 as --max-noise allows: two of eight."""
    ours, ratios = torch.zeros(10), torch.tensor([9.0, 9, 1, 1, 1, 1.09, 1, 0.91, 1.1, 0.9])
    logprobs = -ratios.log()  # of the sampler; those of the prompt, 9, do not count
    rollouts = tiny.make_rollouts("r", [([5, 6], [7] * 8)], [1.0], [0], sampler_logprobs=logprobs)
    stage1.check_sampler(ours, rollouts, 0.25, ranks)
    printed, logs = capsys.readouterr().out, ratios[2:].log()
    spread = f"mean {logs.mean():+.1e}, sd {logs.std(correction=0):.1e}"
    assert spread in printed and "25.00% of tokens" in printed
    for value in (-0.2, 0.2, math.nan):
        noisy = dataclasses.replace(rollouts, sampler_logprobs=logprobs.clone())
        noisy.sampler_logprobs[4] = value
        with pytest.raises(common.UserError, match="--max-noise 0.25"):
            stage1.check_sampler(ours, noisy, 0.25, ranks)
    unknown = dataclasses.replace(rollouts, sampler_logprobs=None)
    stage1.check_sampler(ours, unknown, 0.0, ranks)


def test_diagnostics_equal_the_plain_formulas():
    """Trained on inverted verdicts; what is watched goes by the true ones: right, wrong, wrong."""
    log_ratios = [[0.5, -0.1], [25.0, 0.1, -0.4], [20.0]]
    x = inputs(log_ratios, [0.0, 1.0, 1.0])
    entropy = torch.rand(6, dtype=torch.float64)
    x = dataclasses.replace(x, entropy=entropy, verdicts=double([1.0, 0.0, 0.0]))
    found = {name: (pair[0] / pair[1]).item() for name, pair in stage1.diagnostics(x).items()}
    log_probs = [[d - 0.5 - 0.1 * t for t, d in enumerate(response)] for response in log_ratios]
    ratios = [math.exp(min(d, 20)) for response in log_ratios for d in response]
    penalties = [r - 1 - d for r, d in zip(ratios, sum(log_ratios, []), strict=True)]
    geometric = [math.exp(sum(response) / len(response)) for response in log_probs]
    expected = {
        "ratio": sum(ratios) / 6,
        "ratio_outside_0.8_1.28": 4 / 6,
        "log_ratio_clamped": 1 / 6,
        "entropy": entropy.mean().item(),
        "log_ratio_correct": 0.4,
        "log_ratio_wrong": (24.7 + 20) / 2,
        "prob_correct": geometric[0],
        "prob_wrong": (geometric[1] + geometric[2]) / 2,
        "logprob": sum(map(sum, log_probs)) / 3,
        "kl_proxy": sum(penalties) / 3,
    }
    assert found == pytest.approx(expected, rel=1e-6)
    checks.check_metrics(stage1.diagnostics, x)
    edges = double([math.log(0.8), math.log(1.28), 20, -20, 0, 0])  # 0.8, 1.28 and 20 are inside
    x = dataclasses.replace(x, policy_logprobs=edges, base_logprobs=torch.zeros(6).double())
    assert stage1.diagnostics(x)["ratio_outside_0.8_1.28"].tolist() == [2, 6]
    assert stage1.diagnostics(x)["log_ratio_clamped"].tolist() == [0, 6]
