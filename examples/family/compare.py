"""Tables and two figures of what examples/family/run.sh made, over seeds.

    students     accuracy, pass@k, KL, its efficiency, entropy; how well the signal tells right from
                 wrong; found: the share of the first wrong tokens that stage 2 is asked to lower,
                 guilty: the share of all tokens it is asked to lower that are first wrong ones;
                 accuracy minus the best that any objective has at the student's KL when it is
                 stopped early (whichever objective that is: in favour of early stopping); and
                 accuracy and KL minus those of the default on the same problems
    objectives   the teacher's end, and its student against *its own* early-stopping curve at equal
                 KL: paired bootstrap over problems (examples/report.py); beyond: the student has
                 spent more KL than the curve has, and is compared with its best accuracy instead

Mean ± standard deviation over seeds. A variant that failed stands there with its reason, one that
has not been made in some of the seeds with its number of seeds.

Reads   RUNS/ eval/base eval/student_* curve/* signals/ students/ rollouts/ failed/, as variants.py
        leaves them.
Writes  OUTPUT (Markdown), beside it STEM_accuracy_kl.png and STEM_efficiency.png.

    python examples/family/compare.py --runs runs/family/seed1 runs/family/seed2 \\
        --output runs/family/results.md
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import report
import torch
import variants
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import common
import stage2_distill

COLOURS = {
    "objective": "#0072B2", "signal": "#D55E00", "trust region": "#009E73", "stage 2": "#CC79A7"
}  # fmt: skip
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
    """folders of examples/family/run.sh, one a seed"""
    output: Path = Path("runs/family/results.md")
    """Markdown file to write; the figures stand beside it"""
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
    """The numbers of one evaluation."""
    metrics = evaluation.summary["metrics"]
    names = {"accuracy": "accuracy", "pass": "pass@4", "kl": "kl",
             "efficiency": "kl_efficiency", "entropy": "entropy"}  # fmt: skip
    row = {name: metrics.get(key, (None, None))[0] for name, key in names.items()}
    return row | {"samples": int(evaluation.count.min())}


def best_stopped(student: report.Evaluation, curves: dict[str, list[report.Evaluation]]) -> float:
    """Best accuracy that a curve has at the student's KL; nan without curves."""
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
    """The signals file that a student was made of; None: it cloned a teacher."""
    if name in variants.CLONES:
        return None
    others = variants.TRUST | variants.STAGE2
    return others[name][0] if name in others else name


def guilty_tokens(rollouts: common.Rollouts) -> torch.Tensor:
    """[N] bool: the first wrong token of each wrong response."""
    wrong = (rollouts.rewards == 0) & (rollouts.first_wrong_token > 0)
    places = (rollouts.cu_seqlens[:-1] + rollouts.first_wrong_token.long())[wrong]
    return torch.zeros(len(rollouts.tokens), dtype=torch.bool).index_fill(0, places, True)


def blame(student: Path, rollouts: common.Rollouts) -> Row:
    """What it was asked to lower against what was wrong -> found, guilty; {}: made of no signal."""
    if not (student / "args.json").is_file():
        return {}
    flags = common.read_json(student / "args.json")["args"]
    if not flags["signals"] or not Path(flags["signals"]).is_file():
        return {}
    arrays = common.load_tensors(Path(flags["signals"]), {})[0]
    signal, base_logprobs = arrays["signal"], arrays["base_logprobs"]
    down = stage2_distill.bounded_target(signal, base_logprobs, **flags) < 0
    guilty = guilty_tokens(rollouts)
    both = (down & guilty).sum().item()
    return {
        "found": both / max(1, guilty.sum().item()), "guilty": both / max(1, down.sum().item())
    }  # fmt: skip


def over_budget(student: Path) -> bool:
    """Did its KL proxy ever pass the budget, so that the budget shaped it? Without one: no."""
    budget = common.read_json(student / "args.json")["args"]["kl_budget"]
    spent = [row.get("kl_proxy", 0.0) for row in common.read_jsonl(student / "metrics.jsonl")]
    return budget is not None and max(spent) > budget


