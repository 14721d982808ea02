"""Figures of a fixed layout in inches, and their encoding: nothing is drawn only to find out where it would go."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from PIL import Image

from moe_testbed.launcher.report.figures.outlines import joined, place, text_width

WIDTH = 7.0
LEGEND_ROW, LEGEND_SIZE = 0.22, 10.5

STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "axes.edgecolor": "#52606d",
    "lines.linewidth": 1.8,
    "image.composite_image": False,  # as one image all maps of a figure take longer, and more bytes
    "svg.hashsalt": "moe-testbed",
    "text.parse_math": False,  # names may have dollars
}


@dataclass(frozen=True)
class Look:
    """How one run is drawn in every figure."""

    colour: str
    line: str
    marker: str
    width: float = 1.8


def stacked(
    heights: Sequence[float], left: float, right: float, bottom: float, top: float = 0.15, gap: float = 0.2
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of the common width with axes of these heights below one another that share their x; all in
    inches."""
    total = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure = Figure(figsize=(WIDTH, total))
    axes: list[Axes] = []
    upper = total - top
    for height in heights:
        place = (left / WIDTH, (upper - height) / total, (WIDTH - left - right) / WIDTH, height / total)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
        upper -= height + gap
    for above in axes[:-1]:
        above.tick_params(labelbottom=False)
    return figure, axes


def legend_columns(labels: Sequence[str]) -> int:
    """Returns the columns of a legend below a figure: two, if the names are short enough."""
    return 2 if max(text_width(label, LEGEND_SIZE) for label in labels) < WIDTH / 2 - 0.8 else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches that the legend below a figure takes."""
    return LEGEND_ROW * math.ceil(len(labels) / legend_columns(labels)) + 0.15


def legend_below(figure: Figure, looks: Mapping[str, Look]) -> None:
    """Draws the legend at the lower edge, column by column; it is drawn here, since matplotlib's takes longer than the
    lines."""
    columns = legend_columns(list(looks))
    rows = math.ceil(len(looks) / columns)
    texts = []
    for number, (label, look) in enumerate(looks.items()):
        x, y = 0.35 + (WIDTH - 0.35) / columns * (number // rows), LEGEND_ROW * (rows - number % rows - 0.5) + 0.05
        sample = Line2D(
            (x, x + 0.2, x + 0.4), (y, y, y), color=look.colour, linestyle=look.line, linewidth=look.width,
            marker=look.marker, markevery=(1, 2), markersize=6, transform=figure.dpi_scale_trans,
        )  # fmt: skip
        figure.add_artist(sample)
        texts.append(place(label, x + 0.52, y, LEGEND_SIZE))
    names = PathPatch(joined(texts), facecolor="black", linewidth=0, snap=False, transform=figure.dpi_scale_trans)
    figure.add_artist(names)


def svg(figure: Figure) -> bytes:
    """Returns the figure as SVG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def png(figure: Figure, dpi: int) -> bytes:
    """Returns the figure as PNG."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.save(buffer, format="PNG", dpi=(dpi, dpi), compress_level=2)  # a fourteenth larger, in two thirds of the time
    return buffer.getvalue()
