"""Makes the embedded default: problems to train and to judge on, and a base that samples errors.

Writes  OUTPUT/train.jsonl, OUTPUT/test.jsonl (disjoint, checked) and OUTPUT/base/, a Qwen3 of about
        0.3 M parameters with a character tokenizer, trained on the noisy scribe's solutions.

Same seed, same files.

    python examples/arithmetic/make_base.py --output runs/arithmetic/seed0 --seed 0
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scribe

import common

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n' }}"


@dataclass
class Args:
    output: Path
    """folder to write train.jsonl, test.jsonl and base/ into"""
    train: int = 512
    """training problems"""
    test: int = 512
    """held-out problems"""
    steps: int = 2000
    """optimiser steps of the base"""
    batch_size: int = 32
    """solutions a step, freshly written each time"""
    learning_rate: float = 4e-3
    """peak of a warm-up and cosine schedule"""
    hidden_size: int = 128
    """width of the base"""
    layers: int = 2
    """decoder blocks"""
    seed: int = 0
    """of problems, solutions and initial weights"""


def make_tokenizer() -> Any:
    """One token a character; `<eos>` ends a response, `<pad>` only ever stands left of a prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *scribe.ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_problems(n_train: int, n_test: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Distinct problems, so that no held-out one is trained on; answers are exact."""
    rows = scribe.make_problems(n_train + n_test, random.Random(f"problems-{seed}"), set())
    train = [{"id": f"train-{i}"} | row for i, row in enumerate(rows[:n_train])]
    test = [{"id": f"test-{i}"} | row for i, row in enumerate(rows[n_train:])]
    overlap = {row["problem"] for row in train} & {row["problem"] for row in test}
    assert not overlap, f"train and test share {len(overlap)} problems"
    return train, test


def make_model(args: Args, tokenizer: Any) -> Any:
    """A Qwen3 with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    common.register_attention()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        intermediate_size=2 * args.hidden_size, num_attention_heads=4, num_key_value_heads=2,
        head_dim=args.hidden_size // 4, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        attn_implementation="packed_loop",
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def solution_rollouts(
    tokenizer: Any, rng: random.Random, n: int, slips: float, held_out: set[str]
) -> common.Rollouts:
    """n fresh problems with the scribe's solutions, as the packed forward reads them."""
    sequences, prompt_lens = [], []
    while len(sequences) < n:
        problem = scribe.make_problem(rng)
        if problem in held_out:
            continue
        text = scribe.write_solution(problem, rng, slips)
        prompt = tokenizer.convert_tokens_to_ids([*problem, "\n"])
        sequences.append(prompt + tokenizer.convert_tokens_to_ids([*text, "<eos>"]))
        prompt_lens.append(len(prompt))
    lengths = torch.tensor([len(s) for s in sequences])
    none = torch.zeros(n)
    return common.Rollouts(
        Path("fresh"), {}, torch.tensor(sum(sequences, []), dtype=torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.tensor(prompt_lens, dtype=torch.int32), none, none.int(), none.bool(),
    )  # fmt: skip


def main(args: Args) -> None:
    ranks = common.setup_ranks()
    if not common.start_run(args.output / "base", args, {}, ranks):
        return
    train, test = make_problems(args.train, args.test, args.seed)
    common.write_jsonl(args.output / "train.jsonl", train)
    common.write_jsonl(args.output / "test.jsonl", test)

    torch.manual_seed(args.seed)
    rng = random.Random(f"solutions-{args.seed}")
    tokenizer = make_tokenizer()
    policy = common.Policy(make_model(args, tokenizer)).to(ranks.device)
    optimizer = common.make_optimizer(policy, args.learning_rate, 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=0.1, cycle_momentum=False
    )
    held_out = {row["problem"] for row in train + test}
    with common.progress(ranks, args.steps, 0, "train the base") as bar:
        for step in range(args.steps):
            # First arithmetic, then the slips: facts are learnt in half the steps without noise.
            slips = min(1.0, max(0.0, 4 * step / args.steps - 1))
            batch = solution_rollouts(tokenizer, rng, args.batch_size, slips, held_out)
            row = common.make_row(batch, list(range(args.batch_size)), ranks.device)
            logprobs, entropy = common.row_logprobs(policy, row, 1.0)
            loss = -logprobs.sum() / row.response_mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    common.save_model(policy, tokenizer, args.output / "base", ranks)


if __name__ == "__main__":
    common.run(main, Args, __doc__)
