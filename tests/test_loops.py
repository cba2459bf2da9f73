"""The loops of both stages against a plain one: transformers' own forward and whole logits, one
response at a time, objectives written down once more, torch's AdamW, a clip by hand.

Packing, micro-batches, rows of ranks without work, divisors, warm-up and saving must not matter.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import checks
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import stage1_extreme as stage1
import stage2_distill as stage2

TEMPERATURE = 0.8
STEPS = {"batch_size": 8, "learning_rate": 1e-3, "micro_batch_tokens": 40, "force": True}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, tokenizer):
    """Twenty random responses, said to be sampled at a low temperature and with top-p."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.safetensors"
    made = tiny.random_rollouts(path, len(tokenizer))
    made.metadata["sampling"] |= {"temperature": TEMPERATURE, "top_p": 0.9}
    tiny.save_rollouts(made)
    return made


def plain_loop(start, rollouts, trained, args, objective):
    """Trains by `objective(logprobs by response, numbers of the responses) -> loss`; yields
    (loss, gradient norm, learning rate, weights) after each step."""
    lm = AutoModelForCausalLM.from_pretrained(start)
    optimizer = torch.optim.AdamW(lm.parameters(), weight_decay=args.weight_decay)
    step = 0
    for epoch in range(args.epochs):
        for batch in common.epoch_batches(len(trained), args.batch_size, args.seed, epoch):
            chosen = trained[batch].tolist()
            logprobs = [checks.plain_logprobs(lm, rollouts, s, TEMPERATURE)[0] for s in chosen]
            loss = objective(logprobs, chosen)
            optimizer.zero_grad()
            loss.backward()
            grads = [p.grad for p in lm.parameters()]
            norm = torch.cat([g.flatten() for g in grads]).norm().item()
            for g in grads:
                g.mul_(min(1.0, args.max_grad_norm / norm))
            step += 1
            warm = min(step / args.warmup_steps, 1) if args.warmup_steps else 1
            optimizer.param_groups[0]["lr"] = rate = args.learning_rate * warm
            optimizer.step()
            yield loss.item(), norm, rate, {k: v.clone() for k, v in lm.state_dict().items()}


def penalty(kl_coef, direction, log_ratios):
    """kl_coef times the KL estimate, nats per response."""
    d = torch.cat(log_ratios)
    each = d.exp() - 1 - d if direction == "forward" else d.exp() * d - d.exp() + 1
    return kl_coef * each.sum() / len(log_ratios)


def compare(output, expected, steps_per_epoch, saves):
    """metrics.jsonl and the saved models against the steps of the plain loop."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, len(expected) + 1)]
    for line, (loss, norm, rate, _) in zip(lines, expected, strict=True):
        assert line["epoch"] == line["step"] / steps_per_epoch
        found = [line["loss"], line["grad_norm"], line["learning_rate"]]
        assert found == pytest.approx([loss, norm, rate], rel=2e-3, abs=1e-6)
    for folder, step in saves.items():
        found = AutoModelForCausalLM.from_pretrained(output / folder).state_dict()
        # A tied matrix is stored once.
        assert "lm_head.weight" not in load_file(output / folder / "model.safetensors")
        for name, weight in expected[step - 1][3].items():
            torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0, msg=name)
    return lines


def with_idle_rows(stage, monkeypatch):
    """Makes a script's loop see two rows without sequences, as a rank does that finds no work."""
    monkeypatch.setattr(stage, "pack", lambda *a: [rows + [[], []] for rows in common.pack(*a)])


# --------------------------------------------------------------------------------------------------


def ce(log_ratios, logprobs, rewards, advantages, args):
    total = torch.stack([d.sum() for d in log_ratios])
    return torch.nn.functional.binary_cross_entropy((args.beta * total).sigmoid(), rewards)


def grpo(log_ratios, logprobs, rewards, advantages, args):
    each = []
    for d, a in zip(log_ratios, advantages, strict=True):
        each.append(-torch.min(d.exp() * a, d.exp().clamp(0.8, 1.28) * a).mean())
    return sum(each) / len(each)


def sft(log_ratios, logprobs, rewards, advantages, args):
    return -torch.cat([x for x, r in zip(logprobs, rewards, strict=True) if r]).mean()


STAGE_1 = {
    "ce": (ce, {"kl_coef": 0.01, "warmup_steps": 3}),
    "grpo": (grpo, {"kl_coef": 0.02, "kl_direction": "reverse", "weight_decay": 0.1, "seed": 3}),
    "sft": (sft, {"max_grad_norm": 0.05, "warmup_steps": 0}),
}


