"""Metrics over counts: closed forms, a naive loop as the oracle, properties, degenerate tables, published values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_testbed.routing import metrics

ALL: dict[str, Callable[..., float]] = {
    name: getattr(metrics, name)
    for name in (
        "mutual_information", "domain_information", "nmi_geometric", "purity", "matched_purity", "effective_experts",
        "normalised_effective_experts", "inverse_simpson", "dead_experts", "coefficient_of_variation", "max_violation",
        "gini",
    )
}  # fmt: skip

OWN = np.kron(np.eye(4), np.ones((1, 2))) * 50  # 4 domains, each evenly on two experts of its own
EVEN = np.full((4, 8), 25.0)  # every domain evenly on every expert
ONE = np.zeros((4, 8))  # everything on expert 3
ONE[:, 3] = 100

CLOSED_FORMS = {
    "mutual_information": (math.log(4), 0.0, 0.0),
    "domain_information": (1.0, 0.0, 0.0),
    "nmi_geometric": (math.sqrt(math.log(4) / math.log(8)), 0.0, 0.0),
    "purity": (1.0, 0.25, 0.25),
    "matched_purity": (1.0, 0.25, 0.25),
    "effective_experts": (8.0, 8.0, 1.0),
    "normalised_effective_experts": (1.0, 1.0, 0.0),
    "inverse_simpson": (8.0, 8.0, 1.0),
    "dead_experts": (0.0, 0.0, 7 / 8),
    "coefficient_of_variation": (0.0, 0.0, math.sqrt(7)),
    "max_violation": (0.0, 0.0, 7.0),
    "gini": (0.0, 0.0, 7 / 8),
}


def tables() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (3, 8), (5, 4), (8, 32), (6, 7)]
    dense = [rng.integers(0, 60, shape) + (rng.random(shape) < 0.1) for shape in shapes]
    sparse = [table * (rng.random(table.shape) < 0.4) + np.eye(*table.shape, dtype=int) for table in dense]
    return [*dense, *sparse]


def naive(counts: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Every metric by loops over the definitions."""
    num_domains, num_experts = counts.shape
    p = [[counts[d, e] / sum(counts[d]) for e in range(num_experts)] for d in range(num_domains)]
    q = [sum(weights[d] * p[d][e] for d in range(num_domains)) for e in range(num_experts)]

    def entropy(values: list[float]) -> float:
        return -sum(v * math.log(v) for v in values if v > 0)

    information = 0.0
    for d in range(num_domains):
        for e in range(num_experts):
            if p[d][e] > 0:
                information += weights[d] * p[d][e] * math.log(p[d][e] / q[e])
    mean = sum(q) / num_experts
    return {
        "mutual_information": information,
        "domain_information": information / entropy(list(weights)),
        "nmi_geometric": information / math.sqrt(entropy(list(weights)) * entropy(q)),
        "purity": sum(max(weights[d] * p[d][e] for d in range(num_domains)) for e in range(num_experts)),
        "effective_experts": math.exp(entropy(q)),
        "normalised_effective_experts": entropy(q) / math.log(num_experts),
        "inverse_simpson": 1 / sum(v * v for v in q),
        "dead_experts": sum(v < 0.1 / num_experts for v in q) / num_experts,
        "coefficient_of_variation": math.sqrt(sum((v - mean) ** 2 for v in q) / num_experts) / mean,
        "max_violation": (max(q) - mean) / mean,
        "gini": sum(abs(a - b) for a in q for b in q) / (2 * num_experts),
    }


