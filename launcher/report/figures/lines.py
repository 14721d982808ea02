"""Figures of lines: losses by step, what changes over training, what changes from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moe_testbed.launcher.report.figures.canvas import Look, legend_below, legend_height, stacked
from moe_testbed.launcher.report.numbers.kept import KEPT_CURVES
from moe_testbed.launcher.report.numbers.training import CURVES
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.run.files import value_at
from moe_testbed.routing.metrics import REPORTED, Metric

Floats = NDArray[np.float64]

POINTS = 400
"""A line has no more: neither a screen nor a page shows more."""
MARKED = 20
"""A line of so few points has markers."""


@dataclass(frozen=True)
class Line:
    """One run in one panel; `low` and `high` bound the band of its seeds, `spikes` has each x at which one spikes."""

    label: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    spikes: Floats | None = None


@dataclass(frozen=True)
class Panel:
    """One axes of a figure."""

    title: str
    lines: tuple[Line, ...]
    limits: tuple[float, float] | None = None


def draw_panels(panels: Sequence[Panel], looks: dict[str, Look], along: str, height: float = 1.75) -> Figure:
    """Draws the panels below one another; runs are in the order of the lines, the first on top of the others."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    figure, all_axes = stacked([height] * len(panels), 1.05, 0.15, 0.62 + legend_height(labels))
    for axes, panel in zip(all_axes, panels, strict=True):
        for line in reversed(panel.lines):
            look = looks[line.label]
            axes.plot(
                line.x, line.y, look.line, color=look.colour, linewidth=look.width,
                marker=look.marker if len(line.x) <= MARKED else None, markersize=6,
            )  # fmt: skip
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.18, linewidth=0)
            if line.spikes is not None and len(line.spikes):
                y = np.interp(line.spikes, line.x, line.y)
                axes.plot(line.spikes, y, linestyle="none", marker=7, color=look.colour, markersize=7)
        axes.set_ylabel(panel.title)
        axes.yaxis.set_label_coords(-0.105, 0.5)
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
    all_axes[-1].set_xlabel(along)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, {label: looks[label] for label in labels})
    return figure


def loss_panel(suite: Suite, runs: Sequence[dict[str, Any]], kind: str) -> Panel:
    """The losses by step that metrics.jsonl has of the runs of the results; the axis is cut to those after the first
    third of the steps."""
    lines, tops, bottoms = [], [], []
    for run in runs:
        label = run["label"]
        trainings = [training for training in suite.of(label) if training.evaluation is not None]
        seeds = [training.seed for training in trainings]
        steps, values_IX = _seeds_on_one_grid([training.curve(kind, "cross_entropy") for training in trainings])
        if not len(steps):
            continue
        values_IX = np.stack([_smooth(values, len(steps) // 50 if kind == "train" else 0) for values in values_IX])
        thin = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
        steps, values_IX = steps[thin], values_IX[:, thin]
        low, high = (values_IX.min(axis=0), values_IX.max(axis=0)) if len(values_IX) > 1 else (None, None)
        spiking = [told for told in run["trainings"] if told["seed"] in seeds] if kind == "train" else []
        spikes = [step for told in spiking for step in told["loss_spikes"]]
        lines.append(Line(label, steps, values_IX.mean(axis=0), low, high, np.array(spikes, dtype=np.float64)))
        late_IX = values_IX[:, steps >= steps[-1] / 3]
        if np.isfinite(late_IX).any():
            tops.append(float(np.nanmax(late_IX.mean(axis=0))))
            bottoms.append(float(np.nanmin(late_IX)))
    limits = None
    if tops and math.isfinite(max(tops)) and math.isfinite(min(bottoms)):
        margin = 0.04 * (max(tops) - min(bottoms)) + 1e-3
        limits = min(bottoms) - margin, max(tops) + margin
    return Panel("nats per token", tuple(lines), limits)


def training_panels(runs: Sequence[dict[str, Any]]) -> list[Panel]:
    """What changes over training, in the runs that recorded it."""
    return _course_panels({run["label"]: run["over_training"] for run in runs}, CURVES)


def kept_panels(runs: Sequence[dict[str, Any]]) -> list[Panel]:
    """What remains of an encoder's routing by step, in the runs that start from one."""
    return _course_panels({run["label"]: value_at(run, "routing_kept", "over_training") for run in runs}, KEPT_CURVES)


def _course_panels(courses: Mapping[str, dict[str, Any] | None], metrics: Sequence[Metric]) -> list[Panel]:
    panels = []
    for metric in metrics:
        lines = []
        for label, course in courses.items():
            if course is None:
                continue
            y, low, high = (_floats(course["curves"][metric.name][name]) for name in ("mean", "low", "high"))
            several = course["seeds"] > 1
            if np.isfinite(y).any():
                x = _floats(course["steps"])
                lines.append(Line(label, x, y, low if several else None, high if several else None))
        if lines:
            panels.append(Panel(metric.axis, tuple(lines)))
    return panels


def layer_panels(runs: Sequence[dict[str, Any]], part: str) -> list[Panel]:
    """What changes from layer to layer, mean over seeds."""
    panels = []
    for metric in REPORTED:
        if metric.part != part or not metric.axis:
            continue
        lines = []
        for run in runs:
            if (stat := value_at(run, *metric.path)) is not None and stat["mean"] is not None:
                y = _floats([layer["mean"] for layer in stat["layers"]])
                lines.append(Line(run["label"], np.arange(len(y), dtype=np.float64), y))
        if lines:
            panels.append(Panel(metric.axis, tuple(lines)))
    return panels


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _seeds_on_one_grid(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    """The steps that every seed has, and the values there, a row for each seed."""
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][:, 0]
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve[:, 0])
    return steps, np.stack([curve[np.isin(curve[:, 0], steps), 1] for curve in curves])


def _smooth(values: Floats, width: int) -> Floats:
    """A centred moving mean, over fewer values at the ends."""
    if width < 2:
        return values
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
