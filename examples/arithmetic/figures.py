"""Draws the figures of docs/figures.md from the runs of examples/arithmetic/figures.sh, over seeds.

    line or dot   mean over the seeds
    band or bar   from the lowest seed to the highest

Reads   RUNS/, one folder for each seed, as figures.sh leaves them: paper/ (its own runs, judged),
        rounds/, plateau/, online/, and of run.sh eval/, curve/, rollouts/, stage1/. A seed that
        lacks a file for a figure is left out of that figure, and the file is named.
Writes  OUTPUT/NAME.png and OUTPUT/numbers.json, which holds what the text may quote as
        {"mean", "sd", "n", "values"} over seeds (sd: of a single seed, null).

    python examples/arithmetic/figures.py --runs runs/arithmetic/seed1 --output docs/figures
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import drawing
import measured
import numpy as np
import report
import scribe
import torch
from drawing import Array, kl_axis, label, nats_axis, straight_in_kl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measured import Runs

import common
import evaluate
from common import UserError

Drawn = tuple[Figure, dict[str, Any]]  # a figure and its numbers

BLUE, GREEN, PINK, ORANGE, SKY, GREY = drawing.PATH_COLOURS
RED, BLACK = drawing.STUDENT_COLOUR, drawing.BASE_COLOUR
COLOURS = {"ce": BLUE, "sapo": PINK, "grpo": GREEN}  # of every figure
DASHED = (0, (4, 2))


@dataclass
class Args:
    runs: tuple[Path, ...]
    """run folders that examples/arithmetic/figures.sh has made, one for each seed"""
    output: Path = Path("docs/figures")
    """folder to write the PNGs and numbers.json into"""

    def check(self) -> None:
        """Raises UserError on folders that are not there."""
        common.require(self, "runs", bool, "at least one folder")
        for run in self.runs:
            if not run.is_dir():
                made_by = "make it with examples/arithmetic/figures.sh"
                raise UserError(f"--runs {run}: no such folder; {made_by}")


# --------------------------------------------------------------------------------------------------
# Drawing. R seeds, K checkpoints, P points of a line.


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Array]:
    """Makes a figure nine inches wide."""
    return drawing.panels(rows, columns, (9, height), **options)


def set_titles(grid: Iterable[Axes], *titles: str) -> None:
    """Writes a title above each panel."""
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(title, fontsize=9)


def band(axes: Axes, x: Array, values: Array, colour: str, **style: Any) -> None:
    """Draws the mean over seeds of values [R, P], and the band from the lowest to the highest."""
    axes.plot(x, values.mean(0), color=colour, **({"lw": 1.4} | style))
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


def from_base(axes: Axes, start: Array, x: Array, values: Array, colour: str) -> None:
    """Draws a curve of checkpoints [R, K] that starts at epoch 0 with the values `start`, [R]."""
    both = np.concatenate([start[:, None], values], 1)
    band(axes, np.concatenate([[0.0], x]), both, colour, marker="o", ms=3.5)


def bars(axes: Axes, x: float | Array, values: Array, colour: str, **style: Any) -> None:
    """Draws a dot at the mean over seeds of values [R], and a bar from the lowest to the highest.

    x: a place, or values [R] of their own, which get a bar too."""
    x, known = np.broadcast_to(x, values.shape), {"fmt": "o", "ms": 5, "lw": 1}
    errors = [[[v.mean() - v.min()], [v.max() - v.mean()]] for v in (values, x)]
    axes.errorbar(x.mean(), values.mean(), *errors, color=colour, **(known | style))


def level(axes: Axes, value: float, text: str = "base") -> None:
    """Draws a dotted line, such as that of the base's accuracy."""
    axes.axhline(value, color=GREY, lw=0.9, ls=":")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    axes.annotate(text, (1, value), (-2, 2), fontsize=8, color=GREY, **place)


def name_lines(axes: Axes, names: dict[str, str]) -> None:
    """Writes a legend {text: colour} where the panel is emptiest."""
    handles = [plt.Line2D([], [], color=colour, lw=2) for colour in names.values()]
    style = {"handlelength": 0.8, "labelspacing": 0.25, "borderaxespad": 0.2, "frameon": False}
    axes.legend(handles, list(names), fontsize=8, labelcolor="linecolor", **style)


