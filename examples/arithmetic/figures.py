"""Draws the figures of docs/figures.md from the runs of examples/arithmetic/figures.sh, over seeds.

    line or dot   mean over the seeds
    band or bar   from the lowest seed to the highest

Reads   RUNS/ as figures.sh leaves them, one folder a seed: paper/ (its own runs, judged), rounds/,
        plateau/, online/, and of run.sh eval/, curve/, rollouts/, signals/. A seed that lacks a
        file for a figure is left out of it, and the file named.
Writes  OUTPUT/NAME.png, OUTPUT/numbers.json: what the text may quote, as {"mean", "sd", "n",
        "values"} over seeds (sd: of one seed, null).

    python examples/arithmetic/figures.py --runs runs/arithmetic/seed1 --output docs/figures
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import report
import scribe
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import common
import evaluate
import stage1_extreme
from common import UserError

Array = np.ndarray
Runs = tuple[Path, ...]
Drawn = tuple[Figure, dict[str, Any]]  # a figure and its numbers

BLUE, GREEN, PINK, ORANGE, SKY, GREY = report.PATH_COLOURS
RED, BLACK = report.STUDENT_COLOUR, report.BASE_COLOUR
COLOURS = {"ce": BLUE, "sapo": PINK, "grpo": GREEN}  # of every figure
SOLID, DASHED = "-", (0, (4, 2))
POINTS = 48  # of a line over training steps: each the mean of neighbouring steps


@dataclass
class Args:
    runs: tuple[Path, ...]
    """run folders that examples/arithmetic/figures.sh has made, one a seed"""
    output: Path = Path("docs/figures")
    """folder to write the PNGs and numbers.json into"""

    def check(self) -> None:
        """Raises UserError on folders that are not there."""
        if not self.runs:
            raise UserError("--runs: name at least one folder")
        for run in self.runs:
            if not run.is_dir():
                raise UserError(f"--runs {run}: no such folder; make it with "
                                "examples/arithmetic/figures.sh")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Numbers. R seeds, K checkpoints, P points of a line.


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the seeds themselves; nan: not measured."""
    listed = [float(value) for value in values]
    known = [value for value in listed if math.isfinite(value)]
    return {
        "mean": statistics.mean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
        "values": listed,
    }


def along(places: Iterable[float], values: Array) -> dict[str, Any]:
    """{place: spread} of values [R, K], one entry a place."""
    return {f"{place:g}": spread(column) for place, column in zip(places, values.T, strict=True)}


def value_of(folder: Path, key: str) -> float:
    """One number of an evaluation; nan where it has none."""
    value = common.read_json(folder / "metrics.json")["metrics"].get(key, (None, None))[0]
    return math.nan if value is None else value


def base_values(runs: Runs, key: str) -> Array:
    """Of the base on the held-out problems -> [R]."""
    return np.array([value_of(run / "eval/base", key) for run in runs])


def checkpoints(folder: Path) -> dict[float, Path]:
    """{epoch: evaluation} of a curve. Raises UserError where there is none."""
    found = sorted(folder.glob("epoch-*/metrics.json"))
    if not found:
        raise UserError(f"{folder}: no judged checkpoint")
    return {float(path.parent.name.removeprefix("epoch-")): path.parent for path in found}


def judged(runs: Runs, name: str, *keys: str, under: str = "paper/curve") -> tuple[Array, ...]:
    """Epochs [K], then of every key the values at the checkpoints of a stage-1 run [R, K]."""
    paths = [checkpoints(run / under / name) for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if path.keys() != paths[0].keys():
            raise UserError(f"{run / under / name}: other epochs than in {runs[0]}")
    values = [np.array([[value_of(f, key) for f in p.values()] for p in paths]) for key in keys]
    return np.array(list(paths[0])), *values


def logged(runs: Runs, name: str, *keys: str) -> tuple[Array, ...]:
    """Epochs [P], then every key of a stage-1 run's metrics.jsonl [R, P], steps averaged."""
    rows = [common.read_jsonl(run / "paper/stage1" / name / "metrics.jsonl") for run in runs]
    for run, steps in zip(runs, rows, strict=True):
        if len(steps) != len(rows[0]):
            raise UserError(f"{run}/paper/stage1/{name}: {len(steps)} steps, {len(rows[0])} in "
                            f"{runs[0]}")  # fmt: skip

    def points(key: str) -> Array:
        """[R, P], nan where a step has none."""
        unknown = float("nan")  # JSON has null
        steps = [[r[key] if r.get(key) is not None else unknown for r in run] for run in rows]
        parts = np.array_split(np.array(steps), min(POINTS, len(rows[0])), axis=1)
        return np.stack([part.mean(1) for part in parts], 1)

    return points("epoch")[0], *(points(key) for key in keys)


# --------------------------------------------------------------------------------------------------
# Drawing


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Array]:
    """A figure nine inches wide with plain axes."""
    figure, grid = plt.subplots(
        rows, columns, figsize=(9, height), layout="constrained", squeeze=False, **options
    )
    for axes in grid.flat:
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return figure, grid


def band(axes: Axes, x: Array, values: Array, colour: str, **style: Any) -> None:
    """Mean over seeds of values [R, P] and the band between the lowest and the highest."""
    axes.plot(x, values.mean(0), color=colour, **({"lw": 1.4} | style))
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


def from_base(axes: Axes, start: Array, x: Array, values: Array, colour: str, **style: Any) -> None:
    """A curve of checkpoints [R, K] that starts at the base's value [R], epoch 0."""
    both = np.concatenate([start[:, None], values], 1)
    band(axes, np.concatenate([[0.0], x]), both, colour, marker="o", ms=3.5, **style)


