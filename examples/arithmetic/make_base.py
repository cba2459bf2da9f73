"""Makes the embedded default: problems to train and to judge on, and a base that makes mistakes.

Writes  OUTPUT/train.jsonl and OUTPUT/test.jsonl, which share no problem, and OUTPUT/base/, a Qwen3
        of about 0.3 M parameters with a character tokenizer, trained on solutions of the scribe,
        whose habits are wrong. Equal seeds give equal files.

The base is then tried on fresh problems, and refused if the example would show nothing with it
(`NEEDED`): it must be right about as often as wrong, no lower temperature may mend it, and nearly
every problem must be right once in 16 samples.

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
import evaluate

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
    """optimizer steps of the base"""
    batch_size: int = 32
    """solutions per step, freshly written each time"""
    learning_rate: float = 4e-3
    """peak of a warm-up and cosine schedule"""
    hidden_size: int = 96
    """width of the base"""
    layers: int = 2
    """decoder blocks"""
    tried: int = 256
    """fresh problems that the base is tried on, 16 samples each; 0: not tried"""
    seed: int = 0
    """seed of problems, habits, solutions and initial weights"""


def make_tokenizer() -> Any:
    """Makes a tokenizer with one token per character. `<pad>` is only ever left of a prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *scribe.ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_problems(n_train: int, n_test: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Makes distinct problems, so that no held-out one is trained on, with exact answers."""
    rows = scribe.make_problems(n_train + n_test, random.Random(f"problems-{seed}"), set())
    train = [{"id": f"train-{i}"} | row for i, row in enumerate(rows[:n_train])]
    test = [{"id": f"test-{i}"} | row for i, row in enumerate(rows[n_train:])]
    overlap = {row["problem"] for row in train} & {row["problem"] for row in test}
    assert not overlap, f"train and test share {len(overlap)} problems"
    return train, test


def make_model(args: Args, tokenizer: Any) -> Any:
    """Makes a Qwen3 with random weights that runs by `common.packed_attention`."""
    from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

    AttentionInterface.register("packed", common.packed_attention)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden_size // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="packed",
    )
    return Qwen3ForCausalLM(config)


def solution_rollouts(
    tokenizer: Any,
    rng: random.Random,
    n: int,
    habits: scribe.Habits,
    mistakes: float,
    held_out: set[str],
) -> common.Rollouts:
    """Writes the scribe's solutions of n fresh problems, as the packed forward reads them."""
    sequences, prompt_lens = [], []
    while len(sequences) < n:
        problem = scribe.make_problem(rng)
        if problem in held_out:
            continue
        text = scribe.write_solution(problem, rng, habits, mistakes)
        prompt = tokenizer.convert_tokens_to_ids([*problem, "\n"])
        sequences.append(prompt + tokenizer.convert_tokens_to_ids([*text, "<eos>"]))
        prompt_lens.append(len(prompt))
    none = torch.zeros(n)  # no verdicts, no problem numbers: the loss does not look at them
    return common.Rollouts(
        path=Path("fresh"),
        metadata={},
        tokens=torch.tensor(sum(sequences, []), dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *map(len, sequences)]).cumsum(0),
        prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32),
        rewards=none,
        problem_index=none.int(),
        truncated=none.bool(),
    )


TEMPERATURES = (0.9, 0.7, 0.5, 0.3)
NEEDED = {  # what of a base: least and most
    "accuracy": (0.40, 0.55),
    "gain by a lower temperature": (-1.0, 0.03),  # the best of TEMPERATURES, less two errors
    "pass@16": (0.93, 1.0),
    "problems with both verdicts": (0.5, 1.0),
}


