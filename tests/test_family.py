"""examples/family: objectives, options and divergences against closed forms."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path

import checks
import divergences
import objectives
import pytest
import signals
import stage1
import stage2
import torch
from objectives import BAPO_BOUNDS, OBJECTIVES, OPTIONS, with_options
from test_losses import PATHS, double, inputs

import common
from common import Output


def arguments(**changes):
    return stage1.Args(**PATHS, **changes)


def mixed_inputs(seed=0):
    """Five responses of different lengths, all kinds of verdict, pass rate and ratio."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(n, generator=generator) * 0.5).tolist() for n in (3, 5, 1, 4, 6)]
    x = inputs(rows, [1.0, 0.0, 0.0, 1.0, 0.0], [1.5, -0.5, -1.0, 0.7, 0.0])
    rates = double([0.25, 0.25, 0.4, 0.6, 0.0])
    return dataclasses.replace(x, pass_rates=rates, entropy=x.base_logprobs.exp())


def one(ratio, advantage, pass_rate=0.25):
    return inputs([[math.log(ratio)]], [float(advantage > 0)], [float(advantage)], pass_rate)


def call(name, x, options=False, **changes):
    """Value, gradient on the tokens and metrics."""
    loss = with_options(OBJECTIVES[name]) if options else OBJECTIVES[name]
    value, metrics = loss(x, arguments(**changes))
    (grad,) = torch.autograd.grad(value, x.policy_logprobs)
    return value.item(), grad, metrics


def check(loss, x, args, plain):
    """What every objective must keep (checks.py). Where the value is not the integral of the
    gradient, or a row is not the sum of its parts: finite at extreme ratios, 0 of an empty row."""
    if plain:
        return checks.check_objective(loss, x, args)
    for far in [*checks.shifted(x), checks.with_gradient(checks.empty(x))]:
        value, metrics = loss(far, args)
        value.backward()
        assert value.isfinite() and far.policy_logprobs.grad.isfinite().all()
        assert all(pair.isfinite().all() for pair in metrics.values())
    assert value.item() == 0 and all((pair == 0).all() for pair in metrics.values())


# --------------------------------------------------------------------------------------------------
# Stage 1: the gradient that each objective states, token by token, in plain arithmetic


def clip_slope(r, a, low, high):
    """Of -min(r a, clip(r) a) by log policy: nothing beyond the bound on the side a pushes to."""
    return 0.0 if (a > 0 and r > high) or (a < 0 and r < low) or a == 0 else -a * r


def phi(s, k, scale):
    w = math.exp(min(max(s, math.log(1e-8)), 20))
    return math.exp(scale) * w**k * math.exp(-scale * w)


VARIANTS = {name: (name, {}) for name in OBJECTIVES} | {
    "gspo wide": ("gspo", {"gspo_clip_low": 0.1, "gspo_clip_high": 0.1}),
    "cispo narrow": ("cispo", {"cispo_low": 0.8, "cispo_high": 1.2}),
    "topr mean": ("topr", {"topr_ratio": "mean"}),
    "topr token": ("topr", {"topr_ratio": "token"}),
    "bapo moved": ("bapo", {"bapo_target": 1e9}),
}
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
    "nft": lambda r, g, s, n, a, right, p: (
        (0 < p < 1) * (1 - p) * (-1 if right else p * r / (1 - p * min(r, 1)))
    ),
}
NOT_PLAIN = ("cispo", "topr", "vespo", "nft", "bapo")  # by sg[...], bapo by its search in a row


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_stated_one(variant):
    name, changes = VARIANTS[variant]
    x, on_policy = mixed_inputs(), inputs([[0.0] * 3, [0.0] * 5], [1.0, 0.0], [1.5, -0.5])
    for case in (x, on_policy):
        stated = []
        for t, s in enumerate(case.sequence_ids.tolist()):
            d = case.log_ratio[case.sequence_ids == s].tolist()
            ratios = case.log_ratio[t].exp().item(), math.exp(sum(d) / len(d)), sum(d), len(d)
            of_response = (case.advantages[s], case.rewards[s] > 0, case.pass_rates[s])
            stated.append(float(STATED[variant](*ratios, *(v.item() for v in of_response))))
        assert call(name, case, **changes)[1].tolist() == pytest.approx(stated, abs=1e-12)
    check(OBJECTIVES[name], x, arguments(**changes), name not in NOT_PLAIN)
    # Behind all options together: they leave out tokens and whole responses.
    changes = {"paced": (1.0, 2.0), "ace_alpha": 0.7, "mask_kl": 0.3, "advantages": "group_mean"}
    changes |= {"mask_entropy": 0.3, "spare_floor": 0.3, "spare_ceiling": 0.9}
    check(with_options(OBJECTIVES[name]), x, arguments(**changes), plain=False)


