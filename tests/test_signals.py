"""Signals: the sum over teachers, and what the diagnostics say about it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from build_signals import Args, auc, combine, credit_auc, share_that_carries

PATHS = {"rollouts": Path("r"), "base": "base", "output": Path("s.safetensors")}


def test_combine_adds_weighted_log_ratios():
    torch.manual_seed(0)
    teachers, references = torch.randn(2, 5), torch.randn(2, 5)
    kept = teachers.clone(), references.clone()
    signal = combine([(0.25, teachers[0], references[0]), (-2.0, teachers[1], references[1])])
    expected = 0.25 * (teachers[0] - references[0]) - 2 * (teachers[1] - references[1])
    assert torch.allclose(signal, expected)
    assert torch.equal(combine([(1.0, teachers[0], references[0])]), teachers[0] - references[0])
    assert torch.equal(teachers, kept[0])
    assert torch.equal(references, kept[1])


def test_a_teacher_against_itself_is_silent():
    values = torch.randn(5)
    assert not combine([(3.0, values, values)]).any()


def test_pairs_of_teachers_and_references():
    args = Args(**PATHS, teachers=("a", "b"))
    assert args.pairs == [(1.0, "a", "base"), (1.0, "b", "base")]
    args = Args(**PATHS, teachers=("a", "b"), references=("u",), weights=(0.3, -1.0))
    assert args.pairs == [(0.3, "a", "u"), (-1.0, "b", "u")]
    args = Args(**PATHS, teachers=("base", "b"), references=("u", "v"))
    assert args.pairs == [(1.0, "base", "u"), (1.0, "b", "v")]


def test_auc_with_ties_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n_positive, n_negative = torch.randint(1, 12, (2,), generator=generator).tolist()
        positive = torch.randint(0, 6, (n_positive,), generator=generator).float()
        negative = torch.randint(0, 6, (n_negative,), generator=generator).float() - 0.5 * 2
        wins = [
            1.0 if p > n else 0.5 if p == n else 0.0
            for p in positive.tolist() for n in negative.tolist()
        ]  # fmt: skip
        assert auc(positive, negative) == pytest.approx(sum(wins) / len(wins))


def test_auc_limits():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert (auc(high, low), auc(low, high), auc(low, low)) == (1, 0, 0.5)
    assert math.isnan(auc(low, torch.tensor([])))
    assert math.isnan(auc(torch.tensor([]), low))


def credit(sequences):
    """(prompt length, reward, first wrong token, signal of the whole sequence) of each response."""
    prompts, rewards, wrong, signals = zip(*sequences, strict=True)
    lengths = torch.tensor([0] + [len(s) for s in signals])
    return credit_auc(
        torch.tensor(sum(signals, [])), lengths.cumsum(0), torch.tensor(prompts).int(),
        torch.tensor(rewards), torch.tensor(wrong).int(),
    )  # fmt: skip


def test_credit_auc_compares_with_earlier_response_tokens_only():
    # prompt 2 tokens; guilty token at 5 with -1; before it one lower, one equal, one higher
    value, _, n = credit([(2, 0.0, 5, [9.0, -9.0, -2.0, -1.0, 3.0, -1.0, -99.0, 5.0])])
    assert (value, n) == (pytest.approx((0 + 0.5 + 1) / 3), 1)
    # the tokens after it, and those of the prompt, do not matter
    changed = credit([(2, 0.0, 5, [0.0, 7.0, -2.0, -1.0, 3.0, -1.0, 44.0, -6.0])])
    assert changed[0] == value
    perfect = credit([(1, 0.0, 4, [0.0, 1.0, 2.0, 3.0, -1.0])])
    blind = credit([(1, 0.0, 4, [0.0] * 5)])
    inverted = credit([(1, 0.0, 4, [0.0, 1.0, 2.0, 3.0, 8.0])])
    assert (perfect[0], blind[0], inverted[0]) == (1, 0.5, 0)


def test_credit_auc_leaves_out_what_cannot_be_compared():
    guilty_at_once = (2, 0.0, 2, [0.0, 0.0, -1.0, 0.0])  # no response token before it
    unknown = (2, 0.0, -1, [0.0, 0.0, 1.0, -1.0])
    correct = (2, 1.0, 3, [0.0, 0.0, -3.0, -1.0])  # right in the end, whatever happened
    value, error, n = credit([guilty_at_once, unknown, correct])
    assert math.isnan(value)
    assert math.isnan(error)
    assert n == 0
    usable = (1, 0.0, 2, [0.0, 1.0, -1.0])
    value, _, n = credit([guilty_at_once, usable, unknown, correct])
    assert (value, n) == (1, 1)


def test_credit_auc_averages_over_responses():
    """Not over tokens: a long response counts as much as a short one."""
    long = (1, 0.0, 5, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # 1
    short = (1, 0.0, 2, [0.0, 0.0, 1.0])  # 0
    half = (1, 0.0, 2, [0.0, 1.0, 1.0])  # 0.5
    value, error, n = credit([long, short, half])
    assert (value, n) == (0.5, 3)
    assert error == pytest.approx(0.5 / 3**0.5)


def test_share_that_carries():
    assert share_that_carries(torch.tensor([0.0, -10.0, 0.0, 0.0]), 0.9) == 0.25
    assert share_that_carries(torch.ones(10) * -1, 0.9) == 0.9
    assert share_that_carries(torch.tensor([5.0, -3.0, 1.0, 1.0]), 0.5) == 0.25
    assert share_that_carries(torch.tensor([5.0, -3.0, 1.0, 1.0]), 0.51) == 0.5
    assert share_that_carries(torch.tensor([1.0, 1.0, -3.0, 5.0]), 1.0) == 1.0
    assert math.isnan(share_that_carries(torch.zeros(3), 0.9))
