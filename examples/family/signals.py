"""Builds a new signals file out of those of build_signals.py, in four steps; stage 2 accepts it.

    1  combine the terms x_i = teacher_i - reference_i of all files (of one made here: its signal)
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
    4  scale, so that the bounds of stage 2 leave a given number of targets for each wrong response,
       which has one first mistake: how far a teacher has moved then no longer decides how much is
       asked of its student, nor do many right responses drown few wrong ones

What is one call of build_signals.py is not here: teacher minus base, minus an inverted-reward
teacher, recovery minus unlearned, base minus unlearned (docs/family.md shows them).

Reads   --signals, --rollouts, --base.
Writes  OUTPUT (.safetensors): signal, behavior_logprobs, base_logprobs, and the first file's other
        log-probs; its metadata and "construction". OUTPUT with suffix .json: the diagnostics.

    python examples/family/signals.py --rollouts D --base B --signals F1 F2 --combine agreement \\
        --verdict aligned --output F
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import stage2_distill
from build_signals import diagnose, is_complete, print_report

from common import (  # isort: skip
    Rollouts, UserError, fingerprint, load_rollouts, load_tensors, load_tokenizer, model_folder,
    require, run, safe_exp, save_tensors, setup_ranks, write_json,
)  # fmt: skip
from stage1_extreme import group_statistics


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    base: str
    """the base policy that the signals were built with"""
    signals: tuple[Path, ...]
    """files of build_signals.py, or of this script, for these rollouts"""
    output: Path
    """signals file to write, name ending in .safetensors"""

    combine: Literal["sum", "mean", "agreement"] = "sum"
    """how the terms of all files become one"""
    weights: tuple[float, ...] = ()
    """w_i of each term, in the order of the files; default: as its file was built"""
    verdict: Literal["none", "aligned", "scaled"] = "none"
    """what the verdict of the response does to its tokens' signal"""
    verdict_eps: float = 0.2
    """eps of scaled: |A| is multiplied by 1 - eps to 1 + eps (ours; RLSD's is not known to us)"""
    bound: Literal["none", "clip", "log_mixture", "power"] = "none"
    """last step: a function of each token's signal"""
    clip: float = 2.0
    """c of clip, nats (stage 2's own clip comes after its scale)"""
    alpha: float = 0.2
    """alpha of log_mixture, the teacher's share in the proximal teacher (NeMo-RL's example: 0.2)"""
    power: float = 0.5
    """p of power; below 1 it lifts what is small (ours)"""
    targets_per_wrong: float = 0.0
    """last, scale: tokens blamed for each wrong response, at --signal-scale 1 (ours); 0: off"""
    signal_clip: float = stage2_distill.Args.signal_clip
    """c of stage 2, nats, for --targets-per-wrong"""
    signal_floor: float = stage2_distill.Args.signal_floor
    """floor of stage 2, nats, for --targets-per-wrong"""
    token_kl: float = stage2_distill.Args.token_kl
    """delta of stage 2, nats, for --targets-per-wrong"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        if not self.signals:
            raise UserError("--signals: name at least one file")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        require(self, "weights", lambda v: all(map(math.isfinite, v)), "finite")
        require(self, "clip signal_clip token_kl", lambda v: v > 0, "above 0")
        require(self, "power", lambda v: 0 < v < math.inf, "above 0 and finite")
        require(self, "signal_floor targets_per_wrong", lambda v: v >= 0, "0 or more")
        low_enough = f"at most --signal-clip {self.signal_clip:g}, else no target is left"
        require(self, "signal_floor", lambda v: v <= self.signal_clip, low_enough)
        require(self, "alpha", lambda v: 0 < v <= 1, "above 0 and at most 1")
        require(self, "verdict_eps", lambda v: 0 <= v <= 1, "between 0 and 1")


# --------------------------------------------------------------------------------------------------
# The mathematics. K terms, N tokens; every function returns a new [N].


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i x_i; terms [K, N], weights [K]."""
    return (weights[:, None] * terms).sum(0)


