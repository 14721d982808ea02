"""Redundancy: how often experts are used together, and how alike their outputs and weights are.

Shape legend: E experts, T tokens, M model width, F feed-forward width, X weights of a neuron, or pairs of tokens.
`outputs_ETM[e, t]` is what expert e returns for token t, whether or not t was routed to it: all experts see the same
tokens. An expert whose outputs are nan has nan in every pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.counts import DEAD_SHARE, FloatArray, entropy
from moe_testbed.routing.metrics.metric import Metric


@dataclass(frozen=True)
class Pair:
    """A pair of experts: `share` of the tokens of `expert` use `partner` too."""

    expert: int
    partner: int
    share: float


def coactivation(coactivation_EE: ArrayLike) -> FloatArray:
    """N_ij / N_i [E, E]: of the tokens that use expert i, the share that uses j too; 0 to 1, the diagonal is nan.

    coactivation_EE: N_ij tokens use both, N_ii use i. Rows of unused experts are nan. With k experts a token the mean
    of a row is (k - 1) / (E - 1) whatever the router does: only the spread around it says something. Blind to triples.
    Source: OLMoE (arXiv 2409.02060). Raises ValueError for what is no such matrix.
    """
    counts = np.asarray(coactivation_EE, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"coactivation_EE must be a square matrix, got shape {counts.shape}")
    used_E1 = np.diag(counts)[:, None]
    if not np.all(np.isfinite(counts)) or np.any(counts < 0) or np.any(counts > used_E1):
        raise ValueError(
            "coactivation_EE must be counts, none above its row's diagonal, the tokens that use the expert"
        )
    share_EE = np.divide(counts, used_E1, out=np.full_like(counts, np.nan), where=used_E1 > 0)
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


def strongest_pair(coactivation_EE: ArrayLike) -> Pair | None:
    """The pair with the highest N_ij / N_i; None where no two experts are left.

    Experts used by less than a tenth of the mean number of tokens are left out as i, since few tokens agree by chance.
    """
    share_EE = _live_shares(coactivation_EE)
    if np.isnan(share_EE).all():
        return None
    expert, partner = np.unravel_index(np.nanargmax(share_EE), share_EE.shape)
    return Pair(int(expert), int(partner), float(share_EE[expert, partner]))


def mean_strongest_share(coactivation_EE: ArrayLike) -> float:
    """Mean over experts i of max_j N_ij / N_i: how far experts work in fixed pairs; (k - 1) / (E - 1) to 1.

    Experts are left out as in `strongest_pair`; nan where none remains. Experts of one domain meet more often than
    others: pairs may be specialization as well as redundancy.
    """
    share_EE = _live_shares(coactivation_EE)
    share_EE = share_EE[~np.isnan(share_EE).all(axis=1)]
    return float(np.nanmax(share_EE, axis=1).mean()) if len(share_EE) else float("nan")


def mean_share(coactivation_EE: ArrayLike) -> float:
    """Mean over pairs of N_ij / N_i: (k - 1) / (E - 1) for k choices a token, whatever the router does; nan unused."""
    share_EE = coactivation(coactivation_EE)
    return float("nan") if np.isnan(share_EE).all() else float(np.nanmean(share_EE))


def cosine_matrix(outputs_ETM: ArrayLike) -> FloatArray:
    """Mean over tokens of cos(f_i(x), f_j(x)) [E, E]; -1 to 1: 1 for experts that return the same up to scale.

    Tokens for which one of the two returns zero are left out of that pair; nan if none remains. Blind to the lengths
    of the outputs, and a direction that all outputs share counts as likeness; see `linear_cka`.
    Source: pairwise expert similarity (PES) of outputs on the same tokens.
    """
    outputs = _outputs(outputs_ETM)
    cosine_sum_EE, tokens_EE = np.zeros((2, len(outputs), len(outputs)))
    for output_EM in _by_token(outputs):
        length_E1 = np.linalg.norm(output_EM, axis=1, keepdims=True)
        direction_EM = np.divide(output_EM, length_E1, out=np.zeros_like(output_EM), where=length_E1 != 0)
        cosine_sum_EE += direction_EM @ direction_EM.T
        tokens_EE += (length_E1 != 0) & (length_E1 != 0).T
    return np.divide(cosine_sum_EE, tokens_EE, out=np.full_like(cosine_sum_EE, np.nan), where=tokens_EE > 0)


def linear_cka(X_TM: ArrayLike, Y_TM: ArrayLike) -> float:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) with columns centred; 0 to 1.

    How far the outputs of two experts have the same geometry over tokens; the same under rotation, shift and scaling
    of either. X and Y may differ in M. nan where one of them does not vary. Biased upwards by few tokens: independent
    Gaussian outputs have about M / (T + M), so that T should be several times M.
    Source: Kornblith et al. (arXiv 1905.00414), section 3. Raises ValueError for different numbers of tokens.
    """
    X, Y = np.asarray(X_TM, dtype=np.float64), np.asarray(Y_TM, dtype=np.float64)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"outputs must be tokens x dimensions of the same tokens, got {X.shape} and {Y.shape}")
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    return _ratio(np.sum((Y.T @ X) ** 2), float(np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)))


