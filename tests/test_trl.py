"""Value and gradient of our objectives against TRL's own trainer, on the same model and rollouts.

TRL's side is a real GRPOTrainer: its constructor reads the configuration, its `_compute_loss` makes
log-probs by its own head from left-padded prompts and right-padded responses, and aggregates. Ours
goes through packed rows and `row_logprobs`. What is compared is the loss and its gradient by every
parameter, to 1e-6: the models are in float64, but TRL's head and the rotary embedding, which sees
other positions where prompts are padded, are not. Only the base's log-probs (TRL's
`old_per_token_logps`) and the advantages are given to both.

TRL needs an environment of its own; without it these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed")

import divergences  # noqa: E402
import objectives  # noqa: E402
import stage1  # noqa: E402
import tiny  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

import common  # noqa: E402
import stage1_extreme  # noqa: E402

LONGEST = 24  # max_completion_length, TRL's divisor under dr_grpo
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}

# name -> (our objective, our flags, TRL's configuration). Where conventions differ, how:
CASES = {
    "grpo": ("grpo", {}, {"loss_type": "grpo", **CLIP}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", **CLIP}),
    # TRL divides by the longest response allowed: our --dr-grpo-length.
    "dr_grpo": ("dr_grpo", {"dr_grpo_length": LONGEST}, {"loss_type": "dr_grpo", **CLIP}),
    # TRL has no loss of that name: it is grpo with one ratio per response.
    "gspo": ("gspo", {}, {**SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4}),
    "gspo, wide": (
        "gspo",
        {"gspo_clip_low": 0.05, "gspo_clip_high": 0.05},
        {**SEQUENCE, "epsilon": 0.05},
    ),
    # TRL's epsilon_high is here the cap itself, not its distance from 1; it has no lower bound.
    "cispo": ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo, low cap": ("cispo", {"cispo_high": 1.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
    "vespo": ("vespo", {}, {"loss_type": "vespo"}),
}


def make_trainer(folder, output, tokenizer, rewards=None, **settings):
    """A GRPOTrainer on the CPU in float64; its reward is `rewards`, in order."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    settings = {"per_device_train_batch_size": 20, "num_generations": 4, "beta": 0.0} | settings
    settings |= {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(str(output), max_completion_length=LONGEST, **settings),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: rewards,
        train_dataset=Dataset.from_list([{"prompt": "1+1=?\n"}]),
    )
    trainer.current_gradient_accumulation_steps = 1  # train() would set it
    return trainer


def padded(rollouts, values, left):
    """Per-token values of prompts (left-padded) or responses (right-padded) -> [S, longest]."""
    parts = []
    for s in range(len(rollouts.rewards)):
        start, end = rollouts.cu_seqlens[s : s + 2].tolist()
        middle = start + int(rollouts.prompt_lens[s])
        parts.append(values[start:middle].flip(0) if left else values[middle:end])
    table = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return table.flip(1) if left else table


def our_args(**flags):
    return stage1.Args(base="b", rollouts=Path("r"), output=Path("o"), **flags)


@pytest.fixture
def case(model_folders, rollouts):
    """Our policy in float64, what an objective of ours gets, and the batch as TRL wants it."""
    policy = common.Policy(common.load_lm(model_folders[0], tiny.CPU, torch.float64))
    policy.requires_grad_(True)
    row = common.make_row(rollouts, list(range(len(rollouts.rewards))), tiny.CPU)
    logprobs, entropy = common.row_logprobs(policy, row, 1.0)
    noise = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0)).double()
    base = logprobs.detach() + 0.25 * noise
    targets = stage1_extreme.training_targets(our_args(loss="grpo"), rollouts)
    targets = {name: values.double() for name, values in targets.items()}
    x = stage1_extreme.LossInputs(logprobs, base, entropy, row.sequence_ids, **targets)
    on_disk = torch.zeros(len(rollouts.tokens), dtype=torch.float64)
    on_disk[row.flat] = base
    ones = torch.ones(len(rollouts.tokens), dtype=torch.long)
    batch = {
        "prompt_ids": padded(rollouts, rollouts.tokens.long(), left=True),
        "prompt_mask": padded(rollouts, ones, left=True),
        "completion_ids": padded(rollouts, rollouts.tokens.long(), left=False),
        "completion_mask": padded(rollouts, ones, left=False),
        "old_per_token_logps": padded(rollouts, on_disk, left=False),
        "advantages": targets["advantages"],
        "num_items_in_batch": torch.tensor(len(logprobs)),
    }
    return policy, x, batch


