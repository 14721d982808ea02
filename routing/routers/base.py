"""Experts by a balanced assignment."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, gathered, select_top_k
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores
from moe_testbed.routing.routers.parts.pools import PoolRouterConfig, choose_in_pools
from moe_testbed.routing.routers.parts.transport import balanced_assignment


class BaseConfig(PoolRouterConfig):
    """Options of ``base``."""

    name: str = "base"


@ROUTERS.register("base")
class Base(LinearRouter):
    """In training S is the assignment with the highest sum of ``z = W x`` over the pool among those that give every
    expert ``n k / E`` of its n tokens; in evaluation ``S = topk(z)``. ``g = sigmoid(z)``.

    BASE layers (Lewis et al., arXiv 2103.16716, section 3), which assigns once, k = 1; for k > 1 see
    :func:`~moe_testbed.routing.routers.parts.transport.balanced_assignment`. The paper solves by auction, here it is
    exact, on the CPU. No balancing loss is needed. Padding is routed as in evaluation. Balancers see ``g / sum(g)``.

    Causal in evaluation only: in training a token's experts depend on all tokens of the pool, later ones too.

    Oracle: ``route_base`` in tests/routing/oracles_pool.py.
    """

    Config = BaseConfig
    config: BaseConfig

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_sigmoid(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        logits_TE, top_k = scores.logits_TE, self.setting.top_k
        greedy_TK = select_top_k(logits_TE, top_k)
        if not self.training:
            return greedy_TK
        return choose_in_pools(
            lambda logits_UE: balanced_assignment(logits_UE, top_k),
            logits_TE,
            greedy_TK,
            self.config.pool,
            context,
            self.setting.data_parallel_group,
        )

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, normalise=False)
