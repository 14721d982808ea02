"""Utilization of experts, from counts of routed tokens, and what a run costs.

Shape legend: D domains, E experts, Z resamples. Tables, weights and domains without assignments are as in `counts`. All
but the last two are functions of the load q = P(e). None of them uses the balancing loss, which equals
1 + E^2 Cov(f, P) and can fall while the load worsens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_testbed.routing.metrics.counts import (
    DEAD_SHARE,
    FloatArray,
    entropies,
    entropy,
    joint_of_many,
    load,
    present_weights,
    table,
    weighted_mean,
)
from moe_testbed.routing.metrics.metric import COUNTS, Metric


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


def normalised_effective_experts_of_many(counts_ZDE: ArrayLike) -> FloatArray:
    """Returns `normalised_effective_experts` [Z] of many tables of counts [Z, D, E], domains of equal weight."""
    load_ZE = joint_of_many(counts_ZDE).sum(axis=1)
    num_experts = load_ZE.shape[1]
    shares_Z = entropies(load_ZE) / np.log(num_experts) if num_experts > 1 else np.ones(len(load_ZE))
    return np.where(load_ZE.any(axis=1), shares_Z, np.nan)


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


def experts_per_token(counts_DE: ArrayLike, tokens_D: ArrayLike) -> float:
    """The number of assignments a token, over all domains; 0 to E. Blind to which tokens have more of them."""
    return float(table(counts_DE).sum() / np.asarray(tokens_D).sum())


METRICS = (
    Metric(
        name="effective_experts",
        title="Effective experts",
        function=effective_experts,
        of=COUNTS,
        part="routing",
        question="How many evenly used experts would be as diverse?",
        formula="exp(H(q))",
        range="1 to E",
        blind_to="which experts are used; one expert at several times its share",
    ),
    Metric(
        name="normalised_effective_experts",
        title="Effective experts, normalised",
        heading="Effective experts",
        function=normalised_effective_experts,
        of_many=normalised_effective_experts_of_many,
        of=COUNTS,
        part="routing",
        question="How even is the load, whatever E is?",
        formula="H(q) / ln E for the load q",
        range="0 (one expert does everything) to 1 (even)",
        blind_to="how many experts that is: it flatters, half of 64 experts dead and the rest even is 0.83",
        note="No number of experts, but the entropy of the load as a share of its maximum; exp(H(q)) is the number.",
        bounded=(0.0, 1.0),
        column="first",
        axis="effective experts,\nnormalised",
        compared=True,
        tracked=True,
    ),
    Metric(
        name="inverse_simpson",
        title="Inverse Simpson",
        function=inverse_simpson,
        of=COUNTS,
        part="routing",
        question="How many evenly used experts would be as diverse, with more weight on the busiest?",
        formula="1 / Σ_e q_e²",
        range="1 to E",
        blind_to="the idle, which hardly count",
    ),
    Metric(
        name="dead_experts",
        title="Dead experts",
        function=dead_experts,
        of=COUNTS,
        part="routing",
        question="What share of the experts is hardly used?",
        formula="share of experts with q_e < 0.1/E",
        range="0 to (E − 1)/E",
        blind_to="imbalance among the living; other texts than those of the evaluation",
        note="A dead expert's weights still move: AdamW decays them, and follows the momentum of old gradients.",
        digits=0,
        in_percent=True,
        column="first",
        tracked=True,
    ),
    Metric(
        name="coefficient_of_variation",
        title="Coefficient of variation",
        function=coefficient_of_variation,
        of=COUNTS,
        part="routing",
        question="How far do loads scatter?",
        formula="std(q) / mean(q)",
        range="0 to √(E − 1)",
        blind_to="whether few are busy or few are idle",
    ),
    Metric(
        name="max_violation",
        title="Max violation",
        function=max_violation,
        of=COUNTS,
        part="routing",
        question="By how much does the busiest expert exceed its share?",
        formula="(max q − mean q) / mean q",
        range="0 (even) to E − 1",
        blind_to="every expert but the busiest",
        note="It sets a step's time and memory when experts are spread over devices.",
        column="first",
        axis="max violation",
        tracked=True,
    ),
    Metric(
        name="gini",
        title="Gini",
        function=gini,
        of=COUNTS,
        part="routing",
        question="How unequal are the loads?",
        formula="Σ_ij |q_i − q_j| / (2E)",
        range="0 (even) to (E − 1)/E",
        blind_to="where the inequality lies",
    ),
    Metric(
        name="experts_per_token",
        title="Experts per token",
        function=experts_per_token,
        of=("counts_top_k_YDE", "layer_tokens_YD"),
        part="",
        question="How many experts does a token get?",
        formula="assignments / tokens",
        range="0 to E",
        blind_to="which tokens get more than others; dropping, which comes after",
        note="top_k for most routers; where tokens choose how many, it is what a token costs.",
        column="second",
    ),
    Metric(
        name="drop_rate",
        title="Dropped",
        function=drop_rate,
        of=("counts_top_k_YDE", "dropped_YDE"),
        part="",
        question="What share of assignments found no place in their expert's buffer?",
        formula="Σ_d π_d dropped_d / n_d",
        range="0 (as under dropless dispatch) to 1",
        blind_to="whether a token lost one choice or all",
        note="results.json has each domain's rate as drop_rate_by_domain. All routing metrics count assignments before "
        "dropping unless they say otherwise; results.json has them after dropping too, as top_k_kept.",
        digits=1,
        in_percent=True,
        column="third",
        tracked=True,
    ),
)

COST = (
    Metric(
        name="tokens_per_second",
        title="Tokens/s",
        part="",
        question="How fast was the training?",
        formula="trained tokens / seconds",
        range="0 upwards",
        blind_to="what else the machine did: runs trained side by side compare loosely",
        digits=0,
        column="first",
    ),
    Metric(
        name="parameters",
        title="Parameters",
        part="",
        question="How large is the model?",
        formula="number of parameters, and of those active for one token",
        range="1 upwards",
        blind_to="where the parameters are: embeddings count too",
        column="third",
    ),
)
