"""Stage 2: objectives, trust region and KL proxy, against values in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import checks
import pytest
import torch
from test_losses import double

import build_signals
import common
import stage1_extreme as stage1
import stage2_distill as stage2
from stage2_distill import Args, DistillInputs, bernoulli_kl, bounded_target

PATHS = {"base": "b", "rollouts": Path("r"), "signals": Path("s"), "output": Path("o")}
VARIANTS = {"regression": {}, "generalized_kl": {}, "pg": {}}
VARIANTS["pg with mask"] = {"prob_mask": 0.05, "objective": "pg"}


def inputs(policy, base, target, behavior=None):
    """Response tokens with these log-probs, float64."""
    policy, base, target = double(policy).requires_grad_(), double(base), double(target)
    behavior = base if behavior is None else double(behavior)
    return DistillInputs(policy, base, torch.zeros_like(base), behavior, target)


def gradient(name, x, **changes):
    """Value of the objective with the script's defaults, and its gradient by each token."""
    loss, _ = stage2.OBJECTIVES[name](x, Args(**PATHS, **changes))
    return loss.item(), torch.autograd.grad(loss, x.policy_logprobs)[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_objective_keeps_what_it_must(variant):
    torch.manual_seed(0)
    policy, base, behavior = (-torch.rand(3, 12) - 0.1).tolist()
    x = inputs(policy, base, torch.randn(12).tolist(), behavior)
    args = Args(**PATHS, **VARIANTS[variant])
    checks.check_objective(stage2.OBJECTIVES[variant.split()[0]], x, args)
    assert set(stage2.OBJECTIVES) == {name.split()[0] for name in VARIANTS}


# --------------------------------------------------------------------------------------------------
# Objectives


def test_regression_goes_to_its_target_and_holds_the_base_without_one():
    met = inputs([-0.5, -1.7], [-1.0, -1.2], [0.5, -0.5], behavior=[-5.0, -5.0])
    assert gradient("regression", met) == (pytest.approx(0), pytest.approx([0, 0]))
    x = inputs([-0.5, -1.7, -0.9, -0.6], [-1.0, -1.2, -1.0, -0.3], [0.2, 0.3, 0.0, 0.0])
    value, grad = gradient("regression", x)
    assert value == pytest.approx(0.3**2 + 0.8**2 + 0.1**2 + 0.3**2)
    assert grad == pytest.approx([0.6, -1.6, 0.2, -0.6])  # twice the error


def test_generalized_kl_by_its_values():
    pairs = [(0, 0), (0, 1), (0.5, 1), (1, 1), (0, -2)]  # log-ratio, target
    x = inputs([d - 1.0 for d, _ in pairs], [-1.0] * 5, [t for _, t in pairs])
    value, grad = gradient("generalized_kl", x)
    assert value == pytest.approx(0 + 1 + 0.28958 + 0 + 0.59399, abs=1e-5)
    assert grad == pytest.approx([0, -1.71828, -1.06956, 0, 0.86466], abs=1e-5)


@pytest.mark.parametrize("name, best", [("generalized_kl", 0.7860), ("regression", 0.6880)])
def test_generalized_kl_ends_at_the_normalised_tilt_and_regression_does_not(name, best):
    """Two tokens, .35 and .65, targets of normaliser Z = 1.7177: tilted, the first has .7860."""
    base, target = double([0.35, 0.65]).log(), double([1.35, -0.57])
    z = (base + target).exp().sum().item()
    assert (base[0] + target[0]).exp().item() / z == pytest.approx(0.7860, abs=1e-4)

    def mean_loss(first):
        """Expected loss over tokens that the base samples, and its slope in the logit."""
        logit = double(math.log(first / (1 - first))).requires_grad_()
        policy = torch.nn.functional.logsigmoid(torch.stack([logit, -logit]))
        parts = [v[:, None] for v in (policy, base, base * 0, base, target)]
        each = (DistillInputs(*(v[i] for v in parts)) for i in range(2))
        losses = torch.stack([stage2.OBJECTIVES[name](x, Args(**PATHS))[0] for x in each])
        loss = (base.exp() * losses).sum()
        return loss.item(), torch.autograd.grad(loss, logit)[0].item()

    assert mean_loss(best - 0.001)[1] < 0 < mean_loss(best + 0.001)[1]
    if name == "generalized_kl":
        assert mean_loss(best)[0] == pytest.approx(z * math.log(z) - z + 1, abs=1e-5)


def test_pg_clips_only_where_it_would_go_further():
    """By default outside [0.8, 1.28], and only on the side that the target pushes to."""
    ratios, targets = [0.5, 1, 1.25, 1.35, 0.5, 0.85, 1.35, 1], [1.0] * 4 + [-1.0] * 3 + [0.5]
    x = inputs([math.log(r) - 2 for r in ratios], [-2.0] * 8, targets)
    value, grad = gradient("pg", x)
    assert value == pytest.approx(-0.5 - 1 - 1.25 - 1.28 + 0.8 + 0.85 + 1.35 - 0.5)
    assert grad == pytest.approx([-0.5, -1, -1.25, 0, 0, 0.85, 1.35, -0.5])
    assert stage2.pg_loss(x, Args(**PATHS))[1]["clip_share"].tolist() == [2, 8]


def test_prob_mask_drops_what_moved_too_far_in_the_signals_direction():
    """Probability moves from the sampler's 1/2 by +.3, +.1, -.3, -.1, under either sign."""
    now = [math.log(p) for p in (0.8, 0.6, 0.2, 0.4)] * 2
    x = inputs(now, [-9.0] * 8, [1.0] * 4 + [-1.0] * 4, behavior=[math.log(0.5)] * 8)
    wide = {"clip_low": 0.99, "clip_high": 9.0}  # no ratio clip: what is dropped is the mask's
    _, grad = gradient("pg", x, prob_mask=0.2, **wide)
    assert grad == pytest.approx([0, -1.2, -0.4, -0.8, 1.6, 1.2, 0, 0.8])
    args = Args(**PATHS, prob_mask=0.2, **wide)
    assert stage2.pg_loss(x, args)[1]["clip_share"].tolist() == [2, 8]
    _, free = gradient("pg", x, **wide)
    assert free == pytest.approx([-1.6, -1.2, -0.4, -0.8, 1.6, 1.2, 0.4, 0.8])
    edge = inputs([0.0], [-9.0], [1.0], [math.log(0.5)])
    assert gradient("pg", edge, prob_mask=0.5, **wide)[1] != [0]  # as far as the mask allows


# --------------------------------------------------------------------------------------------------
# Trust region


def test_bounded_target_clips_and_drops_what_is_small():
    signal, base = double([-9.0, -1.0, 0.0, 0.4, 1.0, 9.0]), torch.full((6,), -9.0).double()
    for scale, floor, expected in [
        (1.5, 0.0, [-2, -1.5, 0, 0.6, 1.5, 2]),
        (-1.0, 0.0, [2, 1, 0, -0.4, -1, -2]),
        (1.5, 1.5, [-2, -1.5, 0, 0, 1.5, 2]),  # a target of just the floor is kept
    ]:
        args = Args(**PATHS, signal_scale=scale, signal_floor=floor, signal_clip=2.0)
        assert bounded_target(signal, base, args).tolist() == pytest.approx(expected)


def test_token_kl_holds_sure_tokens_and_lets_rare_ones_go():
    """The same target: costly where the base is sure, nearly free where the token is rare."""
    base = torch.tensor([0.9999, 0.5, 0.05, 0.9999]).log()
    signal = torch.tensor([-2.0, -2.0, -2.0, 0.0])
    kept = {0.2: [0, 0, -2, 0], 1.5: [0, -2, -2, 0], math.inf: [-2, -2, -2, 0]}
    for delta, expected in kept.items():  # d(.0677 || .5) = .45 nats; d(.0068 || .05) = .03
        assert bounded_target(signal, base, Args(**PATHS, token_kl=delta)).tolist() == expected
    assert bounded_target(signal, base, Args(**PATHS)).tolist() == kept[1.5]
    exact = bernoulli_kl(base[1:2] - 2, base[1:2]).item()
    assert bounded_target(signal, base, Args(**PATHS, token_kl=exact))[1] == -2  # not more than it


def test_bernoulli_kl_is_that_of_two_coins():
    a, p = double([0.5, 0.01, 0.9, 0.3, 1 - 1e-7]), double([0.9, 0.2, 0.1, 0.3, 0.4])
    coin = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(coin(a), coin(p))
    a[-1] = 1.0  # counts as 1 - 1e-7
    torch.testing.assert_close(bernoulli_kl(a.log(), p.log()), expected, rtol=1e-9, atol=0)


def test_bernoulli_kl_is_the_least_of_all_distributions_with_that_token():
    torch.manual_seed(0)
    base = torch.rand(6, dtype=torch.float64).softmax(0)
    moved = torch.rand(1000, 6, dtype=torch.float64).softmax(1)
    whole = (moved * (moved / base).log()).sum(1)
    assert (bernoulli_kl(moved[:, 0].log(), base[0].log()) <= whole).all()
    scaled = base * (0.9 / (1 - base[0]))  # the rest in proportion: the bound is met
    scaled[0] = 0.1
    least = bernoulli_kl(double(0.1).log(), base[0].log())
    assert (scaled * (scaled / base).log()).sum().item() == pytest.approx(least.item())


def test_the_bounds_and_the_forecast_are_those_of_build_signals():
    """Two copies, one in each file, so that each file reads alone: the code and the text agree."""
    for name in ("bernoulli_kl", "bounded_target", "forecast"):
        codes = [getattr(module, name).__code__ for module in (stage2, build_signals)]
        assert codes[0].co_code == codes[1].co_code and codes[0].co_names == codes[1].co_names
    for name in stage2.BOUNDS:
        assert getattr(Args, name) == getattr(build_signals.Args, name)
    assert stage2.BOUNDS == build_signals.BOUNDS


def test_samples_of_another_policy_are_not_re_weighted(rollouts):
    held_out = torch.arange(4)
    taken = torch.isin(rollouts.sequence_ids, held_out) & rollouts.response_mask
    values = torch.ones(int(taken.sum()))
    given = values * 0.5, values, rollouts, held_out
    own = stage2.compare_with_targets(*given, True)
    other = stage2.compare_with_targets(*given, False)
    assert other == {name: own[name] for name in ("kl_proxy", "realised")} != own
    assert own["realised"] == pytest.approx(0.5)


FRONTIER = [  # by KL, the base first; accuracies with the errors of the differences to earlier rows
    {"accuracy": 0.40, "kl": 0.0, "difference_se": [], "signal_scale": 0.0},
    {"accuracy": 0.60, "kl": 0.3, "difference_se": [0.02], "signal_scale": 1.0},
    {"accuracy": 0.80, "kl": 0.7, "difference_se": [0.02, 0.02], "signal_scale": 2.0},
    {"accuracy": 0.81, "kl": 1.2, "difference_se": [0.02, 0.02, 0.015], "signal_scale": 4.0},
]


def choose(folder, rows, held_out=True, **flags):
    """What stage 2 chooses from a forecast."""
    rest = {"signal_clip": 3.0, "signal_floor": 0.5, "token_kl": 1.5}
    rows = [rest | row for row in rows]
    found = {"frontier": rows, "held_out": held_out}
    common.write_json(folder / "s.json", {"forecast": found})
    args = Args(**(PATHS | {"signals": folder / "s.safetensors"}), **flags)
    return stage2.choose_bounds(args, common.Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    "flags, scale",
    [
        ({"within_kl": 2.0}, 2.0),  # the last row is better by less than the error, and dearer
        ({"within_kl": 0.6}, 1.0),
        ({"reach_accuracy": 0.7}, 2.0),
        ({"reach_accuracy": 0.81}, 2.0),
    ],
)
def test_bounds_chosen_by_the_forecast(flags, scale, tmp_path, capsys):
    args = choose(tmp_path, FRONTIER, **flags)
    assert (args.signal_scale, args.signal_clip, args.signal_floor, args.token_kl) == (
        scale, 3.0, 0.5, 1.5,
    )  # fmt: skip
    assert "chosen by the forecast on held-out problems: 0." in capsys.readouterr().out
    choose(tmp_path, FRONTIER, held_out=False, **flags)
    assert "on the training problems, so partly memory: 0." in capsys.readouterr().out


def test_a_forecast_that_promises_nothing_is_refused(tmp_path):
    poor = [*FRONTIER[:1], FRONTIER[1] | {"accuracy": 0.41}]
    with pytest.raises(common.UserError, match="promises nothing: its best forecast is 0.410, the"):
        choose(tmp_path, poor, within_kl=1.0)
    with pytest.raises(common.UserError, match="promises nothing: its best forecast is 0.400, the"):
        choose(tmp_path, FRONTIER[:1], within_kl=1.0)  # no setting at all is above the base
    for flags in ({"within_kl": 0.1}, {"reach_accuracy": 0.3}):
        with pytest.raises(common.UserError, match=r"the base itself, 0\.400 right, is the choice"):
            choose(tmp_path, FRONTIER, **flags)
    with pytest.raises(
        common.UserError, match=r"--reach-accuracy 0\.9: the forecast of .* ends at 0\.81"
    ):
        choose(tmp_path, FRONTIER, reach_accuracy=0.9)
    with pytest.raises(common.UserError, match="s.json has no forecast; run build_signals.py"):
        args = Args(**(PATHS | {"signals": tmp_path / "x/s.safetensors"}), within_kl=1.0)
        stage2.choose_bounds(args, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_kl_at_the_edges(dtype):
    """Certain and impossible tokens cost a finite number; above 1 counts as just below 1."""
    logprobs = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -50.0, -1e4, 3.0], dtype=dtype)
    cost = bernoulli_kl(logprobs[:, None], logprobs[None])
    assert cost.isfinite().all() and (cost >= -1e-6).all()
    assert cost.diagonal().abs().max() == 0
    assert cost[3, 0].item() == pytest.approx(9.527, abs=0.01)  # 1 - p is 1e-7, not less
    torch.testing.assert_close(cost[:, 6], cost[:, 0])


