"""The numbers of an evaluation's tables: specialization, utilization, router, vocabulary; each per layer and averaged.

Shape legend: Y MoE layers, D domains, E experts, C clusters of sequences that share a document, V token ids, X columns
of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.values import Results, by_layer, layered, over_layers
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.routing import metrics
from moe_testbed.routing.metrics import Interval

Metric = Callable[[NDArray[np.float64]], float]

METRICS: dict[str, Metric] = {
    "domain_information": metrics.domain_information,
    "nmi_geometric": metrics.nmi_geometric,
    "purity": metrics.purity,
    "matched_purity": metrics.matched_purity,
    "effective_experts": metrics.effective_experts,
    "normalised_effective_experts": metrics.normalised_effective_experts,
    "inverse_simpson": metrics.inverse_simpson,
    "dead_experts": metrics.dead_experts,
    "coefficient_of_variation": metrics.coefficient_of_variation,
    "max_violation": metrics.max_violation,
    "gini": metrics.gini,
}
BOUNDED = ("domain_information", "normalised_effective_experts")
"""The metrics of the top-k form that get an interval; all of them are within 0 to 1."""


def routing(evaluations: Sequence[Evaluation]) -> Results:
    """form -> metric -> mean, spread and layers; intervals for the metrics that a verdict rests on."""
    tables: dict[str, Callable[[Evaluation], NDArray[np.int64]]] = {
        "top_1": lambda evaluation: evaluation.counts_top_1_YDE,
        "top_k": lambda evaluation: evaluation.counts_top_k_YDE,
    }
    if any(evaluation.dropped_YDE.any() for evaluation in evaluations):
        tables["top_k_kept"] = lambda evaluation: evaluation.counts_top_k_YDE - evaluation.dropped_YDE
    values: dict[str, dict[str, list[list[float]]]] = {
        form: {
            name: [[metric(counts_DE) for counts_DE in table(evaluation)] for evaluation in evaluations]
            for name, metric in METRICS.items()
        }
        for form, table in tables.items()
    }
    values["top_k"]["domain_information_shuffled"] = [
        [metrics.domain_information(counts_DE) for counts_DE in evaluation.shuffled_counts_top_k_YDE]
        for evaluation in evaluations
    ]
    values["top_k"]["domain_information_above_shuffled"] = [_above_shuffled(evaluation) for evaluation in evaluations]
    found: Results = {form: {name: layered(seeds) for name, seeds in of.items()} for form, of in values.items()}
    top_k = found["top_k"]
    if len(evaluations) > 1:
        for name in (*BOUNDED, "domain_information_above_shuffled"):
            averages = [over_layers(layers) for layers in values["top_k"][name]]
            top_k[name] |= _bounds(metrics.seeds_interval(averages))
    elif evaluations:
        for name in BOUNDED:
            top_k[name] |= _over_documents(evaluations[0], METRICS[name])
        information, above = top_k["domain_information"], top_k["domain_information_above_shuffled"]
        if "low" in information:
            # The bias that the shuffled level measures is off the information's interval already: it is taken as it is.
            above |= {
                "low": min(information["low"], above["mean"]),
                "high": max(information["high"], above["mean"]),
                "over": information["over"],
            }
    return found


def usage(evaluations: Sequence[Evaluation], domains: Sequence[str]) -> Results:
    """Experts per token and dropped assignments."""
    return {
        "experts_per_token": layered(map(_experts_per_token, evaluations)),
        "drop_rate": layered(map(_drop_rates, evaluations)),
        "drop_rate_by_domain": {
            domain: layered(map(partial(_drop_rates, domain=d), evaluations)) for d, domain in enumerate(domains)
        },
    }


def agreement(evaluations: Sequence[Evaluation]) -> Results | None:
    """Precision, coverage and regret of the routing weight, or of the counts where no weights were recorded."""

    def of_layers(evaluation: Evaluation, name: str) -> list[float]:
        counts_YDE, weight_YDE = evaluation.counts_top_k_YDE, evaluation.weight_YDE
        return [
            float(getattr(metrics.reference_agreement(counts_YDE[y], routed_DE=routed_DE), name))
            for y, routed_DE in enumerate(counts_YDE if weight_YDE is None else weight_YDE)
        ]

    present = [evaluation for evaluation in evaluations if len(evaluation.counts_top_k_YDE)]
    if not present:
        return None
    return {name: by_layer(present, partial(of_layers, name=name)) for name in ("precision", "coverage", "regret")}


def router(evaluations: Sequence[Evaluation]) -> Results | None:
    """How sure, how even and how alike: for routers with scores, or with vectors for their experts."""

    def token_entropy(evaluation: Evaluation) -> list[float] | None:
        return _of_sums(metrics.mean_token_entropy, evaluation.entropy_sum_YD, evaluation.tokens_D)

    def margin(evaluation: Evaluation) -> list[float] | None:
        return _of_sums(metrics.mean_margin, evaluation.margin_sum_YD, evaluation.tokens_D)

    def mean_entropy(evaluation: Evaluation) -> list[float] | None:
        return _each(metrics.entropy_of_mean, evaluation.probability_sum_YDE)

    def cosine(evaluation: Evaluation) -> list[float] | None:
        return _each(metrics.mean_absolute_cosine, evaluation.router_cosine_YEE)

    measures = {
        "mean_token_entropy": token_entropy,
        "entropy_of_mean": mean_entropy,
        "mean_margin": margin,
        "router_cosine": cosine,
    }
    found = {name: by_layer(evaluations, of_layers) for name, of_layers in measures.items()}
    return _unless_empty(found)


def coactivation(evaluations: Sequence[Evaluation]) -> Results | None:
    """How far experts work in fixed pairs: what the strongest partner shares, and what the mean one does."""

    def strongest(evaluation: Evaluation) -> list[float] | None:
        return _each(metrics.mean_strongest_share, evaluation.coactivation_YEE)

    def mean(evaluation: Evaluation) -> list[float] | None:
        return _each(_mean_share, evaluation.coactivation_YEE)

    return _unless_empty(
        {"mean_strongest_share": by_layer(evaluations, strongest), "mean_share": by_layer(evaluations, mean)}
    )


def vocabulary(evaluations: Sequence[Evaluation]) -> Results | None:
    """How far the token id decides the first choice, with the level of chance."""

    def of(metric: Metric) -> Callable[[Evaluation], list[float] | None]:
        return lambda evaluation: _each(metric, evaluation.vocabulary_counts_YVE) if _has_words(evaluation) else None

    found = _unless_empty(
        {
            "token_information": by_layer(evaluations, of(metrics.token_information)),
            "token_information_chance": by_layer(evaluations, of(metrics.token_information_chance)),
            "vocabulary_share": by_layer(evaluations, of(metrics.vocabulary_share)),
        }
    )
    ids = [len(e.vocabulary_ids_V) for e in evaluations if e.vocabulary_ids_V is not None]
    return None if found is None else {**found, "token_ids": max(ids)}


def _over_documents(evaluation: Evaluation, metric: Metric) -> Results:
    """The interval of the mean over layers of one evaluation's metric; nothing where its documents are not known."""
    counts_YCE, domain_C = evaluation.cluster_counts_YCE, evaluation.cluster_domain_C
    if counts_YCE is None or domain_C is None or 0 in counts_YCE.shape:
        return {}
    num_layers, num_clusters, num_experts = counts_YCE.shape

    def mean_over_layers(counts_DX: NDArray[np.float64]) -> float:
        """All layers of a resample beside one another: documents are drawn once for all of them."""
        return over_layers([metric(counts_DE) for counts_DE in np.split(counts_DX, num_layers, axis=1)])

    counts_CX = counts_YCE.transpose(1, 0, 2).reshape(num_clusters, num_layers * num_experts)
    return _bounds(metrics.counts_interval(mean_over_layers, counts_CX, domain_C, within=(0.0, 1.0)))


