"""Fresh random experts for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.learned import select_top_k, uniform
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, Router, RouterConfig
from moe_testbed.routing.routers.parts.hashing import uniform_from_keys


class RandomConfig(RouterConfig):
    """Options of ``random``."""

    name: str = "random"

    @property
    def provides(self) -> frozenset[Capability]:
        """A draw has none."""
        return frozenset()

    @property
    def learned(self) -> bool:
        """Nothing is learned."""
        return False


@ROUTERS.register("random")
class Random(Router):
    """K different experts drawn uniformly for every token, ``g = 1/k``: the control without any information.

    The draw is a function of (seed, layer, sequence, position). A sequence's number never comes twice in training, so
    every step is drawn afresh.

    Oracle: ``route_random`` in tests/routing/oracles.py.
    """

    Config = RandomConfig
    config: RandomConfig

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        experts_E = torch.arange(self.setting.num_experts, device=x_TM.device)
        sequence_T1, position_T1 = context.sequence_T[:, None], context.position_BL.reshape(-1, 1)
        # The key that differs within a token comes last: the others are hashed once per token and not per expert.
        draws_TE = uniform_from_keys(self.setting.seed, self.setting.layer, sequence_T1, position_T1, experts_E)
        expert_ids_TK = select_top_k(draws_TE, self.setting.top_k)
        return RoutingDecision(expert_ids_TK, uniform(expert_ids_TK))
