"""build_signals.py: the sum over teachers, and what the diagnostics say about it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import tiny
import torch

import build_signals
import common
from build_signals import Args, auc, credit_auc, share_that_carries

PATHS = {"rollouts": Path("r"), "base": "base", "output": Path("s.safetensors")}


def test_pairs_of_teachers_and_references():
    pairs = Args(**PATHS, teachers=("a", "b")).pairs
    assert pairs == [(1.0, "a", "base"), (1.0, "b", "base")]
    pairs = Args(**PATHS, teachers=("a", "b"), references=("u",), weights=(0.3, -1.0)).pairs
    assert pairs == [(0.3, "a", "u"), (-1.0, "b", "u")]
    pairs = Args(**PATHS, teachers=("base", "b"), references=("u", "v")).pairs
    assert pairs == [(1.0, "base", "u"), (1.0, "b", "v")]


def test_auc_by_enumeration():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 12, (2,), generator=generator).tolist()
        positive, negative = (torch.randint(0, 6, (n,), generator=generator).float() for n in sizes)
        wins = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative)
        assert auc(positive, negative) == pytest.approx(wins.mean().item())
    none = torch.tensor([])
    assert math.isnan(auc(positive, none)) and math.isnan(auc(none, positive))


def credit(*sequences):
    """credit_auc of (prompt length, reward, first wrong token, signal of the whole sequence)."""
    prompts, rewards, wrong, signals = zip(*sequences, strict=True)
    tokens = [([9] * p, [9] * (len(s) - p)) for p, s in zip(prompts, signals, strict=True)]
    marks = {"first_wrong_token": torch.tensor(wrong, dtype=torch.int32)}
    rollouts = tiny.make_rollouts("r", tokens, rewards, [0] * len(rewards), **marks)
    return credit_auc(torch.tensor(sum(signals, [])), rollouts)


def test_credit_auc_compares_with_earlier_response_tokens_only():
    """Prompt of 2; the wrong token is at 5, with -1; before it one lower, one higher, one equal."""
    value, _, n = credit((2, 0.0, 5, [9.0, -9.0, -2.0, 3.0, -1.0, -1.0, -99.0, 5.0]))
    assert (value, n) == (pytest.approx((0 + 1 + 0.5) / 3), 1)
    assert credit((1, 0.0, 4, [0.0, 1.0, 2.0, 3.0, -1.0]))[0] == 1
    assert credit((1, 0.0, 4, [0.0, 1.0, 2.0, 3.0, 8.0]))[0] == 0
    assert credit((1, 0.0, 2, [0.0, 0.0, 0.0]))[0] == 0.5


def test_credit_auc_leaves_out_what_cannot_be_compared():
    at_once = (2, 0.0, 2, [0.0, 0.0, -1.0, 0.0])  # no response token before the wrong one
    unknown = (2, 0.0, -1, [0.0, 0.0, 1.0, -1.0])
    correct = (2, 1.0, 3, [0.0, 0.0, -3.0, -1.0])  # right in the end, whatever happened
    value, error, n = credit(at_once, unknown, correct)
    assert math.isnan(value) and math.isnan(error) and n == 0
    usable = (1, 0.0, 2, [0.0, 1.0, -1.0])
    value, error, n = credit(at_once, usable, unknown, correct)
    assert (value, n) == (1, 1) and math.isnan(error)  # one response has no spread


def test_credit_auc_averages_over_responses():
    """Not over tokens: a long response counts as much as a short one."""
    long = (1, 0.0, 5, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # 1
    short = (1, 0.0, 2, [0.0, 0.0, 1.0])  # 0
    half = (1, 0.0, 2, [0.0, 1.0, 1.0])  # 0.5
    value, error, n = credit(long, short, half)
    assert (value, n) == (0.5, 3) and error == pytest.approx(0.5 / 3**0.5)


def test_share_that_carries():
    assert share_that_carries(torch.tensor([0.0, -10.0, 0.0, 0.0]), 0.9) == 0.25
    assert share_that_carries(-torch.ones(10), 0.9) == 0.9
    signal = torch.tensor([5.0, -3.0, 1.0, 1.0])
    shares = [share_that_carries(signal, part) for part in (0.5, 0.51, 1.0)]
    assert shares == [0.25, 0.5, 1.0]
    assert math.isnan(share_that_carries(torch.zeros(3), 0.9))


def test_diagnose_by_hand(tokenizer):
    """Two responses to one problem; tokens 5 and 6 get their sums over both."""
    sequences = [([3, 4], [5, 6, 1]), ([3, 4], [5, 1])]
    signal = torch.tensor([9.0, 9.0, 1.0, 2.0, 0.0, 9.0, 9.0, -4.0, 0.5])
    signal[[0, 1, 5, 6]] = 0.0  # prompts
    rollouts = tiny.make_rollouts("r", sequences, [1.0, 0.0], [0, 0])
    report = build_signals.diagnose(signal, rollouts, tokenizer)
    assert (report["auc"], report["mean_correct"], report["mean_wrong"]) == (1, 3, -3.5)
    assert report["share_of_tokens_with_90_percent"] == 3 / 5  # 4 + 2 + 1 of 7.5
    assert report["sd"] == pytest.approx(torch.tensor([1.0, 2.0, 0.0, -4.0, 0.5]).std().item())
    names = [tokenizer.decode([i]) for i in (6, 1, 5)]
    assert report["most_credit"][:2] == [[names[0], 2.0], [names[1], 0.5]]
    assert report["most_blame"][0] == [names[2], -3.0] and report["most_blame"][1][1] == 0
    assert len(report["most_credit"]) == len(report["most_blame"]) == 7  # as far as the tokens go
    assert "credit_auc" not in report
    wrong = tiny.make_rollouts("r", sequences, [0.0, 0.0], [0, 0])
    assert build_signals.diagnose(signal, wrong, tokenizer)["auc"] is None


def test_forecast_by_hand():
    """Two problems; the second has one sample, whose weight is 1 whatever its total."""
    total, rewards = torch.tensor([math.log(3), 900.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    found = build_signals.forecast(total, rewards, torch.tensor([4, 7, 4]))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = [[0.75, 0.0], [kl, 0.0], [1 / (0.75**2 + 0.25**2), 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    huge = build_signals.forecast(torch.tensor([5e4, -5e4]), torch.ones(2), torch.zeros(2).int())
    assert huge[:, 0].tolist() == [1, pytest.approx(math.log(2)), 1]


def test_the_frontier_is_what_nothing_beats():
    """Of eight responses to a problem six are right; the signal knows which, with some noise."""
    n = 40
    rewards, index = [1.0, 0.0, 1.0, 1.0] * (2 * n), [s // 8 for s in range(8 * n)]
    rollouts = tiny.make_rollouts("r", [([3], [5, 6, 1])] * (8 * n), rewards, index)
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(len(rollouts.tokens), generator=generator) * 0.1
    signal += (rollouts.rewards - 0.5)[rollouts.sequence_ids] * 0.4
    base = torch.full_like(signal, math.log(0.5))
    args = Args(**PATHS, teachers=("a",))
    found = build_signals.forecasts(signal, base, rollouts, args)
    rows = found["frontier"]
    assert found["problems"] == n and (rows[0]["accuracy"], rows[0]["kl"]) == (0.75, 0)
    assert all(row["effective"] >= 3 for row in rows)  # half of the six that are right
    for before, after in zip(rows, rows[1:], strict=False):
        assert before["kl"] <= after["kl"] and before["accuracy"] < after["accuracy"]
    assert [len(row["difference_se"]) for row in rows] == list(range(len(rows)))
    last, mask = rows[-1], rollouts.response_mask
    bounds = {name: last[name] for name in build_signals.BOUNDS}
    target = build_signals.bounded_target(signal, base, Args(**PATHS, teachers=("a",), **bounds))
    total = (target * mask).view(8 * n, 4).sum(1)
    accuracy = build_signals.forecast(total, rollouts.rewards, rollouts.problem_index)[0]
    assert last["accuracy"] == pytest.approx(accuracy.mean().item())
    assert last["difference_se"][0] == pytest.approx(accuracy.std().item() / n**0.5)
    # More noise than signal, and large: what looks best rests on few samples.
    noise = 3 * torch.randn(len(signal), generator=generator)
    noise += 2 * (rollouts.rewards - 0.5)[rollouts.sequence_ids]
    rows = build_signals.forecasts(noise, base, rollouts, args)["frontier"]
    assert all(row["effective"] >= 3 for row in rows)


def test_held_out_rollouts_are_checked(tmp_path):
    folder = tiny.setting()
    rollouts = common.load_rollouts(folder / "rollouts")
    args = Args(folder / "rollouts", str(folder / "base"), ("t",), PATHS["output"])

    def error(name, **metadata):
        """What is said of the same rollouts with other metadata."""
        path = tmp_path / name / "rollouts.safetensors"
        tiny.save_rollouts(dataclasses.replace(rollouts, path=path, metadata=metadata))
        args.held_out_rollouts = path.parent
        with pytest.raises(common.UserError) as raised:
            build_signals.load_held_out(args, rollouts)
        return str(raised.value)

    own = {"model_fingerprint": common.fingerprint(folder / "base")}
    assert "not sampled from --base" in error("a")
    assert "another temperature" in error("b", **own, sampling={"temperature": 0.5})
    assert f"shares {rollouts.problem_index.max() + 1} problems with" in error("c", **own)


def test_the_file_has_the_sum_and_names_its_models(tmp_path, ranks, capsys):
    folder = tiny.setting()
    base, other, data = (str(folder / name) for name in ("base", "other", "rollouts"))
    output = tmp_path / "signals.safetensors"
    args = Args(Path(data), base, (base, other), output, (other, base), (0.5, -1.0), behavior=other)
    build_signals.main(args)
    arrays, metadata = common.load_tensors(output)
    rollouts = common.load_rollouts(folder / "rollouts")
    scores = {name: common.score(name, rollouts, 10**6, ranks) for name in (base, other)}
    log_ratio = scores[other] - scores[base]
    expected = {"base_logprobs": scores[base], "behavior_logprobs": scores[other]}
    expected["signal"] = -1.5 * log_ratio
    torch.testing.assert_close(arrays, expected, atol=1e-5, rtol=1e-5)
    models = {"base": base, "behavior": other, "teacher_0": base, "reference_0": other}
    models |= {"teacher_1": other, "reference_1": base}
    assert {role: model["path"] for role, model in metadata["models"].items()} == models
    assert metadata["models"]["base"]["fingerprint"] == common.fingerprint(Path(base))
    assert metadata["rollouts"] == common.fingerprint(rollouts.path)
    assert output.with_suffix(".json").read_text().startswith('{\n  "auc": 0.')
    report = common.read_json(output.with_suffix(".json"))
    assert report["weights"] == [0.5, -1.0] and 0 < report["auc"] < 1
    assert report["forecast"] is None  # another policy sampled, as the arguments say
    assert len(report["most_credit"]) == len(report["most_blame"]) == 8
    assert f"{report['auc']:.4f}" in capsys.readouterr().out
    before = output.read_bytes()
    build_signals.main(args)  # again: complete
    assert "nothing to do" in capsys.readouterr().out and output.read_bytes() == before
    args.weights = (1.0, 1.0)
    with pytest.raises(common.UserError, match="other inputs"):
        build_signals.main(args)
