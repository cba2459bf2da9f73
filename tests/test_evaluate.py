"""Evaluation: problems, prompts, estimators against enumeration, and exact sequence KLs."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import common
import evaluate
from common import UserError
from evaluate import kl_efficiency, least_kl, pass_at_k

EOS, PROMPT, LIMIT = 1, [2, 3], 3  # the enumerable policies: vocabulary 4, at most 3 new tokens
ROWS = [
    {"id": "a", "problem": "What is 1 + 1?", "answer": "2"},
    {"id": "b", "problem": "What is 1 + 2?", "answer": 3},
    {"id": "c", "problem": "Half of 1?", "answer": r"\frac{1}{2}"},
    {"id": "d", "problem": "What is 2 + 2?", "answer": "4", "source": "left out"},
]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def make_args(**changes):
    given = dict(model="m", problems=Path("p"), output=Path("o")) | changes
    return evaluate.Args(**given)


# --------------------------------------------------------------------------------------------------
# Problems


def test_problems_are_read_as_texts(tmp_path, ranks):
    evaluate.write_jsonl(tmp_path / "p.jsonl", ROWS)
    problems = evaluate.load_problems(tmp_path / "p.jsonl", 20.0, ranks)
    assert [p["id"] for p in problems] == ["a", "b", "c", "d"]
    assert problems[1] == {"id": "b", "problem": "What is 1 + 2?", "answer": "3"}
    assert problems[3].keys() == {"id", "problem", "answer"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": "What  is 1 +\n1? "}, (":4", "'problem' repeats", "line 1")),
        ({"id": "a"}, (":4", "'id' repeats", "line 1")),
        ({"answer": "}{"}, (":4", "'answer'", "no response can equal '}{'")),
        ({"answer": "1" * 3000}, (":4", "'answer'", "no response can equal")),
        ({"problem": "\ud800"}, (":4", "'problem'", "surrogate")),
        ({"problem": "x" * 200_000}, (":4", "'problem'", "longer than 100000")),
        ({"answer": float("nan")}, (":4", "'answer'", "missing")),
        ({"answer": True}, (":4", "'answer'", "missing")),
        ({"id": " "}, (":4", "'id'", "missing")),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, monkeypatch, ranks, change, words):
    path = tmp_path / "p.jsonl"
    evaluate.write_jsonl(path, [*ROWS[:3], ROWS[3] | change])
    monkeypatch.setattr(  # no process has to start
        evaluate, "verdicts", lambda checks, *_: {c: evaluate.check_pair(*c) for c in checks}
    )
    with pytest.raises(UserError) as caught:
        evaluate.load_problems(path, 20.0, ranks)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "line", [b"\xff", b"{", b"[1]", b"3", b"[" * 100_000, b"9" * 5000, b"", b'"\\ud800"']
)
def test_a_line_that_is_no_object_is_named(tmp_path, ranks, line):
    evaluate.write_jsonl(tmp_path / "p.jsonl", ROWS[:1])
    with open(tmp_path / "p.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"p\.jsonl:2: not a ") as caught:
        evaluate.load_problems(tmp_path / "p.jsonl", 20.0, ranks)
    assert len(str(caught.value)) < 300
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match="no problems"):
        evaluate.load_problems(tmp_path / "p.jsonl", 20.0, ranks)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "question": "1+1?", "answer": "2"}')
    command = r"python examples/problem_sets.py --source \S+ --output problems.jsonl"
    for name in ("p.jsonl", "p.parquet", "gsm8k"):
        with pytest.raises(UserError, match=command):
            evaluate.load_problems(tmp_path / name, 20.0, ranks)


# --------------------------------------------------------------------------------------------------
# Prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def byte_tokenizer(template, bos=False, eos=False):
    """A byte-level tokenizer with control tokens that adds a BOS or an EOS as real ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    control = ["<|im_start|>", "<|im_end|>"]
    made.add_special_tokens(["<s>", "</s>", *control])
    made.add_tokens(["<think>", "</think>"])
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    single = "<s> " * bos + "$A" + " </s>" * eos
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    ends = dict(bos_token="<s>", eos_token="</s>", additional_special_tokens=control)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **ends)
    tokenizer.chat_template = template
    return tokenizer


