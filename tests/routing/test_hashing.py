"""Stateless draws and token tables against plain Python."""

import pytest
import torch

from moe_testbed.routing.routers.parts.hashing import (
    balanced_table,
    choice_from_keys,
    cumulative_thresholds,
    hash_keys,
    modulo_table,
    uniform_from_keys,
)
from tests.routing.oracles import greedy_table, split_mix

EXTREMES = [0, 1, 2**31, 2**63 - 1, -1, -(2**63)]


def unsigned(values: torch.Tensor) -> list[int]:
    return [value % 2**64 for value in values.reshape(-1).tolist()]


def test_one_key_is_split_mix():
    """The first outputs of SplitMix64 for the seeds 0 and 1234567, as published."""
    assert unsigned(hash_keys(torch.tensor([0, 1234567]))) == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_several_keys_against_python_integers():
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(-(2**63), 2**63 - 1, (100,), generator=generator)
    first, second = torch.cat([draws, torch.tensor(EXTREMES)]), torch.tensor([0, 5, -7, 2**62])
    actual = unsigned(hash_keys(3, first[:, None], -4, second))
    assert actual == [split_mix(3, a, -4, b) for a in first.tolist() for b in second.tolist()]


def test_uniform_draws_are_the_top_24_bits():
    keys = torch.arange(5000)
    draws = uniform_from_keys(keys, 9)
    assert draws.tolist() == [(split_mix(key, 9) >> 40) / 2**24 for key in keys.tolist()]
    # The mean of n draws has a standard deviation of 1 / sqrt(12 n).
    assert abs(float(draws.double().mean()) - 0.5) < 4 / (12 * 5000) ** 0.5


def test_choices_follow_their_shares_exactly():
    shares = (0.5, 0.0, 0.3, 0.2, 0.0)
    keys = torch.arange(20_000)
    choices = choice_from_keys(cumulative_thresholds(shares), keys, 4)
    ends = [0.5, 0.5, 0.8, 1.0, 1.0]
    draws = [(split_mix(key, 4) >> 40) / 2**24 for key in keys.tolist()]
    assert choices.tolist() == [next(i for i, end in enumerate(ends) if draw < end) for draw in draws]


def test_a_share_begins_where_the_one_before_it_ends():
    draw = split_mix(8) >> 40
    assert choice_from_keys(torch.tensor([draw, 2**24]), torch.tensor([8])).tolist() == [1]
    assert choice_from_keys(torch.tensor([draw + 1, 2**24]), torch.tensor([8])).tolist() == [0]


@pytest.mark.parametrize("shares", [(0.1,) * 10, (1 / 3, 1 / 3, 1 / 3), (7.0, 1e-9)])
def test_thresholds_end_at_the_largest_draw_whatever_the_rounding(shares: tuple[float, ...]):
    assert cumulative_thresholds(shares)[-1] == 2**24


def zipf(size: int) -> torch.Tensor:
    return 1.0 / torch.arange(1, size + 1, dtype=torch.float64)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (8, 2), (6, 5), (7, 7)])
def test_balanced_table_is_the_naive_greedy(num_experts: int, top_k: int):
    weights = torch.cat([zipf(150), torch.zeros(20)])[torch.randperm(170)]
    for seed in (0, 1):
        table_VK = balanced_table(weights, num_experts, top_k, seed)
        assert table_VK.tolist() == greedy_table(weights.tolist(), list(range(num_experts)), top_k, seed)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (16, 5)])
def test_balanced_table_is_as_even_as_greedy_assignment_guarantees(num_experts: int, top_k: int):
    """Giving each token to the least loaded experts keeps the loads within the heaviest token of each other."""
    weights = zipf(2000)
    load_E = torch.zeros(num_experts, dtype=torch.float64)
    table_VK = balanced_table(weights, num_experts, top_k, seed=3)
    for token, experts in enumerate(table_VK.tolist()):
        load_E[experts] += weights[token]
    assert load_E.max() - load_E.min() <= weights.max() + 1e-9


def test_balanced_table_spreads_tokens_that_never_occur():
    table_VK = balanced_table(torch.zeros(500), num_experts=5, top_k=1, seed=3)
    assert torch.bincount(table_VK.reshape(-1)).tolist() == [100] * 5


def test_balanced_tables_differ_between_seeds():
    """Layers take different seeds."""
    first, second = (balanced_table(zipf(500), num_experts=5, top_k=1, seed=seed) for seed in (3, 4))
    # Two independent tables agree on one token in five.
    assert (first == second).double().mean() < 0.4


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (8, 5), (12, 12), (13, 3)])
def test_modulo_table_gives_different_experts_and_an_even_load(num_experts: int, top_k: int):
    for seed in range(10):
        table = modulo_table(6 * num_experts, num_experts, top_k, seed).tolist()
        assert all(len(set(experts)) == top_k for experts in table)
        assert table[: 5 * num_experts] == table[num_experts:]
        for choice in range(top_k):
            assert sorted(row[choice] for row in table) == sorted(list(range(num_experts)) * 6)
