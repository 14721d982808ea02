"""The numbers of an evaluation's tables: specialization, utilization, router, vocabulary; each per layer and averaged.

Shape legend: Y MoE layers, D domains, E experts, C clusters of sequences that share a document, V token ids, Z
resamples, X columns of all layers or tables of all resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.values import (
    Results,
    by_layer,
    in_part,
    layered,
    of_layers,
    over_layers,
    over_layers_of_many,
    part_of,
)
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.routing import metrics
from moe_testbed.routing.metrics import COUNTS, REPORTED, Interval, Metric

OF_COUNTS = tuple(metric for metric in in_part("routing") if metric.of == COUNTS)
"""The metrics that are computed of every form of the counts."""
OF_SHUFFLED = tuple(metric for metric in in_part("routing") if metric.of != COUNTS)
"""The metrics that compare with the counts under shuffled labels, which are known of all choices only."""
USAGE = tuple(metric for metric in REPORTED if metric.part == "" and metric.of)


def routing(evaluations: Sequence[Evaluation]) -> Results:
    """Returns form -> metric -> mean, spread and layers, with the interval of each bounded metric of all choices."""
    forms: dict[str, Callable[[Evaluation], NDArray[np.int64]]] = {
        "top_1": lambda evaluation: evaluation.counts_top_1_YDE,
        "top_k": lambda evaluation: evaluation.counts_top_k_YDE,
    }
    if any(evaluation.dropped_YDE.any() for evaluation in evaluations):
        forms["top_k_kept"] = lambda evaluation: evaluation.counts_top_k_YDE - evaluation.dropped_YDE
    found: Results = {
        form: {metric.name: layered(_counted(metric, table(e)) for e in evaluations) for metric in OF_COUNTS}
        for form, table in forms.items()
    }
    found["top_k"] |= {metric.name: layered(_each(metric, evaluations)) for metric in OF_SHUFFLED}
    _add_intervals(found["top_k"], evaluations)
    return found


def _add_intervals(top_k: Results, evaluations: Sequence[Evaluation]) -> None:
    """Adds the bounds of the bounded metrics: over seeds where there are several, else over documents."""
    bounded = [metric for metric in (*OF_COUNTS, *OF_SHUFFLED) if metric.bounded is not None]
    if len(evaluations) > 1:
        for metric in bounded:
            averages = [over_layers(layers) for layers in _each(metric, evaluations)]
            top_k[metric.name] |= _bounds(metrics.seeds_interval(averages))
    elif evaluations:
        for metric in bounded:
            if metric.of == COUNTS:
                top_k[metric.name] |= _over_documents(evaluations[0], metric)
        information, above = top_k["domain_information"], top_k["domain_information_above_shuffled"]
        if "low" in information:
            # The bias that the shuffled level measures is off the information's interval already: it is taken as it is.
            above |= {
                "low": min(information["low"], above["mean"]),
                "high": max(information["high"], above["mean"]),
                "over": information["over"],
            }


def usage(evaluations: Sequence[Evaluation], domains: Sequence[str]) -> Results:
    """Returns experts per token and dropped assignments, these by domain too."""

    def of_domain(evaluation: Evaluation, d: int) -> list[float]:
        tables = zip(evaluation.counts_top_k_YDE, evaluation.dropped_YDE, strict=True)
        return [metrics.drop_rate(counts_DE[[d]], dropped_DE[[d]]) for counts_DE, dropped_DE in tables]

    return {
        **{metric.name: layered(_each(metric, evaluations)) for metric in USAGE},
        "drop_rate_by_domain": {
            domain: layered(map(partial(of_domain, d=d), evaluations)) for d, domain in enumerate(domains)
        },
    }


def agreement(evaluations: Sequence[Evaluation]) -> Results | None:
    """Says how far the routing weight goes as the reference's would, or the counts where no weights were recorded."""

    def of_run(evaluation: Evaluation, metric: Metric) -> list[float] | None:
        counts_YDE, weight_YDE = evaluation.counts_top_k_YDE, evaluation.weight_YDE
        return of_layers(metric, evaluation, routed_YDE=counts_YDE if weight_YDE is None else weight_YDE)

    present = [evaluation for evaluation in evaluations if len(evaluation.counts_top_k_YDE)]
    if not present:
        return None
    return {metric.name: by_layer(present, partial(of_run, metric=metric)) for metric in in_part("agreement")}


def vocabulary(evaluations: Sequence[Evaluation]) -> Results | None:
    """Says how far the token id decides the first choice, with the level of chance."""
    with_words = [e for e in evaluations if e.vocabulary_ids_V is not None and len(e.vocabulary_ids_V)]
    found = part_of("vocabulary", with_words)
    ids = [len(e.vocabulary_ids_V) for e in evaluations if e.vocabulary_ids_V is not None]
    return None if found is None else {**found, "token_ids": max(ids)}


def _counted(metric: Metric, counts_YDE: NDArray[Any]) -> list[float]:
    layers = of_layers(metric, None, counts_YDE=counts_YDE)
    assert layers is not None
    return layers


def _each(metric: Metric, evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """The layers of a metric of arrays that every evaluation has, all choices where it is of counts."""
    found = [of_layers(metric, evaluation, counts_YDE=evaluation.counts_top_k_YDE) for evaluation in evaluations]
    return [layers for layers in found if layers is not None]


def _over_documents(evaluation: Evaluation, metric: Metric) -> Results:
    """The interval of the mean over layers of one evaluation's metric; nothing where its documents are not known."""
    counts_YCE, domain_C = evaluation.cluster_counts_YCE, evaluation.cluster_domain_C
    assert metric.bounded is not None
    if counts_YCE is None or domain_C is None or 0 in counts_YCE.shape:
        return {}
    num_layers, num_clusters, num_experts = counts_YCE.shape

    def mean_over_layers(counts_DX: NDArray[np.float64]) -> float:
        """All layers of a resample stand beside one another: documents are drawn once for all of them."""
        return over_layers(_counted(metric, np.stack(np.split(counts_DX, num_layers, axis=1))))

    def means_over_layers(counts_ZDX: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same of many resamples at once."""
        assert metric.of_many is not None
        num_resamples, num_domains, _ = counts_ZDX.shape
        of_layers_ZDYE = counts_ZDX.reshape(num_resamples, num_domains, num_layers, num_experts)
        tables_XDE = of_layers_ZDYE.transpose(0, 2, 1, 3).reshape(-1, num_domains, num_experts)
        return over_layers_of_many(metric.of_many(tables_XDE).reshape(num_resamples, num_layers))

    counts_CX = counts_YCE.transpose(1, 0, 2).reshape(num_clusters, num_layers * num_experts)
    interval = metrics.counts_interval(
        mean_over_layers,
        counts_CX,
        domain_C,
        within=metric.bounded,
        of_many=None if metric.of_many is None else means_over_layers,
    )
    return _bounds(interval)


def _bounds(interval: Interval) -> Results:
    return {"low": interval.low, "high": interval.high, "over": interval.over}
