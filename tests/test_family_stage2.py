"""More objectives of stage 2: exact values, limits, resume with state, one real run each."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import divergences
import pytest
import score_topk
import stage2
import tiny
import torch

import common
import stage2_distill
from stage2_distill import DistillInputs

T = torch.tensor([0.5, 0.5], dtype=torch.float64)
S = torch.tensor([0.9, 0.1], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What `stage2.main` changes in stage 2 is as before after each test; so is the handler of
    SIGTERM that training leaves behind."""
    before = signal.getsignal(signal.SIGTERM)
    for name in ("CLONES", "OBJECTIVES"):
        monkeypatch.setattr(stage2_distill, name, dict(getattr(stage2_distill, name)))
    for name in FUNCTIONS:
        monkeypatch.setattr(stage2_distill, name, getattr(stage2_distill, name))
    yield
    signal.signal(signal.SIGTERM, before)


FUNCTIONS = ("more_arrays", "next_kl_coef", "epoch_anchor")  # that a fork of stage 2 may replace
SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "prob_mask": None}


def inputs(policy, behavior, target=None, base=None):
    """Response tokens behind two prompt tokens, float64."""
    double = lambda v: torch.tensor([0.0, 0.0, *v], dtype=torch.float64)  # noqa: E731
    n = len(policy)
    return DistillInputs(
        double(policy).requires_grad_(), double(behavior), double(base or behavior),
        double(target or [0.0] * n), torch.tensor([False, False] + [True] * n), double([0.0] * n),
    )  # fmt: skip


def tokens(*values):
    """An array as a loader gives it; what stands on prompts must not matter."""
    return torch.tensor([7.0, -7.0, *values], dtype=torch.float64)


def gradient(loss_function, x, **settings):
    """Value, d loss / d policy_logprobs at the response tokens; exactly zero at the prompt's."""
    loss, _ = loss_function(x, **SETTINGS | settings)
    (grad,) = torch.autograd.grad(loss, x.policy_logprobs)
    assert (grad[~x.response_mask] == 0).all()
    return loss.item(), grad[x.response_mask].tolist()


# --------------------------------------------------------------------------------------------------
# Divergences


def head(probs):
    """hidden, weight whose product is log probs."""
    return probs.log()[None], EYE


def exact_kl(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(
    ("beta", "value"),
    [(0.0, 0.510826), (1.0, 0.368064), (0.5, 0.101749), (0.1, 0.043074), (0.999, 0.36774e-3)],
)
def test_jsd_values(beta, value):
    found = divergences.jsd(head(T), head(S), 1.0, jsd_beta=beta).item()
    assert found == pytest.approx(value, abs=1e-6)


def test_jsd_half_is_symmetric_and_bounded():
    one = divergences.jsd(head(T), head(S), 1.0, jsd_beta=0.5).item()
    assert one == pytest.approx(divergences.jsd(head(S), head(T), 1.0, jsd_beta=0.5).item())
    far = torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64)
    apart = divergences.jsd(head(far), head(far.flip(0)), 1.0, jsd_beta=0.5).item()
    assert apart == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 30, 10**6])
def test_jsd_equals_the_naive_formula(beta, chunk, monkeypatch):
    monkeypatch.setattr(common, "HEAD_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    t, t_weight, s, s_weight = tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((9, 4), (7, 4), (9, 5), (7, 5))
    ]
    value = divergences.jsd((t, t_weight), (s, s_weight), 1.3, jsd_beta=beta)
    p, q = ((h @ w.T / 1.3).softmax(-1) for h, w in ((t, t_weight), (s, s_weight)))
    m = beta * p + (1 - beta) * q
    mixed = beta * exact_kl(p, m) + (1 - beta) * exact_kl(q, m)
    naive = {0.0: exact_kl(p, q), 1.0: exact_kl(q, p)}.get(beta, mixed)
    assert torch.allclose(value, naive, atol=1e-12)
    along = torch.randn(9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(v @ along, tensors) for v in (value, naive))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def topk_of(teacher, student, k, temperature=1.0):
    ids, logprobs = divergences.topk_logprobs(*teacher, temperature, k)
    return divergences.topk((ids.int(), logprobs), student, temperature)


