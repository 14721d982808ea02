"""Routing scores that differ from token to token."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.balance.balancer import BALANCERS, RoutedBatch, Schedule, carried
from moe_testbed.routing.balance.means import MeansBalancer, MeansBalancerConfig


class VarianceConfig(MeansBalancerConfig):
    """Options of ``variance``."""

    name: str = "variance"
    coefficient: Schedule = 1e-3


@BALANCERS.register("variance")
class Variance(MeansBalancer):
    """``L = -sum_G share_G * E / (E - 1) * sum_i var_{t in G}(p_{t,i})``, the variance of each expert's routing
    probability over the tokens of balance set G (Guo et al., arXiv 2505.22323, the variance loss).

    From -1 (every token decided, every set spread evenly) to 0 (all tokens of a set alike; always so in scope
    ``token``). The paper's is the sum without the factor, which here makes the range the same for every E.
    """

    Config = VarianceConfig
    config: VarianceConfig

    def token_values(self, batch: RoutedBatch) -> list[Tensor]:
        # Around 1/E, where the probabilities start: squares of small numbers lose no digits when they are subtracted.
        centred = [
            p_TE - 1.0 / self.num_experts for p_TE in carried(decision.probabilities_TE for decision in batch.decisions)
        ]
        return [torch.cat([p_TE.square(), p_TE], dim=1) for p_TE in centred]

    def loss_of_means(self, means_YGX: Tensor) -> Tensor:
        squares_YGE, means_YGE = means_YGX.chunk(2, dim=-1)
        variances_YGE = squares_YGE - means_YGE.square()
        return -variances_YGE.sum(-1) * self.num_experts / max(self.num_experts - 1, 1)
