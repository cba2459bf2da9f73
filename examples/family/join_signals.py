"""Joins the signals of two halves (examples/family/split_rollouts.py) into one of the whole.

Every array of both files goes to its tokens' places in the whole. Refused: halves of other
rollouts, files of other halves, another base, a teacher trained on the half that it scored.

    python examples/family/join_signals.py --rollouts D --base B --halves halves/0 halves/1 \\
        --signals F0.safetensors F1.safetensors --output F.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from split_rollouts import part_of_problems, response_tokens

from build_signals import diagnose, is_complete, print_report

from common import (  # isort: skip
    UserError, fingerprint, load_rollouts, load_tensors, load_tokenizer, read_json, run,
    save_tensors, setup_ranks, write_json,
)  # fmt: skip


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


def check_teachers(metadata: dict, half: Path, scored: str) -> None:
    """Raises UserError where a teacher was trained on the half whose fingerprint is `scored`."""
    for role, model in metadata["models"].items():
        folder = Path(model["path"])
        if folder.parent.name == "checkpoints":  # RUN/checkpoints/EPOCH
            folder = folder.parent.parent
        record = folder / "args.json"
        if role.startswith(("teacher", "reference")) and record.is_file():
            trained_on = read_json(record).get("inputs", {}).get("rollouts")
            if trained_on == scored:
                raise UserError(f"{model['path']}: was trained on {half}, which it scored; "
                                "score each half with the teacher of the other")  # fmt: skip


def main(args: Args) -> None:
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: the name must end in .safetensors")
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    tokenizer = load_tokenizer(args.base)
    joined: dict[str, torch.Tensor] = {}
    described = []
    for number, (half, path) in enumerate(zip(args.halves, args.signals, strict=True)):
        part = load_rollouts(half)
        arrays, metadata = load_tensors(path, {"signal": torch.float32})
        if part.metadata.get("half_of") != fingerprint(rollouts.path):
            raise UserError(f"--halves {half}: not a half of {args.rollouts} as it is now; "
                            "split it again")  # fmt: skip
        if part.metadata["half"] != number or metadata["rollouts"] != fingerprint(part.path):
            raise UserError(f"--signals {path}: not made for half {number} of --halves; "
                            "give halves and signals in the order 0, 1")  # fmt: skip
        check_teachers(metadata, half, metadata["rollouts"])
        n_problems = int(rollouts.problem_index.max()) + 1
        share = part.metadata.get("half_share")
        if share is None:
            raise UserError(f"--halves {half}: split before there was --share; split it again")
        of = part_of_problems(n_problems, share, part.metadata["half_seed"])
        where = response_tokens(rollouts, of[rollouts.problem_index.long()] == number)
        if not torch.equal(rollouts.tokens[where], part.tokens):
            raise UserError(f"--halves {half}: its tokens are not those of {args.rollouts}; "
                            "split it again")  # fmt: skip
        for name, values in arrays.items():
            whole = joined.setdefault(name, torch.zeros(len(rollouts.tokens)))
            joined[name] = whole.index_put((where,), values)
        described.append(metadata)
    first, second = described
    if first["models"]["base"]["fingerprint"] != second["models"]["base"]["fingerprint"]:
        raise UserError("--signals: the two were built with different bases")
    if first["weights"] != second["weights"]:
        raise UserError("--signals: the two were built with different teachers or weights")
    metadata = first | {"rollouts": fingerprint(rollouts.path),
                        "crossfit": [half["models"] for half in described]}  # fmt: skip
    if is_complete(args.output, metadata, ranks):
        return
    report = diagnose(joined["signal"], rollouts, tokenizer)
    write_json(args.output.with_suffix(".json"), report | metadata)
    save_tensors(args.output, joined, metadata)
    print_report(report, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
