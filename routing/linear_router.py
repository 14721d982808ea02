"""What the routers with one linear score per expert share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import Capability, Router, RouterConfig, Scores
from moe_testbed.routing.score import LinearScore, Scorer
from moe_testbed.routing.select import select_top_k


class LinearRouterConfig(RouterConfig):
    """What routers with one linear score per expert can be balanced by."""

    @property
    def provides(self) -> frozenset[Capability]:
        """Scores, a bias, and the rows of W."""
        return frozenset({Capability.SCORES, Capability.SELECTION_BIAS, Capability.VECTORS})


class LinearRouter(Router):
    """``z = W x`` for all experts, and the K highest affinities plus bias; score and weigh are the router's own.

    Args:
        trainable: False leaves W as initialised.

    Attributes:
        scorer: makes z; a router that scores otherwise puts its own in place.
    """

    scorer: Scorer

    def __init__(self, config: Any, setting: RouterSetting, trainable: bool = True) -> None:
        super().__init__(config, setting)
        self.scorer = LinearScore(setting.hidden_size, setting.num_experts, trainable)

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.affinity_TE, self.setting.top_k, context.bias_E)

    def vectors_EX(self) -> Tensor:
        return self.scorer.weight
