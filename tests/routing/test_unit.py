"""What routers see of a unit, against a loop over tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.load import token_sets
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.scopes import Scope
from moe_testbed.routing.unit import Input, Pooling, RouterInput, Unit, pooled
from tests.routing.cases import HIDDEN, make_context, make_router

B, L = 3, 8


def packed_context() -> RoutingContext:
    """Documents of uneven length; one comes twice in a sequence, one stands in two sequences."""
    document_BL = torch.tensor([[4, 4, 4, 9, 9, 4, 4, 2], [2, 2, 2, 2, 2, 2, 2, 2], [7, 1, 1, 1, 3, 3, 3, 3]])
    return replace(make_context(B, L), document_BL=document_BL)


def units_of(context: RoutingContext, unit: str) -> list[list[int]]:
    """Tokens of every unit, in order."""
    units: dict[tuple[int, int], list[int]] = {}
    assert context.document_BL is not None
    for b in range(B):
        for position in range(L):
            document = int(context.document_BL[b, position]) if unit == "document" else 0
            units.setdefault((b, document), []).append(b * L + position)
    return list(units.values())


def naive(x_TM: Tensor, units: list[list[int]], pool: str, m: int) -> Tensor:
    rows: dict[int, Tensor] = {}
    for tokens in units:
        for place, token in enumerate(tokens):
            last = {"prefix_mean": place + 1, "first_m": min(place + 1, m), "full_mean": len(tokens)}[pool]
            rows[token] = sum(x_TM[t] for t in tokens[:last]) / last  # type: ignore[assignment]
    return torch.stack([rows[token] for token in range(len(x_TM))])


@pytest.mark.parametrize("pool", ["prefix_mean", "first_m", "full_mean"])
@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_pools_are_means_over_tokens(unit: str, pool: str, dtype: torch.dtype, tolerance: float):
    context = packed_context()
    x_TM = torch.randn(B * L, HIDDEN, dtype=dtype, requires_grad=True)
    seen_TM = pooled(x_TM, token_sets(Scope(unit), context), Pooling(pool), 2)
    expected_TM = naive(x_TM, units_of(context, unit), pool, 2)
    torch.testing.assert_close(seen_TM, expected_TM, rtol=tolerance, atol=tolerance)
    upstream_TM = torch.randn(seen_TM.shape, dtype=dtype)
    actual, wanted = (torch.autograd.grad((y * upstream_TM).sum(), x_TM)[0] for y in (seen_TM, expected_TM))
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pool", list(Pooling))
@pytest.mark.parametrize("unit", [Unit.SEQUENCE, Unit.DOCUMENT])
def test_only_the_full_mean_sees_later_tokens(unit: Unit, pool: Pooling):
    context, shown = packed_context(), RouterInput(unit, pool, 3, Input.HIDDEN_STATES, HIDDEN, 4)
    x_TM = torch.randn(B * L, HIDDEN)
    before_TM, _ = shown(x_TM, context)
    position = 5
    later_T = (torch.arange(L) >= position).repeat(B)
    after_TM, _ = shown(torch.where(later_T[:, None], -x_TM, x_TM), context)
    assert torch.equal(before_TM[~later_T], after_TM[~later_T]) == (pool is not Pooling.FULL_MEAN)
    config = RoutingConfig.model_validate({"router": {"name": "top_k"}, "unit": unit.value, "pooling": pool.value})
    assert config.causal == (pool is not Pooling.FULL_MEAN)


@pytest.mark.parametrize("name", ["top_k", "hash", "random", "reference"])
@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_a_unit_is_routed_as_a_whole(unit: str, name: str):
    """By what the first token tells, where the router reads ids, labels or positions."""
    context = packed_context()
    shown = RouterInput(Unit(unit), Pooling.FULL_MEAN, 1, Input.HIDDEN_STATES, HIDDEN, 4)
    router = make_router((name, {}))
    x_TM, unit_context = shown(torch.randn(B * L, HIDDEN), context)
    ids_TK = router(x_TM, unit_context).expert_ids_TK
    plain_TK = router(x_TM, context).expert_ids_TK
    for tokens in units_of(context, unit):
        assert (ids_TK[tokens] == ids_TK[tokens[0]]).all()
        assert torch.equal(ids_TK[tokens[0]], plain_TK[tokens[0]])


def test_language_guided_input_is_the_labels_row():
    context = packed_context()
    shown = RouterInput(Unit.TOKEN, Pooling.PREFIX_MEAN, 1, Input.DOMAIN_EMBEDDING, HIDDEN, 4)
    x_TM, _ = shown(torch.randn(B * L, HIDDEN), context)
    assert shown.domain_embedding is not None
    for row, label in zip(x_TM, context.domain_BL.flatten().tolist(), strict=True):
        assert torch.equal(row, shown.domain_embedding[label])
    x_TM.sum().backward()
    counts = torch.bincount(context.domain_BL.flatten(), minlength=4).float()
    assert shown.domain_embedding.grad is not None
    torch.testing.assert_close(shown.domain_embedding.grad, counts[:, None].expand(4, HIDDEN))


def test_tokens_as_units_are_left_alone():
    context, x_TM = packed_context(), torch.randn(B * L, HIDDEN)
    shown = RouterInput(Unit.TOKEN, Pooling.FULL_MEAN, 1, Input.HIDDEN_STATES, HIDDEN, 4)
    assert shown(x_TM, context) == (x_TM, context)


def test_documents_are_needed_for_units_of_them():
    shown = RouterInput(Unit.DOCUMENT, Pooling.FULL_MEAN, 1, Input.HIDDEN_STATES, HIDDEN, 4)
    with pytest.raises(ValueError, match="scope document needs the number of every token's document"):
        shown(torch.randn(B * L, HIDDEN), replace(packed_context(), document_BL=None))


@pytest.mark.parametrize("pool", list(Pooling))
def test_what_padding_holds_is_seen_by_no_other_token(pool: Pooling):
    valid_BL = torch.arange(L) < torch.tensor([8, 5, 2])[:, None]
    context, valid_T = replace(packed_context(), valid_BL=valid_BL), valid_BL.flatten()
    shown = RouterInput(Unit.SEQUENCE, pool, 3, Input.HIDDEN_STATES, HIDDEN, 4)
    x_TM = torch.randn(B * L, HIDDEN)
    seen_TM, _ = shown(x_TM, context)
    other_TM, _ = shown(torch.where(valid_T[:, None], x_TM, 9.0), context)
    assert torch.equal(seen_TM[valid_T], other_TM[valid_T])
    if pool is Pooling.FULL_MEAN:
        torch.testing.assert_close(seen_TM[L], x_TM[L : L + 5].mean(0))
