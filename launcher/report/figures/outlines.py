"""Text as outlines: matplotlib's default font as paths of size 1, found once a text and placed by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.path import Path
from matplotlib.textpath import TextPath

LONGEST = 80
"""Characters of a name in a picture."""

_MIDDLE = 0.27
"""Half the height of small letters, where a line of size 1 looks centred."""
_UNITS = 1000
"""Whole numbers to an em in the SVG path of an outline."""
_COMMANDS = {
    int(Path.MOVETO): "M",
    int(Path.LINETO): "L",
    int(Path.CURVE3): "Q",
    int(Path.CURVE4): "C",
    int(Path.CLOSEPOLY): "Z",
}


@dataclass(frozen=True)
class Outline:
    """A text of size 1.

    Attributes:
        path: its outline from the baseline, y upwards.
        width: its width.
        svg: the path once more as an element of SVG has it, y downwards and in thousandths.
    """

    path: Path
    width: float
    svg: str


@dataclass(frozen=True)
class Placed:
    """An outline and its place, in inches from the lower left: where the baseline begins, and how long an em is."""

    outline: Outline
    x: float
    y: float
    em: float
    upright: bool

    @property
    def path(self) -> Path:
        """The outline, moved to its place, to hundredths of a point: SVG writes what digits there are, and this halves
        it."""
        along, across = np.asarray(self.outline.path.vertices).T * self.em
        x, y = (self.x - across, self.y + along) if self.upright else (self.x + along, self.y + across)
        return Path(np.rint(np.column_stack([x, y]) * 7200) / 7200, self.outline.path.codes)

    def svg(self, height: float) -> str:
        """The element that draws the outline in an SVG so many inches high, whose unit is a point."""
        x, y, scale = self.x * 72, (height - self.y) * 72, self.em * 72 / _UNITS
        turn = (
            f"matrix(0 {-scale:.5g} {scale:.5g} 0 {x:.2f} {y:.2f})"
            if self.upright
            else f"matrix({scale:.5g} 0 0 {scale:.5g} {x:.2f} {y:.2f})"
        )
        return f'<path transform="{turn}" d="{self.outline.svg}"/>'


def place(text: str, x: float, y: float, size: float, side: str = "left", upright: bool = False) -> Placed:
    """Returns a line of text of a size in points, centred on y; `side` says which part is at x: left, center or right.

    Upright it is turned to the left: centred on x, and `side` says which part is at y.
    """
    outline, em = _outline(text), size / 72
    along = -{"left": 0.0, "center": 0.5, "right": 1.0}[side] * outline.width * em
    if upright:
        return Placed(outline, x + _MIDDLE * em, y + along, em, upright)
    return Placed(outline, x + along, y - _MIDDLE * em, em, upright)


def joined(texts: Sequence[Placed]) -> Path:
    """Returns the outlines as one path, in inches from the lower left."""
    return Path.make_compound_path(*(placed.path for placed in texts))


def text_width(text: str, size: float) -> float:
    """Returns the width of a text in inches, in the default font at this size in points."""
    return _points(text) * size / 72


@lru_cache(maxsize=8192)
def _outline(text: str) -> Outline:
    path = TextPath((0, 0), _shortened(text), size=1)
    return Outline(path, _points(text), _svg(path))


def _svg(path: Path) -> str:
    """Returns the content of an SVG path, whose y runs downwards, in thousandths of what the path is in."""
    parts = []
    for points, code in path.iter_segments(simplify=False):
        whole = np.rint(np.reshape(points, (-1, 2)) * (_UNITS, -_UNITS)).astype(int)
        parts.append(_COMMANDS[int(code)] + ("" if code == Path.CLOSEPOLY else " ".join(map(str, whole.flat))))
    return "".join(parts)


def _shortened(text: str) -> str:
    """Returns the text, its end cut off where it would leave no room for the picture."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


@lru_cache(maxsize=8192)
def _points(text: str) -> float:
    """Returns the width of a text of one point."""
    font = get_font(findfont(FontProperties()))
    font.set_size(100, 72)
    font.set_text(_shortened(text))
    return float(font.get_width_height()[0]) / 64 / 100