# --------------------------------------------------------------------------------------------------
# 1. Training dynamics under extreme reuse


def draw_dynamics(runs: Runs) -> Drawn:
    """Draws CE, SAPO and GRPO over epochs on the same rollouts."""
    figure, grid = panels(2, 3, 5.0)
    (accuracy, entropy, outside), (positives, negatives, kl) = grid
    start = measured.base_accuracy(runs)
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}}
    keys = ("entropy", "ratio_outside_0.8_1.28", "prob_correct", "prob_wrong")
    for name, colour in COLOURS.items():
        epochs, accuracies, kls = measured.judged(runs, name, "accuracy", "kl")
        from_base(accuracy, start, epochs, accuracies, colour)
        from_base(kl, np.zeros(len(runs)), epochs, kls, colour)
        x, *lines = measured.logged(runs, name, *keys)
        for axes, line in zip((entropy, outside, positives, negatives), lines, strict=True):
            band(axes, x, line, colour)
        numbers[name] = measured.curve_numbers(epochs, accuracies, kls)
        numbers[name] |= measured.line_numbers(keys, x, lines)
    level(accuracy, start.mean())
    nats_axis(kl, floor=0)
    set_titles(
        grid.flat,
        "accuracy, held out",
        "entropy on the data, nats per token",
        "share of ratios outside 0.8 to 1.28",
        "token probability in correct responses",
        "token probability in wrong responses",
        "KL from the base, nats per response",
    )
    for axes in grid[1]:
        axes.set_xlabel("epochs on the same rollouts")
    accuracy.set_ylim(0, 1)
    name_lines(outside, {label(name): colour for name, colour in COLOURS.items()})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 2. Tightening the KL constraint


def draw_kl_constraint(runs: Runs) -> Drawn:
    """Draws SAPO under KL penalties: accuracy by epoch, and the best checkpoint with its KL."""
    names = measured.coefficients(runs[0])
    figure, ((by_epoch, peak, kl_there),) = panels(1, 3, 3.1, width_ratios=(1.5, 1, 1))
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1, len(names) - 1))
    colours = {0.0: PINK} | dict(zip(list(names)[1:], shades, strict=True))
    start, seeds = measured.base_accuracy(runs), np.arange(len(runs))
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}, "by_coefficient": {}}
    for place, (coefficient, name) in enumerate(names.items()):
        epochs, accuracy, kl = measured.judged(runs, name, "accuracy", "kl")
        colour, at = colours[coefficient], accuracy.argmax(1)
        from_base(by_epoch, start, epochs, accuracy, colour)
        bars(peak, place, accuracy.max(1), colour)
        bars(peak, place, accuracy[:, -1], colour, mfc="white")
        bars(kl_there, place, kl[seeds, at], colour)
        of_curve = measured.curve_numbers(epochs, accuracy, kl)
        numbers["by_coefficient"][f"{coefficient:g}"] = of_curve
    level(by_epoch, start.mean())
    name_lines(by_epoch, {f"{c:g}" if c else "no penalty": colours[c] for c in names})
    by_epoch.set(xlabel="epochs on the same rollouts", ylim=(0, 1))
    peak.set_ylim(0, 1)
    nats_axis(kl_there, threshold=0.1, floor=0)
    for axes in (peak, kl_there):
        axes.set_xticks(range(len(names)), [f"{c:g}" for c in names])
        axes.set(xlabel="KL coefficient", xlim=(-0.5, len(names) - 0.5))
    at_best = "KL at the best, nats per response"
    both = "best checkpoint; hollow: the last"
    set_titles((by_epoch, peak, kl_there), "accuracy, held out", both, at_best)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 3. Dynamics of the MSE loss

MSE_RUNS = {
    "mse_verdict": "target R",
    "mse_soft_value": "target R - V*",
    "mse_weak": "target R - V*",
}


