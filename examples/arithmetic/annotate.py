"""Marks the first wrong token of every response in a rollouts folder of the arithmetic example.

Adds `first_wrong_token` [S] int32 to rollouts.safetensors: its place in the sequence, the prompt
counted; -1 where the text follows the correct chain to its end, or stops early. Style is free;
only numbers and signs can be wrong.

    python examples/arithmetic/annotate.py --rollouts runs/arithmetic/seed0/rollouts
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scribe

import common


@dataclass
class Args:
    rollouts: Path
    """folder of evaluate.py, sampled on problems of make_base.py"""


def main(args: Args) -> None:
    rollouts = common.load_rollouts(args.rollouts)
    problems = common.read_jsonl(args.rollouts / "problems.jsonl")
    samples = common.read_jsonl(args.rollouts / "samples.jsonl")
    if len(samples) != len(rollouts.rewards):
        raise common.UserError(f"{args.rollouts / 'samples.jsonl'}: {len(samples)} lines for "
                               f"{len(rollouts.rewards)} responses; sample again")  # fmt: skip
    for number, row in enumerate(problems, 1):
        if not scribe.PROBLEM.fullmatch(row["problem"]):
            raise common.UserError(f"{args.rollouts / 'problems.jsonl'}:{number}: not a problem of "
                                   f"make_base.py: {row['problem'][:60]!r}")  # fmt: skip
    lengths = rollouts.response_lens.tolist()
    rows = zip(samples, rollouts.problem_index.tolist(), rollouts.prompt_lens.tolist(), strict=True)
    marks = []
    for (sample, problem, prompt_len), length in zip(rows, lengths, strict=True):
        # One character is one token, so a place in the text is a place in the response; but for
        # <pad> or <unk>, which only a ruined policy writes and the text does not show.
        aligned = len(sample["text"]) >= length - 1
        place = scribe.first_wrong_character(problems[problem]["problem"], sample["text"])
        marks.append(prompt_len + place if aligned and place >= 0 else -1)
    marked = dataclasses.replace(rollouts, first_wrong_token=torch.tensor(marks, dtype=torch.int32))
    common.save_rollouts(marked)
    wrong = rollouts.rewards == 0
    found = (marked.first_wrong_token >= 0) & wrong
    print(f"{int(found.sum())} of {int(wrong.sum())} wrong responses have a first wrong token")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
