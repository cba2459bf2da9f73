"""Signals: one number per response token, from the log-ratios of stage 1's policies.

    signal_t = sum_i w_i (log teacher_i(y_t) - log reference_i(y_t))

With a strong teacher the reference is the base. With a ruined one the signal is built another way:
the base against an *unlearned* policy (--teachers BASE --references UNLEARNED), a recovered policy
against an unlearned one, several teachers with weights. One reference serves all teachers; none
given means the base.

Reads   --rollouts (a folder of evaluate.py), --base, --teachers, --references, --behavior: model
        folders.
Writes  OUTPUT (signals.safetensors): signal, behavior_logprobs, base_logprobs, and each policy's
        own log-probs, all aligned with the rollouts' tokens and zero on prompts; OUTPUT with suffix
        .json: the diagnostics printed here.

Diagnostics: AUC of the summed signal against the verdict; the share of tokens that carry 90 % of
all |signal|; the characters or words with most credit and most blame; and, where the first wrong
token is known, the credit AUC: within a wrong response, the share of earlier response tokens that
are blamed less than the first wrong one (ties count half; later tokens are left out), averaged over
responses.

Killed and started again, it keeps the policies already scored. Several ranks share the scoring.

    python build_signals.py --rollouts D --base B --teachers T1 T2 --weights .5 .5 --output F
    torchrun --nproc-per-node 8 -- build_signals.py --rollouts D --base B --teachers T --output F
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import (  # isort: skip
    FORMAT_VERSION, Ranks, Rollouts, UserError, check_sampling, check_vocabulary, fingerprint,
    load_policy, load_rollouts, load_tensors, load_tokenizer, model_folder, require, run,
    save_tensors, score, sequence_sum, setup_ranks, write_json,
)  # fmt: skip


@dataclass
class Args:
    rollouts: Path
    """folder written by evaluate.py"""
    base: str
    """the base policy; also the reference where none is given"""
    teachers: tuple[str, ...]
    """policies whose log-probs are added (the base itself may be one)"""
    output: Path
    """signals file to write, name ending in .safetensors"""
    references: tuple[str, ...] = ()
    """policies whose log-probs are subtracted: one for all, or one each; default: the base"""
    weights: tuple[float, ...] = ()
    """w_i of each teacher; default: 1 each"""
    behavior: str | None = None
    """policy that drew the rollouts; default: the base (round one, and offline)"""
    micro_batch_tokens: int = 16384
    """token budget of a packed row"""
    shard: bool = False
    """split each policy over the ranks, for one that a GPU cannot hold; slower"""
    force: bool = False
    """score rollouts that were sampled with top-p below 1"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        if not self.teachers:
            raise UserError("--teachers: name at least one policy")
        n = len(self.teachers)
        if len(self.references) not in (0, 1, n):
            raise UserError(f"--references: {len(self.references)} given for {n} teachers; "
                            "give none, one, or one each")  # fmt: skip
        if self.weights and len(self.weights) != n:
            given = len(self.weights)
            raise UserError(f"--weights: {given} given for {n} teachers; give one each")
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: the name must end in .safetensors")
        require(self, "weights", lambda v: all(map(math.isfinite, v)), "finite")
        require(self, "micro_batch_tokens", lambda v: v >= 1, "1 or more")

    @property
    def parts(self) -> Path:
        """Folder of the policies scored so far; gone when the output is there."""
        return self.output.with_name(self.output.name + ".parts")

    @property
    def pairs(self) -> list[tuple[float, str, str]]:
        """(weight, teacher, reference) of every term of the sum."""
        references = self.references or (self.base,)
        if len(references) == 1:
            references *= len(self.teachers)
        weights = self.weights or (1.0,) * len(self.teachers)
        return list(zip(weights, self.teachers, references, strict=True))


# --------------------------------------------------------------------------------------------------
# The mathematics. N tokens of the rollouts file, S responses.


