"""A fixed table from token id to experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import uniform
from moe_testbed.routing.records import RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, Router, RouterConfig
from moe_testbed.routing.routers.parts.hashing import balanced_table, modulo_table


class HashConfig(RouterConfig):
    """Options of ``hash``."""

    name: str = "hash"
    table: Literal["balanced", "modulo"] = Field(
        "balanced", description="balanced: even load over the training mix; modulo: by the id's remainder"
    )

    @property
    def provides(self) -> frozenset[Capability]:
        """A table has none."""
        return frozenset()

    @property
    def learned(self) -> bool:
        """Nothing is learned."""
        return False


@ROUTERS.register("hash")
class Hash(Router):
    """``S = table[token id]``, ``g = 1/k``: a control that knows the token and nothing of its domain (Hash Layers,
    arXiv 2106.04426).

    Oracle: ``route_hash`` in tests/routing/oracles.py.
    """

    Config = HashConfig
    config: HashConfig
    table_VK: Tensor

    def __init__(self, config: HashConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        seed = setting.seed * 1_000 + setting.layer
        if config.table == "balanced":
            table_VK = balanced_table(setting.token_weights_V, setting.num_experts, setting.top_k, seed)
        else:
            table_VK = modulo_table(setting.vocab_size, setting.num_experts, setting.top_k, seed)
        self.register_buffer("table_VK", table_VK, persistent=False)

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        expert_ids_TK = self.table_VK[context.token_ids_BL.reshape(-1)]
        return RoutingDecision(expert_ids_TK, uniform(expert_ids_TK))
