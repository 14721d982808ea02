"""Which tokens are routed together."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.routers.parts.pools import PoolRouterConfig, choose_in_pools, pool_tokens
from moe_testbed.routing.scopes import Scope
from tests.routing.cases import make_context

# Two sequences of six tokens; document 4 goes on in the second one, where it is a pool of its own.
DOCUMENTS = [[4, 4, 9, 9, 9, 4], [4, 4, 4, 2, 2, 2]]
PADDED = [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
POOLS = {
    "sequence": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
    "document": [[0, 1, 5], [2, 3, 4], [9, 10, 11], [6, 7, 8]],
    "micro_batch": [list(range(12))],
    "data_parallel": [list(range(12))],
}
VALID_POOLS = {
    "sequence": [[0, 1, 2, 3], [6, 7]],
    # The document at 9 to 11 is all padding and forms no pool.
    "document": [[0, 1], [2, 3], [6, 7]],
    "micro_batch": [[0, 1, 2, 3, 6, 7]],
    "data_parallel": [[0, 1, 2, 3, 6, 7]],
}


def packed(padded: bool) -> RoutingContext:
    context = replace(make_context(2, 6), document_BL=torch.tensor(DOCUMENTS))
    return replace(context, valid_BL=torch.tensor(PADDED, dtype=torch.bool)) if padded else context


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("pool", POOLS)
def test_pools_of_every_scope(pool: str, padded: bool):
    pools = [token_U.tolist() for token_U in pool_tokens(Scope(pool), packed(padded))]
    assert sorted(pools) == sorted((VALID_POOLS if padded else POOLS)[pool])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_is_chosen_for_by_itself_and_padding_not_at_all(pool: str, padded: bool):
    scores_TE = torch.randn(12, 3, requires_grad=True)
    seen = []

    def choose(scores_UE: Tensor) -> Tensor:
        seen.append(scores_UE)
        return torch.stack([scores_UE.sum(0).expand_as(scores_UE), scores_UE], dim=1)

    padding = torch.full((12, 2, 3), -7.0)
    chosen = choose_in_pools(choose, scores_TE, padding, Scope(pool), packed(padded), group=None)
    pools = (VALID_POOLS if padded else POOLS)[pool]
    assert len(seen) == len(pools) and not chosen.requires_grad
    expected = padding.clone()
    for tokens in pools:
        for token in tokens:
            expected[token] = torch.stack([scores_TE[tokens].sum(0), scores_TE[token]]).detach()
    torch.testing.assert_close(chosen, expected)
    assert (padding == -7.0).all()


def test_a_micro_batch_of_padding_has_no_pool():
    context = replace(packed(True), valid_BL=torch.zeros(2, 6, dtype=torch.bool))
    assert pool_tokens(Scope.MICRO_BATCH, context) == []


def test_a_pool_of_documents_needs_their_numbers():
    with pytest.raises(ValueError, match="scope document needs the number of every token's document"):
        pool_tokens(Scope.DOCUMENT, replace(packed(False), document_BL=None))


@pytest.mark.parametrize(
    "pool, message",
    [
        ("token", r"routing\.router\.pool is token, and one token leaves nothing to choose among; use sequence, docum"),
        (
            "global_batch",
            r"routing\.router\.pool is global_batch, but a pool must be at hand as a whole .*; use sequen",
        ),
        ("window", r"pool is window, but .* keep another router even over window by a balancer with that scope"),
    ],
)
def test_a_pool_that_is_not_at_hand_is_refused(pool: str, message: str):
    with pytest.raises(ValidationError, match=message):
        PoolRouterConfig(name="any", pool=pool)
