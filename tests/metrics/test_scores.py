"""Router measures: token by token in a loop, closed forms, and what has no tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_testbed.routing import metrics

DOMAIN = np.array([0, 0, 0, 0, 1, 1, 2])
PROBABILITIES = np.random.default_rng(0).dirichlet(np.ones(5), len(DOMAIN))


def sums(values_T: np.ndarray) -> np.ndarray:
    return np.stack([values_T[d == DOMAIN].sum(axis=0) for d in range(3)])


def weighted(values_T: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over domains of the means over their tokens, by loops."""
    return sum(
        w * np.mean([v for v, d in zip(values_T, DOMAIN, strict=True) if d == n], 0) for n, w in enumerate(weights)
    )


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_against_loops_over_tokens(weights: list[float] | None) -> None:
    share = np.full(3, 1 / 3) if weights is None else np.array(weights)
    entropy = np.array([-sum(p * math.log(p) for p in row) for row in PROBABILITIES])
    margin = np.array([sorted(row)[-2] - sorted(row)[-3] for row in PROBABILITIES])
    tokens = np.bincount(DOMAIN)
    assert metrics.mean_token_entropy(sums(entropy), tokens, weights) == pytest.approx(weighted(entropy, share))
    assert metrics.mean_margin(sums(margin), tokens, weights) == pytest.approx(weighted(margin, share))
    mean = weighted(PROBABILITIES, share)
    expected = -sum(p * math.log(p) for p in mean)
    assert metrics.entropy_of_mean(sums(PROBABILITIES), weights) == pytest.approx(expected)
    assert metrics.entropy_of_mean(sums(PROBABILITIES)) >= metrics.mean_token_entropy(sums(entropy), tokens)


def test_closed_forms() -> None:
    """Sure tokens, each of another expert: no entropy by token, all of it in the mean."""
    assert metrics.mean_token_entropy([0.0, 0.0], [10, 20]) == 0
    assert metrics.entropy_of_mean(np.eye(4)) == pytest.approx(math.log(4))
    assert metrics.entropy_of_mean([[3, 0], [5, 0]]) == 0
    assert metrics.mean_token_entropy([10 * math.log(4)], [10]) == pytest.approx(math.log(4))


def test_domains_without_tokens_are_left_out() -> None:
    assert metrics.mean_margin([4.0, 0.0, 9.0], [8, 0, 10]) == pytest.approx((0.5 + 0.9) / 2)
    assert math.isnan(metrics.mean_margin([0.0], [0]))
    assert math.isnan(metrics.mean_token_entropy([0.0, 0.0], [0, 0]))
    assert math.isnan(metrics.entropy_of_mean(np.zeros((2, 3))))


def test_mean_absolute_cosine() -> None:
    cosine = np.array([[1.0, 0.5, -0.2], [0.5, 1.0, 0.1], [-0.2, 0.1, 1.0]])
    assert metrics.router_cosine(cosine) == pytest.approx((0.5 + 0.2 + 0.1) / 3)
    cosine[2], cosine[:, 2] = math.nan, math.nan
    assert metrics.router_cosine(cosine) == pytest.approx(0.5)
    assert metrics.router_cosine(np.eye(4)) == 0
    assert math.isnan(metrics.router_cosine([[1.0]]))
    assert math.isnan(metrics.router_cosine(np.full((2, 2), math.nan)))


def test_random_directions_have_the_cosine_that_the_docstring_states() -> None:
    vectors = np.random.default_rng(1).standard_normal((200, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert metrics.router_cosine(vectors @ vectors.T) == pytest.approx(math.sqrt(2 / (math.pi * 64)), rel=0.02)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="square matrix, got shape"):
        metrics.router_cosine(np.ones((2, 3)))
    with pytest.raises(ValueError, match="one sum and one number of tokens a domain"):
        metrics.mean_margin([1.0, 2.0], [1])