def prompt_text(tokenizer, problem="1+1?", **changes):
    """The prompt as the model sees it, control tokens included."""
    rows = [{"id": "a", "problem": problem, "answer": "2"}]
    [ids] = evaluate.encode_prompts(tokenizer, rows, make_args(**changes))
    return tokenizer.decode(ids)


def test_chat_template_is_applied_once():
    tokenizer = byte_tokenizer(CHATML, bos=True)
    expected = "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer, prompt_template="{problem} Box it.") == expected
    with pytest.raises(UserError, match=r"problem 'a'.*<\|im_start\|>.*bare problem"):
        prompt_text(tokenizer, problem=expected)
    chat = [{"role": "user", "content": "1+1?"}]
    theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    problems = [{"id": "a", "problem": "1+1?", "answer": "2"}]
    assert evaluate.encode_prompts(tokenizer, problems, make_args()) == [theirs]


@pytest.mark.parametrize("template", [WITH_BOS, None])
def test_there_is_one_bos_and_no_eos(template):
    tokenizer = byte_tokenizer(template, bos=True, eos=True)
    text = prompt_text(tokenizer)
    assert text.startswith("<s>") and text.count("<s>") == 1 and "</s>" not in text
    bare = r"<s>Problem: {problem} Solution: $\frac{1}{2}"  # braces of LaTeX stay
    written = prompt_text(tokenizer, no_chat_template=True, prompt_template=bare)
    assert written == r"<s>Problem: 1+1? Solution: $\frac{1}{2}"


def test_a_tokenizer_that_hides_the_end_of_a_thought_is_refused(tokenizer):
    hiding = copy.deepcopy(tokenizer)
    hiding.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(UserError, match="</think>"):
        evaluate.encode_prompts(hiding, ROWS, make_args())


def dated(template):
    return (
        "{{ strftime_now('%d %b %Y') }}{% if thinks is not defined %}<think>{% endif %}" + template
    )


def test_switches_and_date_of_the_chat_template(tmp_path):
    """A run that is continued, and one that has a base run, print the day of the first start."""
    tokenizer = byte_tokenizer(dated(CHATML))
    today = evaluate.hold_date(make_args(output=tmp_path), tokenizer)
    assert today.date == str(datetime.date.today())
    common.write_json(tmp_path / "args.json", {"args": {"date": "2026-02-03"}})
    for given in ({"output": tmp_path}, {"output": tmp_path / "new", "base_run": tmp_path}):
        assert evaluate.hold_date(make_args(**given), tokenizer).date == "2026-02-03"
    assert evaluate.hold_date(make_args(output=tmp_path), byte_tokenizer(CHATML)).date is None
    switched = {"date": "2026-02-03", "chat_template_kwargs": '{"thinks": false}'}
    assert prompt_text(tokenizer, **switched).startswith("03 Feb 2026<|im_start|>")
    assert prompt_text(tokenizer, date="2026-02-03").startswith("03 Feb 2026<think>")
    for template, off in ((CHATML, False), (None, False), (dated(CHATML), True)):
        with pytest.raises(UserError, match="--chat-template-kwargs: .*'thinks'"):
            prompt_text(byte_tokenizer(template), no_chat_template=off, **switched)


def test_the_token_that_ends_turns_ends_responses(tmp_path, capsys):
    """As <|im_end|> of a base model whose EOS is another token; with a note."""
    tiny.make_lm(0, 300).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path)
    ends = {1, tokenizer.eos_token_id}
    assert set(evaluate.all_eos(make_args(model=str(tmp_path), no_chat_template=True))) == ends
    assert capsys.readouterr().out == ""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(evaluate.all_eos(make_args(model=str(tmp_path)))) == ends | {end}
    assert "note: <|im_end|>" in capsys.readouterr().out


