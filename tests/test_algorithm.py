"""docs/algorithm.md, statement by statement: exact, in float64, by enumeration of a few responses.

A problem here has V ** T responses of T tokens; `Tree` holds log-probs of token t at each prefix.
Where a statement is about code of ours, that code runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

V, T, BETA = 3, 3, 0.7
N = V**T
STAGE1 = vars(stage1_extreme.Args(base="b", rollouts=Path("r"), output=Path("o"), beta=BETA))
STAGE2 = vars(stage2_distill.Args(base="b", rollouts=Path("r"), output=Path("o")))
SEEDS = range(3)

Tree = list[Tensor]  # T tensors, [V], [V, V], ...: log-probs, normalised over the last dimension


def tree(seed: int) -> Tree:
    """A random policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn([V] * (t + 1), generator=generator).double() for t in range(T)]
    return [x.log_softmax(-1) for x in logits]


def tokens(policy: Tree) -> Tensor:
    """[N, T]: log-prob of every token of every response."""
    wide = [x.reshape(x.shape + (1,) * (T - 1 - t)).expand([V] * T) for t, x in enumerate(policy)]
    return torch.stack([x.reshape(N) for x in wide], dim=1)


def verdicts(seed: int) -> Tensor:
    """[N]: 0 or 1; all responses that begin with token 0 are wrong, those with 1 1 right."""
    rewards = torch.rand(V, V, V, generator=torch.Generator().manual_seed(seed)).lt(0.5).double()
    rewards[0], rewards[1, 1] = 0, 1
    return rewards.reshape(N)


def given_prefix(values: Tensor, base: Tree) -> list[Tensor]:
    """E_base[values | first t tokens], for t = 0 ... T, each spread over the responses -> [N]."""
    weights, found = tokens(base).sum(1).exp(), []
    for t in range(T + 1):
        shape = (V**t, V ** (T - t))
        mean = (values * weights).reshape(shape).sum(1) / weights.reshape(shape).sum(1)
        found.append(mean[:, None].expand(shape).reshape(N))
    return found


