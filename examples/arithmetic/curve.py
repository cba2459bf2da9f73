"""Evaluates the checkpoints of every stage-1 run: the early-stopping curves of the report.

Reads   RUN/stage1/*/checkpoints/epoch-*, RUN/base, RUN/test.jsonl (its first --problems lines).

Writes  RUN/curve/base and RUN/curve/STAGE1RUN/EPOCH, each an evaluation folder of evaluate.py. One
        process, so that libraries load once; what is there already is not made again.

    python examples/arithmetic/curve.py --run runs/arithmetic/seed0
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate


@dataclass
class Args:
    run: Path
    """folder of examples/arithmetic/run.sh"""
    problems: int = 256
    """held-out problems: the first of test.jsonl"""
    n: int = 4
    """responses per problem"""
    max_new_tokens: int = 128
    """token limit of a response"""
    seed: int = 0
    """seed of the sampling"""


def main(args: Args) -> None:
    folder = args.run / "curve"
    rows = common.read_jsonl(args.run / "test.jsonl")[: args.problems]
    common.write_jsonl(folder / "problems.jsonl", rows)

    def judge(model: Path, output: Path, base_run: Path | None) -> None:
        if (output / "metrics.json").is_file():
            return
        evaluate.main(evaluate.Args(
            model=str(model), problems=folder / "problems.jsonl", output=output,
            base=str(args.run / "base"), base_run=base_run, n=args.n,
            max_new_tokens=args.max_new_tokens, seed=args.seed,
        ))  # fmt: skip

    judge(args.run / "base", folder / "base", None)
    for model in sorted(args.run.glob("stage1/*/checkpoints/epoch-*")):
        if (model / "config.json").is_file():
            judge(model, folder / model.parts[-3] / model.name, folder / "base")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