def bars(axes: Axes, x: float, values: Array, colour: str, **style: Any) -> None:
    """A dot at the mean over seeds [R], a bar from the lowest to the highest."""
    mean = values.mean()
    error = [[mean - values.min()], [values.max() - mean]]
    axes.errorbar(x, mean, error, color=colour, **({"fmt": "o", "ms": 5, "lw": 1} | style))


def level(axes: Axes, values: Array, text: str = "") -> None:
    """A dotted line at the mean over seeds, e.g. the base's."""
    axes.axhline(values.mean(), color=GREY, lw=0.9, ls=":")
    if text:
        axes.annotate(text, (1, values.mean()), (-2, 2), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=8, color=GREY, ha="right")  # fmt: skip


def nats(axes: Axes, threshold: float = 1.0, floor: float | None = None) -> None:
    """Makes the vertical axis, of what is drawn already, one of nats: decades, and 0."""
    low, high = axes.get_ylim()
    low = low if floor is None else floor
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    decades = [step * 10.0**power for power in range(-1, 4) for step in (1, 3)]
    kept = [x for x in decades if x >= threshold and (high < 10 or f"{x:g}"[0] == "1")]
    ticks = [x for x in (*(-x for x in kept[::-1]), 0.0, *kept) if low <= x <= high]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, 1.4 * high if high > threshold else high)  # room for a marker at the top


def name_lines(axes: Axes, names: dict[str, str]) -> None:
    """{text: colour} in the order of the lines, in a column where the panel is emptiest."""
    handles = [plt.Line2D([], [], color=colour, lw=2) for colour in names.values()]
    legend = axes.legend(handles, list(names), fontsize=8, frameon=False, handlelength=0.8,
                         labelspacing=0.25, borderaxespad=0.2)  # fmt: skip
    for text, colour in zip(legend.get_texts(), names.values(), strict=True):
        text.set_color(colour)


def limits(axes: Axes, bases: list[report.Evaluation], largest: float) -> Array:
    """Bound and optimum of the pooled problems of all seeds -> points of both [n, 2]."""
    pooled = replace(
        bases[0],
        correct=np.concatenate([base.correct for base in bases]),
        count=np.concatenate([base.count for base in bases]),
    )
    ours = set(axes.texts)
    points = report.draw_limits(axes, pooled, largest)
    for text in set(axes.texts) - ours:  # long ones, for a wider panel
        text.remove()
    axes.text(0.02, 0.985, "out of reach\n(dashed: optimum)", fontsize=8, color="#555555",
              transform=axes.transAxes, va="top")  # fmt: skip
    return points


def optimum_efficiency(bases: list[report.Evaluation], kl_range: tuple[float, float]) -> Array:
    """(KL, efficiency) of the base re-weighted by exp(eta R) -> [n, 2] within the range."""
    rates = torch.tensor(np.concatenate([base.correct / base.count for base in bases]))
    accuracy, kl = evaluate.tilted_optimum(rates, torch.linspace(0.02, 14, 400))
    efficiency = evaluate.kl_efficiency(accuracy, rates.mean().expand_as(accuracy), kl)
    keep = (kl > kl_range[0]) & (kl < kl_range[1]) & efficiency.isfinite()
    return torch.stack([kl, efficiency], 1)[keep].numpy()


# --------------------------------------------------------------------------------------------------
# 1. Training dynamics under extreme reuse


def draw_dynamics(runs: Runs) -> Drawn:
    """CE, SAPO and GRPO over epochs on the same rollouts."""
    figure, grid = panels(2, 3, 5.0)
    (accuracy, entropy, outside), (positives, negatives, kl) = grid
    numbers: dict[str, Any] = {"base": {"accuracy": spread(base_values(runs, "accuracy"))}}
    keys = ("entropy", "ratio_outside_0.8_1.28", "prob_correct", "prob_wrong")
    for name, colour in COLOURS.items():
        epochs, accuracies, kls = judged(runs, name, "accuracy", "kl")
        from_base(accuracy, base_values(runs, "accuracy"), epochs, accuracies, colour)
        from_base(kl, np.zeros(len(runs)), epochs, kls, colour)
        x, *lines = logged(runs, name, *keys)
        for axes, line in zip((entropy, outside, positives, negatives), lines, strict=True):
            band(axes, x, line, colour)
        numbers[name] = {
            "accuracy": along(epochs, accuracies),
            "kl": along(epochs, kls),
            "best_accuracy": spread(accuracies.max(1)),
            "epoch_of_best": spread(epochs[accuracies.argmax(1)]),
        } | {
            key: {"first": spread(line[:, 0]), "last": spread(line[:, -1]),
                  "lowest": spread(line.min(1)), "highest": spread(line.max(1))}
            for key, line in zip(keys, lines, strict=True)
        }  # fmt: skip
    level(accuracy, base_values(runs, "accuracy"), "base")
    nats(kl, floor=0)
    titles = ("accuracy, held out", "entropy on the data, nats a token",
              "share of ratios outside 0.8 to 1.28", "token probability in correct responses",
              "token probability in wrong responses",
              "KL from the base, nats a response")  # fmt: skip
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("epochs on the same rollouts")
    accuracy.set_ylim(0, 1)
    name_lines(outside, {report.label(name): colour for name, colour in COLOURS.items()})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 2. Tightening the KL constraint


def coefficients(run: Path) -> dict[float, str]:
    """{KL coefficient: stage-1 run} of SAPO, without penalty first."""
    names = [folder.name for folder in run.glob("paper/stage1/sapo_kl*")]
    found = {float(name.removeprefix("sapo_kl")): name for name in names}
    return {0.0: "sapo"} | dict(sorted(found.items()))


