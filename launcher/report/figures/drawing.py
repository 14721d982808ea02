"""Pictures: a figure as SVG and PNG, with its words and the section of the page where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_testbed.launcher.report.figures.canvas import STYLE, png, svg
from moe_testbed.launcher.report.figures.sheet import Sheet

LINE_DPI, MAP_DPI, WHOLE_DPI = 150, 110, 80


@dataclass(frozen=True)
class Picture:
    """A drawn figure; `name` is its file's, `section` where it stands on the page.

    A heat map is best shown as PNG. `whole` is the SVG and PNG of all layers, where the picture shows only some.
    """

    name: str
    section: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    heat_map: bool = False
    whole: tuple[bytes, bytes] | None = None


@dataclass(frozen=True)
class Job:
    """A picture to be drawn. `draw`, a function of a module, gives the figure of `arguments`; of `whole`, that of all
    layers."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[..., Figure | Sheet]
    arguments: tuple[Any, ...]
    heat_map: bool = False
    whole: tuple[Any, ...] | None = None


def draw(jobs: Sequence[Job]) -> list[Picture]:
    """Draws the pictures, in the order of the jobs."""
    with matplotlib.rc_context(STYLE):
        return [_draw(job) for job in jobs]


def _draw(job: Job) -> Picture:
    content = _encode(job.draw(*job.arguments), MAP_DPI if job.heat_map else LINE_DPI)
    whole = None if job.whole is None else _encode(job.draw(*job.whole), WHOLE_DPI)
    return Picture(job.name, job.section, job.title, job.caption, *content, heat_map=job.heat_map, whole=whole)


def _encode(drawn: Figure | Sheet, dpi: int) -> tuple[bytes, bytes]:
    if isinstance(drawn, Sheet):
        return drawn.svg(), drawn.png(dpi)
    return svg(drawn), png(drawn, dpi)