def tilt(base: Tree, values: Tensor) -> Tree:
    """The policy base(y) exp(values(y)) / Z, as probabilities of its tokens."""
    whole = (tokens(base).sum(1) + values).log_softmax(0).reshape([V] * T)
    prefixes = [whole.flatten(t).logsumexp(-1) for t in range(T)] + [whole]
    return [prefixes[t + 1] - prefixes[t][..., None] for t in range(T)]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def responses(policy: Tree, base: Tree, rewards: Tensor) -> stage1_extreme.LossInputs:
    """Every response once, as stage 1's objectives see them; V* is exact."""
    soft_value = BETA * given_prefix((rewards / BETA).exp(), base)[0].log()
    return stage1_extreme.LossInputs(
        tokens(policy).reshape(-1), tokens(base).reshape(-1), torch.ones(N * T, dtype=torch.bool),
        torch.arange(N).repeat_interleave(T), rewards, torch.zeros(N).double(), soft_value,
        given_prefix(rewards, base)[0], torch.zeros(N * T).double(),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The log-ratio as implicit reward


@pytest.mark.parametrize("seed", SEEDS)
def test_the_tilted_base_is_the_optimum(seed):
    """E R - beta KL(policy || base) = V* - beta KL(policy || optimum), for every policy."""
    base, rewards = tree(seed), verdicts(seed)
    best = tokens(tilt(base, rewards / BETA)).sum(1)
    value = BETA * given_prefix((rewards / BETA).exp(), base)[0][0].log()
    assert torch.allclose(BETA * (best - tokens(base).sum(1)), rewards - value)
    for other in range(10, 20):
        policy = tokens(tree(other)).sum(1)
        objective = (policy.exp() * rewards).sum() - BETA * kl(policy, tokens(base).sum(1))
        assert objective.item() == pytest.approx((value - BETA * kl(policy, best)).item())
    p = given_prefix(rewards, base)[0][0]
    assert value.item() == pytest.approx(BETA * math.log(p * math.exp(1 / BETA) + 1 - p))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_every_log_ratio_obeys(seed):
    """E_base exp(S) = 1 and E_base S = -KL(base || policy), whatever the policy."""
    base, policy = tokens(tree(seed)).sum(1), tokens(tree(seed + 10)).sum(1)
    total = policy - base
    assert (base.exp() * total.exp()).sum().item() == pytest.approx(1)
    assert (base.exp() * total).sum().item() == pytest.approx(-kl(base, policy).item())


def test_only_one_target_can_be_met():
    """mse ends at the optimum with R - V*; the other targets ask for E_base exp(S) above 1."""
    base, rewards = tree(0), verdicts(0)
    logits = [x.clone().requires_grad_() for x in base]
    solver = torch.optim.LBFGS(logits, max_iter=60, tolerance_grad=1e-12, tolerance_change=1e-14,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        x = responses([z.log_softmax(-1) for z in logits], base, rewards)
        value = stage1_extreme.mse_loss(x, **STAGE1)[0]
        value.backward()
        return value

    assert solver.step(loss) > 1 and loss() < 1e-9
    best = tilt(base, rewards / BETA)
    assert torch.allclose(tokens([z.log_softmax(-1) for z in logits]), tokens(best), atol=1e-4)
    x, weights = responses(base, base, rewards), tokens(base).sum(1).exp()
    targets = {"verdict": rewards, "centred": rewards - x.group_means,
               "soft_value": rewards - x.soft_values}  # fmt: skip
    mass = {name: (weights * (t / BETA).exp()).sum().item() for name, t in targets.items()}
    assert mass["soft_value"] == pytest.approx(1)
    assert mass["verdict"] > mass["centred"] > 1.05
    assert (weights * targets["soft_value"]).sum() < 0  # V* above the pass rate: most must fall


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_first_step_moves_tokens_by_the_chance_of_success(loss):
    """One number for a whole response, yet in the mean over the base's samples the logit of token v
    at a prefix moves by base(prefix, v) (q(prefix, v) - q(prefix)), q the chance of success."""
    base, rewards = tree(1), verdicts(1)
    logits = [x.clone().requires_grad_() for x in base]
    weights, total = tokens(base).sum(1).exp(), 0.0
    for s in range(N):  # the loss is a sum over responses: each by itself, weighted by the base
        x = responses([z.log_softmax(-1) for z in logits], base, rewards)
        own = x.sequence_ids == s
        one = stage1_extreme.LossInputs(
            x.policy_logprobs[own], x.behavior_logprobs[own], x.response_mask[own],
            torch.zeros(T, dtype=torch.long), x.rewards[s : s + 1], x.advantages[s : s + 1],
            x.soft_values[s : s + 1], x.group_means[s : s + 1], x.entropy[own],
        )  # fmt: skip
        total = total + weights[s] * stage1_extreme.LOSSES[loss][0](one, **STAGE1)[0]
    grads = torch.autograd.grad(total, logits)
    chance, reached = given_prefix(rewards, base), 1.0
    for t in range(T):
        grad = grads[t].reshape(-1, 1).expand(-1, V ** (T - 1 - t)).reshape(N)
        reached = reached * tokens(base)[:, t].exp()
        factor = BETA if loss == "ce" else 2 * BETA
        assert torch.allclose(-grad, factor * reached * (chance[t + 1] - chance[t]), atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Credit per token


@pytest.mark.parametrize("seed", SEEDS)
def test_token_log_ratio_is_the_step_of_the_soft_value(seed):
    base, rewards = tree(seed), verdicts(seed)
    log_ratio = tokens(tilt(base, rewards / BETA)) - tokens(base)
    values = [BETA * m.log() for m in given_prefix((rewards / BETA).exp(), base)]
    steps = torch.stack([after - before for before, after in zip(values, values[1:], strict=False)])
    assert torch.allclose(BETA * log_ratio, steps.T)
    assert torch.allclose(values[-1], rewards)  # the last value is the verdict
    chance = torch.stack(given_prefix(rewards, base), dim=1)  # [N, T + 1]
    moved = chance.diff(dim=1)
    assert (moved.abs() > 1e-3).any(1).all()
    clear = moved.abs() > 1e-9
    assert torch.equal(log_ratio[clear].sign(), moved[clear].sign())
    decided = (chance[:, :-1] < 1e-12) | (chance[:, :-1] > 1 - 1e-12)
    assert decided.any() and log_ratio[decided].abs().max() < 1e-12  # no credit, no blame after it


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_sums_of_any_policy_are_its_own_soft_values(seed):
    """sum_{i <= t} log_ratio_i = log E_base[exp(S) | first t tokens]: no optimum is needed."""
    base, policy = tree(seed), tree(seed + 10)
    log_ratio = tokens(policy) - tokens(base)
    soft = torch.stack(given_prefix(log_ratio.sum(1).exp(), base)).log()
    assert torch.allclose(log_ratio.cumsum(1), soft[1:].T)


@pytest.mark.parametrize("seed", SEEDS)
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


def test_a_ruined_policy_can_rank_the_responses_of_the_base():
    """Accuracy weighs responses by exp(S), the AUC does not: one rare response ruins the first."""
    rewards = (torch.arange(1000) < 500).double()
    total = torch.where(rewards > 0, 2.0, -2.0).double()
    total[-1] = 12.0  # a wrong response, of base probability 0.001
    base = torch.full((1000,), -math.log(1000)).double()
    policy = (base + total).log_softmax(0)
    assert (policy.exp() * rewards).sum() < 0.03
    assert kl(policy, base) > 6
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
    assert kl(policy, base).item() == pytest.approx(bound)
    assert kl(base, policy).item() == pytest.approx(bound)


def test_a_clip_of_the_sampled_token_is_no_bound():
    """docs/stage2.md: the same target of -3 costs 8.6 nats at p = 0.9999 and 0.04 at p = 0.05."""
    p = torch.tensor([0.9999, 0.05]).double()
    cost = stage2_distill.bernoulli_kl(p.log() - 3, p.log())
    assert cost.tolist() == pytest.approx([8.6, 0.04], abs=0.05)
    assert cost[0] > 3 * math.tanh(1.5)  # what a clip of the whole vocabulary would bound
    bounds = {"signal_scale": 1.0, "signal_clip": 3.0, "signal_floor": 0.0, "token_kl": 0.2}
    target = stage2_distill.bounded_target(torch.full((2,), -9.0).double(), p.log(), **bounds)
    assert target.tolist() == [0, -3]


def test_regression_has_an_end_and_pg_a_speed():
    """One sampled token each of four coins, signals of 0.05 to 0.2: after many steps the
    regression stands at its targets, the policy gradient at its clip, whatever the signal."""
    base = torch.full((4,), 0.5).double().log()
    signal = torch.tensor([0.05, 0.1, 0.15, 0.2]).double()
    mask = torch.ones(4, dtype=torch.bool)
    ends, first = {}, {}
    for name in ("regression", "pg"):
        logit = torch.zeros(4).double().requires_grad_()
        for step in range(400):
            x = stage2_distill.DistillInputs(
                torch.nn.functional.logsigmoid(logit), base, base, signal, mask, signal * 0
            )
            loss = stage2_distill.OBJECTIVES[name](x, **STAGE2)[0]
            (grad,) = torch.autograd.grad(loss, logit)
            if step == 0:
                first[name] = grad
            logit = (logit - 0.2 * grad).detach().requires_grad_()
        ends[name] = torch.nn.functional.logsigmoid(logit) - base
    assert torch.allclose(first["regression"], 2 * first["pg"])  # the same direction at the start
    assert torch.allclose(ends["regression"], signal, atol=1e-6)
    assert (ends["pg"].exp() > 1.28).all() and (ends["pg"].exp() < 1.32).all()


# --------------------------------------------------------------------------------------------------
# KL estimators

# name -> (of log-ratio u = log policy - log base and v = u without gradient; value, gradient)
ESTIMATORS = {
    "base": {
        "-u": (lambda u, v: -u, "forward", "forward"),
        "r - 1 - u": (lambda u, v: common.kl_penalty(u, "forward"), "forward", "forward"),
        "r u - r + 1": (lambda u, v: common.kl_penalty(u, "reverse"), "reverse", "reverse"),
        "u^2 / 2": (lambda u, v: u.square() / 2, None, None),
    },
    "policy": {
        "k1": (lambda u, v: u, "reverse", "zero"),
        "k2": (lambda u, v: u.square() / 2, None, "reverse"),
        "k3": (lambda u, v: (-u).exp() - 1 + u, "reverse", "forward"),
        "k1 as reward": (lambda u, v: v * (u - v), None, "reverse"),
        "k3 as reward": (lambda u, v: ((-v).exp() - 1 + v) * (u - v), None, "difference"),
        "k3 times the live ratio": (
            lambda u, v: (u - v).exp() * ((-u).exp() - 1 + u), "reverse", "reverse",
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(("samples", "name"), [(s, n) for s in ESTIMATORS for n in ESTIMATORS[s]])
def test_kl_estimators(samples, name):
    """Value and gradient in the mean over samples of the base, or of the policy as it is now."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, generator=generator).double().log_softmax(-1)
    logits = torch.randn(6, generator=generator).double().requires_grad_()
    policy = logits.log_softmax(-1)
    estimator, value, gradient = ESTIMATORS[samples][name]
    u = policy - base
    drawn = (base if samples == "base" else policy.detach()).exp()
    mean = (drawn * estimator(u, u.detach())).sum()
    exact = {"forward": kl(base, policy), "reverse": kl(policy, base)}
    for direction, true in exact.items():
        assert (abs(mean.item() - true.item()) < 1e-9) == (value == direction)
    slopes = {k: torch.autograd.grad(v, logits, retain_graph=True)[0] for k, v in exact.items()}
    slopes |= {"zero": torch.zeros(6).double(), "difference": slopes["reverse"] - slopes["forward"]}
    ours = torch.autograd.grad(mean, logits)[0]
    for kind, slope in slopes.items():
        assert torch.allclose(ours, slope, atol=1e-9) == (gradient == kind), kind


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_at_the_prefixes_of_the_base(seed):
    """forward: token by token on the base's responses it is the KL of whole responses; reverse: not
    so, for that KL is over the policy's own prefixes."""
    base, policy = tree(seed), tree(seed + 10)
    whole_base, whole_policy = tokens(base).sum(1), tokens(policy).sum(1)
    log_ratio = tokens(policy) - tokens(base)
    proxy = {d: (whole_base.exp() * common.kl_penalty(log_ratio, d).sum(1)).sum().item()
             for d in ("forward", "reverse")}  # fmt: skip
    assert proxy["forward"] == pytest.approx(kl(whole_base, whole_policy).item())
    assert abs(proxy["reverse"] - kl(whole_policy, whole_base).item()) > 1e-4
    steps = [kl(p, b) for p, b in zip(policy, base, strict=True)]  # at each prefix
    reached = [torch.ones(()).double()]
    for p in policy[:-1]:
        reached.append(reached[-1][..., None] * p.exp())
    own = sum((w * k).sum() for w, k in zip(reached, steps, strict=True))
    assert own.item() == pytest.approx(kl(whole_policy, whole_base).item())


# --------------------------------------------------------------------------------------------------
# The limit


@pytest.mark.parametrize("seed", SEEDS)
def test_no_policy_is_below_the_limit(seed):
    """KL(policy || base) >= d(a || p) for each problem, and for means over problems."""
    problems = [(tree(10 * seed + i), verdicts(10 * seed + i)) for i in range(4)]
    rates = torch.stack([given_prefix(r, b)[0][0] for b, r in problems])
    for other in range(50):
        policies = [tree(100 + 4 * other + i) for i in range(4)]
        if other % 2:  # near the best ones, not only far from them
            policies = [tilt(b, r * other / 10 + 0.05 * tokens(policy).sum(1))
                        for policy, (b, r) in zip(policies, problems, strict=True)]  # fmt: skip
        whole = [tokens(policy).sum(1) for policy in policies]
        paid = torch.stack([kl(w, tokens(b).sum(1))
                            for w, (b, _) in zip(whole, problems, strict=True)])  # fmt: skip
        accuracy = torch.stack([(w.exp() * r).sum()
                                for w, (_, r) in zip(whole, problems, strict=True)])  # fmt: skip
        each = evaluate.least_kl(accuracy, rates)
        assert (paid >= each - 1e-12).all()
        assert each.mean() >= evaluate.least_kl(accuracy.mean(), rates.mean()) - 1e-12


def test_the_tilted_base_buys_the_most_accuracy():
    """At every price of a nat, no choice of accuracies (each at its own least KL) does better."""
    rates = torch.tensor([0.05, 0.3, 0.6, 0.95]).double()
    others = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)).double()
    paid = evaluate.least_kl(others, rates).mean(1)
    for eta in (0.5, 1.0, 2.0, 5.0):
        accuracy, spent = evaluate.tilted_optimum(rates, torch.tensor([eta]))
        assert (others.mean(1) - paid / eta).max() <= (accuracy - spent / eta).item() + 1e-12
        assert evaluate.kl_efficiency(accuracy, rates.mean(), spent) < 0.97  # rates differ


def test_correcting_every_step_alike_costs_more_than_the_optimum():
    """Six steps that slip with 0.2 each: all brought to 0.02, against the tilted base."""
    n, slip, better = 6, 0.2, 0.02
    rate, accuracy = (torch.tensor((1 - s) ** n).double() for s in (slip, better))
    coin = [torch.tensor(1 - s).double() for s in (better, slip)]
    paid = n * evaluate.least_kl(*coin)
    assert (accuracy.item(), paid.item()) == pytest.approx((0.886, 0.917), abs=1e-3)
    assert evaluate.kl_efficiency(accuracy, rate, paid).item() == pytest.approx(0.944, abs=1e-3)
    # The optimum of the same accuracy: slips rarer towards the end; after one it is the base.
    weight = accuracy * (1 - rate) / (rate * (1 - accuracy))  # exp(eta)
    chances = [(1 - slip) ** (n - k) for k in range(n)]  # of success, before step k
    slips = [slip / (1 + q * (weight.item() - 1)) for q in chances]
    assert slips == sorted(slips, reverse=True)
    assert (slips[0], slips[-1]) == pytest.approx((0.031, 0.011), abs=5e-4)
    assert math.prod(1 - s for s in slips) == pytest.approx(accuracy.item())