def test_topk_with_two_tokens_is_the_exact_kl():
    assert topk_of(head(T), head(S), 1).item() == pytest.approx(0.510826, abs=1e-6)
    assert topk_of(head(S), head(T), 1).item() == pytest.approx(0.368064, abs=1e-6)


def test_topk_grows_with_k_to_the_exact_kl(monkeypatch):
    monkeypatch.setattr(common, "HEAD_CHUNK_ELEMENTS", 14)  # two positions at once
    torch.manual_seed(0)
    teacher = torch.randn(9, 4).double(), torch.randn(7, 4).double()
    s, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                 for shape in ((9, 5), (7, 5)))  # fmt: skip
    values = [topk_of(teacher, (s, weight), k, 0.7) for k in range(1, 7)]
    p, q = (teacher[0] @ teacher[1].T / 0.7).softmax(-1), (s @ weight.T / 0.7).softmax(-1)
    exact = exact_kl(p, q)
    for less, more in zip(values, values[1:], strict=False):
        assert (less <= more + 1e-12).all()
    assert torch.allclose(values[-1], exact, atol=1e-12)
    assert values[0].sum() < 0.9 * exact.sum()
    ours, theirs = (torch.autograd.grad(v.sum(), (s, weight)) for v in (values[-1], exact))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))
    # Two outcomes by hand: the likeliest token, and any other.
    best = p.argmax(-1, keepdim=True)
    a, b = p.gather(-1, best)[:, 0], q.gather(-1, best)[:, 0]
    coin = a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    assert torch.allclose(values[0], coin, atol=1e-12)


def test_the_tail_is_summed_not_subtracted():
    """In float32 1 - (1 - 1e-9) is 0; the sum over the rest is not."""
    logits = torch.tensor([[0.0, -21.0, -22.0]])
    _, logprobs = divergences.topk_logprobs(logits, torch.eye(3), 1.0, 1)
    expected = math.log(math.exp(-21) + math.exp(-22))
    assert logprobs[0, 1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["jsd", "topk"])
def test_divergence_gradcheck(name):
    torch.manual_seed(0)
    teacher = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    weight = torch.randn(5, 4, dtype=torch.float64)

    def value(hidden):
        if name == "topk":
            return topk_of(teacher, (hidden, weight), 2)
        return divergences.jsd(teacher, (hidden, weight), 1.0, jsd_beta=0.3)

    assert torch.autograd.gradcheck(value, (torch.randn(3, 4).double().requires_grad_(),))
    own = topk_of((teacher[0], weight), (teacher[0], weight), 2)
    assert own.abs().max() < 1e-12  # the teacher itself costs nothing


# --------------------------------------------------------------------------------------------------
# Policy gradients


@pytest.mark.parametrize(
    ("scale", "teacher", "advantage"),
    [(1.0, -0.7, 0.3), (1.25, -0.7, 0.425), (0.0, -0.7, -0.2), (1.0, -1.2, -0.2)],
)
def test_gopd_values(scale, teacher, advantage):
    """Student -1, reference -1.2; at ratio 1 the slope is -A."""
    target = [scale * (teacher + 1.2)]
    x = inputs([-1.0], [-1.0], target)
    value, grad = gradient(stage2.gopd_loss, x, reference_logprobs=tokens(-1.2))
    assert value == pytest.approx(-advantage)
    assert grad == pytest.approx([-advantage])


def test_groups_that_agree_have_only_the_teacher():
    """All right or all wrong: A is 0. trrd, whose teacher only moves the clip, learns nothing; kdrl
    goes to its teacher."""
    x, given = inputs([-1.0, -2.0], [-1.5, -1.0]), tokens(-0.5, -2.5)
    settings = {"teacher_logprobs": given, "advantages": tokens(0.0, 0.0)}
    assert gradient(stage2.trrd_loss, x, trrd_alpha=0.5, **settings)[1] == [0, 0]
    found = gradient(stage2.kdrl_loss, x, kdrl_beta=0.1, **settings)[1]
    assert found == pytest.approx([0.1 * (-1.0 + 0.5), 0.1 * (-2.0 + 2.5)])


