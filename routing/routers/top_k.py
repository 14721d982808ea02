"""Softmax over all experts, then the k largest."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, LinearRouterConfig, gathered, normalises
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores


class TopKConfig(LinearRouterConfig):
    """Options of ``top_k``."""

    name: str = "top_k"
    normalise: bool | None = Field(
        None, description="divide the weights of the chosen experts by their sum; default: where top_k is more than 1"
    )


@ROUTERS.register("top_k")
class TopK(LinearRouter):
    """``p = softmax(W x)``, ``S = topk(p)``, ``g_i = p_i``, divided by ``sum_S p`` if ``normalise``.

    ``normalise: false`` is Switch (k = 1; arXiv 2101.03961, equations 1-2) and OLMoE (arXiv 2409.02060), ``normalise:
    true`` GShard without noise (k = 2; arXiv 2006.16668, algorithm 1) and Qwen3 (arXiv 2505.09388).

    Oracle: ``route_top_k`` in tests/routing/oracles.py.
    """

    Config = TopKConfig
    config: TopKConfig

    def __init__(self, config: TopKConfig, setting: RouterSetting, trainable: bool = True) -> None:
        super().__init__(config, setting, trainable)
        self.normalise = normalises(config.normalise, setting.top_k)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM))

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, self.normalise)