def cka_matrix(outputs_ETM: ArrayLike) -> FloatArray:
    """Returns `linear_cka` of every pair of experts [E, E]; the diagonal is 1, or nan for outputs that do not vary.

    By the tokens' inner products, ||Y^T X||_F^2 = <X X^T, Y Y^T>: memory is 8 E T^2 bytes, whatever M is.
    """
    outputs = _outputs(outputs_ETM)
    num_experts, num_tokens, _ = outputs.shape
    products_EX = np.empty((num_experts, num_tokens * num_tokens))
    for expert, output_TM in enumerate(outputs):
        centred_TM = output_TM.astype(np.float64) - output_TM.mean(axis=0, dtype=np.float64)
        products_EX[expert] = (centred_TM @ centred_TM.T).reshape(-1)
    return _normalised_gram(products_EX)


def effective_rank(outputs_ETM: ArrayLike) -> float:
    """exp(H(s / sum s)) of the singular values s of the outputs stacked to [E, T M]; 1 (all alike) to E.

    The number of experts that would be as diverse if they were orthogonal and of equal size. Experts with nan are left
    out; nan where nothing is left or all is zero. An expert with small outputs hardly counts, however different it is.
    Source: Roy and Vetterli, "The effective rank" (2007).
    """
    outputs = _outputs(outputs_ETM)
    outputs = outputs[~np.isnan(outputs).any(axis=(1, 2))]
    if not outputs.any():
        return float("nan")
    gram_EE = np.zeros((len(outputs), len(outputs)))
    for output_EM in _by_token(outputs):
        gram_EE += output_EM @ output_EM.T
    # Squares of singular values below the rounding of the largest are zeros that rounding has moved.
    squares = np.linalg.eigvalsh(gram_EE)
    singular = np.sqrt(squares[squares > squares.max() * len(squares) * np.finfo(np.float64).eps])
    return float(np.exp(entropy(singular / singular.sum())))


def matched_cosine(one_FX: ArrayLike, other_FX: ArrayLike) -> float:
    """Cosine between the weights of two experts after the best matching of their neurons; -1 to 1.

    A neuron is a row: all weights that belong to it, those that read and those that write. The order of neurons means
    nothing, so that the permutation with the highest cosine is taken (Hungarian method); independent experts are
    therefore somewhat above 0, the more the larger F is to X. nan where one is all zero or has a nan. Blind to other
    symmetries than order (signs, scales) and to what data they see. Raises ValueError for different shapes.
    """
    from scipy.optimize import linear_sum_assignment

    one, other = np.asarray(one_FX, dtype=np.float64), np.asarray(other_FX, dtype=np.float64)
    if one.ndim != 2 or one.shape != other.shape:
        raise ValueError(f"weights must be neurons x weights of equal shape, got {one.shape} and {other.shape}")
    product_FF = one @ other.T
    if not np.isfinite(product_FF).all():
        return float("nan")
    matched = product_FF[linear_sum_assignment(product_FF, maximize=True)].sum()
    return _ratio(matched, float(np.linalg.norm(one) * np.linalg.norm(other)))


