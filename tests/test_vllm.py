"""vLLM itself, on the CPU, against the hf engine and exact probabilities (tests/vllm.sh).

Starting an engine takes most of a minute, so each run here is made once and looked at by several
tests: greedy, sampled (the reference of the kill and of the shards), killed, sharded."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import make_base
import numpy as np
import pytest
import torch
import vllm  # noqa: F401  (where it is missing this must fail, not skip)

import common
import evaluate
import stage1_extreme

ROOT = Path(__file__).resolve().parents[1]
LIMIT, N, SECOND_EOS = 24, 200, 5
# vLLM's own switches: no compilation, which would take longer than the tests themselves.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_CI_ENV": "1", "TQDM_MININTERVAL": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen3 of head size 32 (the least vLLM has on the CPU) with two EOS ids, a generation
    config of its own that would cut the samples, and problems with prompts of different lengths."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = make_base.make_tokenizer()
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=[tokenizer.eos_token_id, SECOND_EOS],
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    lm.generation_config.update(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=2.0)
    lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [{"id": f"p{i}", "problem": "+".join("123456789"[: 1 + i]), "answer": "1"}
                for i in range(6)]  # fmt: skip
    common.write_jsonl(folder / "problems.jsonl", problems)
    return folder


def command(folder, output, **changed):
    given = dict(model=str(folder / "model"), engine="vllm", n=N, max_new_tokens=LIMIT) | changed
    return evaluate.Args(problems=folder / "problems.jsonl", output=folder / output, **given)


def start(args):
    flags = [f"--{f.name.replace('_', '-')}={getattr(args, f.name)}"
             for f in dataclasses.fields(args) if getattr(args, f.name) != f.default]  # fmt: skip
    log = open(args.output.with_suffix(f".{time.time_ns()}.log"), "w+")  # noqa: SIM115
    command_line = [sys.executable, ROOT / "evaluate.py", *flags]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command_line, stdout=log, stderr=log, env=environment), log


def finish(process, log):
    process.wait()
    log.seek(0)
    printed = log.read()
    assert process.returncode == 0, printed[-20000:]
    return printed


def run(args):
    finish(*start(args))
    return common.load_rollouts(args.output)


def responses(rollouts):
    """(tokens, log-probs) of each response, in the order of the file."""
    starts = (rollouts.cu_seqlens[:-1] + rollouts.prompt_lens).tolist()
    cuts = zip(starts, rollouts.cu_seqlens[1:].tolist(), strict=True)
    return [(rollouts.tokens[a:b].tolist(), rollouts.sampler_logprobs[a:b]) for a, b in cuts]


def our_logprobs(folder, rollouts, temperature):
    """The training forward's score of every token."""
    ranks = common.Ranks(0, 1, torch.device("cpu"))
    policy = common.load_policy(str(folder / "model"), ranks, train=False)
    return common.score(policy, rollouts, temperature, 8192, ranks, "score")


def keys(output):
    return [(row["id"], row["sample"]) for row in common.read_jsonl(output / "samples.jsonl")]


@pytest.fixture(scope="module")
def sampled(folder):
    """N samples of each problem, at a temperature that is not 1."""
    return run(command(folder, "sampled", temperature=0.8))


