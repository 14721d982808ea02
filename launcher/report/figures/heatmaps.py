"""Heat maps: losses by run and domain, assignments by domain and expert, what happens when experts are swapped.

Shape legend: Y MoE layers, D domains, E experts, X rows and columns of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moe_testbed.launcher.report.figures.canvas import WIDTH
from moe_testbed.launcher.report.figures.outlines import text_width
from moe_testbed.launcher.report.figures.sheet import Box, Cells, Sheet
from moe_testbed.routing.metrics import conditional, owners

RIGHT = 0.92
"""Inches that a colour bar takes."""
NUMBERED = 16
"""With more columns than this the cells have no room for a number."""


@dataclass(frozen=True)
class Map:
    """One heat map: rows are named, and so are spans of columns, each by its first column and its name."""

    values_XX: NDArray[np.float64]
    rows: Sequence[str]
    spans: Sequence[tuple[int, str]]
    title: str
    below: str
    scale: str
    low: float
    high: float
    colours: str = "viridis"
    numbers: bool = False


def draw_routing(
    counts_YDE: NDArray[np.int64],
    domains: Sequence[str],
    layers: Sequence[int],
    columns: int = 1,
    names: Sequence[str] = (),
) -> Sheet:
    """Draws domains x experts, one map per layer, experts sorted by owner; colours end at the share D/E. `names` has
    the name of every layer; without it they are numbered.

    D/E is each expert's share of its domain where experts are divided evenly among domains and used by them alone. Of
    more domains than experts none has an expert alone, and colours end at four times the even share.
    """
    maps = []
    for layer in layers:
        owner_E, order_E = owners(counts_YDE[layer])
        sorted_E = owner_E[order_E]
        firsts = np.flatnonzero(np.diff(sorted_E, prepend=-2))
        maps.append(
            Map(
                conditional(counts_YDE[layer])[:, order_E],
                domains,
                [(int(first), domains[owner] if (owner := sorted_E[first]) >= 0 else "unused") for first in firsts],
                names[layer] if names else f"MoE layer {layer}",
                f"{len(order_E)} experts, by the domain that they serve most",
                "share of the domain's assignments",
                0.0,
                _brightest(len(domains), len(order_E)),
            )
        )
    return _draw(maps, columns)


def _brightest(num_domains: int, num_experts: int) -> float:
    return num_domains / num_experts if num_domains <= num_experts else min(1.0, 4 / num_experts)


def draw_causes(
    forced_DD: Sequence[Sequence[float | None]] | None,
    ablation_DD: Sequence[Sequence[float | None]] | None,
    domains: Sequence[str],
) -> Sheet:
    """Draws domains x whose experts: the change of loss under forced routing, and the damage of barring one expert."""
    maps = []
    for table, title, below in (
        (forced_DD, "Routed only to one domain's experts", "whose experts the tokens may use"),
        (ablation_DD, "One expert barred", "domain that the expert serves most"),
    ):
        if table is not None:
            values = np.array(table, dtype=np.float64)
            bound = _bound(values)
            spans = list(enumerate(domains))
            maps.append(Map(values, domains, spans, title, below, "nats per token", -bound, bound, "PuOr_r"))
    return _draw(maps, 1)


def draw_loss_differences(losses: Mapping[str, Sequence[float | None]], best: str, domains: Sequence[str]) -> Sheet:
    """Runs x domains: the loss less the best reference's. `losses` has the runs' losses by domain, its own too."""
    others = [label for label in losses if label != best]
    reference_D = np.array(losses[best], dtype=np.float64)
    difference = np.array([losses[label] for label in others], dtype=np.float64) - reference_D
    bound = _bound(difference)
    numbers = len(domains) <= NUMBERED
    spans = list(enumerate(domains))
    return _draw([Map(difference, others, spans, "", "", "nats per token", -bound, bound, "PuOr_r", numbers)], 1)


def _draw(maps: Sequence[Map], columns: int) -> Sheet:
    """The maps, so many beside each other, each with its colour bar. Rows are named once; columns too many to be read
    in so small a map are not named."""
    rows = maps[0].rows
    row_height, row_size = (0.21, 10.0) if len(rows) <= 24 else (0.125, 7.0)
    left = 0.14 + max(text_width(name, row_size) for name in rows)
    width = max(WIDTH - left - RIGHT, 2.5)
    span_size = min(9.5, 72 * width / maps[0].values_XX.shape[1] * 0.92)
    named = columns == 1 or len(rows) <= 24
    names = max(text_width(name, span_size) for one in maps for _, name in one.spans) if named else 0.0
    top, height, below = (0.36 if maps[0].title else 0.1), row_height * len(rows), (0.3 if maps[0].below else 0.12)
    cell_height = top + height + names + below
    grid_rows = math.ceil(len(maps) / columns)
    sheet = Sheet(left + (width + RIGHT) * columns, cell_height * grid_rows)
    for number, one in enumerate(maps):
        x = left + (width + RIGHT) * (number % columns)
        y = cell_height * (grid_rows - 1 - number // columns) + names + below
        box = Box(x, y, width, height)
        _draw_cells(sheet, one, box)
        if number % columns == 0:
            _name_rows(sheet, one, box, row_size)
        if named:
            _name_columns(sheet, one, box, span_size)
        _divide(sheet, one, box)
        sheet.write(x, y + height + 0.14, one.title, 12)
        sheet.write(x + width / 2, y - names - 0.15, one.below, 10, "center")
        _colour_bar(sheet, one, Box(x + width + 0.1, y, 0.13, height))
    return sheet


def _draw_cells(sheet: Sheet, one: Map, box: Box) -> None:
    sheet.show(Cells(one.values_XX, box, one.low, one.high, one.colours))
    if not one.numbers:
        return
    num_rows, num_columns = one.values_XX.shape
    for (row, column), value in np.ndenumerate(one.values_XX):
        x = box.x + (column + 0.5) * box.width / num_columns
        y = box.y + box.height - (row + 0.5) * box.height / num_rows
        colour = "white" if abs(value) > 0.65 * one.high else "black"
        text = f"{value:+.2f}".replace("-", "−")
        sheet.write(x, y, text, 9 if num_columns <= 8 else 7, "center", colour=colour)


def _name_rows(sheet: Sheet, one: Map, box: Box, size: float) -> None:
    step = box.height / len(one.rows)
    for row, name in enumerate(one.rows):
        y = box.y + box.height - (row + 0.5) * step
        sheet.write(box.x - 0.07, y, name, size, "right")


def _name_columns(sheet: Sheet, one: Map, box: Box, size: float) -> None:
    """The spans' names, upright below them."""
    num_columns = one.values_XX.shape[1]
    step = box.width / num_columns
    ends = [first for first, _ in one.spans[1:]] + [num_columns]
    for (first, name), end in zip(one.spans, ends, strict=True):
        x = box.x + (first + end) / 2 * step
        sheet.write(x, box.y - 0.05, name, size, "right", upright=True)


