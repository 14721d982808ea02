"""The k largest logits, then softmax over them."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import ROUTERS, RouterConfig, Scores
from moe_testbed.routing.routers.top_k import TopK
from moe_testbed.routing.weight import softmax_over_chosen


class TopKSoftmaxConfig(RouterConfig):
    """Options of ``top_k_softmax``."""

    name: str = "top_k_softmax"


@ROUTERS.register("top_k_softmax")
class TopKSoftmax(TopK):
    """``S = topk(z)``, ``g = softmax(z_S)`` with ``z = W x`` (Mixtral, arXiv 2401.04088, section 2.1).

    Equal to ``top_k`` with ``normalise: true`` as long as no bias enters the selection: a bias is added to the
    probabilities there and to the logits here.
    """

    Config = TopKSoftmaxConfig  # type: ignore[assignment]
    config: TopKSoftmaxConfig  # type: ignore[assignment]

    def score(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        logits_TE = self.scorer(x_TD)
        return Scores(logits_TE, logits_TE, logits_TE.softmax(-1))

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return softmax_over_chosen(scores.logits_TE, expert_ids_TK)
