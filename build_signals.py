"""Signals: one number per response token, from the log-ratios of stage 1's policies.

    signal_t = sum_i w_i (log teacher_i(y_t) - log reference_i(y_t))

With a strong teacher the reference is the base. With a ruined one the signal is built another way:
the base against an *unlearned* policy (--teachers BASE --references UNLEARNED), a recovered policy
against an unlearned one, or several teachers with weights. One reference serves all teachers; none
given means the base.

Reads   --rollouts (a folder written by evaluate.py), --base, --teachers, --references, --behavior
        (model folders).
Writes  OUTPUT (signals.safetensors): signal, behavior_logprobs and base_logprobs, aligned with the
        rollouts' tokens and zero on prompts; OUTPUT with suffix .json: the diagnostics that are
        printed. The log-probs of each policy are kept in ROLLOUTS/logprobs/, so that no policy is
        scored twice, by this or by another script, after a kill or without one.

Diagnostics: AUC of the summed signal against the verdict, the share of tokens that carries 90 % of
all |signal|, and the tokens with most credit and most blame. Credit AUC, where the first wrong
token is known: how often is that token blamed more than a token before it? (Averaged over wrong
responses; ties count half; tokens after the mistake are ignored, because they follow from it.)

    python build_signals.py --rollouts D --base B --teachers T1 T2 --weights .5 .5 --output F
    torchrun --nproc-per-node 8 -- build_signals.py --rollouts D --base B --teachers T --output F
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import (  # isort: skip
    FORMAT_VERSION, Ranks, Rollouts, UserError, check_sampling, fingerprint, load_rollouts,
    load_tensors, load_tokenizer, model_folder, require, run, save_tensors, score, setup_ranks,
    text_config, write_json,
)  # fmt: skip


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    base: str
    """the base policy, a folder or hub name; also the reference where none is given"""
    teachers: tuple[str, ...]
    """policies whose log-probs are added (the base itself may be one)"""
    output: Path
    """signals file to write; its name ends in .safetensors"""
    references: tuple[str, ...] = ()
    """policies whose log-probs are subtracted: one for all, or one each; default: the base"""
    weights: tuple[float, ...] = ()
    """w_i of each teacher; default: 1 each"""
    behavior: str | None = None
    """policy that sampled the rollouts; default: the base (round one, and offline)"""
    micro_batch_tokens: int = 16384
    """token budget of a packed row; changes memory and speed, never the signal"""
    force: bool = False
    """score rollouts that were sampled with top-p below 1"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        n = len(self.teachers)
        if not n:
            raise UserError("--teachers: name at least one policy")
        if len(self.references) not in (0, 1, n):
            given = len(self.references)
            raise UserError(f"--references: {given} given for {n} teachers; give one, or one each")
        if len(self.weights) not in (0, n):
            given = len(self.weights)
            raise UserError(f"--weights: {given} given for {n} teachers; give one each")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        require(self, "weights", lambda v: all(map(math.isfinite, v)), "finite")
        require(self, "micro_batch_tokens", lambda v: v >= 1, "1 or more")

    @property
    def pairs(self) -> list[tuple[float, str, str]]:
        """(weight, teacher, reference) of every term of the sum."""
        n = len(self.teachers)
        references = self.references or (self.base,)
        references = references if len(references) == n else references * n  # one for all
        return list(zip(self.weights or (1.0,) * n, self.teachers, references, strict=True))


# --------------------------------------------------------------------------------------------------
# The mathematics. N tokens of the rollouts file, S responses.


