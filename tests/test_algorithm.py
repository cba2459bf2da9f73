"""docs/algorithm.md, statement by statement: exact, in float64, by enumeration of a few responses.

A problem here has V ** T responses of T tokens. A policy is a "tree": T tensors [V], [V, V], ... of
log-probs of token t at each prefix. Where a statement is about code of ours, that code runs.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import report
import torch

import build_signals
import evaluate
import stage1_extreme as stage1
import stage2_distill as stage2

V, T, BETA = 3, 3, 0.7
N = V**T
ARGS1 = stage1.Args(base="b", rollouts=Path("r"), output=Path("o"), beta=BETA)
ARGS2 = stage2.Args(base="b", rollouts=Path("r"), output=Path("o"), signals=Path("s"))
all_seeds = pytest.mark.parametrize("seed", range(3))


def tree(seed):
    """A random policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn([V] * (t + 1), generator=generator).double() for t in range(T)]
    return [x.log_softmax(-1) for x in logits]


def tokens(policy):
    """[N, T]: log-prob of every token of every response."""
    wide = [x.reshape(x.shape + (1,) * (T - 1 - t)).expand([V] * T) for t, x in enumerate(policy)]
    return torch.stack([x.reshape(N) for x in wide], dim=1)


def verdicts(seed):
    """[N]: 0 or 1; all responses that begin with token 0 are wrong, those with 1 1 right."""
    rewards = torch.rand(V, V, V, generator=torch.Generator().manual_seed(seed)).lt(0.5).double()
    rewards[0], rewards[1, 1] = 0, 1
    return rewards.reshape(N)


def given_prefix(values, base):
    """E_base[values | first t tokens], for t = 0 ... T, each spread over the responses: [N]."""
    weights, found = tokens(base).sum(1).exp(), []
    for t in range(T + 1):
        shape = (V**t, V ** (T - t))
        mean = (values * weights).reshape(shape).sum(1) / weights.reshape(shape).sum(1)
        found.append(mean[:, None].expand(shape).reshape(N))
    return found


def tilt(base, values):
    """The policy base(y) exp(values(y)) / Z."""
    whole = (tokens(base).sum(1) + values).log_softmax(0).reshape([V] * T)
    prefixes = [whole.flatten(t).logsumexp(-1) for t in range(T)] + [whole]
    return [prefixes[t + 1] - prefixes[t][..., None] for t in range(T)]


def kl(p, q):
    """KL of log-probabilities over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def inputs(policy, base, rewards, pass_rates):
    """Responses of T tokens as stage 1's objectives see them; policy and base [n, T]."""
    ids, zeros = torch.arange(len(rewards)).repeat_interleave(T), torch.zeros_like(rewards)
    flat = policy.reshape(-1), base.reshape(-1)
    return stage1.LossInputs(*flat, torch.zeros(len(ids)), ids, rewards, zeros, pass_rates, rewards)


# --------------------------------------------------------------------------------------------------
# A log-ratio is a reward


@all_seeds
def test_the_tilted_base_is_the_optimum(seed):
    """E R - beta KL(policy || base) = V* - beta KL(policy || optimum), for every policy."""
    base, rewards = tree(seed), verdicts(seed)
    best = tokens(tilt(base, rewards / BETA)).sum(1)
    value = stage1.soft_value(given_prefix(rewards, base)[0], BETA)[0]
    assert torch.allclose(BETA * (best - tokens(base).sum(1)), rewards - value)
    for other in range(10, 20):
        policy = tokens(tree(other)).sum(1)
        objective = (policy.exp() * rewards).sum() - BETA * kl(policy, tokens(base).sum(1))
        assert objective.item() == pytest.approx((value - BETA * kl(policy, best)).item())


@all_seeds
def test_what_every_log_ratio_obeys(seed):
    """E_base exp(S) = 1 and E_base S = -KL(base || policy), whatever the policy."""
    base, policy = tokens(tree(seed)).sum(1), tokens(tree(seed + 10)).sum(1)
    total = policy - base
    assert (base.exp() * total.exp()).sum().item() == pytest.approx(1)
    assert (base.exp() * total).sum().item() == pytest.approx(-kl(base, policy).item())


