"""Both dispatch paths of the MoE layer, against each other and against loops."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.deepspeed_moe import DecisionGate, RoutedMoE
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision

B, L, D, E = 2, 7, 8, 4
T = B * L


def make_layer(dispatch: Literal["dropless", "capacity"], top_k: int, capacity_factor: float = E) -> RoutedMoE:
    """The same experts for both paths; by default the capacity is K * T, which nothing overflows."""
    config = MoEConfig(
        num_experts=E, top_k=top_k, expert_hidden_size=8, dispatch=dispatch, capacity_factor=capacity_factor
    )
    layer = RoutedMoE(D, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer


def random_decision(top_k: int, unused_share: float = 0.0, preferred: int | None = None) -> RoutingDecision:
    """Different experts for each token; ``preferred`` is more likely than the others."""
    scores_TE = torch.rand(T, E)
    if preferred is not None:
        scores_TE[:, preferred] += 0.5
    ids_TK = scores_TE.argsort(dim=1, descending=True)[:, :top_k]
    ids_TK = ids_TK.masked_fill(torch.rand(T, top_k) < unused_share, NO_EXPERT)
    return RoutingDecision(ids_TK, torch.rand(T, top_k, requires_grad=True))


def naive_layer(layer: RoutedMoE, x_TD: Tensor, decision: RoutingDecision, kept_TK: Tensor) -> Tensor:
    """``y_t = sum_k g_tk FFN_{id_tk}(x_t)`` over the assignments kept, one token at a time."""
    experts = layer.deepspeed_moe.experts
    assert isinstance(experts, GroupedExperts)
    outputs = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros(D)
        for k in range(kept_TK.shape[1]):
            if kept_TK[t, k]:
                e = int(decision.expert_ids_TK[t, k])
                gate_F, up_F = (x_D @ experts.gate_up[e]).chunk(2)
                hidden_F = F.silu(gate_F) * up_F
                y_D = y_D + decision.weights_TK[t, k] * (hidden_F @ experts.down[e])
        outputs.append(y_D)
    return torch.stack(outputs)


def naive_kept(ids_TK: Tensor, capacity: int) -> Tensor:
    """GShard, algorithm 1: all first choices in the order of the tokens, then all second ones."""
    used = [0] * E
    kept_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    for k in range(ids_TK.shape[1]):
        for t in range(ids_TK.shape[0]):
            expert = int(ids_TK[t, k])
            if expert != NO_EXPERT and used[expert] < capacity:
                used[expert] += 1
                kept_TK[t, k] = True
    return kept_TK


def gradients(layer: RoutedMoE, output: Tensor, x: Tensor, decision: RoutingDecision) -> list[Tensor]:
    inputs = [x, decision.weights_TK, *layer.parameters()]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    return [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(
            inputs, torch.autograd.grad(output, inputs, upstream, allow_unused=True), strict=True
        )
    ]


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3), (2, 1.0)])
def test_without_overflow_outputs_and_gradients_equal_a_loop(
    dispatch: Literal["dropless", "capacity"], top_k: int, unused_share: float
) -> None:
    layer, decision = make_layer(dispatch, top_k), random_decision(top_k, unused_share)
    x_BLD = torch.randn(B, L, D, requires_grad=True)
    mine_BLD, kept_TK = layer(x_BLD, decision)
    assert torch.equal(kept_TK, decision.expert_ids_TK != NO_EXPERT)
    oracle_BLD = naive_layer(layer, x_BLD.reshape(T, D), decision, kept_TK).view(B, L, D)
    torch.testing.assert_close(mine_BLD, oracle_BLD)
    if not bool(kept_TK.any()):
        return
    for mine, oracle in zip(
        gradients(layer, mine_BLD, x_BLD, decision), gradients(layer, oracle_BLD, x_BLD, decision), strict=True
    ):
        torch.testing.assert_close(mine, oracle)


@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_capacity_path_equals_dropless_path(top_k: int, unused_share: float) -> None:
    decision = random_decision(top_k, unused_share)
    x_BLD = torch.randn(B, L, D, requires_grad=True)
    results = []
    for dispatch in ("dropless", "capacity"):
        layer = make_layer(dispatch, top_k)
        output, kept_TK = layer(x_BLD, decision)
        results.append([output, kept_TK, *gradients(layer, output, x_BLD, decision)])
    for dropless, capacity in zip(*results, strict=True):
        torch.testing.assert_close(dropless, capacity)


@pytest.mark.parametrize("capacity_factor", [0.1, 0.5, 1.0, 1.25])
@pytest.mark.parametrize(("top_k", "unused_share"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_capacity_drops_what_gshard_drops(capacity_factor: float, top_k: int, unused_share: float) -> None:
    layer = make_layer("capacity", top_k, capacity_factor)
    decision = random_decision(top_k, unused_share, preferred=2)
    oracle_TK = naive_kept(decision.expert_ids_TK, max(1, math.ceil(capacity_factor * top_k * T / E)))
    x_BLD = torch.randn(B, L, D, requires_grad=True)
    output_BLD, kept_TK = layer(x_BLD, decision)
    assert torch.equal(kept_TK, oracle_TK)
    oracle_BLD = naive_layer(layer, x_BLD.reshape(T, D), decision, oracle_TK).view(B, L, D)
    torch.testing.assert_close(output_BLD, oracle_BLD)
    for mine, oracle in zip(
        gradients(layer, output_BLD, x_BLD, decision), gradients(layer, oracle_BLD, x_BLD, decision), strict=True
    ):
        torch.testing.assert_close(mine, oracle)


def test_first_choices_have_precedence_over_second_ones() -> None:
    # Token 0's second choice comes before token 1's first one in the batch, but not in rank.
    ids_TK = torch.tensor([[0, 1], [1, 0]])
    gate = DecisionGate(num_experts=E, top_k=2, capacity_factor=0.5)
    kept_TK, capacity, *_ = gate(torch.zeros(2, D), RoutingDecision(ids_TK, torch.ones(2, 2)), True, False)
    assert capacity == 1
    assert kept_TK.tolist() == [[True, False], [True, False]]


def test_dropless_keeps_all_even_on_one_expert() -> None:
    layer = make_layer("dropless", 1, capacity_factor=0.1)
    decision = RoutingDecision(torch.full((T, 1), 3), torch.ones(T, 1))
    output_BLD, kept_TK = layer(torch.randn(B, L, D), decision)
    assert bool(kept_TK.all())
    assert bool(output_BLD.abs().sum(-1).gt(0).all())


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_bfloat16_is_close_to_float32(dispatch: Literal["dropless", "capacity"]) -> None:
    layer, decision = make_layer(dispatch, 2), random_decision(2)
    x_BLD = torch.randn(B, L, D)
    exact_BLD, _ = layer(x_BLD, decision)
    rounded_BLD, _ = layer.bfloat16()(x_BLD.bfloat16(), decision)
    assert rounded_BLD.dtype == torch.bfloat16
    # Eight bits of mantissa through three products.
    torch.testing.assert_close(rounded_BLD.float(), exact_BLD, rtol=0.05, atol=0.05)
