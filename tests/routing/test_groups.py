"""The partition of the experts among the domains."""

import itertools

import pytest

from moe_testbed.routing.groups import group_masks, group_sizes
from tests.routing.oracles import largest_remainder

SHARES = [
    (1.0,),
    (1.0, 1.0, 1.0),
    (0.4, 0.3, 0.2, 0.1),
    (0.7, 0.2, 0.05, 0.05),
    (1e-6, 1.0, 1.0),
    (8.0, 4.0, 2.0, 1.0, 1.0),
]
PROBLEMS = [
    (num_experts, shares, smallest)
    for num_experts, shares, smallest in itertools.product((5, 8, 24, 64), SHARES, (1, 2, 5))
    if smallest * len(shares) <= num_experts
]


@pytest.mark.parametrize(("num_experts", "shares", "smallest"), PROBLEMS)
def test_sizes(num_experts: int, shares: tuple[float, ...], smallest: int):
    sizes = group_sizes(num_experts, shares, smallest)
    assert sum(sizes) == num_experts
    assert min(sizes) >= smallest
    # A larger share never gets the smaller group.
    ordered = sorted(zip(shares, sizes, strict=True))
    assert all(a[0] == b[0] or a[1] <= b[1] for a, b in itertools.pairwise(ordered))
    exact = [share / sum(shares) * num_experts for share in shares]
    if min(exact) >= smallest:
        assert all(abs(size - due) < 1 for size, due in zip(sizes, exact, strict=True))
    assert sizes == largest_remainder(num_experts, shares, smallest)


def test_exact_shares_get_exact_sizes():
    assert group_sizes(16, (8.0, 4.0, 2.0, 1.0, 1.0), 1) == [8, 4, 2, 1, 1]
    assert group_sizes(64, (1.0,) * 8, 2) == [8] * 8


def test_too_few_experts_say_what_to_change():
    with pytest.raises(ValueError) as error:
        group_sizes(8, (1.0, 1.0, 1.0), 3)
    assert str(error.value) == (
        "3 domains with at least 3 experts each need 9 experts, but model.moe.num_experts is 8; use more experts, a "
        "smaller model.moe.top_k, or a mix with fewer domains"
    )


def test_masks_partition_the_experts_in_order():
    assert group_masks([2, 1, 3]).int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
