"""Causal summaries: means by loops, specificity by hand, and rows that are not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_testbed.routing import metrics
from moe_testbed.routing.metrics.causal import ablation_damage_of_many, specificity_of_many

NAN = math.nan
DOMAIN = np.array([0, 0, 1, 1, 1, -1])
BASELINE = np.array([3.0, 3.2, 2.0, 2.1, 2.2, 9.0])


def losses(rows: int, seed: int) -> np.ndarray:
    return BASELINE + np.random.default_rng(seed).normal(0.1, 0.1, (rows, len(DOMAIN)))


def test_damage_is_the_mean_rise_by_domain() -> None:
    ablated = losses(3, 0)
    ablated[1] = NAN
    found = metrics.damage_matrix(ablated, BASELINE, DOMAIN)
    assert found.shape == (3, 2)
    for e in (0, 2):
        for d in (0, 1):
            rises = [ablated[e, n] - BASELINE[n] for n in range(len(DOMAIN)) if DOMAIN[n] == d]
            assert found[e, d] == pytest.approx(sum(rises) / len(rises))
    assert np.isnan(found[1]).all()


def test_a_domain_without_sequences_is_nan_and_does_no_damage() -> None:
    found = metrics.damage_matrix([[1.0, 1.5]], [1.0, 1.0], [0, 2])
    assert found[0, [0, 2]].tolist() == [0.0, 0.5]
    assert math.isnan(found[0, 1])
    assert metrics.specificity_by_expert(found, [2]).tolist() == [1.0]


def test_specificity_by_hand() -> None:
    damage = np.array(
        [[0.3, 0.1, 0.0], [0.2, -0.5, 0.2], [-0.1, -0.2, 0.0], [NAN] * 3, [0.1, 0.1, 0.2], [0.0, 0.2, 0.0]]
    )
    owners = np.array([0, 2, 0, 1, -1, 0])
    found = metrics.specificity_by_expert(damage, owners)
    assert found[[0, 1, 5]] == pytest.approx([0.75, 0.5, 0.0])  # gains are no damage
    assert np.isnan(found[[2, 3, 4]]).all()  # no damage, not tried, no owner
    assert metrics.specificity(damage, owners) == pytest.approx((0.3 + 0.2 + 0.0) / (0.4 + 0.4 + 0.2))


def test_specificity_is_blind_to_scale_and_order() -> None:
    rng = np.random.default_rng(1)
    damage, owners = rng.normal(0.1, 0.2, (20, 4)), rng.integers(0, 4, 20)
    assert metrics.specificity_by_expert(7 * damage, owners) == pytest.approx(
        metrics.specificity_by_expert(damage, owners), nan_ok=True
    )
    order, names = rng.permutation(20), rng.permutation(4)
    renamed = np.empty_like(damage)
    renamed[:, names] = damage
    found = metrics.specificity(renamed[order], names[owners][order])
    assert found == pytest.approx(metrics.specificity(damage, owners))


def test_specificity_of_the_two_extremes() -> None:
    assert metrics.specificity(np.eye(4), np.arange(4)) == 1
    assert metrics.specificity(np.ones((8, 4)), np.arange(8) % 4) == pytest.approx(0.25)
    assert math.isnan(metrics.specificity(-np.eye(4), np.arange(4)))
    assert math.isnan(metrics.specificity(np.full((2, 2), NAN), [0, 1]))


def test_forced_matrix_by_loops() -> None:
    forced = losses(2, 2)
    found = metrics.forced_matrix(forced, BASELINE, DOMAIN)
    for tokens in (0, 1):
        for group in (0, 1):
            rises = [forced[group, n] - BASELINE[n] for n in range(len(DOMAIN)) if DOMAIN[n] == tokens]
            assert found[tokens, group] == pytest.approx(sum(rises) / len(rises))
    forced[1] = NAN
    assert np.isnan(metrics.forced_matrix(forced, BASELINE, DOMAIN)[:, 1]).all()
    assert not np.isnan(metrics.forced_matrix(forced, BASELINE, DOMAIN)[:, 0]).any()


def test_losses_in_the_own_group_and_in_the_others() -> None:
    forced = losses(3, 3)
    domain = np.array([0, 0, 1, 1, 2, -1])
    own, others = metrics.own_group_loss(forced, domain), metrics.other_groups_loss(forced, domain)
    for n in range(5):
        assert own[n] == forced[domain[n], n]
        assert others[n] == pytest.approx(np.mean([forced[g, n] for g in range(3) if g != domain[n]]))
    assert math.isnan(own[5]) and math.isnan(others[5])
    delta = metrics.forced_matrix(forced, BASELINE, domain)
    chosen = domain >= 0
    cost = metrics.lead(own[chosen], BASELINE[chosen], domain[chosen])
    assert cost.value == pytest.approx(np.trace(delta) / 3)
    further = metrics.lead(others[chosen], BASELINE[chosen], domain[chosen])
    assert further.value == pytest.approx((delta.sum() - np.trace(delta)) / 6)


def test_rows_that_were_not_tried_are_left_out_of_the_others() -> None:
    forced = np.array([[1.0, 2.0], [NAN, NAN], [3.0, 5.0]])
    assert metrics.other_groups_loss(forced, [0, 2]).tolist() == [3.0, 2.0]
    assert metrics.other_groups_loss(forced, [1, 1]).tolist() == [2.0, 3.5]
    assert np.isnan(metrics.own_group_loss(forced, [1, 1])).all()
    assert np.isnan(metrics.other_groups_loss([[1.0]], [0])).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one domain a sequence"):
        metrics.damage_matrix(np.ones((2, 3)), np.ones(3), [0, 1])
    with pytest.raises(ValueError, match="one of them at least 0"):
        metrics.forced_matrix(np.ones((2, 2)), np.ones(2), [-1, -1])
    with pytest.raises(ValueError, match="one row a domain, got 2 for domain 2"):
        metrics.own_group_loss(np.ones((2, 2)), [0, 2])
    with pytest.raises(ValueError, match="each of 2 experts one of 3 domains"):
        metrics.specificity_by_expert(np.ones((2, 3)), [0, 3])


@pytest.mark.parametrize(
    "one, many", [("specificity", specificity_of_many), ("ablation_damage", ablation_damage_of_many)]
)
def test_many_tables_at_once_have_the_values_that_they_have_one_by_one(one: str, many: Callable[..., Any]) -> None:
    """Also with experts that were not tried or have no owner, with domains without sequences, and without damage."""
    damage = np.random.default_rng(0).standard_normal((12, 6, 4))
    damage[1, 2], damage[2, :, 1], damage[3], damage[4] = np.nan, np.nan, np.nan, -1.0
    for owners in ([0, 1, 2, 3, -1, 1], [-1] * 6):
        expected = [getattr(metrics, one)(table, owners) for table in damage]
        np.testing.assert_allclose(many(damage, owners), expected, rtol=1e-12)