def test_only_one_target_can_be_met():
    """mse ends at the optimum with R - V*; the other targets ask for E_base exp(S) above 1."""
    base, rewards = tree(0), verdicts(0)
    rates = given_prefix(rewards, base)[0]
    logits = [x.clone().requires_grad_() for x in base]
    solver = torch.optim.LBFGS(logits, 1, 60, None, 1e-12, 1e-14, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        policy = tokens([z.log_softmax(-1) for z in logits])
        value = stage1.mse_loss(inputs(policy, tokens(base), rewards, rates), ARGS1)[0]
        value.backward()
        return value

    assert solver.step(loss) > 1 and loss() < 1e-9
    best = tokens(tilt(base, rewards / BETA))
    assert torch.allclose(tokens([z.log_softmax(-1) for z in logits]), best, atol=1e-4)
    weights, soft_value = tokens(base).sum(1).exp(), stage1.soft_value(rates, BETA)
    targets = [rewards, rewards - rates, rewards - soft_value]
    mass = [(weights * (target / BETA).exp()).sum().item() for target in targets]
    assert mass[0] > mass[1] > 1.05 and mass[2] == pytest.approx(1)
    assert (weights * targets[2]).sum() < 0  # V* is above the pass rate: most must fall


# --------------------------------------------------------------------------------------------------
# Credit per token


@pytest.mark.parametrize(("loss", "factor"), [("ce", BETA), ("mse", 2 * BETA)])
def test_first_step_moves_tokens_by_the_chance_of_success(loss, factor):
    """One number for a whole response, yet in the mean over the base's samples the logit of token v
    at a prefix moves by base(prefix, v) (q(prefix, v) - q(prefix)), q the chance of success."""
    base, rewards = tree(1), verdicts(1)
    logits = [x.clone().requires_grad_() for x in base]
    policy, weights, total = tokens([z.log_softmax(-1) for z in logits]), tokens(base).sum(1), 0.0
    for s in range(N):  # the loss is a sum over responses: each by itself, weighted by the base
        one = slice(s, s + 1)
        x = inputs(
            policy[one], tokens(base)[one], rewards[one], given_prefix(rewards, base)[0][one]
        )
        total = total + weights[s].exp() * stage1.LOSSES[loss](x, ARGS1)[0]
    grads = torch.autograd.grad(total, logits)
    chance, reached = given_prefix(rewards, base), 1.0
    for t in range(T):
        grad = grads[t].reshape(-1, 1).expand(-1, V ** (T - 1 - t)).reshape(N)
        reached = reached * tokens(base)[:, t].exp()
        assert torch.allclose(-grad, factor * reached * (chance[t + 1] - chance[t]), atol=1e-12)


@all_seeds
def test_token_log_ratio_is_the_step_of_the_soft_value(seed):
    base, rewards = tree(seed), verdicts(seed)
    log_ratio = tokens(tilt(base, rewards / BETA)) - tokens(base)
    values = [BETA * m.log() for m in given_prefix((rewards / BETA).exp(), base)]
    assert torch.allclose(BETA * log_ratio, torch.stack(values, dim=1).diff(dim=1))
    assert torch.allclose(values[-1], rewards)  # the last value is the verdict
    chance = torch.stack(given_prefix(rewards, base), dim=1)  # [N, T + 1]
    moved = chance.diff(dim=1)
    assert (moved.abs() > 1e-3).any(1).all()
    clear = moved.abs() > 1e-9
    assert torch.equal(log_ratio[clear].sign(), moved[clear].sign())
    decided = (chance[:, :-1] < 1e-12) | (chance[:, :-1] > 1 - 1e-12)
    assert decided.any() and log_ratio[decided].abs().max() < 1e-12  # no credit, no blame after it


@all_seeds
def test_base_minus_unlearned_is_another_soft_value(seed):
    """Same signs as the teacher's, but a fall is bounded by the chance of failure before it."""
    base, rewards = tree(seed), verdicts(seed)
    chance = torch.stack(given_prefix(rewards, base), dim=1)
    for beta in (BETA, 0.02):
        signal = tokens(base) - tokens(tilt(base, -rewards / beta))
        fail = torch.stack([-beta * m.log() for m in given_prefix((-rewards / beta).exp(), base)])
        assert torch.allclose(beta * signal, fail.diff(dim=0).T, atol=1e-10)
        assert torch.allclose(signal.sum(1) * beta, rewards - fail[0])
        blamed = chance.diff(dim=1) < -1e-9
        assert torch.equal(signal < -1e-9, blamed)
        least = torch.log1p(-chance[:, :-1].clamp(max=1 - 1e-12))
        assert (signal[blamed] >= least[blamed] - 1e-9).all()
    teacher = tokens(tilt(base, rewards / 0.02)) - tokens(base)
    lost = blamed & (chance[:, 1:] < 1e-12)  # the slip after which nothing can be right
    assert lost.any() and (teacher[lost] < -40).all()  # about -1 / beta + log(1 / q)


@all_seeds
def test_prefix_sums_of_any_policy_are_its_own_soft_values(seed):
    """sum_{i <= t} log_ratio_i = log E_base[exp(S) | first t tokens]: no optimum is needed."""
    base, policy = tree(seed), tree(seed + 10)
    log_ratio = tokens(policy) - tokens(base)
    soft = torch.stack(given_prefix(log_ratio.sum(1).exp(), base)).log()
    assert torch.allclose(log_ratio.cumsum(1), soft[1:].T)


def test_a_ruined_policy_can_rank_the_responses_of_the_base():
    """Accuracy weighs responses by exp(S), the AUC does not: one rare response ruins the first."""
    rewards = (torch.arange(1000) < 500).double()
    total = torch.where(rewards > 0, 2.0, -2.0).double()
    total[-1] = 12.0  # a wrong response, of base probability 0.001
    base = torch.full((1000,), -math.log(1000)).double()
    policy = (base + total).log_softmax(0)
    assert (policy.exp() * rewards).sum() < 0.03 and kl(policy, base) > 6
    summed = policy - base
    assert build_signals.auc(summed[rewards > 0], summed[rewards < 1]) == pytest.approx(0.998)


# --------------------------------------------------------------------------------------------------
# Trust region


@pytest.mark.parametrize("c", [0.1, 1.0, 2.0, 5.0])
def test_bounded_log_ratios_bound_the_kl(c):
    """All log-ratios of a vocabulary within +-c: either KL is at most c tanh(c / 2)."""
    bound = c * math.tanh(c / 2)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2000, 6, generator=generator).double().log_softmax(-1)
    policy = (base + c * (torch.rand(2000, 6, generator=generator).double() - 0.5)).log_softmax(-1)
    assert (policy - base).abs().max() <= c
    assert max(kl(policy, base).max(), kl(base, policy).max()) <= bound
    up = torch.tensor([1, math.exp(c)]).double() / (1 + math.exp(c))  # met by two tokens
    base, policy = up.log(), up.flip(0).log()
    assert (policy - base).abs().tolist() == pytest.approx([c, c])
    assert [kl(policy, base).item(), kl(base, policy).item()] == pytest.approx([bound] * 2)


