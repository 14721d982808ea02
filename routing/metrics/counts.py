"""The table of counts that most metrics are made of, and the specialization of experts by domain.

Shape legend: D domains, E experts, Z resamples, X items of any kind. `counts_DE[d, e]` is the number of assignments of
tokens of domain d to expert e in one layer, either of first choices (top-1) or of all choices (top-k); a number means
little without saying which.
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

from moe_testbed.routing.metrics.metric import COUNTS, Metric

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
    if not present_D.all():
        counts, weights, totals_D = counts[present_D], weights[present_D], totals_D[present_D]
    return counts * (weights / totals_D)[:, None]


def joint_of_many(counts_ZDE: ArrayLike) -> FloatArray:
    """Returns `joint` of many tables of counts [Z, D, E], domains of equal weight. Absent domains have rows of 0."""
    counts = np.asarray(counts_ZDE, dtype=np.float64)
    totals_ZD = counts.sum(axis=2)
    present_ZD = totals_ZD > 0
    weights_ZD = present_ZD / np.maximum(1, present_ZD.sum(axis=1, keepdims=True))
    scale_ZD = np.divide(weights_ZD, totals_ZD, out=np.zeros_like(totals_ZD), where=present_ZD)
    return counts * scale_ZD[:, :, None]


def load(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> FloatArray:
    """P(e) [E]: the share of the mix that each expert carries; sums to 1 (nan for a table without assignments)."""
    joint_DE = joint(counts_DE, weights_D)
    return joint_DE.sum(axis=0) if len(joint_DE) else np.full(joint_DE.shape[1], np.nan)


# Specialization


def mutual_information(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """I(D; E) = sum_d pi_d sum_e P(e|d) ln(P(e|d) / P(e)), in nats; 0 to min(ln D, ln E).

    How much one assignment tells about the domain. It is biased upwards by small samples (see
    `domain_information_above_shuffled`), and blind to whether few tokens say much or many say little.
    """
    joint_DE = joint(counts_DE, weights_D)
    return _information(joint_DE, entropy(joint_DE.sum(axis=1)), entropy(joint_DE.sum(axis=0)))


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
    return min(1.0, _information(joint_DE, domain_entropy, entropy(joint_DE.sum(axis=0))) / domain_entropy)


def domain_information_above_shuffled(
    counts_DE: ArrayLike, shuffled_DE: ArrayLike, weights_D: ArrayLike | None = None
) -> float:
    """Returns `domain_information` less that of the same assignments under labels permuted among sequences.

    -1 to 1; 0 is chance. It removes what few sequences, or sequences of one topic, would show without any
    specialization by domain. One permutation is itself a sample, so small negative values are noise.
    """
    return domain_information(counts_DE, weights_D) - domain_information(shuffled_DE, weights_D)


def domain_information_of_many(counts_ZDE: ArrayLike) -> FloatArray:
    """Returns `domain_information` [Z] of many tables of counts [Z, D, E], domains of equal weight, in one go."""
    joint_ZDE = joint_of_many(counts_ZDE)
    domain_Z, expert_Z = entropies(joint_ZDE.sum(axis=2)), entropies(joint_ZDE.sum(axis=1))
    information_Z = np.maximum(0.0, domain_Z + expert_Z - entropies(joint_ZDE.reshape(len(joint_ZDE), -1)))
    shares_Z = np.divide(information_Z, domain_Z, out=np.full_like(domain_Z, np.nan), where=domain_Z > 0)
    return np.minimum(1.0, shares_Z)


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
    information = _information(joint_DE, domain_entropy, expert_entropy)
    return min(1.0, information / float(np.sqrt(domain_entropy * expert_entropy)))


def purity(counts_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_e max_d pi_d P(e|d): how often the domain is guessed right from the expert alone; 1/D (chance) to 1.

    Blind to everything but each expert's largest domain, and to one domain owning nearly all experts.
    """
    joint_DE = joint(counts_DE, weights_D)
    return float(joint_DE.max(axis=0).sum()) if len(joint_DE) else float("nan")


def entropy(probabilities: ArrayLike) -> float:
    """-sum p ln p in nats, 0 ln 0 = 0; nan where a probability is nan or there are none."""
    p = np.asarray(probabilities, dtype=np.float64).reshape(-1)
    positive = p > 0
    logarithms = np.log(p, out=np.zeros_like(p), where=positive | np.isnan(p))
    # The bootstrap asks thousands of times: a product costs half of what selecting and summing cost.
    found = -float(p @ logarithms) if p.size else float("nan")
    return found if found > 0 or np.isnan(found) else 0.0


