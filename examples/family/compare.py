"""Tables and two figures of what examples/family/run.sh made, over several seeds.

    students     accuracy, pass@k, KL, its efficiency and entropy, and how well the signal tells
                 right from wrong. found: the share of the first wrong tokens that stage 2 is asked
                 to lower. guilty: the share of all tokens it is asked to lower that are first wrong
                 ones. Then the accuracy minus the best that any objective has at the student's KL
                 when it is stopped early (whichever objective that is, which favours early
                 stopping), and accuracy and KL minus those of the default on the same problems.
    objectives   the end of the teacher, and its student against *its own* early-stopping curve at
                 equal KL, by a paired bootstrap over problems (examples/report.py). beyond: the
                 student has spent more KL than the curve has, and is compared with its best
                 accuracy instead.

Numbers are means ± standard deviations over seeds. A variant that failed is listed with its reason,
and one that is missing in some of the seeds with its number of seeds.

Reads   RUNS/ eval/base eval/student_* curve/* signals/ students/ rollouts/ failed/, as variants.py
        leaves them.
Writes  OUTPUT (Markdown), and beside it STEM_accuracy_kl.png and STEM_efficiency.png.

    python examples/family/compare.py --runs runs/family/seed1 runs/family/seed2 \\
        --output runs/family/results.md
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import drawing
import numpy as np
import report
import torch
import variants
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import common
import evaluate
import stage2_distill

COLOURS = dict(zip(variants.factors(), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
TITLES = {
    "objective": "objective of stage 1 (signal: teacher minus base)",
    "signal": "signal",
    "trust region": "trust region of stage 2 (signal: the default)",
    "stage 2": "objective of stage 2 (signal or cloned teacher: the first word of the flags)",
}
NEAR = (0.3, 1.0)  # nats, of the right half of the first figure: where most students lie
Row = dict[str, Any]


@dataclass
class Args:
    runs: tuple[Path, ...]
    """folders of examples/family/run.sh, one for each seed"""
    output: Path = Path("runs/family/results.md")
    """Markdown file to write; the figures are written beside it"""
    resamples: int = 1000
    """bootstrap resamples of the problems behind every interval"""
    seed: int = 0
    """seed of the bootstrap"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        if not self.runs:
            raise common.UserError("--runs: name at least one folder")
        report.Args(self.runs[0], resamples=self.resamples).check()


# --------------------------------------------------------------------------------------------------
# One seed


@dataclass(frozen=True)
class Seed:
    """What one run measured."""

    run: Path
    base: report.Evaluation
    students: dict[str, Row]  # name -> accuracy, pass, kl, ...; what was not measured is None
    teachers: dict[str, Row]  # objective -> its end
    curves: dict[str, list[report.Evaluation]]  # objective -> base, its checkpoints, longer ones
    own: dict[str, Row]  # objective -> its student against its own curve
    failed: dict[str, str]  # name -> why


def measured(evaluation: report.Evaluation) -> Row:
    """Returns the numbers of one evaluation; None: not measured."""
    metrics = evaluation.summary["metrics"]
    names = {"pass": "pass@4", "efficiency": "kl_efficiency"}
    keys = ("accuracy", "pass", "kl", "efficiency", "entropy")
    row = {key: metrics.get(names.get(key, key), (None, None))[0] for key in keys}
    return row | {"samples": int(evaluation.count.min())}


def best_stopped(student: report.Evaluation, curves: dict[str, list[report.Evaluation]]) -> float:
    """Returns the best accuracy of any curve at the student's KL; nan without curves."""
    found = [np.nan]
    for path in curves.values():
        shared = report.shared_problems([student, *path])
        once = np.ones((1, len(shared)))
        points = [report.resampled_policy(e, shared, once) for e in path]
        accuracy, kl = (np.stack(v, 1) for v in zip(*points, strict=True))
        at = report.resampled_policy(student, shared, once)[1]
        found.append(report.accuracy_at_kl(kl, accuracy, at)[0])
    return float(np.nanmax(found)) if len(found) > 1 else float("nan")