def test_values():
    halves = inputs([[math.log(0.5)] * 2], [0.0], [-1.0])
    for name, case, metric, expected in (
        ("dapo", one(1.35, 1), "clip_share", [1, 1]),
        ("gspo", one(2, 1), "clip_share", [1, 1]),
        ("cispo", one(6, 1), "clip_share", [1, 1]),
        ("topr", halves, "weight_wrong", [0.5, 2]),
        ("vespo", one(2, 1), "weight", [0.1991, 1]),
        ("nft", one(3, -1), "held_share", [1, 1]),
    ):
        assert call(name, case)[2][metric].tolist() == pytest.approx(expected, abs=6e-5)
    assert call("dr_grpo", one(1.35, 1), dr_grpo_length=2)[0] == pytest.approx(-0.64)
    assert call("gspo", one(2, 1))[0] == pytest.approx(-1.0004)
    assert call("nft", one(0.5, -1))[0] == pytest.approx(-0.75 * math.log((1 - 0.125) / 0.75))
    value, grad, _ = call("nft", one(3, -1), nft_negative_weight=0.5)
    assert (value, grad.item()) == (0, pytest.approx(0.5 * 0.25 * 3))  # held at 1, its slope is not


def test_bapo_takes_the_bounds_that_balance():
    """Against a search in plain arithmetic, over many rows and targets."""
    found = set()
    for seed in range(40):
        x, target = mixed_inputs(seed), 0.8 + 0.03 * seed
        ratio, a = x.log_ratio.exp(), x.advantages[x.sequence_ids]
        for low, high in BAPO_BOUNDS:
            right = sum(min(r, high) * v for r, v in zip(ratio, a, strict=True) if v > 0).item()
            wrong = sum(max(r, low) * -v for r, v in zip(ratio, a, strict=True) if v < 0).item()
            if right >= target * wrong:
                break
        metrics = call("bapo", x, bapo_target=target)[2]
        values = [metrics[f"bapo_{k}"].tolist() for k in ("low", "high", "balance")]
        assert [a / b for a, b in values] == pytest.approx([low, high, right / wrong])
        found.add(round(high, 2))
    assert {1.2, 2.0} < found  # at once, never, and in between
    assert call("bapo", one(4, -1))[0] == pytest.approx(3)  # the dual clip


def test_weights_multiply_the_gradient_and_leave_the_value():
    x, weights = mixed_inputs(), double([0.5, 2.0, 0.0, 1.0, 3.0])
    assert all(option(x, arguments()) is x for option in OPTIONS)  # off by default
    changed = objectives.choose_advantages(x, arguments(advantages="group_mean"))
    assert changed.advantages.tolist() == pytest.approx([0.75, -0.25, -0.4, 0.4, 0.0])
    for name, objective in OBJECTIVES.items():
        value, grad, _ = call(name, x)
        loss, _ = objective(objectives.weigh_responses(x, weights), arguments())
        (weighted,) = torch.autograd.grad(loss, x.policy_logprobs)
        assert loss.item() == value
        assert torch.allclose(weighted, grad * weights[x.sequence_ids], atol=1e-14)
    grad = call("reinforce", one(1, 1, 0.25), options=True, paced=(2, 1))[1]
    assert grad.item() == pytest.approx(-0.046875)
    x = inputs([[1.0, 1.0], [1.0, 1.0], [-6.0]], [1.0, 0.0, 0.0], [1.0, -1.0, -1.0])
    found = call("reinforce", x, options=True, ace_alpha=0.5)[1].tolist()
    confident, timid = (1 + 0.5 * math.log1p(math.exp(v)) for v in (2, -6))
    assert found == pytest.approx([-1, -1, confident, confident, timid])


