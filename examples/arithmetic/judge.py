"""Evaluates the policies of a run on held-out problems, in one process: libraries load once.

Reads   RUN/base, RUN/test.jsonl, RUN/stage1/*, RUN/students/*, RUN/temperature/*.
Writes  evaluation folders of evaluate.py. What is there already is not made again.

    policies      RUN/eval/NAME of every stage-1 policy
    students      RUN/eval/student_NAME of every student
    temperatures  RUN/eval/temperature-T of the base at every temperature
    checkpoints   RUN/curve/STAGE1RUN/EPOCH, the early-stopping curves; where the policy itself is
                  judged too, its evaluation is also the last point of its curve

    python examples/arithmetic/judge.py --run runs/arithmetic/seed0 --what policies students --n 8 8
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
    what: tuple[Literal["policies", "students", "temperatures", "checkpoints"], ...]
    """what to judge: see above"""
    n: tuple[int, ...]
    """responses per problem, one number for each of --what"""
    base_run: Path | None = None
    """evaluation of the base on the same problems; default: RUN/eval/base"""
    shard: str = "0/1"
    """i/N: judge the i-th of N parts, i from 0, to run N of these commands side by side"""
    kl_samples: int = 2048
    """responses on which a KL is measured, spread evenly over all"""
    max_new_tokens: int = 128
    """token limit of a response"""
    seed: int = 0
    """seed of the sampling"""


def find(run: Path) -> dict[str, dict[str, Path]]:
    """Returns {what: {evaluation folder in the run: model folder}}."""
    cooler = sorted(run.glob("temperature/*"))
    checkpoints = sorted(run.glob("stage1/*/checkpoints/epoch-*"))
    return {
        "policies": {f"eval/{f.name}": f for f in sorted(run.glob("stage1/*"))},
        "students": {f"eval/student_{f.name}": f for f in sorted(run.glob("students/*"))},
        "temperatures": {f"eval/temperature-{f.name}": f for f in cooler},
        "checkpoints": {f"curve/{f.parts[-3]}/{f.name}": f for f in checkpoints},
    }


def main(args: Args) -> None:
    found, jobs = find(args.run), {}
    if len(args.n) != len(args.what):
        raise common.UserError(f"--n: {len(args.n)} numbers for {len(args.what)} of --what")
    for what, n in zip(args.what, args.n, strict=True):
        jobs |= {name: (n, model) for name, model in found[what].items()}
    part, n_parts = evaluate.parse_shard(args.shard)
    base_run = args.base_run or args.run / "eval/base"
    for name, (n, model) in list(jobs.items())[part::n_parts]:
        output, final = args.run / name, model.parents[1]
        done = output.is_symlink() or (output / "metrics.json").is_file()
        if done or not (model / "config.json").is_file():
            continue  # an unfinished model has none
        linked = name.startswith("curve/") and f"eval/{final.name}" in jobs
        linked = linked and not output.exists() and (final / "config.json").is_file()
        if linked and common.fingerprint(model) == common.fingerprint(final):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.symlink_to(Path("../../eval", final.name))
            continue
        settings = {"n": n, "seed": args.seed, "max_new_tokens": args.max_new_tokens}
        settings |= {
            "kl_samples": args.kl_samples,
            "base": str(args.run / "base"),
            "base_run": base_run,
        }
        problems = args.run / "test.jsonl"
        evaluate.main(evaluate.Args(str(model), problems, output, **settings))


if __name__ == "__main__":
    common.run(main, Args, __doc__)
