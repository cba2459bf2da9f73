"""Report of one run: accuracy and KL of every policy, and do students beat early stopping?

    equal KL        accuracy of the student minus that of the early-stopping path at its KL
    equal accuracy  KL of the path where it first reaches the student's accuracy / KL of the student
    interval        95 %, paired bootstrap over the problems both share, drawn jointly for the
                    student, every point of the path and the base, accuracies and KLs alike

Reads   RUN/ base/ rollouts/ stage1/* signals/* students/* (folders of the stages), eval/base eval/*
        (evaluations by evaluate.py), curve/base curve/NAME/epoch-* (evaluations of the checkpoints
        of stage1/NAME). What is absent is left out, except eval/base.
Writes  RUN/summary.json, RUN/figures/accuracy_kl.png, RUN/figures/dynamics.png, RUN/report.html
        (one page, nothing loaded from elsewhere).

    python examples/report.py --run runs/arithmetic/seed0
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as LinePath
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import evaluate
from common import UserError

Array = np.ndarray

LABELS = {"ce": "CE", "sapo": "SAPO", "grpo": "GRPO", "mse": "MSE", "sft": "SFT"}
PATH_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe-Ito
STUDENT_COLOUR, BASE_COLOUR = "#D55E00", "#000000"
RECIPE = (
    "loss", "objective", "invert_rewards", "unlearn", "epochs", "learning_rate", "kl_coef",
    "signal_scale", "signal_clip", "signal_floor", "token_kl", "kl_budget",
)  # fmt: skip
METRICS = (
    "accuracy", "pass@8", "kl", "k1", "kl_efficiency", "entropy", "mean_length", "truncated",
)  # fmt: skip
PAGE_BYTES = 2_000_000  # at most, the whole page
PAGE_TOKENS = 8000  # tokens on the token page, over all signals: 150 to 200 bytes each
SIGNAL_QUANTILE = 0.98  # |signal| at which a colour is full


@dataclass
class Args:
    run: Path
    """run folder, as examples/arithmetic/run.sh leaves it"""
    resamples: int = 1000
    """bootstrap resamples of the problems behind every interval"""
    pairs: int = 3
    """problems on the token page at most, each with a correct and a wrong response"""
    seed: int = 0
    """seed of the bootstrap"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        if self.resamples < 40:
            raise UserError(f"--resamples {self.resamples}: a 95 % interval needs 40 or more")
        if self.pairs < 0:
            raise UserError(f"--pairs {self.pairs}: must be 0 or more")


# -------------------------------------------------------------------------------------------------
# The mathematics. P problems, B bootstrap rows (row 0 is the sample itself), K points of a path.


def bootstrap_weights(n_problems: int, resamples: int, seed: int) -> Array:
    """How often each problem was drawn -> [1 + resamples, P] float64; row 0 draws each once."""
    draws = np.random.default_rng(seed).integers(n_problems, size=(resamples, n_problems))
    drawn = np.stack([np.bincount(row, minlength=n_problems) for row in draws])
    return np.concatenate([np.ones((1, n_problems)), drawn])


def resampled(weights: Array, total: Array, count: Array) -> Array:
    """sum(total)/sum(count) per resample: [B, P], [P], [P] -> [B]; nan where none was drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ total) / (weights @ count)


def accuracy_at_kl(path_kl: Array, path_accuracy: Array, kl: Array) -> Array:
    """Accuracy of a path at a KL: [B, K], [B, K], [B] -> [B].

    Linear in KL between consecutive points of the path as walked. Where several segments cover the
    KL, the best of them, which favours the path; beyond the path's largest KL, its best accuracy,
    which need not: with more training it might have had more.

    0 -> 2 -> 1 nats with accuracy .5 -> .7 -> .8: at 1.5 the way out gives .65, the way back .75.
    >>> path = np.array([[0.0, 2.0, 1.0]]), np.array([[0.5, 0.7, 0.8]])
    >>> accuracy_at_kl(*path, np.array([1.5])), accuracy_at_kl(*path, np.array([9.0]))
    (array([0.75]), array([0.8]))
    """
    x, start, end = kl[:, None], path_kl[:, :-1], path_kl[:, 1:]  # [B, 1], two [B, K-1]
    width = end - start
    share = np.divide(x - start, width, out=np.ones_like(width), where=width != 0)
    left, right = path_accuracy[:, :-1], path_accuracy[:, 1:]
    # A segment without width is a vertical line: its better end counts.
    on_segment = np.where(width != 0, left + share * (right - left), np.maximum(left, right))
    covers = (np.minimum(start, end) <= x) & (x <= np.maximum(start, end))
    best = np.where(covers, on_segment, -np.inf).max(1)
    return np.where(np.isfinite(best), best, path_accuracy.max(1))


def kl_at_accuracy(path_kl: Array, path_accuracy: Array, accuracy: Array) -> Array:
    """KL where a path first reaches an accuracy: [B, K], [B, K], [B] -> [B]; inf if never.

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
    """95 % interval of [B] values, row 0 left out; an end that is infinite or unknown is None."""
    # Order statistics, not interpolated quantiles: infinities are never averaged.
    ordered = np.sort(values[1:][~np.isnan(values[1:])])
    if not len(ordered):
        return [None, None]
    ends = ordered[int(0.025 * len(ordered))], ordered[math.ceil(0.975 * len(ordered)) - 1]
    return [float(end) if np.isfinite(end) else None for end in ends]


def estimate(name: str, values: Array) -> dict[str, Any]:
    """{name: value of the sample, name_ci: its interval} of [B] values; None where not finite."""
    value = float(values[0])
    return {name: value if math.isfinite(value) else None, f"{name}_ci": interval(values)}


