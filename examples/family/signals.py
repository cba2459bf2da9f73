"""Builds a new signals file from files of build_signals.py, in three steps; stage 2 accepts it.

    1  combine the terms x_i = teacher_i - reference_i of all files
       sum         sum_i w_i x_i
       mean        sum_i w_i x_i / sum_i w_i
       agreement   the mean where all x_i have one sign, else 0
    2  compare with the verdict v = 2 R - 1 of the token's response
       aligned     x where sign x = v, else 0
       scaled      A clip(exp(sign(A) x), 1 - eps, 1 + eps), A: GRPO's advantage          (RLSD)
    3  bound
       clip        min(max(x, -c), c)
       log_mixture log(alpha e^x + 1 - alpha): from below by log(1 - alpha), not from above  (TOP-D)
       power       sign(x) |x|^p

How loud a signal is, and within which bounds a student should follow it, is then chosen by the same
forecast as that of build_signals.py (--held-out-rollouts, and --within-kl of stage 2).

A file that this script or join_signals.py wrote is one term, its signal. The log-probs of several
teachers and references come from common.score, which keeps them in ROLLOUTS/logprobs/.

What is one call of build_signals.py is not here: teacher minus base, minus an inverted-reward
teacher, recovery minus unlearned, base minus unlearned (docs/family.md shows them).

Reads   --signals, --rollouts, --base, and the policies that the files of several teachers name.
Writes  OUTPUT (.safetensors): signal, behavior_logprobs and base_logprobs; the metadata of the
        first file and "construction". OUTPUT with suffix .json: diagnostics and forecast.

    python examples/family/signals.py --rollouts D --base B --signals F1 F2 --combine agreement \\
        --verdict aligned --output F
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import stage2_distill
from build_signals import (
    diagnose,
    forecasts,
    is_complete,
    load_held_out,
    print_forecast,
    print_report,
)
from common import (
    Ranks,
    Rollouts,
    UserError,
    fingerprint,
    load_rollouts,
    load_tensors,
    load_tokenizer,
    model_folder,
    require,
    run,
    save_tensors,
    score,
    setup_ranks,
    write_json,
)
from stage1_extreme import group_statistics, safe_exp


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    base: str
    """the base policy that the signals were built with"""
    signals: tuple[Path, ...]
    """files of build_signals.py, or of this script, for these rollouts"""
    output: Path
    """signals file to write; its name ends in .safetensors"""

    combine: Literal["sum", "mean", "agreement"] = "sum"
    """how the terms of all files become one"""
    weights: tuple[float, ...] = ()
    """w_i of each term, in the order of the files; default: as its file was built"""
    verdict: Literal["none", "aligned", "scaled"] = "none"
    """what the verdict of a response does to the signal of its tokens"""
    verdict_eps: float = 0.2
    """eps of scaled: |A| is multiplied by 1 - eps to 1 + eps (ours; RLSD's is not known to us)"""
    bound: Literal["none", "clip", "log_mixture", "power"] = "none"
    """a function that is applied to the signal of each token"""
    clip: float = 2.0
    """c of clip, nats per token (the clip of stage 2 comes after its scale)"""
    alpha: float = 0.2
    """alpha of log_mixture, the teacher's share in the proximal teacher (NeMo-RL's example: 0.2)"""
    power: float = 0.5
    """p of power; below 1 it lifts what is small (ours)"""
    held_out_rollouts: Path | None = None
    """base rollouts of other problems than --rollouts: the forecast is made there"""
    micro_batch_tokens: int = 16384
    """token budget of a packed row, where policies are scored"""
    force: bool = False
    """accept rollouts that were sampled with top-p below 1"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        require(self, "micro_batch_tokens", lambda v: v >= 1, "1 or more")
        if not self.signals:
            raise UserError("--signals: name at least one file")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        require(self, "weights", lambda v: all(map(math.isfinite, v)), "finite")
        require(self, "clip", lambda v: v > 0, "above 0")
        require(self, "power", lambda v: 0 < v < math.inf, "above 0 and finite")
        require(self, "alpha", lambda v: 0 < v <= 1, "above 0 and at most 1")
        require(self, "verdict_eps", lambda v: 0 <= v <= 1, "between 0 and 1")
        if self.held_out_rollouts and self.verdict != "none":
            raise UserError("--held-out-rollouts: no forecast can be made with --verdict; drop one")


# --------------------------------------------------------------------------------------------------
# The mathematics. K terms, N tokens; every function returns a new [N].


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i x_i; terms [K, N], weights [K]."""
    return (weights[:, None] * terms).sum(0)


def mean(terms: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i x_i / sum_i w_i."""
    return weighted_sum(terms, weights) / weights.sum()


def agreement(terms: Tensor, weights: Tensor) -> Tensor:
    """The mean where all terms have one sign, else 0: what one teacher alone says is noise."""
    return torch.where(same_sign(terms), mean(terms, weights), 0.0)


def same_sign(terms: Tensor) -> Tensor:
    """Marks the tokens at which all terms are above 0, or all below: [K, N] -> [N] bool."""
    return (terms > 0).all(0) | (terms < 0).all(0)


def aligned(signal: Tensor, verdicts: Tensor) -> Tensor:
    """Keeps the signal where it has the sign of the verdict (+1, -1), else 0; both [N]."""
    return torch.where(signal * verdicts > 0, signal, 0.0)


def scaled(signal: Tensor, advantages: Tensor, eps: float) -> Tensor:
    """A clip(exp(sign(A) x), 1 - eps, 1 + eps): the verdict gives the sign, the signal the size."""
    return advantages * safe_exp(advantages.sign() * signal).clamp(1 - eps, 1 + eps)


def log_mixture(signal: Tensor, alpha: float) -> Tensor:
    """log(alpha e^x + 1 - alpha): the signal of the mixture alpha teacher + (1 - alpha) base."""
    rest = torch.tensor(1 - alpha, dtype=signal.dtype).log()  # -inf at alpha 1: x itself
    return torch.logaddexp(signal + math.log(alpha), rest)


def power(signal: Tensor, exponent: float) -> Tensor:
    """sign(x) |x|^p."""
    return signal.sign() * signal.abs() ** exponent


COMBINE = {"sum": weighted_sum, "mean": mean, "agreement": agreement}
BOUND: dict[str, Callable[[Tensor, Args], Tensor]] = {
    "none": lambda signal, args: signal,
    "clip": lambda signal, args: signal.clamp(-args.clip, args.clip),
    "log_mixture": lambda signal, args: log_mixture(signal, args.alpha),
    "power": lambda signal, args: power(signal, args.power),
}


def construct(terms: Tensor, weights: Tensor, rollouts: Rollouts, args: Args) -> Tensor:
    """Takes the three steps: terms [K, N], weights [K] -> signal [N], zero on prompts."""
    signal = COMBINE[args.combine](terms, weights)
    ids = rollouts.sequence_ids
    if args.verdict == "aligned":
        signal = aligned(signal, 2 * rollouts.rewards[ids] - 1)
    elif args.verdict == "scaled":  # problems that all or none solved have no advantage
        advantages, _ = group_statistics(rollouts.rewards, rollouts.problem_index)
        signal = scaled(signal, advantages[ids], args.verdict_eps)
    return torch.where(rollouts.response_mask, BOUND[args.bound](signal, args), 0.0)


def compare(terms: Tensor, signal: Tensor, rollouts: Rollouts) -> dict[str, float | None]:
    """Measures what the constructions depend on, as shares of the response tokens.

    None: there is nothing to divide by."""
    mask = rollouts.response_mask
    terms, signal = terms[:, mask], signal[mask]
    verdicts = (2 * rollouts.rewards[rollouts.sequence_ids] - 1)[mask]
    with_verdict, size = signal * verdicts > 0, signal.abs()
    share_of_size = (size[with_verdict].sum() / size.sum()).item() if size.any() else None
    return {
        "share_not_zero": (signal != 0).float().mean().item(),
        "share_terms_of_one_sign": same_sign(terms).float().mean().item(),
        "share_with_verdict": with_verdict.float().mean().item(),
        "share_of_size_with_verdict": share_of_size,
    }


# --------------------------------------------------------------------------------------------------
# Data


def score_role(path: Path, role: str, rollouts: Rollouts, budget: int, ranks: Ranks) -> Tensor:
    """Log-probs [N] of one of a signals file's policies, such as "teacher_0".

    Raises UserError where the file has no such single policy, or where it has changed since."""
    metadata = load_tensors(path)[1]
    if "crossfit" in metadata:
        raise UserError(
            f"--signals {path}: joined from two halves, each with its own {role}; give a file of "
            "build_signals.py"
        )
    model = metadata["models"][role]
    if fingerprint(model_folder(model["path"])) != model["fingerprint"]:
        raise UserError(
            f"--signals {path}: its {role}, {model['path']}, has changed since; run "
            "build_signals.py again"
        )
    return score(model["path"], rollouts, budget, ranks)


def file_terms(
    path: Path, args: Args, rollouts: Rollouts, ranks: Ranks
) -> tuple[list[Tensor], list[float]]:
    """The terms [N] of one file on some rollouts, its own or others, and their weights.

    Raises UserError where they are others, and the file has no policies to score them with."""
    tensors, metadata = load_tensors(path)
    made, own = metadata.keys() & {"construction", "crossfit"}, rollouts.path.parent
    if own == args.rollouts and (made or metadata["weights"] == [1.0]):
        return [tensors["signal"]], [1.0]
    if made:
        raise UserError(
            f"--held-out-rollouts: {path} was made from signals and has no policies to score "
            "others with; drop the flag, or give files of build_signals.py"
        )
    terms = []
    for i in range(len(metadata["weights"])):
        roles = (f"teacher_{i}", f"reference_{i}")
        scores = (score_role(path, r, rollouts, args.micro_batch_tokens, ranks) for r in roles)
        terms.append(next(scores) - next(scores))
    return terms, metadata["weights"]


def load_terms(args: Args, rollouts: Rollouts, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The terms [K, N] of all files on some rollouts, and their weights [K].

    Raises UserError as stage 2 would, and on weights that do not fit."""
    terms, weights, behavior = [], [], None
    for path in args.signals:
        checked = stage2_distill.load_signals(stage2_args(args, path), load_rollouts(args.rollouts))
        behavior = checked[0] if behavior is None else behavior
        if not torch.equal(checked[0], behavior):
            raise UserError(
                f"--signals {path}: its behavior policy is not that of {args.signals[0]}; build "
                "both with one --behavior"
            )
        more_terms, more_weights = file_terms(path, args, rollouts, ranks)
        terms += more_terms
        weights += more_weights
    if args.weights and len(args.weights) != len(terms):
        raise UserError(
            f"--weights: {len(args.weights)} given for {len(terms)} terms; give one for each "
            "teacher of each file"
        )
    weights = list(args.weights) or weights
    if args.combine != "sum" and min(weights) <= 0:
        raise UserError(f"--weights {weights}: must be above 0 for {args.combine}; give others")
    return torch.stack(terms), torch.tensor(weights)


def stage2_args(args: Args, signals: Path) -> stage2_distill.Args:
    """The arguments of a stage 2 that would use this file."""
    return stage2_distill.Args(args.base, args.rollouts, signals, args.output)


STEPS = ("combine", "verdict", "verdict_eps", "bound", "clip", "alpha", "power")


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    held_out = load_held_out(args, rollouts) if args.held_out_rollouts else None
    tokenizer = load_tokenizer(args.base)
    terms, weights = load_terms(args, rollouts, ranks)
    arrays, metadata = load_tensors(args.signals[0])
    construction = {name: getattr(args, name) for name in STEPS} | {"weights": list(args.weights)}
    construction["of"] = [fingerprint(path) for path in args.signals]
    metadata |= {"construction": construction}
    metadata["forecast_for"] = [fingerprint(held_out.path) if held_out else None]
    if is_complete(args.output, metadata, ranks):
        return
    signal = construct(terms, weights, rollouts, args)
    report = diagnose(signal, rollouts, tokenizer) | compare(terms, signal, rollouts)
    report["forecast"] = None
    if held_out:
        on_others = construct(*load_terms(args, held_out, ranks), held_out, args)
        base_logprobs = score(args.base, held_out, args.micro_batch_tokens, ranks)
        bounds = stage2_args(args, args.output)  # its defaults stand beside the grid
        report["forecast"] = forecasts(on_others, base_logprobs, held_out, bounds)
        report["forecast"]["held_out"] = True
    if ranks.rank == 0:
        write_json(args.output.with_suffix(".json"), report | metadata)
        save_tensors(args.output, arrays | {"signal": signal}, metadata)
    print_report(report, args.output, ranks)
    if held_out:
        print_forecast(report, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