def test_a_clip_of_the_sampled_token_is_no_bound():
    """The same target of -3 costs 8.6 nats at p = 0.9999 and 0.04 at p = 0.05."""
    p = torch.tensor([0.9999, 0.05]).double()
    cost = stage2.bernoulli_kl(p.log() - 3, p.log())
    assert cost.tolist() == pytest.approx([8.6, 0.04], abs=0.05)
    assert cost[0] > 3 * math.tanh(1.5)  # what a clip of the whole vocabulary would bound
    args = stage2.Args("b", Path("r"), Path("s"), Path("o"), signal_clip=3.0)
    assert stage2.bounded_target(torch.full((2,), -9.0).double(), p.log(), args).tolist() == [0, -3]


def test_regression_has_an_end_and_pg_a_speed():
    """One sampled token each of four coins, signals of 0.05 to 0.2: after many steps the regression
    is at its targets, the policy gradient at its clip, whatever the signal."""
    base = torch.full((4,), 0.5).double().log()
    signal = torch.tensor([0.05, 0.1, 0.15, 0.2]).double()
    ends, first = {}, {}
    for name in ("regression", "pg"):
        logit = torch.zeros(4).double().requires_grad_()
        for _ in range(400):
            policy = torch.nn.functional.logsigmoid(logit)
            x = stage2.DistillInputs(policy, base, base * 0, base, signal)
            (grad,) = torch.autograd.grad(stage2.OBJECTIVES[name](x, ARGS2)[0], logit)
            first.setdefault(name, grad)
            logit = (logit - 0.2 * grad).detach().requires_grad_()
        ends[name] = torch.nn.functional.logsigmoid(logit) - base
    assert torch.allclose(first["regression"], 2 * first["pg"])  # the same direction at the start
    assert torch.allclose(ends["regression"], signal, atol=1e-6)
    assert (ends["pg"].exp() > 1.28).all() and (ends["pg"].exp() < 1.32).all()