def finite(value: Any) -> Any:
    """The same structure with None for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def binned(x: Array, y: Array, bins: int) -> tuple[Array, Array]:
    """Means of neighbouring steps, at most `bins`, nan left out: two [steps] -> two [points]."""
    keep = ~np.isnan(y)
    if not keep.any():
        return x[keep], y[keep]
    n_points = min(bins, int(keep.sum()))
    x_parts, y_parts = (np.array_split(v[keep], n_points) for v in (x, y))
    return np.array([part.mean() for part in x_parts]), np.array([part.mean() for part in y_parts])


# -------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Evaluation:
    """One folder of evaluate.py, summed over the responses of each of its P problems."""

    name: str
    folder: Path
    summary: dict[str, Any]  # metrics.json
    problems: list[tuple[str, str]]  # (id, text): evaluations share a problem where both are equal
    correct: Array  # [P]
    count: Array  # [P]
    kl: Array | None  # [P] nats, summed over kl_count responses; None without kl.safetensors
    kl_count: Array | None  # [P]

    @property
    def source(self) -> tuple[str, str]:
        """Where the policy stands: ("stage1", run), ("students", run), or ("", "")."""
        found = re.search(r"(?:^|/)(stage1|students)/([^/]+)", self.summary["model"])
        return (found[1], found[2]) if found else ("", "")

    @property
    def is_student(self) -> bool:
        return self.source[0] == "students" or self.name.startswith("student_")

    def places(self, shared: list[tuple[str, str]]) -> Array:
        """Where the shared problems stand in this evaluation -> [shared] int."""
        at = {problem: i for i, problem in enumerate(self.problems)}
        return np.array([at[problem] for problem in shared])

    def pass_at(self, k: int) -> Array | None:
        """pass@k of every problem [P]; None where a problem has fewer samples."""
        if k > self.count.min():
            return None
        values = evaluate.pass_at_k(torch.tensor(self.correct), torch.tensor(self.count), k)
        return values.numpy()


def load_evaluation(folder: Path, name: str) -> Evaluation:
    """Reads a finished evaluation folder. Raises UserError where a file is missing or broken."""
    summary, problems = common.read_json(folder / "metrics.json"), folder / "problems.jsonl"
    keys = [(row["id"], row["problem"]) for row in common.read_jsonl(problems)]
    rollouts = common.load_rollouts(folder)

    def total(values: torch.Tensor, index: torch.Tensor) -> Array:
        """Sum over each problem."""
        return evaluate.by_problem(values, index, len(keys)).numpy()

    kl = kl_count = None
    if (folder / "kl.safetensors").is_file():
        arrays, _ = common.load_tensors(folder / "kl.safetensors", {"kl": torch.float32})
        at = rollouts.problem_index[arrays["response"]]
        kl, kl_count = total(arrays["kl"], at), total(torch.ones(len(at)), at)
    index = rollouts.problem_index
    correct, count = total(rollouts.rewards, index), total(torch.ones(len(index)), index)
    return Evaluation(name, folder, summary, keys, correct, count, kl, kl_count)


def finished(folder: Path) -> list[Path]:
    """Evaluation folders within `folder`, by name; unfinished ones are named and left out."""
    folders = sorted(path for path in folder.glob("*") if path.is_dir())
    done = [path for path in folders if (path / "metrics.json").is_file()]
    for path in folders:
        if path not in done and not any(path.glob("epoch-*")):
            print(f"left out: {path} has no metrics.json yet; repeat its evaluate.py command")
    return done


def load_run(run: Path) -> tuple[dict[str, Evaluation], dict[str, dict[float, Evaluation]]]:
    """Full evaluations {name: ...}, base first, and early-stopping paths {run: {epoch: ...}}.

    The path "base" holds the base itself at epoch 0. Raises UserError without eval/base."""
    if not run.is_dir():
        raise UserError(f"--run {run}: no such folder; make it with examples/arithmetic/run.sh")
    if not (run / "eval" / "base" / "metrics.json").is_file():
        raise UserError(
            f"{run / 'eval' / 'base'}: no finished evaluation of the base to compare with; run "
            f"evaluate.py --model {run / 'base'} --problems {run / 'test.jsonl'} "
            f"--output {run / 'eval' / 'base'}"
        )
    evaluations = {path.name: load_evaluation(path, path.name) for path in finished(run / "eval")}
    base = evaluations.pop("base")
    evaluations = {"base": base} | evaluations
    paths: dict[str, dict[float, Evaluation]] = {"base": {0.0: base}}
    for folder in sorted(path for path in run.glob("curve/*") if path.is_dir()):
        if folder.name == "base" and (folder / "metrics.json").is_file():
            paths["base"] = {0.0: load_evaluation(folder, "base")}
            continue
        named = [p for p in finished(folder) if re.fullmatch(r"epoch-\d+(\.\d+)?", p.name)]
        points = sorted((float(path.name.removeprefix("epoch-")), path) for path in named)
        loaded = [(epoch, load_evaluation(path, folder.name)) for epoch, path in points]
        if measured := {epoch: e for epoch, e in loaded if e.kl is not None}:
            paths[folder.name] = measured
    for other in [*evaluations.values(), *(e for path in paths.values() for e in path.values())]:
        check_same_setting(base, other)
    return evaluations, paths


def check_same_setting(base: Evaluation, other: Evaluation) -> None:
    """Raises UserError where two evaluations were sampled differently: they do not compare."""
    for name in evaluate.SHARED_SAMPLING:
        ours, theirs = (e.summary["sampling"][name] for e in (base, other))
        if ours != theirs:
            raise UserError(
                f"{other.folder}: {name} {theirs}, but {ours} in {base.folder}; evaluate it again"
            )


def policy_row(evaluation: Evaluation, run: Path) -> dict[str, Any]:
    """The line of one evaluation in summary.json; what was not measured is None."""
    metrics, source = evaluation.summary["metrics"], evaluation.source
    row: dict[str, Any] = {"name": evaluation.name, "label": label(evaluation.name)}
    row["kind"] = "student" if evaluation.is_student else source[0] or "other"
    for name in METRICS:
        value, error = metrics.get(name, (None, None))
        name = name.replace("@", "_at_")
        row |= {name: value, f"{name}_se": error}
    if evaluation.name == "base":
        row |= {"kind": "base", "kl": 0.0, "kl_se": 0.0}
    row |= {"problems": len(evaluation.problems), "samples": int(evaluation.count.min())}
    recorded = run.joinpath(*source, "args.json")
    args = common.read_json(recorded)["args"] if source[0] and recorded.is_file() else {}
    row["recipe"] = {name: args[name] for name in RECIPE if args.get(name)}
    return row


def label(name: str) -> str:
    """Name for people: student_ruined -> student: ruined, ce_best -> CE best."""
    student = "student: " if name.startswith("student_") else ""
    first, *rest = name.removeprefix("student_").split("_")
    return student + " ".join([LABELS.get(first, first), *rest])


# -------------------------------------------------------------------------------------------------
# Comparisons: the question that would refute the method


def shared_problems(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    """Problems that every evaluation has, in the order of the first. Raises UserError on none."""
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
    """Accuracy and KL in every resample of the shared problems -> two [B]; KL of the base is 0."""
    at = e.places(shared)
    accuracy = resampled(weights, e.correct[at], e.count[at])
    if e.kl is None or e.kl_count is None:
        return accuracy, np.full(len(weights), 0.0 if e.name == "base" else np.nan)
    return accuracy, resampled(weights, e.kl[at], e.kl_count[at])


def comparison(
    student: tuple[Array, Array], their_accuracy: Array, their_kl: Array, passes: Array,
    missing: str,
) -> dict[str, Any]:  # fmt: skip
    """Differences and ratio of KLs with intervals; `missing` says why there is no ratio, if so.

    student: accuracy and KL [B] each; theirs [B]; passes: difference of pass@8 [B]."""
    accuracy, kl = student
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
    """The student against a path of K policies, the base first: at equal KL, at equal accuracy."""
    shared = shared_problems([student, *path])
    weights = bootstrap_weights(len(shared), resamples, seed)
    accuracy, kl = resampled_policy(student, shared, weights)
    points = [resampled_policy(e, shared, weights) for e in path]
    path_accuracy, path_kl = (np.stack(v, 1) for v in zip(*points, strict=True))  # two [B, K]
    at_equal_kl = np.where(np.isnan(kl), np.nan, accuracy_at_kl(path_kl, path_accuracy, kl))
    reaching = kl_at_accuracy(path_kl, path_accuracy, accuracy)
    missing = "never reached" if np.isinf(reaching[0]) else "no KL measured"
    row = {"kind": "path", "student": student.name, "against": path[-1].name,
           "problems": len(shared)}  # fmt: skip
    unknown = np.full_like(kl, np.nan)  # checkpoints have fewer than 8 samples
    return row | comparison((accuracy, kl), at_equal_kl, reaching, unknown, missing)


def compare_with_policy(
    student: Evaluation, other: Evaluation, resamples: int, seed: int
) -> dict[str, Any]:
    """The student against one other policy, problem by problem."""
    shared = shared_problems([student, other])
    weights = bootstrap_weights(len(shared), resamples, seed)
    accuracy, kl = resampled_policy(student, shared, weights)
    their_accuracy, their_kl = resampled_policy(other, shared, weights)
    passed, their_passed = student.pass_at(8), other.pass_at(8)
    difference = np.full(len(shared), np.nan)
    if passed is not None and their_passed is not None:
        difference = passed[student.places(shared)] - their_passed[other.places(shared)]
    missing = "no KL measured"
    if other.name == "base":
        their_kl, missing = np.full_like(kl, np.nan), "the base has no KL"
    passes = resampled(weights, difference, np.ones(len(shared)))
    row = {"kind": "policy", "student": student.name, "against": other.name,
           "problems": len(shared)}  # fmt: skip
    return row | comparison((accuracy, kl), their_accuracy, their_kl, passes, missing)


def compare(
    evaluations: dict[str, Evaluation], paths: dict[str, dict[float, Evaluation]], args: Args
) -> list[dict[str, Any]]:
    """Every student against every early-stopping path and every other full evaluation."""
    rows, base = [], paths["base"][0.0]
    for student in (e for e in evaluations.values() if e.is_student):
        for run, points in paths.items():
            if run != "base":
                path = [base, *points.values()]
                rows.append(compare_with_path(student, path, args.resamples, args.seed))
        others = [e for e in evaluations.values() if e is not student]
        rows += [compare_with_policy(student, e, args.resamples, args.seed) for e in others]
    return rows


# -------------------------------------------------------------------------------------------------
# Figures


LABEL_ANGLES = np.deg2rad([20, -20, 160, 200, 60, -60, 120, 240, *range(0, 360, 10)])
LABEL_RADII = (9, 20, 27, 34, 42, 50, 60, 70, 82, 95, 125, 160)  # points; beyond 12 there is a line
OFFSETS = [(r * np.cos(a), r * np.sin(a)) for r in LABEL_RADII for a in LABEL_ANGLES]


def is_far(offset: tuple[float, float]) -> bool:
    """Whether a label needs a line to its point."""
    return math.hypot(*offset) > 12


def side(offset: tuple[float, float]) -> str:
    """Which side of a label is nearest to its point."""
    return "left" if offset[0] > 1 else "right" if offset[0] < -1 else "center"


def search_places(
    order: list[int], points: Array, sizes: Array, area: Bbox, marked: Array, texts: list[Bbox],
    dots: float,
) -> tuple[float, dict[int, tuple[float, float]]]:  # fmt: skip
    """Offsets of the labels, one after the other, and the way from points to labels in all, 300
    more for each whose line crosses something. Pixels; points, sizes [K, 2], marked [n, 4]."""
    texts, lines, chosen, way = list(texts), [], {}, 0.0
    marks = [Bbox([point - 7, point + 7]) for point in points]
    for i in order:
        others = marks[:i] + marks[i + 1 :] + texts
        # In a crowd rather a crossing than a label on something, rather that than none.
        for offset, strict in [*((o, True) for o in OFFSETS), *((o, False) for o in OFFSETS)]:
            shift = {"left": 0.0, "center": 0.5, "right": 1.0}[side(offset)]
            low = points[i] + np.array(offset) * dots - sizes[i] * (shift, 0.5)
            box = Bbox([low, low + sizes[i]])
            if not (area.contains(*box.min) and area.contains(*box.max)):
                continue
            if ((box.min < marked[:, 2:]) & (box.max > marked[:, :2])).all(1).any():
                continue
            line = [LinePath([points[i], low + sizes[i] / 2])] if is_far(offset) else []
            if not strict or not (
                any(a.intersects_path(b) for a in line for b in lines)
                or any(a.intersects_bbox(b) for a in line for b in others)
                or any(a.intersects_bbox(box) for a in lines)
            ):
                chosen[i], marked = offset, np.concatenate([marked, [box.extents]])
                texts.append(box)
                lines += line
                way += math.hypot(*offset) + (0 if strict else 300)
                break
        else:
            chosen[i] = (9.0, 0.0)
            way += 1000
    return way, chosen


def place_labels(axes: Axes, labels: list[tuple[float, float, str, str]], obstacles: Array) -> None:
    """Writes each (x, y, text, colour) beside its point where nothing stands; obstacles [n, 2].

    Texts that are there already stand too. Where there is room no line to a label crosses another,
    a text or a point. Of several orders that of the least way to the labels is kept."""
    axes.figure.canvas.draw()  # fixes the transforms that the search measures with
    renderer, dots = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    points = axes.transData.transform([label[:2] for label in labels])
    pixels = np.concatenate([axes.transData.transform(obstacles), points])
    texts = [Text.get_window_extent(text, renderer) for text in axes.texts]
    arrows = [arrow for text in axes.texts if (arrow := getattr(text, "arrow_patch", None))]
    standing = texts + [arrow.get_window_extent(renderer) for arrow in arrows]
    marked = np.concatenate([np.concatenate([pixels - 4, pixels + 4], 1),
                             *([box.extents] for box in standing)])  # fmt: skip
    sizes = []
    for _, _, text, _ in labels:
        measured = axes.text(0, 0, text, fontsize=8.5)
        sizes.append(Text.get_window_extent(measured, renderer).size)
        measured.remove()
    forth = [range(len(labels)), np.lexsort(points.T[::-1]), np.lexsort(points.T)]
    found = [
        search_places(order, points, np.array(sizes), axes.bbox, marked, texts, dots)
        for way in forth for order in (list(way), list(way)[::-1])
    ]  # fmt: skip
    _, chosen = min(found, key=lambda places: places[0])
    for i, (x, y, text, colour) in enumerate(labels):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6} if is_far(chosen[i]) else None
        note = axes.annotate(
            text, (x, y), chosen[i], textcoords="offset points", ha=side(chosen[i]), va="center",
            zorder=6, fontsize=8.5, color=colour, arrowprops=line,
        )  # fmt: skip
        note.set_in_layout(False)


def draw_limits(axes: Axes, base: Evaluation, largest_kl: float) -> Array:
    """The bound d(a || p) and the optimum's curve, from the base's own pass rates -> points [n, 2]
    of both."""
    rates = torch.tensor(base.correct / base.count)
    mean = torch.tensor(base.correct.sum() / base.count.sum())
    accuracy = torch.linspace(float(mean), 1, 400, dtype=torch.float64)
    bound = evaluate.least_kl(accuracy, mean).clamp(min=0)
    ends = [*bound.tolist(), 2 * largest_kl], [*accuracy.tolist(), 1.0]
    axes.plot(*ends, color="#555555", lw=1)
    axes.fill_between(*ends, 1.1, color="#EEEEEE", zorder=0, lw=0)
    optimum, kl = evaluate.tilted_optimum(rates, torch.linspace(0, 14, 400))
    axes.plot(kl, optimum, color="#555555", lw=1, ls=(0, (4, 2)))
    axes.text(0.012, 0.985, "out of reach: KL below d(accuracy || base accuracy)", fontsize=8.5,
              color="#555555", transform=axes.transAxes, va="top")  # fmt: skip
    middle = int((optimum - (optimum[0] + optimum[-1]) / 2).abs().argmin())
    axes.annotate(f"optimum of KL-constrained RL\n({int(base.count.min())} base samples a problem)",
                  (float(kl[middle]), float(optimum[middle])), (0.02, 0.93), fontsize=8.5,
                  textcoords="axes fraction", color="#555555", va="top",
                  arrowprops={"arrowstyle": "-", "color": "#555555", "lw": 0.6})  # fmt: skip
    return np.concatenate([np.array(ends).T, np.stack([kl.numpy(), optimum.numpy()], 1)])


def draw_policy(
    axes: Axes, e: Evaluation, colours: dict[str, str]
) -> tuple[float, float, str, str]:
    """The marker of one full evaluation with its errors -> its label for `place_labels`."""
    metrics = e.summary["metrics"]
    (accuracy, error), (kl, kl_error) = metrics["accuracy"], metrics.get("kl", (0.0, 0.0))
    marker, colour = "s", colours.get(e.source[1], colours.get(e.name, PATH_COLOURS[-1]))
    if e.is_student or e.name == "base":
        marker, colour = ("*", STUDENT_COLOUR) if e.is_student else ("D", BASE_COLOUR)
    axes.errorbar(
        kl, accuracy, error, kl_error, fmt=marker, color=colour, ms=12 if marker == "*" else 7,
        mec="white", mew=0.7, capsize=2, elinewidth=1, zorder=5,
    )  # fmt: skip
    return kl, accuracy, label(e.name), colour


def figure_accuracy_kl(
    evaluations: dict[str, Evaluation], paths: dict[str, dict[float, Evaluation]],
    colours: dict[str, str],
) -> Figure:  # fmt: skip
    """Accuracy against KL: paths of stage 1, full evaluations with errors, and the limits."""
    figure, axes = plt.subplots(figsize=(9, 5.8), layout="constrained")
    measured = [e for e in evaluations.values() if e.kl is not None]
    on_paths = [e for name, path in paths.items() if name != "base" for e in path.values()]
    kls = [e.summary["metrics"]["kl"][0] for e in measured + on_paths]
    largest = max([1.0, *kls])
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    axes.set(xlim=(-0.02, 1.6 * largest), ylim=(-0.03, 1.06))
    labels, obstacles = [], [draw_limits(axes, evaluations["base"], largest)]
    origin = paths["base"][0.0]
    for name, path in paths.items():
        if name == "base":
            continue
        metrics = [e.summary["metrics"] for e in path.values()]
        line = np.array([(0.0, origin.summary["metrics"]["accuracy"][0])]
                        + [(m["kl"][0], m["accuracy"][0]) for m in metrics])  # fmt: skip
        # Linear in KL, as the comparison has it; on this axis such segments bend.
        share = np.linspace(0, 1, 40)[:, None]
        walked = [a + share * (b - a) for a, b in zip(line[:-1], line[1:], strict=True)]
        axes.plot(*np.concatenate(walked).T, color=colours[name], lw=1.3, alpha=0.85)
        axes.plot(*line.T, color=colours[name], marker="o", ms=3.5, ls="")
        obstacles += walked
        if name not in evaluations:  # else the marker of the full evaluation names the line
            labels.append((*line[-1], f"{label(name)} path", colours[name]))
    for e in [evaluations["base"], *(e for e in measured if e.name != "base")]:
        labels.append(draw_policy(axes, e, colours))
    ticks = [t for t in (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if t <= 1.6 * largest]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="KL(policy || base), nats a response", ylabel="accuracy on held-out problems")
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    place_labels(axes, labels[::-1], np.concatenate(obstacles))
    return figure


DYNAMICS = (  # title, keys of metrics.jsonl, scale
    ("log-ratio to base,\nnats a response", ("log_ratio_correct", "log_ratio_wrong"), "symlog"),
    ("token probability\n(geometric mean)", ("prob_correct", "prob_wrong"), "linear"),
    ("entropy,\nnats a token", ("entropy",), "linear"),
    ("share of ratios\noutside 0.8 to 1.28", ("ratio_outside_0.8_1.28",), "linear"),
    ("KL proxy,\nnats a response", ("kl_proxy",), "symlog"),
)
VERDICT_COLOURS = {"correct": "#0072B2", "wrong": "#D55E00"}


def read_dynamics(folder: Path) -> dict[str, Array]:
    """metrics.jsonl of a stage-1 run as {key: [steps]}; nan where a step lacks the key."""
    rows = common.read_jsonl(folder / "metrics.jsonl")
    keys = {"epoch"}.union(*(names for _, names, _ in DYNAMICS))
    return {key: np.array([row.get(key, math.nan) for row in rows], dtype=float) for key in keys}


def figure_dynamics(
    runs: list[Path], paths: dict[str, dict[float, Evaluation]], colours: dict[str, str]
) -> Figure:
    """One column a stage-1 run, one row a quantity, over epochs."""
    n_rows = len(DYNAMICS) + 1
    figure, grid = plt.subplots(
        n_rows, len(runs), figsize=(max(9, 1.7 * len(runs)), 1.45 * n_rows), squeeze=False,
        sharex="col", sharey="row", layout="constrained",
    )  # fmt: skip
    origin = paths["base"][0.0].summary["metrics"]["accuracy"][0]
    for column, folder in enumerate(runs):
        values, path = read_dynamics(folder), paths.get(folder.name, {})
        top = grid[0, column]
        top.set_title(label(folder.name), fontsize=10, color=colours[folder.name])
        top.axhline(origin, color="#888888", lw=0.8, ls=":")
        accuracy = [origin, *(e.summary["metrics"]["accuracy"][0] for e in path.values())]
        top.plot([0.0, *path], accuracy, color=colours[folder.name], marker="o", ms=3, lw=1.2)
        for axes, (_, keys, scale) in zip(grid[1:, column], DYNAMICS, strict=True):
            for key in keys:
                colour = VERDICT_COLOURS.get(key.rpartition("_")[2], "#333333")
                axes.plot(*binned(values["epoch"], values[key], 80), color=colour, lw=1.2)
            if scale == "symlog":
                axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
                axes.yaxis.set_major_formatter("{x:.3g}")
        grid[-1, column].set_xlabel("epoch", fontsize=9)
    grid[0, 0].set_ylim(0, 1)
    titles = ["accuracy on\nheld-out problems", *(title for title, _, _ in DYNAMICS)]
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.set_ylabel(title, fontsize=8.5)
    for axes in grid.flat:
        axes.grid(alpha=0.25, lw=0.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1:3, 0]:
        for (kind, colour), x in zip(VERDICT_COLOURS.items(), (0.0, 0.5), strict=True):
            axes.text(x, 1.02, kind, transform=axes.transAxes, fontsize=8.5, color=colour)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically; 1350 pixels wide, so that it stays sharp at 900; of 128 colours,
    which makes half the size and no difference to the eye."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, facecolor="white")
    plt.close(figure)
    with Image.open(drawn) as image, common.atomic(path) as temporary:
        image.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)


# -------------------------------------------------------------------------------------------------
# Token page


@dataclass(frozen=True)
class Signals:
    """One file of build_signals.py, with names for people."""

    name: str
    signal: torch.Tensor  # [N] float32, nats
    logprobs: dict[str, torch.Tensor]  # [N] of each policy, the base first
    full: float  # |signal| of the strongest colour, nats


def policy_names(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of a signals file -> {role: name}: {"base": "base", "teacher_0": "ce epoch-3"}."""
    paths = {role: Path(model["path"]) for role, model in metadata["models"].items()}
    runs = {role: f"{path.parent.parent.name} " if path.parent.name == "checkpoints" else ""
            for role, path in paths.items()}  # fmt: skip
    return {role: runs[role] + path.name for role, path in paths.items()}


