"""Finished runs side by side: the vote against enumeration, paired intervals, the whole table."""

import itertools

import compare_runs
import numpy as np
import pytest
import torch
from compare_runs import Args, answer_classes, majority_at_k, paired_difference

import common
import evaluate


def majority_by_enumeration(classes, k):
    """The share of all subsets of k that the vote wins; a tie is shared evenly."""
    won = []
    for subset in itertools.combinations(classes, k):
        votes = {c: subset.count(c) for c in subset if c >= 0}
        winners = [c for c in votes if votes[c] == max(votes.values())]
        won.append((0 in winners) / max(1, len(winners)))
    return sum(won) / len(won)


def test_majority_equals_enumeration_of_all_subsets():
    for seed in range(80):
        rng = np.random.default_rng(seed)
        classes = rng.integers(-1, rng.integers(1, 6), rng.integers(1, 10)).tolist()
        for k in range(1, len(classes) + 1):
            expected = majority_by_enumeration(classes, k)
            assert majority_at_k(classes, k) == pytest.approx(expected, abs=1e-12), (classes, k)


def test_majority_by_hand():
    assert majority_at_k([0, 1, 2], 3) == pytest.approx(1 / 3)  # a tie of three
    assert majority_at_k([0, -1, -1, -1], 4) == 1  # no answer, no vote
    with np.errstate(all="raise"):  # C(1000, 500) does not overflow
        assert 0.5 < majority_at_k([0] * 501 + [1] * 499, 500) < 1
    with pytest.raises(ValueError, match="maj@2 .* not 1001"):
        majority_at_k([0] * 1001, 2)


def test_classes_of_answers():
    wrong = [(0.0, answer) for answer in ("x = 3", None, "x=3", "4", "")]
    assert answer_classes([(1.0, "1/2"), (1.0, "0.5"), *wrong]) == [0, 0, 1, -1, 1, 2, 3]


def test_paired_difference_against_numpys_bootstrap():
    """The interval is that of the differences, far narrower than that of two independent runs."""
    rng = np.random.default_rng(0)
    rate = rng.random(150)  # problems differ far more than the runs
    ours, theirs = rng.binomial(16, np.minimum(rate + 0.05, 1)), rng.binomial(8, rate)
    pair = [(torch.tensor(x), torch.full((150,), n)) for x, n in ((ours, 16), (theirs, 8))]
    difference, low, high = paired_difference(*pair)
    per_problem = ours / 16 - theirs / 8
    assert difference == pytest.approx(per_problem.mean())
    resampled = per_problem[rng.integers(0, 150, (20000, 150))].mean(1)
    assert [low, high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.003)
    assert high - low < 1.96 * (np.var(ours / 16) / 150 + np.var(theirs / 8) / 150) ** 0.5
    # Problems without a measurement change nothing, though some resamples hold no others.
    total, count = torch.tensor([1.0, 0, 0]), torch.tensor([1, 0, 0])
    assert paired_difference((total, count), (total, count)) == (0, 0, 0)


def write_run(folder, answers, kl=None, base="b", **changes):
    """A run folder as evaluate.py leaves it; the gold of every problem is "1"."""
    problems = [{"id": i, "problem": f"What is {i}?", "answer": "1"} for i in answers]
    evaluate.write_jsonl(folder / "problems.jsonl", problems)
    rows = [{"id": i, "reward": a == "1", "answer": a} for i in answers for a in answers[i]]
    evaluate.write_jsonl(folder / "samples.jsonl", rows)
    args = dict.fromkeys(compare_runs.SETTINGS, 1.0) | changes
    common.write_json(folder / "args.json", {"args": args, "inputs": {"base": base}})
    metrics = {"accuracy": [0.5, 0.125], "pass@2": [0.75, None], "mean_length": [1234.5, 17.2]}
    common.write_json(folder / "metrics.json", {"metrics": metrics | {"kl": [None, None]}})
    if kl is not None:
        arrays = {"kl": torch.tensor(kl), "response": torch.arange(len(kl))}
        common.save_tensors(folder / "kl.safetensors", arrays, {})
    return folder


def compared(capsys, *runs, **flags):
    compare_runs.main(Args(runs=runs, **flags))
    return " ".join(capsys.readouterr().out.split())


def test_tables_of_two_runs_whose_problems_have_another_order(tmp_path, capsys):
    a = write_run(tmp_path / "a", {"p": ["1", "2", "2 "], "q": [None, *"111"]}, [0.5] * 7)
    b = write_run(tmp_path / "b", {"q": ["1", "1"], "p": ["3", "1"]}, [2.0, 2.0, 1.0, 1.0])
    printed = compared(capsys, a, b, markdown=True)
    # maj@2 in run a: of p, two pairs in three are ties; of q, every pair has a right answer.
    numbers = "0.500 ± 0.125 | 0.750 | 0.667 ± 0.333 | 1234 ± 17 | n/a | n/a | n/a"
    assert f"| {a} | {numbers} |" in printed
    assert f"| {b} | {numbers.replace('0.667 ± 0.333', '0.750 ± 0.250')} |" in printed
    # Accuracy 1/2 - 1/3 on p, 1 - 3/4 on q, 3/4 - 4/7 on both; KL 1 - 0.5 on p, 2 - 0.5 on q.
    assert f"| {b} | +0.179 [+0.167, +0.250] | +1.000 [+0.500, +1.500] |" in printed
    assert "note" not in printed
    printed = compared(capsys, a, against=b)
    assert f"{a} -0.179 [-0.250, -0.167] -1.000" in printed and "|" not in printed


def test_runs_that_are_hard_to_compare(tmp_path, capsys):
    same = {"p": ["1"], "q": ["2"]}
    a = write_run(tmp_path / "a", same, [0.5, 0.5])
    b = write_run(tmp_path / "b", same, [1.0, 1.0], base="c", temperature=0.6)
    printed = compared(capsys, a, b)
    assert f"note: temperature is 0.6 in {b} and 1.0 in {a}" in printed
    assert f"note: the KL of {b} is to another base than that of {a}" in printed
    assert "+0.000 [+0.000, +0.000] n/a" in printed


def test_runs_that_are_refused(tmp_path):
    a = write_run(tmp_path / "a", {"p": ["1"]})
    c = write_run(tmp_path / "c", {"p": ["1"], "r": ["1"]})

    def refused(words):
        with pytest.raises(common.UserError, match=words):
            compare_runs.main(Args(runs=(a, c)))

    refused("other problems: 1 are .* id 'r'")
    evaluate.write_jsonl(c / "samples.jsonl", [{"id": "p"}])
    refused("c: not an output of evaluate.py, or damaged .KeyError 'reward'")
    evaluate.write_jsonl(c / "samples.jsonl", [{"id": "p", "reward": 1.0, "answer": "1"}])
    refused("c/samples.jsonl: has no response to some problem")
    (c / "metrics.json").unlink()
    refused("c: not a finished evaluation")
    with pytest.raises(common.UserError, match="name at least one"):
        compare_runs.main(Args(runs=()))