def draw_kl_constraint(runs: Runs) -> Drawn:
    """SAPO under a KL penalty of growing weight: accuracy by epoch; its peak, and the KL there."""
    names = coefficients(runs[0])
    figure, ((by_epoch, peak, kl_there),) = panels(1, 3, 3.1, width_ratios=(1.5, 1, 1))
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1, len(names) - 1))
    colours = {0.0: PINK} | dict(zip(list(names)[1:], shades, strict=True))
    start = base_values(runs, "accuracy")
    numbers: dict[str, Any] = {"base": {"accuracy": spread(start)}, "by_coefficient": {}}
    for place, (coefficient, name) in enumerate(names.items()):
        epochs, accuracy, kl = judged(runs, name, "accuracy", "kl")
        colour, seeds, at = colours[coefficient], np.arange(len(runs)), accuracy.argmax(1)
        from_base(by_epoch, start, epochs, accuracy, colour)
        bars(peak, place, accuracy.max(1), colour)
        bars(peak, place, accuracy[:, -1], colour, mfc="white")
        bars(kl_there, place, kl[seeds, at], colour)
        numbers["by_coefficient"][f"{coefficient:g}"] = {
            "accuracy": along(epochs, accuracy),
            "kl": along(epochs, kl),
            "best_accuracy": spread(accuracy.max(1)),
            "epoch_of_best": spread(epochs[at]),
            "kl_at_best": spread(kl[seeds, at]),
            "last_accuracy": spread(accuracy[:, -1]),
            "last_kl": spread(kl[:, -1]),
        }
    level(by_epoch, start, "base")
    name_lines(by_epoch, {f"{c:g}" if c else "no penalty": colours[c] for c in names})
    by_epoch.set(title="accuracy, held out", xlabel="epochs on the same rollouts", ylim=(0, 1))
    peak.set(title="best checkpoint; hollow: the last", ylim=(0, 1))
    kl_there.set_title("KL at the best, nats a response")
    nats(kl_there, threshold=0.1, floor=0)
    for axes in (peak, kl_there):
        axes.set_xticks(range(len(names)), [f"{c:g}" for c in names])
        axes.set(xlabel="KL coefficient", xlim=(-0.5, len(names) - 0.5))
    for axes in (by_epoch, peak, kl_there):
        axes.title.set_size(9)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 3. Dynamics of the MSE loss

MSE_RUNS = {
    "mse_verdict": "target R",
    "mse_soft_value": "target R - V*",
    "mse_weak": "target R - V*",
}


def asked(run: Path, name: str) -> tuple[float, float]:
    """Mean log-ratio, nats, that the targets ask of correct and of wrong responses."""
    args = common.read_json(run / "paper/stage1" / name / "args.json")["args"]
    rollouts, beta = common.load_rollouts(run / "rollouts"), args["beta"]
    rewards = rollouts.rewards
    soft = stage1_extreme.group_statistics(rewards, rollouts.problem_index, beta)[2]
    target = (rewards - soft if args["mse_target"] == "soft_value" else rewards) / beta
    return target[rewards > 0.5].mean().item(), target[rewards < 0.5].mean().item()


def draw_mse(runs: Runs) -> Drawn:
    """Log-ratios of correct and of wrong responses, and accuracy, under three targets."""
    figure, grid = panels(3, len(MSE_RUNS), 6.2, sharex="col", sharey="row")
    start, numbers = base_values(runs, "accuracy"), {}
    for column, (name, title) in enumerate(MSE_RUNS.items()):
        x, correct, wrong, logprob = logged(
            runs, name, "log_ratio_correct", "log_ratio_wrong", "logprob"
        )
        epochs, accuracy, kl = judged(runs, name, "accuracy", "kl")
        wanted = np.array([asked(run, name) for run in runs])  # [R, 2]
        beta = common.read_json(runs[0] / "paper/stage1" / name / "args.json")["args"]["beta"]
        asks = " and ".join(f"{value:+.1f}" if value else "0" for value in wanted.mean(0))
        grid[0, column].set_title(f"{title}, beta {beta:g}\nasks {asks} nats", fontsize=9)
        for axes, line, colour in zip(grid[:, column], (correct, wrong), (BLUE, RED), strict=False):
            band(axes, x, line, colour)
            axes.axhline(0, color=GREY, lw=0.9, ls=":")
            lowest = int(line.mean(0).argmin())
            axes.plot(x[lowest], line.mean(0)[lowest], marker="v", color=colour, ms=5)
        from_base(grid[2, column], start, epochs, accuracy, BLACK)
        level(grid[2, column], start)
        grid[2, column].set_xlabel("epochs on the same rollouts")
        numbers[name] = {
            "asked_of_correct": spread(wanted[:, 0]),
            "asked_of_wrong": spread(wanted[:, 1]),
            "accuracy": along(epochs, accuracy),
            "kl": along(epochs, kl),
        } | {
            key: {"lowest": spread(line.min(1)), "epoch_of_lowest": spread(x[line.argmin(1)]),
                  "first": spread(line[:, 0]), "last": spread(line[:, -1])}
            for key, line in [("log_ratio_correct", correct), ("log_ratio_wrong", wrong),
                              ("logprob", logprob)]
        }  # fmt: skip
    titles = ("log-ratio of correct\nresponses, nats", "log-ratio of wrong\nresponses, nats",
              "accuracy, held out")  # fmt: skip
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.set_ylabel(title)
    nats(grid[1, 0])
    grid[2, 0].set_ylim(0, 1)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 4. KL efficiency before and after distillation

