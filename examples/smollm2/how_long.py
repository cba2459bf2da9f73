"""Measures for a few seconds how fast a model samples, trains and is scored, and says how long.

    seconds = sampled tokens / sampling rate + trained tokens / training rate + ...

Sampled tokens are those of responses; trained and scored ones include the prompts. The measurement
is short and other programs disturb it, so the answer is good to a factor of about 1.5.

Reads   --model, and --problems (JSONL), whose prompts it samples from.

    python examples/smollm2/how_long.py --model M --problems test.jsonl --sampled 3000 \\
        --trained 4000 --scored 6000
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate

ROWS = 64  # sampled at once: evaluate.py takes hundreds, and many rows cost little more than few
SEQUENCES = 8  # trained and scored at once
STEPS = 8  # sampled tokens of each row, after the first


@dataclass
class Args:
    model: str
    """model to measure, a folder or hub name"""
    problems: Path
    """JSONL file; only the lengths of the first prompts matter"""
    sampled: int = 0
    """responses that will be sampled"""
    trained: int = 0
    """responses that will be trained on, every epoch counted"""
    scored: int = 0
    """responses that will be scored, each model counted"""
    jobs: int = 1
    """such jobs that will run at a time, each as fast as this one"""
    response_tokens: int = 24
    """tokens of a response"""
    prompt_template: str = "{problem}"
    """the user message, with the problem in the place of {problem}"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "sampled trained scored", lambda v: v >= 0, "0 or more")
        common.require(self, "response_tokens jobs", lambda v: v >= 1, "1 or more")


def seconds(work: Callable[[], Any]) -> float:
    """Returns the seconds that a piece of work takes; on a GPU until it has really ended."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def random_row(prompt_tokens: int, args: Args, vocabulary: int, device: torch.device) -> common.Row:
    """Makes a packed row of sequences as long as those to come."""
    length = prompt_tokens + args.response_tokens
    rollouts = common.Rollouts(
        path=Path("random"),
        metadata={},
        tokens=torch.randint(vocabulary, (SEQUENCES * length,), dtype=torch.int32),
        cu_seqlens=torch.arange(SEQUENCES + 1) * length,
        prompt_lens=torch.full((SEQUENCES,), prompt_tokens, dtype=torch.int32),
        rewards=torch.zeros(SEQUENCES),
        problem_index=torch.zeros(SEQUENCES, dtype=torch.int32),
        truncated=torch.zeros(SEQUENCES, dtype=torch.bool),
    )
    return common.make_row(rollouts, list(range(SEQUENCES)), device)


def measure(args: Args) -> dict[str, float]:
    """Returns seconds per response: sampled, trained and scored."""
    ranks, tokenizer = common.setup_ranks(), common.load_tokenizer(args.model)
    problems = evaluate.read_jsonl(args.problems)[:ROWS]
    settings = evaluate.Args(args.model, args.problems, Path(), n=1)
    settings.prompt_template = args.prompt_template
    prompts = evaluate.encode_prompts(tokenizer, problems, settings)
    prompts = [prompts[i % len(prompts)] for i in range(ROWS)]
    dtype = common.compute_dtype(ranks.device)
    lm = common.load_lm(args.model, ranks.device, dtype, attention="sdpa")
    never = [len(tokenizer) - 1]  # an EOS that is hardly ever sampled

    def sample(tokens: int) -> float:
        settings.max_new_tokens = tokens
        return seconds(lambda: evaluate.sample_batch(lm, prompts, never, never[0], settings))

    first = sample(1)  # which reads the prompts
    step = (sample(1 + STEPS) - first) / STEPS
    policy = common.load_policy(args.model, ranks, train=True)
    mean = sum(map(len, prompts)) // ROWS
    row = random_row(mean, args, len(tokenizer), ranks.device)

    def forward() -> torch.Tensor:
        return common.row_logprobs(policy, row, 1.0)[0].sum()

    with torch.no_grad():
        score = seconds(forward)
    train = seconds(lambda: forward().backward())
    sampled = (first + step * (args.response_tokens - 1)) / ROWS
    return {"sampled": sampled, "trained": train / SEQUENCES, "scored": score / SEQUENCES}


def main(args: Args) -> None:
    args.check()
    each, total = measure(args), 0.0
    for name, value in each.items():
        total += value * getattr(args, name)
        print(f"{getattr(args, name)} responses to be {name}: {value:.2f} s each here")
    minutes = total / 60 / args.jobs
    text = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    print(f"this run will take about {text} and the starts of its commands, on a free machine")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
