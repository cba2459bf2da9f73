"""Writes worked solutions as a rollouts folder, so that stage1_extreme.py --loss sft learns them.

A small pretrained model is hardly ever right before it has seen how to answer. A short SFT comes
first, as in every pipeline of the field; this makes its data. Prompts are those of evaluate.py, a
response is the solution and the token that ends a turn, and every reward is 1.

Reads   --model (its tokenizer and chat template), --problems, whose lines have a "solution".
Writes  OUTPUT/ rollouts.safetensors, problems.jsonl, samples.jsonl.

    python examples/smollm2/warm_start.py --model M --problems warm_start.jsonl --output worked
    python stage1_extreme.py --base M --rollouts worked --loss sft --output warm
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate
from common import UserError


@dataclass
class Args:
    model: str
    """model whose tokenizer and chat template are used, a folder or hub name"""
    problems: Path
    """JSONL file, one {"id", "problem", "answer", "solution"} per line"""
    output: Path
    """rollouts folder to write"""
    prompt_template: str = "{problem}"
    """the user message, with the problem in the place of {problem}"""
    chat_template_kwargs: str | None = None
    """JSON object of switches of the chat template, as for evaluate.py"""


def read_worked(path: Path) -> list[dict[str, str]]:
    """Reads problems with solutions. Raises UserError that names file, line and field."""
    if not path.is_file():
        raise UserError(
            f"--problems {path}: no such file; examples/smollm2/short_problems.py writes one"
        )
    fields, rows = ("id", "problem", "answer", "solution"), []
    for number, row in enumerate(evaluate.read_jsonl(path), 1):
        rows.append({name: evaluate.read_field(row, name, f"{path}:{number}") for name in fields})
        if not evaluate.verdict_of(rows[-1]["answer"], rows[-1]["solution"]):
            raise UserError(
                f"{path}:{number}: the solution does not end at the answer; correct it, or drop it"
            )
    if not rows:
        raise UserError(f"--problems {path}: has no problems; give it some with a solution")
    return rows


def as_rollouts(
    rows: list[dict[str, str]], tokenizer: Any, args: evaluate.Args, path: Path
) -> common.Rollouts:
    """Returns worked solutions as responses, each with reward 1."""
    prompts = evaluate.encode_prompts(tokenizer, rows, args)
    end = evaluate.turn_end(tokenizer, args) or tokenizer.eos_token_id
    answers = [
        [*tokenizer(row["solution"], add_special_tokens=False).input_ids, end] for row in rows
    ]
    sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
    sampling = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return common.Rollouts(
        path=path,
        metadata={"model": "worked solutions", "sampling": sampling},
        tokens=torch.tensor(sum(sequences, []), dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *map(len, sequences)]).cumsum(0),
        prompt_lens=torch.tensor([len(p) for p in prompts], dtype=torch.int32),
        rewards=torch.ones(len(rows)),
        problem_index=torch.arange(len(rows), dtype=torch.int32),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
    )


def main(args: Args) -> None:
    path = args.output / "rollouts.safetensors"
    if path.is_file():
        print(f"{args.output} is complete; nothing to do")
        return
    rows = read_worked(args.problems)
    settings = evaluate.Args(
        args.model,
        args.problems,
        args.output,
        prompt_template=args.prompt_template,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    rollouts = as_rollouts(rows, common.load_tokenizer(args.model), settings, path)
    args.output.mkdir(parents=True, exist_ok=True)
    evaluate.write_jsonl(args.output / "problems.jsonl", rows)
    samples = [{"id": r["id"], "sample": 0, "reward": 1, "text": r["solution"]} for r in rows]
    evaluate.write_jsonl(args.output / "samples.jsonl", samples)
    evaluate.save_rollouts(rollouts)
    tokens = rollouts.response_lens.float().mean().item()
    print(f"{args.output}: {len(rows)} worked solutions, {tokens:.0f} tokens each")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
