"""The gap to the reference router: how much of the reference's lead over its control a router recovers.

    recovered = (L_control - L_router) / (L_control - L_reference)

L is the validation loss in nats per token, the mean over domains of equal weight. The control has the reference's
structure and none of its information, so the denominator is what knowing the domains is worth, and a router is asked
how much of that it finds by itself: 0 is the control, 1 the reference, above 1 better than the reference.

Noise is estimated by the percentile bootstrap, paired, since all runs see the same seeds and the same evaluation
sequences: over seeds where there are at least two, else over documents within each domain (`cluster_N`: sequences that
share a document), or over sequences where the documents are not known or a domain has one only. Over few seeds the
interval is close to their range, not to its nominal level; over documents it leaves out the noise of training.

Shape legend: I seeds, N evaluated sequences, C clusters of one domain, Z resamples, O runs, X sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.bootstrap import RESAMPLES, Interval, draws, percentile_interval
from moe_testbed.routing.metrics.counts import FloatArray
from moe_testbed.routing.metrics.metric import Metric


@dataclass(frozen=True)
class Recovered:
    """What a router recovers: its `share` of the reference's `lead` over the control, or why that is undefined."""

    share: Interval
    lead: Interval
    undefined: str | None


def lead(
    behind_IN: ArrayLike, ahead_IN: ArrayLike, domain_N: ArrayLike, cluster_N: ArrayLike | None = None
) -> Interval:
    """L_behind - L_ahead in nats per token, with its interval.

    behind_IN, ahead_IN: mean loss of each evaluation sequence under each seed, paired in both dimensions.
    domain_N: domain of each sequence, at least 0. cluster_N: its cluster, by document; used with a single seed.
    The bounds are nan where a single seed has a domain with one sequence. Raises ValueError where shapes do not fit.
    """
    losses_OIN, domains, clusters = _paired(domain_N, cluster_N, behind_IN, ahead_IN)
    means_O, resampled_ZO, over = resampled_losses(losses_OIN, domains, clusters)
    return percentile_interval(float(means_O[0] - means_O[1]), resampled_ZO[:, 0] - resampled_ZO[:, 1], over)


def recovered(
    control_IN: ArrayLike,
    router_IN: ArrayLike,
    reference_IN: ArrayLike,
    domain_N: ArrayLike,
    cluster_N: ArrayLike | None = None,
) -> Recovered:
    """The share of the reference's lead over the control that the router recovers; see the module's docstring.

    Undefined (nan, with the reason) when the lower bound of the lead is not above 0: the denominator is then within
    its noise, or the reference does not lead at all. Arguments as in `lead`.
    """
    losses_OIN, domains, clusters = _paired(domain_N, cluster_N, control_IN, router_IN, reference_IN)
    means_O, resampled_ZO, over = resampled_losses(losses_OIN, domains, clusters)
    lead_Z = resampled_ZO[:, 0] - resampled_ZO[:, 2]
    reference_lead = percentile_interval(float(means_O[0] - means_O[2]), lead_Z, over)
    undefined = why_undefined(reference_lead) or (None if np.isfinite(means_O[1]) else "its loss is not finite")
    if undefined:
        return Recovered(Interval(float("nan"), float("nan"), float("nan"), over), reference_lead, undefined)
    gain_Z = resampled_ZO[:, 0] - resampled_ZO[:, 1]
    # Resamples in which the reference does not lead lie beyond the interval's lower bound; they have no share.
    share_Z = gain_Z[lead_Z > 0] / lead_Z[lead_Z > 0]
    share = float((means_O[0] - means_O[1]) / (means_O[0] - means_O[2]))
    return Recovered(percentile_interval(share, share_Z, over), reference_lead, None)


def why_undefined(reference_lead: Interval) -> str | None:
    """Why `recovered` has no denominator under this lead of the reference over its control, or None if it has one."""
    if not np.isfinite(reference_lead.value):
        return "the reference's or its control's loss is not finite"
    if not np.isfinite(reference_lead.low):
        return f"the noise of the reference's lead cannot be seen: a domain has one of its {reference_lead.over} only"
    bounds = f"[{reference_lead.low:.4f}, {reference_lead.high:.4f}] over {reference_lead.over}"
    if reference_lead.value <= 0:
        return f"the reference does not lead its control ({reference_lead.value:+.4f} nats per token, {bounds})"
    if not reference_lead.low > 0:
        return f"the reference's lead of {reference_lead.value:.4f} nats per token is within its noise {bounds}"
    return None


def _paired(
    domain_N: ArrayLike, cluster_N: ArrayLike | None, *losses_IN: ArrayLike
) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64] | None]:
    runs = [np.atleast_2d(np.asarray(losses, dtype=np.float64)) for losses in losses_IN]
    domains = np.asarray(domain_N, dtype=np.int64)
    shapes = sorted({run.shape for run in runs})
    if len(shapes) != 1 or shapes[0][1:] != domains.shape or not domains.size:
        raise ValueError(
            f"losses must be paired, seeds x sequences with one domain a sequence, got {shapes} and {domains.shape}"
        )
    clusters = None if cluster_N is None else np.asarray(cluster_N, dtype=np.int64)
    if clusters is not None and clusters.shape != domains.shape:
        raise ValueError(f"there must be one cluster a sequence, {domains.shape}, got {clusters.shape}")
    return np.stack(runs), domains, clusters


