"""What the report of one run and the figures over several runs draw alike."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

import common

Array = np.ndarray

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
PATH_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
STUDENT_COLOUR, BASE_COLOUR = "#D55E00", "#000000"

LABELS = {"ce": "CE", "sapo": "SAPO", "grpo": "GRPO", "mse": "MSE", "sft": "SFT"}

ANGLES = np.deg2rad([20, -20, 160, 200, 60, -60, 120, 240])
DISTANCES = (9, 20, 34, 50, 70, 95, 125, 160)  # points, from a marker to its label
NEAR = 12  # points; a label that is farther away gets a line to its marker


def label(name: str) -> str:
    """Makes a name for people: student_ruined -> student: ruined, ce_best -> CE best."""
    student = "student: " if name.startswith("student_") else ""
    first, *rest = name.removeprefix("student_").split("_")
    return student + " ".join([LABELS.get(first, first), *rest])


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Array]:
    """Makes a figure of `size` inches with plain panels. Returns it and the grid of its axes."""
    figure, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    for axes in grid.flat:
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.title.set_size(9)
    return figure, grid


def kl_axis(axes: Axes, largest: float) -> None:
    """Makes the horizontal axis one of KLs: linear near 0, then in decades."""
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    axes.set_xlim(-0.02, 1.6 * largest)
    ticks = [t for t in (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if t <= 1.6 * largest]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KL from the base, nats per response")


def nats_axis(axes: Axes, threshold: float = 1.0, floor: float | None = None) -> None:
    """Makes the vertical axis, with what is drawn already, one of nats: 0 and decades around it."""
    low, high = axes.get_ylim()
    low = low if floor is None else floor
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    decades = [step * 10.0**power for power in range(-1, 4) for step in (1, 3)]
    kept = [x for x in decades if x >= threshold and (high < 10 or f"{x:g}"[0] == "1")]
    ticks = [x for x in (*(-x for x in kept[::-1]), 0.0, *kept) if low <= x <= high]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, 1.4 * high if high > threshold else high)  # room for a marker at the top


def average_steps(values: Array, points: int) -> Array:
    """Averages neighbouring training steps: [..., steps] -> [..., at most `points`].

    A nan is left out of its mean; a point that has nothing else is nan."""
    parts = np.array_split(values, min(points, values.shape[-1]), axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing
        return np.stack([np.nanmean(part, axis=-1) for part in parts], axis=-1)


def straight_in_kl(points: Array) -> Array:
    """Fills in the straight lines between points (KL, accuracy): [K, 2] -> [n, 2].

    They are what the comparisons use; on the axis of `kl_axis` they appear bent."""
    share = np.linspace(0, 1, 40)[:, None]
    pairs = zip(points[:-1], points[1:], strict=True)
    return np.concatenate([points[:1], *(a + share * (b - a) for a, b in pairs)])


def side(offset: tuple[float, float]) -> str:
    """Returns which side of a label at this offset is nearest to its point."""
    return "left" if offset[0] > 1 else "right" if offset[0] < -1 else "center"


def place_labels(axes: Axes, labels: list[tuple[float, float, str, str]], obstacles: Array) -> None:
    """Writes each (x, y, text, colour) beside its point, over no other text, point or obstacle.

    obstacles [n, 2]: points of curves, as data. A label takes the nearest place that is free, if
    there is one whose line passes by the other points."""
    axes.figure.canvas.draw()  # fixes the transforms that the search measures with
    renderer, dots = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    points = axes.transData.transform(np.array([label[:2] for label in labels], dtype=float))
    marked = np.concatenate([axes.transData.transform(obstacles), points])
    taken = [Text.get_window_extent(text, renderer).extents for text in axes.texts]
    places = [(r * np.cos(a), r * np.sin(a)) for r in DISTANCES for a in ANGLES]
    for point, (x, y, text, colour) in zip(points, labels, strict=True):
        measured = axes.text(0, 0, text, fontsize=8.5)
        size = Text.get_window_extent(measured, renderer).size
        measured.remove()
        boxes = {}
        for offset in places:
            shift = {"left": 0.0, "center": 0.5, "right": 1.0}[side(offset)]
            low = point + np.array(offset) * dots - size * (shift, 0.5)
            boxes[offset] = Bbox([low, low + size])
        covered = np.array(taken).reshape(-1, 4)
        free = [p for p in places if is_free(boxes[p], axes.bbox, marked, covered)] or places[:1]
        offset = next((p for p in free if is_clear(point, boxes[p], points)), free[0])
        taken.append(boxes[offset].extents)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6}
        note = axes.annotate(
            text,
            (x, y),
            offset,
            textcoords="offset points",
            ha=side(offset),
            va="center",
            zorder=6,
            fontsize=8.5,
            color=colour,
            arrowprops=line if math.hypot(*offset) > NEAR else None,
        )
        note.set_in_layout(False)


def is_clear(point: Array, box: Bbox, points: Array) -> bool:
    """Returns whether the line from a point to its label's box passes by the others of [n, 2]."""
    line = point + np.linspace(0, 1, 40)[:, None] * ((box.min + box.max) / 2 - point)
    others = points[(points != point).any(1)]
    return bool((np.abs(line[:, None] - others).max(-1) > 10).all())  # pixels


def is_free(box: Bbox, area: Bbox, marked: Array, taken: Array) -> bool:
    """Returns whether a box is within the area and covers no marked point [n, 2] or box [m, 4]."""
    within = area.contains(*box.min) and area.contains(*box.max)
    on_point = ((marked > box.min - 4) & (marked < box.max + 4)).all(1).any()  # 4 pixels of margin
    on_text = ((box.min < taken[:, 2:]) & (box.max > taken[:, :2])).all(1).any()
    return bool(within and not on_point and not on_text)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG of 128 colours, atomically: half the size, and no difference to the eye."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=150, facecolor="white")
    plt.close(figure)
    with Image.open(pixels) as image, common.atomic(path) as temporary:
        image.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