def failures(run: Path) -> dict[str, str]:
    """{variant: part and reason} of the first part in which it failed."""
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
    """mean ± standard deviation of the values that are known; n/a where none is."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "n/a"
    mean = form.format(statistics.mean(known))
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(known))}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def numbers() -> dict[str, int]:
    """{student: its number in table and figure}."""
    names = [name for lines in variants.factors().values() for name in lines]
    assert len(names) == len(set(names)), "two variants share a name"
    return {name: i for i, name in enumerate(names, 1)}


def reason(name: str, seeds: list[Seed]) -> str:
    """Why a student is missing in some seeds; empty where it is in all."""
    missing = [seed for seed in seeds if name not in seed.students]
    said = {f"failed in {s.failed[name]}" if name in s.failed else "not made" for s in missing}
    return "; ".join(sorted(text.replace("|", "/") for text in said))


def beside_zero(intervals: list[list[float | None]]) -> tuple[int, int]:
    """How many intervals lie above 0, and how many below."""
    above = sum(low is not None and low > 0 for low, _ in intervals)
    below = sum(high is not None and high < 0 for _, high in intervals)
    return above, below


def against_default(found: list[Row]) -> list[str]:
    """Cells: accuracy minus the default's with the intervals beside 0, and KL minus its KL."""
    rows = [row["against"] for row in found if "against" in row]
    if not rows:
        return ["", ""]
    above, below = beside_zero([row["accuracy_difference_ci"] for row in rows])
    accuracy = spread([row["accuracy_difference"] for row in rows], "{:+.3f}")
    kl = spread([row["kl_difference"] for row in rows], "{:+.2f}")
    return [f"{accuracy} ({above} / {below})", kl]


def students_table(seeds: list[Seed]) -> list[str]:
    """All students, factor by factor."""
    head = ["#", "variant", "accuracy", "pass@4", "KL, nats", "KL efficiency", "entropy",
            "AUC", "credit AUC", "found", "guilty", "minus best early stop at its KL",
            "minus the default", "KL minus its KL", "over budget", "seeds", "flags"]  # fmt: skip
    columns = {"accuracy": "{:.3f}", "pass": "{:.3f}", "kl": "{:.2f}", "efficiency": "{:.2f}",
               "entropy": "{:.3f}", "auc": "{:.3f}", "credit_auc": "{:.3f}", "found": "{:.2f}",
               "guilty": "{:.2f}", "gain": "{:+.3f}"}  # fmt: skip
    rows, number = [], numbers()
    base = [measured(seed.base) for seed in seeds]
    cells = [spread([row[k] for row in base], columns[k]) for k in ("accuracy", "pass")]
    rows.append(["", "base", *cells, "0", "n/a", spread([row["entropy"] for row in base]),
                 *[""] * 8, str(len(seeds)), ""])  # fmt: skip
    for factor, lines in variants.factors().items():
        rows.append(["", f"**{TITLES[factor]}**", *[""] * (len(head) - 2)])
        for name, flags in lines.items():
            found = [seed.students[name] for seed in seeds if name in seed.students]
            cells = [spread([row.get(k) for row in found], form) for k, form in columns.items()]
            missing, made = reason(name, seeds), str(len(found))
            if not found:
                cells = [missing, *[""] * (len(columns) - 1)]
            elif missing:
                made = f"{made} ({missing})"
            over = str(sum(row["over_budget"] for row in found) or "")
            rows.append([str(number[name]), name, *cells, *against_default(found), over, made,
                         f"`{flags}`"])  # fmt: skip
    return table(head, rows)


