"""Figures of a fixed layout in inches, and their encoding: nothing is drawn only to find out where it would go."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from PIL import Image

WIDTH = 7.0
LEGEND_ROW, LEGEND_SIZE = 0.22, 10.5
LONGEST = 80
"""Characters of a name in a picture."""

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


class Sheet:
    """A figure whose units are inches from the lower left, for what has no axes: pictures of cells and their names.

    Ticks, layouts and texts of matplotlib take nearly all the time of a heat map. Here a name is an outline, found
    once and placed by arithmetic, and all of a colour are drawn together.
    """

    def __init__(self, width: float, height: float) -> None:
        width, height = math.ceil(width * 72) / 72, math.ceil(height * 72) / 72
        self.figure = Figure(figsize=(width, height))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
        self._outlines: dict[str, list[Path]] = {}

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        side: str = "left",
        upright: bool = False,
        colour: str = "black",
    ) -> None:
        """Writes a line, centred on y; `side` says which part of it is at x: left, center or right.

        Upright it is turned to the left: centred on x, and `side` says which part is at y.
        """
        if text:
            placed = _placed(_outline(text), x, y, size, side, upright)
            self._outlines.setdefault(colour, []).append(placed)

    def finish(self) -> Figure:
        """The figure with all that was written on it."""
        for colour, outlines in self._outlines.items():
            # add_patch would look for the limits of every curve.
            self.axes.add_artist(_patch(outlines, colour))
        return self.figure


@dataclass(frozen=True)
class Outline:
    """A text of size 1: its path from the baseline, and its width."""

    path: Path
    width: float


_MIDDLE = 0.27
"""Half the height of small letters, where a line of size 1 looks centred."""


@lru_cache(maxsize=8192)
def _outline(text: str) -> Outline:
    path = TextPath((0, 0), _shortened(text), size=1)
    return Outline(path, _points(text))


def _placed(outline: Outline, x: float, y: float, size: float, side: str, upright: bool) -> Path:
    """The outline in inches; see `Sheet.write`."""
    along = -{"left": 0.0, "center": 0.5, "right": 1.0}[side] * outline.width
    place = Affine2D().translate(along, -_MIDDLE).scale(size / 72)
    if upright:
        place.rotate_deg(90)
    return place.translate(x, y).transform_path(outline.path)


def _patch(outlines: Sequence[Path], colour: str, **options: Any) -> PathPatch:
    """Outlines as one patch, to hundredths of a point: SVG writes what digits there are, so that this halves it."""
    whole = Path.make_compound_path(*outlines)
    whole.vertices = np.rint(np.asarray(whole.vertices) * 7200) / 7200
    return PathPatch(whole, facecolor=colour, linewidth=0, snap=False, **options)


def _shortened(text: str) -> str:
    """A text whose end is cut off where it would leave no room for the picture."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def text_width(text: str, size: float) -> float:
    """Width of a text in inches, in the default font at this size in points."""
    return _points(text) * size / 72


@lru_cache(maxsize=8192)
def _points(text: str) -> float:
    """Width of a text of one point."""
    font = get_font(findfont(FontProperties()))
    font.set_size(100, 72)
    font.set_text(_shortened(text))
    return float(font.get_width_height()[0]) / 64 / 100


def stacked(
    heights: Sequence[float], left: float, right: float, bottom: float, top: float = 0.15, gap: float = 0.2
) -> tuple[Figure, list[Axes]]:
    """A figure of the common width with axes of these heights below one another that share their x; all in inches."""
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
    """Columns of a legend below a figure: two, if the names are short enough."""
    return 2 if max(text_width(label, LEGEND_SIZE) for label in labels) < WIDTH / 2 - 0.8 else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches that the legend below a figure takes."""
    return LEGEND_ROW * math.ceil(len(labels) / legend_columns(labels)) + 0.15


def legend_below(figure: Figure, looks: Mapping[str, Look]) -> None:
    """The legend at the lower edge, column by column; drawn here, since matplotlib's takes longer than the lines."""
    columns = legend_columns(list(looks))
    rows = math.ceil(len(looks) / columns)
    outlines = []
    for number, (label, look) in enumerate(looks.items()):
        x, y = 0.35 + (WIDTH - 0.35) / columns * (number // rows), LEGEND_ROW * (rows - number % rows - 0.5) + 0.05
        sample = Line2D(
            (x, x + 0.2, x + 0.4), (y, y, y), color=look.colour, linestyle=look.line, linewidth=look.width,
            marker=look.marker, markevery=(1, 2), markersize=6, transform=figure.dpi_scale_trans,
        )  # fmt: skip
        figure.add_artist(sample)
        outlines.append(_placed(_outline(label), x + 0.52, y, LEGEND_SIZE, "left", False))
    figure.add_artist(_patch(outlines, "black", transform=figure.dpi_scale_trans))


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def png(figure: Figure, dpi: int, colours: int | None = None) -> bytes:
    """The figure as PNG; with a palette of so many colours, a third of the size."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if colours is not None:
        image = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", dpi=(dpi, dpi))
    return buffer.getvalue()
