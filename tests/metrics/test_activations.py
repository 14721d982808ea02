"""Redundancy: loops over tokens, known results of CKA and of the effective rank, invariances, missing experts."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from moe_testbed.routing import metrics


def outputs(experts: int = 4, tokens: int = 12, dimensions: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((experts, tokens, dimensions))


def rotation(dimensions: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimensions, dimensions)))[0]


def together(ids: list[list[int]], experts: int) -> np.ndarray:
    """N_ij by loops over tokens."""
    counts = np.zeros((experts, experts))
    for chosen in ids:
        for i in chosen:
            for j in chosen:
                counts[i, j] += 1
    return counts


def test_coactivation_by_hand() -> None:
    counts = together([[0, 1], [0, 1], [0, 2], [1, 2], [2, 0]], 4)
    share = metrics.coactivation(counts)
    expected = [[2 / 4, 2 / 4, 0], [2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0]]
    assert share[[0, 0, 0], [1, 2, 3]] == pytest.approx(expected[0])
    assert share[[1, 1, 1], [0, 2, 3]] == pytest.approx(expected[1])
    assert share[[2, 2, 2], [0, 1, 3]] == pytest.approx(expected[2])
    assert np.isnan(share[3]).all() and np.isnan(np.diag(share)).all()
    assert metrics.strongest_pair(counts) == metrics.Pair(1, 0, pytest.approx(2 / 3))  # type: ignore[arg-type]
    assert metrics.mean_strongest_share(counts) == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)


def test_the_mean_of_a_row_says_nothing_and_its_maximum_does() -> None:
    rng = np.random.default_rng(0)
    chance = together([rng.permutation(8)[:2].tolist() for _ in range(20000)], 8)
    pairs = together([[2 * p, 2 * p + 1] for p in rng.integers(0, 4, 2000)], 8)
    for counts in (chance, pairs):
        assert np.nanmean(metrics.coactivation(counts), axis=1) == pytest.approx(np.full(8, 1 / 7))
    assert metrics.mean_strongest_share(chance) == pytest.approx(1 / 7, abs=0.02)
    assert metrics.mean_strongest_share(pairs) == 1


def test_experts_that_hardly_work_make_no_strongest_pair() -> None:
    counts = together([[0, 1], [0, 2], [1, 2]] * 20 + [[3, 0]], 4)
    assert metrics.coactivation(counts)[3, 0] == 1
    pair = metrics.strongest_pair(counts)
    assert pair is not None and pair.expert != 3 and pair.share < 0.6


def test_coactivation_of_nothing() -> None:
    for counts in (np.zeros((3, 3)), np.array([[5]])):
        assert np.isnan(metrics.coactivation(counts)).all()
        assert metrics.strongest_pair(counts) is None
        assert math.isnan(metrics.mean_strongest_share(counts))
    assert metrics.strongest_pair(np.diag([4, 4])) == metrics.Pair(0, 1, 0.0)


def test_expert_cosine_by_loops() -> None:
    values = outputs()
    values[1, 3] = 0  # returns nothing for a token
    found = metrics.cosine_matrix(values)
    for i in range(4):
        for j in range(4):
            cosines = [
                a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)
                for a, b in zip(values[i], values[j], strict=True)
                if (a @ a) * (b @ b)
            ]
            assert found[i, j] == pytest.approx(sum(cosines) / len(cosines))


def test_expert_cosine_is_blind_to_length_and_rotation_and_sees_the_sign() -> None:
    values = outputs()
    scaled = values * np.random.default_rng(2).uniform(0.1, 9, (4, 12, 1)) @ rotation(5)
    assert metrics.cosine_matrix(scaled) == pytest.approx(metrics.cosine_matrix(values))
    assert metrics.cosine_matrix(np.stack([values[0], -3 * values[0]]))[0, 1] == pytest.approx(-1)


def test_cka_against_its_definition_by_centred_kernels() -> None:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, and the centring matrix H."""
    X, Y = outputs(1, 12, 5)[0], outputs(1, 12, 7, seed=3)[0]
    H = np.eye(12) - 1 / 12

    def hsic(K: np.ndarray, L: np.ndarray) -> float:
        return float(np.trace(H @ K @ H @ L))

    K, L = X @ X.T, Y @ Y.T
    assert metrics.linear_cka(X, Y) == pytest.approx(hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L)))


def test_cka_knows_the_same_geometry_and_its_absence() -> None:
    X = outputs(1, 40, 5)[0]
    assert metrics.linear_cka(X, 3 * X @ rotation(5) + 7) == pytest.approx(1)
    assert metrics.linear_cka(X, -X) == pytest.approx(1)
    X, Y = np.kron([[1.0], [-1.0]], np.ones((2, 1))), np.kron(np.ones((2, 1)), [[1.0], [-1.0]])
    assert metrics.linear_cka(X, Y) == pytest.approx(0)
    assert math.isnan(metrics.linear_cka(np.ones((4, 2)), X))


