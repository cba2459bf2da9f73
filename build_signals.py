"""Signals: one number per response token, from the log-ratios of stage 1's policies.

    signal_t = sum_i w_i (log teacher_i(y_t) - log reference_i(y_t))

With a strong teacher the reference is the base. With a ruined one the signal is built another way:
the base against an *unlearned* policy (--teachers BASE --references UNLEARNED), a recovered policy
against an unlearned one, or several teachers with weights. One reference serves all teachers; none
given means the base.

Reads   --rollouts (a folder written by evaluate.py), --base, --teachers, --references, --behavior
        (model folders), --held-out-rollouts (another such folder, of the base on other problems).
Writes  OUTPUT (signals.safetensors): signal, behavior_logprobs and base_logprobs, aligned with the
        rollouts' tokens and zero on prompts; OUTPUT with suffix .json: the diagnostics that are
        printed. The log-probs of each policy are kept in ROLLOUTS/logprobs/, so that no policy is
        scored twice, by this or by another script, after a kill or without one.

Diagnostics: AUC of the summed signal against the verdict, the share of tokens that carries 90 % of
all |signal|, and the tokens with most credit and most blame. Credit AUC, where the first wrong
token is known: how often is that token blamed more than a token before it? (Averaged over wrong
responses; ties count half; tokens after the mistake are ignored, because they follow from it.)

Forecast: a student that met its targets would be the base with every response re-weighted by
exp(T), T = sum_t target_t. So the n samples of a problem tell what it would be, before anyone
trains it:

    w = exp(T) / sum exp(T)      accuracy = sum w R      KL = sum w log(n w)

for the bounds of stage 2 that the flags give, and for a grid of them, of which stage 2 can choose
(--within-kl, --reach-accuracy). On the problems that stage 1 trained on, a part of a signal is
memory, so an honest forecast needs --held-out-rollouts: fresh ones, never the test set's.

    python build_signals.py --rollouts D --base B --teachers T1 T2 --weights .5 .5 --output F
    torchrun --nproc-per-node 8 -- build_signals.py --rollouts D --base B --teachers T --output F
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
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
    held_out_rollouts: Path | None = None
    """the base's rollouts of problems that no policy trained on, for the forecast; default: none"""

    signal_scale: float = 1.0
    """factor on the signal, in the forecast only; this and the next three are flags of stage 2"""
    signal_clip: float = 3.0
    """c, bound of the scaled signal, nats per token"""
    signal_floor: float = 0.3
    """a scaled |signal| below this, nats per token, counts as 0"""
    token_kl: float = 1.5
    """delta, nats: a token whose target alone costs more is held at the base"""

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
        require(self, "signal_clip token_kl", lambda v: v > 0, "above 0 nats")
        require(self, "signal_scale", math.isfinite, "finite")
        low_enough = f"0 or more, and at most --signal-clip {self.signal_clip:g}"
        require(self, "signal_floor", lambda v: 0 <= v <= self.signal_clip, low_enough)

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


def bernoulli_kl(a_logprobs: Tensor, p_logprobs: Tensor) -> Tensor:
    """Returns d(a || p) in nats of two coins, from log a and log p. An a above 1 counts as 1.

    No distribution that moves a token's probability from p to a costs less. As in stage 2."""
    log_a, log_p = a_logprobs.clamp(max=-1e-7), p_logprobs.clamp(max=-1e-7)  # log(1 - p) is finite
    log_not_a, log_not_p = torch.log(-torch.expm1(log_a)), torch.log(-torch.expm1(log_p))
    # a log(a/p) + (1 - a) log((1 - a)/(1 - p))
    return log_a.exp() * (log_a - log_p) - torch.expm1(log_a) * (log_not_a - log_not_p)


def bounded_target(signal: Tensor, base_logprobs: Tensor, args: Args) -> Tensor:
    """clip(scale signal, -c, c), and 0 where its size is below the floor or where the step alone
    costs more than delta: d(base exp(target) || base) > delta. The same function as stage 2's."""
    target = (args.signal_scale * signal).clamp(-args.signal_clip, args.signal_clip)
    cost = bernoulli_kl(base_logprobs + target, base_logprobs)
    return torch.where((target.abs() < args.signal_floor) | (cost > args.token_kl), 0.0, target)


