"""Prints "flat" where training has reached its plateau, and "rising" where it has not.

    flat    the last accuracy is at most GAIN above the one OVER rounds before

Reads   metrics.json of the evaluations of consecutive rounds.

    python examples/arithmetic/flat.py --judged watched/round0 watched/round1 watched/round2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common


@dataclass
class Args:
    judged: tuple[Path, ...]
    """folders of evaluate.py, one for each round, on the same problems"""
    gain: float = 0.01
    """a larger difference of accuracies counts as a gain"""
    over: int = 2
    """rounds that a gain may take"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "judged", bool, "at least one folder")
        common.require(self, "gain", lambda v: v >= 0, "0 or more")
        common.require(self, "over", lambda v: v >= 1, "1 or more")


def is_flat(accuracies: list[float], gain: float, over: int) -> bool:
    """Returns whether the last accuracy is at most `gain` above the one `over` rounds before."""
    return len(accuracies) > over and accuracies[-1] - accuracies[-1 - over] <= gain


def main(args: Args) -> None:
    args.check()
    metrics = [common.read_json(folder / "metrics.json")["metrics"] for folder in args.judged]
    accuracies = [row["accuracy"][0] for row in metrics]
    print("flat" if is_flat(accuracies, args.gain, args.over) else "rising")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
