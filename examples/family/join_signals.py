"""Joins the signals of two halves (examples/family/split_rollouts.py) into one file of the whole.

Every array of both files goes to the places of its tokens in the whole. Refused are halves of other
rollouts, files of other halves or another base, and a teacher that was trained on the half that it
scored.

Reads   --rollouts, --base, --halves (of split_rollouts.py), --signals (of build_signals.py).
Writes  OUTPUT (.safetensors) and OUTPUT with suffix .json, as build_signals.py does.

    python examples/family/join_signals.py --rollouts D --base B --halves halves/0 halves/1 \\
        --signals F0.safetensors F1.safetensors --output F.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from split_rollouts import part_of_problems
from torch import Tensor

from build_signals import diagnose, is_complete, print_report
from common import (
    Rollouts,
    UserError,
    fingerprint,
    load_rollouts,
    load_tensors,
    load_tokenizer,
    read_json,
    run,
    save_tensors,
    setup_ranks,
    write_json,
)


@dataclass
class Args:
    rollouts: Path
    """the whole: the folder that was split"""
    base: str
    """the base policy that the signals were built with"""
    halves: tuple[Path, Path]
    """folders written by split_rollouts.py, 0 then 1"""
    signals: tuple[Path, Path]
    """files of build_signals.py for halves 0 and 1, each with the teacher of the other half"""
    output: Path
    """signals file to write, name ending in .safetensors"""


def check_teachers(metadata: dict, half: Path) -> None:
    """Raises UserError where a teacher was trained on the half that it scored."""
    for role, model in metadata["models"].items():
        folder = Path(model["path"])
        if folder.parent.name == "checkpoints":  # RUN/checkpoints/EPOCH
            folder = folder.parent.parent
        record = folder / "args.json"
        if role.startswith(("teacher", "reference")) and record.is_file():
            trained_on = read_json(record).get("inputs", {}).get("rollouts")
            if trained_on == metadata["rollouts"]:
                raise UserError(
                    f"{model['path']}: was trained on {half}, which it scored; score each half "
                    "with the teacher of the other"
                )


def places_of_half(rollouts: Rollouts, half: Path, number: int) -> tuple[Tensor, Rollouts]:
    """Finds the places [n] of a half's tokens in the whole; returns them and the half.

    Raises UserError where the folder is not this half of these rollouts."""
    part = load_rollouts(half)
    name = {key: part.metadata.get(key) for key in ("half_of", "half", "half_seed", "half_share")}
    if name["half_of"] != fingerprint(rollouts.path):
        raise UserError(f"--halves {half}: not a half of {rollouts.path} as it is; split it again")
    if name["half"] != number:
        raise UserError(f"--halves {half}: not half {number}; give halves in the order 0, 1")
    n_problems = int(rollouts.problem_index.max()) + 1
    halves = part_of_problems(n_problems, name["half_share"], name["half_seed"])
    chosen = halves[rollouts.problem_index.long()] == number
    where = chosen[rollouts.sequence_ids].nonzero()[:, 0]
    if not torch.equal(rollouts.tokens[where], part.tokens):
        raise UserError(
            f"--halves {half}: its tokens are not those of {rollouts.path}; split it again"
        )
    return where, part


def main(args: Args) -> None:
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: the name must end in .safetensors")
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    tokenizer = load_tokenizer(args.base)
    joined: dict[str, Tensor] = {}
    described = []
    for number, (half, path) in enumerate(zip(args.halves, args.signals, strict=True)):
        where, part = places_of_half(rollouts, half, number)
        arrays, metadata = load_tensors(path)
        if metadata["rollouts"] != fingerprint(part.path):
            raise UserError(
                f"--signals {path}: not made for half {number} of --halves; give halves and "
                "signals in the order 0, 1"
            )
        check_teachers(metadata, half)
        for name, values in arrays.items():
            joined.setdefault(name, torch.zeros(len(rollouts.tokens)))[where] = values
        described.append(metadata)
    first, second = described
    if first["models"]["base"]["fingerprint"] != second["models"]["base"]["fingerprint"]:
        raise UserError("--signals: the two were built with different bases; use one base")
    if first["weights"] != second["weights"]:
        raise UserError("--signals: the two have other weights, or other numbers of teachers")
    crossfit = [metadata["models"] for metadata in described]
    metadata = first | {"rollouts": fingerprint(rollouts.path), "crossfit": crossfit}
    if is_complete(args.output, metadata, ranks):
        return
    report = diagnose(joined["signal"], rollouts, tokenizer)
    if ranks.rank == 0:
        write_json(args.output.with_suffix(".json"), report | metadata)
        save_tensors(args.output, joined, metadata)
    print_report(report, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
