"""Both dispatch paths of the MoE layer, against each other and against loops."""

from __future__ import annotations

import math

import pytest
import torch

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.deepspeed_moe import DecisionGate, RoutedMoE
from moe_testbed.model.moe import MoELayer
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision
from tests.model.naive_moe import (
    DISPATCHES,
    B,
    Dispatch,
    E,
    L,
    M,
    T,
    assert_equals_a_loop,
    decision_of,
    gradients,
    make_layer,
    naive_kept,
    random_decision,
)

every_dispatch = pytest.mark.parametrize("dispatch", DISPATCHES)


@every_dispatch
@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3), (2, 1.0)])
def test_without_overflow_outputs_and_gradients_equal_a_loop(
    dispatch: Dispatch, top_k: int, unused_share: float
) -> None:
    decision = random_decision(top_k, unused_share)
    assert_equals_a_loop(make_layer(dispatch, top_k), decision, decision.expert_ids_TK != NO_EXPERT)


@every_dispatch
@pytest.mark.parametrize("widest", [1, 3, 4, 11])
def test_tokens_use_any_number_of_experts(dispatch: Dispatch, widest: int) -> None:
    """Built for two choices; the decision has up to four, in a table that may be much wider, and some tokens none."""
    number_T = torch.arange(T) % (min(widest, E) + 1)
    ids_TK = torch.full((T, widest), NO_EXPERT)
    for t, number in enumerate(number_T.tolist()):
        ids_TK[t, torch.randperm(widest)[:number]] = torch.randperm(E)[:number]
    layer = make_layer(dispatch, top_k=2, capacity_factor=2 * E)
    assert_equals_a_loop(layer, decision_of(ids_TK), ids_TK != NO_EXPERT)


@pytest.mark.parametrize("capacity_factor", [0.1, 1.0])
def test_capacity_counts_the_configured_choices_where_tokens_make_others(capacity_factor: float) -> None:
    decision = random_decision(4, unused_share=0.3, preferred=2)
    kept_TK = naive_kept(decision.expert_ids_TK, max(1, math.ceil(capacity_factor * 2 * T / E)))
    assert not torch.equal(kept_TK, decision.expert_ids_TK != NO_EXPERT)
    assert_equals_a_loop(make_layer("capacity", 2, capacity_factor), decision, kept_TK)


@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_capacity_path_equals_dropless_path(top_k: int, unused_share: float) -> None:
    decision = random_decision(top_k, unused_share)
    x_BLM = torch.randn(B, L, M, requires_grad=True)
    results = []
    for dispatch in DISPATCHES:
        layer = make_layer(dispatch, top_k)
        output = layer(x_BLM, decision)
        results.append([output.hidden_BLM, output.kept_TK, *gradients(layer, output.hidden_BLM, x_BLM, decision)])
    for dropless, capacity in zip(*results, strict=True):
        torch.testing.assert_close(dropless, capacity)


@pytest.mark.parametrize("capacity_factor", [0.1, 0.5, 1.0, 1.25])
@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_capacity_drops_what_gshard_drops(capacity_factor: float, top_k: int, unused_share: float) -> None:
    decision = random_decision(top_k, unused_share, preferred=2)
    kept_TK = naive_kept(decision.expert_ids_TK, max(1, math.ceil(capacity_factor * top_k * T / E)))
    assert_equals_a_loop(make_layer("capacity", top_k, capacity_factor), decision, kept_TK)


def test_first_choices_have_precedence_over_second_ones() -> None:
    # Token 0's second choice comes before token 1's first one in the batch, but not in rank.
    ids_TK = torch.tensor([[0, 1], [1, 0]])
    gate = DecisionGate(MoEConfig(num_experts=E, top_k=2, expert_hidden_size=8, capacity_factor=0.5))
    kept_TK, capacity, *_ = gate(torch.zeros(2, M), RoutingDecision(ids_TK, torch.ones(2, 2)), True, False)
    assert capacity == 1
    assert kept_TK.tolist() == [[True, False], [True, False]]


