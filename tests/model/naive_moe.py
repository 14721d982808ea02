"""A small MoE layer, decisions for it, and what both should give: one token and one choice at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.deepspeed_moe import RoutedMoE
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.model.moe import MoELayer
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision

B, L, M, E = 2, 7, 8, 4
T = B * L

Dispatch = Literal["dropless", "capacity"]
DISPATCHES: tuple[Dispatch, ...] = ("dropless", "capacity")


def make_layer(
    dispatch: Dispatch,
    top_k: int,
    capacity_factor: float = E,
    keep_outputs: bool = False,
    layer_class: type[MoELayer] = RoutedMoE,
    **options: Any,
) -> MoELayer:
    """The same experts for both paths; by default the capacity is K * T, which nothing overflows where tokens make at
    most K choices."""
    config = MoEConfig(
        num_experts=E,
        top_k=top_k,
        expert_hidden_size=8,
        dispatch=dispatch,
        capacity_factor=capacity_factor,
        **options,
    )
    layer = layer_class(M, config, keep_outputs=keep_outputs)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer


def random_decision(
    top_k: int, unused_share: float = 0.0, preferred: int | None = None, num_experts: int = E
) -> RoutingDecision:
    """Different experts for each token; ``preferred`` is more likely than the others."""
    scores_TE = torch.rand(T, num_experts)
    if preferred is not None:
        scores_TE[:, preferred] += 0.5
    ids_TK = scores_TE.argsort(dim=1, descending=True)[:, :top_k]
    ids_TK = ids_TK.masked_fill(torch.rand(T, top_k) < unused_share, NO_EXPERT)
    return decision_of(ids_TK)


def decision_of(ids_TK: Tensor) -> RoutingDecision:
    """Random weights, 0 where there is no expert."""
    weights_TK = torch.rand(ids_TK.shape).masked_fill(ids_TK == NO_EXPERT, 0.0)
    return RoutingDecision(ids_TK, weights_TK.requires_grad_())


def naive_expert(layer: MoELayer, number: int, x_M: Tensor) -> Tensor:
    """The output of one expert for one token, unweighted."""
    experts = layer.deepspeed_moe.experts
    assert isinstance(experts, GroupedExperts)
    if number < E:
        gate_F, up_F = (x_M @ experts.gate_up[number]).chunk(2)
        return (F.silu(gate_F) * up_F) @ experts.down[number]
    free = layer.zero_computation
    assert free is not None
    number -= E
    if number < free.num_zero:
        return torch.zeros(M)
    number -= free.num_zero
    if number < free.num_copy:
        return x_M
    number -= free.num_copy
    a1, a2 = (free.mixing[2 * number : 2 * number + 2] @ x_M).softmax(0)
    return a1 * x_M + a2 * free.vectors[number]


def naive_outputs(layer: MoELayer, x_TM: Tensor, decision: RoutingDecision, kept_TK: Tensor) -> Tensor:
    """``g_tk E_{id_tk}(x_t)`` where the assignment is kept, else 0, [T, K, M]; their sum over k is the layer's
    output."""
    choices = []
    for t, x_M in enumerate(x_TM):
        for k in range(kept_TK.shape[1]):
            output_M = torch.zeros(M)
            if kept_TK[t, k]:
                output_M = decision.weights_TK[t, k] * naive_expert(layer, int(decision.expert_ids_TK[t, k]), x_M)
            choices.append(output_M)
    return torch.stack(choices).view(*kept_TK.shape, M)


def naive_kept(ids_TK: Tensor, capacity: int) -> Tensor:
    """GShard, algorithm 1: all first choices in the order of the tokens, then all second ones. Zero-computation experts
    have room for everything."""
    used = [0] * E
    kept_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    for k in range(ids_TK.shape[1]):
        for t in range(ids_TK.shape[0]):
            expert = int(ids_TK[t, k])
            if expert >= E:
                kept_TK[t, k] = True
            elif expert != NO_EXPERT and used[expert] < capacity:
                used[expert] += 1
                kept_TK[t, k] = True
    return kept_TK


def gradients(layer: MoELayer, output: Tensor, x: Tensor, decision: RoutingDecision) -> list[Tensor]:
    """Of a fixed random sum over the output; 0 for what it does not depend on."""
    inputs = [x, decision.weights_TK, *layer.parameters()]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    if not output.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    return list(
        torch.autograd.grad(output, inputs, upstream, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


def assert_equals_a_loop(layer: MoELayer, decision: RoutingDecision, kept_TK: Tensor) -> None:
    """Output, mask and all gradients, and the summands if the layer keeps them."""
    x_BLM = torch.randn(B, L, M, requires_grad=True)
    output = layer(x_BLM, decision)
    assert torch.equal(output.kept_TK, kept_TK)
    oracle_TKM = naive_outputs(layer, x_BLM.reshape(T, M), decision, kept_TK)
    results = [(output.hidden_BLM, oracle_TKM.sum(1).view(B, L, M))]
    if output.outputs_TKM is not None:
        results.append((output.outputs_TKM, oracle_TKM))
    for mine, oracle in results:
        torch.testing.assert_close(mine, oracle)
        pairs = zip(gradients(layer, mine, x_BLM, decision), gradients(layer, oracle, x_BLM, decision), strict=True)
        for mine_gradient, oracle_gradient in pairs:
            torch.testing.assert_close(mine_gradient, oracle_gradient)
