"""Evaluation: estimators against enumeration, answers, the table, and exact sequence KLs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import evaluate
from evaluate import (
    boxed_answer,
    kl_efficiency,
    least_kl,
    majority_at_k,
    pass_at_k,
    tilted_optimum,
)  # fmt: skip

EOS, PROMPT, LIMIT = 1, [2, 3], 3  # the enumerable policies: vocabulary 4, at most 3 new tokens


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# pass@k


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_equals_enumeration_of_all_subsets(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        expected = sum(any(s) for s in subsets) / len(subsets)
        value = pass_at_k(torch.tensor([correct]), torch.tensor([n]), k)
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_uses_each_problems_own_number_of_samples():
    value = pass_at_k(torch.tensor([1, 1]), torch.tensor([2, 4]), 2)
    assert value.tolist() == pytest.approx([1.0, 0.5])


def test_pass_at_k_refuses_more_than_the_samples():
    with pytest.raises(ValueError, match=r"pass@4 .*one has 3"):
        pass_at_k(torch.tensor([1, 1]), torch.tensor([3, 8]), 4)


# --------------------------------------------------------------------------------------------------
# maj@k


def majority_by_enumeration(classes, k):
    """Every subset of k: the share of it that the vote wins, a tie shared evenly."""
    won = []
    for subset in itertools.combinations(classes, k):
        votes = {c: subset.count(c) for c in subset if c >= 0}
        winners = [c for c in votes if votes[c] == max(votes.values())]
        won.append((0 in winners) / max(1, len(winners)))
    return sum(won) / len(won)


@pytest.mark.parametrize("seed", range(60))
def test_majority_equals_enumeration_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-1, rng.integers(1, 6), rng.integers(1, 10)).tolist()
    ks = list(range(1, len(classes) + 1))
    expected = [majority_by_enumeration(classes, k) for k in ks]
    assert majority_at_k(classes, ks) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("classes", "k", "expected"),
    [
        ([0, 0, 1], 3, 1.0),
        ([0, 1, 2], 3, 1 / 3),  # a tie of three
        ([0, 1, 1, -1], 4, 0.0),
        ([0, -1, -1, -1], 4, 1.0),  # silence does not vote
        ([-1, -1], 2, 0.0),  # no vote at all
        ([0, 1, 2, 3], 1, 0.25),  # one vote: the accuracy
        ([0, 0, 1, 1], 2, 0.5),
    ],
)
def test_majority_by_hand(classes, k, expected):
    assert majority_at_k(classes, [k]) == pytest.approx([expected])


def test_majority_of_many_samples():
    """A share of 0.6 against 0.4 nearly always wins; no count overflows at the limit."""
    with np.errstate(all="raise"):
        values = [majority_at_k([0] * (6 * m) + [1] * (4 * m), [m])[0] for m in (20, 100)]
        assert 0.8 < values[0] < values[1] < 1
        first, _, last = majority_at_k([0] * 501 + [1] * 499, [1, 500, 1000])
        assert (first, last) == pytest.approx((0.501, 1))
    with pytest.raises(ValueError, match="at most 1000 samples"):
        majority_at_k([0] * 1001, [2])


def test_majority_refuses_more_than_the_samples():
    with pytest.raises(ValueError, match=r"maj@4 .*one has 3"):
        majority_at_k([0, 1, 2], [1, 4])


# --------------------------------------------------------------------------------------------------
# Two runs compared


def test_paired_difference_against_numpys_bootstrap():
    """Paired: the spread is that of the differences, not of two independent runs."""
    rng = np.random.default_rng(0)
    rate = rng.random(150)  # problems differ far more than the runs
    ours, theirs = rng.binomial(16, np.minimum(rate + 0.05, 1)), rng.binomial(8, rate)
    difference, low, high = evaluate.paired_difference(
        (torch.tensor(ours), torch.full((150,), 16)), (torch.tensor(theirs), torch.full((150,), 8))
    )
    per_problem = ours / 16 - theirs / 8
    assert difference == pytest.approx(per_problem.mean())
    draws = per_problem[rng.integers(0, 150, (20000, 150))].mean(1)
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.003)
    independent = 1.96 * (np.var(ours / 16) / 150 + np.var(theirs / 8) / 150) ** 0.5
    assert high - low < independent  # of two independent runs it would be twice that


def test_paired_difference_with_itself_is_zero():
    run = (double(3, 1, 4), double(8, 8, 8))
    assert evaluate.paired_difference(run, run) == (0, 0, 0)


# --------------------------------------------------------------------------------------------------
# The least KL, efficiency, the tilted optimum


def test_least_kl_values():
    accuracy, base = double(0.5, 0.9, 0.7, 1.0, 0.0, 0.3), double(0.9, 0.5, 0.7, 0.25, 0.25, 0.0)
    expected = [0.510826, 0.368064, 0.0, math.log(4), math.log(4 / 3), math.inf]
    assert least_kl(accuracy, base).tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_efficiency():
    accuracy, base = double(0.9, 0.9, 0.5, 0.4, 0.9), double(0.5, 0.5, 0.5, 0.5, 0.5)
    kl = double(0.368064, 2 * 0.368064, 0.1, 0.1, 0.0)
    values = kl_efficiency(accuracy, base, kl).tolist()
    assert values[:2] == pytest.approx([1, 0.5], abs=1e-5)
    assert all(map(math.isnan, values[2:]))  # not better, worse, or no KL at all
    assert kl_efficiency(double(0.9), double(0.5), double(0.1)).item() > 3  # never clipped


def test_tilted_optimum_with_equal_rates_is_the_bound():
    accuracy, kl = tilted_optimum(torch.full((5,), 0.3), torch.tensor([0.5, 2.0, 5.0]))
    assert torch.allclose(kl, least_kl(accuracy, double(0.3)), atol=1e-6)  # 0.3 came in float32
    weights = torch.tensor([0.5, 2.0, 5.0], dtype=torch.float64).exp()
    assert torch.allclose(accuracy, 0.3 * weights / (0.3 * weights + 0.7), atol=1e-6)


def test_tilted_optimum_with_unequal_rates_is_below_the_bound():
    rates = double(0.05, 0.3, 0.6, 0.95)
    accuracy, kl = tilted_optimum(rates, torch.tensor([0.5, 2.0, 5.0]))
    assert (kl_efficiency(accuracy, rates.mean(), kl) < 0.97).all()
    assert (accuracy.diff() > 0).all()
    assert (kl.diff() > 0).all()


def test_tilted_optimum_at_zero_is_the_base():
    rates = torch.tensor([0.0, 0.25, 1.0])
    accuracy, kl = tilted_optimum(rates, torch.tensor([0.0]))
    assert accuracy.item() == pytest.approx(rates.mean().item())
    assert kl.item() == 0
    stuck = tilted_optimum(torch.tensor([0.0, 1.0]), torch.tensor([3.0]))
    assert (stuck[0].item(), stuck[1].item()) == (0.5, 0)  # nothing to re-weight


# --------------------------------------------------------------------------------------------------
# Means over problems


def test_mean_over_problems_with_equal_counts_is_the_usual_one():
    rng = np.random.default_rng(0)
    samples = rng.random((12, 8))
    total, count = torch.from_numpy(samples.sum(1)), torch.full((12,), 8)
    mean, error = evaluate.mean_over_problems(total, count)
    per_problem = samples.mean(1)
    assert mean == pytest.approx(per_problem.mean())
    assert error == pytest.approx(per_problem.std(ddof=1) / 12**0.5)


def test_mean_over_problems_with_unequal_counts_is_the_ratio():
    """The standard error of a ratio (linearised) against that of numpy's own resampling."""
    rng = np.random.default_rng(0)
    count = rng.integers(2, 9, 200)
    total = rng.binomial(count, rng.random(200))
    mean, error = evaluate.mean_over_problems(torch.from_numpy(total), torch.from_numpy(count))
    assert mean == pytest.approx(total.sum() / count.sum())
    draw = rng.integers(0, 200, (4000, 200))
    assert error == pytest.approx((total[draw].sum(1) / count[draw].sum(1)).std(), rel=0.05)