def formula(metadata: dict[str, Any]) -> str:
    """Metadata of a signals file -> what its signal is, e.g. "log base - log unlearned"."""
    names, terms = policy_names(metadata), []
    for i, weight in enumerate(metadata["weights"]):
        factor = "" if weight == 1 else f"{weight:g} "
        term = f"log {names[f'teacher_{i}']} - log {names[f'reference_{i}']}"
        terms.append(f"{factor}({term})" if factor or len(metadata["weights"]) > 1 else term)
    of_family = [key for key in ("construction", "crossfit") if key in metadata]
    return " + ".join(terms) + "".join(f", {key} of examples/family" for key in of_family)


def load_signals(path: Path, rollouts: common.Rollouts, made_for: str) -> Signals | None:
    """Reads a signals file; None where it was made for rollouts of another fingerprint than
    `made_for`. Raises UserError where it is broken."""
    arrays, metadata = common.load_tensors(path, {"signal": torch.float32})
    if metadata.get("rollouts") != made_for:
        return None
    magnitude = arrays["signal"][rollouts.response_mask].abs().numpy()
    models, logprobs = metadata["models"], {"base": arrays["base_logprobs"]}
    for role, name in policy_names(metadata).items():
        is_base = models[role]["fingerprint"] == models["base"]["fingerprint"]
        if role.startswith(("teacher", "reference")) and not is_base:
            logprobs[f"{role.partition('_')[0]} {name}"] = arrays[f"{role}_logprobs"]
    full = float(np.quantile(magnitude, SIGNAL_QUANTILE))
    return Signals(path.stem, arrays["signal"], logprobs, full)