DISTILLED = {"ce": "student_strong", "sapo": "student_ruined", "unlearned": "student_unlearned"}
TEACHER_COLOURS = COLOURS | {"unlearned": ORANGE, "ce_gentle": SKY}


def kl_axis(axes: Axes, largest: float) -> None:
    """A horizontal axis of KLs: linear near 0, then decades."""
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    axes.set_xlim(-0.02, 1.6 * largest)
    ticks = [t for t in (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300) if t <= 1.6 * largest]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KL from the base, nats a response")


def draw_ends(axes: Axes, ends: dict[str, Array], column: int) -> None:
    """Squares of teachers, stars of students, arrows between; ends: {name: [R, accuracy, KL,
    efficiency]}, `column` is what goes upwards."""
    teacher_of = {student: teacher for teacher, student in DISTILLED.items()}
    for name, values in ends.items():
        x, y = values[:, 1], values[:, column]
        colour = TEACHER_COLOURS[teacher_of.get(name, name)]
        style = {"marker": "*", "ms": 12} if name in teacher_of else {"marker": "s", "ms": 6}
        errors = [[[v.mean() - v.min()], [v.max() - v.mean()]] for v in (y, x)]
        axes.errorbar(x.mean(), y.mean(), *errors, color=colour, mec="white", mew=0.7, lw=1,
                      zorder=5, **style)  # fmt: skip
        if name in teacher_of:
            origin = ends[teacher_of[name]].mean(0)
            axes.annotate("", (x.mean(), y.mean()), (origin[1], origin[column]), zorder=4,
                          arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.8,
                                      "ls": (0, (2, 2)), "shrinkA": 6, "shrinkB": 8})  # fmt: skip


def draw_efficiency(runs: Runs) -> Drawn:
    """Teachers with their early-stopping curves, and their students: accuracy and efficiency."""
    keys = ("accuracy", "kl", "kl_efficiency")
    bases = [report.load_evaluation(run / "eval/base", "base") for run in runs]
    start = np.array([base.correct.sum() / base.count.sum() for base in bases])
    measured = {
        name: np.array([[value_of(run / "eval" / name, key) for key in keys] for run in runs])
        for name in (*TEACHER_COLOURS, *DISTILLED.values())
    }
    ends = {name: np.nan_to_num(values) for name, values in measured.items()}  # 0: not passed
    figure, ((accuracy_axes, efficiency_axes),) = panels(1, 2, 4.6)
    numbers: dict[str, Any] = {
        "base": {"accuracy": spread(start)},
        "curves": {},
        "ends": {
            name: {key: spread(column) for key, column in zip(keys, values.T, strict=True)}
            for name, values in measured.items()
        },
    }
    largest, obstacles = max(1.0, *(values[:, 1].max() for values in ends.values())), []
    for name, colour in TEACHER_COLOURS.items():
        epochs, accuracy, kl, efficiency = judged(runs, name, *keys, under="curve")
        largest, shown = max(largest, kl.max()), np.nan_to_num(efficiency)
        path = np.concatenate([[[0.0, start.mean()]], np.stack([kl, accuracy], 2).mean(0)])
        share = np.linspace(0, 1, 30)[:, None]  # linear in KL, which this axis bends
        walked = [a + share * (b - a) for a, b in zip(path[:-1], path[1:], strict=True)]
        accuracy_axes.plot(*np.concatenate(walked).T, color=colour, lw=1.1, alpha=0.8)
        accuracy_axes.plot(*path[1:].T, color=colour, marker="o", ms=3, ls="")
        efficiency_axes.plot(kl.mean(0), shown.mean(0), color=colour, lw=1.1, marker="o", ms=3)
        obstacles += walked
        numbers["curves"][name] = {
            "accuracy": along(epochs, accuracy),
            "kl": along(epochs, kl),
            "kl_efficiency": along(epochs, efficiency),
            "best_efficiency": spread(shown.max(1)),
            "epoch_of_best_efficiency": spread(epochs[shown.argmax(1)]),
        }
    for axes, column in ((accuracy_axes, 0), (efficiency_axes, 2)):
        kl_axis(axes, largest)
        draw_ends(axes, ends, column)
        axes.set_title("square: a teacher's end; star: its student", fontsize=9)
    accuracy_axes.set(ylabel="accuracy, held out", ylim=(-0.03, 1.06))
    obstacles.append(limits(accuracy_axes, bases, largest))
    labels = [(*ends[name].mean(0)[1::-1], report.label(name), colour)
              for name, colour in TEACHER_COLOURS.items()]  # fmt: skip
    report.place_labels(accuracy_axes, labels, np.concatenate(obstacles))

    efficiency_axes.set(ylabel="KL efficiency (0: base not passed)", ylim=(-0.03, 1.1))
    efficiency_axes.axhline(1, color="#555555", lw=1)
    efficiency_axes.axhspan(1, 1.1, color="#EEEEEE", zorder=0, lw=0)
    efficiency_axes.text(0.02, 0.985, "out of reach", fontsize=8, color="#555555",
                         transform=efficiency_axes.transAxes, va="top")  # fmt: skip
    best = optimum_efficiency(bases, (0.02, 1.6 * largest))
    efficiency_axes.plot(*best.T, color="#555555", lw=1, ls=DASHED)
    efficiency_axes.text(*best[-1], " optimum", fontsize=8, color="#555555", va="center")
    numbers["optimum_efficiency"] = {"lowest": float(best[:, 1].min()),
                                     "highest": float(best[:, 1].max())}  # fmt: skip
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 5. The two distillation objectives

OBJECTIVES = {"regression": (RED, "o"), "pg": (BLUE, "s")}


