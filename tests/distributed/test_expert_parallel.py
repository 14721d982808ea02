"""The MoE layer with its experts on two ranks against the same layer in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.model.config import MoEConfig
from moe_testbed.model.deepspeed_moe import RoutedMoE, create_expert_parallel_groups
from moe_testbed.routing.records import NO_EXPERT, RoutingDecision

E, K, M, L = 4, 2, 8, 10


def run_layer(dispatch: str, ids_RTK: Tensor, forms: dict[str, int]) -> dict[str, Tensor]:
    """This rank's share of the tokens through its share of the experts: output and gradients of ``sum(output * c)``.

    Decisions are as wide as the widest choice of the rank's own tokens.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    create_expert_parallel_groups(ranks)
    config = MoEConfig.model_validate(
        {"num_experts": E, "top_k": K, "expert_hidden_size": 8, "dispatch": dispatch, "capacity_factor": 4 * E, **forms}
    )
    layer = RoutedMoE(M, config, expert_parallel_size=ranks)
    layer.set_deepspeed_parallelism()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("deepspeed_moe"):
                whole = torch.randn(E, *parameter.shape[1:], generator=generator)
                parameter.copy_(whole[layer.first_expert : layer.first_expert + layer.num_local_experts])
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x_RLM, upstream_RLM = torch.randn(2, 2, L, M, generator=generator)
    weights_RLK = torch.rand(ids_RTK.shape, generator=generator).masked_fill(ids_RTK == NO_EXPERT, 0.0)
    mine = slice(rank * 2 // ranks, (rank + 1) * 2 // ranks)
    x_BLM = x_RLM[mine].requires_grad_()
    weights_TK = weights_RLK[mine].flatten(0, 1).requires_grad_()
    ids_TK = ids_RTK[mine].flatten(0, 1)
    width = max(1, int((ids_TK != NO_EXPERT).any(0).sum()))
    output = layer(x_BLM, RoutingDecision(ids_TK[:, :width], weights_TK[:, :width]))
    output.hidden_BLM.backward(upstream_RLM[mine])
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x_BLM.grad is not None and weights_TK.grad is not None
    return {"output": output.hidden_BLM.detach(), "x": x_BLM.grad, "weights": weights_TK.grad} | gradients


def random_ids() -> Tensor:
    return torch.rand(2, L, E, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :K]


def ids_on(*experts: int) -> Tensor:
    return torch.tensor(experts).expand(2, L, K).contiguous()


def some_unused() -> Tensor:
    ids_RTK = random_ids()
    ids_RTK[0, ::2, 1] = NO_EXPERT
    ids_RTK[1] = NO_EXPERT
    return ids_RTK


def varying(num_experts: int) -> Tensor:
    """The first rank's tokens use up to three experts, the second's all of them, and some of either none."""
    ids_RTK = torch.full((2, L, num_experts), NO_EXPERT)
    generator = torch.Generator().manual_seed(2)
    for rank, widest in enumerate((3, num_experts)):
        for token in range(L):
            number = token % (widest + 1)
            ids_RTK[rank, token, :number] = torch.randperm(num_experts, generator=generator)[:number]
    return ids_RTK


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(
    "ids_RTK",
    [random_ids(), ids_on(0, 1), ids_on(3, 2), some_unused(), ids_on(NO_EXPERT, NO_EXPERT), varying(E)],
    ids=["random", "all on rank 0", "all on rank 1", "some unused", "none", "varying"],
)
def test_two_ranks_equal_one_process(dispatch: str, ids_RTK: Tensor, run_on_ranks: Callable[..., list[Any]]) -> None:
    (oracle,) = run_on_ranks(run_layer, 1, dispatch, ids_RTK, {})
    ranks = run_on_ranks(run_layer, 2, dispatch, ids_RTK, {})
    # Tokens are split over the ranks, and so are experts: both lie along the first dimension.
    for name, expected in oracle.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_zero_computation_experts_are_on_every_rank(dispatch: str, run_on_ranks: Callable[..., list[Any]]) -> None:
    forms = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
    ids_RTK = varying(E + 4)
    (oracle,) = run_on_ranks(run_layer, 1, dispatch, ids_RTK, forms)
    ranks = run_on_ranks(run_layer, 2, dispatch, ids_RTK, forms)
    for name, expected in oracle.items():
        parts = [rank[name] for rank in ranks]
        # The engine adds up the gradients of what all ranks hold.
        torch.testing.assert_close(sum(parts) if name.startswith("zero_computation") else torch.cat(parts), expected)