def draw_mse(runs: Runs) -> Drawn:
    """Draws log-ratios of correct and of wrong responses, and accuracy, under three targets."""
    figure, grid = panels(3, len(MSE_RUNS), 6.2, sharex="col", sharey="row")
    start, numbers = measured.base_accuracy(runs), {}
    keys = ("log_ratio_correct", "log_ratio_wrong", "logprob")
    for column, (name, title) in enumerate(MSE_RUNS.items()):
        x, *lines = measured.logged(runs, name, *keys)
        epochs, accuracy, kl = measured.judged(runs, name, "accuracy", "kl")
        wanted = np.array([measured.asked(run, name) for run in runs])  # [R, 2]
        asks = " and ".join(f"{value:+.1f}" if value else "0" for value in wanted.mean(0))
        title = f"{title}, beta {measured.settings_of(runs[0], name)['beta']:g}\nasks {asks} nats"
        grid[0, column].set_title(title, fontsize=9)
        for axes, line, colour in zip(grid[:2, column], lines[:2], (BLUE, RED), strict=True):
            band(axes, x, line, colour)
            level(axes, 0, "")
            lowest = int(line.mean(0).argmin())
            axes.plot(x[lowest], line.mean(0)[lowest], marker="v", color=colour, ms=5)
        from_base(grid[2, column], start, epochs, accuracy, BLACK)
        level(grid[2, column], start.mean(), "")
        grid[2, column].set_xlabel("epochs on the same rollouts")
        numbers[name] = measured.spreads(("asked_of_correct", "asked_of_wrong"), wanted)
        numbers[name] |= measured.curve_numbers(epochs, accuracy, kl)
        numbers[name] |= measured.line_numbers(keys, x, lines)
    grid[0, 0].set_ylabel("log-ratio of correct\nresponses, nats")
    grid[1, 0].set_ylabel("log-ratio of wrong\nresponses, nats")
    grid[2, 0].set_ylabel("accuracy, held out")
    nats_axis(grid[1, 0])
    grid[2, 0].set_ylim(0, 1)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 4. KL efficiency before and after distillation

DISTILLED = {"ce": "student_strong", "sapo": "student_ruined", "unlearned": "student_unlearned"}
TEACHER_COLOURS = COLOURS | {"unlearned": ORANGE, "ce_gentle": SKY}
ENDS = ("accuracy", "kl", "kl_efficiency")


def draw_ends(axes: Axes, ends: dict[str, Array], column: int) -> None:
    """Draws squares of teachers, stars of their students, and arrows between them.

    ends: {name: [R, (accuracy, KL, efficiency)]}; column: which of these is the vertical axis."""
    for name, colour in TEACHER_COLOURS.items():
        x, y = ends[name][:, 1], ends[name][:, column]
        bars(axes, x, y, colour, fmt="s", ms=6, mec="white", mew=0.7, zorder=5)
        if name not in DISTILLED:
            continue
        student_x, student_y = ends[DISTILLED[name]][:, 1], ends[DISTILLED[name]][:, column]
        bars(axes, student_x, student_y, colour, fmt="*", ms=12, mec="white", mew=0.7, zorder=5)
        arrow = {"arrowstyle": "->", "color": colour, "lw": 0.8, "ls": (0, (2, 2))}
        arrow |= {"shrinkA": 6, "shrinkB": 8}
        end, begin = (student_x.mean(), student_y.mean()), (x.mean(), y.mean())
        axes.annotate("", end, begin, zorder=4, arrowprops=arrow)


def draw_best_efficiency(axes: Axes, base: report.Evaluation, largest: float) -> Array:
    """Draws the efficiency of the base re-weighted by exp(eta R) -> points (KL, efficiency)."""
    rates = torch.tensor(base.correct / base.count)
    accuracy, kl = report.tilted_optimum(rates, torch.linspace(0.02, 14, 400))
    efficiency = evaluate.kl_efficiency(accuracy, rates.mean().expand_as(accuracy), kl)
    keep = (kl > 0.02) & (kl < 1.6 * largest) & efficiency.isfinite()
    points = torch.stack([kl, efficiency], 1)[keep].numpy()
    axes.plot(*points.T, color="#555555", lw=1, ls=DASHED)
    axes.text(*points[-1], " optimum", fontsize=8, color="#555555", va="center")
    axes.axhline(1, color="#555555", lw=1)
    axes.axhspan(1, 1.1, color="#EEEEEE", zorder=0, lw=0)
    where = {"transform": axes.transAxes, "va": "top"}
    axes.text(0.02, 0.985, "out of reach", fontsize=8, color="#555555", **where)
    return points