def budgets(run: Path) -> list[str]:
    """KL budgets, as the names of the students have them, ascending."""
    folders = run.glob("paper/students/regression*")
    found = sorted((folder.name.removeprefix("regression") for folder in folders), key=float)
    if not found:
        raise UserError(f"{run / 'paper/students'}: no student under a budget")
    return found


def draw_objectives(runs: Runs) -> Drawn:
    """Students by regression and by policy gradient of the same signal under the same budgets."""
    keys = ("accuracy", "kl", "kl_efficiency")
    bases = [report.load_evaluation(run / "eval/base", "base") for run in runs]
    figure, ((near, efficiency_axes, kl_axes),) = panels(1, 3, 3.8, width_ratios=(2, 1, 1))
    numbers: dict[str, Any] = {"base": {"accuracy": spread(base_values(runs, "accuracy"))}}
    largest, names = 0.1, budgets(runs[0])
    for objective, (colour, marker) in OBJECTIVES.items():
        values = np.array([
            [[value_of(run / f"paper/eval/student_{objective}{budget}", key) for key in keys]
             for budget in names]
            for run in runs
        ])  # fmt: skip  # [R, budgets, 3]
        mean = values.mean(0)
        near.plot(mean[:, 1], mean[:, 0], color=colour, lw=1)
        for place, budget in enumerate(names):
            accuracy, kl, efficiency = values[:, place].T
            near.errorbar(
                kl.mean(), accuracy.mean(),
                [[accuracy.mean() - accuracy.min()], [accuracy.max() - accuracy.mean()]],
                [[kl.mean() - kl.min()], [kl.max() - kl.mean()]],
                color=colour, fmt=marker, ms=5, lw=1, zorder=5,
            )  # fmt: skip
            if objective == "pg":  # the other stands beside it
                near.annotate(budget, (kl.mean(), accuracy.min()), (4, -9), fontsize=8.5,
                              color=GREY, textcoords="offset points")  # fmt: skip
            bars(efficiency_axes, place, np.nan_to_num(efficiency), colour, fmt=marker)
            bars(kl_axes, place, kl, colour, fmt=marker)
            numbers[f"{objective}{budget}"] = {
                key: spread(column) for key, column in zip(keys, values[:, place].T, strict=True)
            }
        largest = max(largest, values[:, :, 1].max())
    near.set(xlim=(0, 1.25 * largest), ylim=(0.9 * base_values(runs, "accuracy").min(), 1.06),
             xlabel="KL from the base, nats a response", ylabel="accuracy, held out")  # fmt: skip
    limits(near, bases, largest)
    near.set_title("grey: the budget, nats of the proxy", fontsize=9)
    efficiency_axes.set_title("KL efficiency", fontsize=9)
    efficiency_axes.set_ylim(0, 1)
    kl_axes.set_title("KL; dotted: the budget", fontsize=9)
    for axes in (efficiency_axes, kl_axes):
        axes.set_xticks(range(len(names)), names)
        axes.set(xlabel="KL budget, nats", xlim=(-0.5, len(names) - 0.5))
    places = np.arange(len(names))
    kl_axes.plot(places, [float(budget) for budget in names], color=GREY, ls=":",
                 marker="_", ms=14, lw=0.9)  # fmt: skip
    kl_axes.set_ylim(bottom=0)
    name_lines(efficiency_axes, {name: colour for name, (colour, _) in OBJECTIVES.items()})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 6. Online and offline


def draw_online(runs: Runs) -> Drawn:
    """Stage 2 on fixed rollouts, and on fresh ones of the student every epoch."""
    keys = {"accuracy": "accuracy, held out", "kl": "KL from the base, nats a response",
            "kl_efficiency": "KL efficiency"}  # fmt: skip
    tables = [
        {row["name"]: row for row in common.read_json(run / "online/online.json")["rows"]}
        for run in runs
    ]
    turns = [name for name in tables[0] if name.startswith("turn")]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise UserError(f"{runs[-1] / 'online/online.json'}: other turns than in {runs[0]}")
    figure, (row,) = panels(1, 3, 2.9)
    numbers: dict[str, Any] = {name: {} for name in tables[0]}
    for axes, (key, title) in zip(row, keys.items(), strict=True):
        values = {
            name: np.array([[math.nan if t[name][key][0] is None else t[name][key][0]]
                            for t in tables]) for name in tables[0]
        }  # fmt: skip
        for name, found in values.items():
            numbers[name][key] = spread(found[:, 0])
        if key == "kl":
            values["base"] = np.zeros((len(runs), 1))
        first = ["base"] * (key != "kl_efficiency")
        online = np.concatenate([values[name] for name in (*first, *turns)], 1)
        x = np.arange(len(turns) + 1)[1 - len(first) :]
        band(axes, x, online, RED, marker="o", ms=4)
        # The first epoch is the same: offline parts from there.
        offline = np.concatenate([values[turns[0]], values["offline"]], 1)
        band(axes, np.array([1, len(turns)]), offline, BLUE, marker="s", ms=4, ls=DASHED)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(turns) + 1))
        axes.set_xlabel("epochs of stage 2")
    name_lines(row[0], {"fresh rollouts each epoch": RED, "the base's rollouts": BLUE})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 7. Recovery of a policy that was pushed down on everything

RECOVERIES = {"recovered_mse": ("MSE", BLUE), "recovered_sft": ("SFT", ORANGE)}