def test_what_the_targets_keep_is_printed(rollouts, ranks, capsys):
    """Of the response tokens: clipped, kept as it is, held at the base, without signal."""
    mask, args = rollouts.response_mask, Args(**PATHS, signal_scale=2.0, signal_clip=2.0)
    places, n = mask.nonzero()[:4, 0], int(mask.sum())
    signal, base = torch.zeros(len(mask)), torch.full((len(mask),), -4.0)
    signal[places] = torch.tensor([-1.5, 0.25, -1.5, 0.0])
    base[places[2]] = -1e-4
    target = bounded_target(signal, base, args)
    stage2.print_targets(args, signal, target, rollouts, ranks)
    printed = capsys.readouterr().out
    assert f"{2 / n:.1%} of response tokens have one ({1 / n:.1%} down)" in printed
    assert f"{1 / n:.1%} are clipped at 2" in printed
    assert f"--token-kl 1.5: {1 / n:.1%}" in printed


# --------------------------------------------------------------------------------------------------
# KL penalty and KL proxy


@pytest.mark.parametrize("stage", [stage1, stage2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_penalty(stage, direction):
    penalty = lambda d: stage.kl_penalty(d, direction)  # noqa: E731
    values = {"forward": [0, 0.148721, 0.106531], "reverse": [0, 0.175639, 0.090204]}
    assert penalty(double([0.0, 0.5, -0.5])).tolist() == pytest.approx(values[direction], abs=1e-6)
    assert (penalty(torch.linspace(-30, 30, 601, dtype=torch.float64)) >= 0).all()
    far = torch.tensor([0.0, 1e4, -1e4], requires_grad=True)
    (grad,) = torch.autograd.grad(penalty(far).sum(), far)
    assert penalty(far).isfinite().all() and grad.isfinite().all()
    assert grad[0] == 0  # flat at the base


def test_split_never_puts_a_problem_on_both_sides(rollouts):
    choices = set()
    for seed, (share, held) in enumerate([(0.05, 1), (0.2, 1), (0.4, 2), (0.7, 4), (0.5, 2)]):
        trained, held_out = stage2.split_problems(rollouts, share, seed)
        ours, theirs = (set(rollouts.problem_index[x].tolist()) for x in (trained, held_out))
        assert not ours & theirs and len(theirs) == held
        both = torch.cat([trained, held_out]).sort().values
        assert torch.equal(both, torch.arange(20))  # every response, once
        assert torch.equal(stage2.split_problems(rollouts, share, seed)[0], trained)
        choices.add(tuple(sorted(stage2.split_problems(rollouts, 0.2, seed)[1].tolist())))
    assert len(choices) > 1  # the seed decides
    with pytest.raises(common.UserError, match="--kl-holdout 0.95: leaves none of 5"):
        stage2.split_problems(rollouts, 0.95, 0)


def test_diagnostics_equal_the_plain_formulas():
    x = inputs([-0.5, -1.7, -0.2, -0.9], [-1.0, -1.2, -0.2, -1.0], [0.5, -2.0, 0.0, 2.0])
    x = DistillInputs(**(vars(x) | {"entropy": double([0.1, 0.2, 0.3, 0.4])}))
    found = {name: (pair[0] / pair[1]).item() for name, pair in stage2.diagnostics(x).items()}
    expected = {"ratio": sum(math.exp(d) for d in (0.5, -0.5, 0, 0.1)) / 4, "entropy": 0.25}
    expected |= {"target_share": 0.75, "log_ratio_credit": 0.3, "log_ratio_blame": -0.5}
    assert found == pytest.approx(expected)
    checks.check_metrics(stage2.diagnostics, x)
