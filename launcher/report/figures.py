"""The figures of a report, each drawn once and saved as SVG (on the page, for papers) and PNG.

Colours are those of Okabe and Ito and of viridis, which colour-blind readers can tell apart; runs differ in line and
marker too. The reference is black and the control grey everywhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from moe_testbed.launcher.files import write_bytes_atomically
from moe_testbed.launcher.report.heatmaps import draw_loss_differences, draw_routing
from moe_testbed.launcher.report.records import Suite
from moe_testbed.launcher.report.results import ranked

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
WIDTH = 7.0
STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "axes.edgecolor": "#52606d",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "moe-testbed",
}
LAYER_METRICS = {
    "domain_information": "domain\ninformation",
    "normalised_effective_experts": "effective experts,\nnormalised",
    "max_violation": "max violation",
}


@dataclass(frozen=True)
class Look:
    """How one run is drawn in every figure."""

    colour: str
    line: str
    marker: str
    width: float = 1.8


@dataclass(frozen=True)
class Picture:
    """A drawn figure; `name` is its file's, `section` where it stands on the page."""

    name: str
    section: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def draw_all(suite: Suite, results: dict[str, Any]) -> list[Picture]:
    """Every figure that the suite has the numbers for."""
    with matplotlib.rc_context(STYLE):
        return list(_draw(suite, results))


def save(pictures: list[Picture], folder: Path) -> None:
    """Write each figure as NAME.svg and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes_atomically(folder / f"{picture.name}.svg", picture.svg)
        write_bytes_atomically(folder / f"{picture.name}.png", picture.png)


def _draw(suite: Suite, results: dict[str, Any]) -> Iterator[Picture]:
    runs = [run for run in ranked(results) if run["loss"]["mean"] is not None]
    looks = _looks(results)
    routed = [run for run in runs if run["routing"]["top_k"]["domain_information"]["mean"] is not None]
    if routed:
        yield _picture(
            _scatter(routed, looks),
            "scatter",
            "overview",
            "Specialization, utilization, loss",
            "Top-k choices, mean over layers and seeds. The corner at the top right is where every expert is used and "
            "gives its domain away. Darker is a lower loss; a star marks the reference, a cross the control.",
        )
    if runs:
        for kind, title, key in (
            ("evaluation", "Validation loss", "cross_entropy"),
            ("train", "Training loss", "cross_entropy"),
        ):
            yield _picture(
                _curves(suite, [run["label"] for run in runs], looks, kind, key),
                f"loss_{kind}",
                "curves",
                title,
                "Mean over seeds; the band is the range of the seeds. The axis is cut to the losses after the first "
                "third of the steps." + (" Smoothed over a fiftieth of the run." if kind == "train" else ""),
            )
    best = results["reference"]["best"]
    if best is not None and len(runs) > 1:
        yield _picture(
            draw_loss_differences(runs, best, results["domains"], WIDTH),
            "loss_by_domain",
            "domains",
            "Loss by domain, difference to the reference",
            f"Nats per token above (orange) or below (purple) {best}.",
        )
    if routed:
        yield _picture(
            _profiles(routed, looks),
            "layers",
            "layers",
            "Layer by layer",
            "Top-k choices, mean over seeds. Layers are counted among the MoE layers.",
        )
    for run in routed:
        evaluations = suite.evaluations(run["label"])
        seed, evaluation = next(iter(evaluations.items()))
        yield _picture(
            draw_routing(evaluation.counts_top_k_YDE, evaluation.domains, WIDTH),
            f"routing_{run['label']}",
            "routing",
            run["label"],
            f"Seed {seed}, top-k choices.",
        )


def _looks(results: dict[str, Any]) -> dict[str, Look]:
    """The look of every run, by its place in the suite, so that a run that fails repaints no other."""
    looks, others, references = {}, 0, 0
    for run in results["runs"]:
        if run["role"] == "reference":
            looks[run["label"]] = Look("#000000", LINES[references % len(LINES)], "*", 2.6)
            references += 1
        elif run["role"] == "control":
            looks[run["label"]] = Look("#7b8794", "--", "X", 2.2)
        else:
            line = LINES[(others // len(COLOURS)) % len(LINES)]
            looks[run["label"]] = Look(COLOURS[others % len(COLOURS)], line, MARKERS[others % 6])
            others += 1
    return looks


def _scatter(runs: list[dict[str, Any]], looks: dict[str, Look]) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.6))
    axes = figure.add_subplot()
    x = [run["routing"]["top_k"]["domain_information"]["mean"] for run in runs]
    y = [run["routing"]["top_k"]["normalised_effective_experts"]["mean"] for run in runs]
    losses = [run["loss"]["mean"] for run in runs]
    colours = ScalarMappable(Normalize(min(losses), max(losses)), "viridis")
    bottom = min(0.85, min(y) - 0.05)
    axes.set(xlim=(-0.06, 1.08), ylim=(bottom, 1 + 0.1 * (1 - bottom)))
    axes.axvline(1, color="#9aa5b1", linewidth=1, linestyle=":")
    axes.axhline(1, color="#9aa5b1", linewidth=1, linestyle=":")
    for run, px, py, loss in zip(runs, x, y, losses, strict=True):
        marker = {"reference": "*", "control": "X"}.get(run["role"], "o")
        size = 330 if marker == "*" else 110
        colour = colours.to_rgba(loss)
        axes.scatter(px, py, color=colour, marker=marker, s=size, edgecolors="white", linewidths=0.9, zorder=3)
    figure.colorbar(colours, ax=axes, label="validation loss (nats per token)", shrink=0.9, pad=0.02)
    axes.set_xlabel("domain information  (specialization) →")
    axes.set_ylabel("effective experts, normalised  (utilization) →")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    _label_points(canvas, axes, [run["label"] for run in runs], x, y)
    return figure


def _label_points(canvas: FigureCanvasAgg, axes: Axes, labels: list[str], x: list[float], y: list[float]) -> None:
    """Write each label beside its point, at the nearest place where it covers no other label and no point."""
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in axes.transData.transform(np.column_stack([x, y]))]
    frame = axes.get_window_extent()
    for label, place in zip(labels, zip(x, y, strict=True), strict=True):
        text = None
        for dx, dy, side in _PLACES:
            if text is not None:
                text.remove()
            text = axes.annotate(
                label, place, (dx, dy), textcoords="offset points", fontsize=10.5, ha=side, va="center", zorder=4,
                arrowprops={"arrowstyle": "-", "color": "#9aa5b1", "linewidth": 0.7} if abs(dy) > 14 else None,
            )  # fmt: skip
            text.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the line to its point
            inside = box.x0 > frame.x0 and box.x1 < frame.x1 and box.y0 > frame.y0 and box.y1 < frame.y1
            if inside and not any(_overlap((box.x0, box.y0, box.x1, box.y1), other) for other in taken):
                break
        taken.append((box.x0, box.y0, box.x1, box.y1))


_PLACES = [
    (side * distance, dy, "left" if side > 0 else "right")
    for dy in (0, 12, -12, 26, -26, 42, -42, 58, -58, 74, -74, 90, -90, 106, -106)
    for distance in ((9,) if abs(dy) < 20 else (16,))
    for side in (1, -1)
]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _curves(suite: Suite, labels: list[str], looks: dict[str, Look], kind: str, key: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.4 + 0.22 * math.ceil(len(labels) / 2)))
    axes = figure.add_subplot()
    tops, bottoms = [], []
    for label in reversed(labels):
        steps, values_SN = _seeds_on_one_grid(
            [training.curve(kind, key) for training in suite.of(label) if training.evaluation is not None]
        )
        if not len(steps):
            continue
        values_SN = np.stack([_smooth(values, len(steps) // 50 if kind == "train" else 0) for values in values_SN])
        look, mean = looks[label], values_SN.mean(axis=0)
        marker = look.marker if kind == "evaluation" and len(steps) <= 20 else None
        axes.plot(
            steps, mean, look.line, color=look.colour, marker=marker, markersize=6, linewidth=look.width, label=label
        )
        if len(values_SN) > 1:
            axes.fill_between(
                steps, values_SN.min(axis=0), values_SN.max(axis=0), color=look.colour, alpha=0.18, linewidth=0
            )
        late = steps >= steps[-1] / 3
        tops.append(float(np.nanmax(mean[late])))
        bottoms.append(float(np.nanmin(values_SN[:, late])))
    if tops and math.isfinite(max(tops)) and math.isfinite(min(bottoms)):
        margin = 0.04 * (max(tops) - min(bottoms)) + 1e-3
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats per token")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2)
    return figure


def _seeds_on_one_grid(curves: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The steps that every seed has, and the values [S, N] there."""
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][:, 0]
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve[:, 0])
    return steps, np.stack([curve[np.isin(curve[:, 0], steps), 1] for curve in curves])