def draw_recovery(runs: Runs) -> Drawn:
    """From a collapsed policy by MSE (base as reference) and by SFT on the correct responses."""
    figure, grid = panels(2, 2, 5.0, sharex=True)
    keys = ("log_ratio_correct", "log_ratio_wrong", "entropy")
    _, *collapsed = judged(runs, "collapsed", "accuracy", "kl")
    before = logged(runs, "collapsed", *keys)
    numbers: dict[str, Any] = {
        "base": {"accuracy": spread(base_values(runs, "accuracy"))},
        "collapsed": {"accuracy": spread(collapsed[0][:, -1]), "kl": spread(collapsed[1][:, -1])},
    }
    for name, (_, colour) in RECOVERIES.items():
        epochs, *curves = judged(runs, name, "accuracy", "kl")
        for axes, start, values in zip(grid[0], collapsed, curves, strict=True):
            from_base(axes, start[:, -1], epochs, values, colour)
        x, *lines = logged(runs, name, *keys)
        band(grid[1, 0], x, lines[0], colour)
        band(grid[1, 0], x, lines[1], colour, ls=DASHED)
        band(grid[1, 1], x, lines[2], colour)
        numbers[name] = {
            "accuracy": along(epochs, curves[0]), "kl": along(epochs, curves[1]),
        } | {
            key: {"first": spread(line[:, 0]), "last": spread(line[:, -1])}
            for key, line in zip(keys, lines, strict=True)
        }  # fmt: skip
    for key, line in zip(keys, before[1:], strict=True):
        numbers["base"][key] = spread(line[:, 0])
    level(grid[0, 0], base_values(runs, "accuracy"), "base")
    level(grid[1, 1], before[3][:, 0], "base")
    level(grid[1, 0], np.zeros(1), "base")
    grid[0, 0].set_ylim(0, 1)
    nats(grid[0, 1], floor=0)
    nats(grid[1, 0])
    titles = ("accuracy, held out", "KL from the base, nats a response",
              "log-ratio, nats; solid: correct, dashed: wrong",
              "entropy on the data, nats a token")  # fmt: skip
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("epochs of recovery")
    name_lines(grid[0, 1], dict(RECOVERIES.values()))
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 8. Tokens of correct responses

EDGES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)  # of the bins of token probability
FAR = 0.5  # below this a token is far from one
POLICIES = {  # name: signals file, its array
    "base": ("strong", "base_logprobs"),
    "CE": ("strong", "teacher_0_logprobs"),
    "SAPO": ("ruined", "teacher_0_logprobs"),
}
POLICY_COLOURS = {"base": BLACK, "CE": BLUE, "SAPO": PINK}
KIND_TITLES = {
    "style": "choice of a connecting word", "word": "rest of that word",
    "copied": "copied number or sign", "result": "result of a step",
    "punctuation": "punctuation, \\boxed", "answer": "number in the box",
    "end": "end of the response",
    "other": "off the grammar",
}  # fmt: skip


def positive_tokens(run: Path) -> tuple[Array, dict[str, Array]]:
    """Of every token of the correct responses: place of its kind in scribe.KINDS [n], and its
    probability under each policy, {name: [n]}."""
    rollouts = common.load_rollouts(run / "rollouts")
    texts = [row["text"] for row in common.read_jsonl(run / "rollouts/samples.jsonl")]
    kinds = []
    lengths = rollouts.response_lens.tolist()
    for response in (rollouts.rewards > 0.5).nonzero()[:, 0].tolist():
        found = scribe.token_kinds(texts[response])
        # A token is a character, or the end; but for <pad> and <unk>, which the text does not show.
        kinds += found if len(found) == lengths[response] else ["other"] * lengths[response]
    mask = rollouts.response_mask & (rollouts.rewards > 0.5)[rollouts.sequence_ids]
    probabilities = {}
    for name, (file, array) in POLICIES.items():
        path = run / "signals" / f"{file}.safetensors"
        arrays, metadata = common.load_tensors(path, {array: torch.float32})
        if metadata["rollouts"] != common.fingerprint(rollouts.path):
            raise UserError(f"{path}: made for other rollouts than {rollouts.path}")
        probabilities[name] = arrays[array][mask].exp().numpy()
    return np.array([scribe.KINDS.index(kind) for kind in kinds]), probabilities