def own_curve_table(seeds: list[Seed]) -> list[str]:
    """Each objective: its teacher's end, and its student against its own curve."""
    head = ["objective", "teacher: accuracy", "KL", "student: accuracy", "KL",
            "student minus curve at its KL", "95 % intervals, seed by seed", "above / below 0",
            "beyond", "KL at equal accuracy: curve over student"]  # fmt: skip
    rows = []
    for name in variants.TEACHERS:
        ends = [seed.teachers[name] for seed in seeds if name in seed.teachers]
        own = [seed.own[name] for seed in seeds if name in seed.own]
        if not ends or not own:
            rows.append([name, reason(name, seeds) or "no curve", *[""] * (len(head) - 2)])
            continue
        above, below = beside_zero([row["accuracy_difference_ci"] for row in own])
        intervals = [report.with_interval(row, "accuracy_difference") for row in own]
        ratio = spread([row["kl_ratio"] for row in own], "{:.2f}")
        if never := sum(row["kl_ratio"] is None for row in own):
            ratio = f"{ratio}; never reached in {never}" if never < len(own) else "never reached"
        rows.append([
            name, spread([r["accuracy"] for r in ends]), spread([r["kl"] for r in ends], "{:.2f}"),
            spread([r["student_accuracy"] for r in own]),
            spread([r["student_kl"] for r in own], "{:.2f}"),
            spread([r["accuracy_difference"] for r in own], "{:+.3f}"),
            "; ".join(text.split(maxsplit=1)[1] for text in intervals), f"{above} / {below}",
            str(sum(r["beyond"] for r in own) or ""), ratio,
        ])  # fmt: skip
    return table(head, rows)


def teachers_table(seeds: list[Seed]) -> list[str]:
    """The curves, checkpoint by checkpoint: accuracy at KL."""
    epochs = sorted({e for seed in seeds for path in seed.curves.values() for e in epochs_of(path)})
    rows = []
    for name in variants.TEACHERS:
        cells = []
        for epoch in epochs:
            points = [p for seed in seeds if (p := at_epoch(seed, name, epoch)) is not None]
            accuracy, kl = (spread([p[k] for p in points], f) for k, f in
                            (("accuracy", "{:.3f}"), ("kl", "{:.2f}")))  # fmt: skip
            cells.append(f"{accuracy} at {kl}" if points else "n/a")
        rows.append([name, *cells])
    return table(["objective", *(f"{epoch:g} epochs" for epoch in epochs)], rows)


def epochs_of(path: list[report.Evaluation]) -> list[float]:
    """Epochs of a curve's checkpoints, from the names of their folders."""
    return [float(e.folder.name.removeprefix("epoch-")) for e in path[1:]]


def at_epoch(seed: Seed, name: str, epoch: float) -> Row | None:
    """The numbers of one checkpoint; None where it is not there."""
    path = seed.curves.get(name, [seed.base])
    found = dict(zip(epochs_of(path), path[1:], strict=True))
    return measured(found[epoch]) if epoch in found else None


# --------------------------------------------------------------------------------------------------
# Figures


def average(rows: list[Row], key: str) -> tuple[float, float]:
    """Mean and standard deviation of what is known; nan, 0 where nothing is."""
    known = [row[key] for row in rows if row[key] is not None]
    if not known:
        return float("nan"), 0.0
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def draw_curves(axes: Axes, seeds: list[Seed]) -> None:
    """Early-stopping curves, means over seeds at each epoch, linear in KL between them."""
    start = average([measured(seed.base) for seed in seeds], "accuracy")[0]
    for name in variants.TEACHERS:
        epochs = sorted({e for s in seeds for e in epochs_of(s.curves.get(name, [s.base]))})
        points = [(0.0, start)]
        for epoch in epochs:
            rows = [p for seed in seeds if (p := at_epoch(seed, name, epoch)) is not None]
            points.append((average(rows, "kl")[0], average(rows, "accuracy")[0]))
        line, share = np.array(points), np.linspace(0, 1, 40)[:, None]
        walked = [a + share * (b - a) for a, b in zip(line[:-1], line[1:], strict=True)]
        if walked:
            axes.plot(*np.concatenate(walked).T, color="#AAAAAA", lw=0.9, zorder=2)
            axes.plot(*line[1:].T, color="#888888", marker="o", ms=2.5, ls="", zorder=3)


