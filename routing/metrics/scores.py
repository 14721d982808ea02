"""How the router decides: how sharp, how even, how close, how alike its experts' vectors are.

Shape legend: D domains, E experts. Sums over the tokens of a domain, as evaluations collect them; `tokens_D` is the
number of tokens in them. Domains weigh alike unless `weights_D` says otherwise, and those without tokens are left out;
without any tokens all is nan. Only for routers with scores: probabilities that sum to 1 over the experts of a token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_testbed.routing.metrics.counts import entropy, load, present_weights, weighted_mean
from moe_testbed.routing.metrics.metric import Metric


def mean_token_entropy(entropy_sum_D: ArrayLike, tokens_D: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_d pi_d mean over tokens of H(p_t), in nats: 0 (every token is sure) to ln E (no token prefers any expert).

    Blind to whether all tokens are sure of the same expert; see `entropy_of_mean`.
    """
    return _mean_over_tokens(entropy_sum_D, tokens_D, weights_D)


def entropy_of_mean(probability_sum_DE: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """H(sum_d pi_d mean over tokens of p_t), in nats: 0 (one expert is preferred by all) to ln E (even).

    It is at least `mean_token_entropy` (entropy is concave); the difference is what a token tells of its expert. Blind
    to the choice that follows: even probabilities may lead to uneven loads.
    """
    return entropy(load(probability_sum_DE, weights_D))


def mean_margin(margin_sum_D: ArrayLike, tokens_D: ArrayLike, weights_D: ArrayLike | None = None) -> float:
    """sum_d pi_d mean over tokens of p_(k) - p_(k+1), the K-th highest probability less the next; 0 to 1/K.

    How much would change a token's set of experts. Blind to the order inside the set. Comparable only at equal E and K.
    """
    return _mean_over_tokens(margin_sum_D, tokens_D, weights_D)


def router_cosine(cosine_EE: ArrayLike) -> float:
    """Mean of |cos(v_i, v_j)| over the pairs of different experts: 0 (orthogonal) to 1 (all parallel).

    Pairs that are nan are left out; nan if none remains. Random directions in a space of n dimensions have about
    sqrt(2 / (pi n)). Blind to the lengths of the vectors and to which pairs are alike.
    """
    cosine = np.abs(np.asarray(cosine_EE, dtype=np.float64))
    if cosine.ndim != 2 or cosine.shape[0] != cosine.shape[1]:
        raise ValueError(f"cosine_EE must be a square matrix, got shape {cosine.shape}")
    pairs = cosine[~np.eye(len(cosine), dtype=bool) & ~np.isnan(cosine)]
    return float(pairs.mean()) if pairs.size else float("nan")


def _mean_over_tokens(sum_D: ArrayLike, tokens_D: ArrayLike, weights_D: ArrayLike | None) -> float:
    sums, tokens = np.asarray(sum_D, dtype=np.float64), np.asarray(tokens_D, dtype=np.float64)
    if sums.shape != tokens.shape or sums.ndim != 1:
        raise ValueError(f"there must be one sum and one number of tokens a domain, got {sums.shape}, {tokens.shape}")
    means_D = np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)
    return weighted_mean(means_D, present_weights(tokens[:, None], weights_D))


METRICS = (
    Metric(
        name="mean_token_entropy",
        title="Token entropy",
        function=mean_token_entropy,
        of=("entropy_sum_YD", "layer_tokens_YD"),
        part="router_measures",
        question="How undecided is a token?",
        formula="Σ_d π_d mean over tokens of H(p_t), in nats",
        range="0 (every token is sure) to ln E",
        blind_to="whether all tokens are sure of the same expert",
        axis="token entropy\n(nats)",
    ),
    Metric(
        name="entropy_of_mean",
        title="Entropy of the mean",
        function=entropy_of_mean,
        of=("probability_sum_YDE",),
        part="router_measures",
        question="How even is what all tokens want together?",
        formula="H(Σ_d π_d mean over tokens of p_t), in nats",
        range="token entropy to ln E",
        blind_to="the choice: even scores can give an uneven load",
        note="Less the token entropy, it is what a token tells of its expert.",
        axis="entropy of the\nmean (nats)",
    ),
    Metric(
        name="mean_margin",
        title="Margin",
        function=mean_margin,
        of=("margin_sum_YD", "layer_tokens_YD"),
        part="router_measures",
        question="How close is the choice?",
        formula="Σ_d π_d mean over tokens of the k-th highest probability less the next",
        range="0 to 1/k; comparable only at equal numbers of experts and choices",
        blind_to="the order within the choice",
        digits=3,
        axis="margin",
    ),
    Metric(
        name="router_cosine",
        title="Router cosine",
        function=router_cosine,
        of=("router_cosine_YEE",),
        part="router_measures",
        question="Do the experts' vectors in the router point apart?",
        formula="mean over pairs of experts of |cos(v_i, v_j)|",
        range="0 to 1; random vectors of n dimensions have √(2/(πn))",
        blind_to="lengths; which pairs are alike",
        axis="router cosine",
    ),
)