def draw_positives(runs: Runs) -> Drawn:
    """How probable the tokens of correct responses are, and which kinds are not."""
    figure, ((bins_axes, of_far, of_kind),) = panels(1, 3, 3.4, width_ratios=(1.5, 1, 1))
    tokens = [positive_tokens(run) for run in runs]
    present = [i for i in range(len(scribe.KINDS)) if any((kind == i).any() for kind, _ in tokens)]
    shades = plt.get_cmap("cividis")(np.linspace(0, 1, len(EDGES) + 1))
    numbers: dict[str, Any] = {"far": FAR, "edges": list(EDGES), "share_of_kind": {
        scribe.KINDS[i]: spread((kind == i).mean() for kind, _ in tokens) for i in present
    }}  # fmt: skip
    for row, name in enumerate(POLICIES):
        bins = np.array([
            np.bincount(np.searchsorted(EDGES, p[name], side="right"), minlength=len(EDGES) + 1)
            / len(p[name]) for _, p in tokens
        ])  # fmt: skip  # [R, bins]
        left = 0.0
        for i, share in enumerate(bins.mean(0)):
            bins_axes.barh(row, share, left=left, color=shades[i], height=0.6)
            left += share
        far_share = np.array([(p[name] < FAR).mean() for _, p in tokens])
        # Among the far tokens the share of this kind; among the tokens of this kind those far.
        among_far = np.array([[(k[p[name] < FAR] == i).mean() for i in present] for k, p in tokens])
        among_kind = np.array([[(p[name][k == i] < FAR).mean() for i in present]
                               for k, p in tokens])  # fmt: skip
        for axes, values in ((of_far, among_far), (of_kind, among_kind)):
            y = np.arange(len(present)) + 0.22 * (row - 1)
            axes.hlines(y, values.min(0), values.max(0), color=POLICY_COLOURS[name], lw=1.2)
            axes.plot(values.mean(0), y, "o", color=POLICY_COLOURS[name], ms=4.5)
        numbers[name] = {
            "bins": [spread(column) for column in bins.T], "share_far": spread(far_share),
            "share_of_the_far": {scribe.KINDS[i]: spread(column)
                                 for i, column in zip(present, among_far.T, strict=True)},
            "far_share_of_kind": {scribe.KINDS[i]: spread(column)
                                  for i, column in zip(present, among_kind.T, strict=True)},
        }  # fmt: skip
    bins_axes.set_yticks(range(len(POLICIES)), list(POLICIES))
    for label, name in zip(bins_axes.get_yticklabels(), POLICIES, strict=True):
        label.set_color(POLICY_COLOURS[name])
    bins_axes.invert_yaxis()
    edges = [f"{edge:g}" for edge in EDGES]
    names = [f"< {edges[0]}", *(f"{a} to {b}" for a, b in zip(edges, edges[1:], strict=False)),
             f"> {edges[-1]}"]  # fmt: skip
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades]
    figure.legend(
        handles,
        names,
        title="token probability",
        fontsize=8,
        title_fontsize=8,
        ncols=len(names),
        frameon=False,
        loc="outside lower center",
        handlelength=1,
    )
    bins_axes.set_title("tokens of correct responses by probability", fontsize=9)
    bins_axes.set_xlabel("share of the tokens")
    for axes in (of_far, of_kind):
        axes.set_yticks(range(len(present)), [KIND_TITLES[scribe.KINDS[i]] for i in present])
        axes.invert_yaxis()
        axes.set_xlim(-0.03, 1.03)
    of_kind.set_yticklabels([])
    of_far.set_title(f"of those below {FAR:g},\nshare of each kind", fontsize=9)
    of_kind.set_title(f"of each kind,\nshare below {FAR:g}", fontsize=9)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 9. Sample efficiency

METHODS = {
    "erpd": ("ERPD, rounds", RED), "grpo": ("GRPO, on-policy rounds", GREEN),
    "fixed": ("GRPO, epochs on one set", BLUE),
}  # fmt: skip


def seconds(run: Path) -> dict[str, float]:
    """{output, from the run folder: seconds} of the steps that were made in one go."""
    files = sorted([*run.glob("seconds.jsonl"), *run.glob("*/seconds.jsonl")])
    rows = [row for file in files for row in common.read_jsonl(file)]
    return {row["output"]: row["seconds"] for row in rows}


def drawn(folder: Path) -> int:
    """Responses that were sampled for a round."""
    return len(common.load_rollouts(folder / "rollouts").rewards)


def rounds_of(run: Path, what: str) -> list[str]:
    """round1, round2 ... of a script, those that have `what`."""
    names = [folder.parent.name for folder in run.glob(f"round*/{what}")]
    return sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))


def by_rounds(run: Path, script: str, judged_in: str, *steps: str) -> tuple[Array, ...]:
    """Rollouts drawn, accuracy and seconds after each round of a script, from the base -> [K]s."""
    spent, points = seconds(run), [(0.0, value_of(run / "eval/base", "accuracy"), 0.0)]
    names = rounds_of(run / script, steps[-1])
    if not names:
        raise UserError(f"{run / script}: no round")
    for name in names:
        here = run / script / name
        # Of the first round some or all are links to what run.sh made.
        made = [os.path.relpath((here / s).resolve(), run.resolve()) for s in ("rollouts", *steps)]
        took = sum(spent.get(output, math.nan) for output in made)
        accuracy = value_of(run / judged_in / name, "accuracy")
        points.append((points[-1][0] + drawn(here), accuracy, points[-1][2] + took))
    return tuple(np.array(points).T)


def by_epochs(run: Path) -> tuple[Array, ...]:
    """The same of GRPO on one set of rollouts, after each judged epoch."""
    epochs, (accuracy,) = judged((run,), "grpo", "accuracy")
    spent = seconds(run)
    total = common.read_json(run / "paper/stage1/grpo/args.json")["args"]["epochs"]
    took = spent.get("paper/stage1/grpo", math.nan) / total
    start = spent.get("rollouts", math.nan)
    return np.full(len(epochs), drawn(run)), accuracy, start + epochs * took


def draw_minutes(axes: Axes, found: dict[str, list[tuple[Array, ...]]], timed: list[int]) -> None:
    """Accuracy by minutes, of the seeds that were timed throughout, and their mean."""
    for method, (_, colour) in METHODS.items():
        points = [found[method][i] for i in timed]
        shared = min(len(accuracy) for _, accuracy, _ in points)
        for _, accuracy, took in points:
            axes.plot(took / 60, accuracy, color=colour, lw=0.6, alpha=0.5)
        accuracy, took = (np.stack([p[i][:shared] for p in points]).mean(0) for i in (1, 2))
        axes.plot(took / 60, accuracy, color=colour, marker="o", ms=4, lw=1.4)
    axes.set_xlabel("minutes of sampling, scoring and training")


