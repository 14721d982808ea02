"""Specialization and utilization of experts, from counts of routed tokens.

Shape legend: D domains, E experts. `counts_DE[d, e]` is the number of assignments of tokens of domain d to expert e in
one layer, either of first choices (top-1) or of all choices (top-k); a number means little without saying which.
`weights_D` are the domains' weights in the mix, pi_d, equal by default, because unequal evaluation sets would
otherwise decide the result. P(e|d) = n_de / n_d and P(e) = sum_d pi_d P(e|d), the load of the mix. All logarithms
are natural.

Degenerate tables are answered, not warned about: a domain without any assignment is left out and the weights of the
others are scaled up; a table without any assignment, or without any weight, gives nan everywhere; a measure whose
normaliser is zero says in its docstring what it gives. A table that is not a table of counts raises ValueError.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

DEAD_SHARE = 0.1
"""An expert is dead when its load is below this share of the even load 1/E."""


def conditional(counts_DE: ArrayLike) -> FloatArray:
    """P(e|d) [D, E]: the share of each domain's assignments that each expert gets (OLMoE's domain specialization).

    Each row sums to 1, in the top-k form too, so that the uniform line is 1/E in both forms. The row of a domain
    without assignments is nan. Blind to how often a domain occurs. Source: OLMoE (arXiv 2409.02060).
    """
    counts = table(counts_DE)
    totals_D1 = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals_D1, out=np.full_like(counts, np.nan), where=totals_D1 > 0)


def present_weights(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> FloatArray:
    """pi_d [D], scaled to sum 1 over the domains that have both weight and assignments; 0 for the others.

    All zero for a table in which no domain has both. Raises ValueError for weights that do not fit the table.
    """
    return _present_weights(table(counts_DE).sum(axis=1), weights_D)


def joint(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> FloatArray:
    """pi_d P(e|d) [D', E], over the D' domains that have both weight and assignments; sums to 1, or has no rows."""
    counts = table(counts_DE)
    totals_D = counts.sum(axis=1)
    weights = _present_weights(totals_D, weights_D)
    present_D = weights > 0
    return counts[present_D] * (weights[present_D] / totals_D[present_D])[:, None]


def load(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> FloatArray:
    """P(e) [E]: the share of the mix that each expert carries; sums to 1 (nan for a table without assignments)."""
    joint_DE = joint(counts_DE, weights_D)
    return joint_DE.sum(axis=0) if len(joint_DE) else np.full(joint_DE.shape[1], np.nan)


# Specialization


def mutual_information(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """I(D; E) = sum_d pi_d sum_e P(e|d) ln(P(e|d) / P(e)), in nats; 0 to min(ln D, ln E).

    How much one assignment tells about the domain. Biased upwards by small samples (see `above_shuffled`), and blind
    to whether few tokens say much or many say little.
    """
    return _information(joint(counts_DE, weights_D))


def domain_information(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """I(D; E) / H(D): the share of the domain label that one assignment gives away; 0 (nothing) to 1 (all of it).

    The measure of specialization to read first: right when there are more experts than domains, since experts that
    share a domain cost nothing. Blind to how the experts of one domain divide it, and, in the top-k form, to experts
    that work in fixed pairs. nan for a single domain, whose label carries no information.
    """
    joint_DE = joint(counts_DE, weights_D)
    domain_entropy = entropy(joint_DE.sum(axis=1))
    if not domain_entropy > 0:
        return float("nan")
    return min(1.0, _information(joint_DE) / domain_entropy)


def above_shuffled(counts_DE: ArrayLike, shuffled_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """`domain_information` less that of the same assignments under labels permuted among sequences.

    -1 to 1; 0 is chance. It removes what few sequences, or sequences of one topic, would show without any
    specialization by domain. One permutation is itself a sample, so small negative values are noise.
    """
    return domain_information(counts_DE, weights_D) - domain_information(shuffled_DE, weights_D)


def nmi_geometric(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """I(D; E) / sqrt(H(D) H(E)): normalised mutual information with the geometric mean; 0 to 1.

    1 needs one expert per domain: with E > D it stays below 1 even for perfect specialization, and it rises when
    experts die; `domain_information` does neither. 0 when one expert takes everything; nan for a single domain.
    Source: Strehl and Ghosh, JMLR 3 (2002), equation 2.
    """
    joint_DE = joint(counts_DE, weights_D)
    domain_entropy, expert_entropy = entropy(joint_DE.sum(axis=1)), entropy(joint_DE.sum(axis=0))
    if not domain_entropy > 0:
        return float("nan")
    if expert_entropy == 0:
        return 0.0
    return min(1.0, _information(joint_DE) / float(np.sqrt(domain_entropy * expert_entropy)))


def purity(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_e max_d pi_d P(e|d): how often the domain is guessed right from the expert alone; 1/D (chance) to 1.

    Blind to everything but each expert's largest domain, and to one domain owning nearly all experts.
    """
    joint_DE = joint(counts_DE, weights_D)
    return float(joint_DE.max(axis=0).sum()) if len(joint_DE) else float("nan")


# Utilization


def effective_experts(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """exp(H(q)) of the load q: the number of evenly used experts that would be as diverse; 1 to E.

    Blind to which experts are used, and hardly moved by one expert at several times its share among many.
    """
    return float(np.exp(entropy(load(counts_DE, weights_D))))


def normalised_effective_experts(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """H(q) / ln E: the entropy of the load as a share of its maximum; 0 (one expert) to 1 (even).

    Comparable between different E, and flattering: half of 64 experts dead and the rest even still gives 0.83.
    1 for a single expert, which is always fully used.
    """
    load_E = load(counts_DE, weights_D)
    if np.isnan(load_E[0]) or len(load_E) > 1:
        return entropy(load_E) / float(np.log(max(2, len(load_E))))
    return 1.0


def inverse_simpson(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """1 / sum_e q_e^2: as `effective_experts`, but more sensitive to the busiest experts; 1 to E."""
    return float(1.0 / np.sum(load(counts_DE, weights_D) ** 2))


def dead_experts(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """Share of experts with a load below a tenth of the even load, q_e < 0.1/E; 0 to (E-1)/E.

    Blind to any imbalance among the living. An expert can be dead here and busy on tokens outside the evaluation set.
    """
    load_E = load(counts_DE, weights_D)
    return float("nan") if np.isnan(load_E[0]) else float(np.mean(load_E < DEAD_SHARE / len(load_E)))


def coefficient_of_variation(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """std(q) / mean(q) with the population's std: 0 (even) to sqrt(E - 1) (one expert). Blind to the tails' shape."""
    load_E = load(counts_DE, weights_D)
    return float(load_E.std() / load_E.mean())


def max_violation(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """(max q - mean q) / mean q: by how much the busiest expert exceeds the even load; 0 (even) to E - 1.

    What sets the memory and time of a step under expert parallelism. Blind to every expert but the busiest.
    Source: MaxVio of Wang et al., "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664).
    """
    load_E = load(counts_DE, weights_D)
    return float(load_E.max() * len(load_E) - 1.0)


def gini(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_ij |q_i - q_j| / (2E): the Gini coefficient of the load; 0 (even) to (E-1)/E (one expert).

    Blind to where in the load's distribution the inequality lies.
    """
    load_E = np.sort(load(counts_DE, weights_D))
    num_experts = len(load_E)
    ranks_E = np.arange(1, num_experts + 1)
    return float(np.sum((2 * ranks_E - num_experts - 1) * load_E) / num_experts)


def drop_rate(counts_DE: ArrayLike, dropped_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_d pi_d dropped_d / n_d: the share of assignments that found no place in their expert's buffer; 0 to 1.

    `counts_DE` counts assignments before dropping. Blind to whether a token lost one of its choices or all.
    """
    counts, dropped = table(counts_DE), table(dropped_DE)
    if counts.shape != dropped.shape or np.any(dropped > counts):
        raise ValueError("dropped_DE must have the shape of counts_DE and nowhere exceed it: it is a part of it")
    rate_D = np.divide(dropped.sum(axis=1), counts.sum(axis=1), out=np.zeros(len(counts)), where=counts.any(axis=1))
    return weighted_mean(rate_D, present_weights(counts, weights_D))


def entropy(probabilities: ArrayLike) -> float:
    """-sum p ln p in nats, 0 ln 0 = 0; nan where a probability is nan or there are none."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.size == 0 or np.isnan(p.sum()):
        return float("nan")
    p = p[p > 0]
    return max(0.0, -float(np.sum(p * np.log(p))))


def owners(counts_DE: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The domain that each expert serves most, argmax_d P(e|d) [E], and the experts sorted by it [E].

    Experts of one owner are sorted by falling P(e|d). Domains without assignments own nothing; experts without any
    have no owner, -1, and come last.
    """
    conditional_DE = np.nan_to_num(conditional(counts_DE))
    share_E = conditional_DE.max(axis=0)
    owner_E = np.where(share_E > 0, conditional_DE.argmax(axis=0), -1)
    return owner_E, np.lexsort((-share_E, owner_E, owner_E < 0))


def weighted_mean(values_D: FloatArray, weights_D: FloatArray) -> float:
    """sum_d pi_d x_d / sum_d pi_d over the domains that have weight, nan if none has; elsewhere x_d may be nan."""
    present_D = weights_D > 0
    return float(np.average(values_D[present_D], weights=weights_D[present_D])) if present_D.any() else float("nan")


def table(counts_DE: ArrayLike) -> FloatArray:
    """The counts [D, E] as float64. Raises ValueError where they are no table of counts."""
    counts = np.asarray(counts_DE, dtype=np.float64)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a table of domains x experts, both at least 1, got shape {counts.shape}")
    if not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and at least 0")
    return counts


def _present_weights(totals_D: FloatArray, weights_D: ArrayLike | None) -> FloatArray:
    if weights_D is None:
        weights = np.ones(len(totals_D))
    else:
        weights = np.asarray(weights_D, dtype=np.float64)
        if weights.shape != totals_D.shape or not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise ValueError(
                f"weights_D must be {len(totals_D)} finite numbers of at least 0, one a domain, got {weights}"
            )
    weights = weights * (totals_D > 0)
    return weights / (weights.sum() or 1.0)


def _information(joint_DE: FloatArray) -> float:
    """H(D) + H(E) - H(D, E) of a table that sums to 1; nan for one without rows."""
    by_domain, by_expert = entropy(joint_DE.sum(axis=1)), entropy(joint_DE.sum(axis=0))
    return max(0.0, by_domain + by_expert - entropy(joint_DE)) if len(joint_DE) else float("nan")
