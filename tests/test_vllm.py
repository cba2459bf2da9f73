"""vLLM itself, on the CPU, against the hf engine and exact probabilities (tests/vllm.sh).

Starting an engine takes most of a minute, so each run is made once for several tests."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import llm_judge
import make_base
import numpy as np
import psutil
import pytest
import test_families as families
import torch
import vllm  # noqa: F401  (where it is missing this must fail, not skip)
from test_sampling import start
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import common
import evaluate
import stage1_extreme

pytestmark = pytest.mark.slow
LIMIT, N, SECOND_EOS = 24, 200, 5
# vLLM's own switches: no compilation, which would take longer than the tests themselves.
ENVIRONMENT = {"VLLM_CPU_CI_ENV": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen3 of head size 32 (the least vLLM has on the CPU) with two EOS ids, a generation
    config of its own that would cut the samples, and problems with prompts of different lengths."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = make_base.make_tokenizer()
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, head_dim=32)
    shape |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None)
    eos = [tokenizer.eos_token_id, SECOND_EOS]
    lm = Qwen3ForCausalLM(Qwen3Config(eos_token_id=eos, pad_token_id=0, **shape))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    lm.generation_config.update(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=2.0)
    lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = ["+".join("123456789"[: 1 + i]) for i in range(6)]
    rows = [{"id": f"p{i}", "problem": text, "answer": "1"} for i, text in enumerate(texts)]
    evaluate.write_jsonl(folder / "problems.jsonl", rows)
    return folder


def command(folder, output, **changed):
    given = dict(model=str(folder / "model"), engine="vllm", n=N, max_new_tokens=LIMIT) | changed
    return evaluate.Args(problems=folder / "problems.jsonl", output=folder / output, **given)


def finish(process):
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-20000:]


def run(args):
    finish(start(args, **ENVIRONMENT))
    return common.load_rollouts(args.output)


def responses(rollouts):
    """The tokens of each response, in the order of the file."""
    starts = (rollouts.cu_seqlens[:-1] + rollouts.prompt_lens).tolist()
    cuts = zip(starts, rollouts.cu_seqlens[1:].tolist(), strict=True)
    return [rollouts.tokens[a:b].tolist() for a, b in cuts]


def our_logprobs(folder, rollouts, temperature):
    """The training forward's score of every token."""
    metadata = {"sampling": {"temperature": temperature}}
    at = dataclasses.replace(rollouts, metadata=metadata)
    ranks = common.Ranks(0, 1, torch.device("cpu"))
    return common.score(str(folder / "model"), at, 8192, ranks)


def keys(output):
    return [(row["id"], row["sample"]) for row in evaluate.read_jsonl(output / "samples.jsonl")]


@pytest.fixture(scope="module")
def sampled(folder):
    """N samples of each problem, at a temperature that is not 1."""
    return run(command(folder, "sampled", temperature=0.8))


def test_greedy_token_ids_of_a_trained_model_equal_those_of_hf(folder, sampled):
    """The final model of stage 1 as it is written: vLLM loads it, and computes what hf does."""
    teacher = folder / "teacher"
    training = dict(unlearn=True, epochs=1, batch_size=N, learning_rate=1e-2, warmup_steps=0)
    base, rollouts = str(folder / "model"), folder / "sampled"
    stage1_extreme.main(
        stage1_extreme.Args(base=base, rollouts=rollouts, output=teacher, **training)
    )
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
    assert gap.abs().max() < 1e-4
    assert (sampled.sampler_logprobs[~sampled.response_mask] == 0).all()
    cold = (sampled.sampler_logprobs - our_logprobs(folder, sampled, 1.0))[sampled.response_mask]
    assert cold.abs().max() > 0.05  # the temperature matters here


def first_probabilities(folder, prompt, temperature):
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
    assert degrees > 10
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbors_share_no_random_stream(sampled):
    """Long responses are all distinct; neighboring pairs of samples agree no more than others."""
    made = [tuple(tokens) for tokens in responses(sampled)]
    long = [tokens for tokens in made if len(tokens) > 12]
    assert len(long) > 50
    assert Counter(long).most_common(1)[0][1] == 1
    # With seed = base + problem + sample, sample j + 1 of a problem would use the random numbers of
    # sample j of the next one, and choose the same first token more often than strangers do.
    first = np.array([tokens[0] for tokens in made])
    size = 5 * N - 60

    def agreement(shift):
        return np.mean(first[1 : 1 + size] == first[1 + N + shift :][:size])

    strangers = np.mean([agreement(shift) for shift in range(10, 50)])
    for shift in (-1, 0, 1):
        spread = math.sqrt(strangers * (1 - strangers) / size)
        assert abs(agreement(shift) - strangers) < 5 * spread, shift