def _bounds(interval: Interval) -> Results:
    return {"low": interval.low, "high": interval.high, "over": interval.over}


def _above_shuffled(evaluation: Evaluation) -> list[float]:
    tables = zip(evaluation.counts_top_k_YDE, evaluation.shuffled_counts_top_k_YDE, strict=True)
    return [metrics.above_shuffled(counts_DE, shuffled_DE) for counts_DE, shuffled_DE in tables]


def _experts_per_token(evaluation: Evaluation) -> list[float]:
    return [float(counts_DE.sum() / evaluation.tokens) for counts_DE in evaluation.counts_top_k_YDE]


def _drop_rates(evaluation: Evaluation, domain: int | None = None) -> list[float]:
    """Of each layer; over domains of equal weight, or of one."""
    chosen = slice(None) if domain is None else slice(domain, domain + 1)
    tables = zip(evaluation.counts_top_k_YDE[:, chosen], evaluation.dropped_YDE[:, chosen], strict=True)
    return [metrics.drop_rate(counts_DE, dropped_DE) for counts_DE, dropped_DE in tables]


def _of_sums(
    metric: Callable[[NDArray[np.float64], NDArray[np.int64]], float],
    sums_YD: NDArray[np.float64] | None,
    tokens_D: NDArray[np.int64],
) -> list[float] | None:
    return None if sums_YD is None else [metric(sums_D, tokens_D) for sums_D in sums_YD]


def _each(metric: Metric, tables_Y: NDArray[np.float64] | NDArray[np.int64] | None) -> list[float] | None:
    return None if tables_Y is None else [metric(table) for table in tables_Y.astype(np.float64)]


def _mean_share(coactivation_EE: NDArray[np.float64]) -> float:
    """The mean of N_ij / N_i over all pairs: (k - 1) / (E - 1) for k choices a token, whatever the router does."""
    return float(np.nanmean(metrics.coactivation(coactivation_EE))) if np.diag(coactivation_EE).any() else math.nan


def _has_words(evaluation: Evaluation) -> bool:
    return evaluation.vocabulary_ids_V is not None and len(evaluation.vocabulary_ids_V) > 0


def _unless_empty(found: Results) -> Results | None:
    return found if any(value is not None for value in found.values()) else None