def signal_of(name: str) -> str | None:
    """Names the signals file that a student learnt from; None: it cloned a teacher."""
    if name in variants.CLONES:
        return None
    others = variants.TRUST | variants.STAGE2
    return others[name][0] if name in others else name


def guilty_tokens(rollouts: common.Rollouts) -> torch.Tensor:
    """Marks the first wrong token of each wrong response: [N] bool."""
    wrong = (rollouts.rewards == 0) & (rollouts.first_wrong_token > 0)
    places = (rollouts.cu_seqlens[:-1] + rollouts.first_wrong_token.long())[wrong]
    return torch.zeros(len(rollouts.tokens), dtype=torch.bool).index_fill(0, places, True)


def blame(student: Path, rollouts: common.Rollouts) -> Row:
    """Compares what a student was asked to lower with what was wrong: found and guilty.

    {} where it learnt from no signal."""
    if not (student / "args.json").is_file():
        return {}
    flags = SimpleNamespace(**common.read_json(student / "args.json")["args"])
    if not flags.signals or not Path(flags.signals).is_file():
        return {}
    arrays, _ = common.load_tensors(Path(flags.signals))
    down = stage2_distill.bounded_target(arrays["signal"], arrays["base_logprobs"], flags) < 0
    guilty = guilty_tokens(rollouts)
    both = (down & guilty).sum().item()
    found, share = both / max(1, guilty.sum().item()), both / max(1, down.sum().item())
    return {"found": found, "guilty": share}


def over_budget(student: Path) -> bool:
    """Tells whether the KL proxy passed its budget, which then ended the run."""
    budget = common.read_json(student / "args.json")["args"]["kl_budget"]
    rows = evaluate.read_jsonl(student / "metrics.jsonl")
    spent = [row["kl_proxy"] for row in rows if "kl_proxy" in row]
    return any(value is None or value > budget for value in spent)  # None: it was not finite


def failures(run: Path) -> dict[str, str]:
    """Returns {variant: part and reason} of the first part in which it failed."""
    found: dict[str, str] = {}
    for part in variants.PARTS:
        for file in sorted(run.glob(f"failed/{part}/*.txt")):
            found.setdefault(file.stem, f"{part}: {file.read_text().strip()}")
    return found


def load_seed(run: Path, args: Args) -> Seed:
    """Reads and compares one run. Raises UserError where its base has not been judged."""
    evaluations, paths = report.load_run(run)
    base = evaluations["base"]
    names = [name for name in variants.TEACHERS if name in paths]
    teachers = {name: measured(list(paths[name].values())[-1]) for name in names}
    curves = {
        name: [base, *paths[name].values(), *paths.get(f"{name}_longer", {}).values()]
        for name in names
    }
    students, own, rollouts = {}, {}, common.load_rollouts(run / "rollouts")
    default = evaluations.get(f"student_{variants.DEFAULT_SIGNAL}")
    for name in (name for table in variants.factors().values() for name in table):
        student = evaluations.get(f"student_{name}")
        if student is None:
            continue
        row = measured(student)
        row["gain"] = row["accuracy"] - best_stopped(student, curves)
        if default is not None and student is not default:
            row["against"] = report.compare_with_policy(student, default, args.resamples, args.seed)
            row["against"]["kl_difference"] = row["kl"] - measured(default)["kl"]
        signal = run / "signals" / f"{signal_of(name)}.json"
        diagnostics = common.read_json(signal) if signal.is_file() else {}
        row |= {key: diagnostics.get(key) for key in ("auc", "credit_auc")}
        row["over_budget"] = over_budget(run / "students" / name)
        students[name] = row | blame(run / "students" / name, rollouts)
        if name in curves:
            own[name] = report.compare_with_path(student, curves[name], args.resamples, args.seed)
            own[name]["beyond"] = row["kl"] > max(measured(e)["kl"] for e in curves[name][1:])
    return Seed(run, base, students, teachers, curves, own, failures(run))


# --------------------------------------------------------------------------------------------------
# Tables