def figure_accuracy_kl(seeds: list[Seed]) -> Figure:
    """All students (means, deviation over seeds), the curves, the bound and the optimum: once over
    all KLs, once where most students lie, by number."""
    figure, both = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    pooled = replace(
        seeds[0].base,
        correct=np.concatenate([seed.base.correct for seed in seeds]),
        count=np.concatenate([seed.base.count for seed in seeds]),
    )
    ends = [measured(e)["kl"] for s in seeds for path in s.curves.values() for e in path[1:]]
    largest = max([NEAR[1], *(row["kl"] for s in seeds for row in s.students.values()), *ends])
    number, labels = numbers(), []
    start = average([measured(seed.base) for seed in seeds], "accuracy")[0]
    for axes in both:
        if axes is both[0]:
            axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
            axes.set_xlim(-0.02, 1.6 * largest)
            ticks = [t for t in (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300) if t <= 1.6 * largest]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            axes.set_xticks([], minor=True)
        else:
            axes.set_xlim(*NEAR)
        axes.set_ylim(-0.03 if axes is both[0] else (2 * start + 1) / 3, 1.06)
        obstacles = report.draw_limits(axes, pooled, largest)
        draw_curves(axes, seeds)
        for factor, lines in variants.factors().items():
            for name in lines:
                rows = [seed.students[name] for seed in seeds if name in seed.students]
                (kl, kl_sd), (accuracy, sd) = average(rows, "kl"), average(rows, "accuracy")
                if not rows or not np.isfinite(kl):
                    continue
                axes.errorbar(kl, accuracy, sd, kl_sd, fmt="o", color=COLOURS[factor], ms=5,
                              ecolor=(COLOURS[factor], 0.5), mec="white", mew=0.6, elinewidth=0.8,
                              zorder=5)  # fmt: skip
                if axes is both[1] and NEAR[0] < kl < NEAR[1] and accuracy > axes.get_ylim()[0]:
                    labels.append((kl, accuracy, str(number[name]), COLOURS[factor]))
        axes.set_xlabel("KL(policy || base), nats a response")
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("accuracy on held-out problems")
    for i, (factor, colour) in enumerate(COLOURS.items()):
        both[0].text(0.03, 0.03 + 0.04 * i, f"student, by {factor}", color=colour,
                     transform=both[0].transAxes, fontsize=9)  # fmt: skip
    both[0].text(0.03, 0.19, "grey: objectives stopped early", color="#777777",
                 transform=both[0].transAxes, fontsize=9)  # fmt: skip
    if labels:
        report.place_labels(both[1], labels, obstacles)
    return figure


def figure_efficiency(seeds: list[Seed]) -> Figure:
    """KL efficiency of every student, one column a factor; 0 where it did not pass the base."""
    families = variants.factors()
    rows = max(map(len, families.values()))
    height = 0.27 * rows + 1.2
    figure, columns = plt.subplots(
        1, len(families), figsize=(13, height), layout="constrained", sharex=True
    )
    for axes, (factor, lines) in zip(columns, families.items(), strict=True):
        known = {
            name: [
                seed.students[name]["efficiency"] or 0.0 for seed in seeds if name in seed.students
            ]
            for name in lines
        }
        shown = sorted((n for n in known if known[n]), key=lambda n: statistics.mean(known[n]))
        places = range(rows - len(shown), rows)  # the best on top
        for y, name in zip(places, shown, strict=True):
            values = known[name]
            axes.plot([min(values), max(values)], [y, y], color=COLOURS[factor], lw=1, alpha=0.5)
            axes.plot(values, [y] * len(values), "o", color=COLOURS[factor], ms=4, alpha=0.6, mew=0)
            axes.plot(statistics.mean(values), y, "|", color=COLOURS[factor], ms=11, mew=2)
        axes.set_yticks(places, [f"{name}  {numbers()[name]}" for name in shown])
        axes.set_ylim(-0.7, rows - 0.3)
        axes.tick_params(labelsize=8.5)
        axes.set_title(factor, color=COLOURS[factor], fontsize=10)
        axes.set_xlabel("KL efficiency", fontsize=9)
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --------------------------------------------------------------------------------------------------