def draw_efficiency(runs: Runs) -> Drawn:
    """Draws teachers with their early-stopping curves, and their students."""
    base, start = measured.pooled_base(runs), measured.base_accuracy(runs)
    names = (*TEACHER_COLOURS, *DISTILLED.values())
    values = {name: measured.values_of(runs, f"eval/{name}", ENDS) for name in names}
    ends = {name: np.nan_to_num(table) for name, table in values.items()}  # 0: not passed
    curves = {name: measured.judged(runs, name, *ENDS, under="curve") for name in TEACHER_COLOURS}
    of_ends = max(1.0, *(table[:, 1].max() for table in ends.values()))
    largest = max(of_ends, *(kl.max() for _, _, kl, _ in curves.values()))
    figure, ((accuracy_axes, efficiency_axes),) = panels(1, 2, 4.6)
    kl_axis(accuracy_axes, largest)
    kl_axis(efficiency_axes, largest)
    obstacles = [report.draw_limits(accuracy_axes, base, largest)]
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}, "curves": {}}
    numbers["ends"] = {name: measured.spreads(ENDS, table) for name, table in values.items()}
    for name, (epochs, accuracy, kl, efficiency) in curves.items():
        colour, shown = TEACHER_COLOURS[name], np.nan_to_num(efficiency)
        path = np.concatenate([[[0.0, start.mean()]], np.stack([kl, accuracy], 2).mean(0)])
        obstacles.append(straight_in_kl(path))
        accuracy_axes.plot(*obstacles[-1].T, color=colour, lw=1.1, alpha=0.8)
        accuracy_axes.plot(*path[1:].T, color=colour, marker="o", ms=3, ls="")
        efficiency_axes.plot(kl.mean(0), shown.mean(0), color=colour, lw=1.1, marker="o", ms=3)
        numbers["curves"][name] = {
            "accuracy": measured.along(epochs, accuracy),
            "kl": measured.along(epochs, kl),
            "kl_efficiency": measured.along(epochs, efficiency),
            "best_efficiency": measured.spread(shown.max(1)),
            "epoch_of_best_efficiency": measured.spread(epochs[shown.argmax(1)]),
        }
    draw_ends(accuracy_axes, ends, 0)
    draw_ends(efficiency_axes, ends, 2)
    best = draw_best_efficiency(efficiency_axes, base, largest)[:, 1]
    title = "square: a teacher's end; star: its student"
    set_titles((accuracy_axes, efficiency_axes), title, title)
    accuracy_axes.set(ylabel="accuracy, held out", ylim=(-0.03, 1.06))
    efficiency_axes.set(ylabel="KL efficiency (0: base not passed)", ylim=(-0.03, 1.1))
    labels = [(*ends[n].mean(0)[1::-1], label(n), c) for n, c in TEACHER_COLOURS.items()]
    drawing.place_labels(accuracy_axes, labels, np.concatenate(obstacles))
    numbers["optimum_efficiency"] = {"lowest": float(best.min()), "highest": float(best.max())}
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 5. The two distillation objectives

OBJECTIVES = {"regression": (RED, "o"), "pg": (BLUE, "s")}


