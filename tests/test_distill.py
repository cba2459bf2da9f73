"""Stage 2: objectives, trust region, clones and the KL penalty, against exact values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import common
import stage2_distill
from common import chunked_kl, kl_penalty
from stage2_distill import (
    Args,
    DistillInputs,
    bernoulli_kl,
    bounded_target,
    diagnostics,
    print_targets,
    split_problems,
)  # fmt: skip

SETTINGS = vars(Args(base="b", rollouts=Path("r"), output=Path("o")))
SETTINGS |= {"clip_low": 0.2, "clip_high": 0.28}
BOUNDS = {"signal_scale": 1.0, "signal_clip": 2.0, "signal_floor": 0.0, "token_kl": math.inf}
T = torch.tensor([0.5, 0.5], dtype=torch.float64)
S = torch.tensor([0.9, 0.1], dtype=torch.float64)


def call(name, x, **changes):
    """The objective with fixed settings, changed where asked."""
    return stage2_distill.OBJECTIVES[name](x, **(SETTINGS | changes))


def inputs(policy, base, signal, behavior=None, teacher_kl=None):
    """Response tokens behind two prompt tokens, float64; the signal clipped at 2."""
    zeros = [0.0, 0.0]
    double = lambda values: torch.tensor(zeros + list(values), dtype=torch.float64)  # noqa: E731
    n = len(policy)
    return DistillInputs(
        double(policy).requires_grad_(), double(base if behavior is None else behavior),
        double(base), bounded_target(double(signal), double(base), **BOUNDS),
        torch.tensor([False, False] + [True] * n),
        double(teacher_kl or [0.0] * n),
    )  # fmt: skip


def gradient(name, x, **changes):
    """Value, d loss / d policy_logprobs at the response tokens; exactly zero at the prompt's."""
    loss, _ = call(name, x, **changes)
    (grad,) = torch.autograd.grad(loss, x.policy_logprobs)
    assert (grad[~x.response_mask] == 0).all()
    return loss.item(), grad[x.response_mask].tolist()


# --------------------------------------------------------------------------------------------------
# Regression


def test_regression_is_zero_at_its_target():
    x = inputs([-0.5, -1.7, -3.0], [-1.0, -1.2, -1.0], [0.5, -0.5, -5.0])
    assert gradient("regression", x) == (pytest.approx(0), pytest.approx([0] * 3))


def test_regression_gradient_is_twice_the_error():
    x = inputs([-0.5, -1.7], [-1.0, -1.2], [0.2, 0.3])
    value, grad = gradient("regression", x)
    assert value == pytest.approx(0.3**2 + 0.8**2)
    assert grad == pytest.approx([0.6, -1.6])


def test_zero_signal_holds_the_base():
    base = [-1.0, -0.3]
    assert gradient("regression", inputs(base, base, [0.0, 0.0])) == (0, [0, 0])
    value, grad = gradient("regression", inputs([-0.9, -0.6], base, [0.0, 0.0]))
    assert value == pytest.approx(0.01 + 0.09)
    assert grad == pytest.approx([0.2, -0.6])  # descent goes back to the base


def test_regression_is_against_the_base_not_the_sampler():
    x = inputs([-1.0], [-1.0], [0.0], behavior=[-5.0])
    assert gradient("regression", x) == (0, [0])


def test_bounded_target_clips_and_drops_what_is_small():
    signal, base = torch.tensor([-9.0, -1.0, 0.0, 0.4, 1.0, 9.0]), torch.full((6,), -4.0)
    for scale, floor, expected in [
        (1.5, 0.0, [-2, -1.5, 0, 0.6, 1.5, 2]),
        (-1.0, 0.0, [2, 1, 0, -0.4, -1, -2]),
        (1.5, 0.7, [-2, -1.5, 0, 0, 1.5, 2]),  # what carries no verdict is held at the base
    ]:
        settings = BOUNDS | {"signal_scale": scale, "signal_floor": floor}
        assert bounded_target(signal, base, **settings).tolist() == pytest.approx(expected)


def test_bernoulli_kl_equals_the_formula_and_the_binary_distribution():
    a, p = torch.tensor([0.5, 0.01, 0.9, 0.3]).double(), torch.tensor([0.9, 0.2, 0.1, 0.3]).double()
    coin = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(coin(a), coin(p))
    assert bernoulli_kl(a.log(), p.log()).tolist() == pytest.approx(expected.tolist())
    assert bernoulli_kl(a.log(), p.log())[0].item() == pytest.approx(0.5 * math.log(0.25 / 0.09))


