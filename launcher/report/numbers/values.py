"""How a number stands in the results: its mean and spread over seeds, its bounds, its layers.

Shape legend: Y MoE layers, Z resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_testbed.routing.metrics import REPORTED, Interval, Metric

Results = dict[str, Any]
"""The content of results.json, or a part of it."""

SIGNIFICANT_DIGITS = 9

Source = TypeVar("Source")


def stat(values: Sequence[float], bounds: Interval | None = None) -> Results:
    """Returns mean and sample standard deviation over seeds, null where not finite; with the bounds of an interval, if
    any."""
    mean = float(np.mean(values)) if values else math.nan
    spread = float(np.std(values, ddof=1)) if len(values) > 1 and math.isfinite(mean) else math.nan
    found: Results = {"mean": mean, "spread": spread, "seeds": len(values)}
    if bounds is not None:
        found |= {name: bound for name, bound in asdict(bounds).items() if name != "value"}
    return found


def layered(seeds: Iterable[Sequence[float]], bounds: Interval | None = None) -> Results:
    """Returns the mean over layers, and each layer, over seeds. A layer whose value is nan is left out of the mean."""
    values = list(seeds)
    averages = [over_layers(layers) for layers in values]
    return {**stat(averages, bounds), "layers": [stat(list(layer)) for layer in zip(*values, strict=True)]}


def over_layers(values: Sequence[float]) -> float:
    """The mean of the layers that have a value; nan where none has."""
    present = [float(value) for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def over_layers_of_many(values_ZY: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns `over_layers` [Z] of each row [Z, Y]."""
    known_ZY = ~np.isnan(values_ZY)
    sum_Z, number_Z = np.where(known_ZY, values_ZY, 0.0).sum(axis=1), known_ZY.sum(axis=1)
    return np.divide(sum_Z, number_Z, out=np.full_like(sum_Z, np.nan), where=number_Z > 0)


def by_layer(sources: Sequence[Source], of_layers: Callable[[Source], Sequence[float] | None]) -> Results | None:
    """Returns `layered` over the seeds that have the number; None where none has."""
    found = [values for source in sources if (values := of_layers(source)) is not None]
    return layered(found) if found else None


def of_layers(metric: Metric, source: object, **arrays: Any) -> list[float] | None:
    """Returns the metric of each MoE layer of an evaluation or an analysis; None where that lacks what the metric is
    of.

    arrays: what the metric may be of and the source has not under this name.
    """
    assert metric.function is not None
    taken = [arrays[name] if name in arrays else getattr(source, name) for name in metric.of]
    if any(array is None for array in taken):
        return None
    has_layers = [name.rpartition("_")[2].startswith("Y") for name in metric.of]
    found = []
    for y in range(len(taken[has_layers.index(True)])):
        of_layer = [array[y] if layers else array for array, layers in zip(taken, has_layers, strict=True)]
        found.append(float(metric.function(*of_layer)))
    return found


def in_part(part: str) -> tuple[Metric, ...]:
    """The metrics of a part of a run that are computed layer by layer."""
    return tuple(metric for metric in REPORTED if metric.part == part and metric.of)


def part_of(part: str, sources: Sequence[object]) -> Results | None:
    """The numbers of all metrics in a part of a run, over the seeds that have them; None where none has any."""
    found = {metric.name: by_layer(sources, partial(of_layers, metric)) for metric in in_part(part)}
    return found if any(value is not None for value in found.values()) else None


def rounded(value: Any) -> Any:
    """Returns the value in plain JSON: floats at nine digits, so that no summation order shows, null where not
    finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value