@pytest.mark.parametrize("name", ALL)
def test_closed_forms(name: str) -> None:
    found = [ALL[name](table) for table in (OWN, EVEN, ONE)]
    assert found == pytest.approx(CLOSED_FORMS[name], abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops(weighted: bool) -> None:
    for table in tables():
        weights = np.arange(1.0, len(table) + 1) if weighted else np.ones(len(table))
        expected = naive(table, weights / weights.sum())
        found = {name: ALL[name](table, weights if weighted else None) for name in expected}
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_order_of_domains_and_experts_and_scale_do_not_matter(name: str) -> None:
    rng = np.random.default_rng(1)
    for table in tables():
        shuffled = table[rng.permutation(len(table))][:, rng.permutation(table.shape[1])]
        scaled = table * rng.integers(1, 9, (len(table), 1))
        assert ALL[name](shuffled) == pytest.approx(ALL[name](table), abs=1e-12)
        assert ALL[name](scaled) == pytest.approx(ALL[name](table), abs=1e-12)


def test_bounds() -> None:
    for table in tables():
        num_domains, num_experts = table.shape
        bounds = {
            "mutual_information": (0, math.log(min(num_domains, num_experts))),
            "domain_information": (0, 1),
            "nmi_geometric": (0, 1),
            "purity": (1 / num_domains, 1),
            "matched_purity": (0, metrics.purity(table)),
            "effective_experts": (1, num_experts),
            "normalised_effective_experts": (0, 1),
            "inverse_simpson": (1, metrics.effective_experts(table)),
            "dead_experts": (0, (num_experts - 1) / num_experts),
            "coefficient_of_variation": (0, math.sqrt(num_experts - 1)),
            "max_violation": (0, num_experts - 1),
            "gini": (0, (num_experts - 1) / num_experts),
        }
        for name, (low, high) in bounds.items():
            assert low - 1e-12 <= ALL[name](table) <= high + 1e-12, name


def test_a_domain_without_assignments_or_weight_is_left_out() -> None:
    table = np.array([[5, 1, 0], [0, 0, 0], [1, 2, 9]])
    for metric in ALL.values():
        assert metric(table) == pytest.approx(metric(table[[0, 2]]))
        assert metric(table + 1, [1, 0, 1]) == pytest.approx(metric((table + 1)[[0, 2]]))


def test_degenerate_tables() -> None:
    for metric in ALL.values():
        assert math.isnan(metric(np.zeros((3, 4))))
    one_domain, one_expert = np.array([[3, 1]]), np.array([[3], [4]])
    for name in ("domain_information", "nmi_geometric"):
        assert math.isnan(ALL[name](one_domain))
        assert ALL[name](one_expert) == 0
    assert metrics.purity(one_domain) == 1
    assert metrics.purity(one_expert) == 0.5
    assert metrics.normalised_effective_experts(one_expert) == 1
    assert metrics.max_violation(one_expert) == metrics.gini(one_expert) == metrics.dead_experts(one_expert) == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros(3), "table of domains x experts"),
        (np.zeros((0, 3)), "both at least 1"),
        ([[1, -1]], "finite and at least 0"),
        ([[1, math.nan]], "finite and at least 0"),
    ],
)
def test_what_is_no_table_of_counts_is_refused(table: object, message: str) -> None:
    for metric in ALL.values():
        with pytest.raises(ValueError, match=message):
            metric(table)


@pytest.mark.parametrize("weights", [[1], [1, -1], [1, math.inf]])
def test_weights_that_fit_no_domains_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights_D must be 2 finite numbers"):
        metrics.domain_information(np.ones((2, 2)), weights)


def test_shuffled_labels_are_the_zero_of_information() -> None:
    """A router that sends whole sequences to one expert by chance looks specialised, and is not."""
    rng = np.random.default_rng(2)
    expert_of_sequence, domain = rng.integers(0, 16, 64), np.repeat(np.arange(4), 16)

    def table(labels: np.ndarray) -> np.ndarray:
        counts = np.zeros((4, 16))
        np.add.at(counts, (labels, expert_of_sequence), 128)
        return counts

    raw = metrics.domain_information(table(domain))
    baseline = [
        metrics.domain_information_above_shuffled(table(domain), table(rng.permutation(domain))) for _ in range(50)
    ]
    assert raw > 0.2
    assert abs(np.mean(baseline)) < 0.1
    assert metrics.domain_information_above_shuffled(OWN, EVEN) == pytest.approx(1.0)