def test_every_eos_ends_a_response_and_belongs_to_it(folder, sampled):
    stops, ends = {make_base.make_tokenizer().eos_token_id, SECOND_EOS}, Counter()
    for tokens, cut in zip(responses(sampled), sampled.truncated.tolist(), strict=True):
        assert not stops & set(tokens[:-1])
        assert cut == (tokens[-1] not in stops)
        assert len(tokens) == LIMIT if cut else len(tokens) <= LIMIT
        ends["cut" if cut else tokens[-1]] += 1
    assert len(ends) == 3, ends  # both EOS ids and the limit occur
    table = evaluate.read_jsonl(folder / "sampled" / "samples.jsonl")
    assert Counter(row["finish_reason"] for row in table)["length"] == ends["cut"]
    assert sampled.metadata["sampling"]["engine"] == "vllm"
    assert sampled.metadata["versions"]["vllm"].startswith("0.32")


def alive(pid):
    """Not a zombie: those are gone, only not yet collected."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_killed_and_continued_ends_with_the_same_set(folder, sampled):
    args = command(folder, "killed", temperature=0.8)
    process = start(args, **ENVIRONMENT)
    parts = args.output / "parts"
    while process.poll() is None and not list(parts.glob("unit-*")):
        time.sleep(0.01)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.communicate()
    finished = [int(path.stem.removeprefix("unit-")) for path in parts.glob("unit-*")]
    stored = [common.load_tensors(evaluate.part_path(args.output, unit))[0] for unit in finished]
    assert 1 <= len(stored) < 6
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))  # no engine stays behind

    finish(start(args, **ENVIRONMENT))
    again = common.load_rollouts(args.output)
    every = [(f"p{i}", j) for i in range(6) for j in range(N)]
    assert keys(args.output) == keys(folder / "sampled") == every
    # A response hangs on its own seed: float32 sums in another order change one only rarely.
    pairs = zip(responses(sampled), responses(again), strict=True)
    assert np.mean([a == b for a, b in pairs]) > 0.99
    for unit, tensors in zip(finished, stored, strict=True):  # unit i is p i: prompts get longer
        tokens = [token for row in responses(again)[unit * N : (unit + 1) * N] for token in row]
        assert tokens == tensors["tokens"].tolist()
    gap = again.sampler_logprobs - our_logprobs(folder, again, 0.8)
    assert gap[again.response_mask].abs().max() < 1e-4
    assert not parts.exists()


def test_the_judge_asks_vllm_serve(folder, sampled, tmp_path):
    """A random model is no judge: its words are stored, and hold no verdict."""
    model, port = tmp_path / "judge", 8000 + os.getpid() % 20000
    shutil.copytree(folder / "model", model)
    tokenizer = make_base.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    (tmp_path / "p.txt").write_text("{problem}\n{gold}\n{response}")
    flags = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    flags += ["--served-model-name", "judge", "--kv-cache-memory-bytes", str(2**28)]
    server = subprocess.Popen(
        # What `vllm serve` starts. That command itself asks for a package of the name vllm.
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags],
        env=os.environ | ENVIRONMENT | {"VLLM_NO_USAGE_STATS": "1"},
    )
    try:  # the client's tries go on until the server is there
        given = dict(run=folder / "sampled", output=tmp_path / "llm", model="judge")
        given |= dict(max_tokens=8, retries=60)
        given |= dict(url=f"http://127.0.0.1:{port}/v1", prompt=tmp_path / "p.txt")
        llm_judge.main(llm_judge.Args(**given))
    finally:
        server.terminate()
        server.wait(60)
    rows = evaluate.read_jsonl(tmp_path / "llm" / "samples.jsonl")
    asked = [row for row in rows if row["words"] is not None]
    ended = (~sampled.truncated).sum().item()
    assert ended / 2 < len(asked) <= ended and any(row["words"] for row in asked)
    assert {row["verdict"] for row in asked} == {"unclear"}


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text"])
def test_models_of_the_papers_other_families_as_we_save_them(kind, folder):
    """Qwen3.5 is refused: its module imports torchvision, which does not load beside this torch."""
    shape = dict(head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    shape |= {} if kind == "llama" else families.DELTA | dict(linear_key_head_dim=32)
    tokenizer, ranks, saved = make_base.make_tokenizer(), common.setup_ranks(), folder / kind
    base = families.save(folder / f"base-{kind}", tokenizer, kind, shape)
    common.save_model(common.load_policy(base, ranks, train=True), tokenizer, saved, ranks)
    args = command(folder, f"sampled-{kind}", model=str(saved), n=4)
    process = start(args, **ENVIRONMENT)
    printed, code = process.communicate()[0], process.returncode
    if kind == "qwen3_5_text":
        assert code == 2 and "No module named 'torchvision'" in printed, printed[-20000:]
        assert f"error: --engine vllm refuses {saved} (" in printed
        return
    assert code == 0, printed[-20000:]
    made = common.load_rollouts(args.output)
    gap = made.sampler_logprobs - common.score(str(saved), made, 8192, ranks)
    assert gap[made.response_mask].abs().max() < 1e-4