def forecast(total: Tensor, rewards: Tensor, problem_index: Tensor) -> Tensor:
    """What the base is with its responses re-weighted by exp(total); three arguments, [S] each.

    Returns accuracy, KL in nats and effective samples of each problem that has samples: [3, P],
    float64. Assumes that the normaliser of every prefix is 1. KL stays below log n, accuracy below
    pass@n."""
    _, problem, count = problem_index.unique(return_inverse=True, return_counts=True)

    def sums(values: Tensor) -> Tensor:
        """Sums over the responses to each problem: [S] -> [P]."""
        return torch.zeros(len(count), dtype=torch.float64).index_add(0, problem, values)

    total = total.double()
    largest = total.new_full((len(count),), -math.inf).scatter_reduce(0, problem, total, "amax")
    weight = (total - largest[problem]).exp()
    w = weight / sums(weight)[problem]
    kl = sums(torch.special.xlogy(w, w * count[problem]))  # sum w log(n w)
    return torch.stack([sums(w * rewards), kl, 1 / sums(w.square())])


SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
GRID = (SCALES, (2.0, 2.5, 3.0), (0.3, 0.6), (0.5, 1.5))
BOUNDS = ("signal_scale", "signal_clip", "signal_floor", "token_kl")


def forecasts(signal: Tensor, base_logprobs: Tensor, rollouts: Rollouts, args: Args) -> dict:
    """Forecasts for the bounds of the flags and for those of GRID that nothing beats.

    signal, base_logprobs [N]. A row of the grid is left out where fewer samples are effective than
    half of those that are right (the estimate has run into its ceiling), and where another row has
    more accuracy for less KL. The first row is the base. `difference_se` of row i: the standard
    error over problems of its accuracy minus that of row j, for every j < i."""
    mask, rewards = rollouts.response_mask, rollouts.rewards.double()
    ids, signal, base_logprobs = rollouts.sequence_ids[mask], signal[mask], base_logprobs[mask]

    def of(**bounds: float) -> tuple[dict[str, Any], Tensor]:
        """Returns a row, and the accuracy of every problem [P]."""
        changed = replace(args, **bounds)
        target = bounded_target(signal, base_logprobs, changed)
        total = torch.zeros(len(rewards), dtype=torch.float64).index_add(0, ids, target.double())
        accuracy, kl, effective = forecast(total, rewards, rollouts.problem_index)
        means = {"accuracy": accuracy.mean(), "kl": kl.mean(), "effective": effective.mean()}
        row = {name: getattr(changed, name) for name in BOUNDS}
        return row | {name: value.item() for name, value in means.items()}, accuracy

    base = of(signal_scale=0.0)
    enough = rewards.sum().item() / len(base[1]) / 2  # half of the right samples of a problem
    grid = (of(**dict(zip(BOUNDS, bounds, strict=True))) for bounds in itertools.product(*GRID))
    frontier = [base]
    for row, accuracy in sorted(grid, key=lambda found: found[0]["kl"]):
        if row["effective"] >= enough and row["accuracy"] > frontier[-1][0]["accuracy"]:
            frontier.append((row, accuracy))
    errors = torch.stack([a for _, a in frontier])
    errors = (errors[:, None] - errors).std(-1) / len(base[1]) ** 0.5  # [rows, rows]
    for i, (row, _) in enumerate(frontier):
        row["difference_se"] = errors[i, :i].tolist()
    given, accuracy = of()
    given["se"] = (accuracy.std() / len(accuracy) ** 0.5).item()
    return {"problems": len(accuracy), "given": given, "frontier": [row for row, _ in frontier]}


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