def test_one_problem_has_no_error_bar_but_no_crash():
    assert evaluate.mean_over_problems(torch.tensor([3.0]), torch.tensor([4.0])) == (0.75, None)


def test_a_long_integer_is_a_field_like_any_other():
    """math.isfinite would have to make a float of it first."""
    assert evaluate.field({"answer": 10**400}, "answer") == "1" + 400 * "0"
    for value in (True, float("nan"), float("inf"), None, []):
        with pytest.raises(ValueError, match="missing or empty"):
            evaluate.field({"answer": value}, "answer")


def test_a_tokenizer_that_hides_the_end_of_a_thought_is_refused(tokenizer):
    hiding = copy.deepcopy(tokenizer)
    hiding.add_special_tokens({"additional_special_tokens": ["</think>"]})
    args = evaluate.Args(model="m", problems=Path("p"), output=Path("o"))
    problems = [{"id": "1", "problem": "1+1=?", "answer": "2"}]
    assert evaluate.encode_prompts(tokenizer, problems, args)
    with pytest.raises(common.UserError, match="</think>"):
        evaluate.encode_prompts(hiding, problems, args)


def test_a_grading_process_that_never_started_judges_nothing():
    """Pairs given before it was ready go back to be tried; None would call them wrong."""
    grader = evaluate.Grader(5.0)
    worker = evaluate.Worker(grader.context, 5.0)
    worker.give([("2", "2")])
    grader.workers.append(worker)
    waiting, done = deque(), {}
    grader.replace(worker, True, waiting, done)
    assert done == {} and list(waiting) == [("2", "2")]


