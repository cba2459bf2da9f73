"""Marks the first wrong token of every response in a rollouts folder of the arithmetic example.

Adds `first_wrong_token`, [S] int32, to rollouts.safetensors: the token's place in the sequence,
counted from the start of the prompt. It is -1 where the text follows the correct chain to its end,
and where it stops too early. Style is free: only numbers and signs can be wrong.

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
import evaluate
from common import UserError


@dataclass
class Args:
    rollouts: Path
    """folder of evaluate.py, sampled on problems of make_base.py"""


def main(args: Args) -> None:
    rollouts = common.load_rollouts(args.rollouts)
    problems = evaluate.read_jsonl(args.rollouts / "problems.jsonl")
    texts = [row["text"] for row in evaluate.read_jsonl(args.rollouts / "samples.jsonl")]
    if len(texts) != len(rollouts.rewards):
        found = f"{len(texts)} lines for {len(rollouts.rewards)} responses; sample again"
        raise UserError(f"{args.rollouts / 'samples.jsonl'}: {found}")
    for number, row in enumerate(problems, 1):
        if not scribe.PROBLEM.fullmatch(row["problem"]):
            where = f"{args.rollouts / 'problems.jsonl'}:{number}"
            raise UserError(f"{where}: {row['problem'][:60]!r} is not a problem of make_base.py")
    marks = []
    for s, text in enumerate(texts):
        # One character is one token, so a place in the text is a place in the response. Only <pad>
        # and <unk>, which a ruined policy may write, are tokens that the text does not show.
        aligned = len(text) >= int(rollouts.response_lens[s]) - 1
        problem = problems[int(rollouts.problem_index[s])]["problem"]
        place = scribe.first_wrong_character(problem, text)
        marks.append(int(rollouts.prompt_lens[s]) + place if aligned and place >= 0 else -1)
    marked = dataclasses.replace(rollouts, first_wrong_token=torch.tensor(marks, dtype=torch.int32))
    evaluate.save_rollouts(marked)
    wrong = rollouts.rewards == 0
    found = (marked.first_wrong_token >= 0) & wrong
    print(f"{int(found.sum())} of {int(wrong.sum())} wrong responses have a first wrong token")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