def spread(values: list[float | None], form: str = "{:.3f}") -> str:
    """Writes mean ± standard deviation of the values that are known; n/a where none is."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "n/a"
    mean = form.format(statistics.mean(known))
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(known))}"


def table(head: str, rows: list[list[str]]) -> list[str]:
    """Makes the lines of a Markdown table; `head` names its columns, separated by " | "."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def numbers() -> dict[str, int]:
    """Returns {student: its number in table and figure}."""
    names = [name for lines in variants.factors().values() for name in lines]
    assert len(names) == len(set(names)), "two variants share a name"
    return {name: i for i, name in enumerate(names, 1)}


def reason(name: str, seeds: list[Seed]) -> str:
    """Says why a student is missing in some seeds; empty where it is in all."""
    missing = [seed for seed in seeds if name not in seed.students]
    said = {f"failed in {s.failed[name]}" if name in s.failed else "not made" for s in missing}
    return "; ".join(sorted(text.replace("|", "/") for text in said))


def beside_zero(intervals: list[list[float | None]]) -> tuple[int, int]:
    """Counts the intervals that lie above 0, and those below."""
    above = sum(low is not None and low > 0 for low, _ in intervals)
    below = sum(high is not None and high < 0 for _, high in intervals)
    return above, below


def against_default(found: list[Row]) -> list[str]:
    """Makes two cells: accuracy minus the default's, with the counts of `beside_zero`, and KL minus
    the default's KL."""
    rows = [row["against"] for row in found if "against" in row]
    if not rows:
        return ["", ""]
    above, below = beside_zero([row["accuracy_difference_ci"] for row in rows])
    accuracy = spread([row["accuracy_difference"] for row in rows], "{:+.3f}")
    kl = spread([row["kl_difference"] for row in rows], "{:+.2f}")
    return [f"{accuracy} ({above} / {below})", kl]


STUDENT_HEAD = (
    "# | variant | accuracy | pass@4 | KL, nats | KL efficiency | entropy | AUC | credit AUC | "
    "found | guilty | minus best early stop at its KL | minus the default | KL minus its KL | "
    "over budget | seeds | flags"
)
STUDENT_COLUMNS = {
    "accuracy": "{:.3f}",
    "pass": "{:.3f}",
    "kl": "{:.2f}",
    "efficiency": "{:.2f}",
    "entropy": "{:.3f}",
    "auc": "{:.3f}",
    "credit_auc": "{:.3f}",
    "found": "{:.2f}",
    "guilty": "{:.2f}",
    "gain": "{:+.3f}",
}


def student_row(name: str, flags: str, seeds: list[Seed]) -> list[str]:
    """Makes the line of one student."""
    found = [seed.students[name] for seed in seeds if name in seed.students]
    cells = [spread([row.get(k) for row in found], form) for k, form in STUDENT_COLUMNS.items()]
    missing, made = reason(name, seeds), str(len(found))
    if not found:
        cells = [missing, *[""] * (len(STUDENT_COLUMNS) - 1)]
    elif missing:
        made = f"{made} ({missing})"
    over = str(sum(row["over_budget"] for row in found) or "")
    number = str(numbers()[name])
    return [number, name, *cells, *against_default(found), over, made, f"`{flags}`"]


def students_table(seeds: list[Seed]) -> list[str]:
    """Makes the table of all students, factor by factor."""
    base, form = [measured(seed.base) for seed in seeds], STUDENT_COLUMNS
    accuracy, passed, entropy = (
        spread([row[key] for row in base], form[key]) for key in ("accuracy", "pass", "entropy")
    )
    cells = ["", "base", accuracy, passed, "0", "n/a", entropy, *[""] * 8, str(len(seeds)), ""]
    rows = [cells]
    for factor, lines in variants.factors().items():
        rows.append(["", f"**{TITLES[factor]}**", *[""] * (len(cells) - 2)])
        rows += [student_row(name, flags, seeds) for name, flags in lines.items()]
    return table(STUDENT_HEAD, rows)


CURVE_HEAD = (
    "objective | teacher: accuracy | KL | student: accuracy | KL | student minus curve at its KL | "
    "95 % intervals, seed by seed | above / below 0 | beyond | "
    "KL at equal accuracy: curve over student"
)


def interval_text(ends: list[float | None]) -> str:
    """Writes [+0.031, +0.050]; an end that is not known is "open"."""
    return f"[{', '.join('open' if end is None else f'{end:+.3f}' for end in ends)}]"