def test_bernoulli_kl_is_the_least_of_all_distributions_with_that_token():
    torch.manual_seed(0)
    base = torch.rand(6, dtype=torch.float64).softmax(0)
    moved = torch.rand(1000, 6, dtype=torch.float64).softmax(1)
    whole = (moved * (moved / base).log()).sum(1)
    assert (bernoulli_kl(moved[:, 0].log(), base[0].log()) <= whole).all()
    scaled = base * (0.9 / (1 - base[0]))  # the rest in proportion: the bound is met
    scaled[0] = 0.1
    least = bernoulli_kl(torch.tensor(0.1).double().log(), base[0].log())
    assert (scaled * (scaled / base).log()).sum().item() == pytest.approx(least.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_kl_is_finite_at_the_edges(dtype):
    logprobs = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -50.0, -1e4, 3.0], dtype=dtype)
    cost = bernoulli_kl(logprobs[:, None], logprobs[None])
    assert cost.isfinite().all()
    assert (cost >= -1e-6).all()
    assert cost.diagonal().abs().max() == 0


def test_token_kl_holds_forced_tokens_and_lets_rare_ones_go():
    """The same target: costly where the base is sure, nearly free where the token is rare."""
    base = torch.tensor([0.9999, 0.5, 0.05, 0.9999]).log()
    signal = torch.tensor([-2.0, -2.0, -2.0, 0.0])
    bounded = bounded_target(signal, base, **(BOUNDS | {"token_kl": 0.2}))
    assert bounded.tolist() == [0, 0, -2, 0]  # d(.0677 || .5) = .45 nats; d(.0068 || .05) = .03
    wider = bounded_target(signal, base, **(BOUNDS | {"token_kl": 0.5}))
    assert wider.tolist() == [0, -2, -2, 0]
    assert bounded_target(signal, base, **BOUNDS).tolist() == [-2, -2, -2, 0]


def test_what_the_targets_keep_is_printed(rollouts, ranks, capsys):
    args = Args(base="b", rollouts=Path("r"), output=Path("o"), signal_clip=2.0, token_kl=0.2)
    mask = rollouts.response_mask
    signal = torch.zeros(len(mask))
    signal[mask.nonzero()[:4, 0]] = torch.tensor([-3.0, 0.5, -3.0, 0.0])
    base = torch.full_like(signal, -4.0)
    base[mask.nonzero()[2, 0]] = -1e-4
    target = bounded_target(signal, base, **vars(args))
    print_targets(args, signal, target, rollouts, ranks)
    n = int(mask.sum())
    said = capsys.readouterr().out
    for part in (f"targets: {2 / n:.1%} of response tokens get one ({1 / n:.1%} down)",
                 f"{1 / n:.1%} clipped at 2", f"--token-kl 0.2: {1 / n:.1%}"):  # fmt: skip
        assert part in said


# --------------------------------------------------------------------------------------------------
# Clipped policy gradient


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1, 0.5, -0.5, -0.5), (1, 1, -1, -1), (1, 1.25, -1.25, -1.25), (1, 1.35, -1.28, 0),
     (-1, 0.5, 0.8, 0), (-1, 1, 1, 1), (-1, 1.35, 1.35, 1.35), (0.5, 1, -0.5, -0.5),
     (9, 1, -2, -2)],
)  # fmt: skip
def test_pg_clips_only_where_it_would_go_further(advantage, ratio, loss, slope):
    x = inputs([math.log(ratio) - 2], [-2.0], [advantage])
    value, grad = gradient("pg", x)
    assert value == pytest.approx(loss)
    assert grad == pytest.approx([slope])
    assert call("pg", x)[1]["clip_share"].tolist() == [int(slope == 0), 1]


def test_pg_sums_tokens_with_gradient_minus_advantage_at_ratio_one():
    lp = [-0.1, -2.0, -3.0, -0.4]
    value, grad = gradient("pg", inputs(lp, lp, [0.3, -0.7, 0.0, 1.5]))
    assert value == pytest.approx(-1.1)
    assert grad == pytest.approx([-0.3, 0.7, 0, -1.5])


def test_pg_ratio_is_against_the_sampler_not_the_base():
    x = inputs([-1.0], [-3.0], [1.0], behavior=[-1.0])
    assert gradient("pg", x) == (pytest.approx(-1), pytest.approx([-1]))
    assert call("pg", inputs([-1.0], [-1.0], [1.0], behavior=[-3.0]))[1]["clip_share"][0] == 1