def test_problems_without_a_count_have_no_part_in_the_error():
    """Two of thirty measured: the error is that of two."""
    total, count = torch.zeros(30), torch.zeros(30)
    total[3], total[17], count[3], count[17] = 1.0, 2.0, 1, 1
    assert evaluate.mean_over_problems(total, count) == (1.5, pytest.approx(0.5))
    pair = (total, count)
    difference, low, high = evaluate.paired_difference(pair, pair)
    assert (difference, low, high) == (0, 0, 0)  # though most draws hold neither


# --------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{{{1}}}", "{{1}}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", None),  # the last one was not finished
        (r"\boxed{\frac{1}{2}", None),
        (r"<think>\boxed{1}</think> it is 2", None),
        (r"<think>\boxed{1}</think> it is \boxed{2}", "2"),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
        ("the answer is 7", None),
        (r"\boxed 7", None),
        (r"\boxed{}", ""),
        ("", None),
        (r"\boxed{1}} tail }", "1"),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


# --------------------------------------------------------------------------------------------------
# The table


def made_rollouts(rewards, index, response_lens):
    """Prompts of one token, tokens of no meaning."""
    lengths = torch.tensor([0] + [1 + n for n in response_lens])
    n = len(rewards)
    return common.Rollouts(
        Path("r"), {}, torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths.cumsum(0),
        torch.ones(n, dtype=torch.int32), torch.tensor(rewards).float(),
        torch.tensor(index, dtype=torch.int32), torch.tensor([r > 5 for r in response_lens]),
    )  # fmt: skip