def test_gopd_at_lambda_1_needs_no_reference():
    """A = T - student whatever the reference; and it rests where the target is met."""
    for reference in (-1.2, -3.0):
        x = inputs([-1.0], [-1.0], [-0.7 - reference])
        grad = gradient(stage2.gopd_loss, x, reference_logprobs=tokens(reference))[1]
        assert grad == pytest.approx([-0.3])
    met = inputs([-1.0, -2.0], [-1.5, -1.5], [0.4, -0.6])
    at_rest = gradient(stage2.gopd_loss, met, reference_logprobs=tokens(-1.4, -1.4))
    assert at_rest == (pytest.approx(0), pytest.approx([0, 0]))


TRRD = {"teacher_logprobs": tokens(-1 - math.log(4), -3.0), "advantages": tokens(1.0, -1.0)}


def test_trrd_ratio_is_the_geometric_mixture():
    """alpha .5, policy = behavior, policy / T = 4: ratio 2, above the clip for A > 0."""
    only = {name: value[:3] for name, value in TRRD.items()}
    wide = {"clip_high": 9.0}
    x = inputs([-1.0], [-1.0])
    value, grad = gradient(stage2.trrd_loss, x, trrd_alpha=0.5, **only, **wide)
    assert (value, grad) == (pytest.approx(-2), pytest.approx([-2]))
    assert gradient(stage2.trrd_loss, x, trrd_alpha=0.5, **only)[1] == [0]
    less = {"teacher_logprobs": tokens(-1 + math.log(4)), "advantages": tokens(1.0)}
    assert gradient(stage2.trrd_loss, x, trrd_alpha=0.5, **less)[1] == pytest.approx([-0.5])


def test_trrd_at_alpha_1_is_the_clipped_policy_gradient():
    x = inputs([-0.9, -2.0], [-1.0, -1.5])
    plain = dataclasses.replace(x, target=torch.tensor([0.0, 0.0, 1.0, -1.0]).double())
    ours = gradient(stage2.trrd_loss, x, trrd_alpha=1.0, **TRRD)
    assert ours == gradient(stage2_distill.pg_loss, plain)
    assert ours != gradient(stage2.trrd_loss, x, trrd_alpha=0.0, **TRRD)


def test_kdrl_adds_half_a_square():
    x = inputs([-0.9, -2.0], [-1.0, -1.5])
    given = {"teacher_logprobs": tokens(-0.5, -2.5), "advantages": tokens(1.0, -1.0)}
    alone, grad = gradient(stage2.kdrl_loss, x, kdrl_beta=0.0, **given)
    plain = dataclasses.replace(x, target=torch.tensor([0.0, 0.0, 1.0, -1.0]).double())
    assert (alone, grad) == gradient(stage2_distill.pg_loss, plain)
    both, pulled = gradient(stage2.kdrl_loss, x, kdrl_beta=0.1, **given)
    assert both - alone == pytest.approx(0.1 * 0.5 * (0.4**2 + 0.5**2))
    assert [p - g for p, g in zip(pulled, grad, strict=True)] == pytest.approx([-0.04, 0.05])


def test_kdrl_pull_is_the_reverse_kl_gradient_on_its_own_samples():
    """Enumerated over the two tokens: .19775, the exact reverse-KL logit gradient."""
    logits = S.log().clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    zeros, yes = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    pulls = []
    for token in (0, 1):
        chosen = torch.arange(2) == token
        x = DistillInputs(logprobs, logprobs.detach(), zeros, zeros, yes & chosen, zeros)
        loss, _ = stage2.kdrl_loss(
            x, kdrl_beta=1.0, teacher_logprobs=T.log(), advantages=zeros, **SETTINGS
        )
        pulls.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
    expected = S[0] * pulls[0] + S[1] * pulls[1]
    assert expected[0].item() == pytest.approx(0.19775, abs=1e-5)


