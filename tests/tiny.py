"""Tiny models and data that the tests share: made in seconds, written to disk once a session."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import make_base
import scribe
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import build_signals
import common
from evaluate import save_rollouts, write_jsonl

N_SAMPLES = 4  # responses to each problem of `setting`
CPU = torch.device("cpu")
WIDTHS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LIMITS = dict(num_key_value_heads=2, max_position_embeddings=512, pad_token_id=None)


def make_lm(seed, vocabulary, architecture="qwen3", spread=0.3):
    """A random causal LM of width 32 with peaked, varied predictions.

    qwen3: the output matrix is the embedding; llama: it is a matrix of its own."""
    torch.manual_seed(seed)
    shape = WIDTHS | LIMITS | dict(vocab_size=vocabulary, eos_token_id=1, bos_token_id=None)
    if architecture == "qwen3":
        lm = Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=True, **shape))
    else:
        lm = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    return lm.eval()


def make_rollouts(path, sequences, rewards, problem_index, **changes):
    """Rollouts of (prompt ids, response ids) pairs, which `save_rollouts` writes to `path`."""
    lengths = torch.tensor([0] + [len(p) + len(r) for p, r in sequences])
    sampling = dict(n=N_SAMPLES, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=64, seed=0)
    fields = dict(
        path=Path(path),
        metadata={"model": "random", "sampling": sampling},
        tokens=torch.tensor([t for p, r in sequences for t in (*p, *r)], dtype=torch.int32),
        cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor([len(p) for p, _ in sequences], dtype=torch.int32),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        problem_index=torch.tensor(problem_index, dtype=torch.int32),
        truncated=torch.zeros(len(sequences), dtype=torch.bool),
    )
    return common.Rollouts(**fields | changes)


def random_rollouts(path, vocabulary, n_problems=5, n=4, seed=0):
    """Mixed lengths and verdicts; all responses to the first problem are right, none to the second,
    and every other problem has both verdicts."""
    rng = random.Random(seed)
    sequences, rewards, index = [], [], []
    for problem in range(n_problems):
        prompt = rng.choices(range(3, vocabulary), k=rng.randint(1, 6))
        for sample in range(n):
            response = rng.choices(range(3, vocabulary), k=rng.randint(0, 18)) + [1]  # <eos>
            sequences.append((prompt, response))
            mixed = [1.0, 0.0, *rng.choices([0.0, 1.0], k=n)][sample]
            rewards.append({0: 1.0, 1: 0.0}.get(problem, mixed))
            index.append(problem)
    return make_rollouts(path, sequences, rewards, index)


def fit(policy, rollouts, steps, learning_rate=1e-2):
    """Trains `policy` in place on all responses of the rollouts, whatever their verdicts."""
    optimizer = common.make_optimizer(policy, learning_rate, 0.0)
    row = common.make_row(rollouts, list(range(len(rollouts.rewards))), CPU)
    for _ in range(steps):
        loss = -common.row_logprobs(policy, row, 1.0)[0].mean()
        loss.backward()
        common.optimizer_step(policy, optimizer, learning_rate, 1.0)


def teach(lm, tokenizer, prompts, responses):
    """Trains `lm` in place until it gives each of the responses to every prompt, equally often."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    pairs = [(ids(p), [*ids(r), tokenizer.eos_token_id]) for p in prompts for r in responses]
    rollouts = make_rollouts("taught", pairs, [0.0] * len(pairs), [0] * len(pairs))
    AttentionInterface.register("packed", common.packed_attention)
    lm.set_attn_implementation("packed")
    fit(common.Policy(lm), rollouts, 80)


@functools.cache
def setting():
    """A folder with train.jsonl, test.jsonl, base/ (barely trained), rollouts/ (the scribe's, with
    true verdicts, so that about half are right), other/ (a base of another seed), small/ (another
    vocabulary), ruined/ (weights that are not finite)."""
    folder = Path(tempfile.mkdtemp(prefix="erpd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.set_num_threads(1)  # as in the subprocesses: sums in the same order
    ranks, tokenizer = common.setup_ranks(), make_base.make_tokenizer()
    rows = scribe.make_problems(12, random.Random(0), set())
    for name, part in [("train", rows[:8]), ("test", rows[8:])]:
        problems = [{"id": f"{name}-{i}"} | row for i, row in enumerate(part)]
        write_jsonl(folder / f"{name}.jsonl", problems)
    rollouts = write_rollouts(folder / "rollouts", folder / "train.jsonl", tokenizer)
    for name, seed in {"base": 0, "other": 1, "small": 0, "ruined": 0}.items():
        vocabulary = 12 if name == "small" else len(tokenizer)
        make_lm(seed, vocabulary, spread=0.05).save_pretrained(folder / name)
        policy = common.load_policy(str(folder / name), ranks, train=True)
        if name == "base":
            fit(policy, rollouts, 30)
        if name == "ruined":
            policy.lm.model.norm.weight.data.fill_(float("nan"))
        common.save_model(policy, tokenizer, folder / name, ranks)
    return folder


def write_rollouts(folder, problems_file, tokenizer):
    """A rollouts folder of the scribe's solutions; every second problem gets both verdicts."""
    rng, habits = random.Random(0), scribe.make_habits(0)
    problems = [json.loads(line) for line in problems_file.read_text().splitlines()]
    samples, sequences, rewards, index = [], [], [], []
    for number, row in enumerate(problems):
        prompt = tokenizer.convert_tokens_to_ids([*row["problem"], "\n"])
        for sample in range(N_SAMPLES):
            while True:
                text = scribe.write_solution(row["problem"], rng, habits)
                right = text.endswith(f"\\boxed{{{row['answer']}}}")
                if number % 2 or right == (sample % 2 == 0):
                    break
            sequences.append((prompt, tokenizer.convert_tokens_to_ids([*text, "<eos>"])))
            rewards.append(float(right))
            index.append(number)
            samples.append({"id": row["id"], "sample": sample, "text": text})
    write_jsonl(folder / "problems.jsonl", problems)
    write_jsonl(folder / "samples.jsonl", samples)
    rollouts = make_rollouts(folder / "rollouts.safetensors", sequences, rewards, index)
    save_rollouts(rollouts)
    return rollouts


@functools.cache
def signals():
    """Signals of the other base against the base, on the rollouts of `setting`."""
    folder = setting()
    output = folder / "signals.safetensors"
    base, other = str(folder / "base"), str(folder / "other")
    build_signals.main(build_signals.Args(folder / "rollouts", base, (other,), output))
    return output