def test_collect_metrics():
    rollouts = made_rollouts([1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [2, 4, 6, 2, 2, 8])
    base = made_rollouts([1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6)
    subset = torch.tensor([0, 2, 5])
    kl = {"kl": torch.tensor([0.5, 1.5, 4.0]), "k1": torch.tensor([0.0, 1.0, 2.0]),
          "entropy": torch.tensor([2.0, 6.0, 16.0]), "response": subset}  # fmt: skip
    metrics = evaluate.collect_metrics(rollouts, kl, base)
    values = {name: value for name, (value, _) in metrics.items()}
    expected = {
        "accuracy": 0.5, "pass@1": 0.5, "pass@2": (1 + 2 / 3) / 2, "mean_length": 4.0,
        "truncated": 2 / 6, "kl": 2.0, "k1": 1.0, "entropy": 24 / 16, "base_accuracy": 1 / 3,
        "kl_efficiency": (0.5 * math.log(1.5) + 0.5 * math.log(0.75)) / 2.0,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert not {"pass@3", "pass@4"} & set(values)  # 3 samples: powers of two only
    errors = {name: error for name, (_, error) in metrics.items()}
    assert errors["accuracy"] == pytest.approx(np.std([2 / 3, 1 / 3], ddof=1) / 2**0.5)
    assert errors["base_accuracy"] == pytest.approx(0)
    assert (values["length_correct"], values["length_wrong"]) == pytest.approx((8 / 3, 16 / 3))
    # Ratio of sums: each problem has residuals (T - m C) of its own count of correct responses.
    residual = np.array([6 - 8 / 3 * 2, 2 - 8 / 3 * 1])
    assert errors["length_correct"] == pytest.approx((2 * (residual**2).sum()) ** 0.5 / 3)
    alone = evaluate.collect_metrics(rollouts, None, None)
    assert "kl" not in alone
    assert alone["accuracy"] == metrics["accuracy"]


def test_collect_metrics_counts_votes_and_silence():
    rollouts = made_rollouts([1, 1, 0, 0, 0, 0, 0, 0], [0] * 4 + [1] * 4, [1, 1, 1, 8, 2, 2, 2, 2])
    classes = torch.tensor([0, 0, 1, -1, 1, 1, -1, 2], dtype=torch.int32)
    voted = dataclasses.replace(rollouts, answer_class=classes)
    metrics = evaluate.collect_metrics(voted, None, None)
    assert metrics["maj@4"][0] == pytest.approx(0.5)
    by_hand = np.mean([majority_by_enumeration([0, 0, 1, -1], 2), 0])
    assert metrics["maj@2"][0] == pytest.approx(by_hand)
    # Response 3 is silent because it was truncated: counted once, as that.
    assert (metrics["unparsed"][0], metrics["truncated"][0]) == (1 / 8, 1 / 8)
    assert evaluate.collect_metrics(rollouts, None, None).keys() & {"maj@2", "unparsed"} == set()
    nothing = evaluate.collect_metrics(made_rollouts([0, 0], [0, 1], [1, 1]), None, None)
    assert nothing["length_correct"] == (None, None)


def test_collect_metrics_has_no_efficiency_where_the_policy_is_not_better():
    worse = made_rollouts([0, 1, 0, 0], [0, 0, 1, 1], [1] * 4)
    base = made_rollouts([1, 1, 0, 1], [0, 0, 1, 1], [1] * 4)
    kl = dict.fromkeys(("kl", "k1", "entropy"), torch.ones(4)) | {"response": torch.arange(4)}
    assert evaluate.collect_metrics(worse, kl, base)["kl_efficiency"] == (None, None)


# --------------------------------------------------------------------------------------------------
# Exact enumeration: two policies over four tokens, every response there is


def all_responses():
    """Every sequence that ends at its first EOS or at the token limit."""
    found = []
    for n in range(1, LIMIT + 1):
        for tokens in itertools.product(range(4), repeat=n):
            ended = tokens[-1] == EOS
            if EOS not in tokens[:-1] and (ended or n == LIMIT):
                found.append(list(tokens))
    return found


def log_probability(lm, response):
    """Sum of the token log-probs by the plain forward, float64."""
    logprobs = lm(torch.tensor([PROMPT + response])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(PROMPT) - 1 + t, token] for t, token in enumerate(response))


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory):
    """Two policies on disk; all responses as rollouts; log-probabilities under each."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("enumerable")
    responses, tables = all_responses(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
            tie_word_embeddings=True, eos_token_id=EOS, pad_token_id=0,
        )  # fmt: skip
        lm = Qwen3ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.4)
            lm.save_pretrained(folder / str(seed))
            tables.append(torch.stack([log_probability(lm, r) for r in responses]))
    lengths = torch.tensor([0] + [len(PROMPT) + len(r) for r in responses])
    n = len(responses)
    rollouts = common.Rollouts(
        folder / "rollouts.safetensors", {},
        torch.tensor(sum((PROMPT + r for r in responses), []), dtype=torch.int32),
        lengths.cumsum(0), torch.full((n,), len(PROMPT), dtype=torch.int32), torch.zeros(n),
        torch.zeros(n, dtype=torch.int32), torch.tensor([r[-1] != EOS for r in responses]),
    )  # fmt: skip
    return folder, rollouts, *tables


def test_the_enumeration_is_complete(enumerated):
    _, rollouts, policy, base = enumerated
    assert len(rollouts.rewards) == 1 + 3 + 9 + 27
    for table in (policy, base):
        assert table.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert (policy.exp() * (policy - base)).sum() > 0.1  # the two are different policies


@pytest.mark.parametrize("budget", [7, 10**6])
def test_measured_kl_is_the_exact_sequence_kl(enumerated, ranks, budget, tmp_path):
    """E_policy of the summed whole-vocabulary KL, and of k1, both equal KL by enumeration."""
    folder, rollouts, policy, base = enumerated
    args = evaluate.Args(
        model=str(folder / "0"), base=str(folder / "1"), problems=Path("p"), output=tmp_path,
        micro_batch_tokens=budget,
    )  # fmt: skip
    arrays = evaluate.measure_kl(args, rollouts, ranks)
    exact = (policy.exp() * (policy - base)).sum().item()
    assert (policy.exp() * arrays["kl"]).sum().item() == pytest.approx(exact, abs=1e-5)
    assert (policy.exp() * arrays["k1"]).sum().item() == pytest.approx(exact, abs=1e-5)
    assert torch.allclose(arrays["k1"].double(), policy - base, atol=1e-5)  # response by response
    entropy = -(policy.exp() * policy).sum().item()
    assert (policy.exp() * arrays["entropy"]).sum().item() == pytest.approx(entropy, abs=1e-5)
    # Under the base's samples the same numbers mean something else: the average must be over ours.
    assert (base.exp() * arrays["kl"]).sum().item() != pytest.approx(exact, rel=1e-2)


def test_a_subset_measures_the_same_responses(enumerated, ranks, tmp_path):
    folder, rollouts, policy, base = enumerated
    args = evaluate.Args(
        model=str(folder / "0"), base=str(folder / "1"), problems=Path("p"), output=tmp_path,
        kl_samples=7,
    )  # fmt: skip
    arrays = evaluate.measure_kl(args, rollouts, ranks)
    assert len(arrays["response"].unique()) == 7
    expected = (policy - base)[arrays["response"]]
    assert torch.allclose(arrays["k1"].double(), expected, atol=1e-5)
    stored, _ = common.load_tensors(tmp_path / "kl.safetensors", {})
    assert all(torch.equal(stored[name], arrays[name]) for name in arrays)


def test_kl_against_oneself_is_zero(enumerated, ranks, tmp_path):
    folder, rollouts, *_ = enumerated
    model = str(folder / "0")
    args = evaluate.Args(model=model, base=model, problems=Path("p"), output=tmp_path)
    arrays = evaluate.measure_kl(args, rollouts, ranks)
    assert arrays["kl"].abs().max() < 1e-6
    assert (arrays["k1"] == 0).all()


def test_base_on_another_device(enumerated, ranks, monkeypatch, tmp_path):
    """The same numbers; a second GPU only where one has no room for two copies of the weights."""
    folder, rollouts, *_ = enumerated
    names = dict(model=str(folder / "0"), base=str(folder / "1"), problems=Path("p"))
    expected = evaluate.measure_kl(evaluate.Args(**names, output=tmp_path / "a"), rollouts, ranks)
    other = torch.device("cpu", 0)  # not equal to "cpu": a device of its own here
    monkeypatch.setattr(evaluate, "base_device", lambda *_: other)
    rows, make = [], evaluate.make_row
    monkeypatch.setattr(evaluate, "make_row", lambda *a: rows.append(a[2]) or make(*a))
    arrays = evaluate.measure_kl(evaluate.Args(**names, output=tmp_path / "b"), rollouts, ranks)
    assert all(torch.equal(arrays[name], expected[name]) for name in arrays)
    assert other in rows and ranks.device in rows  # each policy gets rows of its own device
    monkeypatch.undo()

    policy = common.Policy(common.load_lm(str(folder / "0"), torch.device("cpu"), torch.float32))
    weights = 4 * sum(p.numel() for p in policy.parameters())
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for gpus, memory, where in [(2, 3 * weights, first), (2, 2 * weights, second),
                                (1, 2 * weights, first)]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=gpus: n)
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        assert evaluate.base_device(policy, first) == where


def tilt(base, rewards, eta):
    """Base re-weighted by exp(eta R), by enumeration: log-probabilities, accuracy, sequence KL."""
    tilted = (base + eta * rewards).log_softmax(0)
    return (tilted.exp() * rewards).sum(), (tilted.exp() * (tilted - base)).sum()


def test_efficiency_of_the_exact_tilted_policy_is_one(enumerated):
    """No policy can do better: one problem, any verdict on the 40 responses, any strength."""
    _, _, other, base = enumerated
    for seed, eta in ((0, 0.3), (1, 1.0), (2, 6.0)):
        rewards = torch.rand(40, generator=torch.Generator().manual_seed(seed)).lt(0.4).double()
        rate = (base.exp() * rewards).sum() / base.exp().sum()
        accuracy, kl = tilt(base.log_softmax(0), rewards, eta)
        assert kl_efficiency(accuracy, rate, kl).item() == pytest.approx(1, abs=1e-5)
        predicted = tilted_optimum(rate[None], torch.tensor([eta]))
        assert [v.item() for v in predicted] == pytest.approx([accuracy.item(), kl.item()])
        # Another policy, made as accurate by luck of the verdicts, pays more.
        theirs = (other.exp() * rewards).sum()
        exact = (other.exp() * (other - base)).sum()
        if theirs > rate:
            assert kl_efficiency(theirs, rate, exact).item() < 1


def test_efficiency_of_tilting_problems_of_unequal_difficulty_is_below_one(enumerated):
    _, _, other, base = enumerated
    rewards = torch.zeros(40, dtype=torch.float64)
    rewards[::3] = 1
    pair = [tilt(table.log_softmax(0), rewards, 2.0) for table in (base, other)]
    rates = torch.stack([(t.log_softmax(0).exp() * rewards).sum() for t in (base, other)])
    assert abs(rates[0] - rates[1]) > 0.05
    accuracy, kl = (torch.stack(v).mean() for v in zip(*pair, strict=True))
    assert kl_efficiency(accuracy, rates.mean(), kl).item() < 0.999
    predicted = tilted_optimum(rates, torch.tensor([2.0]))
    assert [v.item() for v in predicted] == pytest.approx([accuracy.item(), kl.item()])
