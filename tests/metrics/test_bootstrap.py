"""Bootstrap intervals: how often they hold the truth where it is known, what is resampled, and where they are nan."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from moe_testbed.routing import metrics

DOMAINS, EXPERTS, TOKENS = 4, 16, 256
TRIALS = 100


def documents(seed: int, truth_DE: np.ndarray, number: int, alike: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Counts [C, E] and domains [C] of documents, each with routing of its own around that of its domain."""
    rng = np.random.default_rng(seed)
    counts = [
        rng.multinomial(TOKENS, rng.dirichlet(alike * truth_E + 1e-9)) for truth_E in truth_DE for _ in range(number)
    ]
    return np.stack(counts), np.repeat(np.arange(len(truth_DE)), number)


def routing(concentration: float) -> np.ndarray:
    return np.random.default_rng(77).dirichlet(np.full(EXPERTS, concentration), DOMAINS)


@pytest.mark.parametrize("concentration", [0.3, 100.0], ids=["specialised", "hardly at all"])
@pytest.mark.parametrize("metric", [metrics.domain_information, metrics.normalised_effective_experts])
def test_intervals_over_documents_hold_the_truth(metric: Callable[..., float], concentration: float) -> None:
    """At 95 %, with 24 documents a domain, also where the bias exceeds the noise."""
    truth_DE = routing(concentration)
    truth, hits = metric(truth_DE), 0
    for trial in range(TRIALS):
        found = metrics.counts_interval(metric, *documents(trial, truth_DE, 24), within=(0, 1))
        hits += found.low <= truth <= found.high
        assert found.low <= found.value <= found.high
    assert hits >= 0.87 * TRIALS


def test_intervals_are_no_wider_than_they_need_to_be() -> None:
    """Their mean width is that of the values over many draws of documents, 3.92 standard deviations."""
    truth_DE = routing(0.3)
    found = [
        metrics.counts_interval(metrics.domain_information, *documents(trial, truth_DE, 24)) for trial in range(TRIALS)
    ]
    width = np.mean([interval.high - interval.low for interval in found])
    assert width == pytest.approx(3.92 * np.std([interval.value for interval in found]), rel=0.2)


def test_the_value_is_that_of_the_whole_table() -> None:
    counts, domains = documents(0, routing(1.0), 6)
    table = np.stack([counts[domains == d].sum(axis=0) for d in range(DOMAINS)])
    order = np.random.default_rng(0).permutation(len(counts))
    found = metrics.counts_interval(metrics.purity, counts[order], domains[order])
    assert found.value == pytest.approx(metrics.purity(table))
    assert found.over == "documents"


def test_documents_that_are_all_alike_leave_no_noise() -> None:
    counts = np.repeat(np.arange(1, 13).reshape(3, 4), 5, axis=0)
    found = metrics.counts_interval(metrics.domain_information, counts, np.repeat(np.arange(3), 5))
    assert found.low == pytest.approx(found.value)
    assert found.high == pytest.approx(found.value)


def test_clusters_are_drawn_within_their_domain() -> None:
    """A domain of many documents and one of few keep their numbers: shares of the load move, domains do not vanish."""
    seen: list[np.ndarray] = []

    def watch(table_DE: np.ndarray) -> float:
        seen.append(table_DE)
        return 0.0

    metrics.counts_interval(watch, np.eye(5), [0, 0, 0, 1, 1], resamples=20)
    assert len(seen) == 21
    for table in seen:
        assert table[0].sum() == 3 and not table[0, 3:].any()
        assert table[1].sum() == 2 and not table[1, :3].any()


def test_no_bound_leaves_the_range_of_the_metric() -> None:
    counts, domains = documents(0, routing(100.0), 6)
    found = metrics.counts_interval(metrics.normalised_effective_experts, counts, domains, within=(0, 1))
    assert found.high == 1
    assert metrics.counts_interval(metrics.normalised_effective_experts, counts, domains).high > 1


def test_clusters_without_a_domain_are_left_out_and_absent_domains_are_empty_rows() -> None:
    counts, domains = documents(0, routing(1.0), 6)
    expected = metrics.counts_interval(metrics.domain_information, counts, domains)
    more = np.vstack([counts, np.full((1, EXPERTS), 999)]), np.append(domains, -1)
    assert metrics.counts_interval(metrics.domain_information, *more) == expected
    later = np.where(domains == 3, 5, domains)
    assert metrics.counts_interval(metrics.domain_information, counts, later).value == pytest.approx(expected.value)


def test_the_same_input_gives_the_same_interval() -> None:
    given = documents(0, routing(1.0), 6)
    assert metrics.counts_interval(metrics.gini, *given) == metrics.counts_interval(metrics.gini, *given)


def test_what_has_no_interval_is_nan() -> None:
    one = metrics.counts_interval(metrics.domain_information, [[3, 1], [1, 3], [2, 2]], [0, 1, 1])
    assert one.value > 0 and math.isnan(one.low) and math.isnan(one.high)
    single_domain = metrics.counts_interval(metrics.domain_information, [[3, 1], [1, 3]], [0, 0])
    assert math.isnan(single_domain.value) and math.isnan(single_domain.low)
    with pytest.raises(ValueError, match="one domain a cluster"):
        metrics.counts_interval(metrics.gini, np.ones((2, 3)), [0])
    with pytest.raises(ValueError, match="one of them at least 0"):
        metrics.counts_interval(metrics.gini, np.ones((2, 3)), [-1, -1])


def test_intervals_over_many_seeds_hold_the_truth_as_often_as_they_say() -> None:
    hits = 0
    for trial in range(300):
        found = metrics.seeds_interval(np.random.default_rng(trial).normal(2.0, 0.5, 20))
        hits += found.low <= 2.0 <= found.high
    assert 0.88 * 300 <= hits <= 0.98 * 300


def test_intervals_over_three_seeds_are_their_range() -> None:
    found = metrics.seeds_interval([3.0, 1.0, 2.0])
    assert (found.value, found.low, found.high, found.over) == (pytest.approx(2), 1, 3, "seeds")


def test_seeds_without_an_interval() -> None:
    single = metrics.seeds_interval([2.0])
    assert single.value == 2 and math.isnan(single.low) and math.isnan(single.high)
    failed = metrics.seeds_interval([2.0, math.nan, 1.0])
    assert math.isnan(failed.value) and math.isnan(failed.low)
    for nothing in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="one number a seed"):
            metrics.seeds_interval(nothing)


@pytest.mark.parametrize(
    ("num_seeds", "holds", "above"),
    [(2, 0.51, 0.24), (3, 0.75, 0.12), (4, 0.80, 0.10), (5, 0.84, 0.08), (8, 0.89, 0.06)],
)
def test_over_few_seeds_the_interval_is_narrower_than_its_name(num_seeds: int, holds: float, above: float) -> None:
    """The table of docs/metrics.md, with fewer simulations."""
    seeds = np.random.default_rng(5).standard_normal((600, num_seeds))
    found = [metrics.seeds_interval(values_I) for values_I in seeds]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(holds, abs=0.06)
    assert np.mean([one.low > 0 for one in found]) == pytest.approx(above, abs=0.04)
