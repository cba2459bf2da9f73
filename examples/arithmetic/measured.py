"""Reads what the runs of figures.sh measured, over seeds.

R seeds    K checkpoints or rounds    P points of a line    n tokens
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import report
import scribe
from drawing import Array, average_steps

import common
import evaluate
from common import UserError

Runs = tuple[Path, ...]  # folders of examples/arithmetic/figures.sh, one for each seed

POINTS = 48  # of a line over training steps: each is the mean of neighbouring steps
POLICIES = {"base": "base", "CE": "stage1/ce", "SAPO": "stage1/sapo"}  # of positive_tokens


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds, and their values; nan is not measured."""
    listed = [float(value) for value in values]
    known = [value for value in listed if math.isfinite(value)]
    return {
        "mean": statistics.mean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
        "values": listed,
    }


def spreads(names: Iterable[str], values: Array) -> dict[str, Any]:
    """Returns {name: spread} of the columns of values [R, names]."""
    return {name: spread(column) for name, column in zip(names, values.T, strict=True)}


def along(places: Iterable[float], values: Array) -> dict[str, Any]:
    """Returns {place: spread} of values [R, K], one entry for each place, such as an epoch."""
    return spreads([f"{place:g}" for place in places], values)


def curve_numbers(epochs: Array, accuracy: Array, kl: Array) -> dict[str, Any]:
    """Returns what the text may quote of a curve of checkpoints: [K], two [R, K]."""
    best, seeds = accuracy.argmax(1), np.arange(len(accuracy))
    return {
        "accuracy": along(epochs, accuracy),
        "kl": along(epochs, kl),
        "best_accuracy": spread(accuracy.max(1)),
        "epoch_of_best": spread(epochs[best]),
        "kl_at_best": spread(kl[seeds, best]),
        "last_accuracy": spread(accuracy[:, -1]),
        "last_kl": spread(kl[:, -1]),
    }


