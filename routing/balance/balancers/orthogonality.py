"""The experts of a token return different things.

Shape legend: T tokens, K choices, M model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    BalancerConfig,
    RoutedBatch,
    Schedule,
    mean_over_layers,
)
from moe_testbed.routing.load import TokenSets
from moe_testbed.routing.records import NO_EXPERT
from moe_testbed.routing.router import Capability


class OrthogonalityConfig(BalancerConfig):
    """Options of ``orthogonality``."""

    name: str = "orthogonality"
    coefficient: Schedule = 1e-3

    @property
    def needs(self) -> frozenset[Capability]:
        """The experts are trained, not the router."""
        return frozenset()

    @property
    def needs_outputs(self) -> bool:
        """The loss is one of the experts' outputs."""
        return True


def orthogonality(outputs_TKM: Tensor, expert_ids_TK: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """``L = mean_t mean_{i < j in S_t} cos^2(o_{t,i}, o_{t,j})`` over the pairs of each token's experts, in [0, 1].

    0 when the outputs of each token's experts are orthogonal, or when there are no two; 1 when they are parallel. A
    weight changes no angle, so that weighted outputs give the same. Source: Guo et al. (arXiv 2505.22323, the
    orthogonality loss), who sum the lengths of the projections of one output on another; the squared cosine is the same
    angle without the lengths, which it therefore cannot shrink instead.

    Args:
        outputs_TKM: what each chosen expert returned.
        expert_ids_TK: which they are; ``NO_EXPERT`` makes no pair.
        valid_T: False for padding, bool.

    Returns:
        Scalar, float32.
    """
    units_TKM = F.normalize(outputs_TKM.to(torch.promote_types(outputs_TKM.dtype, torch.float32)), dim=-1)
    used_TK = expert_ids_TK != NO_EXPERT
    pair_TKK = (used_TK[:, :, None] & used_TK[:, None, :]).triu(diagonal=1)
    squares_TKK = (units_TKM @ units_TKM.transpose(1, 2)).square() * pair_TKK
    overlap_T = squares_TKK.sum((1, 2)) / pair_TKK.sum((1, 2)).clamp(min=1)
    return TokenSets(1).mean(overlap_T[:, None], valid_T).squeeze()


@BALANCERS.register("orthogonality")
class Orthogonality(Balancer):
    """:func:`orthogonality` of every layer.

    Raises:
        ValueError: tokens use one expert, which makes no pair.
    """

    Config = OrthogonalityConfig
    config: OrthogonalityConfig

    def __init__(self, config: OrthogonalityConfig, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, num_layers, num_experts, top_k)
        if top_k == 1:
            raise ValueError(
                f"routing.balance has the balancer '{config.name}', which compares the outputs of each token's "
                "experts, but model.moe.top_k is 1; take the balancer out, or set top_k to 2 or more"
            )

    def loss(self, batch: RoutedBatch) -> Tensor:
        # With one decision for all layers every layer's outputs are those of the same choice.
        decisions = batch.decisions * (len(batch.outputs_TKM) // len(batch.decisions))
        return mean_over_layers(
            [
                orthogonality(outputs_TKM, decision.expert_ids_TK, batch.context.valid_T)
                for outputs_TKM, decision in zip(batch.outputs_TKM, decisions, strict=True)
            ]
        )
