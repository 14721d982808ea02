"""Agreement with the reference router: the experts are matched to the domains, as if they were its groups.

The reference gives every domain its own group of experts. A learned router numbers its experts as it likes, so each
expert is first given to one domain, no domain getting more than ceil(E/D) experts, so that as much of the routing as
possible stays within its own domain's experts (Hungarian method). What stays is then measured.

Shape legend: D domains, E experts; tables, weights and domains without assignments as in `counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.counts import (
    DEAD_SHARE,
    FloatArray,
    conditional,
    joint,
    present_weights,
    table,
    weighted_mean,
)
from moe_testbed.routing.metrics.metric import COUNTS, Metric

NO_GROUP = -1


@dataclass(frozen=True)
class Agreement:
    """How far a routing is that of the reference, up to the numbering of its experts; each 0 to 1."""

    precision: float
    coverage: float
    regret: float


def matched_groups(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> NDArray[np.int64]:
    """The domain [E] to which each expert is matched; at most ceil(E/D) experts a domain.

    D counts the domains that have weight and assignments; the others get no expert. Experts without assignments fill
    what places are left. -1 for every expert of a table without assignments.
    """
    present_D = np.flatnonzero(present_weights(counts_DE, weights_D))
    joint_DE = joint(counts_DE, weights_D)
    if not len(present_D):
        return np.full(joint_DE.shape[1], NO_GROUP, dtype=np.int64)
    return present_D[_best_assignment(joint_DE.tobytes(), *joint_DE.shape)]


def matched_purity(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_e pi_m P(e|m) for the domain m that expert e is matched to: purity under equal shares; 0 to 1.

    It sees what `purity` does not, a domain that owns nearly all experts; where each domain's fair share of experts
    is enough, the two agree. Chance is 1/D. nan for a table without assignments.
    """
    return _precision(table(counts_DE), matched_groups(counts_DE, weights_D), weights_D)


def reference_agreement(
    counts_DE: ArrayLike, weights_D: ArrayLike | None = None, routed_DE: ArrayLike | None = None
) -> Agreement:
    """Precision, coverage and regret of the routing against its matched groups.

    precision: sum_d pi_d of the share of domain d's routed weight that goes to d's own experts; chance is 1/D.
    coverage: mean over domains, weighted by pi_d, of the share of d's own experts that it uses: those that get at
    least a tenth of the even share of what the domain sends to them. Domains to which no expert is matched (E < D)
    have no coverage and are left out of it; it says nothing about how much of a domain goes to its own experts.
    regret: 1 - precision, the share of the weight that the reference would have sent elsewhere.

    counts_DE decides the matching. routed_DE: sums of routing weights; by default the counts, and then precision is
    `matched_purity`. nan where there are no assignments. Raises ValueError where the two tables differ in shape.
    """
    group_E = matched_groups(counts_DE, weights_D)
    routed = table(counts_DE if routed_DE is None else routed_DE)
    if routed.shape != np.shape(counts_DE):
        raise ValueError(f"routed_DE must have the shape of counts_DE, {np.shape(counts_DE)}, got {routed.shape}")
    precision = _precision(routed, group_E, weights_D)
    return Agreement(precision, _coverage(routed, group_E, weights_D), 1.0 - precision)


def precision(counts_DE: ArrayLike, routed_DE: ArrayLike | None = None) -> float:
    """The precision of `reference_agreement`, domains of equal weight."""
    return reference_agreement(counts_DE, routed_DE=routed_DE).precision


def coverage(counts_DE: ArrayLike, routed_DE: ArrayLike | None = None) -> float:
    """The coverage of `reference_agreement`, domains of equal weight."""
    return reference_agreement(counts_DE, routed_DE=routed_DE).coverage


def regret(counts_DE: ArrayLike, routed_DE: ArrayLike | None = None) -> float:
    """The regret of `reference_agreement`, domains of equal weight."""
    return reference_agreement(counts_DE, routed_DE=routed_DE).regret


