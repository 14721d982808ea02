"""Cosine similarity to one direction per expert.

Shape legend: T tokens, M model width, E experts, P projected width.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.routing.learned import LinearScore, Scorer, full_precision_linear
from moe_testbed.routing.records import RouterSetting
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.top_k import TopK, TopKConfig

LARGEST_SCALE = 100.0


class CosineConfig(TopKConfig):
    """Options of ``cosine``."""

    name: str = "cosine"
    projection_size: int | None = Field(
        None, gt=1, description="P, dimensions in which angles are measured; default: half the number of experts"
    )
    initial_scale: float = Field(
        2.0, gt=0, le=LARGEST_SCALE, description="tau, factor of the cosines, before it is learned"
    )


class CosineScore(Scorer):
    """``z_i = tau * cos(P x, m_i)`` with ``tau = min(exp(log_scale), 100)``.

    Args:
        hidden_size: M.
        projection_size: P.
        num_outputs: experts scored.
        initial_scale: tau at first.
    """

    def __init__(self, hidden_size: int, projection_size: int, num_outputs: int, initial_scale: float) -> None:
        super().__init__()
        self.projection = LinearScore(hidden_size, projection_size)
        self.weight = nn.Parameter(torch.randn(num_outputs, projection_size) * projection_size**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))

    def forward(self, x_TM: Tensor) -> Tensor:
        """Logits, float32 [T, E], within -tau and tau."""
        projected_TP = F.normalize(self.projection(x_TM), dim=-1)
        directions_EP = F.normalize(self.weight.to(projected_TP.dtype), dim=-1)
        scale = self.log_scale.to(projected_TP.dtype).clamp(max=math.log(LARGEST_SCALE)).exp()
        return scale * full_precision_linear(projected_TP, directions_EP)


@ROUTERS.register("cosine")
class Cosine(TopK):
    """``top_k`` with ``z_i = tau * cos(P x, m_i)``: the length of a hidden state and of an expert's vector decides
    nothing, and there are few dimensions for tokens to cluster in.

    X-MoE (Chi et al., arXiv 2204.09179, section 3): P has E / 2 rows, and tau, their inverse temperature, is learned.
    As in Tutel (arXiv 2206.03382) its logarithm is learned, tau stays below 100 and starts at 2.

    Oracle: ``route_cosine`` in tests/routing/oracles_learned.py.
    """

    Config = CosineConfig
    config: CosineConfig

    def __init__(self, config: CosineConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        projection_size = config.projection_size or max(2, setting.num_experts // 2)
        self.scorer = CosineScore(setting.hidden_size, projection_size, setting.num_experts, config.initial_scale)