def listed(values: set[int]) -> str:
    """{4} -> "4"; none: "no"."""
    return "/".join(map(str, sorted(values))) or "no"


def page(seeds: list[Seed], args: Args) -> str:
    """The Markdown file."""
    sampling = seeds[0].base.summary["sampling"]
    of_curves = {measured(e)["samples"] for s in seeds for p in s.curves.values() for e in p[1:]}
    of_students = {row["samples"] for seed in seeds for row in seed.students.values()}
    stem, names = args.output.stem, " ".join(map(str, args.runs))
    return "\n".join([
        "# Every objective, signal and trust region on the same data",
        "",
        f"Mean ± standard deviation over {len(seeds)} seeds (fresh problems and a fresh base each);"
        f" {len(seeds[0].base.problems)} held-out problems x {listed(of_students)} samples for "
        f"students, x {listed(of_curves)} for checkpoints of stage 1, x "
        f"{measured(seeds[0].base)['samples']} for the base; "
        f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most "
        f"{sampling['max_new_tokens']} tokens. The flags are "
        "those of variants.py, in which every variant is one line; all students: "
        f"`{variants.BUDGET}` (nats of the proxy).",
        "",
        "## Students",
        "",
        *students_table(seeds),
        "",
        "The default of the signals is the start of the trust regions too: `"
        f"{variants.DEFAULT_SIGNAL}`, base minus a policy trained on inverted verdicts. *Found*: "
        "share of the first wrong tokens that stage 2 is asked to lower. *Guilty*: share of the "
        "tokens it is asked to lower that are first wrong ones. *Minus best "
        "early stop*: accuracy minus the best that any of the objectives has at this KL when it is "
        "stopped early (picked after the fact, which favours it). *Minus the default*: accuracy "
        "minus that of the default on the same problems; in brackets the seeds in which the 95 % "
        "interval (paired bootstrap over problems) lies above 0 / below 0. *Over budget*: seeds in "
        "which the student's proxy passed its budget, so that its rate was halved: it is shaped by "
        "the budget.",
        "",
        f"![Accuracy against KL]({stem}_accuracy_kl.png)",
        "",
        f"![KL efficiency by factor]({stem}_efficiency.png)",
        "",
        "KL efficiency: a dot a seed, a bar their mean; 0 where a student did not pass the base.",
        "",
        "## Each objective: student against its own early-stopping curve",
        "",
        "At equal KL; paired bootstrap over the problems of each seed, "
        f"{args.resamples} resamples; in how many seeds the 95 % interval lies above or below 0. "
        "*Beyond*: in how many the student has spent more KL than any checkpoint, so that it is "
        "compared with the best of the curve, at less KL.",
        "",
        *own_curve_table(seeds),
        "",
        "## Checkpoints of stage 1: accuracy at KL",
        "",
        *teachers_table(seeds),
        "",
        f"Made by `python examples/family/compare.py --runs {names} --output {args.output}` after "
        "`SEED=N bash examples/family/run.sh` for each seed.",
        "",
    ])  # fmt: skip


def main(args: Args) -> None:
    args.check()
    seeds = [load_seed(run, args) for run in args.runs]
    stem = args.output.with_suffix("")
    figures = {"accuracy_kl": figure_accuracy_kl(seeds), "efficiency": figure_efficiency(seeds)}
    for name, figure in figures.items():
        report.save_figure(figure, stem.with_name(f"{stem.name}_{name}.png"))
    with common.atomic(args.output) as temporary:
        temporary.write_text(page(seeds, args))
    print("\n".join(students_table(seeds)))
    minutes = [sum(common.read_json(r / "seconds.json").values()) / 60 for r in args.runs
               if (r / "seconds.json").is_file()]  # fmt: skip
    print(f"{args.output}; {len(seeds)} seeds in {sum(minutes):.0f} minutes")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