def _precision(routed_DE: FloatArray, group_E: NDArray[np.int64], weights_D: ArrayLike | None) -> float:
    own_DE = group_E == np.arange(len(routed_DE))[:, None]
    return weighted_mean((conditional(routed_DE) * own_DE).sum(axis=1), present_weights(routed_DE, weights_D))


def _coverage(routed_DE: FloatArray, group_E: NDArray[np.int64], weights_D: ArrayLike | None) -> float:
    own_DE = group_E == np.arange(len(routed_DE))[:, None]
    own_routed_DE = routed_DE * own_DE
    size_D = own_DE.sum(axis=1)
    even_D = own_routed_DE.sum(axis=1) / np.maximum(size_D, 1)
    used_DE = own_DE & (own_routed_DE > 0) & (own_routed_DE >= DEAD_SHARE * even_D[:, None])
    return weighted_mean(
        used_DE.sum(axis=1) / np.maximum(size_D, 1), present_weights(routed_DE, weights_D) * (size_D > 0)
    )


@lru_cache(maxsize=128)
def _best_assignment(joint_bytes: bytes, num_domains: int, num_experts: int) -> NDArray[np.int64]:
    """The row [E] of each expert; remembered, since groups, purity and agreement of one table need the same."""
    from scipy.optimize import linear_sum_assignment

    joint_DE = np.frombuffer(joint_bytes).reshape(num_domains, num_experts)
    places_per_domain = -(-num_experts // num_domains)
    places, experts = linear_sum_assignment(np.repeat(joint_DE, places_per_domain, axis=0), maximize=True)
    row_E = np.empty(num_experts, dtype=np.int64)
    row_E[experts] = places // places_per_domain
    return row_E


METRICS = (
    Metric(
        name="matched_groups",
        function=matched_groups,
        question="If this were the reference, whose expert would each be?",
        formula="the assignment m of experts to domains with the highest Σ_e π_m P(e|m)",
        range="a domain for each expert, -1 without assignments",
        blind_to="ties; experts without assignments fill what places are left",
    ),
    Metric(
        name="matched_purity",
        title="Matched purity",
        function=matched_purity,
        of=COUNTS,
        part="routing",
        question="What is the purity when no domain may own more than its even number of experts?",
        formula="Σ_e π_m P(e|m), m the domain that e is matched to",
        range="1/D (chance) to 1",
        blind_to="how a domain divides its experts",
        note="Experts are matched to domains by the Hungarian method.",
    ),
    Metric(
        name="reference_agreement",
        function=reference_agreement,
        question="How far is this the reference's routing?",
        formula="precision, coverage and regret together",
        range="each 0 to 1",
        blind_to="what each of the three is blind to",
    ),
    Metric(
        name="precision",
        title="Precision",
        function=precision,
        of=("counts_top_k_YDE", "routed_YDE"),
        part="agreement",
        question="How much of the routing weight stays with the domain's own experts?",
        formula="Σ_d π_d w(d, own experts) / w(d) for routing weights w",
        range="1/D (chance) to 1 (the reference's routing)",
        blind_to="whether own experts are idle",
        note="Experts are matched to domains so that this is as high as it can be, no domain getting more than ⌈E/D⌉ "
        "experts. It is of weights; of counts where a run did not record weights.",
    ),
    Metric(
        name="coverage",
        title="Coverage",
        function=coverage,
        of=("counts_top_k_YDE", "routed_YDE"),
        part="agreement",
        question="Does a domain use the experts that are matched to it?",
        formula="share of its own experts that a domain uses, each at least a tenth of the even share among them",
        range="0 to 1",
        blind_to="how much of a domain goes to its own experts",
    ),
    Metric(
        name="regret",
        title="Regret",
        function=regret,
        of=("counts_top_k_YDE", "routed_YDE"),
        part="agreement",
        question="What share of the weight would the reference have sent elsewhere?",
        formula="1 − precision",
        range="0 to 1; 1 − 1/D is chance",
        blind_to="what precision is blind to",
    ),
)
