"""Keeps the router's logits small."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    BalancerConfig,
    RoutedBatch,
    Schedule,
    carried,
    mean_over_layers,
)


class ZLossConfig(BalancerConfig):
    """Options of ``z_loss``."""

    name: str = "z_loss"
    coefficient: Schedule = 1e-3


def z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """``mean_t logsumexp(z_t)^2`` over the tokens that are not padding (ST-MoE, arXiv 2202.08906, equation 5). Scalar,
    float32."""
    squares_T = torch.logsumexp(logits_TE, dim=-1).square()
    if valid_T is None:
        return squares_T.mean()
    return squares_T.masked_fill(~valid_T, 0.0).sum() / valid_T.sum().clamp(min=1)


@BALANCERS.register("z_loss")
class ZLoss(Balancer):
    """:func:`z_loss` of every layer."""

    Config = ZLossConfig
    config: ZLossConfig

    def loss(self, batch: RoutedBatch) -> Tensor:
        logits = carried(decision.logits_TE for decision in batch.decisions)
        return mean_over_layers([z_loss(logits_TE, batch.context.valid_T) for logits_TE in logits])
