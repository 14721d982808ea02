"""The k largest logits, then softmax over them."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, LinearRouterConfig
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores


def softmax_over_chosen(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Softmax over the logits of the chosen experts only (Mixtral, arXiv 2401.04088, section 2.1). Float32 [T, K]."""
    return logits_TE.gather(-1, expert_ids_TK).softmax(-1)


class TopKSoftmaxConfig(LinearRouterConfig):
    """Options of ``top_k_softmax``."""

    name: str = "top_k_softmax"


def scores_of(logits_TE: Tensor) -> Scores:
    """Logits are what is compared."""
    return Scores(logits_TE, logits_TE, logits_TE.softmax(-1), scores_of)


@ROUTERS.register("top_k_softmax")
class TopKSoftmax(LinearRouter):
    """``S = topk(z)``, ``g = softmax(z_S)`` with ``z = W x`` (Mixtral, arXiv 2401.04088, section 2.1).

    Equal to ``top_k`` with ``normalise: true`` as long as no bias enters the selection: a bias is added to the
    probabilities there and to the logits here.

    Oracle: ``route_top_k_softmax`` in tests/routing/oracles.py.

    Raises:
        ValueError: top_k is 1; the only weight would always be 1.
    """

    Config = TopKSoftmaxConfig
    config: TopKSoftmaxConfig

    def __init__(self, config: TopKSoftmaxConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        if setting.top_k == 1:
            raise ValueError(
                "routing.router.name is top_k_softmax with model.moe.top_k 1: the only weight would always be 1 and "
                "the router would learn nothing from the loss; use top_k"
            )

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return scores_of(self.scorer(x_TM))

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return softmax_over_chosen(scores.logits_TE, expert_ids_TK)
