"""As many open gates as wanted, evenly spread."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    CompletedStep,
    RoutedBatch,
    ScopedBalancerConfig,
    carried,
)
from moe_testbed.routing.router import Capability


class L1SparsityConfig(ScopedBalancerConfig):
    """Options of ``l1_sparsity``."""

    name: str = "l1_sparsity"
    coefficient: float = Field(1e-8, gt=0, description="factor of the loss of each layer in the first step; it adapts")
    growth: float = Field(1.2, gt=1, description="alpha: what the factor is multiplied or divided by in each step")
    sparsity: Literal["model", "layer"] = Field(
        "model", description="reach the wanted number of experts on average over the layers, or in each of them"
    )

    @property
    def needs(self) -> frozenset[Capability]:
        """Only gates that are the positive part of a score close when it falls."""
        return frozenset({Capability.SCORES, Capability.RELU_GATES})


@BALANCERS.register("l1_sparsity")
class L1Sparsity(Balancer):
    """``L = lambda * E * sum_G share_G * sum_i sg(f_i^G) * mean_{t in G} relu(z_{t,i})`` with ``f_i^G`` expert i's
    share of the assignments in balance set G: an L1 penalty that weighs most on the experts used most.

    After each step ``lambda <- lambda * alpha^sign((1 - K / E) - S)`` with S the share of closed gates, so that K gates
    per token are open in the end. Source: ReMoE (arXiv 2412.14711, sections 3.3 and 3.4: lambda starts at 1e-8,
    alpha = 1.2, S is averaged over the layers). ReMoE divides the counts by K T instead of by their sum, which is the
    same once K gates are open. L is at least 0, and 0 only when all gates are closed.

    The value that is logged includes lambda.
    """

    Config = L1SparsityConfig
    config: L1SparsityConfig
    factor_Y: Tensor

    def __init__(self, config: L1SparsityConfig, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, num_layers, num_experts, top_k)
        self.register_buffer("factor_Y", torch.full((num_layers,), config.coefficient))

    def coefficient(self, step: int) -> float:
        """The factor is one of each layer, and in the loss."""
        return 1.0

    def loss(self, batch: RoutedBatch) -> Tensor:
        sets, valid_T = batch.sets(self.config.scope), batch.context.valid_T
        logits = carried(decision.logits_TE for decision in batch.decisions)
        penalties = []
        for logits_TE, load in zip(logits, batch.loads(self.config), strict=True):
            gates_GE = sets.mean(logits_TE.relu(), valid_T)
            penalties.append(self.num_experts * (load.share_G @ (load.fractions_GE * gates_GE).sum(-1)))
        return (self.factor_Y * torch.stack(penalties)).mean()

    def finish_step(self, step: CompletedStep) -> None:
        # More open gates than K per token: the sign of (1 - K / E) - S without rounding.
        excess_Y = step.counts_YE.sum(-1) - self.top_k * step.tokens
        if self.config.sparsity == "model":
            excess_Y = excess_Y.sum().expand_as(excess_Y)
        factor_Y = self.factor_Y * self.config.growth ** excess_Y.sign()
        # What has become 0 or infinite could not come back.
        limits = torch.finfo(factor_Y.dtype)
        self.factor_Y.copy_(factor_Y.clamp(limits.tiny, limits.max))