def draw_objectives(runs: Runs) -> Drawn:
    """Draws students by regression and by policy gradient of one signal under the same budgets."""
    names, start = measured.budgets(runs[0]), measured.base_accuracy(runs)
    figure, ((near, efficiency_axes, kl_axes),) = panels(1, 3, 3.8, width_ratios=(2, 1, 1))
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}}
    largest = 0.1
    for objective, (colour, marker) in OBJECTIVES.items():
        folders = [f"paper/eval/student_{objective}{budget}" for budget in names]
        students = [
            measured.values_of(runs, folder, ENDS) for folder in folders
        ]  # [R, 3] for each budget
        near.plot(*np.mean(students, 1)[:, 1::-1].T, color=colour, lw=1)
        for place, (budget, values) in enumerate(zip(names, students, strict=True)):
            accuracy, kl, efficiency = values.T
            bars(near, kl, accuracy, colour, fmt=marker, zorder=5)
            bars(efficiency_axes, place, np.nan_to_num(efficiency), colour, fmt=marker)
            bars(kl_axes, place, kl, colour, fmt=marker)
            if objective == "pg":  # the other is beside it
                style = {"fontsize": 8.5, "color": GREY, "textcoords": "offset points"}
                near.annotate(budget, (kl.mean(), accuracy.min()), (4, -9), **style)
            numbers[f"{objective}{budget}"] = measured.spreads(ENDS, values)
            largest = max(largest, kl.max())
    near.set(xlim=(0, 1.25 * largest), ylim=(0.9 * start.min(), 1.06))
    near.set(xlabel="KL from the base, nats per response", ylabel="accuracy, held out")
    report.draw_limits(near, measured.pooled_base(runs), largest)
    titles = "grey: the budget, nats of the proxy", "KL efficiency", "KL; dotted: the budget"
    set_titles((near, efficiency_axes, kl_axes), *titles)
    for axes in (efficiency_axes, kl_axes):
        axes.set_xticks(range(len(names)), names)
        axes.set(xlabel="KL budget, nats", xlim=(-0.5, len(names) - 0.5))
    values = [float(budget) for budget in names]
    kl_axes.plot(range(len(names)), values, color=GREY, ls=":", marker="_", ms=14, lw=0.9)
    kl_axes.set_ylim(bottom=0)
    efficiency_axes.set_ylim(0, 1)
    name_lines(efficiency_axes, {name: colour for name, (colour, _) in OBJECTIVES.items()})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 6. Online and offline


def draw_online(runs: Runs) -> Drawn:
    """Draws stage 2 on fixed rollouts, and on fresh ones of the student every epoch."""
    tables = []
    for run in runs:
        rows = common.read_json(run / "online/online.json")["rows"]
        tables.append({row["name"]: row for row in rows})
        if tables[-1].keys() != tables[0].keys():
            raise UserError(f"{run / 'online/online.json'}: other turns than in {runs[0]}")
    turns = [name for name in tables[0] if name.startswith("turn")]
    figure, (row,) = panels(1, 3, 2.9)
    numbers: dict[str, Any] = {name: {} for name in tables[0]}
    for axes, key in zip(row, ENDS, strict=True):
        values = {}  # {name: [R, 1]}; null becomes nan
        for name in tables[0]:
            values[name] = np.array([[table[name][key][0]] for table in tables], dtype=float)
            numbers[name][key] = measured.spread(values[name][:, 0])
        if key == "kl":
            values["base"] = np.zeros((len(runs), 1))
        first = [] if key == "kl_efficiency" else ["base"]
        online = np.concatenate([values[name] for name in (*first, *turns)], 1)
        band(axes, np.arange(1 - len(first), len(turns) + 1), online, RED, marker="o", ms=4)
        # The first epoch is the same: the two part after it.
        offline = np.concatenate([values[turns[0]], values["offline"]], 1)
        band(axes, np.array([1, len(turns)]), offline, BLUE, marker="s", ms=4, ls=DASHED)
        axes.set_xticks(range(len(turns) + 1))
        axes.set_xlabel("epochs of stage 2")
    titles = "accuracy, held out", "KL from the base, nats per response", "KL efficiency"
    set_titles(row, *titles)
    name_lines(row[0], {"fresh rollouts each epoch": RED, "the base's rollouts": BLUE})
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 7. Recovery of a policy that was pushed down on everything

RECOVERIES = {"recovered_mse": ("MSE", BLUE), "recovered_sft": ("SFT", ORANGE)}


