"""Keeps the router's logits small."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.balancer import BALANCERS, Balancer, BalancerConfig, LoadOf, mean_over_layers
from moe_testbed.routing.records import RoutingDecision


class ZLossConfig(BalancerConfig):
    """Options of ``z_loss``."""

    name: str = "z_loss"
    coefficient: float = Field(1e-3, ge=0, description="factor of the loss of each layer")


def z_loss(logits_TE: Tensor) -> Tensor:
    """``mean_t logsumexp(z_t)^2`` (ST-MoE, arXiv 2202.08906, equation 5). Scalar, float32."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


@BALANCERS.register("z_loss")
class ZLoss(Balancer):
    """:func:`z_loss` of every layer."""

    Config = ZLossConfig
    config: ZLossConfig

    def loss(self, layers: list[RoutingDecision], load_of: LoadOf) -> Tensor:
        return mean_over_layers([z_loss(decision.logits_TE) for decision in layers if decision.logits_TE is not None])