@torch.no_grad()
def sample_verdicts(
    lm: Any, tokenizer: Any, problems: list[dict[str, str]], n: int, temperature: float
) -> torch.Tensor:
    """Samples n solutions of each problem. Returns which of them are right: [P, n] float32."""
    rows, generator = [], {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature}
    by_length = sorted(problems, key=lambda row: len(row["problem"]))
    for start in range(0, len(problems), 32):
        batch = by_length[start : start + 32]
        texts = [row["problem"] + "\n" for row in batch for _ in range(n)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        output = lm.generate(**inputs.to(lm.device), **generator, max_new_tokens=128)
        ends = [f"\\boxed{{{row['answer']}}}" for row in batch for _ in range(n)]
        solutions = tokenizer.batch_decode(output, skip_special_tokens=True)
        rows += [float(text.endswith(end)) for text, end in zip(solutions, ends, strict=True)]
    return torch.tensor(rows).view(len(problems), n)


def try_base(folder: Path, args: Args, held_out: set[str], device: torch.device) -> None:
    """Prints what the base is like. Raises UserError if the example would show nothing with it."""
    lm = common.load_lm(str(folder), device, torch.float32, attention="sdpa")
    tokenizer = common.load_tokenizer(str(folder))
    problems = scribe.make_problems(args.tried, random.Random(f"tried-{args.seed}"), held_out)
    torch.manual_seed(args.seed)
    verdicts = sample_verdicts(lm, tokenizer, problems, 16, 1.0)  # [P, 16]
    rates, gains = verdicts.mean(1), []
    for temperature in TEMPERATURES:
        more = sample_verdicts(lm, tokenizer, problems, 4, temperature).mean(1) - rates  # [P]
        gain, error = more.mean().item(), more.std().item() / len(more) ** 0.5
        print(f"temperature {temperature:g}: accuracy {gain:+.3f} ± {error:.3f}")
        gains.append(gain - 2 * error)
    passed, mixed = (rates > 0).float().mean(), ((rates > 0) & (rates < 1)).float().mean()
    found = [rates.mean().item(), max(gains), passed.item(), mixed.item()]
    for (what, (least, most)), value in zip(NEEDED.items(), found, strict=True):
        print(f"{what:28s} {value:.3f}, needed: {least:g} to {most:g}")
        if not least <= value <= most:
            raise common.UserError(
                f"--seed {args.seed}: {what} of the base: {value:.3f}, not {least:g} to {most:g}; "
                "take another seed"
            )


def main(args: Args) -> None:
    ranks = common.setup_ranks()
    if not common.start_run(args.output / "base", args, {}, ranks):
        return
    train, test = make_problems(args.train, args.test, args.seed)
    evaluate.write_jsonl(args.output / "train.jsonl", train)
    evaluate.write_jsonl(args.output / "test.jsonl", test)

    torch.manual_seed(args.seed)
    rng = random.Random(f"solutions-{args.seed}")
    tokenizer = make_tokenizer()
    policy = common.Policy(make_model(args, tokenizer)).to(ranks.device)
    optimizer = common.make_optimizer(policy, args.learning_rate, 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=0.1, cycle_momentum=False
    )
    held_out, habits = {row["problem"] for row in train + test}, scribe.make_habits(args.seed)
    with common.progress(ranks, args.steps, 0, "train the base") as bar:
        for step in range(args.steps):
            # Mistakes come late: without them the facts are learnt in half the steps.
            mistakes = min(1.0, max(0.0, 4 * step / args.steps - 1))
            batch = solution_rollouts(tokenizer, rng, args.batch_size, habits, mistakes, held_out)
            row = common.make_row(batch, list(range(args.batch_size)), ranks.device)
            loss = -common.row_logprobs(policy, row, 1.0)[0].mean()
            loss.backward()
            rate = schedule.get_last_lr()[0]
            common.optimizer_step(policy, optimizer, rate, max_grad_norm=1.0)
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    common.save_model(policy, tokenizer, args.output / "base", ranks)
    if args.tried:
        try_base(args.output / "base", args, held_out, ranks.device)


if __name__ == "__main__":
    common.run(main, Args, __doc__)