def test_prob_mask_drops_what_moved_too_far_in_the_signals_direction():
    """Probability moves of +.3, +.1, -.3, -.1 under either sign of the signal; mask .2."""
    log = lambda values: [math.log(v) for v in values]  # noqa: E731
    now, then = log([0.8, 0.6, 0.2, 0.4] * 2), log([0.5] * 8)
    x = inputs(now, then, [1.0] * 4 + [-1.0] * 4)
    wide = {"clip_low": 0.99, "clip_high": 9.0}  # no ratio clip: what is dropped is the mask's
    _, grad = gradient("pg", x, prob_mask=0.2, **wide)
    ratios = [1.6, 1.2, 0.4, 0.8]
    assert grad == pytest.approx([0, -1.2, -0.4, -0.8, 1.6, 1.2, 0, 0.8])
    assert call("pg", x, prob_mask=0.2, **wide)[1]["clip_share"].tolist() == [2, 8]
    _, free = gradient("pg", x, prob_mask=None, **wide)
    assert free == pytest.approx([-r for r in ratios] + ratios)


def test_prob_mask_measures_the_move_from_the_sampler():
    x = inputs([math.log(0.8)], [math.log(0.1)], [1.0], behavior=[math.log(0.79)])
    assert gradient("pg", x, prob_mask=0.2)[1] != [0]


# --------------------------------------------------------------------------------------------------
# Clones: whole-vocabulary divergences


def exact_kl(p, q):
    return (p * (p / q).log()).sum(-1)


def as_head(probs):
    """hidden, weight whose product is log probs: an identity matrix as output matrix."""
    return probs.log()[None], torch.eye(len(probs), dtype=torch.float64)


def test_exact_kl_values():
    assert chunked_kl(*as_head(T), *as_head(S), 1.0).item() == pytest.approx(0.510826, abs=1e-6)
    assert chunked_kl(*as_head(S), *as_head(T), 1.0).item() == pytest.approx(0.368064, abs=1e-6)


def test_kl_is_of_the_tempered_distributions():
    squared = lambda p: p**2 / (p**2).sum()  # noqa: E731
    value = chunked_kl(*as_head(T), *as_head(S), 0.5).item()
    assert value == pytest.approx(exact_kl(squared(T), squared(S)).item())