def own_curve_row(name: str, seeds: list[Seed]) -> list[str]:
    """Makes the line of one objective: its teacher's end, and its student against its curve."""
    ends = [seed.teachers[name] for seed in seeds if name in seed.teachers]
    own = [seed.own[name] for seed in seeds if name in seed.own]
    if not ends or not own:
        return [name, reason(name, seeds) or "no curve", *[""] * 8]
    intervals = [row["accuracy_difference_ci"] for row in own]
    above, below = beside_zero(intervals)
    ratio = spread([row["kl_ratio"] for row in own], "{:.2f}")
    if never := sum(row["kl_ratio"] is None for row in own):
        ratio = f"{ratio}; never reached in {never}" if never < len(own) else "never reached"
    return [
        name,
        spread([row["accuracy"] for row in ends]),
        spread([row["kl"] for row in ends], "{:.2f}"),
        spread([row["student_accuracy"] for row in own]),
        spread([row["student_kl"] for row in own], "{:.2f}"),
        spread([row["accuracy_difference"] for row in own], "{:+.3f}"),
        "; ".join(map(interval_text, intervals)),
        f"{above} / {below}",
        str(sum(row["beyond"] for row in own) or ""),
        ratio,
    ]


def own_curve_table(seeds: list[Seed]) -> list[str]:
    """Makes the table of the objectives."""
    return table(CURVE_HEAD, [own_curve_row(name, seeds) for name in variants.TEACHERS])


def teachers_table(seeds: list[Seed]) -> list[str]:
    """Makes the table of the curves, checkpoint by checkpoint: accuracy at KL."""
    epochs = sorted({e for seed in seeds for path in seed.curves.values() for e in epochs_of(path)})
    rows = []
    for name in variants.TEACHERS:
        cells = []
        for epoch in epochs:
            points = [p for seed in seeds if (p := at_epoch(seed, name, epoch)) is not None]
            accuracy = spread([p["accuracy"] for p in points])
            kl = spread([p["kl"] for p in points], "{:.2f}")
            cells.append(f"{accuracy} at {kl}" if points else "n/a")
        rows.append([name, *cells])
    return table(" | ".join(["objective", *(f"{epoch:g} epochs" for epoch in epochs)]), rows)


def epochs_of(path: list[report.Evaluation]) -> list[float]:
    """Reads the epochs of a curve's checkpoints from the names of their folders."""
    return [float(e.folder.name.removeprefix("epoch-")) for e in path[1:]]


def at_epoch(seed: Seed, name: str, epoch: float) -> Row | None:
    """Returns the numbers of one checkpoint; None where it is missing."""
    path = seed.curves.get(name, [seed.base])
    found = dict(zip(epochs_of(path), path[1:], strict=True))
    return measured(found[epoch]) if epoch in found else None


# --------------------------------------------------------------------------------------------------
# Figures


def average(rows: list[Row], key: str) -> tuple[float, float]:
    """Returns mean and standard deviation of what is known; nan and 0 where nothing is."""
    known = [row[key] for row in rows if row[key] is not None]
    if not known:
        return float("nan"), 0.0
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def draw_curves(axes: Axes, seeds: list[Seed]) -> None:
    """Draws early-stopping curves: means over seeds at each epoch, linear in KL between them."""
    start = average([measured(seed.base) for seed in seeds], "accuracy")[0]
    for name in variants.TEACHERS:
        epochs = sorted({e for s in seeds for e in epochs_of(s.curves.get(name, [s.base]))})
        points = [(0.0, start)]
        for epoch in epochs:
            rows = [p for seed in seeds if (p := at_epoch(seed, name, epoch)) is not None]
            points.append((average(rows, "kl")[0], average(rows, "accuracy")[0]))
        if epochs:
            line = np.array(points)
            axes.plot(*drawing.straight_in_kl(line).T, color="#AAAAAA", lw=0.9, zorder=2)
            axes.plot(*line[1:].T, color="#888888", marker="o", ms=2.5, ls="", zorder=3)


