"""Specialization, utilization and loss of every run in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from moe_testbed.launcher.report.figures.canvas import WIDTH
from moe_testbed.launcher.report.figures.outlines import joined, place, text_width

HEIGHT = 5.6
LABEL_SIZE = 10.5

Rectangle = tuple[float, float, float, float]
"""Left, lower, right and upper edge, in points."""


@dataclass(frozen=True)
class Point:
    """One run."""

    label: str
    role: str
    information: float
    used: float
    loss: float


def draw_scatter(points: Sequence[Point], split: str) -> Figure:
    """Draws domain information by normalised effective experts, coloured by the loss on this split."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.95 / WIDTH, 0.65 / HEIGHT, (WIDTH - 2.1) / WIDTH, (HEIGHT - 0.8) / HEIGHT))
    x, y = [point.information for point in points], [point.used for point in points]
    losses = [point.loss for point in points]
    colours = ScalarMappable(Normalize(min(losses), max(losses)), "viridis")
    bottom = min(0.85, min(y) - 0.05)
    axes.set(xlim=(-0.06, 1.08), ylim=(bottom, 1 + 0.1 * (1 - bottom)))
    axes.axvline(1, color="#9aa5b1", linewidth=1, linestyle=":")
    axes.axhline(1, color="#9aa5b1", linewidth=1, linestyle=":")
    shades = colours.to_rgba(np.array(losses))
    markers = [{"reference": "*", "control": "X"}.get(point.role, "o") for point in points]
    for marker, area in (("o", 110), ("X", 110), ("*", 330)):
        drawn = [number for number, found in enumerate(markers) if found == marker]
        axes.scatter(
            [x[number] for number in drawn], [y[number] for number in drawn], marker=marker, s=area, c=shades[drawn],
            edgecolors="white", linewidths=0.9, zorder=3,
        )  # fmt: skip
    bar = figure.add_axes(((WIDTH - 1.0) / WIDTH, 0.65 / HEIGHT, 0.17 / WIDTH, (HEIGHT - 0.8) / HEIGHT))
    figure.colorbar(colours, cax=bar, label=f"loss on {split} documents (nats per token)")
    axes.set_xlabel("domain information  (specialization) →")
    axes.set_ylabel("effective experts, normalised  (utilization) →")
    label_points(axes, [point.label for point in points], x, y)
    return figure


def label_points(axes: Axes, labels: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Writes each label beside its point, at the nearest place where it covers no other label and no point, and joins
    the two by a line where that is far.

    Texts are outlines here too: matplotlib's annotations took longer than everything else in the figure.
    """
    scale = 72 / axes.figure.dpi
    points = axes.transData.transform(np.column_stack([x, y])) * scale
    taken: list[Rectangle] = [(px - 7, py - 7, px + 7, py + 7) for px, py in points]
    left, lower, right, upper = np.asarray(axes.bbox.extents) * scale
    half = 0.6 * LABEL_SIZE
    texts, lines = [], []
    for label, (px, py) in zip(labels, points, strict=True):
        width = 72 * text_width(label, LABEL_SIZE)
        for dx, dy, side in _PLACES:
            start = px + dx - (width if side == "right" else 0)
            box = (start, py + dy - half, start + width, py + dy + half)
            inside = box[0] > left and box[2] < right and box[1] > lower and box[3] < upper
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        texts.append(place(label, start / 72, (py + dy) / 72, LABEL_SIZE))
        if abs(dy) > 14:
            lines.append(np.array([(px, py), (px + dx, py + dy)]) / 72)
    inches = axes.figure.dpi_scale_trans
    axes.figure.add_artist(LineCollection(lines, colors="#9aa5b1", linewidths=0.7, transform=inches))
    axes.figure.add_artist(PathPatch(joined(texts), facecolor="black", linewidth=0, snap=False, transform=inches))


_PLACES = [
    (side * distance, dy, "left" if side > 0 else "right")
    for dy in (0, 12, -12, 26, -26, 42, -42, 58, -58, 74, -74, 90, -90, 106, -106)
    for distance in ((9,) if abs(dy) < 20 else (16,))
    for side in (1, -1)
]


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