def _divide(sheet: Sheet, one: Map, box: Box) -> None:
    """White lines between the spans, where spans have several columns."""
    num_columns = one.values_XX.shape[1]
    if len(one.spans) < num_columns:
        width = 0.8 if len(one.spans) <= 16 else 0.3
        for first, _ in one.spans[1:]:
            sheet.divide(box.x + first * box.width / num_columns, box.y, box.y + box.height, width)


def _colour_bar(sheet: Sheet, one: Map, box: Box) -> None:
    sheet.show(Cells(np.linspace(1, 0, 128)[:, None], box, 0.0, 1.0, one.colours))
    ticks = [tick for tick in MaxNLocator(4).tick_values(one.low, one.high) if one.low <= tick <= one.high]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    digits = next(n for n in range(7) if n == 6 or abs(round(step, n) - step) < 1e-9)
    for tick in ticks:
        y = box.y + box.height * (tick - one.low) / (one.high - one.low)
        text = f"{tick:.{digits}f}".replace("-", "−")
        sheet.write(box.x + box.width + 0.05, y, text, 8.5)
    size = min(9.5, 9.5 * box.height / text_width(one.scale, 9.5))
    sheet.write(box.x + 0.69, box.y + box.height / 2, one.scale, size, "center", upright=True)


def _bound(values: NDArray[np.float64]) -> float:
    """The largest size of a finite value, so that colours are even about zero."""
    finite = np.abs(values[np.isfinite(values)])
    return max(float(finite.max()) if finite.size else 0.0, 1e-3)