def line_numbers(names: Iterable[str], x: Array, lines: list[Array]) -> dict[str, Any]:
    """Returns what the text may quote of lines over training steps: [P], then [R, P] each."""
    numbers = {}
    for name, line in zip(names, lines, strict=True):
        numbers[name] = {
            "first": spread(line[:, 0]),
            "last": spread(line[:, -1]),
            "lowest": spread(line.min(1)),
            "highest": spread(line.max(1)),
            "epoch_of_lowest": spread(x[line.argmin(1)]),
        }
    return numbers


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Writes JSON with one `spread` on a line and five digits for each number."""

    def short(value: Any) -> Any:
        """Rounds every float within to five digits."""
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    text = json.dumps(short(report.finite(numbers)), indent=1, allow_nan=False)
    innermost = r"[\[{][^\[\]{}]*(\[[^\[\]{}]*\][^\[\]{}]*)?[\]}]"
    text = re.sub(innermost, lambda found: " ".join(found[0].split()), text)
    with common.atomic(path) as temporary:
        temporary.write_text(text + "\n")


def value_of(folder: Path, key: str) -> float:
    """Reads one number of an evaluation; nan where it has none."""
    value = common.read_json(folder / "metrics.json")["metrics"].get(key, (None, None))[0]
    return math.nan if value is None else value


def values_of(runs: Runs, folder: str, keys: Iterable[str]) -> Array:
    """Reads numbers of an evaluation of every seed -> [R, keys]."""
    return np.array([[value_of(run / folder, key) for key in keys] for run in runs])


def base_accuracy(runs: Runs) -> Array:
    """Reads the accuracy of the base on the held-out problems -> [R]."""
    return values_of(runs, "eval/base", ["accuracy"])[:, 0]


def settings_of(run: Path, name: str) -> dict[str, Any]:
    """Reads the arguments of a stage-1 run of figures.sh."""
    return common.read_json(run / "paper/stage1" / name / "args.json")["args"]


def judged(runs: Runs, name: str, *keys: str, under: str = "paper/curve") -> tuple[Array, ...]:
    """Reads the checkpoints of a stage-1 run: epochs [K], then the values of every key [R, K]."""
    tables = []
    for run in runs:
        found = sorted((run / under / name).glob("epoch-*/metrics.json"))
        paths = {float(p.parent.name.removeprefix("epoch-")): p.parent for p in found}
        if not paths:
            raise UserError(f"{run / under / name}: no judged checkpoint; run figures.sh")
        if tables and paths.keys() != tables[0].keys():
            raise UserError(f"{run / under / name}: other epochs than in {runs[0]}")
        tables.append(paths)
    values = [np.array([[value_of(f, key) for f in p.values()] for p in tables]) for key in keys]
    return np.array(list(tables[0])), *values


def logged(runs: Runs, name: str, *keys: str) -> tuple[Array, ...]:
    """Reads metrics.jsonl of a stage-1 run: epochs [P], then every key [R, P], steps averaged."""
    tables = []
    for run in runs:
        rows = evaluate.read_jsonl(run / "paper/stage1" / name / "metrics.jsonl")
        if tables and len(rows) != len(tables[0]):
            where = f"{run}/paper/stage1/{name}"
            raise UserError(f"{where}: {len(rows)} steps, {len(tables[0])} in {runs[0]}")
        tables.append(rows)
    lines = []
    for key in ("epoch", *keys):  # null, which JSON has for nan, becomes nan again
        steps = np.array([[row.get(key) for row in rows] for rows in tables], dtype=float)
        lines.append(average_steps(steps, POINTS))
    return lines[0][0], *lines[1:]


def coefficients(run: Path) -> dict[float, str]:
    """Returns {KL coefficient: stage-1 run} of SAPO, the one without penalty first."""
    names = [folder.name for folder in run.glob("paper/stage1/sapo_kl*")]
    found = {float(name.removeprefix("sapo_kl")): name for name in names}
    return {0.0: "sapo"} | dict(sorted(found.items()))


def asked(run: Path, name: str) -> tuple[float, float]:
    """Computes the mean log-ratio, in nats, that the targets ask of correct and wrong responses.

    V* = beta log E exp(R / beta) over the responses to a problem, of which a share p is correct."""
    args, rollouts = settings_of(run, name), common.load_rollouts(run / "rollouts")
    rewards, index = rollouts.rewards.double().numpy(), rollouts.problem_index.numpy()
    target = rewards / args["beta"]
    if args["mse_target"] == "soft_value":
        count = np.bincount(index)
        p = np.bincount(index, rewards) / np.maximum(count, 1)
        target = target - np.log(1 - p + p * np.exp(1 / args["beta"]))[index]
    return target[rewards > 0.5].mean(), target[rewards < 0.5].mean()


def budgets(run: Path) -> list[str]:
    """Returns the KL budgets, as the names of the students have them, ascending."""
    folders = run.glob("paper/students/regression*")
    found = sorted((folder.name.removeprefix("regression") for folder in folders), key=float)
    if not found:
        raise UserError(f"{run / 'paper/students'}: no student under a budget; run figures.sh")
    return found


def pooled_base(runs: Runs) -> report.Evaluation:
    """Loads the evaluations of the base, as one with the problems of all seeds."""
    bases = [report.load_evaluation(run / "eval/base", "base") for run in runs]
    correct = np.concatenate([base.correct for base in bases])
    return replace(bases[0], correct=correct, count=np.concatenate([b.count for b in bases]))


def positive_tokens(run: Path) -> tuple[Array, dict[str, Array]]:
    """Looks at every token of the correct responses: its place in scribe.KINDS, [n], and its
    probability under each policy, {name: [n]}."""
    rollouts = common.load_rollouts(run / "rollouts")
    texts = [row["text"] for row in evaluate.read_jsonl(run / "rollouts/samples.jsonl")]
    kinds = []
    lengths = rollouts.response_lens.tolist()
    for response in (rollouts.rewards > 0.5).nonzero()[:, 0].tolist():
        found = scribe.token_kinds(texts[response])
        # A token is a character or the end, except <pad> and <unk>, which the text does not show.
        kinds += found if len(found) == lengths[response] else ["other"] * lengths[response]
    mask = rollouts.response_mask & (rollouts.rewards > 0.5)[rollouts.sequence_ids]
    ranks, probabilities = common.setup_ranks(), {}
    for name, model in POLICIES.items():  # run.sh has scored them, so this only reads
        logprobs = common.score(str(run / model), rollouts, 8192, ranks)
        probabilities[name] = logprobs[mask].exp().numpy()
    return np.array([scribe.KINDS.index(kind) for kind in kinds]), probabilities


def seconds(run: Path) -> dict[str, float]:
    """Returns {output, from the run folder: seconds} of the steps that ran without interruption."""
    files = sorted([*run.glob("seconds.jsonl"), *run.glob("*/seconds.jsonl")])
    rows = [row for file in files for row in evaluate.read_jsonl(file)]
    return {row["output"]: row["seconds"] for row in rows}


def sampled(folder: Path) -> int:
    """Returns how many responses were sampled for a round."""
    return len(common.load_rollouts(folder / "rollouts").rewards)


def by_rounds(run: Path, script: str, judged_in: str, *steps: str) -> tuple[Array, ...]:
    """Returns rollouts, accuracy and seconds after each round of a script, base first: [K] each."""
    spent, points = seconds(run), [(0.0, value_of(run / "eval/base", "accuracy"), 0.0)]
    folders = [path.parent for path in (run / script).glob(f"round*/{steps[-1]}")]
    if not folders:
        raise UserError(f"{run / script}: no round; run examples/arithmetic/{script}.sh")
    for here in sorted(folders, key=lambda folder: int(folder.name.removeprefix("round"))):
        # Some steps of the first round are links to what run.sh made.
        made = [os.path.relpath((here / s).resolve(), run.resolve()) for s in ("rollouts", *steps)]
        took = sum(spent.get(output, math.nan) for output in made)
        accuracy = value_of(run / judged_in / here.name, "accuracy")
        points.append((points[-1][0] + sampled(here), accuracy, points[-1][2] + took))
    return tuple(np.array(points).T)


def by_epochs(run: Path) -> tuple[Array, ...]:
    """Returns the same of GRPO on one set of rollouts, after each judged epoch."""
    epochs, (accuracy,) = judged((run,), "grpo", "accuracy")
    spent = seconds(run)
    took = spent.get("paper/stage1/grpo", math.nan) / settings_of(run, "grpo")["epochs"]
    start = spent.get("rollouts", math.nan)
    return np.full(len(epochs), sampled(run)), accuracy, start + epochs * took


def shared_rounds(points: list[tuple[Array, ...]]) -> list[Array]:
    """Stacks the rounds that all seeds have: rollouts, accuracy and seconds, [R, K] each."""
    shared = min(len(accuracy) for _, accuracy, _ in points)
    return [np.stack([seed[i][:shared] for seed in points]) for i in range(3)]
