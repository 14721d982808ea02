"""An even load, by a smooth estimate of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.balance.balancer import BALANCERS, RoutedBatch, Schedule, carried
from moe_testbed.routing.balance.balancers.importance import squared_variation
from moe_testbed.routing.balance.means import MeansBalancer, MeansBalancerConfig
from moe_testbed.routing.records import Noise
from moe_testbed.routing.router import Capability


class LoadConfig(MeansBalancerConfig):
    """Options of ``load``."""

    name: str = "load"
    coefficient: Schedule = 0.1

    @property
    def needs(self) -> frozenset[Capability]:
        """Without noise the load has no smooth estimate."""
        return frozenset({Capability.SCORES, Capability.NOISE})


def chance_of_choice(logits_TE: Tensor, noise: Noise, top_k: int) -> Tensor:
    """Probability that each expert is among the K highest if its own noise were drawn again and that of all others
    kept: ``P(t, i) = Phi((clean_{t,i} - h_{t,i}) / scale_{t,i})`` with ``h_{t,i}`` the K-th highest noisy logit of the
    other experts (Shazeer et al., arXiv 1701.06538, equations 8-9). Float32 [T, E], differentiable.

    Args:
        logits_TE: noisy logits, by which the K highest were chosen.
        noise: of these logits.
        top_k: K, below E.
    """
    highest = logits_TE.topk(top_k + 1, dim=-1).values
    last_chosen_T1, first_left_T1 = highest[:, -2:-1], highest[:, -1:]
    # Among the others, the K-th highest is the first one left out for an expert that is chosen itself.
    threshold_TE = torch.where(logits_TE > first_left_T1, first_left_T1, last_chosen_T1)
    return torch.special.ndtr((noise.clean_TE - threshold_TE) / noise.scale_TE)


@BALANCERS.register("load")
class LoadVariation(MeansBalancer):
    """``L = sum_G share_G * CV^2(n_G)`` with ``n_{G,i}`` the sum of expert i's :func:`chance_of_choice` over the tokens
    of balance set G (Shazeer et al., arXiv 1701.06538, equations 10-11, with weight 0.1).

    From 0 (all experts expect the same load) to E / K - 1 (the same K experts for all). A selection bias, being no
    noise, is not seen.

    Raises:
        ValueError: all experts are chosen, so that there is no load to even out.
    """

    Config = LoadConfig
    config: LoadConfig

    def __init__(self, config: LoadConfig, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, num_layers, num_experts, top_k)
        if top_k >= num_experts:
            raise ValueError(
                f"routing.balance has the balancer '{config.name}', but model.moe.top_k is {top_k} of {num_experts} "
                "experts, which is an even load already; take the balancer out, or use more experts"
            )

    def token_values(self, batch: RoutedBatch) -> list[Tensor]:
        logits = carried(decision.logits_TE for decision in batch.decisions)
        noises = carried(decision.noise for decision in batch.decisions)
        return [chance_of_choice(z_TE, noise, self.top_k) for z_TE, noise in zip(logits, noises, strict=True)]

    def loss_of_means(self, means_YGX: Tensor) -> Tensor:
        return squared_variation(means_YGX)