def test_a_tokenizer_that_loses_text_is_mended_by_its_file_or_refused(tokenizer, tmp_path, capsys):
    """Some folders name a class that puts another pre-tokenizer in the place of the file's own."""
    byte_tokenizer(WITH_BOS, bos=True).save_pretrained(tmp_path)
    config = common.read_json(tmp_path / "tokenizer_config.json")
    common.write_json(
        tmp_path / "tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizerFast"}
    )
    common.write_json(tmp_path / "config.json", {"model_type": "llama"})
    broken = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="problem 'a': the tokenizer loses all spaces"):
        prompt_text(broken, problem="1 + 1?")
    mended = common.load_tokenizer(str(tmp_path))
    assert "tokenizer.json is taken" in capsys.readouterr().out
    assert "1 + 1?" in prompt_text(mended, problem="1 + 1?")
    with pytest.raises(UserError, match="problem 'a': the tokenizer loses €"):
        prompt_text(tokenizer, problem="€ 1+1", no_chat_template=True)


def test_answers_of_truncated_responses_and_of_opened_thoughts():
    """No answer where the response was cut, or where it ended inside the thought of its prompt."""
    tokenizer = byte_tokenizer(None)
    texts = ["1+1? ", "1+1? <think>\n", "1+1? <think>\n</think>"]
    prompts = [tokenizer(text).input_ids for text in texts]
    problems = [{"id": str(i), "problem": "1+1?", "answer": "2"} for i in range(3)]

    def response(text, truncated):
        tokens = torch.tensor(tokenizer(text).input_ids, dtype=torch.int32)
        return evaluate.Response(tokens, torch.zeros(len(tokens)), truncated)

    made = {(p, cut): response(r"so \boxed{2}</s>", bool(cut)) for p in range(3) for cut in (0, 1)}
    made[1, 2] = response(r"so </think> \boxed{2}", False)
    rows = evaluate.describe_samples(problems, prompts, made, tokenizer)
    assert [row["answer"] for row in rows] == ["2", None, None, None, "2", None, "2"]
    assert [row["finish_reason"] for row in rows][:2] == ["stop", "length"]
    assert rows[0]["text"] == r"so \boxed{2}"


