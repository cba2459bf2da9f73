"""Prints the temperature curve of a base and its pass@k: is there anything that only learning gets?

    gain    accuracy of the best lower temperature, minus that at temperature 1
    room    pass@8 minus accuracy at temperature 1: what is in the samples and mostly not said

Where the gain is a third of the room or more, a lower temperature gives much of it for nothing, and
an example of learning shows little. Where there is no room, the samples hold nothing to learn.

Reads   --samples (an evaluation of the base at temperature 1, 8 responses a problem or more) and
        --cooler (evaluations at lower temperatures on the same problems).

    python examples/smollm2/curve.py --samples held_out/rollouts --cooler cooler/0.5 cooler/0
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common

SHARE = 1 / 3  # of the room that a lower temperature may gain
LEAST, MOST = 0.2, 0.5  # accuracy at temperature 1


@dataclass
class Args:
    samples: Path
    """evaluation folder of the base at temperature 1"""
    cooler: tuple[Path, ...]
    """evaluation folders of the base at lower temperatures"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        for folder in (self.samples, *self.cooler):
            if not (folder / "metrics.json").is_file():
                flag = "--samples" if folder == self.samples else "--cooler"
                raise common.UserError(f"{flag} {folder}: no evaluation; make it by evaluate.py")


def judge(accuracy: float, best: float, passed: float) -> list[str]:
    """Returns what the curve means, in sentences."""
    gain, room = best - accuracy, passed - accuracy
    found = [f"gain by the best lower temperature {gain:+.3f}, room {room:.3f}"]
    if not LEAST <= accuracy <= MOST:
        longer = "warm up longer, or take easier problems"
        change = longer if accuracy < LEAST else "take harder problems, or a shorter warm start"
        found.append(f"note: accuracy {accuracy:.3f} is not {LEAST:g} to {MOST:g}; {change}")
    if room < 0.1:
        found.append("note: the samples hold hardly more than the accuracy; take other problems")
    elif gain > SHARE * room:
        found.append("note: a lower temperature gives a third or more; take other problems")
    return found


def main(args: Args) -> None:
    args.check()
    print("temperature  accuracy   error  pass@k")
    measured: list[dict[str, Any]] = []
    for folder in (args.samples, *args.cooler):
        summary = common.read_json(folder / "metrics.json")
        metrics, temperature = summary["metrics"], summary["sampling"]["temperature"]
        value, error = metrics["accuracy"]
        shown = [f"@{k.removeprefix('pass@')} {v:.3f}" for k, (v, _) in metrics.items() if "@" in k]
        spread = " " * 6 if error is None else f"{error:.4f}"
        print(f"{temperature:11g}  {value:8.3f}  {spread}  {'  '.join(shown)}")
        measured.append(metrics)
    first, *others = measured
    passed = first.get("pass@8") or first[[k for k in first if "@" in k][-1]]
    accuracies = [m["accuracy"][0] for m in others]
    for line in judge(first["accuracy"][0], max(accuracies, default=0.0), passed[0]):
        print(line)


if __name__ == "__main__":
    common.run(main, Args, __doc__)