def test_drop_rate_weighs_domains_alike() -> None:
    counts, dropped = np.array([[100, 100], [5, 5]]), np.array([[20, 0], [0, 5]])
    assert metrics.drop_rate(counts, dropped) == pytest.approx(0.5 * 20 / 200 + 0.5 * 5 / 10)
    assert metrics.drop_rate(counts, dropped, [1, 0]) == pytest.approx(0.1)
    assert math.isnan(metrics.drop_rate(np.zeros((2, 2)), np.zeros((2, 2))))
    with pytest.raises(ValueError, match="a part of it"):
        metrics.drop_rate(counts, counts + 1)


def test_owners_sort_experts_by_the_domain_that_they_serve_most() -> None:
    owner, order = metrics.owners(np.array([[10, 0, 60, 30], [0, 90, 10, 0]]))
    assert owner.tolist() == [0, 1, 0, 0]
    assert order.tolist() == [2, 3, 0, 1]


def test_unused_experts_have_no_owner_and_come_last() -> None:
    owner, order = metrics.owners(np.array([[0, 0, 10, 0], [0, 90, 10, 0]]))
    assert owner.tolist() == [-1, 1, 0, -1]
    assert order.tolist() == [2, 1, 0, 3]
    assert metrics.owners(np.zeros((2, 3)))[0].tolist() == [-1, -1, -1]


def public_counts() -> Path:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "counts"
    return Path(os.environ.get("MOE_TESTBED_PUBLIC_COUNTS", default))


PUBLISHED_METRICS = ("nmi_geometric", "purity", "effective_experts", "max_violation")
PUBLISHED = {
    "olmoe-1b-7b.layer0.top_k": ("0.0451", "0.338", "60.8", "1.10"),
    "olmoe-1b-7b.layer15.top_k": ("0.1362", "0.452", "56.9", "1.73"),
    "mixtral-8x7b.layer0.top_k": ("0.0012", "0.216", "7.97", "0.18"),
    "olmoe-1b-7b.layer0.top_1": ("0.176", "0.487", "45.7"),
    "olmoe-1b-7b.layer15.top_1": ("0.296", "0.648", "36.7"),
    "mixtral-8x7b.layer0.top_1": ("0.0049", "0.233", "7.76"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_of_public_checkpoints(name: str) -> None:
    path = public_counts() / f"{name}.json"
    if not path.exists():
        pytest.skip(
            f"{path.name} is not in {path.parent}: set MOE_TESTBED_PUBLIC_COUNTS to the folder of public counts"
        )
    counts = json.loads(path.read_text())["counts"]
    for metric, value in zip(PUBLISHED_METRICS, PUBLISHED[name], strict=False):
        last_digit = 10.0 ** -len(value.split(".")[1])
        assert ALL[metric](counts) == pytest.approx(float(value), abs=0.51 * last_digit), metric


@pytest.mark.parametrize(
    "metric",
    [metric for metric in metrics.REPORTED if metric.of_many and metric.of == metrics.COUNTS],
    ids=lambda m: m.name,
)
def test_many_tables_at_once_have_the_values_that_they_have_one_by_one(metric: metrics.Metric) -> None:
    """Also tables with absent domains, with none at all, and with a single domain or expert."""
    rng = np.random.default_rng(0)
    for shape in ((5, 8), (3, 1), (1, 6)):
        many = rng.integers(0, 9, (20, *shape)) * (rng.random((20, *shape)) < 0.5)
        many[3] = 0
        many[4:8, 0] = 0
        many[8, 1:] = 0
        assert metric.function is not None and metric.of_many is not None
        expected = [metric.function(table) for table in many]
        np.testing.assert_allclose(metric.of_many(many), expected, rtol=1e-12, atol=1e-12)