def draw_students(axes: Axes, seeds: list[Seed]) -> list[tuple[float, float, str, str]]:
    """Draws means and deviations of all students. Returns (KL, accuracy, number, colour) of those
    within the axes."""
    labels = []
    for factor, lines in variants.factors().items():
        colour = COLOURS[factor]
        look = {"color": colour, "ecolor": (colour, 0.5), "fmt": "o", "ms": 5, "mec": "white"}
        for name in lines:
            rows = [seed.students[name] for seed in seeds if name in seed.students]
            (kl, kl_sd), (accuracy, sd) = average(rows, "kl"), average(rows, "accuracy")
            if not np.isfinite(kl):
                continue
            axes.errorbar(kl, accuracy, sd, kl_sd, mew=0.6, elinewidth=0.8, zorder=5, **look)
            if NEAR[0] < kl < NEAR[1] and accuracy > axes.get_ylim()[0]:
                labels.append((kl, accuracy, str(numbers()[name]), colour))
    return labels


def figure_accuracy_kl(seeds: list[Seed]) -> Figure:
    """Draws all students, the curves, the bound and the optimum: on the left over all KLs, on the
    right where most students lie, by number."""
    figure, ((whole, near),) = drawing.panels(1, 2, (13, 6))
    pooled = replace(
        seeds[0].base,
        correct=np.concatenate([seed.base.correct for seed in seeds]),
        count=np.concatenate([seed.base.count for seed in seeds]),
    )
    ends = [measured(e)["kl"] for s in seeds for path in s.curves.values() for e in path[1:]]
    largest = max([NEAR[1], *(row["kl"] for s in seeds for row in s.students.values()), *ends])
    start = average([measured(seed.base) for seed in seeds], "accuracy")[0]
    drawing.kl_axis(whole, largest)
    near.set(xlim=NEAR, xlabel=whole.get_xlabel())
    whole.set(ylim=(-0.03, 1.06), ylabel="accuracy on held-out problems")
    near.set_ylim((2 * start + 1) / 3, 1.06)
    for axes in (whole, near):
        obstacles = report.draw_limits(axes, pooled, largest)
        draw_curves(axes, seeds)
        labels = draw_students(axes, seeds)
    lines = [(f"student, by {factor}", colour) for factor, colour in COLOURS.items()]
    for i, (text, colour) in enumerate([*lines, ("grey: objectives stopped early", "#777777")]):
        place = (0.03, 0.03 + 0.04 * i)
        whole.text(*place, text, color=colour, transform=whole.transAxes, fontsize=9)
    if labels:
        drawing.place_labels(near, labels, obstacles)
    return figure


def draw_efficiency(axes: Axes, factor: str, seeds: list[Seed], rows: int) -> None:
    """Draws one column: a dot for each seed, a bar for their mean, the best student on top."""
    known = {}
    for name in variants.factors()[factor]:
        found = [seed.students[name] for seed in seeds if name in seed.students]
        if found:
            known[name] = [row["efficiency"] or 0.0 for row in found]
    shown = sorted(known, key=lambda name: statistics.mean(known[name]))
    places, colour = range(rows - len(shown), rows), COLOURS[factor]
    for y, name in zip(places, shown, strict=True):
        values = known[name]
        axes.plot([min(values), max(values)], [y, y], color=colour, lw=1, alpha=0.5)
        axes.plot(values, [y] * len(values), "o", color=colour, ms=4, alpha=0.6, mew=0)
        axes.plot(statistics.mean(values), y, "|", color=colour, ms=11, mew=2)
    axes.set_yticks(places, [f"{name}  {numbers()[name]}" for name in shown])
    axes.set_ylim(-0.7, rows - 0.3)
    axes.grid(visible=False, axis="y")
    axes.set_title(factor, color=colour)
    axes.set_xlabel("KL efficiency")


def figure_efficiency(seeds: list[Seed]) -> Figure:
    """Draws the KL efficiency of all students by factor; 0 where one did not pass the base."""
    rows = max(map(len, variants.factors().values()))
    size = (13, 0.27 * rows + 1.2)
    figure, (columns,) = drawing.panels(1, len(variants.factors()), size, sharex=True)
    for axes, factor in zip(columns, variants.factors(), strict=True):
        draw_efficiency(axes, factor, seeds, rows)
    return figure


