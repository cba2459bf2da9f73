"""Evaluates the policies of a run on held-out problems, in one process: libraries load once.

Reads   RUN/base, RUN/test.jsonl, RUN/stage1/*, RUN/students/*, RUN/temperature/*.
Writes  evaluation folders of evaluate.py. What is there already is not made again.

    --what policies     RUN/eval/base, with 32 samples a problem (its pass rates give the optimum's
                        curve), RUN/eval/NAME of every stage-1 policy, RUN/eval/student_NAME of
                        every student, RUN/eval/temperature-T of the base at every temperature
    --what students     RUN/eval/base and the students alone
    --what checkpoints  RUN/curve/base and RUN/curve/STAGE1RUN/EPOCH, the early-stopping curves, on
                        the first --problems problems

    python examples/arithmetic/judge.py --run runs/arithmetic/seed0 --what policies --n 8
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate


@dataclass
class Args:
    run: Path
    """folder of examples/arithmetic/run.sh"""
    what: Literal["policies", "students", "checkpoints"]
    """what stages 1 and 2 ended with, what stage 2 ended with, or all checkpoints of stage 1"""
    base_run: Path | None = None
    """evaluation of the base on the same problems; default: made here"""
    shard: str = "0/1"
    """i/N: judge the i-th of N parts, i from 0, to run N of these commands side by side"""
    problems: int = 512
    """held-out problems: the first of test.jsonl"""
    n: int = 8
    """responses per problem"""
    max_new_tokens: int = 128
    """token limit of a response"""
    seed: int = 0
    """seed of the sampling"""


def policies(run: Path) -> dict[str, Path]:
    """Returns {evaluation name: model folder} of what the stages ended with, and of the rival."""
    cooler = {f"temperature-{f.name}": f for f in sorted(run.glob("temperature/*"))}
    return {f.name: f for f in sorted(run.glob("stage1/*"))} | students(run) | cooler


def students(run: Path) -> dict[str, Path]:
    """Returns {evaluation name: model folder} of what stage 2 ended with."""
    return {f"student_{folder.name}": folder for folder in sorted(run.glob("students/*"))}


def checkpoints(run: Path) -> dict[str, Path]:
    """Returns {stage-1 run / epoch: model folder}."""
    return {f"{f.parts[-3]}/{f.name}": f for f in sorted(run.glob("stage1/*/checkpoints/epoch-*"))}


def main(args: Args) -> None:
    whole = args.what != "checkpoints"
    folder = args.run / ("eval" if whole else "curve")
    problems, base = args.run / "test.jsonl", args.run / "base"
    rows = evaluate.read_jsonl(problems)
    if args.problems < len(rows):
        problems = folder / "problems.jsonl"
        evaluate.write_jsonl(problems, rows[: args.problems])

    def judge(name: str, model: Path, n: int, base_run: Path | None) -> None:
        """Evaluates one model, unless that is done."""
        settings = {"n": n, "seed": args.seed, "max_new_tokens": args.max_new_tokens}
        if not (folder / name / "metrics.json").is_file():
            against = {"base": str(base), "base_run": base_run}
            evaluate.main(evaluate.Args(str(model), problems, folder / name, **against, **settings))

    if args.base_run is None:
        judge("base", base, 32 if whole else args.n, None)
    part, n_parts = evaluate.parse_shard(args.shard)
    found = {"policies": policies, "students": students, "checkpoints": checkpoints}[args.what]
    for name, model in list(found(args.run).items())[part::n_parts]:
        if (model / "config.json").is_file():  # an unfinished one has none
            judge(name, model, args.n, args.base_run or folder / "base")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