def draw_recovery(runs: Runs) -> Drawn:
    """Draws the way back of a collapsed policy: by MSE, and by SFT on the correct responses."""
    figure, grid = panels(2, 2, 5.0, sharex=True)
    keys = ("log_ratio_correct", "log_ratio_wrong", "entropy")
    _, *collapsed = (
        values[..., -1] for values in measured.judged(runs, "collapsed", "accuracy", "kl")
    )
    _, *before = measured.logged(runs, "collapsed", *keys)
    start = measured.base_accuracy(runs)
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}}
    numbers["base"] |= {
        key: measured.spread(line[:, 0]) for key, line in zip(keys, before, strict=True)
    }
    numbers["collapsed"] = measured.spreads(("accuracy", "kl"), np.stack(collapsed, 1))
    for name, (_, colour) in RECOVERIES.items():
        epochs, *curves = measured.judged(runs, name, "accuracy", "kl")
        for axes, begin, values in zip(grid[0], collapsed, curves, strict=True):
            from_base(axes, begin, epochs, values, colour)
        x, *lines = measured.logged(runs, name, *keys)
        band(grid[1, 0], x, lines[0], colour)
        band(grid[1, 0], x, lines[1], colour, ls=DASHED)
        band(grid[1, 1], x, lines[2], colour)
        numbers[name] = measured.curve_numbers(epochs, *curves)
        numbers[name] |= measured.line_numbers(keys, x, lines)
    level(grid[0, 0], start.mean())
    level(grid[1, 0], 0)
    level(grid[1, 1], before[2][:, 0].mean())
    grid[0, 0].set_ylim(0, 1)
    nats_axis(grid[0, 1], floor=0)
    nats_axis(grid[1, 0])
    set_titles(
        grid.flat,
        "accuracy, held out",
        "KL from the base, nats per response",
        "log-ratio, nats; solid: correct, dashed: wrong",
        "entropy on the data, nats per token",
    )
    for axes in grid[1]:
        axes.set_xlabel("epochs of recovery")
    name_lines(grid[0, 1], dict(RECOVERIES.values()))
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 8. Tokens of correct responses

EDGES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)  # of the bins of token probability
FAR = 0.5  # below this a token is far from one
POLICY_COLOURS = {"base": BLACK, "CE": BLUE, "SAPO": PINK}
KIND_TITLES = {
    "style": "choice of a connecting word",
    "word": "rest of that word",
    "copied": "copied number or sign",
    "result": "result of a step",
    "punctuation": "punctuation, \\boxed",
    "answer": "number in the box",
    "end": "end of the response",
    "other": "off the grammar",
}


def draw_bins(figure: Figure, axes: Axes, shares: dict[str, Array]) -> None:
    """Draws how the tokens of each policy are distributed over the bins of probability."""
    shades = plt.get_cmap("cividis")(np.linspace(0, 1, len(EDGES) + 1))
    for row, bins in enumerate(shares.values()):
        starts = np.cumsum([0, *bins[:-1]])
        axes.barh(np.full(len(bins), row), bins, left=starts, color=shades, height=0.6)
    axes.set_yticks(range(len(shares)), list(shares))
    for text, colour in zip(axes.get_yticklabels(), POLICY_COLOURS.values(), strict=True):
        text.set_color(colour)
    axes.invert_yaxis()
    axes.set_xlabel("share of the tokens")
    edges = [f"{edge:g}" for edge in EDGES]
    between = [f"{a} to {b}" for a, b in zip(edges, edges[1:], strict=False)]
    names = [f"< {edges[0]}", *between, f"> {edges[-1]}"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades]
    style = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 1}
    style |= {"ncols": len(names), "loc": "outside lower center"}
    figure.legend(handles, names, title="token probability", **style)


