"""Figures of trainings in stages: the loss over all FLOPs, copying over the steps, and what each part has taken.

Shape legend: I seeds, X points of a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_testbed.launcher.report.figures.canvas import WIDTH
from moe_testbed.launcher.report.figures.lines import Line, Panel
from moe_testbed.launcher.report.read.records import Suite, Training

Floats = NDArray[np.float64]
_TERA = 1e12
_BAR = 0.34
_PARTS = {"inherited": "#9aa5b1", "encoder": "#0072B2", "decoder": "#D55E00", "output": "#E69F00"}


def loss_over_flops(suite: Suite, staged: dict[str, Any]) -> list[Panel]:
    """The losses by the FLOPs taken so far, those that a run has inherited included; a panel for each task. A run that
    does not know what it has inherited is left out. The axis is cut to the losses after the first third."""
    panels = []
    for task in dict.fromkeys(staged["tasks"].values()):
        lines, late = [], []
        for label, of_run in staged["tasks"].items():
            ledger = staged["ledger"][label]
            if of_run != task or ledger is None or ledger["inherited_flops"] is None:
                continue
            x_IX, y_IX = _curves(suite.of(label), "cross_entropy")
            if not y_IX.size:
                continue
            x_X = (x_IX.mean(0) + ledger["inherited_flops"]["mean"]) / _TERA
            lines.append(_line(label, x_X, y_IX))
            late += y_IX[:, y_IX.shape[1] // 3 :].mean(0).tolist()
        if lines:
            margin = 0.04 * (max(late) - min(late)) + 1e-3
            panels.append(Panel(f"nats ({task.split()[1]})", tuple(lines), (min(late) - margin, max(late) + margin)))
    return panels


def copied_over_steps(suite: Suite, staged: dict[str, Any]) -> list[Panel]:
    """The losses at copied tokens and at the first tokens of gaps, by step."""
    panels = []
    for kind in ("copied", "first_of_gap", "rest_of_gap"):
        lines = []
        for label in staged["kinds"]:
            trainings = [training for training in suite.of(label) if training.evaluation is not None]
            curves = [training.curve("evaluation", f"{kind}/cross_entropy") for training in trainings]
            curves = [curve for curve in curves if len(curve)]
            if curves and all(np.array_equal(curve[:, 0], curves[0][:, 0]) for curve in curves):
                lines.append(_line(label, curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])))
        if lines:
            panels.append(Panel(kind.replace("_", " "), tuple(lines)))
    return panels


def _curves(trainings: Sequence[Training], key: str) -> tuple[Floats, Floats]:
    """FLOPs and values at the evaluations that all seeds have, [I, X]."""
    found = []
    for training in trainings:
        values, flops = training.curve("evaluation", key), training.curve("train", "flops")
        if training.evaluation is not None and len(values) and len(flops):
            found.append((values[:, 0], np.interp(values[:, 0], flops[:, 0], flops[:, 1]), values[:, 1]))
    if not found or any(not np.array_equal(steps, found[0][0]) for steps, _, _ in found):
        return np.zeros((0, 0)), np.zeros((0, 0))
    return np.stack([flops for _, flops, _ in found]), np.stack([values for _, _, values in found])


def _line(label: str, x_X: Floats, y_IX: Floats) -> Line:
    several = len(y_IX) > 1
    return Line(label, x_X, y_IX.mean(0), y_IX.min(0) if several else None, y_IX.max(0) if several else None)


def draw_ledger(ledgers: dict[str, dict[str, Any]]) -> Figure:
    """Draws a bar for each run: what it has inherited, and what each of its parts has taken, in 10^12 FLOPs."""
    height = 0.75 + _BAR * len(ledgers) + 0.35
    figure = Figure(figsize=(WIDTH, height))
    left = min(2.6, 0.25 + 0.085 * max(map(len, ledgers)))
    axes = figure.add_axes((left / WIDTH, 0.6 / height, (WIDTH - left - 0.2) / WIDTH, (height - 1.0) / height))
    labels = list(ledgers)
    ends = np.zeros(len(labels))
    for part, colour in _PARTS.items():
        widths = np.array([_of_part(ledger, part) / _TERA for ledger in ledgers.values()])
        axes.barh(labels, widths, left=ends, color=colour, height=0.68, label=part)
        ends += widths
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("10^12 FLOPs")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_PARTS), frameon=False, fontsize=10.5)
    return figure


def _of_part(ledger: dict[str, Any], part: str) -> float:
    found = ledger["inherited_flops"] if part == "inherited" else ledger["flops_by_part"].get(part)
    return 0.0 if found is None else float(found["mean"])
