"""The load-balancing loss in any scope."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    RoutedBatch,
    Schedule,
    ScopedBalancerConfig,
    mean_over_layers,
)
from moe_testbed.routing.load import Load


class LoadBalancingLossConfig(ScopedBalancerConfig):
    """Options of ``load_balancing_loss``."""

    name: str = "load_balancing_loss"
    coefficient: Schedule = 0.01


def load_balancing_loss(load: Load) -> Tensor:
    """``L = sum_G share_G * E * sum_i sg(f_i^G) P_i^G``: exactly 1 at perfect balance, whatever E and K.

    ``f_i^G`` is expert i's share of the assignments in balance set G, counted and without gradient, ``P_i^G`` the mean
    routing probability over the set's tokens, differentiable. Written with counts, ``f_i = C_i / (K T)`` and
    ``L = (E / K) sum_i (C_i / T) P_i``.

    Ranks average gradients and P is the mean over a rank's own tokens, so the loss of a set that spans ranks needs no
    factor of the number of ranks: with ``f`` counted over all ranks, the mean over ranks of this loss is the loss of
    the concatenated batch.

    Source: Switch Transformers (arXiv 2101.03961, equations 4-6) for one micro-batch and k = 1; DeepSeek-V3
    (arXiv 2412.19437, equations 17-20) for sequences; Qiu et al. (arXiv 2501.11873) for the global batch. Public codes
    differ by a factor: Hugging Face's Mixtral and OLMoE give k at perfect balance, llm-baselines k / E.

    Returns:
        Scalar, float32.
    """
    num_experts = load.fractions_GE.shape[-1]
    return num_experts * (load.share_G * (load.fractions_GE * load.probabilities_GE).sum(-1)).sum()


@BALANCERS.register("load_balancing_loss")
class LoadBalancingLoss(Balancer):
    """:func:`load_balancing_loss` of every layer."""

    Config = LoadBalancingLossConfig
    config: LoadBalancingLossConfig

    def loss(self, batch: RoutedBatch) -> Tensor:
        return mean_over_layers([load_balancing_loss(load) for load in batch.loads(self.config)])