def combine(terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """signal = sum_i w_i (teacher_i - reference_i) -> [N]; of (w, teacher [N], reference [N])."""
    return torch.stack([w * (teacher - reference) for w, teacher, reference in terms]).sum(0)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive exceeds a negative, ties counting half; nan where a side is empty."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    below = below + torch.searchsorted(ordered, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


def credit_auc(
    signal: Tensor, cu_seqlens: Tensor, prompt_lens: Tensor, rewards: Tensor,
    first_wrong_token: Tensor,
) -> tuple[float, float, int]:  # fmt: skip
    """Is the first wrong token blamed more than those before it? -> (mean, std error, responses).

    first_wrong_token [S] counts from the start of the sequence. Only wrong responses with at least
    one response token before the wrong one take part; tokens after it are left out, for they follow
    from the mistake."""
    values = []
    starts, prompts = cu_seqlens[:-1].tolist(), prompt_lens.tolist()
    wrong = first_wrong_token.tolist()
    for s in ((rewards == 0) & (first_wrong_token > prompt_lens)).nonzero()[:, 0].tolist():
        earlier = signal[starts[s] + prompts[s] : starts[s] + wrong[s]]
        guilty = signal[starts[s] + wrong[s]]
        values.append(((earlier > guilty).double() + 0.5 * (earlier == guilty).double()).mean())
    if not values:
        return float("nan"), float("nan"), 0
    stacked = torch.stack(values)
    error = (stacked.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
    return stacked.mean().item(), error, len(values)


def share_that_carries(signal: Tensor, part: float) -> float:
    """Smallest share of tokens that holds `part` of the sum of |signal|; signal [tokens]."""
    magnitude = signal.abs().double().sort(descending=True).values
    total = magnitude.sum()
    if total == 0:
        return float("nan")
    return ((magnitude.cumsum(0) < part * total).sum() + 1).item() / len(magnitude)


# --------------------------------------------------------------------------------------------------
# Data


def score_policies(
    args: Args, rollouts: Rollouts, data: str, models: dict[str, str], temperature: float,
    ranks: Ranks,
) -> dict[str, Tensor]:  # fmt: skip
    """{model: log-probs [N]}, each policy scored once; finished ones are kept beside the output.

    data: the fingerprint of the rollouts; models: {model: its fingerprint}."""
    scored: dict[str, Tensor] = {}
    for model, digest in models.items():
        part = args.parts / f"{digest}-{data}.safetensors"
        if part.is_file():
            values = load_tensors(part, {"logprobs": torch.float32})[0]["logprobs"]
        else:
            policy = load_policy(model, ranks, train=False, shard=args.shard)
            what, budget = f"score {Path(model).name}", args.micro_batch_tokens
            values = score(policy, rollouts, temperature, budget, ranks, what)
            if not values.isfinite().all():
                raise UserError(f"model '{model}': its log-probs are not finite; "
                                "train it again with a lower learning rate")  # fmt: skip
            del policy  # one model in memory at a time
            if ranks.rank == 0:
                save_tensors(part, {"logprobs": values}, {})
            ranks.barrier()
        scored[model] = values
    ranks.barrier()  # rank 0 will remove the parts
    return scored


def is_complete(output: Path, metadata: dict[str, Any], ranks: Ranks) -> bool:
    """Whether the signals file is there. Raises UserError where it was made of other inputs."""
    if not output.is_file():
        return False
    if load_tensors(output, {})[1] != metadata | {"format": FORMAT_VERSION}:
        raise UserError(f"--output {output}: holds signals of other inputs; "
                        "choose another name or delete it")  # fmt: skip
    ranks.print(f"{output} is complete; nothing to do")
    return True


def diagnose(signal: Tensor, rollouts: Rollouts, tokenizer: Any) -> dict[str, Any]:
    """Everything the module docstring promises, as one dict."""
    mask, rewards = rollouts.response_mask, rollouts.rewards
    total = sequence_sum(signal, rollouts.sequence_ids, len(rewards))
    report: dict[str, Any] = {
        "auc": auc(total[rewards > 0.5], total[rewards < 0.5]),
        "mean_correct": total[rewards > 0.5].mean().item(),
        "mean_wrong": total[rewards < 0.5].mean().item(),
        "share_of_tokens_with_90_percent": share_that_carries(signal[mask], 0.9),
        "sd": signal[mask].std().item(),
    }
    if rollouts.first_wrong_token is not None:
        value, error, n = credit_auc(
            signal, rollouts.cu_seqlens, rollouts.prompt_lens, rewards, rollouts.first_wrong_token
        )
        report |= {"credit_auc": value, "credit_auc_se": error, "credit_auc_responses": n}
    # One class of verdicts only: there is no AUC, and JSON has no nan.
    report = {name: None if value != value else value for name, value in report.items()}
    ids = rollouts.tokens[mask].long()
    sums = torch.zeros(int(ids.max()) + 1).index_add(0, ids, signal[mask])
    ranked = sums.argsort(descending=True).tolist()
    for name, chosen in [("most_credit", ranked[:8]), ("most_blame", ranked[::-1][:8])]:
        report[name] = [[tokenizer.decode([i]), round(sums[i].item(), 2)] for i in chosen]
    return report


def print_report(report: dict[str, Any], output: Path, ranks: Ranks) -> None:
    """The diagnostics for people."""
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
    behavior = args.behavior or args.base
    roles = {"behavior": behavior, "base": args.base}
    for i, (_, teacher, reference) in enumerate(args.pairs):
        roles |= {f"teacher_{i}": teacher, f"reference_{i}": reference}
    check_vocabulary(list(roles.values()), rollouts)
    models = {model: fingerprint(model_folder(model)) for model in dict.fromkeys(roles.values())}
    metadata = {
        "rollouts": fingerprint(rollouts.path), "temperature": temperature,
        "weights": [w for w, _, _ in args.pairs],
        "models": {r: {"path": model, "fingerprint": models[model]} for r, model in roles.items()},
    }  # fmt: skip
    if is_complete(args.output, metadata, ranks):
        shutil.rmtree(args.parts, ignore_errors=True)
        return

    scored = score_policies(args, rollouts, metadata["rollouts"], models, temperature, ranks)
    signal = combine([(w, scored[t], scored[r]) for w, t, r in args.pairs])
    report = diagnose(signal, rollouts, tokenizer)
    if ranks.rank == 0:
        arrays = {f"{role}_logprobs": scored[model].clone() for role, model in roles.items()}
        write_json(args.output.with_suffix(".json"), report | metadata)
        save_tensors(args.output, arrays | {"signal": signal}, metadata)
        shutil.rmtree(args.parts, ignore_errors=True)
    print_report(report, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
