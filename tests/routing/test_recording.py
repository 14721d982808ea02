"""Routing tables against loops over tokens.

Shape legend: T tokens, W places for choices, Y MoE layers, D domains, E experts, C clusters, V token ids, X columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_testbed.routing.metrics.recording import MINIMUM_OCCURRENCES, TRACKED_IDS, RoutingTables, tracked_ids
from moe_testbed.routing.records import NO_EXPERT

Y, D, E, C, K, T, W = 2, 3, 6, 5, 2, 40, 4
IDS = np.array([7, 3, 11])
EXACT = {
    "counts_top_1_YDE",
    "counts_top_k_YDE",
    "dropped_YDE",
    "shuffled_counts_top_k_YDE",
    "cluster_counts_YCE",
    "coactivation_YEE",
    "vocabulary_counts_YVE",
    "vocabulary_ids_V",
}


@dataclass
class Routed:
    """What the layers did with T tokens."""

    ids_YTW: Tensor
    weights_YTW: Tensor
    kept_YTW: Tensor
    probabilities_YTE: Tensor
    domain_T: Tensor
    shuffled_T: Tensor
    cluster_T: Tensor
    token_ids_T: Tensor
    vectors_YEX: Tensor


@pytest.fixture
def routed() -> Routed:
    """Choices of ragged number, some tokens without any; a hole may stand before a choice."""
    generator = torch.Generator().manual_seed(1)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (T,), generator=generator)

    ids_YTW = torch.rand(Y, T, E, generator=generator).argsort(-1)[..., :W]
    ids_YTW = ids_YTW.masked_fill(torch.rand(Y, T, W, generator=generator) < 0.4, NO_EXPERT)
    ids_YTW[:, 5] = NO_EXPERT
    none = ids_YTW == NO_EXPERT
    probabilities_YTE = torch.rand(Y, T, E, generator=generator).softmax(-1)
    # A probability of 0 has entropy 0.
    probabilities_YTE[:, 0] = torch.eye(E)[0]
    return Routed(
        ids_YTW,
        torch.rand(Y, T, W, generator=generator).masked_fill(none, 0.0),
        (torch.rand(Y, T, W, generator=generator) < 0.7) & ~none,
        probabilities_YTE,
        draw(D),
        draw(D),
        draw(C),
        draw(14),
        torch.randn(Y, E, 3, generator=generator),
    )


def recorded(routed: Routed, parts: int, **tables: Any) -> dict[str, Any]:
    """The tables' arrays, the tokens added in some parts."""
    made = RoutingTables(Y, D, E, K, C, IDS, torch.device("cpu"), **tables)
    for rows in torch.arange(T).tensor_split(parts):
        for y in range(Y):
            made.add(
                y,
                routed.ids_YTW[y, rows],
                routed.weights_YTW[y, rows],
                routed.domain_T[rows],
                routed.cluster_T[rows],
                routed.token_ids_T[rows],
                probabilities_TE=routed.probabilities_YTE[y, rows],
                kept_TW=routed.kept_YTW[y, rows],
                shuffled_T=routed.shuffled_T[rows],
            )
    for y in range(Y):
        made.add_vectors(y, routed.vectors_YEX[y])
    made.all_reduce(None)
    return made.arrays()