def load_held_out(args: Args, rollouts: Rollouts) -> Rollouts:
    """Loads --held-out-rollouts. Raises UserError if they are not the base's own at the same
    temperature, or if one of their problems is in the training data."""

    def prompts(data: Rollouts) -> set[tuple[int, ...]]:
        """Returns the tokens of every prompt."""
        spans = zip(data.cu_seqlens[:-1].tolist(), data.prompt_lens.tolist(), strict=True)
        return {tuple(data.tokens[start : start + n].tolist()) for start, n in spans}

    flag = f"--held-out-rollouts {args.held_out_rollouts}"
    held_out = load_rollouts(args.held_out_rollouts)
    if held_out.metadata.get("model_fingerprint") != fingerprint(model_folder(args.base)):
        raise UserError(f"{flag}: not sampled from --base {args.base}; sample them from it")
    if check_sampling(held_out, args.force) != check_sampling(rollouts, args.force):
        raise UserError(f"{flag}: sampled at another temperature than {args.rollouts}")
    if shared := len(prompts(held_out) & prompts(rollouts)):
        raise UserError(
            f"{flag}: shares {shared} problems with {args.rollouts}; use other problems"
        )
    return held_out


def weighted_signal(
    args: Args, roles: dict[str, str], rollouts: Rollouts, ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the signal [N] on some rollouts, and the log-probs [N] of every model there."""
    # One model in memory at a time.
    models = dict.fromkeys(roles.values())
    scored = {m: score(m, rollouts, args.micro_batch_tokens, ranks) for m in models}
    return combine([(w, scored[t], scored[r]) for w, t, r in args.pairs]), scored


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
        if name.startswith("forecast"):
            continue
        if name.startswith("most_"):
            value = "  ".join(f"{token!r} {total:+.0f}" for token, total in value)
        text = f"{value:.4f}" if isinstance(value, float) else "n/a" if value is None else value
        ranks.print(f"  {name:32s} {text}")


def print_forecast(report: dict[str, Any], ranks: Ranks) -> None:
    """Prints what students would be that met their targets, and warns where that is nothing."""
    found, where = report["forecast"], "held-out problems"
    if found is None:
        ranks.print("no forecast: the base did not sample these rollouts (--held-out-rollouts)")
        return
    if not found["held_out"]:
        where = "problems that stage 1 trained on, so partly memory (see --held-out-rollouts)"
    ranks.print(f"\nforecast of students that meet their targets, on {found['problems']} {where}")
    ranks.print("  scale   clip  floor  token-kl   accuracy    KL, nats  effective samples")
    given, frontier = found["given"], found["frontier"]
    for row in (given, *frontier[:: max(1, len(frontier) // 12)]):  # about twelve of them
        bounds = "  ".join(f"{row[name]:5g}" for name in BOUNDS)
        numbers = f"{row['accuracy']:9.3f}  {row['kl']:10.3f}  {row['effective']:17.1f}"
        ranks.print(f"  {bounds}  {numbers}" + ("  the flags" if row is given else ""))
    gain = given["accuracy"] - frontier[0]["accuracy"]
    if gain <= given["se"]:
        ranks.print(
            f"warning: with the bounds of the flags the forecast gains {gain:+.3f} over the base, "
            f"not more than its standard error of {given['se']:.3f}"
        )


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    ranks = setup_ranks()
    rollouts = load_rollouts(args.rollouts)
    temperature = check_sampling(rollouts, args.force)
    held_out = load_held_out(args, rollouts) if args.held_out_rollouts else None
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
        "forecast_for": [fingerprint(held_out.path) if held_out else None]
        + [getattr(args, name) for name in BOUNDS],
        "models": {
            role: {"path": model, "fingerprint": fingerprint(model_folder(model))}
            for role, model in roles.items()
        },
    }
    if is_complete(args.output, metadata, ranks):
        return

    signal, scored = weighted_signal(args, roles, rollouts, ranks)
    arrays = {
        "signal": signal,
        "behavior_logprobs": scored[roles["behavior"]].clone(),  # may be the same tensor as below
        "base_logprobs": scored[args.base],
    }
    report = diagnose(signal, rollouts, tokenizer)
    report["forecast"] = None
    if held_out:
        signal, scored = weighted_signal(args, roles, held_out, ranks)
    if held_out or roles["behavior"] == args.base:  # it re-weights samples of the base
        report["forecast"] = forecasts(signal, scored[args.base], held_out or rollouts, args)
        report["forecast"]["held_out"] = held_out is not None
    if ranks.rank == 0:
        write_json(args.output.with_suffix(".json"), report | metadata)
        # The signals come last: a folder that has them is complete.
        save_tensors(args.output, arrays, metadata)
    print_report(report, args.output, ranks)
    print_forecast(report, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