# --------------------------------------------------------------------------------------------------


PAGE = """\
# Every objective, signal and trust region on the same data

Mean ± standard deviation over {n_seeds} seeds, with fresh problems and a fresh base each;
{problems} held-out problems x {students} samples for students, x {curves} for checkpoints of
stage 1, x {base} for the base; temperature {temperature:g}, top-p {top_p:g}, at most
{max_new_tokens} tokens. The flags are those of variants.py, in which every variant is one line.
All students: `{budget}` (nats of the proxy).

## Students

{students_table}

The default of the signals is also where the trust regions start: `{default}`, base minus a policy
trained on inverted verdicts. *Found*: share of the first wrong tokens that stage 2 is asked to
lower. *Guilty*: share of the tokens it is asked to lower that are first wrong ones. *Minus best
early stop*: accuracy minus the best that any of the objectives has at this KL when it is stopped
early (picked after the fact, which favours it). *Minus the default*: accuracy minus that of the
default on the same problems; in brackets the number of seeds in which the 95 % interval (paired
bootstrap over problems) lies above 0 / below 0. *Over budget*: number of seeds in which the
student's proxy passed its budget, so that the run ended at its last checkpoint within it.

![Accuracy against KL]({stem}_accuracy_kl.png)

![KL efficiency by factor]({stem}_efficiency.png)

KL efficiency: a dot for each seed, a bar for their mean; 0 where a student did not pass the base.

## Each objective: student against its own early-stopping curve

At equal KL; paired bootstrap over the problems of each seed, {resamples} resamples; in how many
seeds the 95 % interval lies above or below 0. *Beyond*: in how many seeds the student has spent
more KL than any checkpoint, so that it is compared with the best of the curve, at less KL.

{own_curve_table}

## Checkpoints of stage 1: accuracy at KL

{teachers_table}

Made by `python examples/family/compare.py --runs {runs} --output {output}` after
`SEED=N bash examples/family/run.sh` for each seed.
"""


def listed(values: set[int]) -> str:
    """Writes {4} as "4", and an empty set as "no"."""
    return "/".join(map(str, sorted(values))) or "no"


def page(seeds: list[Seed], args: Args) -> str:
    """Makes the Markdown file."""
    sampling = seeds[0].base.summary["sampling"]
    of_curves = {measured(e)["samples"] for s in seeds for p in s.curves.values() for e in p[1:]}
    of_students = {row["samples"] for seed in seeds for row in seed.students.values()}
    return PAGE.format(
        n_seeds=len(seeds),
        problems=len(seeds[0].base.problems),
        students=listed(of_students),
        curves=listed(of_curves),
        base=measured(seeds[0].base)["samples"],
        budget=variants.BUDGET,
        default=variants.DEFAULT_SIGNAL,
        stem=args.output.stem,
        resamples=args.resamples,
        runs=" ".join(map(str, args.runs)),
        output=args.output,
        students_table="\n".join(students_table(seeds)),
        own_curve_table="\n".join(own_curve_table(seeds)),
        teachers_table="\n".join(teachers_table(seeds)),
        **{name: sampling[name] for name in ("temperature", "top_p", "max_new_tokens")},
    )


def main(args: Args) -> None:
    args.check()
    seeds = [load_seed(run, args) for run in args.runs]
    stem = args.output.with_suffix("")
    figures = {"accuracy_kl": figure_accuracy_kl(seeds), "efficiency": figure_efficiency(seeds)}
    for name, figure in figures.items():
        drawing.save_figure(figure, stem.with_name(f"{stem.name}_{name}.png"))
    with common.atomic(args.output) as temporary:
        temporary.write_text(page(seeds, args), encoding="utf-8")
    print("\n".join(students_table(seeds)))
    files = [run / "seconds.json" for run in args.runs if (run / "seconds.json").is_file()]
    minutes = sum(sum(common.read_json(file).values()) for file in files) / 60
    print(f"{args.output}; {len(seeds)} seeds in {minutes:.0f} minutes")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