def gradients(loss, lm):
    named = dict(lm.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, case, model_folders, tokenizer, rollouts, tmp_path, monkeypatch):
    (policy, x, batch), (objective, flags, settings) = case, CASES[name]
    trainer = make_trainer(model_folders[0], tmp_path, tokenizer, **settings)
    theirs = trainer._compute_loss(trainer.model.train(), batch)

    monkeypatch.setattr(stage1_extreme, "DIVISORS", stage1_extreme.DIVISORS | objectives.DIVISORS)
    divisor = stage1_extreme.count_units(objective, rollouts.rewards, rollouts.response_lens)
    ours = stage1.LOSSES[objective](x, our_args(loss=objective, **flags))[0] / divisor
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert abs(ours.item()) > 1e-4
    expected, found = gradients(theirs, trainer.model), gradients(ours, policy.lm)
    assert expected.keys() == found.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-3
    for parameter, grad in expected.items():
        assert torch.allclose(found[parameter], grad, rtol=0, atol=1e-6 * max(1, scale)), parameter


def test_the_cases_are_told_apart(case):
    """Clip and caps are met on both sides: agreement above is not for want of them."""
    _, x, _ = case
    ratio = x.log_ratio.exp()
    for bound in (0.8, 1.28, 1.1):
        assert (ratio < bound).any() and (ratio > bound).any()
    mean = x.mean_over_tokens(x.log_ratio).exp()
    assert (mean < 0.95).any() and (mean > 1.05).any() and ((mean - 1).abs() < 0.05).any()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages(scale, model_folders, tokenizer, tmp_path):
    """TRL adds 1e-4 to the deviation, we 1e-6 (verl): A (deviation + eps) is the same. Its "none"
    is our --advantages group_mean. Both take the unbiased deviation."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1])
    index = torch.arange(3).repeat_interleave(4).int()
    trainer = make_trainer(
        model_folders[0],
        tmp_path,
        tokenizer,
        rewards.tolist(),
        scale_rewards=scale,
        per_device_train_batch_size=12,
    )
    prompts = [{"prompt": f"{i}+1=?\n"} for i in (1, 2, 3) for _ in range(4)]
    trainer.model.train()
    theirs = trainer._generate_and_score_completions(prompts)["advantages"]
    advantages, pass_rates = stage1_extreme.group_statistics(rewards, index)
    deviation = rewards.view(3, 4).std(1).repeat_interleave(4)
    if scale == "group":
        theirs_centred, ours_centred = theirs * (deviation + 1e-4), advantages * (deviation + 1e-6)
        assert torch.allclose(theirs_centred, ours_centred, atol=1e-6)
        assert (theirs - advantages).abs().max() > 1e-5
    else:
        per_response = rewards, advantages, pass_rates, rewards
        x = stage1_extreme.LossInputs(*torch.zeros(3, 12), torch.arange(12), *per_response)
        x = objectives.choose_advantages(x, our_args(advantages="group_mean"))
        assert torch.allclose(theirs, x.advantages, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_jsd(beta, temperature):
    torch.manual_seed(0)
    teacher = torch.randn(2, 5, 4).double()
    student = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(11, 4).double(), torch.randn(11, 4).double()
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[1, 3:] = -100  # two positions of padding, to have its denominator in the comparison
    theirs = GKDTrainer.generalized_jsd_loss(
        student @ weights[0].T, teacher @ weights[1].T, labels, beta=beta, temperature=temperature
    )
    kept = labels != -100
    outputs = [common.Output(weight) for weight in weights]
    pair = (teacher[kept], outputs[1]), (student[kept], outputs[0])
    ours = divergences.jsd(*pair, temperature, jsd_beta=beta).sum() / kept.sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert torch.allclose(*grads, atol=1e-12)
    assert grads[0].abs().max() > 1e-3