def weight_cosine_matrix(weights_EFX: ArrayLike) -> FloatArray:
    """Returns `matched_cosine` of every pair of experts [E, E]. Each pair is matched: time grows with E^2 F^3."""
    weights = np.asarray(weights_EFX, dtype=np.float64)
    if weights.ndim != 3:
        raise ValueError(f"weights_EFX must be experts x neurons x weights, got shape {weights.shape}")
    cosine_EE = np.empty((len(weights), len(weights)))
    for one in range(len(weights)):
        for other in range(one + 1):
            cosine_EE[one, other] = cosine_EE[other, one] = matched_cosine(weights[one], weights[other])
    return cosine_EE


def mean_of_pairs(matrix_EE: ArrayLike) -> float:
    """The mean over the pairs of different experts that have a value; nan if there is none."""
    matrix = np.asarray(matrix_EE)
    pairs = matrix[~np.eye(len(matrix), dtype=bool) & ~np.isnan(matrix)]
    return float(pairs.mean()) if pairs.size else float("nan")


def cka_chance(width: int, num_tokens: int) -> float:
    """M / (T + M): about the linear CKA that independent Gaussian outputs of this width have on so many tokens."""
    return width / (num_tokens + width)


def _outputs(outputs_ETM: ArrayLike) -> NDArray[np.floating]:
    outputs = np.asarray(outputs_ETM)
    if outputs.ndim != 3 or 0 in outputs.shape:
        raise ValueError(f"outputs_ETM must be experts x tokens x dimensions, all at least 1, got {outputs.shape}")
    return outputs


def _by_token(outputs_ETM: NDArray[np.floating]) -> Iterator[FloatArray]:
    """Yields the outputs [E, M] of each token in double precision, for which the whole would need much memory."""
    for output_EM in outputs_ETM.swapaxes(0, 1):
        yield output_EM.astype(np.float64)


def _live_shares(coactivation_EE: ArrayLike) -> FloatArray:
    share_EE, used_E = coactivation(coactivation_EE), np.diag(np.asarray(coactivation_EE, dtype=np.float64))
    share_EE[used_E < DEAD_SHARE * used_E.mean()] = np.nan
    return share_EE


def _normalised_gram(rows_EX: FloatArray) -> FloatArray:
    """Cosines between rows; nan with a row that is zero or has a nan."""
    gram_EE = rows_EX @ rows_EX.T
    length_E = np.sqrt(np.diag(gram_EE))
    scale_EE = length_E[:, None] * length_E
    return np.divide(gram_EE, scale_EE, out=np.full_like(gram_EE, np.nan), where=scale_EE > 0)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


