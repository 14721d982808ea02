"""A router with a parameter and a buffer that have "expert" in their names, as a researcher would name them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext
from moe_testbed.routing.router import Scores
from moe_testbed.routing.routers.top_k import TopK, TopKConfig


class Biased(TopK):
    """Adds a learned bias to each expert's score, and counts the steps."""

    expert_steps: Tensor

    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.expert_bias = nn.Parameter(torch.zeros(setting.num_experts))
        self.register_buffer("expert_steps", torch.zeros(1))

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM) + self.expert_bias)

    def finish_step(self, step: LayerStep) -> None:
        self.expert_steps += 1
