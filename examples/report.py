"""Reports on one run: accuracy and KL of every policy. Do students beat stage 1 stopped early?

    equal KL        accuracy of the student minus that of the early-stopping path at the same KL
    equal accuracy  KL of the path where it first reaches the student's accuracy / KL of the student
    interval        95 %, by a bootstrap over the problems that all share: each resample holds the
                    same problems for the student, for every point of the path and for the base
    optimum share   KL of the tilted base at the accuracy of the policy / KL of the policy; only
                    with at least 32 samples of the base a problem, which give its pass rates

The temperatures of the base (eval/temperature-T, made by examples/temper.py) are one more path: the
rival that is free.

Reads   RUN/ base/ rollouts/ stage1/* signals/* students/* (what the stages wrote), eval/base eval/*
        (evaluations by evaluate.py), curve/NAME/epoch-* (evaluations of the checkpoints of
        stage1/NAME). Only eval/base is needed.
Writes  RUN/summary.json, RUN/figures/accuracy_kl.png, RUN/figures/dynamics.png and RUN/report.html,
        one page that loads nothing from elsewhere.

    python examples/report.py --run runs/arithmetic/seed0
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import drawing
from drawing import Array, label, place_labels, save_figure
from report_page import number, pass_shown, render

import common
import evaluate
from common import UserError

SETTINGS = ("temperature", "top_p", "max_new_tokens")  # of the sampling: must be equal to compare
TEMPERATURE = "temperature-"  # what the name of an evaluation of a tempered base begins with
BASE_SAMPLES = 32  # of a problem: with fewer, its pass rate is too uncertain for the optimum share
METRICS = ("accuracy", "pass@4", "pass@8", "kl", "k1", "kl_efficiency", "entropy")
METRICS += ("mean_length", "truncated")
RECIPE = ("loss", "objective", "invert_rewards", "unlearn", "epochs", "learning_rate", "kl_coef")
RECIPE += ("signal_scale", "signal_clip", "signal_floor", "token_kl", "kl_budget")


@dataclass
class Args:
    run: Path
    """run folder, as examples/arithmetic/run.sh leaves it"""
    resamples: int = 1000
    """bootstrap resamples of the problems behind every interval"""
    pairs: int = 3
    """show so many problems token by token, each with a correct and a wrong response"""
    seed: int = 0
    """seed of the bootstrap"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "resamples", lambda v: v >= 40, "40 or more, for a 95 % interval")
        common.require(self, "pairs", lambda v: v >= 0, "0 or more")


# --------------------------------------------------------------------------------------------------
# The mathematics. P problems, B bootstrap rows (row 0 is the sample itself), K points of a path.