@pytest.mark.parametrize("chunk", [1, 30, 10**6])  # elements: one token, four tokens, all at once
def test_chunked_kl_equals_the_naive_formula(chunk, monkeypatch):
    monkeypatch.setattr(common, "HEAD_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in ((9, 4), (7, 4), (9, 5), (7, 5))]  # fmt: skip
    p, p_weight, q, q_weight = tensors
    value = chunked_kl(*tensors, 1.3)
    log_p, log_q = ((h @ w.T / 1.3).log_softmax(-1) for h, w in ((p, p_weight), (q, q_weight)))
    naive = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(value, naive, atol=1e-12)
    along = torch.randn(9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(v @ along, tensors) for v in (value, naive))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_clones_have_the_direction_they_are_named_after(
    objective, policy, other_policy, rollouts, monkeypatch
):
    """forward: KL(teacher || student), reverse: KL(student || teacher), at each response token, and
    gradients of the student alone; several chunks, temperature not 1."""
    monkeypatch.setattr(common, "HEAD_CHUNK_ELEMENTS", 5 * policy.lm.config.vocab_size)
    row = common.make_row(rollouts, [8, 9, 13], torch.device("cpu"))
    logprobs, entropy, kl = stage2_distill.forward_row(policy, other_policy, row, 0.8, objective)
    x = DistillInputs(logprobs, *(torch.zeros_like(entropy) for _ in range(3)),
                      row.response_mask, kl)  # fmt: skip
    loss, _ = call(objective, x)
    loss.backward()
    grads = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    def naive(model):
        hidden, weight = model(row, lambda h, w: (h, w))
        return (hidden @ weight.T / 0.8).log_softmax(-1)

    student, teacher = naive(policy), naive(other_policy)
    p, q = (teacher, student) if objective == "forward_kl" else (student, teacher)
    expected = (p.exp() * (p - q)).sum(-1)
    assert (kl[~row.response_mask] == 0).all()
    assert torch.allclose(kl[row.response_mask], expected, atol=1e-5)
    expected.sum().backward()
    for grad, parameter in zip(grads, policy.parameters(), strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in other_policy.parameters())


def test_reverse_kl_gradient_by_finite_differences():
    """At S = [.9, .1] against T = [.5, .5] the logit gradient is .19775 (.4 for the forward KL)."""
    logits = S.log()[None].clone().requires_grad_()
    eye = torch.eye(2, dtype=torch.float64)
    reverse = lambda z: chunked_kl(z, eye, T.log()[None], eye, 1.0).sum()  # noqa: E731
    forward = lambda z: chunked_kl(T.log()[None], eye, z, eye, 1.0).sum()  # noqa: E731
    for divergence, slope in ((reverse, 0.19775), (forward, 0.4)):
        (grad,) = torch.autograd.grad(divergence(logits), logits)
        step = torch.tensor([[1e-6, 0.0]], dtype=torch.float64)
        central = (divergence(logits + step) - divergence(logits - step)) / 2e-6
        assert grad[0, 0].item() == pytest.approx(slope, abs=1e-5)
        assert grad[0, 0].item() == pytest.approx(central.item(), abs=1e-7)


def test_cloning_oneself_costs_nothing(policy, rollouts):
    row = common.make_row(rollouts, [8, 9], torch.device("cpu"))
    kl = stage2_distill.forward_row(policy, policy, row, 1.0, "reverse_kl")[2]
    assert kl.abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------
# KL penalty


def test_kl_penalty_values():
    d = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    assert kl_penalty(d, "forward").tolist() == pytest.approx([0, 0.148721, 0.106531], abs=1e-6)
    assert kl_penalty(d, "reverse").tolist() == pytest.approx([0, 0.175639, 0.090204], abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_penalty_is_never_negative_and_flat_at_the_base(direction):
    d = torch.linspace(-30, 30, 601, dtype=torch.float64)
    assert (kl_penalty(d, direction) >= 0).all()
    fine = torch.linspace(-1e-3, 1e-3, 401)  # float32: rounding only
    assert kl_penalty(fine, direction).min() > -3e-7
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    kl_penalty(zero, direction).backward()
    assert zero.grad.item() == 0
    for extreme in (1e4, -1e4):
        x = torch.tensor([extreme], requires_grad=True)
        value = kl_penalty(x, direction)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_penalty_is_exact_in_mean_under_the_base(direction):
    """Enumeration over a vocabulary of 6: value and gradient, the tokens drawn from the base."""
    torch.manual_seed(0)
    base = torch.randn(6, dtype=torch.float64).softmax(-1)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    log_ratio = logits.log_softmax(-1) - base.log()
    estimate = (base * kl_penalty(log_ratio, direction)).sum()
    policy = logits.softmax(-1)
    exact = exact_kl(base, policy) if direction == "forward" else exact_kl(policy, base)
    assert estimate.item() == pytest.approx(exact.item())
    ours, true = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (estimate, exact))
    assert torch.allclose(ours, true, atol=1e-12)
    assert true.abs().max() > 0.01


def test_kl_proxy_is_the_mean_over_responses(policy, other_policy, rollouts, ranks):
    args = Args(base="b", rollouts=Path("r"), output=Path("o"), micro_batch_tokens=30)
    held_out = torch.tensor([3, 8, 9, 17])
    base, student = (
        common.score(p.requires_grad_(False), rollouts, 1.0, 10**6, ranks, "")
        for p in (other_policy, policy)
    )
    proxy = stage2_distill.measure_kl_proxy(policy, rollouts, held_out, base, 1.0, args, ranks)[0]
    total, ids = 0.0, rollouts.sequence_ids
    for s in held_out.tolist():
        d = (student - base)[(ids == s) & rollouts.response_mask].double()
        total += (d.exp() - 1 - d).sum().item()
    assert proxy == pytest.approx(total / 4, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Everything else


def test_inputs_are_left_unchanged():
    for name in stage2_distill.OBJECTIVES:
        x = inputs([-0.5, -1.7], [-1.0, -1.2], [0.2, -9.0], teacher_kl=[0.3, 0.1])
        x.teacher_kl.requires_grad_()
        before = {field: value.detach().clone() for field, value in vars(x).items()}
        call(name, x, prob_mask=0.2)[0].backward()
        diagnostics(x, torch.ones(4))
        kl_penalty(x.policy_logprobs, "forward")
        bounded_target(x.target, x.base_logprobs, **(BOUNDS | {"signal_clip": 0.1}))
        assert all(torch.equal(before[field], value) for field, value in vars(x).items())


def test_clamped_exponentials_leave_their_argument_unchanged():
    log_ratio = torch.tensor([-1e4, -1.0, 0.0, 25.0])
    before = log_ratio.clone()
    common.safe_exp(log_ratio)
    for direction in ("forward", "reverse"):
        kl_penalty(log_ratio, direction)
    assert torch.equal(log_ratio, before)
    # The clamp stands inside exp only: in the sum the log-ratio keeps its size.
    assert kl_penalty(log_ratio, "forward")[0].item() == pytest.approx(9999, abs=0.01)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
@pytest.mark.parametrize("name", ["regression", "pg"])
def test_extreme_log_ratios_stay_finite(name, extreme):
    """The policy, then the base, 10,000 nats below the other; signals just as extreme."""
    low, high = -1e4, -0.5
    policy, base = (high, low) if extreme > 0 else (low, high)
    for signal in (1e4, -1e4, 0.0):
        x = inputs([policy], [base], [signal])
        x = DistillInputs(*(v.float() if v.is_floating_point() else v for v in vars(x).values()))
        x.policy_logprobs.retain_grad()
        loss, _ = call(name, x, prob_mask=0.2)
        loss.backward()
        assert loss.isfinite()
        assert x.policy_logprobs.grad.isfinite().all()


@pytest.mark.parametrize("name", ["regression", "pg"])
def test_gradcheck(name):
    torch.manual_seed(0)
    policy, base, signal = (-torch.rand(8) - 0.1, -torch.rand(8) - 0.1, torch.randn(8))
    x = inputs(policy.tolist(), base.tolist(), signal.tolist())

    def loss(policy_logprobs):
        return call(name, DistillInputs(policy_logprobs, *list(vars(x).values())[1:]))[0]

    assert torch.autograd.gradcheck(loss, (x.policy_logprobs,))


def test_diagnostics_equal_brute_force():
    x = inputs([-0.5, -1.7, -0.2, -0.9], [-1.0, -1.2, -0.2, -1.0], [0.5, -5.0, 0.0, 2.5])
    entropy = torch.tensor([9.0, 9.0, 0.1, 0.2, 0.3, 0.4])
    means = {k: (v[0] / v[1]).item() for k, v in diagnostics(x, entropy).items()}
    assert means == pytest.approx({
        "ratio": sum(math.exp(d) for d in (0.5, -0.5, 0, 0.1)) / 4, "entropy": 0.25,
        "target_share": 0.75, "log_ratio_credit": 0.3, "log_ratio_blame": -0.5,
    })  # fmt: skip


@pytest.mark.parametrize(("share", "held"), [(0.05, 1), (0.2, 1), (0.4, 2), (0.7, 4)])
def test_split_never_puts_a_problem_on_both_sides(share, held, rollouts):
    choices = set()
    for seed in range(5):
        trained, held_out = split_problems(rollouts, share, seed)
        index = rollouts.problem_index
        ours, theirs = set(index[trained].tolist()), set(index[held_out].tolist())
        assert not ours & theirs
        assert len(theirs) == held
        both = torch.cat([trained, held_out]).sort().values
        assert torch.equal(both, torch.arange(len(rollouts.rewards)))  # every response, once
        again = split_problems(rollouts, share, seed)
        assert torch.equal(trained, again[0])
        choices.add(tuple(sorted(theirs)))
    assert len(choices) > 1  # the seed decides


def test_split_refuses_to_leave_nothing(rollouts):
    with pytest.raises(common.UserError, match="kl-holdout"):
        split_problems(rollouts, 0.95, 0)


@pytest.mark.parametrize("name", ["regression", "pg", "forward_kl", "reverse_kl"])
def test_a_rank_without_work_adds_nothing(name, policy, other_policy, rollouts):
    row = common.make_row(rollouts, [], torch.device("cpu"))
    teacher = other_policy if name.endswith("kl") else None
    logprobs, entropy, kl = stage2_distill.forward_row(policy, teacher, row, 1.0, name)
    arrays = (torch.full_like(entropy, v) * rollouts.response_mask[row.flat]
              for v in (-0.7, -0.6, 0.4))  # fmt: skip
    x = DistillInputs(logprobs, *arrays, row.response_mask, kl)
    loss, metrics = call(name, x, prob_mask=0.2)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in policy.parameters())
    counted = metrics | diagnostics(x, entropy)
    assert all((value == 0).all() for value in counted.values())
