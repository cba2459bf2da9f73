"""Writes fresh problems for another round: none that is in the files named, and none twice.

Writes  OUTPUT, JSONL of {"id", "problem", "answer"}. Equal names, seeds and files give equal
        problems.

Chains of one step, of which there are 90, run out after the first rounds; the others do not.

    python examples/arithmetic/problems.py --output round2.jsonl --name round2 \\
        --without test.jsonl train.jsonl
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scribe

import common
import evaluate


@dataclass
class Args:
    output: Path
    """file to write"""
    name: str
    """the ids begin with it; another name gives other problems"""
    without: tuple[Path, ...]
    """files of problems that are taken: those to judge on, those of earlier rounds"""
    n: int = 512
    """number of problems"""
    seed: int = 0
    """seed of the problems, together with the name"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "n", lambda v: v >= 1, "1 or more")


def main(args: Args) -> None:
    args.check()
    taken = {row["problem"] for path in args.without for row in evaluate.read_jsonl(path)}
    rng = random.Random(f"problems-{args.seed}-{args.name}")
    rows = scribe.make_problems(args.n, rng, taken)
    evaluate.write_jsonl(args.output, [{"id": f"{args.name}-{i}"} | r for i, r in enumerate(rows)])
    print(f"{args.output}: {args.n} problems, none of the {len(taken)} taken")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