def _smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """A centred moving mean, over fewer values at the ends."""
    if width < 2:
        return values
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _profiles(runs: list[dict[str, Any]], looks: dict[str, Look]) -> Figure:
    figure = Figure(figsize=(WIDTH, 6.2 + 0.22 * math.ceil(len(runs) / 2)))
    all_axes = figure.subplots(len(LAYER_METRICS), 1, sharex=True)
    for axes, (metric, title) in zip(all_axes, LAYER_METRICS.items(), strict=True):
        for run in reversed(runs):
            layers = [np.nan if s["mean"] is None else s["mean"] for s in run["routing"]["top_k"][metric]["layers"]]
            look = looks[run["label"]]
            axes.plot(
                range(len(layers)), layers, look.line, color=look.colour, marker=look.marker, label=run["label"],
                linewidth=look.width, markersize=7,
            )  # fmt: skip
        axes.set_ylabel(title)
    all_axes[-1].set_xlabel("MoE layer")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2)
    return figure


def _picture(figure: Figure, name: str, section: str, title: str, caption: str) -> Picture:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is found; it need not be found again for each format
    return Picture(name, section, title, caption, *(_bytes(figure, fmt) for fmt in ("svg", "png")))


def _bytes(figure: Figure, fmt: str) -> bytes:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if fmt == "svg" else {}
    figure.savefig(buffer, format=fmt, dpi=150, metadata=metadata, facecolor="white")
    return buffer.getvalue()