def draw_positives(runs: Runs) -> Drawn:
    """Draws how probable the tokens of correct responses are, and which kinds are not."""
    figure, ((bins_axes, of_far, of_kind),) = panels(1, 3, 3.4, width_ratios=(1.5, 1, 1))
    tokens = [measured.positive_tokens(run) for run in runs]
    present = [i for i in range(len(scribe.KINDS)) if any((kind == i).any() for kind, _ in tokens)]
    names = [scribe.KINDS[i] for i in present]
    of_all = np.array([[(kind == i).mean() for i in present] for kind, _ in tokens])
    numbers: dict[str, Any] = {"far": FAR, "edges": list(EDGES)}
    numbers["share_of_kind"] = measured.spreads(names, of_all)
    shares = {}
    for row, (name, colour) in enumerate(POLICY_COLOURS.items()):
        counts = []
        for _, p in tokens:
            places = np.searchsorted(EDGES, p[name], side="right")
            counts.append(np.bincount(places, minlength=len(EDGES) + 1) / len(places))
        bins = np.array(counts)  # [R, bins]
        shares[name] = bins.mean(0)
        # Of the far tokens the share of each kind; of the tokens of each kind the share far away.
        among_far = [[(k[p[name] < FAR] == i).mean() for i in present] for k, p in tokens]
        among_kind = [[(p[name][k == i] < FAR).mean() for i in present] for k, p in tokens]
        for axes, values in ((of_far, np.array(among_far)), (of_kind, np.array(among_kind))):
            y = np.arange(len(present)) + 0.22 * (row - 1)
            axes.hlines(y, values.min(0), values.max(0), color=colour, lw=1.2)
            axes.plot(values.mean(0), y, "o", color=colour, ms=4.5)
        numbers[name] = {
            "bins": [measured.spread(column) for column in bins.T],
            "share_far": measured.spread((p[name] < FAR).mean() for _, p in tokens),
            "share_of_the_far": measured.spreads(names, np.array(among_far)),
            "far_share_of_kind": measured.spreads(names, np.array(among_kind)),
        }
    draw_bins(figure, bins_axes, shares)
    for axes in (of_far, of_kind):
        axes.set_yticks(range(len(present)), [KIND_TITLES[name] for name in names])
        axes.invert_yaxis()
        axes.set_xlim(-0.03, 1.03)
    of_kind.set_yticklabels([])
    titles = f"of those below {FAR:g},\nshare of each kind", f"of each kind,\nshare below {FAR:g}"
    set_titles((bins_axes, of_far, of_kind), "tokens of correct responses by probability", *titles)
    return figure, numbers


# --------------------------------------------------------------------------------------------------
# 9. Sample efficiency

METHODS = {
    "erpd": ("ERPD, rounds", RED),
    "grpo": ("GRPO, on-policy rounds", GREEN),
    "fixed": ("GRPO, epochs on one set", BLUE),
}


def draw_minutes(axes: Axes, found: dict[str, list[tuple[Array, ...]]], timed: list[int]) -> None:
    """Draws accuracy by minutes, of the seeds that were timed throughout, and their mean."""
    for method, (_, colour) in METHODS.items():
        points = [found[method][i] for i in timed]
        for _, accuracy, took in points:
            axes.plot(took / 60, accuracy, color=colour, lw=0.6, alpha=0.5)
        _, accuracy, took = measured.shared_rounds(points)
        axes.plot(took.mean(0) / 60, accuracy.mean(0), color=colour, marker="o", ms=4, lw=1.4)
    axes.set_xlabel("minutes of sampling, scoring and training")


def scale_by_odds(axes: Axes, values: Array) -> None:
    """Makes a vertical axis on which halving the errors is as much at 0.98 as at 0.6."""
    inside = values[(values > 0) & (values < 1)]
    low, high = (0.1, 0.9) if inside.size == 0 else (inside.min(), inside.max())
    low, high = low / (1.2 - 0.2 * low), (1 + high) / 2
    ticks = [0.01, 0.03, *(tenth / 10 for tenth in range(1, 10)), 0.95, 0.98, 0.99, 0.995]
    ticks = [t for t in ticks if low <= t <= high]
    axes.set_yscale("logit")
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def draw_fixed(axes: Axes, rollouts: Array, accuracy: Array) -> None:
    """Draws GRPO on one set of rollouts: its best and its last epoch."""
    x, colour = rollouts[0, 0] / 1000, METHODS["fixed"][1]
    bars(axes, x, accuracy.max(1), colour, fmt="^", ms=6)
    bars(axes, x, accuracy[:, -1], colour, fmt="v", ms=6)
    style = {"color": colour, "textcoords": "offset points", "fontsize": 8, "va": "center"}
    line = {"arrowstyle": "-", "color": colour, "lw": 0.6}
    place = (x, accuracy[:, -1].mean())
    axes.annotate("best and last epoch", place, (25, -44), arrowprops=line, **style)


