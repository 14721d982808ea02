"""Confidence intervals by the bootstrap: over documents for one training, over seeds for several.

Tokens of one document are alike, so that whole documents are drawn, not tokens: the evaluation sequences of a domain
that share a document are one cluster, and clusters are drawn with replacement within their domain. An interval over
documents says how a figure would differ on other texts of the same domains; the noise of training is not in it. An
interval over seeds has that noise, and over few seeds it is little more than their range.

Every interval has the same pseudo-random draws each time it is computed.

Shape legend: D domains, E experts, C clusters, I seeds, Z resamples, X items of any kind.

Source: Davison and Hinkley, "Bootstrap Methods and Their Application" (1997), sections 3.8 (clusters), 5.2 (the basic
interval) and 5.3 (the percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_testbed.routing.metrics.counts import FloatArray
from moe_testbed.routing.metrics.metric import Metric

CONFIDENCE = 0.95
RESAMPLES = 2000
"""The number of resamples of a mean, which costs next to nothing."""
COUNTS_RESAMPLES = 200
"""The number of resamples of a metric of counts, which is computed once for each of them."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its bootstrap interval, at nominally 95 %, and over what was resampled."""

    value: float
    low: float
    high: float
    over: str


def counts_interval(
    metric: Callable[[FloatArray], float],
    cluster_counts_CE: ArrayLike,
    cluster_domain_C: ArrayLike,
    resamples: int = COUNTS_RESAMPLES,
    within: tuple[float, float] = (0.0, float("inf")),
    of_many: Callable[[FloatArray], FloatArray] | None = None,
) -> Interval:
    """Returns `metric` of the table of counts, with its interval over documents.

    The basic interval, [2m - q_high, 2m - q_low] for the estimate m and the quantiles q of the resampled metric. It
    takes off the bias of metrics such as `domain_information`, which few documents push up: a resample has fewer
    distinct documents, and is pushed by about as much again. Where that bias exceeds the noise, the interval is
    stretched to hold the estimate too.

    metric: of a table of counts [D, E]. cluster_counts_CE: assignments by cluster. cluster_domain_C: domain of each
    cluster; -1 leaves a cluster out. within: the metric's range, beyond which no bound goes. of_many: the metric of
    many tables at once, [Z, D, E] to [Z], which is quicker.
    The bounds are nan where the metric is, or where a domain has one cluster only, whose noise cannot be seen.
    Raises ValueError where the shapes do not fit.
    """
    counts, domains = np.asarray(cluster_counts_CE, dtype=np.float64), np.asarray(cluster_domain_C, dtype=np.int64)
    if counts.ndim != 2 or domains.shape != counts.shape[:1] or not (domains >= 0).any():
        raise ValueError(
            "cluster_counts_CE must be clusters x experts with one domain a cluster, and one of them at least 0, got "
            f"shapes {counts.shape} and {domains.shape}"
        )
    rng = np.random.default_rng(0)
    num_domains = int(domains.max()) + 1
    by_domain = [counts[domains == domain] for domain in range(num_domains)]
    value = float(metric(np.stack([cluster_counts.sum(axis=0) for cluster_counts in by_domain])))
    if not np.isfinite(value) or any(len(cluster_counts) == 1 for cluster_counts in by_domain):
        return Interval(value, float("nan"), float("nan"), "documents")
    tables_DZE = [draws(rng, len(cluster_counts), resamples) @ cluster_counts for cluster_counts in by_domain]
    tables_ZDE = np.stack(tables_DZE, axis=1)
    resampled_Z = np.array([metric(table_DE) for table_DE in tables_ZDE]) if of_many is None else of_many(tables_ZDE)
    low, high = percentiles(resampled_Z)
    low, high = np.clip([min(2 * value - high, value), max(2 * value - low, value)], *within)
    return Interval(value, float(low), float(high), "documents")


def seeds_interval(values_I: ArrayLike) -> Interval:
    """The mean over seeds, with its percentile interval over seeds; nan bounds for a single seed.

    Seeds whose value is nan make all of it nan: a run that failed is not left out in silence.
    Raises ValueError where there are no seeds.
    """
    values = np.asarray(values_I, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values_I must be one number a seed, got shape {values.shape}")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"), "seeds")
    drawn_Z = draws(np.random.default_rng(0), len(values), RESAMPLES) @ values / len(values)
    return percentile_interval(mean, drawn_Z, "seeds")


def percentile_interval(value: float, resampled_Z: FloatArray, over: str) -> Interval:
    """The interval between the quantiles of the resampled values; all nan for an estimate that is not finite."""
    if not np.isfinite(value):
        return Interval(float("nan"), float("nan"), float("nan"), over)
    low, high = percentiles(resampled_Z)
    return Interval(value, float(low), float(high), over)


def percentiles(resampled_ZX: FloatArray) -> FloatArray:
    """The quantiles [2, X] between which the middle 95 % of the resampled values lie, for X values or for one."""
    tail = 100 * (1 - CONFIDENCE) / 2
    quantiles: FloatArray = np.percentile(resampled_ZX, [tail, 100 - tail], axis=0)
    return quantiles


def draws(rng: np.random.Generator, size: int, resamples: int) -> FloatArray:
    """How often each of `size` items is drawn when `size` are drawn with replacement, [Z, size]."""
    if size == 0:
        return np.zeros((resamples, 0))
    drawn_ZX = rng.integers(0, size, size=(resamples, size))
    drawn_ZX += size * np.arange(resamples)[:, None]
    times_ZX = np.bincount(drawn_ZX.reshape(-1), minlength=resamples * size).reshape(resamples, size)
    return times_ZX.astype(np.float64)  # for products, which are slow over integers


METRICS = (
    Metric(
        name="seeds_interval",
        function=seeds_interval,
        question="How far would the mean differ with other seeds?",
        formula="percentiles of the mean over seeds drawn with replacement",
        range="nan bounds for one seed",
        blind_to="few seeds: with two or three it is their range; see below",
    ),
    Metric(
        name="counts_interval",
        function=counts_interval,
        question="How far would a metric of counts differ on other documents?",
        formula="[2m − q_high, 2m − q_low], q quantiles of the metric over resampled documents",
        range="within the metric's range",
        blind_to="the noise of training; few documents a domain make it too narrow",
    ),
)
