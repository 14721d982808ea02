"""Pictures drawn by two processes.

A figure takes matplotlib a tenth of a second, and a report has two for each run. The second process is this package's
own command, not a fork or a copy of the caller, so that whoever asks for a report needs no guard around it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_testbed.launcher.report.canvas import STYLE, png, svg

LINE_DPI, MAP_DPI, WHOLE_DPI = 150, 110, 80
WORTHWHILE = 12
"""Jobs from which on a second process, which takes a second to start, saves time."""


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
    draw: Callable[..., Figure]
    arguments: tuple[Any, ...]
    heat_map: bool = False
    whole: tuple[Any, ...] | None = None


def draw_in_two(jobs: Sequence[Job]) -> list[Picture]:
    """The pictures in the order of the jobs; where a second process is of no use or fails, drawn by this one."""
    if len(jobs) < WORTHWHILE or len(os.sched_getaffinity(0)) < 2:
        return draw_here(jobs)
    answer: list[bytes] = []
    with subprocess.Popen(
        [sys.executable, "-m", "moe_testbed.launcher.report.drawing_helper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as helper:
        reader = threading.Thread(target=lambda: answer.append(helper.communicate(pickle.dumps(jobs[1::2]))[0]))
        reader.start()
        mine = draw_here(jobs[::2])
        reader.join()
    theirs = pickle.loads(answer[0]) if helper.returncode == 0 and answer else draw_here(jobs[1::2])
    pictures = [*mine, *theirs]
    pictures[::2], pictures[1::2] = mine, theirs
    return pictures


def draw_here(jobs: Sequence[Job]) -> list[Picture]:
    """The pictures, drawn by this process."""
    with matplotlib.rc_context(STYLE):
        return [_draw(job) for job in jobs]


def _draw(job: Job) -> Picture:
    content = _encode(job.draw(*job.arguments), MAP_DPI if job.heat_map else LINE_DPI, job.heat_map)
    whole = None if job.whole is None else _encode(job.draw(*job.whole), WHOLE_DPI, job.heat_map)
    return Picture(job.name, job.section, job.title, job.caption, *content, heat_map=job.heat_map, whole=whole)


def _encode(figure: Figure, dpi: int, heat_map: bool) -> tuple[bytes, bytes]:
    return svg(figure), png(figure, dpi, colours=256 if heat_map else None)
