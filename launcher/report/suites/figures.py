"""Every metric of one suite against the same of another: routers that keep their order rise from left to right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_testbed.launcher.report.figures.canvas import STYLE, WIDTH, png, svg
from moe_testbed.launcher.report.figures.drawing import Picture
from moe_testbed.launcher.report.figures.figures import COLOURS
from moe_testbed.launcher.report.figures.scatter import label_points
from moe_testbed.launcher.report.suites.comparison import COMPARED
from moe_testbed.launcher.report.suites.differences import BY_NAME

DPI = 150


def draw_comparison(comparison: dict[str, Any]) -> Iterator[Picture]:
    """A scatter for each other suite and metric that at least two runs have in both suites."""
    names = [suite["name"] for suite in comparison["suites"]]
    with matplotlib.rc_context(STYLE):
        for place, pair in enumerate(comparison["pairs"], start=1):
            for metric in COMPARED:
                shown = [run for run in comparison["runs"] if _has(run, 0, metric) and _has(run, place, metric)]
                if len(shown) < 2:
                    continue
                comparable = metric != "loss" or pair["same"] != "nothing"
                figure = _scatter(shown, place, metric, (names[0], names[place]), comparable)
                caption = "Bars are bootstrap intervals; a star is a reference, a cross the control."
                if comparable:
                    caption += f" Above the line a run has more in {names[place]}."
                title = f"{BY_NAME[metric].column_title}: {names[place]} against {names[0]}"
                yield Picture(f"{metric}_{place}", metric, title, caption, svg(figure), png(figure, DPI))


def _has(run: dict[str, Any], place: int, metric: str) -> bool:
    return run["suites"][place] is not None and run["suites"][place][metric]["value"] is not None


def _scatter(runs: list[dict[str, Any]], place: int, metric: str, names: tuple[str, str], comparable: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.4))
    axes = figure.add_axes((0.13, 0.13, 0.84, 0.84))
    form = BY_NAME[metric]
    scale = 100 if form.in_percent else 1
    estimates = [[run["suites"][suite][metric] for run in runs] for suite in (0, place)]
    x, y = ([scale * estimate["value"] for estimate in row] for row in estimates)
    errors = [scale * _distances(row) for row in estimates]
    axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor="#9aa5b1", elinewidth=1, zorder=2)
    for run, px, py in zip(runs, x, y, strict=True):
        marker, colour = {"reference": ("*", "#000000"), "control": ("X", "#7b8794")}.get(
            run["role"], ("o", COLOURS[0])
        )
        axes.scatter(px, py, color=colour, marker=marker, s=260 if marker == "*" else 80, edgecolors="white", zorder=3)
    axes.margins(0.12)
    limits = (axes.get_xlim(), axes.get_ylim())
    if comparable:
        low, high = min(map(min, limits)), max(map(max, limits))
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.plot([low, high], [low, high], ":", color="#7b8794", linewidth=1, zorder=1)
    unit = " (%)" if form.in_percent else " (nats per token)" if metric == "loss" else ""
    axes.set_xlabel(f"{form.column_title} in {names[0]}{unit}")
    axes.set_ylabel(f"{form.column_title} in {names[1]}{unit}")
    label_points(axes, [run["label"] for run in runs], x, y)
    return figure


def _distances(estimates: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far the bounds are below and above the values, [2, runs]; 0 where there is no interval."""
    bounds = [
        (0.0, 0.0) if found["low"] is None else (found["value"] - found["low"], found["high"] - found["value"])
        for found in estimates
    ]
    return np.maximum(np.array(bounds, dtype=np.float64).T, 0)