# --------------------------------------------------------------------------------------------------
# Estimators


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_equals_enumeration_of_all_subsets(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        expected = sum(any(s) for s in subsets) / len(subsets)
        value = pass_at_k(torch.tensor([correct]), torch.tensor([n]), k)
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_the_problems_own_number_of_samples():
    value = pass_at_k(torch.tensor([1, 1]), torch.tensor([2, 4]), 2)
    assert value.tolist() == pytest.approx([1.0, 0.5])
    with pytest.raises(ValueError, match=r"pass@4 .*one has 3"):
        pass_at_k(torch.tensor([1, 1]), torch.tensor([3, 8]), 4)


def test_least_kl_and_efficiency():
    accuracy, base = double(0.5, 0.9, 0.7, 1.0, 0.0, 0.3), double(0.9, 0.5, 0.7, 0.25, 0.25, 0.0)
    expected = [0.510826, 0.368064, 0.0, math.log(4), math.log(4 / 3), math.inf]
    assert least_kl(accuracy, base).tolist() == pytest.approx(expected, abs=1e-6)
    accuracy, half = double(0.9, 0.9, 0.5, 0.4, 0.9), double(0.5, 0.5, 0.5, 0.5, 0.5)
    values = kl_efficiency(accuracy, half, double(0.368064, 2 * 0.368064, 0.1, 0.1, 0.0)).tolist()
    assert values[:2] == pytest.approx([1, 0.5], abs=1e-5)
    assert all(map(math.isnan, values[2:]))  # not better, worse, or no KL at all
    assert kl_efficiency(double(0.9), double(0.5), double(0.1)).item() > 3  # never clipped


def test_standard_errors_over_problems():
    """Equal counts: the usual one. Unequal: numpy's own resampling. One problem: none."""
    rng = np.random.default_rng(0)
    samples = rng.random((12, 8))
    total = torch.from_numpy(samples.sum(1))
    mean, error = evaluate.mean_over_problems(total, torch.full((12,), 8))
    assert mean == pytest.approx(samples.mean())
    assert error == pytest.approx(samples.mean(1).std(ddof=1) / 12**0.5)
    count = rng.integers(2, 9, 200)
    total = rng.binomial(count, rng.random(200))
    mean, error = evaluate.mean_over_problems(torch.from_numpy(total), torch.from_numpy(count))
    draw = rng.integers(0, 200, (4000, 200))
    assert error == pytest.approx((total[draw].sum(1) / count[draw].sum(1)).std(), rel=0.05)
    assert evaluate.mean_over_problems(double(3), double(4)) == (0.75, None)
    assert evaluate.mean_over_problems(double(0, 0), double(0, 0)) == (None, None)
    total, count = torch.zeros(30), torch.zeros(30)  # two of thirty were measured
    total[3], total[17], count[3], count[17] = 1.0, 2.0, 1, 1
    assert evaluate.mean_over_problems(total, count) == (1.5, pytest.approx(0.5))


def made_rollouts(rewards, index, response_lens, **metadata):
    """Prompts of one token, tokens of no meaning; responses over 5 tokens are truncated."""
    sequences = [([0], [0] * n) for n in response_lens]
    truncated = torch.tensor([n > 5 for n in response_lens])
    return tiny.make_rollouts(
        "r", sequences, rewards, index, truncated=truncated, metadata=metadata
    )


def test_collect_metrics():
    index = [0, 0, 0, 1, 1, 1]
    rollouts = made_rollouts([1, 1, 0, 1, 0, 0], index, [2, 4, 6, 2, 2, 8], unparsed=[0, 1])
    base = made_rollouts([1, 0, 0, 1, 0, 0], index, [1] * 6)
    arrays = {"kl": torch.tensor([0.5, 1.5, 4.0]), "k1": torch.tensor([0.0, 1.0, 2.0])}
    arrays |= {"entropy": torch.tensor([2.0, 6.0, 16.0]), "response": torch.tensor([0, 2, 5])}
    metrics = evaluate.collect_metrics(rollouts, arrays, base)
    values = {name: value for name, (value, _) in metrics.items()}
    expected = {"accuracy": 0.5, "pass@1": 0.5, "pass@2": (1 + 2 / 3) / 2, "unparsed": 1 / 6}
    expected |= {"truncated": 2 / 6, "mean_length": 4.0, "length_correct": 8 / 3}
    expected |= {"length_wrong": 16 / 3, "kl": 2.0, "k1": 1.0, "entropy": 24 / 16}
    expected |= {"base_accuracy": 1 / 3}
    expected |= {"kl_efficiency": (0.5 * math.log(1.5) + 0.5 * math.log(0.75)) / 2.0}
    assert values == pytest.approx(expected, abs=1e-6)
    errors = {name: error for name, (_, error) in metrics.items()}
    assert errors["accuracy"] == pytest.approx(np.std([2 / 3, 1 / 3], ddof=1) / 2**0.5)
    assert errors["base_accuracy"] == pytest.approx(0)
    # Draws of the first problem alone, of both, and of the second alone, where it is undefined.
    by_firsts = {2: math.log(2) / 3, 1: values["kl_efficiency"]}
    firsts = (evaluate.bootstrap_draws(2) == 0).sum(1).tolist()
    known = [by_firsts[n] for n in firsts if n > 0]
    assert errors["kl_efficiency"] == pytest.approx(np.std(known, ddof=1), rel=1e-5)
    # Ratio of sums: each problem has residuals (T - m C) of its own count of correct responses.
    residual = np.array([6 - 8 / 3 * 2, 2 - 8 / 3 * 1])
    assert errors["length_correct"] == pytest.approx((2 * (residual**2).sum()) ** 0.5 / 3)
    alone = evaluate.collect_metrics(base, None, None)
    assert not alone.keys() & {"kl", "unparsed", "base_accuracy"}
    assert alone["accuracy"] == metrics["base_accuracy"]


def test_there_is_no_efficiency_where_the_policy_is_not_better():
    worse = made_rollouts([0, 0, 0, 0], [0, 0, 1, 1], [1] * 4)
    base = made_rollouts([1, 0, 0, 1], [0, 0, 1, 1], [1] * 4)
    arrays = dict.fromkeys(("kl", "k1", "entropy"), torch.ones(4)) | {"response": torch.arange(4)}
    metrics = evaluate.collect_metrics(worse, arrays, base)
    assert metrics["kl_efficiency"] == metrics["length_correct"] == (None, None)


# --------------------------------------------------------------------------------------------------
# Exact enumeration: two policies over four tokens, every response there is


def all_responses():
    """Every sequence that ends at its first EOS or at the token limit."""
    found = []
    for n in range(1, LIMIT + 1):
        for tokens in itertools.product(range(4), repeat=n):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == LIMIT):
                found.append(list(tokens))
    return found


