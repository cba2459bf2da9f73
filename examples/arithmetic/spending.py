"""Says which kinds of tokens the nats of each policy go to: those that the reward asks for, or not.

Every response token has a kind (`scribe.token_kinds`). Results are split further: those of a pair
for which the scribe has a habit, all others within 0 ... 9, and those outside, where a wrong result
has led the chain. The KL at a token is that over the whole vocabulary at its prefix, on the
policy's own samples, so that the kinds add up to the policy's KL.

Reads   RUN/base, RUN/eval/NAME (samples and the model that they name) of every policy but the base.
Writes  RUN/spending.json, {NAME: {kind: nats per response}}, which report.py shows.

    python examples/arithmetic/spending.py --run runs/arithmetic/seed0 --seed 0
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scribe

import common
import evaluate

BATCH = 64  # responses at a time; the vocabulary has 40 entries, so whole logits are small


@dataclass
class Args:
    run: Path
    """folder of examples/arithmetic/run.sh"""
    responses: int = 256
    """responses of each policy to look at, evenly over the problems"""
    seed: int = 0
    """seed of the run, which decides the habits"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "responses", lambda v: v >= 1, "1 or more")


def spending_kinds(response: str, habits: scribe.Habits) -> list[str]:
    """Returns the kind of every character and of the end, with three kinds of results."""
    kinds, at = scribe.token_kinds(response), 0
    while found := scribe.STEP.match(response, at):
        before, operand = map(int, re.match(r"(-?\d+)([+-]\d+)", found[2]).groups())
        numbers = range(scribe.MAX_TOTAL + 1)
        inside = before in numbers and before + operand in numbers
        habit = (before, operand) in habits
        kind = "result of habit" if habit else "other result" if inside else "result outside"
        start, end = found.span(4)
        kinds[start:end] = [kind] * (end - start)
        at = found.end()
    return kinds


@torch.no_grad()
def spent(
    policy: Any, base: Any, rollouts: common.Rollouts, texts: list[str], chosen: list[int],
    habits: scribe.Habits,
) -> Counter[str]:  # fmt: skip
    """Returns nats of KL(policy || base) per chosen response, by kind of token."""
    total: Counter[str] = Counter()
    starts, prompts = rollouts.cu_seqlens.tolist(), rollouts.prompt_lens.tolist()
    for first in range(0, len(chosen), BATCH):
        batch = chosen[first : first + BATCH]
        rows = [rollouts.tokens[starts[s] : starts[s + 1]].long() for s in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: no mask
        log_p, log_q = (lm(input_ids=ids).logits.log_softmax(-1) for lm in (policy, base))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [batch, length]: entry t is of token t + 1
        for row, s in enumerate(batch):
            kinds = spending_kinds(texts[s], habits)
            values = kl[row, prompts[s] - 1 : len(rows[row]) - 1].tolist()
            for kind, value in zip(kinds, values, strict=False):  # truncated: without an end
                total[kind] += value / len(chosen)
    return total


def main(args: Args) -> None:
    args.check()
    base = common.load_lm(str(args.run / "base"), torch.device("cpu"), torch.float32, "sdpa")
    habits, found = scribe.make_habits(args.seed), {}
    for folder in sorted(path.parent for path in args.run.glob("eval/*/kl.safetensors")):
        if folder.name == "base" or folder.name.startswith("temperature-"):
            continue  # which spends nothing, or was not trained
        model = common.read_json(folder / "metrics.json")["model"]
        policy = common.load_lm(model, torch.device("cpu"), torch.float32, "sdpa")
        rollouts = common.load_rollouts(folder)
        texts = [row["text"] for row in evaluate.read_jsonl(folder / "samples.jsonl")]
        step = max(1, len(texts) // args.responses)
        found[folder.name] = spent(
            policy, base, rollouts, texts, [*range(0, len(texts), step)], habits
        )
    common.write_json(args.run / "spending.json", found)
    kinds = sorted({kind for row in found.values() for kind in row})
    print("nats per response".ljust(20), *(kind.rjust(15) for kind in kinds))
    for name, row in found.items():
        print(name.ljust(20), *(f"{row.get(kind, 0.0):15.3f}" for kind in kinds))


if __name__ == "__main__":
    common.run(main, Args, __doc__)