def test_cka_of_independent_outputs_is_as_biased_as_stated() -> None:
    for tokens, dimensions in ((64, 64), (400, 20)):
        X, Y = outputs(2, tokens, dimensions, seed=4)
        assert metrics.linear_cka(X, Y) == pytest.approx(dimensions / (tokens + dimensions), rel=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cka_matrix_has_the_cka_of_every_pair(dtype: type) -> None:
    values = outputs().astype(dtype)
    values[2] = 4.0  # does not vary
    found = metrics.cka_matrix(values)
    for i in range(4):
        for j in range(4):
            assert found[i, j] == pytest.approx(metrics.linear_cka(values[i], values[j]), nan_ok=True)
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    directions = rotation(60)[:rank].reshape(rank, 12, 5)
    mixed = np.tensordot(rotation(8, seed=5)[:, :rank], directions, axes=1)
    assert metrics.effective_rank(mixed) == pytest.approx(rank)
    assert metrics.effective_rank(1e-3 * mixed.astype(np.float32)) == pytest.approx(rank, abs=1e-3)


def test_effective_rank_against_the_singular_values() -> None:
    values = outputs()
    singular = np.linalg.svd(values.reshape(4, -1), compute_uv=False)
    p = singular / singular.sum()
    assert metrics.effective_rank(values) == pytest.approx(math.exp(-sum(p * np.log(p))))
    assert metrics.effective_rank(5 * values[::-1]) == pytest.approx(metrics.effective_rank(values))
    assert metrics.effective_rank(np.stack([values[0]] * 3)) == pytest.approx(1)


def test_missing_experts_are_nan_in_their_pairs_only() -> None:
    values = outputs()
    values[1] = math.nan
    kept = [0, 2, 3]
    for matrix in (metrics.cosine_matrix, metrics.cka_matrix):
        found = matrix(values)
        assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()
        assert found[np.ix_(kept, kept)] == pytest.approx(matrix(values[kept]))
    assert metrics.effective_rank(values) == pytest.approx(metrics.effective_rank(values[kept]))
    assert math.isnan(metrics.effective_rank(values[[1]]))
    assert math.isnan(metrics.effective_rank(np.zeros((2, 3, 4))))
    assert np.isnan(metrics.cosine_matrix(np.zeros((2, 3, 4)))).all()


def test_weight_cosine_is_the_best_of_all_orders_of_neurons() -> None:
    rng = np.random.default_rng(6)
    one, other = rng.standard_normal((2, 5, 3))
    scale = np.linalg.norm(one) * np.linalg.norm(other)
    best = max((one * other[list(order)]).sum() / scale for order in permutations(range(5)))
    assert metrics.matched_cosine(one, other) == pytest.approx(best)


def test_weight_cosine_is_blind_to_the_order_of_neurons_and_to_scale() -> None:
    rng = np.random.default_rng(7)
    one, other = rng.standard_normal((2, 32, 6))
    assert metrics.matched_cosine(one, 3 * one[rng.permutation(32)]) == pytest.approx(1)
    assert metrics.matched_cosine(one[rng.permutation(32)], other) == pytest.approx(metrics.matched_cosine(one, other))
    assert 0 < metrics.matched_cosine(one, other) < 0.9
    assert math.isnan(metrics.matched_cosine(one, 0 * one))
    assert math.isnan(metrics.matched_cosine(one, np.full_like(one, math.nan)))


def test_weight_cosine_matrix_has_every_pair() -> None:
    weights = np.random.default_rng(8).standard_normal((3, 6, 4))
    weights[2, 0, 0] = math.nan
    found = metrics.weight_cosine_matrix(weights)
    assert found[0, 1] == found[1, 0] == metrics.matched_cosine(weights[0], weights[1])
    assert np.diag(found)[:2] == pytest.approx([1, 1])
    assert np.isnan(found[2]).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="square matrix"):
        metrics.coactivation(np.ones((2, 3)))
    with pytest.raises(ValueError, match="none above its row's diagonal"):
        metrics.coactivation([[1, 2], [2, 5]])
    for metric in (metrics.cosine_matrix, metrics.cka_matrix, metrics.effective_rank):
        with pytest.raises(ValueError, match="experts x tokens x dimensions"):
            metric(np.ones((2, 3)))
    with pytest.raises(ValueError, match="same tokens"):
        metrics.linear_cka(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="equal shape"):
        metrics.matched_cosine(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="experts x neurons x weights"):
        metrics.weight_cosine_matrix(np.ones((2, 3)))