def resampled_losses(
    losses_OIN: FloatArray, domain_N: NDArray[np.int64], cluster_N: NDArray[np.int64] | None
) -> tuple[FloatArray, FloatArray, str]:
    """The losses [O] of the runs, the same in Z resamples [Z, O], and over what they were resampled.

    losses_OIN: mean loss of each sequence, domain_N and cluster_N as in `lead`. The draws are the same for every call
    with the same domains and clusters, so that runs, and differences of runs, can be compared across calls.
    """
    chosen_per_domain = [domain_N == domain for domain in np.unique(domain_N)]
    loss_OI = np.mean([losses_OIN[:, :, chosen_N].mean(axis=2) for chosen_N in chosen_per_domain], axis=0)
    num_seeds = loss_OI.shape[1]
    if num_seeds > 1:
        (weights_ZI,) = _weights((num_seeds,))
        return loss_OI.mean(axis=1), weights_ZI @ loss_OI.T / num_seeds, "seeds"
    over, unit_N = "documents", cluster_N
    if unit_N is None or any(len(np.unique(unit_N[chosen_N])) < 2 for chosen_N in chosen_per_domain):
        over, unit_N = "evaluation sequences", np.arange(len(domain_N))
    units = [np.unique(unit_N[chosen_N], return_inverse=True, return_counts=True)[1:] for chosen_N in chosen_per_domain]
    weights = _weights(tuple(len(size_C) for _, size_C in units))
    resampled = [
        _domain_means(losses_OIN[:, 0, chosen_N], unit_N, size_C, weights_ZC)
        for chosen_N, (unit_N, size_C), weights_ZC in zip(chosen_per_domain, units, weights, strict=True)
    ]
    return loss_OI[:, 0], np.mean(resampled, axis=0), over


def _domain_means(
    losses_ON: FloatArray, unit_N: NDArray[np.int64], size_C: NDArray[np.int64], weights_ZC: NDArray[np.uint16]
) -> FloatArray:
    """The mean loss [Z, O] of one domain when its units are drawn anew; nan for a single unit."""
    if len(size_C) == 1:
        return np.full((RESAMPLES, len(losses_ON)), np.nan)
    sum_OC = np.stack([np.bincount(unit_N, losses_N) for losses_N in losses_ON])
    sums_ZX = weights_ZC.astype(np.float64) @ np.vstack([sum_OC, size_C]).T
    return sums_ZX[:, :-1] / sums_ZX[:, -1:]


@lru_cache(maxsize=64)
def _weights(sizes: tuple[int, ...]) -> tuple[NDArray[np.uint16], ...]:
    """How often each unit of each domain is drawn, [Z, size]; kept, since every run of a suite asks for the same."""
    rng = np.random.default_rng(0)
    none = np.zeros((RESAMPLES, 1), dtype=np.uint16)
    return tuple(draws(rng, size, RESAMPLES).astype(np.uint16) if size > 1 else none for size in sizes)


METRICS = (
    Metric(
        name="loss",
        title="Loss",
        part="",
        question="How well does the model predict the next token?",
        formula="mean over domains of (Σ −ln p(token) / tokens)",
        range="0 upwards, nats per token; lower is better",
        blind_to="sizes of domains: every domain counts the same, however many tokens it has",
        note="It is the cross-entropy on the evaluation split.",
        digits=3,
        bounded=(0.0, float("inf")),
        column="first",
        compared=True,
        tracked=True,
    ),
    Metric(
        name="recovered",
        title="Recovered",
        function=recovered,
        part="",
        question="How much of what the domain labels are worth does a router find by itself?",
        formula="(L_control − L_router) / (L_control − L_reference)",
        range="0 is the control, 1 the reference; it may lie outside",
        blind_to="how the router does it; whether the reference could be better",
        note="The control has the reference's structure with labels permuted among sequences. The reference is its "
        "best form by this loss. The interval, at nominally 95 %, is a paired bootstrap: over seeds, or, with one "
        "seed, over documents within each domain; the latter leaves out the noise of training. Over two or three seeds "
        "the interval is their range, which holds the truth in about one of two cases, or three of four. Recovered is "
        "undefined where the reference's lead over its control is within its own noise.",
        digits=0,
        in_percent=True,
        bounded=(float("-inf"), float("inf")),
        column="first",
        compared=True,
        tracked=True,
    ),
    Metric(
        name="perplexity",
        title="Perplexity",
        part="",
        question="Among how many equally likely tokens would the model be as unsure?",
        formula="exp(loss)",
        range="1 upwards; lower is better",
        blind_to="what the loss is blind to",
        note="It is that of each seed's loss, then averaged over seeds.",
        column="third",
        tracked=True,
    ),
    Metric(
        name="lead",
        function=lead,
        question="By how much is one run better than another?",
        formula="L_behind − L_ahead, domains of equal weight",
        range="nats per token, with an interval",
        blind_to="the noise of training, with one seed",
    ),
    Metric(
        name="why_undefined",
        function=why_undefined,
        question="Is there a gap to recover?",
        formula="the lower bound of the reference's lead must be above 0",
        range="a reason, or None",
        blind_to="how large the gap is",
    ),
)