@all_seeds
def test_a_student_that_meets_normalised_targets_is_forecast_exactly(seed):
    """Under a uniform base the N responses are N equally likely samples of one problem. Targets
    that are log-ratios of a policy then forecast that policy's own accuracy and KL."""
    base = [torch.full([V] * (t + 1), 1 / V).double().log() for t in range(T)]
    policy, rewards = tree(seed), verdicts(seed)
    total = (tokens(policy) - tokens(base)).sum(1)
    whole = tokens(policy).sum(1)
    for module in (build_signals, stage2):
        accuracy, paid, effective = module.forecast(total, rewards, torch.zeros(N).int())[:, 0]
        assert accuracy.item() == pytest.approx((whole.exp() * rewards).sum().item())
        assert paid.item() == pytest.approx(kl(whole, tokens(base).sum(1)).item())
        assert effective.item() == pytest.approx(1 / whole.exp().square().sum().item())


# --------------------------------------------------------------------------------------------------
# KL estimators


# Samples of the base or of the policy as it is now. name: (estimate from the log-ratio u and v = u
# without gradient, KL that it has in the mean, KL whose gradient it has).
F, R = "forward", "reverse"
ESTIMATORS = {
    "base: -u": (lambda u, v: -u, F, F),
    "base: r - 1 - u": (lambda u, v: stage2.kl_penalty(u, F), F, F),
    "base: r u - r + 1": (lambda u, v: stage2.kl_penalty(u, R), R, R),
    "base: u^2 / 2": (lambda u, v: u.square() / 2, None, None),
    "policy: k1": (lambda u, v: u, R, "zero"),
    "policy: k2": (lambda u, v: u.square() / 2, None, R),
    "policy: k3": (lambda u, v: (-u).exp() - 1 + u, R, F),
    "policy: k1 as reward": (lambda u, v: v * (u - v), None, R),
    "policy: k3 as reward": (lambda u, v: ((-v).exp() - 1 + v) * (u - v), None, "difference"),
    "policy: k3 with ratio": (lambda u, v: (u - v).exp() * ((-u).exp() - 1 + u), R, R),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_estimators(name):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, generator=generator).double().log_softmax(-1)
    logits = torch.randn(6, generator=generator).double().requires_grad_()
    policy = logits.log_softmax(-1)
    estimate, value, gradient = ESTIMATORS[name]
    u = policy - base
    weights = (base if name.startswith("base") else policy.detach()).exp()
    mean = (weights * estimate(u, u.detach())).sum()
    exact = {"forward": kl(base, policy), "reverse": kl(policy, base)}
    for direction, true in exact.items():
        assert (abs(mean.item() - true.item()) < 1e-9) == (value == direction)
    slopes = {k: torch.autograd.grad(v, logits, retain_graph=True)[0] for k, v in exact.items()}
    slopes |= {"zero": torch.zeros(6).double(), "difference": slopes["reverse"] - slopes["forward"]}
    ours = torch.autograd.grad(mean, logits)[0]
    for kind, slope in slopes.items():
        assert torch.allclose(ours, slope, atol=1e-9) == (gradient == kind), kind


