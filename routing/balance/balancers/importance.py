"""Every expert's output counts as much in the end."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.balance.balancer import BALANCERS, RoutedBatch, Schedule
from moe_testbed.routing.balance.means import MeansBalancer, MeansBalancerConfig
from moe_testbed.routing.records import RoutingDecision


class ImportanceConfig(MeansBalancerConfig):
    """Options of ``importance``."""

    name: str = "importance"
    coefficient: Schedule = 0.1


def squared_variation(values_XE: Tensor) -> Tensor:
    """``CV^2 = var_i(v_i) / mean_i(v_i)^2`` of each row: 0 when all are equal, E - 1 when all is one expert's. Float32
    [X].

    The variance is used as such: the standard deviation has no gradient where all are equal.
    """
    mean_X1 = values_XE.mean(-1, keepdim=True)
    return ((values_XE - mean_X1) / mean_X1.clamp(min=torch.finfo(values_XE.dtype).tiny)).square().mean(-1)


def gates(decision: RoutingDecision, num_experts: int) -> Tensor:
    """Each expert's weight in each token's output, 0 where it is not chosen. Float32 [T, E], differentiable."""
    weights_TK = decision.weights_TK
    zeros_TE = weights_TK.new_zeros(len(weights_TK), num_experts)
    # Where there is no expert, expert 0 gets the weight 0.
    return zeros_TE.scatter_add(1, decision.expert_ids_TK.clamp(min=0), weights_TK)


@BALANCERS.register("importance")
class Importance(MeansBalancer):
    """``L = sum_G share_G * CV^2(I_G)`` with ``I_{G,i}`` the sum of expert i's :func:`gates` over the tokens of balance
    set G (Shazeer et al., arXiv 1701.06538, equations 6-7, with weight 0.1).

    From 0 (all experts weigh the same) to E - 1 (one expert weighs all). The mean over the set's tokens stands for the
    sum, which changes no CV.
    """

    Config = ImportanceConfig
    config: ImportanceConfig

    def token_values(self, batch: RoutedBatch) -> list[Tensor]:
        return [gates(decision, self.num_experts) for decision in batch.decisions]

    def loss_of_means(self, means_YGX: Tensor) -> Tensor:
        return squared_variation(means_YGX)