def entropies(probabilities_ZX: FloatArray) -> FloatArray:
    """The `entropy` [Z] of each row of finite probabilities."""
    logarithms_ZX = np.log(probabilities_ZX, out=np.zeros_like(probabilities_ZX), where=probabilities_ZX > 0)
    return np.maximum(0.0, -np.einsum("zx,zx->z", probabilities_ZX, logarithms_ZX))


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


def _information(joint_DE: FloatArray, domain_entropy: float, expert_entropy: float) -> float:
    """H(D) + H(E) - H(D, E) of a table that sums to 1; nan for one without rows."""
    return max(0.0, domain_entropy + expert_entropy - entropy(joint_DE)) if len(joint_DE) else float("nan")


TABLES = (
    Metric(
        name="conditional",
        function=conditional,
        question="Where does a domain go?",
        formula="P(e|d) = n_de / n_d",
        range="0 to 1; even is 1/E in both forms",
        blind_to="how often the domain occurs",
    ),
    Metric(
        name="joint",
        function=joint,
        question="Of the whole mix, how much is this domain at this expert?",
        formula="π_d P(e|d)",
        range="0 to 1, sums to 1",
        blind_to="domains that are absent: they have no row",
    ),
    Metric(
        name="load",
        function=load,
        question="What does an expert carry?",
        formula="q_e = P(e) = Σ_d π_d P(e|d)",
        range="0 to 1, sums to 1",
        blind_to="which domains it comes from",
    ),
    Metric(
        name="owners",
        function=owners,
        question="Which domain does an expert serve most?",
        formula="argmax_d P(e|d)",
        range="a domain for each expert, -1 without assignments, and the order of experts by it",
        blind_to="how narrowly it won",
    ),
    Metric(
        name="entropy",
        function=entropy,
        question="How spread is a distribution?",
        formula="−Σ p ln p",
        range="0 to ln of its length, in nats",
        blind_to="over what it is spread",
    ),
)

METRICS = (
    Metric(
        name="domain_information",
        title="Domain information",
        function=domain_information,
        of_many=domain_information_of_many,
        of=COUNTS,
        part="routing",
        question="What share of the domain label does one assignment give away?",
        formula="I(D; E) / H(D)",
        range="0 (the expert says nothing about the domain) to 1 (everything)",
        blind_to="how the experts of one domain divide it; experts that always work in pairs",
        note="It is right also when experts outnumber domains. Domains have equal weight.",
        bounded=(0.0, 1.0),
        column="first",
        axis="domain\ninformation",
        compared=True,
        tracked=True,
    ),
    Metric(
        name="mutual_information",
        function=mutual_information,
        question="How much does one assignment tell of the domain, in nats?",
        formula="I(D; E) = Σ_d π_d Σ_e P(e|d) ln(P(e|d) / P(e))",
        range="0 to min(ln D, ln E)",
        blind_to="whether few tokens say much or many say little",
    ),
    Metric(
        name="domain_information_shuffled",
        title="Shuffled labels",
        function=domain_information,
        of=("shuffled_counts_top_k_YDE",),
        part="routing",
        question="What domain information would chance give for these counts?",
        formula="domain information with the labels permuted among sequences",
        range="0 to 1",
        blind_to="other permutations: it is one sample",
        note="Read domain information as what exceeds it.",
        column="third",
    ),
    Metric(
        name="domain_information_above_shuffled",
        title="Above shuffled",
        function=domain_information_above_shuffled,
        of=("counts_top_k_YDE", "shuffled_counts_top_k_YDE"),
        part="routing",
        question="How much of domain information is more than chance?",
        formula="domain information less that under labels permuted among sequences",
        range="−1 to 1; 0 is chance",
        blind_to="other permutations: small values, also below 0, are noise",
        note="The words of a verdict go by it. Over documents its interval is that of domain information, from which "
        "the bias by chance is taken off already, so that 0 is no information; it is widened to hold the estimate "
        "where need be.",
        bounded=(-1.0, 1.0),
        tracked=True,
    ),
    Metric(
        name="nmi_geometric",
        title="NMI (geometric)",
        function=nmi_geometric,
        of=COUNTS,
        part="routing",
        question="What is the information, normalised for comparison with papers?",
        formula="I(D; E) / √(H(D) H(E))",
        range="0 to 1, and below 1 wherever experts outnumber domains",
        blind_to="dying experts: they raise it",
    ),
    Metric(
        name="purity",
        title="Purity",
        function=purity,
        of=COUNTS,
        part="routing",
        question="How often is the domain guessed right from the expert?",
        formula="Σ_e max_d π_d P(e|d)",
        range="1/D (chance) to 1",
        blind_to="all but the largest domain of each expert; one domain that owns nearly all experts, which matched "
        "purity sees",
        column="first",
    ),
)
