"""examples/arithmetic/measured.py: what figures.py reads and averages over seeds."""

from __future__ import annotations

import math

import measured
import numpy as np
import pytest
import tiny

import common


def test_lines_are_means_of_neighbouring_steps(tmp_path, monkeypatch):
    runs = tmp_path / "a", tmp_path / "b"
    for offset, run in enumerate(runs):
        rows = [{"epoch": i / 4, "entropy": offset + i} for i in range(1, 5)]
        rows[0]["entropy"] = None if offset else 1
        tiny.write_jsonl(run / "paper/stage1/ce/metrics.jsonl", rows)
    monkeypatch.setattr(measured, "POINTS", 2)
    epochs, entropy = measured.logged(runs, "ce", "entropy")
    assert epochs.tolist() == [0.375, 0.875]
    assert entropy.tolist() == [[1.5, 3.5], [3, 4.5]]  # null is left out of its mean
    spread = measured.spread([0.5, 0.7, math.nan])
    assert (spread["n"], spread["sd"]) == (2, pytest.approx(0.1 * 2**0.5))


@pytest.mark.parametrize("target", ["soft_value", "verdict"])
def test_what_the_targets_ask_of_responses(tmp_path, target):
    """By the formulas: V* = beta log mean exp(R / beta) over the responses to a problem."""
    groups, beta, wanted = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], 0.3, {0.0: [], 1.0: []}
    path = tmp_path / "rollouts/rollouts.safetensors"
    pairs, rewards = [([3], [4, 1])] * 6, sum(groups, [])
    tiny.save_rollouts(tiny.make_rollouts(path, pairs, rewards, [0, 0, 0, 1, 1, 1]))
    for group in groups:
        value = beta * math.log(sum(math.exp(r / beta) for r in group) / 3)
        for r in group:
            wanted[r].append((r - value * (target == "soft_value")) / beta)
    args = {"args": {"beta": beta, "mse_target": target}}
    common.write_json(tmp_path / "paper/stage1/mse/args.json", args)
    expected = [np.mean(wanted[1.0]), np.mean(wanted[0.0])]
    assert measured.asked(tmp_path, "mse") == pytest.approx(expected)
