"""Agreement with the reference: the best matching by trying all, the measures by loops, routings of known agreement."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from moe_testbed.routing import metrics

OWN = np.kron(np.eye(4), np.ones((1, 2))) * 50
EVEN = np.full((4, 8), 25.0)


def tables() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 60, shape) + np.eye(*shape, dtype=int) for shape in [(2, 2), (3, 8), (5, 4), (4, 6), (1, 3)]
    ]


def naive(table: np.ndarray, group: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Precision and coverage by loops."""
    precision, covered, weight_covered = 0.0, 0.0, 0.0
    for d, row in enumerate(table):
        own = [e for e in range(len(row)) if group[e] == d]
        precision += weights[d] * sum(row[e] for e in own) / row.sum()
        if own:
            even = sum(row[e] for e in own) / len(own)
            covered += weights[d] * sum(row[e] > 0 and row[e] >= 0.1 * even for e in own) / len(own)
            weight_covered += weights[d]
    return precision, covered / weight_covered


def test_the_matching_is_the_best_of_all() -> None:
    for table in tables():
        num_domains, num_experts = table.shape
        joint = metrics.joint(table)
        places = np.repeat(np.arange(num_domains), -(-num_experts // num_domains))
        best = max(
            sum(joint[d, e] for e, d in enumerate(order)) for order in set(permutations(places.tolist(), num_experts))
        )
        group = metrics.matched_groups(table)
        assert sum(joint[d, e] for e, d in enumerate(group)) == pytest.approx(best)
        assert np.bincount(group).max() <= -(-num_experts // num_domains)
        assert metrics.matched_purity(table) == pytest.approx(best)


@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops(weighted: bool) -> None:
    rng = np.random.default_rng(4)
    for table in tables():
        weights = np.arange(1.0, len(table) + 1) if weighted else np.ones(len(table))
        given = weights if weighted else None
        routed = table * rng.random(table.shape)
        found = metrics.reference_agreement(table, given, routed)
        group = metrics.matched_groups(table, given)
        expected = naive(routed, group, weights / weights.sum())
        assert (found.precision, found.coverage) == pytest.approx(expected)
        assert found.regret == pytest.approx(1 - expected[0])


def test_a_reference_with_its_experts_renumbered_agrees_in_full() -> None:
    shuffled = OWN[:, np.random.default_rng(5).permutation(8)]
    assert metrics.reference_agreement(shuffled) == metrics.Agreement(1.0, 1.0, 0.0)
    assert metrics.matched_groups(shuffled).tolist() == shuffled.argmax(axis=0).tolist()


def test_no_specialization_agrees_by_chance_and_covers_all() -> None:
    found = metrics.reference_agreement(EVEN)
    assert (found.precision, found.coverage, found.regret) == pytest.approx((0.25, 1.0, 0.75))


def test_a_domain_that_uses_one_expert_of_its_group_has_precision_without_coverage() -> None:
    half = OWN * np.array([1.0, 0.0] * 4)
    found = metrics.reference_agreement(OWN, routed_DE=half)
    assert (found.precision, found.coverage) == pytest.approx((1.0, 0.5))
    barely = OWN * np.array([1.0, 0.04] * 4)
    assert metrics.reference_agreement(OWN, routed_DE=barely).coverage == pytest.approx(0.5)
    enough = OWN * np.array([1.0, 0.06] * 4)  # a tenth of the even share is 0.053 of the other one
    assert metrics.reference_agreement(OWN, routed_DE=enough).coverage == pytest.approx(1.0)


def test_weights_of_the_mixture_decide_not_the_number_of_assignments() -> None:
    """Every token uses an expert of its own domain and a foreign one, with nine tenths of the weight on its own."""
    counts, routed = OWN + np.roll(OWN, 2, axis=1), 0.9 * OWN + 0.1 * np.roll(OWN, 2, axis=1)
    counts[np.arange(4), 2 * np.arange(4)] += 1  # the matching is otherwise a tie
    assert metrics.reference_agreement(counts, routed_DE=routed).precision == pytest.approx(0.9)
    assert metrics.reference_agreement(counts).precision == pytest.approx(0.5, abs=0.01)


def test_precision_of_counts_is_matched_purity() -> None:
    for table in tables():
        assert metrics.reference_agreement(table).precision == pytest.approx(metrics.matched_purity(table))


def test_matched_purity_sees_a_domain_that_owns_all_experts() -> None:
    table = np.array([[25, 25, 25, 25], [97, 1, 1, 1]])
    assert metrics.purity(table) == pytest.approx(0.5 * 0.97 + 0.75 * 0.5)
    assert metrics.matched_purity(table) < metrics.purity(table)


def test_more_domains_than_experts_leaves_domains_without_a_group() -> None:
    table = np.array([[9, 1], [1, 9], [5, 5]])
    assert metrics.matched_groups(table).tolist() == [0, 1]
    found = metrics.reference_agreement(table)
    assert (found.precision, found.coverage) == pytest.approx((0.6, 1.0))


def test_order_and_scale_do_not_matter() -> None:
    rng = np.random.default_rng(6)
    for table in tables():
        rows, columns = rng.permutation(len(table)), rng.permutation(table.shape[1])
        found = metrics.reference_agreement(table[rows][:, columns] * rng.integers(1, 9, (len(table), 1)))
        expected = metrics.reference_agreement(table)
        assert found.precision == pytest.approx(expected.precision)
        assert np.array_equal(
            rows[metrics.matched_groups(table[rows][:, columns])], metrics.matched_groups(table)[columns]
        )


def test_domains_without_assignments_or_weight_get_no_expert() -> None:
    table = np.array([[5, 1, 0], [0, 0, 0], [1, 2, 9]])
    assert metrics.matched_groups(table).tolist() == [0, 0, 2]
    assert metrics.matched_groups(table + 1, [1, 0, 1]).tolist() == [0, 0, 2]
    assert metrics.reference_agreement(table).precision == pytest.approx(0.5 * 1 + 0.5 * 9 / 12)


def test_degenerate_tables() -> None:
    nothing = np.zeros((3, 4))
    assert metrics.matched_groups(nothing).tolist() == [-1] * 4
    assert math.isnan(metrics.matched_purity(nothing))
    assert all(math.isnan(value) for value in vars(metrics.reference_agreement(nothing)).values())
    assert metrics.reference_agreement([[3, 1]]) == metrics.Agreement(1.0, 1.0, 0.0)
    assert metrics.reference_agreement([[3], [4]]).precision == 0.5
    unweighted = metrics.reference_agreement(OWN, routed_DE=np.zeros_like(OWN))
    assert math.isnan(unweighted.precision) and math.isnan(unweighted.coverage)


def test_the_matching_cannot_be_changed_by_its_reader() -> None:
    group = metrics.matched_groups(OWN)
    group[:] = -7
    assert metrics.matched_groups(OWN).tolist() == OWN.argmax(axis=0).tolist()


def test_tables_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"routed_DE must have the shape of counts_DE, \(4, 8\), got \(8, 4\)"):
        metrics.reference_agreement(OWN, routed_DE=OWN.T)
