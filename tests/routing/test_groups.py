"""The groups of domains, and the partition of the experts among them."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moe_testbed.routing.routers.parts.groups import domain_groups, group_masks, group_sizes, refuse_unknown_domains
from moe_testbed.routing.routers.reference import ReferenceConfig
from tests.routing.cases import DOMAINS, hidden_states, make_context, make_router, single_domain_context
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
        "3 groups with at least 3 experts each need 9 experts, but there are 8; raise model.moe.num_experts, lower "
        "model.moe.top_k, or have fewer groups (a mix with fewer domains, or a coarser routing.router.partition)"
    )


def test_masks_partition_the_experts_in_order():
    assert group_masks([2, 1, 3]).int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


FAMILIES = {"language": ["prose", "law"], "code": ["code"], "notation": ["music"]}


def test_families_keep_the_partitions_order_and_add_up_the_shares():
    groups = domain_groups(DOMAINS, {"code": ["code"], "others": ["music", "law", "prose"]})
    assert groups.family_of_domain == (1, 0, 1, 1)
    assert groups.shares((0.4, 0.3, 0.2, 0.1)) == pytest.approx((0.3, 0.7))
    assert domain_groups(DOMAINS).family_of_domain == (0, 1, 2, 3)


def test_parts_divide_a_familys_share():
    groups = domain_groups(DOMAINS, FAMILIES, parts=2)
    assert groups.num_groups == 6
    assert [groups.domains_of(group) for group in range(6)] == [[0, 2], [0, 2], [1], [1], [3], [3]]
    assert groups.shares((0.4, 0.3, 0.2, 0.1)) == pytest.approx((0.3, 0.3, 0.15, 0.15, 0.05, 0.05))


def test_a_family_without_domains_left_gets_no_group():
    groups = domain_groups(("prose", "music"), FAMILIES)
    assert groups.family_of_domain == (0, 1) and groups.num_groups == 2


def test_a_misspelt_domain_is_named_with_its_nearest():
    refuse_unknown_domains(DOMAINS, FAMILIES)
    with pytest.raises(ValueError) as error:
        refuse_unknown_domains(DOMAINS, {**FAMILIES, "notation": ["musik"]})
    assert str(error.value) == (
        "routing.router.partition.notation names 'musik', which is no domain of the mix. Did you mean 'music'? "
        "Available: prose, code, law, music"
    )


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"a": ["prose", "code"], "b": ["law", "prose"]}, "has the domain 'prose' twice, in a and b"),
        ({"a": ["prose", "prose"]}, "has the domain 'prose' twice, in a and a"),
        ({"a": ["prose"], "b": []}, r"partition\.b is empty"),
    ],
)
def test_a_domain_has_one_group(partition: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ReferenceConfig(partition=partition)


@pytest.mark.parametrize("partition", [{"a": ["prose", "code", "law"]}, {}])
def test_every_domain_has_a_group(partition: dict[str, Any]):
    with pytest.raises(ValueError, match=r"partition has no group for the domain '(music|prose)'; add it to one of"):
        make_router(("reference", {"partition": partition}))


def served_by(options: dict[str, Any], layer: int = 1) -> Tensor:
    """The first choices of 400 sequences of two tokens, each a document of one domain."""
    context = single_domain_context(400)
    context = replace(context, document_BL=context.sequence_B[:, None].expand(400, 2))
    router = make_router(("reference", {"partition": FAMILIES, **options}), layer=layer)
    return router(hidden_states(context), context).expert_ids_TK[:, 0].view(400, 2)


def test_domains_of_a_family_share_experts():
    experts = served_by({})
    domain_B = torch.arange(400) % 4
    used = [set(experts[domain_B == d].flatten().tolist()) for d in range(4)]
    assert used[0] | used[2] <= set(range(8)) and used[0] & used[2]
    assert used[1] <= set(range(8, 16)) and used[3] <= set(range(16, 24))


def test_a_document_stays_in_its_part_in_all_layers():
    parts_BL = served_by({"document_parts": 2}) // 4
    domain_B = torch.arange(400) % 4
    assert torch.equal(parts_BL[:, 0], parts_BL[:, 1])
    assert torch.equal(parts_BL, served_by({"document_parts": 2}, layer=0) // 4)
    assert torch.equal(parts_BL[:, 0] // 2, torch.tensor([0, 1, 0, 2])[domain_B])
    for domain in range(4):
        share = (parts_BL[domain_B == domain, 0] % 2).double().mean()
        assert abs(share - 0.5) < 4 * (0.25 / 100) ** 0.5


def test_parts_need_document_numbers():
    router, context = make_router(("reference", {"document_parts": 2})), make_context()
    with pytest.raises(ValueError, match=r"document_parts is 2, but the batch has no document numbers"):
        router(hidden_states(context), replace(context, document_BL=None))