def test_greedy_token_ids_of_a_trained_model_equal_those_of_hf(folder, sampled):
    """The final model of stage 1 as it is written: vLLM loads it, and computes what hf does."""
    teacher = folder / "teacher"
    stage1_extreme.main(stage1_extreme.Args(
        base=str(folder / "model"), rollouts=folder / "sampled", output=teacher, unlearn=True,
        epochs=1, batch_size=N, learning_rate=1e-2, warmup_steps=0,
    ))  # fmt: skip
    greedy = {"model": str(teacher), "temperature": 0.0, "n": 1}
    ours = run(command(folder, "greedy-vllm", **greedy))
    evaluate.main(command(folder, "greedy-hf", engine="hf", **greedy))
    theirs = common.load_rollouts(folder / "greedy-hf")
    for name in ("tokens", "cu_seqlens", "prompt_lens", "problem_index", "truncated"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.allclose(ours.sampler_logprobs, theirs.sampler_logprobs, atol=1e-4)
    untrained = our_logprobs(folder, theirs, 1.0)[theirs.response_mask]
    moved = (theirs.sampler_logprobs[theirs.response_mask] - untrained).abs().max()
    assert moved > 0.1  # it is not the base that was loaded


def test_logprobs_are_those_of_our_own_forward(folder, sampled):
    """At the sampling temperature, and over the whole vocabulary: nothing was cut."""
    gap = (sampled.sampler_logprobs - our_logprobs(folder, sampled, 0.8))[sampled.response_mask]
    print(f"log-prob gap: max {gap.abs().max():.2g}, sd {gap.std():.2g}")
    assert gap.abs().max() < 1e-4
    assert (sampled.sampler_logprobs[~sampled.response_mask] == 0).all()
    cold = (sampled.sampler_logprobs - our_logprobs(folder, sampled, 1.0))[sampled.response_mask]
    assert cold.abs().max() > 0.05  # the temperature matters here


def first_probabilities(folder, prompt, temperature):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    with torch.no_grad():
        return (lm(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).numpy()


def test_first_tokens_follow_the_exact_probabilities(folder, sampled):
    """Chi-square over all problems; and it would see the model's own top-k 2 or another seed use.

    Cells expected under 5 times are taken together. Threshold: 5 standard deviations of chi-square;
    the seed is fixed, so this passes always or never."""
    statistic = degrees = 0.0
    for problem in range(6):
        at = (sampled.problem_index == problem).nonzero()[:, 0]
        begin, length = int(sampled.cu_seqlens[at[0]]), int(sampled.prompt_lens[at[0]])
        prompt = sampled.tokens[begin : begin + length].tolist()
        firsts = sampled.tokens[sampled.cu_seqlens[at] + length].tolist()
        assert len(firsts) == N
        expected = first_probabilities(folder, prompt, 0.8) * N
        observed = np.bincount(firsts, minlength=len(expected))
        rare = expected < 5
        cells = [(observed[rare].sum(), expected[rare].sum())] if rare.any() else []
        cells += list(zip(observed[~rare], expected[~rare], strict=True))
        statistic += sum((o - e) ** 2 / e for o, e in cells)
        degrees += len(cells) - 1
    print(f"chi-square {statistic:.1f} on {degrees:.0f} degrees of freedom")
    assert degrees > 10
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbours_share_no_random_stream(sampled):
    """Long responses are all distinct; neighbouring pairs of samples agree no more than others."""
    drawn = [tuple(tokens) for tokens, _ in responses(sampled)]
    long = [tokens for tokens in drawn if len(tokens) > 12]
    assert len(long) > 50
    assert Counter(long).most_common(1)[0][1] == 1
    # With seed = base + problem + sample, sample j + 1 of a problem would use the random numbers of
    # sample j of the next one, and choose the same first token more often than strangers do.
    first = np.array([tokens[0] for tokens in drawn])
    size = 5 * N - 60

    def agreement(shift: int) -> float:
        return np.mean(first[1 : 1 + size] == first[1 + N + shift :][:size])

    strangers = np.mean([agreement(shift) for shift in range(10, 50)])
    for shift in (-1, 0, 1):
        spread = math.sqrt(strangers * (1 - strangers) / size)
        assert abs(agreement(shift) - strangers) < 5 * spread, shift


def test_every_eos_ends_a_response_and_belongs_to_it(folder, sampled):
    tokenizer = make_base.make_tokenizer()
    ends = Counter()
    for (tokens, _), cut in zip(responses(sampled), sampled.truncated.tolist(), strict=True):
        stops = {tokenizer.eos_token_id, SECOND_EOS}
        assert not stops & set(tokens[:-1])
        assert cut == (tokens[-1] not in stops)
        assert len(tokens) == LIMIT if cut else len(tokens) <= LIMIT
        ends["cut" if cut else tokens[-1]] += 1
    assert len(ends) == 3, ends  # both EOS ids and the limit occur
    table = common.read_jsonl(folder / "sampled" / "samples.jsonl")
    reasons = Counter(row["finish_reason"] for row in table)
    assert reasons["length"] == ends["cut"]


def test_metadata_names_engine_and_version(sampled):
    assert sampled.metadata["sampling"]["engine"] == "vllm"
    assert sampled.metadata["versions"]["vllm"].startswith("0.32")


def alive(pid):
    """Not a zombie: those are gone, only not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_and_continued_ends_with_the_same_set(folder, sampled):
    import psutil

    args = command(folder, "killed", temperature=0.8)
    process, log = start(args)
    path = args.output / "parts" / "responses-rest.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 100):
        time.sleep(0.01)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
    assert 100 <= len(before) < 6 * N
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) > 1 and not any(map(alive, children))  # no engine stays behind

    finish(*start(args))
    again = common.load_rollouts(args.output)
    assert keys(args.output) == keys(folder / "sampled") == [
        (f"p{i}", j) for i in range(6) for j in range(N)
    ]  # fmt: skip
    # A response hangs on its own seed: float32 sums in another order change one only rarely.
    pairs = zip(responses(sampled), responses(again), strict=True)
    assert np.mean([a[0] == b[0] for a, b in pairs]) > 0.99
    gap = again.sampler_logprobs - our_logprobs(folder, again, 0.8)
    assert gap[again.response_mask].abs().max() < 1e-4
    assert not path.parent.exists()


def test_shards_and_merge_equal_one_process(folder, sampled):
    args = command(folder, "sharded", temperature=0.8)
    for process in [start(dataclasses.replace(args, shard=f"{i}/2")) for i in range(2)]:
        assert "is sampled" in finish(*process)
    evaluate.main(args)  # nothing is missing: this starts no engine
    assert keys(args.output) == keys(folder / "sampled")
    pairs = zip(responses(sampled), responses(common.load_rollouts(args.output)), strict=True)
    assert np.mean([a[0] == b[0] for a, b in pairs]) > 0.99


def test_a_model_vllm_refuses_is_the_users_error(folder):
    """Longer than the model's positions."""
    args = command(folder, "long", max_new_tokens=400)
    process, log = start(args)
    assert process.wait() == 2
    log.seek(0)
    message = log.read()
    assert "error: model" in message and "--max-new-tokens" in message


def test_sampling_benchmark_in_small():
    """Three lines with a ratio, whatever it is: both sides draw the same tokens."""
    script = ROOT / "benchmarks" / "sampling.py"
    done = subprocess.run(
        [sys.executable, script, "--n=2", "--max-new-tokens=8", "--rounds=2"],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-20000:]
    drawn = re.findall(r"^round \d (bare|ours): ([\d,]+) tokens", done.stdout, re.M)
    assert Counter(side for side, _ in drawn) == {"bare": 3, "ours": 3}
    assert len({tokens for _, tokens in drawn}) == 1
    ratios = re.findall(r"^(bare|evaluate).* tokens/s   ratio \d\.\d{3} ± ", done.stdout, re.M)
    assert ratios == ["bare", "evaluate", "evaluate"]