def pick_pairs(rollouts: common.Rollouts, n: int) -> list[tuple[int, int]]:
    """(correct, wrong) responses of the same problem, n problems spread evenly over the file.

    Wrong responses whose first wrong token is known go first."""
    wrong = rollouts.rewards < 0.5
    if rollouts.first_wrong_token is not None and (wrong & (rollouts.first_wrong_token >= 0)).any():
        wrong &= rollouts.first_wrong_token >= 0
    problems = rollouts.problem_index.tolist()
    first: list[dict[int, int]] = []
    for chosen in (rollouts.rewards > 0.5, wrong):
        responses = chosen.nonzero()[:, 0].tolist()
        first.append({problems[s]: s for s in reversed(responses)})
    both = sorted(first[0].keys() & first[1].keys())
    places = np.linspace(0, len(both) - 1, min(n, len(both))).round().astype(int)
    return [(first[0][both[i]], first[1][both[i]]) for i in places]


def token_window(length: int, marked: int, limit: int) -> range:
    """At most `limit` of `length` tokens, from the start or around a marked one that lies later."""
    start = max(0, min(marked - limit // 2, length - limit)) if marked >= limit // 2 else 0
    return range(start, min(length, start + limit))


def response_html(
    texts: list[str], signal: list[float], probabilities: list[dict[str, float]],
    marked: int, full: float,
) -> str:  # fmt: skip
    """One response: tokens coloured by signal (blue credit, orange blame), the marked one framed.

    Three lists of equal length; `full` is the |signal| of the strongest colour."""
    spans = []
    for i, (text, value, known) in enumerate(zip(texts, signal, probabilities, strict=True)):
        strength = min(1.0, abs(value) / full) if full > 0 else 0.0
        kind = ("c" if value > 0 else "b") + (" w" if i == marked else "")
        lines = [repr(text) + ", the first wrong token" * (i == marked), f"signal {value:+.3f}"]
        lines += [f"{name} {p:{'.4f' if p >= 1e-3 else '.0e'}}" for name, p in known.items()]
        shown = html.escape(text.replace("\n", "↵\n").replace("\t", "⇥"))
        style = f'class="{kind}" style="--s:{strength:.2f}"'
        spans.append(f'<span {style} title="{html.escape(chr(10).join(lines))}">{shown}</span>')
    return "".join(spans)


def response_section(
    signals: list[Signals], rollouts: common.Rollouts, tokenizer: Any, response: int, limit: int
) -> str:
    """One response under every signal, side by side."""
    start = int(rollouts.cu_seqlens[response] + rollouts.prompt_lens[response])
    length, marked = int(rollouts.response_lens[response]), -1
    if rollouts.first_wrong_token is not None:
        marked = int(rollouts.first_wrong_token[response] - rollouts.prompt_lens[response])
    window = token_window(length, marked, limit)
    at = [start + i for i in window]
    texts = [tokenizer.decode([int(rollouts.tokens[i])]) for i in at]
    cells = []
    for s in signals:
        known = [{name: math.exp(p[i]) for name, p in s.logprobs.items()} for i in at]
        values = [float(s.signal[i]) for i in at]
        text = response_html(texts, values, known, marked - window.start, s.full)
        total = float(s.signal[start : start + length].sum())
        cells.append(f"<div><b>{html.escape(s.name)}</b> sum {total:+.2f}<pre>{text}</pre></div>")
    verdict = "correct" if rollouts.rewards[response] > 0.5 else "wrong"
    verdict += "" if len(window) == length else f", {len(window)} of {length} tokens shown"
    return f'<h4>{verdict}</h4><div class="signals">{"".join(cells)}</div>'


def token_page(run: Path, n_pairs: int, tokens: int) -> str:
    """The same few responses under every signals file, about `tokens` spans in all; empty where
    there is nothing to show."""
    files = sorted(run.glob("signals/*.safetensors"))
    if not files or not n_pairs or not (run / "rollouts" / "rollouts.safetensors").is_file():
        return ""
    rollouts = common.load_rollouts(run / "rollouts")
    made_for = common.fingerprint(rollouts.path)
    loaded = {file.stem: load_signals(file, rollouts, made_for) for file in files}
    signals = [s for s in loaded.values() if s is not None]
    others = [name for name, s in loaded.items() if s is None]
    # A response is shown by 20 tokens or more, and once a signal.
    pairs = pick_pairs(rollouts, min(n_pairs, max(1, tokens // (40 * len(files)))))
    limit = max(20, tokens // (2 * len(pairs) * len(files))) if pairs else 0
    tokenizer = common.load_tokenizer(str(run / "base"))
    page = "<h2>Signals, token by token</h2>"
    if others:
        page += f"<p>Made for other rollouts, not shown: {html.escape(', '.join(others))}.</p>"
    if not pairs or not signals:
        return page if others else ""
    full = ", ".join(f"{html.escape(s.name)} {s.full:.2f}" for s in signals)
    page += (
        "<p>The same responses under every signal. <span class=c style='--s:1'>Credit</span>: the "
        "teacher finds the token likelier than the reference does; <span class=b style='--s:1'>"
        "blame</span>: less likely. <span class=w>Framed</span>: the first wrong token. Point at a "
        "token, tap it or walk with the arrow keys: below stand its signal, nats, and its "
        f"probability under each policy, for all signals.</p><p><small>Full colour at: {full} "
        f"nats, the {SIGNAL_QUANTILE:.0%} quantile of each.</small></p>"
    )
    for pair in pairs:
        begin = int(rollouts.cu_seqlens[pair[0]])
        prompt = rollouts.tokens[begin : begin + int(rollouts.prompt_lens[pair[0]])].tolist()
        problem = tokenizer.decode(prompt, skip_special_tokens=True).strip()
        problem = problem if len(problem) <= 300 else problem[:300] + " ..."
        page += f"<h3>{html.escape(problem)}</h3>"
        page += "".join(response_section(signals, rollouts, tokenizer, s, limit) for s in pair)
    return page + f'<output id="tip"></output><script>{SCRIPT}</script>'


# -------------------------------------------------------------------------------------------------
# Page and tables


# The browser itself refuses to load anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

# tests/test_report.py computes the contrast of these colours.
STYLE = """
:root { color-scheme: light dark;
  --text: #1b1f24; --back: #ffffff; --line: #d5d9de; --soft: #f5f6f8;
  --blue: 80,165,225; --red: 235,140,60 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --back: #14171a; --line: #3a4047; --soft: #1e2226;
    --blue: 20,95,160; --red: 165,70,10 }
  img { filter: invert(.92) hue-rotate(180deg) brightness(1.25) }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem 6rem }
h1 { font-size: 1.5rem } h2 { margin-top: 2.4rem; font-size: 1.2rem }
h3 { margin: 2rem 0 0; font: 600 1rem ui-monospace, monospace }
h4 { margin: .8rem 0 .2rem; font-weight: 600 } h3, b { overflow-wrap: anywhere }
.lead { font-size: 1.08rem; border-left: 4px solid rgb(var(--red)); padding-left: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child, .t { text-align: left }
.t:last-child { white-space: normal; min-width: 15rem }
tr.student td { background: var(--soft); font-weight: 600 }
tr.student .t:last-child { font-weight: 400 }
small { opacity: .8; font-weight: 400 }
figure { margin: 1rem 0 } img { max-width: 100%; border-radius: 6px }
figcaption { font-size: .88rem; opacity: .85 } summary { cursor: pointer; margin: .6rem 0 }
.signals { display: grid; gap: .6rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace;
  margin: 0; background: var(--soft); padding: .5rem .7rem; border-radius: 6px }
pre span { cursor: pointer }
.c { background: rgba(var(--blue), var(--s)) } .b { background: rgba(var(--red), var(--s)) }
.w { outline: 2px solid var(--text); border-radius: 2px; margin: 0 2px } .w::before { content: "▸" }
.x { box-shadow: 0 3px var(--text) }
#tip { position: fixed; inset: auto 0 0; max-height: 40vh; overflow: auto;
  white-space: pre-wrap; padding: .5rem 1rem; font: 13px/1.5 ui-monospace, monospace;
  background: var(--back); border-top: 2px solid var(--line) }
#tip:empty { display: none }
"""

# Shows what stands in the titles of a token, under every signal: titles need a mouse and patience.
SCRIPT = """
const all = [...document.querySelectorAll("pre > span")];
let current = -1, chosen = [];
function choose(token) {
  current = all.indexOf(token);
  const place = [...token.parentNode.children].indexOf(token);
  chosen.forEach(t => t.classList.remove("x"));
  chosen = [...token.closest(".signals").querySelectorAll("pre")].map(pre => pre.children[place]);
  chosen.forEach(t => t.classList.add("x"));
  const said = t =>
    t.closest("div").querySelector("b").textContent + ": " + t.title.replaceAll("\\n", "  ");
  document.getElementById("tip").textContent = chosen.map(said).join("\\n");
}
for (const kind of ["click", "mouseover"])
  document.addEventListener(kind, e => { if (all.includes(e.target)) choose(e.target) });
document.addEventListener("keydown", e => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
  if (!step || !all[current + step]) return;
  choose(all[current + step]);
  all[current].scrollIntoView({block: "nearest"});
});
"""


def number(value: float | None, error: float | None = None, digits: int = 3, sign: str = "") -> str:
    """0.532 ± 0.011; n/a for None."""
    if value is None:
        return "n/a"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def with_interval(row: dict[str, Any], name: str, sign: str = "+", digits: int = 3) -> str:
    """+0.031 [+0.012, +0.050]; an open end of the interval is written as such."""
    ends = row[f"{name}_ci"]
    ends = ["open" if end is None else number(end, None, digits, sign) for end in ends]
    if row[name] is None and ends == ["open", "open"]:
        return "n/a"
    return f"{number(row[name], None, digits, sign)} [{', '.join(ends)}]"


def table(heads: list[str], rows: list[list[str]], marked: list[bool] | None = None) -> str:
    """An HTML table; cells are escaped, words stand left, numbers right; marked rows stand out."""

    def cell(tag: str, text: str, sample: str) -> str:
        """On the left where the sample of its column is a word."""
        words = (sample[:1].isalpha() or "log" in sample) and sample != "n/a"
        return f"<{tag}{' class=t' if words else ''}>{html.escape(text)}</{tag}>"

    first = rows[-1] if rows else heads
    lines = ["".join(cell("th", *pair) for pair in zip(heads, first, strict=True))]
    lines += ["".join(cell("td", text, text) for text in row) for row in rows]
    kinds = ["", *(" class=student" if mark else "" for mark in marked or [False] * len(rows))]
    body = "".join(f"<tr{kind}>{line}</tr>" for kind, line in zip(kinds, lines, strict=True))
    return f'<div class="scroll"><table>{body}</table></div>'


def recipe_text(recipe: dict[str, Any]) -> str:
    """{"loss": "ce", "epochs": 3, "unlearn": True} -> "ce, epochs 3, unlearn"."""
    plain = {"loss", "objective"}
    parts = [str(v) if k in plain else k.replace("_", " ") + ("" if v is True else f" {v:g}")
             for k, v in recipe.items()]  # fmt: skip
    return ", ".join(parts).replace("learning rate", "lr")


def policy_table(summary: dict[str, Any]) -> str:
    heads = ["policy", "accuracy", "pass@8", "KL", "KL efficiency", "entropy", "length", "training"]
    rows = []
    for row in summary["policies"]:
        cells = [number(row[k], row[f"{k}_se"]) for k in ("accuracy", "pass_at_8")]
        cells += [number(row[k], row[f"{k}_se"], 2) for k in ("kl", "kl_efficiency")]
        cells += [number(row["entropy"]), number(row["mean_length"], None, 1)]
        rows.append([row["label"], *cells, recipe_text(row["recipe"])])
    s = summary["settings"]
    note = (
        f"{s['problems']} held-out problems x {s['samples']} samples (base: {s['base_samples']}), "
        f"temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most "
        f"{s['max_new_tokens']} tokens, sampling seed {s['seed']}; ± one standard error over "
        "problems. KL: exact, on the policy's own samples, nats a response. KL efficiency: the "
        "least KL that buys this accuracy / the KL spent; 1 is the limit, n/a where the base is "
        "not passed. Entropy: nats a token. Length: tokens."
    )
    students = [row["kind"] == "student" for row in summary["policies"]]
    return f"<h2>Policies</h2>{table(heads, rows, students)}<p><small>{note}</small></p>"


def signal_table(signals: list[dict[str, Any]]) -> str:
    heads = ["signal", "AUC", "credit AUC", "formula"]
    rows = [[s["name"], number(s["auc"]), number(s["credit_auc"], s["credit_auc_se"]), s["formula"]]
            for s in signals]  # fmt: skip
    note = (
        "AUC: of the sum over a response, correct against wrong. Credit AUC: within a wrong "
        "response, the share of earlier tokens that are blamed less than the first wrong one; "
        "0.5 is chance."
    )
    return f"<h2>Signals</h2>{table(heads, rows)}<p><small>{note}</small></p>" if signals else ""


def comparison_tables(summary: dict[str, Any]) -> str:
    """Students against early-stopping paths, then, folded, against every other policy."""
    rows = summary["comparisons"]
    if not rows:
        return ""
    path_rows, others = [], []
    for row in rows:
        names = [label(row["student"]), label(row["against"])]
        difference = with_interval(row, "accuracy_difference")
        ratio = row["kl_ratio_reason"] or with_interval(row, "kl_ratio", "", 2)
        if row["kind"] == "path":
            cells = [number(row["student_kl"], None, 2), number(row["student_accuracy"])]
            path_rows.append([*names, *cells, number(row["their_accuracy"]), difference, ratio])
        else:
            passes = with_interval(row, "pass_at_8_difference")
            others.append([*names, difference, passes, ratio])
    page = "<h2>Comparisons</h2>"
    if path_rows:
        point = next(row for row in summary["curve"] if row["run"] != "base")
        heads = ["student", "path", "KL", "accuracy", "path at this KL", "difference at equal KL"]
        heads.append("KL ratio at equal accuracy")
        page += (
            "<p>Does a student lie above stage 1 stopped early?</p>"
            f"{table(heads, path_rows)}<p><small>Path: the base, then the checkpoints of stage 1 "
            f"in order of epoch ({point['problems']} problems x {point['samples']} samples), "
            "linear in KL between them. Accuracies and KL here are those on the shared problems. "
            "KL ratio: KL of the path where it first reaches the student's accuracy / KL of the "
            "student; above 1 the student is cheaper. [95 % interval], paired bootstrap "
            "over the shared problems, "
            f"{summary['settings']['resamples']} resamples.</small></p>"
        )
    heads = ["student", "other", "accuracy difference", "pass@8 difference", "KL other / student"]
    title = "Each student against every other policy"
    return page + f"<details><summary>{title}</summary>{table(heads, others)}</details>"


def headline(summary: dict[str, Any]) -> str:
    """A few sentences: the most accurate student, its best rival, and the refuting question."""
    base, *others = summary["policies"]
    students = [row for row in others if row["kind"] == "student"]
    rivals = [row for row in others if row["kind"] != "student"]

    def best(rows: list[dict[str, Any]]) -> str:
        """The most accurate, in words."""
        row = max(rows, key=lambda row: row["accuracy"])
        accuracy, kl = number(row["accuracy"], row["accuracy_se"]), number(row["kl"], None, 2)
        return f"{row['label']}, reaches {accuracy} at {kl} nats"

    text = f"The base is right in {number(base['accuracy'], base['accuracy_se'])} of its samples. "
    if students:
        text += f"The most accurate student, {best(students)}. "
    if rivals:
        text += f"The most accurate policy that is no student, {best(rivals)}. "
    if not students:
        return text
    name = max(students, key=lambda row: row["accuracy"])["name"]
    paths = [row for row in summary["comparisons"] if row["student"] == name
             and row["kind"] == "path" and row["accuracy_difference"] is not None]  # fmt: skip
    if not paths:
        return text
    rival = min(paths, key=lambda row: row["accuracy_difference"])
    low, high = rival["accuracy_difference_ci"]
    verdict = "above" if low > 0 else "below" if high < 0 else "not distinguishable from"
    return text + (
        f"At equal KL that student is {verdict} the best early-stopping path "
        f"({label(rival['against'])}): {with_interval(rival, 'accuracy_difference')}."
    )


def render(run: Path, summary: dict[str, Any], n_pairs: int) -> str:
    """The whole page; figures are embedded."""
    captions = {
        "accuracy_kl": "Accuracy against KL to the base. Lines: checkpoints of stage 1. Stars: "
        "students; squares: other policies on all problems, ± one standard error. Grey: what no "
        "policy can reach at this KL.",
        "dynamics": "Stage 1 on the fixed rollouts over epochs (means over neighbouring steps).",
    }
    if not summary["stage1_runs"]:
        del captions["dynamics"]
    figures = ""
    for name, caption in captions.items():
        data = base64.b64encode((run / "figures" / f"{name}.png").read_bytes()).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        figures += f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    title = html.escape(f"ERPD report: {run.resolve().parent.name} {run.resolve().name}")
    body = [
        f'<h1>{title}</h1><p class="lead">{html.escape(headline(summary))}</p>',
        policy_table(summary), comparison_tables(summary), "<h2>Figures</h2>" + figures,
        signal_table(summary["signals"]),
    ]  # fmt: skip
    for part in (1, 2, 4, 8):  # many policies with long names: fewer tokens
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(body)}"
            f"{token_page(run, n_pairs, PAGE_TOKENS // part)}</body></html>\n"
        )
        if len(page.encode()) <= PAGE_BYTES:
            break
    return page


def summarize(
    evaluations: dict[str, Evaluation], paths: dict[str, dict[float, Evaluation]], args: Args
) -> dict[str, Any]:
    """Everything of summary.json."""
    order = {"base": 0, "stage1": 1, "other": 1, "student": 2}
    policies = [policy_row(e, args.run) for e in evaluations.values()]
    signals = []
    for path in sorted(args.run.glob("signals/*.safetensors")):
        report = common.read_json(path.with_suffix(".json"))
        row = {"name": path.stem, "formula": formula(report)}
        signals.append(row | {n: report.get(n) for n in ("auc", "credit_auc", "credit_auc_se")})
    curve = [
        {"run": run, "epoch": epoch} | policy_row(e, args.run)
        for run, points in paths.items() for epoch, e in points.items()
    ]  # fmt: skip
    base = evaluations["base"]
    sampling = base.summary["sampling"]
    # The base often has more samples than the policies, for the optimum's curve.
    judged = [int(e.count.min()) for e in evaluations.values() if e is not base]
    settings = {"problems": len(base.problems), "base_samples": int(base.count.min())}
    settings["samples"] = min(judged, default=settings["base_samples"])
    settings |= {name: sampling[name] for name in ("seed", *evaluate.SHARED_SAMPLING)}
    settings |= {"resamples": args.resamples, "bootstrap_seed": args.seed}
    runs = sorted(path.parent.name for path in args.run.glob("stage1/*/metrics.jsonl"))
    return finite({
        "settings": settings,
        "stage1_runs": runs,
        "policies": sorted(policies, key=lambda row: order[row["kind"]]),
        "signals": signals,
        "curve": curve,
        "comparisons": compare(evaluations, paths, args),
    })  # fmt: skip


# -------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.check()
    run = args.run
    evaluations, paths = load_run(run)
    summary = summarize(evaluations, paths, args)
    common.write_json(run / "summary.json", summary)
    names = sorted({*summary["stage1_runs"], *paths} - {"base"})
    colours = {name: PATH_COLOURS[i % len(PATH_COLOURS)] for i, name in enumerate(names)}
    figures = run / "figures"
    save_figure(figure_accuracy_kl(evaluations, paths, colours), figures / "accuracy_kl.png")
    if summary["stage1_runs"]:
        runs = [run / "stage1" / name for name in summary["stage1_runs"]]
        save_figure(figure_dynamics(runs, paths, colours), figures / "dynamics.png")
    with common.atomic(run / "report.html") as temporary:
        temporary.write_text(render(run, summary, args.pairs), encoding="utf-8")
    for row in summary["policies"]:
        columns = [("accuracy", 3), ("pass_at_8", 3), ("kl", 2), ("kl_efficiency", 2)]
        cells = [f"{name} {number(row[name], row[f'{name}_se'], d):15s}" for name, d in columns]
        print(f"{row['label']:24s}", *cells)
    print(run / "report.html")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