def scale_by_odds(axes: Axes, values: Array) -> None:
    """A vertical axis on which halving the errors is as much at 0.98 as at 0.6."""
    inside = values[(values > 0) & (values < 1)]
    low, high = (0.1, 0.9) if inside.size == 0 else (inside.min(), inside.max())
    low, high = low / (1.2 - 0.2 * low), (1 + high) / 2
    ticks = [t for t in (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99,
                         0.995) if low <= t <= high]  # fmt: skip
    axes.set_yscale("logit")
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def draw_samples(runs: Runs) -> Drawn:
    """Accuracy by rollouts drawn and by seconds: ERPD, on-policy GRPO, many epochs on one set."""
    sources = {
        "erpd": lambda run: by_rounds(run, "rounds", "rounds/judged", "unlearned",
                                      "signals.safetensors", "student"),
        "grpo": lambda run: by_rounds(run, "plateau", "paper/judged", "policy"),
        "fixed": by_epochs,
    }  # fmt: skip
    numbers: dict[str, Any] = {"base": {"accuracy": spread(base_values(runs, "accuracy"))}}
    found = {method: [source(run) for run in runs] for method, source in sources.items()}
    timed = [i for i in range(len(runs)) if all(np.isfinite(p[i][2]).all() for p in found.values())]
    figure, (row,) = panels(1, 2 if timed else 1, 3.8, sharey=True)
    by_rollouts = row[0]
    if timed:
        draw_minutes(row[1], found, timed)
    if len(timed) < len(runs):  # a step was interrupted, or made elsewhere: see seconds.jsonl
        print(f"samples.png: minutes of {len(timed)} of {len(runs)} seeds")
    for method, (_, colour) in METHODS.items():
        points = found[method]
        # Rounds that all seeds have (the plateau comes when it comes).
        shared = min(len(accuracy) for _, accuracy, _ in points)
        rollouts, accuracy, took = (np.stack([p[i][:shared] for p in points]) for i in range(3))
        if method == "fixed":
            x = rollouts[0, 0] / 1000
            bars(by_rollouts, x, accuracy.max(1), colour, fmt="^", ms=6)
            bars(by_rollouts, x, accuracy[:, -1], colour, fmt="v", ms=6)
            by_rollouts.annotate(
                "best and last epoch", (x, accuracy[:, -1].mean()), (25, -44), color=colour,
                textcoords="offset points", fontsize=8, va="center",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6},
            )  # fmt: skip
            epochs = judged(runs, "grpo", "accuracy")[0]
            numbers[method] = {
                "rollouts": spread(rollouts[:, 0]), "by_epoch": along(epochs, accuracy),
                "best": spread(accuracy.max(1)), "last": spread(accuracy[:, -1]),
                "seconds": along(epochs, took[timed]),
            }  # fmt: skip
        else:
            for drawn_so_far, reached, _ in points:  # each to its own end
                by_rollouts.plot(drawn_so_far / 1000, reached, color=colour, lw=0.6, alpha=0.5)
            band(by_rollouts, rollouts.mean(0) / 1000, accuracy, colour, marker="o", ms=4)
            numbers[method] = {
                "rollouts": along(range(shared), rollouts),
                "by_round": along(range(shared), accuracy),
                "seconds": along(range(shared), took[timed]),
                "rounds_of_each_seed": [len(accuracy) - 1 for _, accuracy, _ in points],
                "last_of_each_seed": spread(accuracy[-1] for _, accuracy, _ in points),
            }
    by_rollouts.set(xlabel="rollouts drawn, thousands", ylabel="accuracy, held out")
    reached = np.concatenate([accuracy for points in found.values() for _, accuracy, _ in points])
    scale_by_odds(by_rollouts, reached)
    level(by_rollouts, base_values(runs, "accuracy"), "base")
    name_lines(by_rollouts, dict(METHODS.values()))
    return figure, numbers


# --------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Runs], Drawn]] = {
    "dynamics": draw_dynamics,
    "kl_constraint": draw_kl_constraint,
    "mse": draw_mse,
    "efficiency": draw_efficiency,
    "objectives": draw_objectives,
    "online": draw_online,
    "recovery": draw_recovery,
    "positives": draw_positives,
    "samples": draw_samples,
}


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """JSON with one `spread` a line, five digits a number."""

    def short(value: Any) -> Any:
        """Five digits of every float within."""
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    text = json.dumps(short(numbers), indent=1, allow_nan=False)
    text = re.sub(r"[\[{][^\[\]{}]*(\[[^\[\]{}]*\][^\[\]{}]*)?[\]}]",
                  lambda leaf: " ".join(leaf[0].split()), text)  # fmt: skip
    with common.atomic(path) as temporary:
        temporary.write_text(text + "\n")


def complete(name: str, runs: Runs) -> Runs:
    """The seeds that have all that a figure needs; says what the others lack."""
    found = []
    for run in runs:
        try:
            FIGURES[name]((run,))
            found.append(run)
        except UserError as error:  # of a file that is missing or broken
            print(f"{name}.png without {run.resolve().name}: {error}")
        plt.close("all")  # also what was begun
    return tuple(found)


def main(args: Args) -> None:
    args.check()
    numbers: dict[str, Any] = {}
    for name, draw in FIGURES.items():
        runs = args.runs
        try:
            figure, measured = draw(runs)
        except UserError:
            plt.close("all")
            runs = complete(name, args.runs)
            if not runs:
                continue
            figure, measured = draw(runs)
        numbers[name] = {"runs": [run.resolve().name for run in runs]} | measured
        report.save_figure(figure, args.output / f"{name}.png")
    if not numbers:
        raise UserError(f"--runs {args.runs[0]}: nothing to draw from; run "
                        "examples/arithmetic/figures.sh")  # fmt: skip
    write_numbers(args.output / "numbers.json", report.finite(numbers))
    print(f"{len(numbers)} figures in {args.output}, of {len(args.runs)} seeds at most")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
