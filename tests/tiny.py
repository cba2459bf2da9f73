"""The small setting that test_errors.py and test_pipeline.py share, made once a session."""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

import make_base
import scribe
import torch

import common

N_SAMPLES = 4


@functools.cache
def setting() -> Path:
    """A folder with train.jsonl, test.jsonl, base/ (barely trained), rollouts/ (the scribe's, with
    true verdicts, so that about half are right), other/ (a base of another seed), small/ (another
    vocabulary), ruined/ (weights that are not finite)."""
    folder = Path(tempfile.mkdtemp(prefix="erpd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.set_num_threads(1)  # as in the subprocesses: sums in the same order
    for name, seed, steps in [("first", 0, 30), ("second", 1, 2)]:
        make_base.main(make_base.Args(
            output=folder / name, train=8, test=4, steps=steps, batch_size=16, hidden_size=32,
            seed=seed,
        ))  # fmt: skip
    for file in ("train.jsonl", "test.jsonl", "base"):
        (folder / "first" / file).rename(folder / file)
    (folder / "second" / "base").rename(folder / "other")
    tokenizer = common.load_tokenizer(str(folder / "base"))
    write_rollouts(folder / "rollouts", common.read_jsonl(folder / "train.jsonl"), tokenizer)
    ranks, base = common.setup_ranks(), str(folder / "base")
    policy = common.load_policy(base, ranks, train=True)
    policy.lm.resize_token_embeddings(12)
    common.save_model(policy, tokenizer, folder / "small", ranks)
    policy = common.load_policy(base, ranks, train=False)
    policy.lm.model.norm.weight.fill_(float("nan"))
    common.save_model(policy, tokenizer, folder / "ruined", ranks)
    return folder


def write_rollouts(folder: Path, problems: list[dict], tokenizer: object) -> None:
    """A rollouts folder of the scribe's solutions; every second problem gets both verdicts."""
    rng = random.Random(0)
    samples, sequences, prompt_lens, rewards, index = [], [], [], [], []
    for number, row in enumerate(problems):
        prompt = tokenizer.convert_tokens_to_ids([*row["problem"], "\n"])
        for sample in range(N_SAMPLES):
            while True:
                text = scribe.write_solution(row["problem"], rng)
                right = text.endswith(f"\\boxed{{{row['answer']}}}")
                if number % 2 or right == (sample % 2 == 0):
                    break
            sequences.append(prompt + tokenizer.convert_tokens_to_ids([*text, "<eos>"]))
            prompt_lens.append(len(prompt))
            rewards.append(float(right))
            index.append(number)
            samples.append({"id": row["id"], "sample": sample, "text": text})
    lengths = torch.tensor([0] + [len(s) for s in sequences])
    sampling = {"n": N_SAMPLES, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24,
                "seed": 0}  # fmt: skip
    common.write_jsonl(folder / "problems.jsonl", problems)
    common.write_jsonl(folder / "samples.jsonl", samples)
    common.save_rollouts(common.Rollouts(
        folder / "rollouts.safetensors", {"model": "scribe", "sampling": sampling},
        tokens=torch.tensor(sum(sequences, []), dtype=torch.int32), cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32), rewards=torch.tensor(rewards),
        problem_index=torch.tensor(index, dtype=torch.int32),
        truncated=torch.zeros(len(index), dtype=torch.bool),
    ))  # fmt: skip


def teach(lm: object, tokenizer: object, prompts: list[str], responses: list[str]) -> None:
    """Trains `lm` in place until it gives each of the responses to every prompt, equally often: a
    policy whose verdicts are mixed, in two seconds."""
    pairs = [(tokenizer(p, add_special_tokens=False).input_ids,
              tokenizer(r, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
             for p in prompts for r in responses]  # fmt: skip
    n = torch.zeros(len(pairs))
    rollouts = common.Rollouts(
        Path("taught"), {}, torch.tensor(sum([p + r for p, r in pairs], []), dtype=torch.int32),
        torch.tensor([0] + [len(p + r) for p, r in pairs]).cumsum(0),
        torch.tensor([len(p) for p, _ in pairs], dtype=torch.int32), n, n.int(), n.bool(),
    )  # fmt: skip
    policy = common.Policy(lm)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    row = common.make_row(rollouts, list(range(len(pairs))), torch.device("cpu"))
    for _ in range(80):
        loss = -common.row_logprobs(policy, row, 1.0)[0].sum() / row.response_mask.sum()
        loss.backward()
        common.clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def signals() -> Path:
    """Signals of the other base against the base, on the rollouts of `setting`."""
    import build_signals

    folder = setting()
    output = folder / "signals.safetensors"
    build_signals.main(build_signals.Args(
        rollouts=folder / "rollouts", base=str(folder / "base"), teachers=(str(folder / "other"),),
        output=output,
    ))  # fmt: skip
    return output