def combine(terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Returns sum_i w_i (teacher_i - reference_i): [N], from (w, teacher [N], reference [N])."""
    return torch.stack([w * (teacher - reference) for w, teacher, reference in terms]).sum(0)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Returns the chance that a positive exceeds a negative; ties count half; nan if undefined."""
    if not len(positive) or not len(negative):
        return float("nan")
    # The number of negatives below each positive, by binary search in the sorted negatives.
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    below = below + torch.searchsorted(ordered, positive, right=True)  # ties: once, not twice
    return (below.double().mean() / (2 * len(negative))).item()


def credit_auc(signal: Tensor, rollouts: Rollouts) -> tuple[float, float, int]:
    """Measures how often the first wrong token is blamed more than a token before it.

    signal [N] -> (mean, standard error, number of wrong responses with a token before it)."""
    values = []
    starts, prompts = rollouts.cu_seqlens[:-1].tolist(), rollouts.prompt_lens.tolist()
    wrong = rollouts.first_wrong_token
    for s in ((rollouts.rewards == 0) & (wrong > rollouts.prompt_lens)).nonzero()[:, 0].tolist():
        at = starts[s] + int(wrong[s])
        earlier, guilty = signal[starts[s] + prompts[s] : at], signal[at]
        # "Blamed more" is a lower signal.
        values.append(((earlier > guilty).double() + 0.5 * (earlier == guilty).double()).mean())
    if not values:
        return float("nan"), float("nan"), 0
    stacked = torch.stack(values)
    error = (stacked.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
    return stacked.mean().item(), error, len(values)


def share_that_carries(signal: Tensor, part: float) -> float:
    """Returns the smallest share of tokens that holds `part` of the sum of |signal| [tokens]."""
    magnitude = signal.abs().double().sort(descending=True).values  # largest first
    total = magnitude.sum()
    if total == 0:  # a teacher that is its own reference
        return float("nan")
    # The tokens before the share is reached, and the one with which it is.
    return ((magnitude.cumsum(0) < part * total).sum() + 1).item() / len(magnitude)


# --------------------------------------------------------------------------------------------------
# Data


def check_vocabularies(models: list[str]) -> None:
    """Raises UserError if two models differ in the size of their vocabulary."""
    sizes = {m: text_config(m).vocab_size for m in models}
    for model, size in sizes.items():
        if size != sizes[models[0]]:
            raise UserError(
                f"model '{model}': has a vocabulary of {size} tokens, but '{models[0]}' has "
                f"{sizes[models[0]]}; use models of one family"
            )


def is_complete(output: Path, metadata: dict[str, Any], ranks: Ranks) -> bool:
    """Tells whether the signals file is there. Raises UserError if it is of other inputs."""
    if not ranks.decide(output.is_file):
        return False
    if load_tensors(output)[1] != metadata | {"format": FORMAT_VERSION}:
        raise UserError(f"--output {output}: has signals of other inputs; choose another name")
    ranks.print(f"{output} is complete; nothing to do")
    return True


def diagnose(signal: Tensor, rollouts: Rollouts, tokenizer: Any) -> dict[str, Any]:
    """Computes the diagnostics that this file's docstring names; None for what does not exist."""
    mask, correct = rollouts.response_mask, rollouts.rewards > 0.5  # [N] and [S], bool
    total = signal.new_zeros(len(correct)).index_add(0, rollouts.sequence_ids, signal)  # [S]
    report: dict[str, Any] = {
        "auc": auc(total[correct], total[~correct]),
        "mean_correct": total[correct].mean().item(),
        "mean_wrong": total[~correct].mean().item(),
        "share_of_tokens_with_90_percent": share_that_carries(signal[mask], 0.9),
        "sd": signal[mask].std().item(),
    }
    if rollouts.first_wrong_token is not None:
        names = ("credit_auc", "credit_auc_se", "credit_auc_responses")
        report |= dict(zip(names, credit_auc(signal, rollouts), strict=True))
    # With verdicts of one kind only there is no AUC, and JSON has no nan.
    report = {name: None if math.isnan(value) else value for name, value in report.items()}
    # Credit and blame by vocabulary entry, summed over all responses.
    ids = rollouts.tokens[mask].long()
    sums = torch.zeros(int(ids.max()) + 1).index_add(0, ids, signal[mask])
    ranked = sums.argsort(descending=True).tolist()
    for name, chosen in [("most_credit", ranked[:8]), ("most_blame", ranked[::-1][:8])]:
        report[name] = [[tokenizer.decode([i]), round(sums[i].item(), 2)] for i in chosen]
    return report


def print_report(report: dict[str, Any], output: Path, ranks: Ranks) -> None:
    """Prints the diagnostics."""
    ranks.print(f"\n{output}")
    for name, value in report.items():
        if name.startswith("most_"):
            value = "  ".join(f"{token!r} {total:+.0f}" for token, total in value)
        text = f"{value:.4f}" if isinstance(value, float) else "n/a" if value is None else value
        ranks.print(f"  {name:32s} {text}")


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    tokenizer = load_tokenizer(args.base)
    # Which model has which role. A model with several roles is scored once.
    roles = {"base": args.base, "behavior": args.behavior or args.base}
    for i, (_, teacher, reference) in enumerate(args.pairs):
        roles |= {f"teacher_{i}": teacher, f"reference_{i}": reference}
    check_vocabularies(list(roles.values()))
    # Stage 2 compares this with its own input, a repeated command with the file that it finds.
    metadata = {
        "rollouts": fingerprint(rollouts.path),
        "temperature": temperature,
        "weights": [weight for weight, _, _ in args.pairs],
        "models": {
            role: {"path": model, "fingerprint": fingerprint(model_folder(model))}
            for role, model in roles.items()
        },
    }
    if is_complete(args.output, metadata, ranks):
        return

    # One model in memory at a time.
    scored = {
        m: score(m, rollouts, args.micro_batch_tokens, ranks) for m in dict.fromkeys(roles.values())
    }
    signal = combine([(w, scored[t], scored[r]) for w, t, r in args.pairs])
    arrays = {
        "signal": signal,
        "behavior_logprobs": scored[roles["behavior"]].clone(),  # may be the same tensor as below
        "base_logprobs": scored[args.base],
    }
    report = diagnose(signal, rollouts, tokenizer)
    if ranks.rank == 0:
        write_json(args.output.with_suffix(".json"), report | metadata)
        # The signals come last: a folder that has them is complete.
        save_tensors(args.output, arrays, metadata)
    print_report(report, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