def mean(terms: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i x_i / sum_i w_i."""
    return weighted_sum(terms, weights) / weights.sum()


def agreement(terms: Tensor, weights: Tensor) -> Tensor:
    """The mean where all terms have one sign, else 0: what one teacher alone believes is noise."""
    return torch.where(same_sign(terms), mean(terms, weights), 0.0)


def same_sign(terms: Tensor) -> Tensor:
    """[N] bool: all terms above 0, or all below."""
    return (terms > 0).all(0) | (terms < 0).all(0)


def aligned(signal: Tensor, verdicts: Tensor, **_: Any) -> Tensor:
    """The signal where it has the sign of the verdict (+1, -1), else 0; both [N]."""
    return torch.where(signal * verdicts > 0, signal, 0.0)


def scaled(signal: Tensor, advantages: Tensor, *, verdict_eps: float, **_: Any) -> Tensor:
    """A clip(exp(sign(A) x), 1 - eps, 1 + eps): the verdict gives the sign, the signal the size."""
    factor = safe_exp(advantages.sign() * signal)
    return advantages * factor.clamp(1 - verdict_eps, 1 + verdict_eps)


def clip(signal: Tensor, *, clip: float, **_: Any) -> Tensor:
    """min(max(x, -c), c)."""
    return signal.clamp(-clip, clip)


def log_mixture(signal: Tensor, *, alpha: float, **_: Any) -> Tensor:
    """log(alpha e^x + 1 - alpha): the signal of the mixture alpha teacher + (1 - alpha) base."""
    rest = torch.tensor(1 - alpha, dtype=signal.dtype).log()  # -inf at alpha 1: x itself
    return torch.logaddexp(signal + math.log(alpha), rest)


def power(signal: Tensor, *, power: float, **_: Any) -> Tensor:
    """sign(x) |x|^p."""
    return signal.sign() * signal.abs() ** power


COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": weighted_sum,
    "mean": mean,
    "agreement": agreement,
}
BOUND: dict[str, Callable[..., Tensor]] = {
    "none": lambda signal, **_: signal,
    "clip": clip,
    "log_mixture": log_mixture,
    "power": power,
}

BOUNDS = ("signal_clip", "signal_floor", "token_kl")  # of stage 2


def construct(terms: Tensor, weights: Tensor, rollouts: Rollouts, args: Args) -> Tensor:
    """The first three steps, terms [K, N] and weights [K] -> signal [N], zero on prompts."""
    signal = COMBINE[args.combine](terms, weights)
    ids = rollouts.sequence_ids
    if args.verdict == "aligned":
        signal = aligned(signal, 2 * rollouts.rewards[ids] - 1)
    elif args.verdict == "scaled":  # problems that all or none solved carry no advantage
        advantages = group_statistics(rollouts.rewards, rollouts.problem_index, beta=1.0)[0]
        signal = scaled(signal, advantages[ids], verdict_eps=args.verdict_eps)
    signal = BOUND[args.bound](signal, clip=args.clip, alpha=args.alpha, power=args.power)
    return torch.where(rollouts.response_mask, signal, 0.0)


SCALES = [2 ** (k / 4) for k in range(-24, 41)]  # 1/64 ... 1024


def scale_for_targets(
    signal: Tensor, base_logprobs: Tensor, wanted: float, **bounds: float
) -> tuple[float, int]:
    """Least of SCALES at which stage 2's bounds leave `wanted` of the tokens [N] a target below 0;
    where none does, the one that leaves most. -> scale, tokens left."""
    best = (1.0, 0)
    for scale in SCALES:
        target = stage2_distill.bounded_target(signal, base_logprobs, signal_scale=scale, **bounds)
        left = int((target < 0).sum())
        if left >= wanted:
            return scale, left
        if left > best[1]:
            best = (scale, left)
    return best


def compare(terms: Tensor, signal: Tensor, rollouts: Rollouts) -> dict[str, float | None]:
    """What the constructions turn on, as shares of the response tokens; None: nothing to divide."""
    mask = rollouts.response_mask
    terms, signal = terms[:, mask], signal[mask]
    verdicts = (2 * rollouts.rewards[rollouts.sequence_ids] - 1)[mask]
    with_verdict, size = signal * verdicts > 0, signal.abs()
    return {
        "share_not_zero": (signal != 0).float().mean().item(),
        "share_terms_of_one_sign": same_sign(terms).float().mean().item(),
        "share_with_verdict": with_verdict.float().mean().item(),
        "share_of_size_with_verdict":
            (size[with_verdict].sum() / size.sum()).item() if size.any() else None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Data


def load_terms(
    args: Args, rollouts: Rollouts
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    """terms [K, N], their weights [K], arrays and metadata of the first file. Raises UserError as
    stage 2 would, and on weights that do not fit."""
    terms, weights, files = [], [], []
    inputs = {"base": fingerprint(model_folder(args.base)), "rollouts": fingerprint(rollouts.path)}
    for path in args.signals:
        needed = stage2_distill.Args(args.base, args.rollouts, args.output, signals=path)
        stage2_distill.load_signals(needed, rollouts, inputs)
        arrays, metadata = load_tensors(path, {})
        files.append((arrays, metadata))
        if "construction" in metadata:  # made here: its signal holds the weights
            terms.append(arrays["signal"])
            weights.append(1.0)
        else:
            terms += [arrays[f"teacher_{i}_logprobs"] - arrays[f"reference_{i}_logprobs"]
                      for i in range(len(metadata["weights"]))]  # fmt: skip
            weights += metadata["weights"]
        if not torch.equal(arrays["behavior_logprobs"], files[0][0]["behavior_logprobs"]):
            raise UserError(f"--signals {path}: its behavior policy is not that of "
                            f"{args.signals[0]}; build both with one --behavior")  # fmt: skip
    if args.weights and len(args.weights) != len(terms):
        raise UserError(f"--weights: {len(args.weights)} given for {len(terms)} terms "
                        "(one a teacher of each file)")  # fmt: skip
    weights = list(args.weights) or weights
    if args.combine != "sum" and min(weights) <= 0:
        raise UserError(f"--weights {weights}: must be above 0 for {args.combine}; give others")
    return torch.stack(terms), torch.tensor(weights), *files[0]


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    tokenizer = load_tokenizer(args.base)
    terms, weights, arrays, metadata = load_terms(args, rollouts)
    used = ("combine", "verdict", "verdict_eps", "bound", "clip", "alpha", "power")
    if args.targets_per_wrong:
        used += ("targets_per_wrong", *BOUNDS)
    construction = {name: getattr(args, name) for name in used} | {"weights": list(args.weights)}
    construction["of"] = [fingerprint(path) for path in args.signals]
    metadata |= {"construction": construction}
    if is_complete(args.output, metadata, ranks):
        return
    signal, scaling = construct(terms, weights, rollouts, args), {}
    if args.targets_per_wrong:
        mask, bounds = rollouts.response_mask, {name: getattr(args, name) for name in BOUNDS}
        n_wrong = int((rollouts.rewards == 0).sum())
        if not n_wrong:
            raise UserError(f"--targets-per-wrong: no response of {args.rollouts} is wrong; "
                            "drop the flag, or sample more")  # fmt: skip
        wanted = args.targets_per_wrong * n_wrong
        scale, left = scale_for_targets(
            signal[mask], arrays["base_logprobs"][mask], wanted, **bounds
        )
        signal, scaling = scale * signal, {"scale": scale, "blamed": left, "blamed_wanted": wanted}
    report = diagnose(signal, rollouts, tokenizer) | compare(terms, signal, rollouts) | scaling
    write_json(args.output.with_suffix(".json"), report | metadata)
    save_tensors(args.output, arrays | {"signal": signal}, metadata)
    print_report(report, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
