"""A score with a hidden layer."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.routing.learned import LinearScore
from moe_testbed.routing.records import RouterSetting
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.top_k import TopK, TopKConfig


class MLPConfig(TopKConfig):
    """Options of ``mlp``."""

    name: str = "mlp"
    hidden_size: int | None = Field(None, gt=0, description="width of the hidden layer; default: the model's own")


class MLPScore(LinearScore):
    """``z = W2 gelu(W1 x)``.

    Args:
        hidden_size: M.
        width: width of the hidden layer.
        num_outputs: experts scored.
    """

    def __init__(self, hidden_size: int, width: int, num_outputs: int) -> None:
        super().__init__(width, num_outputs)
        # Hidden units of variance 1: with smaller ones gelu would be linear at first.
        self.hidden = LinearScore(hidden_size, width, std=hidden_size**-0.5)

    def forward(self, x_TM: Tensor) -> Tensor:
        """Logits, float32 [T, E]."""
        return super().forward(F.gelu(self.hidden(x_TM)))


@ROUTERS.register("mlp")
class MLP(TopK):
    """``top_k`` with ``z = W2 gelu(W1 x)``: a router that separates what no linear map does (the learned router of Fan
    et al., arXiv 2402.13089, is such a network).

    Oracle: ``route_mlp`` in tests/routing/oracles_learned.py.
    """

    Config = MLPConfig
    config: MLPConfig

    def __init__(self, config: MLPConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        width = config.hidden_size or setting.hidden_size
        self.scorer = MLPScore(setting.hidden_size, width, setting.num_experts)