LOSSES = {
    "gopd": (stage2.gopd_loss, {}),
    "trrd": (stage2.trrd_loss, {"trrd_alpha": 0.3}),
    "kdrl": (stage2.kdrl_loss, {"kdrl_beta": 0.2}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_inputs_unchanged(name):
    function, settings = LOSSES[name]
    x = inputs([-0.9, -2.0, -0.3], [-1.0, -1.95, -0.35], [0.4, -0.3, 0.2])
    more = {k: tokens(*v) for k, v in {
        "teacher_logprobs": (-0.95, -1.9, -0.4), "reference_logprobs": (-1.1, -1.8, -0.2),
        "advantages": (1.0, -1.0, 0.5)}.items()}  # fmt: skip
    before = [v.detach().clone() for v in (*vars(x).values(), *more.values())]

    def loss(policy_logprobs):
        moved = dataclasses.replace(x, policy_logprobs=policy_logprobs)
        return function(moved, **SETTINGS, **settings, **more)[0]

    if name == "gopd":  # A is detached, so a finite difference would see more: the slope is -r A
        _, grad = gradient(function, x, **more)
        for i in range(3):
            d = (x.policy_logprobs - x.behavior_logprobs)[2 + i].item()
            a = (x.target - x.policy_logprobs + more["reference_logprobs"])[2 + i].item()
            assert grad[i] == pytest.approx(-math.exp(d) * a)
    else:
        assert torch.autograd.gradcheck(loss, (x.policy_logprobs,))
    after = (*vars(x).values(), *more.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adaptive_coefficient_follows_ppo():
    for proxy, factor in ((0.1, 0.5), (0.134, 1), (0.2, 1), (0.299, 1), (0.31, 2), (math.inf, 2)):
        args = SimpleNamespace(kl_target=0.2)
        assert stage2.adapted_kl_coef(args, 0.01, proxy) == pytest.approx(0.01 * factor)


# --------------------------------------------------------------------------------------------------
# Runs


def arguments(output: Path, objective: str, **changes) -> stage2.Args:
    folder = tiny.setting()
    teacher = {"forward_kl": str(folder / "other"), "jsd": str(folder / "other"),
               "topk": str(output.parent / "topk.safetensors")}.get(objective)  # fmt: skip
    settings = {"epochs": 3, "batch_size": 8, "micro_batch_tokens": 256, "learning_rate": 1e-3,
                "warmup_steps": 2, "kl_every": 2, "kl_holdout": 0.25}  # fmt: skip
    return stage2.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output, teacher=teacher,
        signals=None if teacher else tiny.signals(), objective=objective, **settings | changes,
    )  # fmt: skip


def store_topk(output: Path, k: int) -> Path:
    folder = tiny.setting()
    score_topk.main(score_topk.Args(folder / "rollouts", str(folder / "other"), output, k=k))
    return output


def lines(path: Path) -> list[dict]:
    return common.read_jsonl(path / "metrics.jsonl")


def test_arrays_beside_the_signals(tmp_path):
    args = arguments(tmp_path / "run", "kdrl")
    rollouts = common.load_rollouts(args.rollouts)
    given = stage2.rewards_and_policies(args, rollouts)
    stored = common.load_tensors(tiny.signals(), {})[0]
    assert torch.equal(given["teacher_logprobs"], stored["teacher_0_logprobs"])
    assert torch.equal(given["reference_logprobs"], stored["base_logprobs"])
    advantages, ids = given["advantages"], rollouts.sequence_ids
    assert not advantages[~rollouts.response_mask].any()
    for s in range(len(rollouts.rewards)):
        of_problem = rollouts.rewards[rollouts.problem_index == rollouts.problem_index[s]]
        centred = (rollouts.rewards[s] - of_problem.mean()).item()
        expected = centred / (of_problem.std().item() + 1e-6) if centred else 0
        found = advantages[(ids == s) & rollouts.response_mask]
        assert found.tolist() == pytest.approx([expected] * len(found), rel=1e-4)


@pytest.mark.parametrize("objective", ["jsd", "topk", "gopd", "trrd", "kdrl"])
def test_one_real_run(objective, tmp_path):
    if objective == "topk":
        store_topk(tmp_path / "topk.safetensors", 3)
    stage2.main(arguments(tmp_path / "run", objective, warmup_steps=0))
    assert (tmp_path / "run" / "config.json").is_file()
    rows = lines(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    if objective in ("jsd", "topk"):
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_stored_topk_of_all_but_one_token_is_the_teacher_in_memory(tmp_path, rollouts):
    """The same run as forward_kl, the whole vocabulary: same losses, same student."""
    size = common.read_json(tiny.setting() / "base" / "config.json")["vocab_size"]
    store_topk(tmp_path / "topk.safetensors", size - 1)
    stage2.main(arguments(tmp_path / "stored", "topk"))
    stage2.main(arguments(tmp_path / "memory", "forward_kl"))
    for a, b in zip(lines(tmp_path / "stored"), lines(tmp_path / "memory"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_topk_file_is_checked(tmp_path, rollouts):
    path = store_topk(tmp_path / "topk.safetensors", 2)
    arrays, metadata = common.load_tensors(path, {})
    theirs = common.load_rollouts(tiny.setting() / "rollouts")
    assert arrays["topk_ids"].shape == (len(theirs.tokens), 2)
    assert not arrays["topk_logprobs"][~theirs.response_mask].any()
    mass = arrays["topk_logprobs"][theirs.response_mask].exp().sum(-1)
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)
    high = {"topk_ids": arrays["topk_ids"] + 1000}
    common.save_tensors(tmp_path / "topk.safetensors", arrays | high, metadata)
    with pytest.raises(common.UserError, match="vocabulary"):
        stage2.main(arguments(tmp_path / "run", "topk"))
    common.save_tensors(path, arrays, metadata | {"rollouts": "of others"})
    with pytest.raises(common.UserError, match="other rollouts"):
        stage2.main(arguments(tmp_path / "run", "topk"))
    with pytest.raises(common.UserError, match="--k"):
        store_topk(path, 1000)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"jsd_beta": 1.5}, "--jsd-beta"), ({"trrd_alpha": -0.1}, "--trrd-alpha"),
     ({"kl_target": 0.1}, "--kl-coef"), ({"kl_target": 0.0, "kl_coef": 1.0}, "--kl-target"),
     ({"kdrl_beta": -1.0}, "--kdrl-beta"), ({"teacher": "t"}, "--teacher"),
     ({"reanchor": True}, "--reanchor --objective kdrl")],
)  # fmt: skip
def test_bad_flags_are_named(changes, named, tmp_path):
    args = dataclasses.replace(arguments(tmp_path / "run", "kdrl"), **changes)
    with pytest.raises(common.UserError, match=named):
        stage2.main(args)