@pytest.mark.parametrize("loss", STAGE_1)
def test_stage_1(loss, rollouts, model_folders, tmp_path, monkeypatch):
    """Six steps from another policy than the base, so that ratios differ from 1."""
    objective, flags = STAGE_1[loss]
    start, base_folder = model_folders
    args = stage1.Args(base_folder, rollouts.path.parent, tmp_path / "run", init=start, loss=loss)
    args = dataclasses.replace(args, epochs=2, save_at=(0.5, 2.0), **STEPS, **flags)
    with_idle_rows(stage1, monkeypatch)
    stage1.main(args)

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        before = [checks.plain_logprobs(base, rollouts, s, TEMPERATURE)[0] for s in range(20)]
    groups = rollouts.rewards.view(5, 4)  # four responses to each of five problems
    centred = groups - groups.mean(1, keepdim=True)
    advantages = (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()

    def total(logprobs, chosen):
        log_ratios = [x - before[s] for x, s in zip(logprobs, chosen, strict=True)]
        per_response = rollouts.rewards[chosen], advantages[chosen]
        value = objective(log_ratios, logprobs, *per_response, args)
        return value + penalty(args.kl_coef, args.kl_direction, log_ratios)

    expected = [*plain_loop(start, rollouts, torch.arange(20), args, total)]
    saves = {"checkpoints/epoch-000.500": 2, "checkpoints/epoch-002.000": 6, ".": 6}
    compare(tmp_path / "run", expected, 3, saves)
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("resume-*")] == ["resume-0000006"]


def regression(log_ratios, targets):
    return (log_ratios - targets).square().mean()


def generalized_kl(log_ratios, targets):
    return (targets.exp() * (targets - log_ratios) - targets.exp() + log_ratios.exp()).mean()


def pg(log_ratios, targets):
    ratios = log_ratios.exp()
    return -torch.min(ratios * targets, ratios.clamp(0.8, 1.28) * targets).mean()


@pytest.mark.parametrize("objective", [regression, generalized_kl, pg])
def test_stage_2(objective, rollouts, model_folders, ranks, tmp_path, monkeypatch):
    """Six steps; the behavior policy is the base, as in round one."""
    start, base_folder = model_folders
    base = common.score(base_folder, rollouts, 10**6, ranks)
    signal = torch.randn(len(base), generator=torch.Generator().manual_seed(0)) * 2
    signal *= rollouts.response_mask
    arrays = {"signal": signal, "base_logprobs": base, "behavior_logprobs": base.clone()}
    model = {"path": base_folder, "fingerprint": common.fingerprint(Path(base_folder))}
    metadata = {"rollouts": common.fingerprint(rollouts.path), "models": {"base": model}}
    signals = tmp_path / "signals.safetensors"
    flags = {"init": start, "kl_coef": 0.01, "warmup_steps": 3} | STEPS
    args = stage2.Args(base_folder, rollouts.path.parent, signals, tmp_path / "run", **flags)
    args.objective, args.token_kl, args.kl_every, args.kl_holdout = objective.__name__, 9.0, 3, 0.2
    args.signal_clip, args.signal_floor = 2.0, 0.0
    common.save_tensors(signals, arrays, metadata)
    with_idle_rows(stage2, monkeypatch)
    stage2.main(args)

    trained, held_out = stage2.split_problems(rollouts, 0.2, 0)
    assert len(trained) == 16
    own = [rollouts.response_mask & (rollouts.sequence_ids == s) for s in range(20)]

    def total(logprobs, chosen):
        log_ratios = [x - base[own[s]] for x, s in zip(logprobs, chosen, strict=True)]
        targets = torch.cat([signal[own[s]].clamp(-2, 2) for s in chosen])
        value = objective(torch.cat(log_ratios), targets)
        return value + penalty(args.kl_coef, args.kl_direction, log_ratios)

    expected = [*plain_loop(start, rollouts, trained, args, total)]
    lines = compare(tmp_path / "run", expected, 2, {".": 4})
    assert ["kl_proxy" in line for line in lines] == [False, False, True, True]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        d = [
            checks.plain_logprobs(last, rollouts, s, TEMPERATURE)[0] - base[own[s]]
            for s in held_out
        ]
    exact = penalty(1.0, "forward", d).item()
    assert lines[-1]["kl_proxy"] == pytest.approx(exact, rel=1e-3)
    targets = [signal[own[s]].clamp(-2, 2) for s in held_out]
    slope = torch.cat(d) @ torch.cat(targets) / torch.cat(targets).square().sum()
    assert lines[-1]["realised"] == pytest.approx(slope.item(), rel=1e-3)
    for role, values in [("student", d), ("target", targets)]:  # one problem: four samples
        w = torch.stack([v.sum() for v in values]).double().softmax(0)
        accuracy, kl = w @ rollouts.rewards[held_out].double(), w @ (4 * w).log()
        assert lines[-1][f"{role}_accuracy"] == pytest.approx(accuracy.item(), rel=1e-3)
        assert lines[-1][f"{role}_kl"] == pytest.approx(kl.item(), rel=1e-3)
    resume = common.read_json(tmp_path / "run/checkpoints/resume-0000004/state.json")
    assert resume == {"step": 4, "kl_proxy": lines[-1]["kl_proxy"]}


def test_unlearning_stops_at_its_depth(model_folders, rollouts, tmp_path):
    """The first step's policy is far below -1 nats per response; without the flag all are taken."""
    args = stage1.Args(model_folders[0], rollouts.path.parent, tmp_path / "run", unlearn=True)
    args.force = True
    args.epochs, args.stop_at_logprob = 3, -1.0
    stage1.main(args)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["logprob"] < -1
    assert (tmp_path / "run/config.json").is_file()