def test_a_split_expert_is_as_many_narrow_ones() -> None:
    """Each expert of width 16 becomes two of width 8; a token that uses both halves with one weight uses the whole."""
    x_BLM, ids_TK, weights_TK = torch.randn(B, L, M), torch.randint(E, (T, 1)), torch.rand(T, 1)
    whole, split = (
        RoutedMoE(M, MoEConfig(num_experts=E, top_k=1, expert_hidden_size=16, split=split)) for split in (1, 2)
    )
    mine, parts = whole.deepspeed_moe.experts, split.deepspeed_moe.experts
    assert split.num_local_experts == 2 * E and parts.down.shape == (2 * E, 8, M)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.normal_(std=0.4)
        gate_EMF, up_EMF = mine.gate_up.chunk(2, dim=-1)
        for half in (0, 1):
            width = slice(8 * half, 8 * half + 8)
            parts.gate_up[half::2] = torch.cat([gate_EMF[..., width], up_EMF[..., width]], dim=-1)
            parts.down[half::2] = mine.down[:, width]
    expected = whole(x_BLM, RoutingDecision(ids_TK, weights_TK)).hidden_BLM
    both_TK = torch.cat([2 * ids_TK, 2 * ids_TK + 1], dim=1)
    actual = split(x_BLM, RoutingDecision(both_TK, weights_TK.expand(T, 2))).hidden_BLM
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("width", "unused_share"), [(1, 0.0), (2, 0.3), (4, 0.3), (2, 1.0)])
def test_kept_outputs_are_the_summands(width: int, unused_share: float) -> None:
    decision = random_decision(width, unused_share)
    layer = make_layer("dropless", 2, keep_outputs=True)
    assert_equals_a_loop(layer, decision, decision.expert_ids_TK != NO_EXPERT)


def test_outputs_are_not_kept_unless_asked_for_and_never_with_a_capacity() -> None:
    assert make_layer("dropless", 2)(torch.randn(B, L, M), random_decision(2)).outputs_TKM is None
    with pytest.raises(ValueError, match=r"set model\.moe\.dispatch to dropless"):
        make_layer("capacity", 2, keep_outputs=True)


def test_dropless_keeps_all_even_on_one_expert() -> None:
    layer = make_layer("dropless", 1, capacity_factor=0.1)
    output = layer(torch.randn(B, L, M), RoutingDecision(torch.full((T, 1), 3), torch.ones(T, 1)))
    assert bool(output.kept_TK.all())
    assert bool(output.hidden_BLM.abs().sum(-1).gt(0).all())


@every_dispatch
def test_bfloat16_is_close_to_float32(dispatch: Dispatch) -> None:
    layer, decision = make_layer(dispatch, 2, num_copy_experts=1, num_constant_experts=1), random_decision(2, 0, 5, 6)
    x_BLM = torch.randn(B, L, M)
    exact_BLM = layer(x_BLM, decision).hidden_BLM
    rounded_BLM = layer.bfloat16()(x_BLM.bfloat16(), decision).hidden_BLM
    assert rounded_BLM.dtype == torch.bfloat16
    # Eight bits of mantissa through three products.
    torch.testing.assert_close(rounded_BLM.float(), exact_BLM, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("zero_experts", [0, 2])
@every_dispatch
def test_the_layer_without_deepspeed_equals_a_loop_too(dispatch: Dispatch, zero_experts: int) -> None:
    """Half of what a slot each could hold: some assignments are dropped with capacity dispatch, none without."""
    layer = make_layer(
        dispatch, 2, capacity_factor=0.5, layer_class=MoELayer, num_copy_experts=zero_experts, num_constant_experts=1
    )
    decision = random_decision(2, unused_share=0.1, preferred=1, num_experts=E + zero_experts + 1)
    kept_TK = decision.expert_ids_TK != NO_EXPERT
    if dispatch == "capacity":
        capacity = math.ceil(0.5 * 2 * T / (E + zero_experts + 1))
        kept_TK = naive_kept(decision.expert_ids_TK, capacity)
        assert not torch.equal(kept_TK, decision.expert_ids_TK != NO_EXPERT)
    assert_equals_a_loop(layer, decision, kept_TK)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_layer_without_deepspeed_gives_the_same_bits(top_k: int) -> None:
    x_BLM, decision = torch.randn(B, L, M), random_decision(top_k, unused_share=0.2)
    ours, theirs = (make_layer("dropless", top_k, layer_class=cls)(x_BLM, decision) for cls in (MoELayer, RoutedMoE))
    assert torch.equal(ours.hidden_BLM, theirs.hidden_BLM)