def test_left_out_tokens_do_not_exist():
    x = inputs([[0.5, -0.2, 0.1, 0.3, -2.0], [0.1]], [0.0, 1.0], [-1.0, 1.0])
    x = dataclasses.replace(x, entropy=double([0.1, 0.9, 0.2, 0.3, 0.4, 1.0]))
    masks = {"mask_entropy": 0.2, "mask_kl": 0.2}  # tokens 1 (entropy) and 4 (r = 0.14)
    found = call("topr", x, options=True, **masks)[1].tolist()
    assert found == pytest.approx([1, 0, 1, 1, 0, -1])  # S = 0.9: the weight is 1
    changed = objectives.mask_tokens(x, arguments(**masks))  # a share of 1 token is none
    assert changed.mean_over_tokens(changed.log_ratio).tolist() == pytest.approx([0.3, 0.1])
    gone = objectives.leave_out(x, x.sequence_ids == 0)  # a response without tokens goes
    assert (gone.rewards.tolist(), gone.sequence_ids.tolist()) == ([1.0], [0])
    # r log r - r + 1 is 1 at a log-ratio of +1, 0.48 at -1.6 and 0.9 at -3.
    far = objectives.mask_tokens(inputs([[-3.0, 1.0, -1.6, 0.0]], [0.0]), arguments(mask_kl=0.5))
    assert far.log_ratio.tolist() == pytest.approx([-1.6, 0.0])
    x = inputs([[0.0] * 4, [0.0] * 4], [0.0, 1.0], [-1.0, 1.0])
    x = checks.with_gradient(x, policy_logprobs=double([0.01, 0.05, 0.1, 0.5] * 2).log())
    spared = call("reinforce", x, options=True, spare_ceiling=0.5)[1]  # the floor is 0.02
    assert spared.tolist() == [1, 0, 0, 1] + [-1] * 4


def distill(policy, behavior, target, **more):
    zeros = [0.0] * len(policy)
    fields = {"base_logprobs": behavior, "behavior_logprobs": behavior, "target": target}
    fields |= {"entropy": zeros, "divergence": zeros, "advantages": target}
    fields |= {"teacher_logprobs": behavior, "reference_logprobs": behavior} | more
    arrays = {name: double(values) for name, values in fields.items()}
    return stage2.Inputs(policy_logprobs=double(policy).requires_grad_(), **arrays)


def gradient(objective, x, **changes):
    loss, _ = stage2.OBJECTIVES[objective](x, stage2.Args(**PATHS, **changes))
    return loss.item(), torch.autograd.grad(loss, x.policy_logprobs)[0].tolist()


def test_stage_2():
    """gopd: at ratio 1 the slope is -A, A = target - (policy - reference), detached. trrd: at alpha
    0.5 and policy / T = 4 the ratio is 2; at alpha 1, as kdrl at beta 0, it is stage 2's pg."""
    for target, reference, advantage in (
        (0.625, -1.2, 0.425),  # lambda 1.25, teacher -0.7
        (2.3, -3.0, 0.3),  # at lambda 1 the reference does not matter
        (0.4, -1.4, 0.0),  # it rests where the target is met
    ):
        x = distill([-1.0], [-1.0], [target], reference_logprobs=[reference])
        assert gradient("gopd", x)[1] == pytest.approx([-advantage])
    x = distill([-1.0], [-1.0], [1.0], teacher_logprobs=[-1 - math.log(4)])
    assert gradient("trrd", x, clip_high=9.0) == (pytest.approx(-2), pytest.approx([-2]))
    assert gradient("trrd", x)[1] == [0]
    x = distill([-0.9, -2.0], [-1.0, -1.5], [1.0, -1.0], teacher_logprobs=[-0.5, -2.5])
    for name in ("gopd", "trrd", "kdrl"):
        args = stage2.Args(**PATHS, trrd_alpha=0.3, kdrl_beta=0.2)
        check(stage2.OBJECTIVES[name], x, args, plain=name != "gopd")
    plain, grad = gradient("pg", x)
    assert gradient("trrd", x, trrd_alpha=1.0) == gradient("kdrl", x, kdrl_beta=0) == (plain, grad)
    both, pulled = gradient("kdrl", x, kdrl_beta=0.1)
    assert both - plain == pytest.approx(0.1 * 0.5 * (0.4**2 + 0.5**2))
    assert [p - g for p, g in zip(pulled, grad, strict=True)] == pytest.approx([-0.04, 0.05])
    args = stage2.Args(**PATHS, kl_target=0.2)
    proxies = (0.1, 0.134, 0.299, 0.31, math.inf)
    assert [stage2.adapted_kl_coef(args, 1, v) for v in proxies] == [0.5, 1, 1, 2, 2]