METRICS = (
    Metric(
        name="coactivation",
        function=coactivation,
        question="Of the tokens that use expert i, how many use j?",
        formula="N_ij / N_i",
        range="0 to 1; nan on the diagonal",
        blind_to="triples; a row's mean is always (k − 1)/(E − 1)",
    ),
    Metric(
        name="strongest_pair",
        function=strongest_pair,
        question="Which two go together most?",
        formula="the highest N_ij / N_i",
        range="an expert, its partner, the share; None without a pair",
        blind_to="the other pairs; experts below a tenth of the mean use",
    ),
    Metric(
        name="mean_strongest_share",
        title="Strongest partner",
        function=mean_strongest_share,
        of=("coactivation_YEE",),
        part="coactivation",
        question="How far do experts work in fixed pairs?",
        formula="mean over experts i of max_j N_ij / N_i",
        range="(k − 1)/(E − 1) to 1",
        blind_to="why: a pair may be redundant, or one domain's two experts",
        note="Of the tokens that use an expert, the share that uses its most frequent partner too.",
        digits=0,
        in_percent=True,
    ),
    Metric(
        name="mean_share",
        title="Mean partner",
        function=mean_share,
        of=("coactivation_YEE",),
        part="coactivation",
        question="What does a partner share on average?",
        formula="mean over pairs of N_ij / N_i",
        range="0 to 1; (k − 1)/(E − 1) for k choices a token",
        blind_to="which pairs: it is the same whatever the router does",
        note="It is no level of chance for the strongest: the largest of E − 1 shares exceeds their mean by noise "
        "alone.",
        digits=0,
        in_percent=True,
    ),
    Metric(
        name="cosine_matrix",
        function=cosine_matrix,
        question="Do two experts return the same?",
        formula="mean over tokens of cos(f_i, f_j) (PES), for all pairs",
        range="−1 to 1",
        blind_to="lengths; a direction that all outputs share counts as likeness",
    ),
    Metric(
        name="linear_cka",
        function=linear_cka,
        question="Have their outputs the same geometry, up to rotation, shift and scale?",
        formula="‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred",
        range="0 to 1; independent outputs have about M/(T + M)",
        blind_to="few tokens: T must be several times M",
    ),
    Metric(
        name="cka_matrix",
        function=cka_matrix,
        question="Have they, for all pairs?",
        formula="as linear_cka",
        range="0 to 1",
        blind_to="as linear_cka",
    ),
    Metric(
        name="matched_cosine",
        function=matched_cosine,
        question="Are two experts the same network but for the order of neurons?",
        formula="cosine of the weights, neurons matched first",
        range="−1 to 1; independent experts somewhat above 0",
        blind_to="scale and sign symmetries; the data",
    ),
    Metric(
        name="weight_cosine_matrix",
        function=weight_cosine_matrix,
        question="Are they, for all pairs?",
        formula="as matched_cosine",
        range="−1 to 1",
        blind_to="as matched_cosine; time grows with E² F³",
    ),
    Metric(
        name="mean_of_pairs",
        function=mean_of_pairs,
        question="How alike are experts on the whole?",
        formula="mean over the pairs of a matrix that have a value",
        range="that of the matrix",
        blind_to="which pairs are alike",
    ),
    Metric(
        name="expert_cosine",
        title="Output cosine",
        function=mean_of_pairs,
        of=("expert_cosine_YEE",),
        part="redundancy",
        question="Do experts return the same?",
        formula="mean over tokens and pairs of experts of cos(f_i, f_j) (PES)",
        range="−1 to 1",
        blind_to="lengths; a direction that all outputs share counts as likeness",
        note="All experts see the same tokens.",
        axis="output cosine",
    ),
    Metric(
        name="expert_cka",
        title="Output CKA",
        function=mean_of_pairs,
        of=("expert_cka_YEE",),
        part="redundancy",
        question="Have the experts' outputs the same geometry, up to rotation, shift and scale?",
        formula="‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred, mean over pairs",
        range="0 to 1",
        blind_to="few tokens: it needs several times as many as dimensions",
        note="Read it as what exceeds CKA by chance.",
        axis="output CKA",
    ),
    Metric(
        name="cka_chance",
        title="CKA by chance",
        function=cka_chance,
        part="redundancy",
        question="What CKA do the outputs of independent experts have?",
        formula="about M / (T + M) for outputs of width M on T tokens",
        range="0 to 1",
        blind_to="outputs that are not Gaussian",
    ),
    Metric(
        name="effective_rank",
        title="Effective rank",
        function=float,  # the analysis has the rank itself, by the function of this name
        of=("effective_rank_Y",),
        part="redundancy",
        question="How many orthogonal experts would be as diverse?",
        formula="exp(H(σ / Σσ)), σ the singular values of the stacked outputs",
        range="1 to E",
        blind_to="experts with small outputs",
        digits=1,
        axis="effective rank",
    ),
    Metric(
        name="weight_cosine",
        title="Weight cosine",
        function=mean_of_pairs,
        of=("weight_cosine_YEE",),
        part="redundancy",
        question="Are experts the same network but for the order of neurons?",
        formula="cosine of two experts' weights, neurons matched first, mean over pairs",
        range="−1 to 1; independent experts somewhat above 0",
        blind_to="scale and sign symmetries; the data",
        axis="weight cosine",
    ),
)