STATEFUL = {
    "adaptive": {"kl_coef": 0.01, "kl_target": 1e-4},
    "reanchor": {"reanchor": True},
    "both": {"kl_coef": 0.01, "kl_target": 1e-4, "reanchor": True, "kl_every": 4},
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("after", [4, 5, 7])  # within the second epoch, at its end, in the third
def test_resumed_run_ends_with_the_same_bits(name, after, tmp_path, monkeypatch):
    """Three steps an epoch; the run is stopped after a step's update, before its checkpoint."""
    changes = {"objective": "regression", "signal_clip": 1.0, "token_kl": 10.0} | STATEFUL[name]
    stage2.main(arguments(tmp_path / "whole", **changes))
    taken, step = [0], stage2_distill.optimizer_step

    def dying(*args):
        norm = step(*args)
        taken[0] += 1
        if taken[0] == after:
            raise Killed
        return norm

    monkeypatch.setattr(stage2_distill, "optimizer_step", dying)
    with pytest.raises(Killed):
        stage2.main(arguments(tmp_path / "killed", **changes))
    monkeypatch.setattr(stage2_distill, "optimizer_step", step)
    begun = list((tmp_path / "killed" / "anchors").glob("epoch-*"))
    assert len(begun) == (-(-after // 3) - 1 if "reanchor" in changes else 0)
    stage2.main(arguments(tmp_path / "killed", **changes))
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    measured = [row for row in lines(tmp_path / "whole") if "kl_proxy" in row]
    if "kl_target" in changes:
        kl_coef, args = 0.01, SimpleNamespace(kl_target=1e-4)
        for row in measured:  # each change starts from the last one
            kl_coef = stage2.adapted_kl_coef(args, kl_coef, row["kl_proxy"])
            assert row["kl_coef"] == pytest.approx(kl_coef)
        assert kl_coef > 0.02
    assert not (tmp_path / "killed" / "anchors").exists()


def test_the_adapted_coefficient_is_the_one_in_the_loss(tmp_path):
    changes = {"objective": "regression", "token_kl": 10.0, "kl_coef": 0.01, "kl_every": 1}
    for name, target in (("constant", None), ("doubling", 1e-6)):
        stage2.main(arguments(tmp_path / name, kl_target=target, epochs=4, **changes))
    constant, doubling = lines(tmp_path / "constant"), lines(tmp_path / "doubling")
    assert doubling[0]["loss"] == constant[0]["loss"]  # not measured yet
    assert doubling[-1]["kl_coef"] > 10
    assert doubling[-1]["kl_proxy"] < 0.5 * constant[-1]["kl_proxy"]


def test_reanchored_targets_add_up(tmp_path):
    """Against the base the log-ratio ends at one target; re-anchored it goes on, epoch by epoch."""
    changes = {"objective": "regression", "token_kl": 10.0, "signal_clip": 0.5, "epochs": 8}
    for name, reanchor in (("base", False), ("moving", True)):
        stage2.main(arguments(tmp_path / name, reanchor=reanchor, **changes))
    spent = {name: lines(tmp_path / name)[-1]["kl_proxy"] for name in ("base", "moving")}
    assert spent["moving"] > 1.2 * spent["base"]
    # Counted from the student itself, the ratio is 1 at the start of every epoch.
    starts = [row["ratio"] for row in lines(tmp_path / "moving") if row["step"] % 3 == 1]
    assert starts == pytest.approx([1.0] * 8, abs=1e-5)


def test_without_the_flags_it_is_stage_2(tmp_path):
    """The same bits as stage2_distill.py."""
    own = {name: getattr(stage2_distill, name) for name in FUNCTIONS}
    ours = arguments(tmp_path / "fork", "regression")
    stage2.main(ours)
    names = [field.name for field in dataclasses.fields(stage2_distill.Args)]
    plain = {name: getattr(ours, name) for name in names} | {"output": tmp_path / "plain"}
    for name, function in own.items():
        setattr(stage2_distill, name, function)
    stage2_distill.main(stage2_distill.Args(**plain))
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "fork" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_two_ranks_end_where_one_does(tmp_path):
    """Stored top-k, adaptive penalty and moving anchor: shared out over ranks, the same student."""
    folder = tiny.setting()
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
    family, common_flags = ROOT / "examples" / "family", ["--rollouts", str(folder / "rollouts")]
    run = ["--base", str(folder / "base"), "--teacher", str(tmp_path / "topk.safetensors"),
           "--objective", "topk", "--epochs", "2", "--batch-size", "8", "--kl-every", "2",
           "--micro-batch-tokens", "256", "--learning-rate", "1e-3", "--kl-holdout", "0.25",
           "--kl-coef", "0.01", "--kl-target", "1e-4", "--reanchor"]  # fmt: skip
    flags = {"score_topk": ["--teacher", str(folder / "other"), "--k", "3", "--output",
                            str(tmp_path / "topk.safetensors")],
             "stage2": [*run, "--output", str(tmp_path / "two")]}  # fmt: skip
    for script, its in flags.items():
        command = [sys.executable, *launch, str(family / f"{script}.py"), *common_flags, *its]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    arrays = common.load_tensors(tmp_path / "topk.safetensors", {})[0]
    alone = common.load_tensors(store_topk(tmp_path / "alone.safetensors", 3), {})[0]
    assert torch.equal(arrays["topk_ids"], alone["topk_ids"])
    assert torch.allclose(arrays["topk_logprobs"], alone["topk_logprobs"], atol=1e-5)
    stage2.main(arguments(tmp_path / "one", "topk", epochs=2, warmup_steps=10, kl_coef=0.01,
                          kl_target=1e-4, reanchor=True))  # fmt: skip
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "kl_proxy", "kl_coef", "ratio"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-3, abs=1e-6), key


def test_command_lines():
    scripts = ("stage2", "signals", "score_topk", "split_rollouts", "join_signals", "keep_mixed")
    for script in scripts:
        command = [sys.executable, str(ROOT / "examples" / "family" / f"{script}.py"), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "--rollouts" in shown
    assert json.dumps(sorted(stage2_distill.CLONES)) == '["forward_kl", "reverse_kl"]'