def exact_kl(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("chunk", [1, 14, 10**6])
def test_divergences_equal_the_naive_formulas(chunk, monkeypatch):
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    shapes = ((9, 4), (7, 4), (9, 5), (7, 5))
    heads = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    p, q = ((3 * (h @ w.T / 3).tanh() / 1.3).softmax(-1) for h, w in (heads[:2], heads[2:]))
    teacher, student = ((h, Output(w, cap=3.0)) for h, w in (heads[:2], heads[2:]))
    pair, m, along = (teacher, student, 1.3), 0.3 * p + 0.7 * q, torch.randn(9).double()
    stored = []
    for k in range(1, 7):
        ids, logprobs = divergences.topk_logprobs(*teacher, 1.3, k)
        stored.append(divergences.topk((ids.int(), logprobs), *pair[1:]))
    # At k = 1 there are two outcomes, the likeliest token and any other.
    best = p.argmax(-1, keepdim=True)
    a, b = p.gather(-1, best)[:, 0], q.gather(-1, best)[:, 0]
    for value, exact in (
        (divergences.jsd(*pair, jsd_beta=0.3), 0.3 * exact_kl(p, m) + 0.7 * exact_kl(q, m)),
        (divergences.forward_kl(*pair), exact_kl(p, q)),
        (divergences.reverse_kl(*pair), exact_kl(q, p)),
        (stored[-1], exact_kl(p, q)),
        (stored[0], a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()),
    ):
        assert torch.allclose(value, exact, atol=1e-12)
        of_value = torch.autograd.grad(value @ along, heads[2:], retain_graph=True)
        of_exact = torch.autograd.grad(exact @ along, heads[2:], retain_graph=True)
        assert all(torch.allclose(a, b) for a, b in zip(of_value, of_exact, strict=True))
    assert all((a <= b + 1e-12).all() for a, b in zip(stored, stored[1:], strict=False))
    none = divergences.forward_kl((heads[0][:0], teacher[1]), (heads[2][:0], student[1]), 1)
    assert none.numel() == 0
    # In float32 1 - (1 - 1e-9) is 0; the sum over the rest is not.
    sure, eye = torch.tensor([[0.0, -21.0, -22.0]]), Output(torch.eye(3))
    _, tail = divergences.topk_logprobs(sure, eye, 1.0, 1)
    assert tail[0, 1].item() == pytest.approx(math.log(math.exp(-21) + math.exp(-22)), rel=1e-5)


def test_impossible_flags():
    given = {stage1.Args: {}, stage2.Args: {"signals": "s"}, signals.Args: {"signals": ("s",)}}
    for args_type, changes, flag in (
        (stage1.Args, {"loss": "psr", "unlearn": True}, "--unlearn --loss psr"),
        (stage1.Args, {"cispo_low": 6.0}, "--cispo-low 6"),
        (stage2.Args, {"objective": "kdrl", "reanchor": True}, "--reanchor --objective kdrl"),
        (stage2.Args, {"teacher": "t"}, "not --teacher"),
        (stage2.Args, {"objective": "jsd"}, "--objective jsd reads --teacher"),
        (signals.Args, {"output": Path("o.safetensors"), "clip": 0.0}, "--clip 0"),
    ):
        with pytest.raises(common.UserError, match=re.escape(flag)):
            args_type(**PATHS | given[args_type] | changes).check()


def test_all_objectives_are_listed_tested_and_documented():
    assert set(STATED) == set(VARIANTS) >= set(OBJECTIVES)
    for args_type, field in ((stage1.Args, "loss"), (stage2.Args, "objective")):
        names = stage1.LOSSES if field == "loss" else stage2.OBJECTIVES
        assert set(typing.get_args(typing.get_type_hints(args_type)[field])) == set(names)
    page = (Path(__file__).resolve().parents[1] / "docs" / "family.md").read_text()
    rows = "".join(row.split("|")[1] for row in page.splitlines() if row.startswith("| `"))
    assert {*OBJECTIVES, "gopd", "trrd", "kdrl", *stage2.CLONES} <= set(re.findall("`(.*?)`", rows))
    logged = {f"`{key}`" for name in OBJECTIVES for key in call(name, mixed_inputs())[2]}
    assert all(key in page for key in logged)