@all_seeds
def test_kl_at_the_prefixes_of_the_base(seed):
    """forward: token by token on the base's responses it is the KL of whole responses; reverse: not
    so, for that KL is over the policy's own prefixes."""
    base, policy = tree(seed), tree(seed + 10)
    whole_base, whole_policy = tokens(base).sum(1), tokens(policy).sum(1)
    log_ratio = tokens(policy) - tokens(base)
    forward, reverse = (
        (whole_base.exp() * stage2.kl_penalty(log_ratio, d).sum(1)).sum().item()
        for d in ("forward", "reverse")
    )
    assert forward == pytest.approx(kl(whole_base, whole_policy).item())
    exact = kl(whole_policy, whole_base).item()
    assert abs(reverse - exact) > 1e-4
    own, reached = 0.0, torch.ones(()).double()
    for p, b in zip(policy, base, strict=True):
        own += (reached * kl(p, b)).sum().item()
        reached = reached[..., None] * p.exp()
    assert own == pytest.approx(exact)


# --------------------------------------------------------------------------------------------------
# The limit


@all_seeds
def test_no_policy_is_below_the_limit(seed):
    """KL(policy || base) >= d(a || p) for each problem, and for means over problems."""
    problems = [(tree(10 * seed + i), verdicts(10 * seed + i)) for i in range(4)]
    rates = torch.stack([given_prefix(r, b)[0][0] for b, r in problems])
    for other in range(50):
        paid, accuracy = [], []
        for i, (base, rewards) in enumerate(problems):
            whole = tokens(tree(100 + 4 * other + i)).sum(1)
            if other % 2:  # near the best policies, not only far from them
                whole = tokens(tilt(base, rewards * other / 10 + 0.05 * whole)).sum(1)
            paid.append(kl(whole, tokens(base).sum(1)))
            accuracy.append((whole.exp() * rewards).sum())
        paid, accuracy = torch.stack(paid), torch.stack(accuracy)
        each = evaluate.least_kl(accuracy, rates)
        assert (paid >= each - 1e-12).all()
        assert each.mean() >= evaluate.least_kl(accuracy.mean(), rates.mean()) - 1e-12


def test_the_tilted_base_buys_the_most_accuracy():
    """At every price of a nat, no choice of accuracies (each at its own least KL) does better."""
    rates = torch.tensor([0.05, 0.3, 0.6, 0.95]).double()
    others = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)).double()
    paid = evaluate.least_kl(others, rates).mean(1)
    for eta in (0.5, 1.0, 2.0, 5.0):
        accuracy, spent = report.tilted_optimum(rates, torch.tensor([eta]))
        assert (others.mean(1) - paid / eta).max() <= (accuracy - spent / eta).item() + 1e-12
        assert evaluate.kl_efficiency(accuracy, rates.mean(), spent) < 0.97  # rates differ


def test_correcting_every_step_alike_costs_more_than_the_optimum():
    """Six steps that slip with 0.2 each: all brought to 0.02, against the tilted base."""
    n, slip, better = 6, 0.2, 0.02
    rate, accuracy = (torch.tensor((1 - s) ** n).double() for s in (slip, better))
    paid = n * evaluate.least_kl(*(torch.tensor(1 - s).double() for s in (better, slip)))
    assert (accuracy.item(), paid.item()) == pytest.approx((0.886, 0.917), abs=1e-3)
    assert evaluate.kl_efficiency(accuracy, rate, paid).item() == pytest.approx(0.944, abs=1e-3)
    # The optimum of the same accuracy: slips rarer towards the end; after one it is the base.
    weight = accuracy * (1 - rate) / (rate * (1 - accuracy))  # exp(eta)
    chances = [(1 - slip) ** (n - k) for k in range(n)]  # of success, before step k
    slips = [slip / (1 + q * (weight.item() - 1)) for q in chances]
    assert slips == sorted(slips, reverse=True)
    assert (slips[0], slips[-1]) == pytest.approx((0.031, 0.011), abs=5e-4)
    assert math.prod(1 - s for s in slips) == pytest.approx(accuracy.item())