def draw_samples(runs: Runs) -> Drawn:
    """Draws accuracy by rollouts and by minutes: ERPD, on-policy GRPO, many epochs on one set."""
    erpd = ("unlearned", "signals.safetensors", "student")
    found = {
        "erpd": [measured.by_rounds(run, "rounds", "rounds/judged", *erpd) for run in runs],
        "grpo": [measured.by_rounds(run, "plateau", "paper/judged", "policy") for run in runs],
        "fixed": [measured.by_epochs(run) for run in runs],
    }
    timed = [i for i in range(len(runs)) if all(np.isfinite(p[i][2]).all() for p in found.values())]
    if len(timed) < len(runs):  # a step was interrupted, or made elsewhere: see seconds.jsonl
        print(f"samples.png: minutes of {len(timed)} of {len(runs)} seeds")
    figure, (row,) = panels(1, 2 if timed else 1, 3.8, sharey=True)
    axes, start = row[0], measured.base_accuracy(runs)
    if timed:
        draw_minutes(row[1], found, timed)
    numbers: dict[str, Any] = {"base": {"accuracy": measured.spread(start)}}
    for method, points in found.items():
        rollouts, accuracy, took = measured.shared_rounds(points)
        if method == "fixed":
            draw_fixed(axes, rollouts, accuracy)
            epochs = measured.judged(runs, "grpo", "accuracy")[0]
            numbers[method] = {
                "rollouts": measured.spread(rollouts[:, 0]),
                "by_epoch": measured.along(epochs, accuracy),
                "best": measured.spread(accuracy.max(1)),
                "last": measured.spread(accuracy[:, -1]),
                "seconds": measured.along(epochs, took[timed]),
            }
            continue
        colour, rounds = METHODS[method][1], range(accuracy.shape[1])
        for so_far, reached, _ in points:  # each to its own end
            axes.plot(so_far / 1000, reached, color=colour, lw=0.6, alpha=0.5)
        band(axes, rollouts.mean(0) / 1000, accuracy, colour, marker="o", ms=4)
        numbers[method] = {
            "rollouts": measured.along(rounds, rollouts),
            "by_round": measured.along(rounds, accuracy),
            "seconds": measured.along(rounds, took[timed]),
            "rounds_of_each_seed": [len(accuracy) - 1 for _, accuracy, _ in points],
            "last_of_each_seed": measured.spread(accuracy[-1] for _, accuracy, _ in points),
        }
    axes.set(xlabel="rollouts, thousands", ylabel="accuracy, held out")
    scale_by_odds(axes, np.concatenate([a for points in found.values() for _, a, _ in points]))
    level(axes, start.mean())
    name_lines(axes, dict(METHODS.values()))
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


def complete(name: str, runs: Runs) -> Runs:
    """Returns the seeds that have all that a figure needs, and says what the others lack."""
    found = []
    for run in runs:
        try:
            FIGURES[name]((run,))
            found.append(run)
        except UserError as error:
            print(f"{name}.png without {run.resolve().name}: {error}")
        except FileNotFoundError as error:
            print(f"{name}.png without {run.resolve().name}: {error.filename}: no such file")
        plt.close("all")  # also what was begun
    return tuple(found)


def main(args: Args) -> None:
    args.check()
    numbers: dict[str, Any] = {}
    for name, draw in FIGURES.items():
        runs = complete(name, args.runs)
        if runs:
            figure, values = draw(runs)
            numbers[name] = {"runs": [run.resolve().name for run in runs]} | values
            drawing.save_figure(figure, args.output / f"{name}.png")
    if not numbers:
        first = f"--runs {args.runs[0]}"
        raise UserError(f"{first}: nothing to draw from; run examples/arithmetic/figures.sh")
    measured.write_numbers(args.output / "numbers.json", numbers)
    print(f"{len(numbers)} figures in {args.output}, of {len(args.runs)} seeds at most")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