def log_probability(lm, response):
    """Sum of the token log-probs by the plain forward, float64."""
    logprobs = lm(torch.tensor([PROMPT + response])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(PROMPT) - 1 + t, token] for t, token in enumerate(response))


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory):
    """Two policies on disk; all responses as rollouts; log-probabilities under each."""
    folder = tmp_path_factory.mktemp("enumerable")
    responses, tables = all_responses(), []
    for seed in (0, 1):
        lm = tiny.make_lm(seed, 4, spread=0.2)
        lm.save_pretrained(folder / str(seed))
        with torch.no_grad():
            tables.append(torch.stack([log_probability(lm, r) for r in responses]))
    assert all(table.exp().sum().item() == pytest.approx(1, abs=1e-6) for table in tables)
    n, path = len(responses), folder / "rollouts.safetensors"
    rollouts = tiny.make_rollouts(path, [(PROMPT, r) for r in responses], [0.0] * n, [0] * n)
    return folder, rollouts, *tables


def measured(enumerated, tmp_path, ranks, **changes):
    folder, rollouts, *_ = enumerated
    given = dict(model=str(folder / "0"), base=str(folder / "1"), output=tmp_path) | changes
    return evaluate.measure_kl(make_args(**given), rollouts, ranks)


@pytest.mark.parametrize(("budget", "logits"), [(7, 2**27), (10**6, 2**27), (10**6, 20)])
def test_measured_kl_is_the_exact_sequence_kl(
    enumerated, ranks, budget, logits, tmp_path, monkeypatch
):
    """E_policy of the summed whole-vocabulary KL, and of k1, both equal KL by enumeration."""
    _, _, policy, base = enumerated
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", logits)
    arrays = measured(enumerated, tmp_path, ranks, micro_batch_tokens=budget)
    exact = (policy.exp() * (policy - base)).sum().item()
    assert (policy.exp() * arrays["kl"]).sum().item() == pytest.approx(exact, abs=1e-5)
    assert (policy.exp() * arrays["k1"]).sum().item() == pytest.approx(exact, abs=1e-5)
    assert torch.allclose(arrays["k1"].double(), policy - base, atol=1e-5)  # response by response
    entropy = -(policy.exp() * policy).sum().item()
    assert (policy.exp() * arrays["entropy"]).sum().item() == pytest.approx(entropy, abs=1e-5)
    # Under the base's samples the same numbers mean something else: the average must be over ours.
    assert (base.exp() * arrays["kl"]).sum().item() != pytest.approx(exact, rel=1e-2)


def test_a_subset_measures_the_same_responses(enumerated, ranks, tmp_path):
    _, _, policy, base = enumerated
    arrays = measured(enumerated, tmp_path, ranks, kl_samples=7)
    assert len(arrays["response"].unique()) == 7
    expected = (policy - base)[arrays["response"]]
    assert torch.allclose(arrays["k1"].double(), expected, atol=1e-5)
    stored, _ = common.load_tensors(tmp_path / "kl.safetensors")
    assert all(torch.equal(stored[name], arrays[name]) for name in arrays)


def test_efficiency_of_the_exact_tilted_policy_is_one(enumerated):
    """No policy can do better: one problem, any verdict on the 40 responses, any strength."""
    base = enumerated[3].log_softmax(0)
    for seed, eta in ((0, 0.3), (1, 1.0), (2, 6.0)):
        rewards = torch.rand(40, generator=torch.Generator().manual_seed(seed)).lt(0.4).double()
        rate = (base.exp() * rewards).sum()
        tilted = (base + eta * rewards).log_softmax(0)
        accuracy, kl = (tilted.exp() * rewards).sum(), (tilted.exp() * (tilted - base)).sum()
        assert kl_efficiency(accuracy, rate, kl).item() == pytest.approx(1, abs=1e-5)
