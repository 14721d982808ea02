"""Vocabulary specialization: loops, scikit-learn's and a simulated level of chance, the filter, degenerate tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics.cluster import expected_mutual_information

from moe_testbed.routing import metrics

ALL = (metrics.vocabulary_share, metrics.token_information, metrics.token_information_chance)


def routed(ids: int, experts: int, occurrences: int, seed: int = 0) -> np.ndarray:
    """Counts of ids as frequent as words are, routed by chance under an uneven load."""
    rng = np.random.default_rng(seed)
    words = 1 / np.arange(1, ids + 1)
    totals = 10 + rng.multinomial(occurrences, words / words.sum())
    load = rng.dirichlet(np.full(experts, 3.0))
    return np.stack([rng.multinomial(total, load) for total in totals])


def entropy(values: np.ndarray) -> float:
    return -sum(v / values.sum() * math.log(v / values.sum()) for v in values if v > 0)


def test_against_loops() -> None:
    counts = routed(12, 5, 400)
    total = counts.sum()
    shares = sum(row.sum() / total * max(row) / row.sum() for row in counts)
    information = entropy(counts.sum(axis=0)) + entropy(counts.sum(axis=1)) - entropy(counts.ravel())
    assert metrics.vocabulary_share(counts) == pytest.approx(shares)
    assert metrics.token_information(counts) == pytest.approx(information / entropy(counts.sum(axis=0)))


@pytest.mark.parametrize(
    ("ids", "experts", "occurrences"), [(5, 4, 100), (50, 8, 3000), (300, 32, 30000), (2, 2, 5000)]
)
def test_chance_is_that_of_scikit_learn(ids: int, experts: int, occurrences: int) -> None:
    counts = routed(ids, experts, occurrences)
    expected = expected_mutual_information(csr_matrix(counts), int(counts.sum())) / entropy(counts.sum(axis=0))
    assert metrics.token_information_chance(counts) == pytest.approx(expected, abs=1e-9)


def test_chance_is_the_mean_over_permutations() -> None:
    rng = np.random.default_rng(1)
    counts = routed(20, 6, 500)
    ids = np.repeat(np.arange(20), counts.sum(axis=1))
    experts = np.repeat(np.tile(np.arange(6), 20), counts.ravel())
    found = []
    for _ in range(300):
        permuted = np.zeros_like(counts)
        np.add.at(permuted, (ids, rng.permutation(experts)), 1)
        found.append(metrics.token_information(permuted))
    standard_error = np.std(found) / math.sqrt(len(found))
    assert metrics.token_information_chance(counts) == pytest.approx(np.mean(found), abs=4 * standard_error)


def test_a_table_by_token_id_decides_everything() -> None:
    table = np.eye(4)[[0, 1, 2, 3, 0, 1]] * 30
    assert metrics.vocabulary_share(table) == 1
    assert metrics.token_information(table) == pytest.approx(1)
    assert metrics.token_information_chance(table) < 0.1


def test_a_router_blind_to_the_id_is_at_chance() -> None:
    counts = routed(200, 16, 50000)
    assert metrics.token_information(counts) == pytest.approx(metrics.token_information_chance(counts), rel=0.1)
    assert metrics.vocabulary_share(np.full((5, 4), 25)) == 0.25
    assert metrics.token_information(np.full((5, 4), 25)) == pytest.approx(0, abs=1e-12)


def test_ids_weigh_by_occurrence() -> None:
    assert metrics.vocabulary_share([[90, 0], [5, 5]]) == pytest.approx(95 / 100)


def test_ids_seen_less_than_ten_times_are_left_out() -> None:
    counts = routed(12, 5, 400)
    rare = np.eye(5, dtype=int) * 9
    for metric in ALL:
        assert metric(np.vstack([counts, rare])) == metric(counts)
    assert metrics.vocabulary_share([[5, 5], [9, 0]]) == 0.5


def test_order_and_unused_experts_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    counts = routed(12, 5, 400)
    wider = np.hstack([counts[rng.permutation(12)][:, rng.permutation(5)], np.zeros((12, 2), dtype=int)])
    for metric in ALL:
        assert metric(wider) == pytest.approx(metric(counts), abs=1e-12)


def test_degenerate_tables() -> None:
    for metric in ALL:
        assert math.isnan(metric(np.zeros((3, 4))))
        assert math.isnan(metric(np.full((3, 4), 2)))  # no id seen often enough
    one_expert = np.array([[20, 0], [30, 0]])
    assert metrics.vocabulary_share(one_expert) == 1
    assert math.isnan(metrics.token_information(one_expert))
    assert math.isnan(metrics.token_information_chance(one_expert))
    one_id = np.array([[20, 30]])
    assert metrics.token_information(one_id) == pytest.approx(0, abs=1e-12)
    assert metrics.token_information_chance(one_id) == pytest.approx(0, abs=1e-12)