def naive(routed: Routed) -> dict[str, Any]:
    """The same token by token, in Python's numbers."""
    shapes: dict[str, tuple[int, ...]] = {
        "counts_top_1_YDE": (Y, D, E),
        "counts_top_k_YDE": (Y, D, E),
        "dropped_YDE": (Y, D, E),
        "shuffled_counts_top_k_YDE": (Y, D, E),
        "cluster_counts_YCE": (Y, C, E),
        "coactivation_YEE": (Y, E, E),
        "vocabulary_counts_YVE": (Y, len(IDS), E),
        "weight_YDE": (Y, D, E),
        "entropy_sum_YD": (Y, D),
        "probability_sum_YDE": (Y, D, E),
        "margin_sum_YD": (Y, D),
        "router_cosine_YEE": (Y, E, E),
    }
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    for y in range(Y):
        for t in range(T):
            domain, shuffled, cluster = (int(x[t]) for x in (routed.domain_T, routed.shuffled_T, routed.cluster_T))
            choices = [(k, int(e)) for k, e in enumerate(routed.ids_YTW[y, t]) if e != NO_EXPERT]
            for k, e in choices:
                sums["counts_top_k_YDE"][y, domain, e] += 1
                sums["shuffled_counts_top_k_YDE"][y, shuffled, e] += 1
                sums["cluster_counts_YCE"][y, cluster, e] += 1
                sums["weight_YDE"][y, domain, e] += float(routed.weights_YTW[y, t, k])
                if not routed.kept_YTW[y, t, k]:
                    sums["dropped_YDE"][y, domain, e] += 1
                if k == 0:
                    sums["counts_top_1_YDE"][y, domain, e] += 1
                    if int(routed.token_ids_T[t]) in IDS:
                        row = IDS.tolist().index(int(routed.token_ids_T[t]))
                        sums["vocabulary_counts_YVE"][y, row, e] += 1
                for _, other in choices:
                    sums["coactivation_YEE"][y, e, other] += 1
            p = routed.probabilities_YTE[y, t].tolist()
            sums["entropy_sum_YD"][y, domain] -= sum(x * math.log(x) for x in p if x)
            ranked = sorted(p, reverse=True)
            sums["margin_sum_YD"][y, domain] += ranked[K - 1] - ranked[K]
            sums["probability_sum_YDE"][y, domain] += p
        for i, one in enumerate(routed.vectors_YEX[y].tolist()):
            for j, other in enumerate(routed.vectors_YEX[y].tolist()):
                product = sum(a * b for a, b in zip(one, other, strict=True))
                sums["router_cosine_YEE"][y, i, j] = product / math.hypot(*one) / math.hypot(*other)
    return {**sums, "vocabulary_ids_V": IDS}


def test_tables_equal_a_loop_over_tokens(routed: Routed) -> None:
    arrays, expected = recorded(routed, 1), naive(routed)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        if name in EXACT:
            assert array.dtype == np.int64 and (array == expected[name]).all(), name
    assert arrays["dropped_YDE"].any() and arrays["vocabulary_counts_YVE"].any()


def test_several_adds_are_one(routed: Routed) -> None:
    at_once, in_parts = recorded(routed, 1), recorded(routed, 7)
    for name, array in at_once.items():
        # Sums of floating numbers depend on their order in the last digit.
        np.testing.assert_allclose(in_parts[name], array, rtol=0 if name in EXACT else 1e-12, err_msg=name)


def test_what_was_never_added_is_absent(routed: Routed) -> None:
    tables = RoutingTables(Y, D, E, K, C, IDS, torch.device("cpu"), shuffled=False)
    for y in range(Y):
        tables.add(y, routed.ids_YTW[y], routed.weights_YTW[y], routed.domain_T, routed.cluster_T, routed.token_ids_T)
    arrays = tables.arrays()
    expected = naive(routed)
    absent = {"entropy_sum_YD", "probability_sum_YDE", "margin_sum_YD", "router_cosine_YEE"}
    assert arrays.keys() == expected.keys() - absent - {"shuffled_counts_top_k_YDE"}
    np.testing.assert_array_equal(arrays["counts_top_k_YDE"], expected["counts_top_k_YDE"])
    assert not arrays["dropped_YDE"].any()


def test_with_all_experts_in_use_there_is_no_margin() -> None:
    tables = RoutingTables(1, 1, 2, 2, 1, IDS, torch.device("cpu"), shuffled=False)
    zero_T = torch.zeros(1, dtype=torch.int64)
    ids_TW = torch.tensor([[1, 0]])
    tables.add(0, ids_TW, ids_TW.float(), zero_T, zero_T, zero_T, probabilities_TE=torch.tensor([[0.3, 0.7]]))
    assert tables.arrays()["margin_sum_YD"].tolist() == [[0.0]]


def test_the_most_frequent_ids_are_tracked() -> None:
    counts = np.array([9, 10, 50, 0, 50, 12])
    assert tracked_ids(counts).tolist() == [2, 4, 5, 1]
    many = np.full(TRACKED_IDS + 5, MINIMUM_OCCURRENCES)
    assert tracked_ids(many).tolist() == list(range(TRACKED_IDS))
    many[-1] += 1
    assert tracked_ids(many).tolist() == [TRACKED_IDS + 4, *range(TRACKED_IDS - 1)]
