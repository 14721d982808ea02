"""One sigmoid per expert instead of a softmax over all."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, LinearRouterConfig, normalises
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores
from moe_testbed.routing.routers.parts.sigmoids import gathered_sigmoids


class SigmoidConfig(LinearRouterConfig):
    """Options of ``sigmoid``."""

    name: str = "sigmoid"
    normalise: bool | None = Field(
        None, description="divide the weights of the chosen experts by their sum; default: where top_k is more than 1"
    )
    route_scale: float = Field(1.0, gt=0, description="factor of all weights")


@ROUTERS.register("sigmoid")
class Sigmoid(LinearRouter):
    """``s = sigmoid(W x)``, ``S = topk(s + b)``, ``g_i = route_scale * s_i / sum_S s`` with b the selection bias.

    DeepSeek-V3 (arXiv 2412.19437, equations 13-16). Balancers see ``s / sum(s)`` (equation 19).

    Oracle: ``route_sigmoid`` in tests/routing/oracles.py.
    """

    Config = SigmoidConfig
    config: SigmoidConfig

    def __init__(self, config: SigmoidConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.normalise = normalises(config.normalise, setting.top_k)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_sigmoid(self.scorer(x_TM))

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return self.config.route_scale * gathered_sigmoids(scores, expert_ids_TK, self.normalise)