def tilted_optimum(base_pass_rates: Tensor, etas: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and KL of the base re-weighted by exp(eta R), the optimum of KL-constrained RL.

    base_pass_rates [P], etas [E] -> two [E]. Where pass rates differ between problems, the KL is
    above `evaluate.least_kl` of the mean accuracy."""
    p, weight = base_pass_rates.double()[None], etas.double().exp()[:, None]
    a = p * weight / (p * weight + (1 - p))  # the bracket makes it exactly 1 at p = 1
    kl = torch.special.xlogy(a, a) - torch.special.xlogy(a, p)
    kl = kl + torch.special.xlogy(1 - a, 1 - a) - torch.special.xlogy(1 - a, 1 - p)
    return a.mean(1), kl.mean(1)


def tilted_kl_at(base_pass_rates: Array, weights: Array, accuracy: Array) -> Array:
    """Finds the KL of the tilted base that has a given accuracy, in every resample of the problems.

    base_pass_rates [P], weights [B, P], accuracy [B] -> [B]; nan where no tilt reaches it."""
    p = base_pass_rates.clip(1e-12, 1 - 1e-12)[None]  # no 0 / 0 below
    share = weights / weights.sum(1, keepdims=True)
    low, high = np.zeros((len(weights), 1)), np.full((len(weights), 1), 20.0)
    for _ in range(50):  # bisection of eta: the accuracy rises with it
        eta = (low + high) / 2
        a = p * np.exp(eta) / (p * np.exp(eta) + 1 - p)
        above = (share * a).sum(1, keepdims=True) > accuracy[:, None]
        low, high = np.where(above, low, eta), np.where(above, eta, high)
    kl = (share * evaluate.least_kl(torch.tensor(a), torch.tensor(p)).numpy()).sum(1)
    return np.where(eta[:, 0] < 19, kl, np.nan)


def bootstrap_weights(n_problems: int, resamples: int, seed: int) -> Array:
    """Counts how often each resample holds each problem: [1 + resamples, P]; row 0 is all ones."""
    draws = np.random.default_rng(seed).integers(n_problems, size=(resamples, n_problems))
    counts = np.stack([np.bincount(row, minlength=n_problems) for row in draws])
    return np.concatenate([np.ones((1, n_problems)), counts])


def resampled(weights: Array, total: Array, count: Array) -> Array:
    """Computes sum(total) / sum(count) in every resample: [B, P], two [P] -> [B]; 0 / 0 is nan."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ total) / (weights @ count)


def accuracy_at_kl(path_kl: Array, path_accuracy: Array, kl: Array) -> Array:
    """Reads the accuracy of a path at a given KL: [B, K], [B, K], [B] -> [B].

    Between neighbouring points the accuracy is linear in KL. Where several segments cover the KL
    the best of them counts, which favours the path. Beyond its largest KL its best accuracy counts,
    although more training might have improved it.

    A path from 0 to 2 and back to 1 nats, with accuracies .5, .7, .8, has .65 on its way out at
    1.5 nats and .75 on its way back:
    >>> path = np.array([[0.0, 2.0, 1.0]]), np.array([[0.5, 0.7, 0.8]])
    >>> accuracy_at_kl(*path, np.array([1.5])), accuracy_at_kl(*path, np.array([9.0]))
    (array([0.75]), array([0.8]))
    """
    x, start, end = kl[:, None], path_kl[:, :-1], path_kl[:, 1:]  # [B, 1], two [B, K-1]
    width = end - start
    share = np.divide(x - start, width, out=np.ones_like(width), where=width != 0)
    left, right = path_accuracy[:, :-1], path_accuracy[:, 1:]
    # A segment without width is a vertical line, of which the better end counts.
    on_segment = np.where(width != 0, left + share * (right - left), np.maximum(left, right))
    covers = (np.minimum(start, end) <= x) & (x <= np.maximum(start, end))
    best = np.where(covers, on_segment, -np.inf).max(1)
    return np.where(np.isfinite(best), best, path_accuracy.max(1))


def kl_at_accuracy(path_kl: Array, path_accuracy: Array, accuracy: Array) -> Array:
    """Finds the KL where a path first reaches an accuracy: two [B, K], [B] -> [B]; inf if never.

    >>> path = np.array([[0.0, 1.0, 3.0]]), np.array([[0.5, 0.7, 0.6]])
    >>> kl_at_accuracy(*path, np.array([0.6])), kl_at_accuracy(*path, np.array([0.9]))
    (array([0.5]), array([inf]))
    """
    rows = np.arange(len(path_kl))
    reached = path_accuracy >= accuracy[:, None]  # [B, K]
    point = reached.argmax(1)
    before = np.maximum(point - 1, 0)
    low, high = path_accuracy[rows, before], path_accuracy[rows, point]
    share = np.divide(accuracy - low, high - low, out=np.ones_like(low), where=high > low)
    kl = path_kl[rows, before] + share * (path_kl[rows, point] - path_kl[rows, before])
    return np.where(reached.any(1), np.where(point == 0, path_kl[:, 0], kl), np.inf)


def interval(values: Array) -> list[float | None]:
    """Returns the 95 % interval of [B] values without row 0; None for an end that is not finite."""
    ordered = np.sort(values[1:][~np.isnan(values[1:])])
    if not len(ordered):
        return [None, None]
    # Two of the values themselves: an interpolation could not cope with infinite neighbours.
    ends = ordered[int(0.025 * len(ordered))], ordered[math.ceil(0.975 * len(ordered)) - 1]
    return finite([float(end) for end in ends])


def estimate(name: str, values: Array) -> dict[str, Any]:
    """Returns {name: value of the sample, name_ci: its interval} of [B] values."""
    return finite({name: float(values[0]), f"{name}_ci": interval(values)})


def finite(value: Any) -> Any:
    """Returns the same structure with None for numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------
# Evaluations


@dataclass(frozen=True)
class Evaluation:
    """One folder of evaluate.py, summed over the responses of each of its P problems."""

    name: str
    folder: Path
    summary: dict[str, Any]  # metrics.json
    problems: list[tuple[str, str]]  # (id, text): a problem is the same where both are equal
    correct: Array  # [P]
    count: Array  # [P]
    kl: Array | None  # [P] nats, summed over kl_count responses; None without kl.safetensors
    kl_count: Array | None  # [P]

    @property
    def source(self) -> tuple[str, str]:
        """Where the model is from: ("stage1", run), ("students", run), or ("", "")."""
        found = re.search(r"(?:^|/)(stage1|students)/([^/]+)", self.summary["model"])
        return (found[1], found[2]) if found else ("", "")

    @property
    def is_student(self) -> bool:
        """Whether stage 2 made the model."""
        return self.source[0] == "students" or self.name.startswith("student_")

    def metric(self, name: str) -> float:
        """Returns one number of metrics.json; nan where it is missing."""
        value = self.summary["metrics"].get(name, (None, None))[0]
        return math.nan if value is None else value

    def places(self, shared: list[tuple[str, str]]) -> Array:
        """Returns the positions of the shared problems in this evaluation: [shared] int."""
        at = {problem: i for i, problem in enumerate(self.problems)}
        return np.array([at[problem] for problem in shared])

    def pass_at(self, k: int) -> Array | None:
        """Returns pass@k of every problem, [P], or None where one has fewer than k samples."""
        if k > self.count.min():
            return None
        values = evaluate.pass_at_k(torch.tensor(self.correct), torch.tensor(self.count), k)
        return values.numpy()


def is_tempered(evaluation: Evaluation) -> bool:
    """Returns whether it is the base at a temperature."""
    return evaluation.name.startswith(TEMPERATURE)


def load_evaluation(folder: Path, name: str) -> Evaluation:
    """Reads a finished evaluation folder. Raises UserError where a file is missing or broken."""
    summary = common.read_json(folder / "metrics.json")
    rows = evaluate.read_jsonl(folder / "problems.jsonl")
    keys = [(row["id"], row["problem"]) for row in rows]
    rollouts = common.load_rollouts(folder)
    index = rollouts.problem_index.numpy()
    correct = np.bincount(index, rollouts.rewards.double(), len(keys))
    count = np.bincount(index, minlength=len(keys)).astype(float)
    kl = kl_count = None
    if (folder / "kl.safetensors").is_file():
        arrays, _ = common.load_tensors(folder / "kl.safetensors")
        at = index[arrays["response"].numpy()]
        kl = np.bincount(at, arrays["kl"].double(), len(keys))
        kl_count = np.bincount(at, minlength=len(keys)).astype(float)
    return Evaluation(name, folder, summary, keys, correct, count, kl, kl_count)


Paths = dict[str, dict[float, Evaluation]]  # {stage-1 run: {epoch: its checkpoint}}, and tempered


def load_run(run: Path) -> tuple[dict[str, Evaluation], Paths]:
    """Loads all evaluations {name: ...}, base first, and the early-stopping paths of stage 1.

    The path "base" holds the base itself at epoch 0. Raises UserError without eval/base."""
    if not run.is_dir():
        raise UserError(f"--run {run}: no such folder; make it with examples/arithmetic/run.sh")
    if not (run / "eval/base/metrics.json").is_file():
        raise UserError(
            f"{run / 'eval/base'}: no finished evaluation of the base to compare with; run "
            f"evaluate.py --model {run / 'base'} --problems {run / 'test.jsonl'} "
            f"--output {run / 'eval/base'}"
        )
    evaluations = {"base": load_evaluation(run / "eval/base", "base")}
    for folder in sorted(path for path in run.glob("eval/*") if path.is_dir()):
        if not (folder / "metrics.json").is_file():
            print(f"note: {folder} is left out; it has no metrics.json yet")
        elif folder.name != "base":
            evaluations[folder.name] = load_evaluation(folder, folder.name)
    paths: Paths = {"base": {0.0: evaluations["base"]}}
    for file in sorted(run.glob("curve/*/epoch-*/metrics.json")):
        name, epoch = file.parts[-3], float(file.parts[-2].removeprefix("epoch-"))
        point = load_evaluation(file.parent, name)
        if point.kl is not None:
            paths.setdefault(name, {})[epoch] = point
    tempered = {
        float(name.removeprefix(TEMPERATURE)): replace(e, name="temperature")
        for name, e in evaluations.items()
        if is_tempered(e)
    }
    if tempered:
        paths["temperature"] = dict(sorted(tempered.items(), reverse=True))  # from 1 down
    for other in [*evaluations.values(), *(e for path in paths.values() for e in path.values())]:
        check_same_setting(evaluations["base"], other)
    return evaluations, paths


def check_same_setting(base: Evaluation, other: Evaluation) -> None:
    """Raises UserError where two evaluations were sampled differently and do not compare."""
    for name in SETTINGS:
        ours, theirs = (e.summary["sampling"][name] for e in (base, other))
        if ours != theirs:
            raise UserError(
                f"{other.folder}: {name} {theirs}, but {ours} in {base.folder}; evaluate it again"
            )


def optimum_share(evaluation: Evaluation, base: Evaluation) -> dict[str, float | None]:
    """Returns the optimum share and its standard error, by bootstrap over problems.

    None where the base has too few samples, or where the policy is not better than the base."""
    values = np.full(2, math.nan)
    if evaluation.kl is not None and base.count.min() >= BASE_SAMPLES:
        shared = shared_problems([evaluation, base])
        weights = bootstrap_weights(len(shared), 400, 0)
        accuracy, kl = resampled_policy(evaluation, shared, weights)
        rates = (base.correct / base.count)[base.places(shared)]
        with np.errstate(invalid="ignore", divide="ignore"):
            values = tilted_kl_at(rates, weights, accuracy) / kl
        better = accuracy > resampled_policy(base, shared, weights)[0]
        values = np.where(better, values, math.nan)
    error = float(np.nanstd(values)) if math.isfinite(values[0]) else math.nan
    return finite({"optimum_share": float(values[0]), "optimum_share_se": error})


def forecast_of(args: dict[str, Any], run: Path) -> dict[str, float]:
    """Returns what build_signals.py forecast for the bounds of a student, from its arguments."""
    path = run / "signals" / Path(args.get("signals") or "none").with_suffix(".json").name
    found = common.read_json(path).get("forecast") if path.is_file() else None
    rows = [found["given"], *found["frontier"]] if found else []
    bounds = ("signal_scale", "signal_clip", "signal_floor", "token_kl")
    rows = [row for row in rows if all(row[name] == args.get(name) for name in bounds)]
    return {f"forecast_{name}": rows[0][name] for name in ("accuracy", "kl")} if rows else {}


def policy_row(evaluation: Evaluation, base: Evaluation, run: Path) -> dict[str, Any]:
    """Makes the line of one evaluation in summary.json; what was not measured is None."""
    source = evaluation.source
    row: dict[str, Any] = {"name": evaluation.name, "label": label(evaluation.name)}
    row["kind"] = "student" if evaluation.is_student else source[0] or "other"
    for name in METRICS:
        value, error = evaluation.summary["metrics"].get(name, (None, None))
        name = name.replace("@", "_at_")
        row |= {name: value, f"{name}_se": error}
    row |= optimum_share(evaluation, base)
    if evaluation.name == "base":
        row |= {"kind": "base", "kl": 0.0, "kl_se": 0.0}
    row |= {"problems": len(evaluation.problems), "samples": int(evaluation.count.min())}
    recorded = run.joinpath(*source, "args.json")
    args = common.read_json(recorded)["args"] if source[0] and recorded.is_file() else {}
    off = (None, False, 0, math.inf)  # what a setting has that plays no part
    row |= forecast_of(args, run)
    row["recipe"] = {name: args[name] for name in RECIPE if args.get(name) not in off}
    return row


# --------------------------------------------------------------------------------------------------
# Comparisons: the question that would refute the method


def shared_problems(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    """Returns the problems that every evaluation has, in the first one's order, or UserError."""
    everywhere = set.intersection(*(set(e.problems) for e in evaluations))
    if not everywhere:
        first, last = evaluations[0].folder, evaluations[-1].folder
        raise UserError(
            f"{first} and {last} share no problem; evaluate both on one --problems file"
        )
    return [problem for problem in evaluations[0].problems if problem in everywhere]


def resampled_policy(
    e: Evaluation, shared: list[tuple[str, str]], weights: Array
) -> tuple[Array, Array]:
    """Computes accuracy and KL in every resample of the shared problems: two [B]."""
    at = e.places(shared)
    accuracy = resampled(weights, e.correct[at], e.count[at])
    if e.kl is None or e.kl_count is None:
        return accuracy, np.full(len(weights), 0.0 if e.name == "base" else np.nan)
    return accuracy, resampled(weights, e.kl[at], e.kl_count[at])


def comparison(
    student: tuple[Array, Array], theirs: tuple[Array, Array], passes: Array, missing: str
) -> dict[str, Any]:
    """Makes one line: differences of accuracy and pass@8, ratio of KLs, each with its interval.

    student, theirs: accuracy and KL, [B] each; passes: difference of pass@8, [B]; missing: why
    there is no ratio, if there is none."""
    (accuracy, kl), (their_accuracy, their_kl) = student, theirs
    firsts = {"student_accuracy": accuracy, "student_kl": kl, "their_accuracy": their_accuracy}
    row: dict[str, Any] = {name: float(values[0]) for name, values in firsts.items()}
    row |= estimate("accuracy_difference", accuracy - their_accuracy)
    row |= estimate("pass_at_8_difference", passes)
    with np.errstate(invalid="ignore", divide="ignore"):
        row |= estimate("kl_ratio", their_kl / kl)
    return row | {"kl_ratio_reason": missing if row["kl_ratio"] is None else None}


def compare_with_path(
    student: Evaluation, path: list[Evaluation], resamples: int, seed: int
) -> dict[str, Any]:
    """Compares a student with a path of K policies, base first: at equal KL, at equal accuracy."""
    shared = shared_problems([student, *path])
    weights = bootstrap_weights(len(shared), resamples, seed)
    accuracy, kl = resampled_policy(student, shared, weights)
    points = [resampled_policy(e, shared, weights) for e in path]
    path_accuracy, path_kl = (np.stack(v, 1) for v in zip(*points, strict=True))  # two [B, K]
    at_equal_kl = np.where(np.isnan(kl), np.nan, accuracy_at_kl(path_kl, path_accuracy, kl))
    reaching = kl_at_accuracy(path_kl, path_accuracy, accuracy)
    row = {"kind": "path", "student": student.name, "against": path[-1].name}
    missing = "never reached" if np.isinf(reaching[0]) else "no KL measured"
    unknown = np.full_like(kl, np.nan)  # pass@8: checkpoints have fewer than 8 samples
    row |= comparison((accuracy, kl), (at_equal_kl, reaching), unknown, missing)
    return row | {"problems": len(shared)}


def compare_with_policy(
    student: Evaluation, other: Evaluation, resamples: int, seed: int
) -> dict[str, Any]:
    """Compares a student with one other policy, problem by problem."""
    shared = shared_problems([student, other])
    weights = bootstrap_weights(len(shared), resamples, seed)
    ours, theirs = (resampled_policy(e, shared, weights) for e in (student, other))
    passed, their_passed = student.pass_at(8), other.pass_at(8)
    difference = np.full(len(shared), np.nan)
    if passed is not None and their_passed is not None:
        difference = passed[student.places(shared)] - their_passed[other.places(shared)]
    passes = resampled(weights, difference, np.ones(len(shared)))
    missing = "no KL measured"
    if other.name == "base":
        theirs, missing = (theirs[0], np.full_like(theirs[1], np.nan)), "the base has no KL"
    row = {"kind": "policy", "student": student.name, "against": other.name}
    return row | comparison(ours, theirs, passes, missing) | {"problems": len(shared)}


def compare(evaluations: dict[str, Evaluation], paths: Paths, args: Args) -> list[dict[str, Any]]:
    """Compares every student with every early-stopping path and every other evaluation."""
    rows, base = [], paths["base"][0.0]
    for student in (e for e in evaluations.values() if e.is_student):
        for run, points in paths.items():
            if run != "base":
                path = [base, *points.values()]
                rows.append(compare_with_path(student, path, args.resamples, args.seed))
        others = [e for e in evaluations.values() if e is not student and not is_tempered(e)]
        rows += [compare_with_policy(student, e, args.resamples, args.seed) for e in others]
    return rows


# --------------------------------------------------------------------------------------------------
# Signals


def formula(metadata: dict[str, Any]) -> str:
    """Writes what a signal is, such as "log base - log unlearned", from its file's metadata."""
    names = {}
    for role, model in metadata["models"].items():
        path = Path(model["path"])
        run = f"{path.parts[-3]} " if path.parent.name == "checkpoints" else ""
        names[role] = run + path.name
    terms = []
    for i, weight in enumerate(metadata["weights"]):
        term = f"log {names[f'teacher_{i}']} - log {names[f'reference_{i}']}"
        terms.append(term if metadata["weights"] == [1] else f"{weight:g} ({term})")
    of_family = [key for key in ("construction", "crossfit") if key in metadata]
    return " + ".join(terms) + "".join(f", {key} of examples/family" for key in of_family)


def signal_rows(run: Path) -> list[dict[str, Any]]:
    """Makes one line of summary.json for every signals file."""
    rows = []
    for path in sorted(run.glob("signals/*.safetensors")):
        report = common.read_json(path.with_suffix(".json"))
        row = {"name": path.stem, "formula": formula(report)}
        rows.append(row | {n: report.get(n) for n in ("auc", "credit_auc", "credit_auc_se")})
    return rows


# --------------------------------------------------------------------------------------------------
# Figures


def draw_limits(axes: Axes, base: Evaluation, largest_kl: float) -> Array:
    """Draws the bound d(a || p) and the optimum of the base's own pass rates.

    Returns the points of both curves, [n, 2]."""
    rates = torch.tensor(base.correct / base.count)
    mean = torch.tensor(base.correct.sum() / base.count.sum())
    accuracy = torch.linspace(float(mean), 1, 400, dtype=torch.float64)
    bound = evaluate.least_kl(accuracy, mean).clamp(min=0)
    ends = [*bound.tolist(), 2 * largest_kl], [*accuracy.tolist(), 1.0]
    axes.plot(*ends, color="#555555", lw=1)
    axes.fill_between(*ends, 1.1, color="#EEEEEE", zorder=0, lw=0)
    optimum, kl = tilted_optimum(rates, torch.linspace(0, 14, 400))
    axes.plot(kl, optimum, color="#555555", lw=1, ls=(0, (4, 2)))
    note = "grey: out of reach\ndashed: optimum"
    grey = {"fontsize": 8, "color": "#555555", "va": "top"}
    axes.text(0.015, 0.985, note, transform=axes.transAxes, **grey)
    return np.concatenate([np.array(ends).T, np.stack([kl.numpy(), optimum.numpy()], 1)])


def draw_policy(
    axes: Axes, e: Evaluation, colours: dict[str, str]
) -> tuple[float, float, str, str]:
    """Draws the marker of one evaluation with its errors. Returns its label for `place_labels`."""
    metrics = e.summary["metrics"]
    (accuracy, error), (kl, kl_error) = metrics["accuracy"], metrics.get("kl", (0.0, 0.0))
    colour, style = (
        colours.get(e.source[1], colours.get(e.name, drawing.PATH_COLOURS[-1])),
        {"fmt": "s"},
    )
    if e.is_student:
        colour, style = drawing.STUDENT_COLOUR, {"fmt": "*", "ms": 12}
    elif e.name == "base":
        colour, style = drawing.BASE_COLOUR, {"fmt": "D"}
    style = {"ms": 7, "mec": "white", "mew": 0.7, "capsize": 2, "elinewidth": 1} | style
    axes.errorbar(kl, accuracy, error, kl_error, color=colour, zorder=5, **style)
    return kl, accuracy, label(e.name), colour


def figure_accuracy_kl(
    evaluations: dict[str, Evaluation], paths: Paths, colours: dict[str, str]
) -> Figure:
    """Draws accuracy against KL: paths of stage 1, evaluations with errors, and the limits."""
    figure, ((axes,),) = drawing.panels(1, 1, (9, 5.8))
    measured = [e for e in evaluations.values() if e.kl is not None and e.name != "base"]
    measured = [e for e in measured if not is_tempered(e)]  # they are a path
    on_paths = [e for name, path in paths.items() if name != "base" for e in path.values()]
    largest = max([1.0, *(e.metric("kl") for e in measured + on_paths)])
    drawing.kl_axis(axes, largest)
    axes.set(ylim=(-0.03, 1.06), ylabel="accuracy on held-out problems")
    obstacles = [draw_limits(axes, evaluations["base"], largest)]
    labels = []
    for name, path in paths.items():
        if name == "base":
            continue
        points = [(0.0, paths["base"][0.0].metric("accuracy"))]
        points += [(e.metric("kl"), e.metric("accuracy")) for e in path.values()]
        line = drawing.straight_in_kl(np.array(points))
        axes.plot(*line.T, color=colours[name], lw=1.3, alpha=0.85)
        axes.plot(*np.array(points).T, color=colours[name], marker="o", ms=3.5, ls="")
        obstacles.append(line)
        if name not in evaluations:  # else the marker of the evaluation names the line
            what = "lower temperature" if name == "temperature" else f"{label(name)} path"
            labels.append((*points[-1], what, colours[name]))
    for e in [evaluations["base"], *measured]:
        labels.append(draw_policy(axes, e, colours))
    place_labels(axes, labels[::-1], np.concatenate(obstacles))
    return figure


DYNAMICS = {  # title: keys of metrics.jsonl
    "log-ratio to base,\nnats per response": ("log_ratio_correct", "log_ratio_wrong"),
    "token probability\n(geometric mean)": ("prob_correct", "prob_wrong"),
    "entropy,\nnats per token": ("entropy",),
    "share of ratios\noutside 0.8 to 1.28": ("ratio_outside_0.8_1.28",),
    "KL proxy,\nnats per response": ("kl_proxy",),
}
VERDICT_COLOURS = {"correct": "#0072B2", "wrong": "#D55E00"}


def figure_dynamics(runs: list[Path], paths: Paths, colours: dict[str, str]) -> Figure:
    """Draws stage 1 over epochs: one column for each run, one row for each quantity."""
    size = (max(9, 1.7 * len(runs)), 1.45 * (len(DYNAMICS) + 1))
    figure, grid = drawing.panels(len(DYNAMICS) + 1, len(runs), size, sharex="col", sharey="row")
    start = paths["base"][0.0].metric("accuracy")
    for column, folder in enumerate(runs):
        colour, path = colours[folder.name], paths.get(folder.name, {})
        top, *others = grid[:, column]
        top.set_title(label(folder.name), fontsize=10, color=colour)
        top.axhline(start, color="#888888", lw=0.8, ls=":")
        accuracy = [start, *(e.metric("accuracy") for e in path.values())]
        top.plot([0.0, *path], accuracy, color=colour, marker="o", ms=3, lw=1.2)
        rows = evaluate.read_jsonl(folder / "metrics.jsonl")
        for axes, keys in zip(others, DYNAMICS.values(), strict=True):
            for key in keys:
                shade = VERDICT_COLOURS.get(key.rpartition("_")[2], "#333333")
                steps = [(row["epoch"], row.get(key, math.nan)) for row in rows]
                line = drawing.average_steps(np.array(steps, dtype=float).T, 80)
                axes.plot(*line, color=shade, lw=1.2)
        others[-1].set_xlabel("epoch")
    grid[0, 0].set_ylim(0, 1)
    drawing.nats_axis(grid[1, 0])
    drawing.nats_axis(grid[-1, 0], floor=0)
    titles = ["accuracy on\nheld-out problems", *DYNAMICS]
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.set_ylabel(title, fontsize=8.5)
    for axes in grid[1:3, 0]:
        for (kind, colour), x in zip(VERDICT_COLOURS.items(), (0.0, 0.5), strict=True):
            axes.text(x, 1.02, kind, transform=axes.transAxes, fontsize=8.5, color=colour)
    return figure


# --------------------------------------------------------------------------------------------------


def summarize(evaluations: dict[str, Evaluation], paths: Paths, args: Args) -> dict[str, Any]:
    """Collects everything of summary.json."""
    order = {"base": 0, "stage1": 1, "other": 1, "student": 2}
    policies = [policy_row(e, evaluations["base"], args.run) for e in evaluations.values()]
    curve = []
    for run, points in paths.items():
        at = "temperature" if run == "temperature" else "epoch"
        curve += [
            {"run": run, at: t} | policy_row(e, evaluations["base"], args.run)
            for t, e in points.items()
        ]
    base = evaluations["base"]
    # The base often has more samples than the policies, for the optimum's curve.
    judged = [
        int(e.count.min()) for e in evaluations.values() if e is not base and not is_tempered(e)
    ]
    settings = {"problems": len(base.problems), "base_samples": int(base.count.min())}
    settings["samples"] = min(judged, default=settings["base_samples"])
    cooler = [int(e.count.min()) for e in evaluations.values() if is_tempered(e)]
    early = [row["samples"] for row in curve if "epoch" in row and row["run"] != "base"]
    spent = [
        int(e.kl_count.sum()) for e in evaluations.values() if e is not base and e.kl is not None
    ]
    settings["temperature_samples"] = min(cooler, default=None)
    settings["checkpoint_samples"] = min(early, default=None)
    settings["kl_responses"] = min(spent, default=None)
    settings |= {name: base.summary["sampling"][name] for name in ("seed", *SETTINGS)}
    settings |= {"resamples": args.resamples, "bootstrap_seed": args.seed}
    summary = {
        "settings": settings,
        "stage1_runs": sorted(f.parent.name for f in args.run.glob("stage1/*/metrics.jsonl")),
        "policies": sorted(policies, key=lambda row: order[row["kind"]]),
        "signals": signal_rows(args.run),
        "curve": curve,
        "comparisons": compare(evaluations, paths, args),
    }
    return finite(summary)


def main(args: Args) -> None:
    args.check()
    run = args.run
    evaluations, paths = load_run(run)
    summary = summarize(evaluations, paths, args)
    common.write_json(run / "summary.json", summary)
    names = sorted({*summary["stage1_runs"], *paths} - {"base"})
    colours = {
        name: drawing.PATH_COLOURS[i % len(drawing.PATH_COLOURS)] for i, name in enumerate(names)
    }
    colours["temperature"] = drawing.BASE_COLOUR  # it is the base
    figure = figure_accuracy_kl(evaluations, paths, colours)
    save_figure(figure, run / "figures/accuracy_kl.png")
    if summary["stage1_runs"]:
        runs = [run / "stage1" / name for name in summary["stage1_runs"]]
        save_figure(figure_dynamics(runs, paths, colours), run / "figures/dynamics.png")
    with common.atomic(run / "report.html") as temporary:
        temporary.write_text(render(run, summary, args.pairs), encoding="utf-8")
    for row in summary["policies"]:
        shown = pass_shown(summary["settings"])
        columns = [("accuracy", 3), (shown, 3), ("kl", 2), ("kl_efficiency", 2)]
        columns.append(("optimum_share", 2))
        cells = [f"{name} {number(row[name], row[f'{name}_se'], d):15s}" for name, d in columns]
        print(f"{row['label']:24s}", *cells)
    print(run / "report.html")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
