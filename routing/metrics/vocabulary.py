"""Specialization by token id: do experts serve words rather than domains?

Shape legend: V token ids, E experts, X numbers of occurrences. `counts_VE[v, e]` is how many occurrences of token id v
have expert e as their first choice. Ids weigh by occurrence. Ids seen less than `MINIMUM_COUNT` times are left out,
since a word seen once goes to one expert only, whatever the router does. Without any id left all is nan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.counts import FloatArray, entropy, mutual_information, table
from moe_testbed.routing.metrics.metric import Metric

MINIMUM_COUNT = 10

_TAIL = 9.0
"""Standard deviations beyond which a hypergeometric probability counts as zero; below 1e-15 with the slack given."""


def vocabulary_share(counts_VE: ArrayLike) -> float:
    """sum_v n_v / N max_e P(e|v): how often the expert is guessed right from the token id alone; max_e P(e) to 1.

    Blind to everything but each id's busiest expert, and high without any specialization where one expert is busy.
    Source: vocabulary specialization, OLMoE (arXiv 2409.02060), here in one number.
    """
    counts = _frequent(counts_VE)
    return float(counts.max(axis=1).sum() / counts.sum()) if len(counts) else float("nan")


def token_information(counts_VE: ArrayLike) -> float:
    """I(token; expert) / H(expert): the share of the expert's choice that the token id decides; 0 to 1.

    1 for a table by token id such as the `hash` router. nan where all go to one expert. Biased upwards by small
    counts; see `token_information_chance`. Blind to context: what is left to 1 is what context decides, or chance.
    """
    counts = _frequent(counts_VE)
    expert_entropy = entropy(counts.sum(axis=0) / counts.sum()) if len(counts) else 0.0
    if not expert_entropy > 0:
        return float("nan")
    return min(1.0, mutual_information(counts, counts.sum(axis=1)) / expert_entropy)


def token_information_chance(counts_VE: ArrayLike) -> float:
    """The mean of `token_information` over all permutations of the experts among the occurrences; 0 to 1.

    The level of chance at these frequencies of ids and this load. Exact but for tails beyond nine standard deviations:
    sum_ve sum_n P(n) n/N ln(N n / (n_v n_e)), where n, the occurrences of v that meet e, is hypergeometric. Occurrences
    count as independent, which those of one document are not.
    Source: Vinh, Epps and Bailey, JMLR 11 (2010), section 4 (expected mutual information).
    """
    counts = _frequent(counts_VE)
    expert_entropy = entropy(counts.sum(axis=0) / counts.sum()) if len(counts) else 0.0
    if not expert_entropy > 0:
        return float("nan")
    # The expectation depends on the two totals only, and rare ids share theirs.
    id_totals, id_repeats = np.unique(counts.sum(axis=1).astype(np.int64), return_counts=True)
    used_E = counts.any(axis=0)
    expert_totals, expert_repeats = np.unique(counts[:, used_E].sum(axis=0).astype(np.int64), return_counts=True)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(counts.sum()) + 1)))])
    information = sum(
        float(repeats * (_expected_terms(int(total), expert_totals, log_factorials) @ expert_repeats))
        for total, repeats in zip(id_totals, id_repeats, strict=True)
    )
    return min(1.0, max(0.0, information) / expert_entropy)


def _expected_terms(id_total: int, expert_totals_E: NDArray[np.int64], log_factorials: FloatArray) -> FloatArray:
    """E[n/N ln(N n / (a b))] for one id seen a times and experts chosen b times [E], n hypergeometric."""
    num_occurrences = len(log_factorials) - 1
    mean_E = id_total * expert_totals_E / num_occurrences
    slack_E = _TAIL * np.sqrt(mean_E) + 2 * _TAIL
    low = max(1, int(np.min(mean_E - slack_E)))
    high = min(id_total, int(np.max(mean_E + slack_E)))
    n_1X = np.arange(low, high + 1)[None, :]
    a, b_E1 = id_total, expert_totals_E[:, None]
    possible_EX = (n_1X <= b_E1) & (a + b_E1 - n_1X <= num_occurrences)
    n_EX = np.where(possible_EX, n_1X, np.minimum(a, b_E1))
    rest_EX = num_occurrences - a - b_E1 + n_EX
    log_probability_EX = (
        (log_factorials[a] + log_factorials[num_occurrences - a] - log_factorials[num_occurrences])
        + (log_factorials[b_E1] + log_factorials[num_occurrences - b_E1])
        - (log_factorials[n_EX] + log_factorials[a - n_EX] + log_factorials[b_E1 - n_EX] + log_factorials[rest_EX])
    )
    information_EX = n_EX / num_occurrences * np.log(num_occurrences * n_EX / (a * b_E1))
    return np.sum(np.exp(log_probability_EX) * information_EX * possible_EX, axis=1)


def _frequent(counts_VE: ArrayLike) -> FloatArray:
    counts = table(counts_VE)
    return counts[counts.sum(axis=1) >= MINIMUM_COUNT]


METRICS = (
    Metric(
        name="token_information",
        title="Token information",
        function=token_information,
        of=("vocabulary_counts_YVE",),
        part="vocabulary",
        question="What share of the expert's choice does the token id decide?",
        formula="I(token id; expert) / H(expert)",
        range="0 to 1 (a table by token id)",
        blind_to="context, which decides the rest",
        note="Of first choices, over the ids seen at least 10 times, at most 2,048 of them.",
    ),
    Metric(
        name="token_information_chance",
        title="Its chance level",
        function=token_information_chance,
        of=("vocabulary_counts_YVE",),
        part="vocabulary",
        question="What token information would chance give at these frequencies?",
        formula="mean of token information over all permutations of experts among occurrences",
        range="0 to 1",
        blind_to="documents: occurrences count as independent",
        note="Read token information as what exceeds it.",
        digits=3,
    ),
    Metric(
        name="vocabulary_share",
        title="Vocabulary share",
        function=vocabulary_share,
        of=("vocabulary_counts_YVE",),
        part="vocabulary",
        question="How often is the expert guessed right from the token id?",
        formula="Σ_v n_v/N max_e P(e|v)",
        range="the busiest expert's share to 1",
        blind_to="all but each id's busiest expert; it is high too where one expert does everything",
    ),
)
