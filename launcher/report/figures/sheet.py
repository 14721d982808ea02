"""A drawing of cells, lines and names whose units are inches: what a heat map needs, and no more.

Axes, ticks, layouts and texts of matplotlib take nearly all the time of a heat map. Here a name is an outline, found
once and placed by arithmetic; matplotlib's renderer fills it in a PNG, and an SVG is written as it stands.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from PIL import Image

from moe_testbed.launcher.report.figures.outlines import Placed, joined, place

SVG_DPI = 144
"""Pixels to an inch of the cells in an SVG: with one a cell, viewers would blur them."""
_LEVELS = 255
"""Colours of a map in a picture: with that of cells without a value as many as a byte tells apart."""
_NO_VALUE = (0xD9, 0xDE, 0xE4)


@dataclass(frozen=True)
class Box:
    """A rectangle in inches, from its lower left corner."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Cells:
    """Coloured cells that fill a box, the first row on top; `low` and `high` have the ends of the colour map."""

    values_XX: NDArray[np.float64]
    box: Box
    low: float
    high: float
    colours: str

    def image(self, dpi: float) -> Image.Image:
        """Returns the cells in pixels, each in the colour of the cell below its centre; what is not finite is grey."""
        shares = np.clip((self.values_XX - self.low) / (self.high - self.low), 0, 1)
        indices = np.where(np.isnan(shares), _LEVELS, np.rint(shares * (_LEVELS - 1))).astype(np.uint8)
        small = Image.fromarray(indices)
        small.putpalette(_palette(self.colours))
        size = (max(1, round(self.box.width * dpi)), max(1, round(self.box.height * dpi)))
        return small.resize(size, Image.Resampling.NEAREST)


@lru_cache
def _palette(colours: str) -> list[int]:
    """The colours of a map from its lower end to its upper one, and that of cells without a value."""
    levels = np.asarray(colormaps[colours](np.linspace(0, 1, _LEVELS), bytes=True))[:, :3]
    return [*levels.ravel().tolist(), *_NO_VALUE]


class Sheet:
    """A drawing, from its lower left corner.

    Attributes:
        width, height: its size in inches, of whole points.
        cells: what has been drawn of cells.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = math.ceil(width * 72) / 72, math.ceil(height * 72) / 72
        self.cells: list[Cells] = []
        self._dividers: list[tuple[float, float, float, float]] = []
        self._texts: dict[str, list[Placed]] = {}

    def show(self, cells: Cells) -> None:
        """Draws cells."""
        self.cells.append(cells)

    def divide(self, x: float, bottom: float, top: float, width: float) -> None:
        """Draws a white upright line over the cells, its width in points."""
        self._dividers.append((x, bottom, top, width / 72))

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
        """Writes a line; see `outlines.place`."""
        if text:
            self._texts.setdefault(colour, []).append(place(text, x, y, size, side, upright))

    def svg(self) -> bytes:
        """Returns the drawing as SVG, in points; the same bytes each time."""
        width, height = round(self.width * 72), round(self.height * 72)
        parts = [
            '<?xml version="1.0" encoding="utf-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}pt" height="{height}pt" '
            f'viewBox="0 0 {width} {height}">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]
        for cells in self.cells:
            box, content = cells.box, base64.b64encode(_png(cells.image(SVG_DPI), SVG_DPI)).decode()
            parts.append(
                f"<image {_rectangle(box.x, self.height - box.y - box.height, box.width, box.height)} "
                f'preserveAspectRatio="none" xlink:href="data:image/png;base64,{content}"/>'
            )
        for x, bottom, top, line in self._dividers:
            parts.append(f'<rect {_rectangle(x - line / 2, self.height - top, line, top - bottom)} fill="#ffffff"/>')
        for colour, texts in self._texts.items():
            parts += [f'<g fill="{colour}">', *(placed.svg(self.height) for placed in texts), "</g>"]
        return "\n".join([*parts, "</svg>\n"]).encode()

    def png(self, dpi: int) -> bytes:
        """Returns the drawing as PNG of 256 colours, a third of the size that it would have with all."""
        renderer = RendererAgg(round(self.width * dpi), round(self.height * dpi), dpi)
        page, inches = renderer.new_gc(), Affine2D().scale(dpi)
        page.set_linewidth(0)
        page.set_snap(False)
        for x, bottom, top, line in self._dividers:
            corners = [(x - line / 2, bottom), (x - line / 2, top), (x + line / 2, top), (x + line / 2, bottom)]
            renderer.draw_path(page, Path(corners, closed=False), inches, (1.0, 1.0, 1.0))
        for colour, texts in self._texts.items():
            renderer.draw_path(page, joined(texts), inches, to_rgb(colour))
        over = Image.fromarray(np.asarray(renderer.buffer_rgba()))
        image = Image.new("RGB", over.size, "white")
        for cells in self.cells:
            drawn = cells.image(dpi)
            image.paste(drawn, (round(cells.box.x * dpi), over.height - round(cells.box.y * dpi) - drawn.height))
        image.paste(over, mask=over)
        return _png(image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE), dpi)


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    """The attributes of SVG for a rectangle in inches, from its upper left corner."""
    places: dict[str, Any] = {"x": x, "y": y, "width": width, "height": height}
    return " ".join(f'{name}="{value * 72:.2f}"' for name, value in places.items())


def _png(image: Image.Image, dpi: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", dpi=(dpi, dpi))
    return buffer.getvalue()
