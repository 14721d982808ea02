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

E, K, D, L = 4, 2, 8, 10


def run_layer(dispatch: str, ids_RTK: Tensor) -> dict[str, Tensor]:
    """This rank's share of the tokens through its share of the experts: output and gradients of ``sum(output * c)``."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    create_expert_parallel_groups(ranks)
    config = MoEConfig.model_validate(
        {"num_experts": E, "top_k": K, "expert_hidden_size": 8, "dispatch": dispatch, "capacity_factor": E}
    )
    layer = RoutedMoE(D, config, expert_parallel_size=ranks)
    layer.set_deepspeed_parallelism()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            whole = torch.randn(E, *parameter.shape[1:], generator=generator)
            parameter.copy_(whole[layer.first_expert : layer.first_expert + layer.num_local_experts])
    x_RLD, upstream_RLD = torch.randn(2, 2, L, D, generator=generator)
    weights_RLK = torch.rand(2, L, K, generator=generator)
    mine = slice(rank * 2 // ranks, (rank + 1) * 2 // ranks)
    x_BLD = x_RLD[mine].requires_grad_()
    weights_TK = weights_RLK[mine].flatten(0, 1).requires_grad_()
    output_BLD, _ = layer(x_BLD, RoutingDecision(ids_RTK[mine].flatten(0, 1), weights_TK))
    output_BLD.backward(upstream_RLD[mine])
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x_BLD.grad is not None and weights_TK.grad is not None
    return {"output": output_BLD.detach(), "x": x_BLD.grad, "weights": weights_TK.grad} | gradients


def random_ids() -> Tensor:
    return torch.rand(2, L, E, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :K]


def ids_on(*experts: int) -> Tensor:
    return torch.tensor(experts).expand(2, L, K).contiguous()


def some_unused() -> Tensor:
    ids_RTK = random_ids()
    ids_RTK[0, ::2, 1] = NO_EXPERT
    ids_RTK[1] = NO_EXPERT
    return ids_RTK


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(
    "ids_RTK",
    [random_ids(), ids_on(0, 1), ids_on(3, 2), some_unused()],
    ids=["random", "all on rank 0", "all on rank 1", "some unused"],
)
def test_two_ranks_equal_one_process(dispatch: str, ids_RTK: Tensor, run_on_ranks: Callable[..., list[Any]]) -> None:
    (oracle,) = run_on_ranks(run_layer, 1, dispatch, ids_RTK)
    ranks = run_on_ranks(run_layer, 2, dispatch, ids_RTK)
    # Tokens are split over the ranks, and so are experts: both lie along the first dimension.
    for name, expected in oracle.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected)
