"""Experts by a balanced transport plan."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, gathered, select_top_k
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores
from moe_testbed.routing.routers.parts.pools import PoolRouterConfig, choose_in_pools
from moe_testbed.routing.routers.parts.transport import sinkhorn_bias


class SinkhornConfig(PoolRouterConfig):
    """Options of ``sinkhorn``."""

    name: str = "sinkhorn"


@ROUTERS.register("sinkhorn")
class Sinkhorn(LinearRouter):
    """In training S is the k largest entries of each token's row of the pool's transport plan: ``exp(z)`` with ``z = W
    x``, its rows and columns scaled until all tokens, and all experts, have equal shares of it. In evaluation ``S =
    topk(z)``. ``g = sigmoid(z)`` for k = 1 and ``softmax(z)`` otherwise, not renormalised over S.

    S-BASE (Clark et al., arXiv 2202.01169), as Megatron-LM computes it; see
    :func:`~moe_testbed.routing.routers.parts.transport.sinkhorn_bias`. The choice carries no gradient, and no balancing
    loss is needed. Even is the plan; the loads are so about as far as its entries tell one expert from the others, and
    in a pool of few tokens not at all. Padding is routed as in evaluation. Balancers see ``g / sum(g)``.

    Causal in evaluation only: in training a token's experts depend on all tokens of the pool, later ones too.

    Oracle: ``route_sinkhorn`` in tests/routing/oracles_pool.py.
    """

    Config = SinkhornConfig
    config: SinkhornConfig

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        logits_TE = self.scorer(x_TM)
        if self.setting.top_k == 1:
            return Scores.by_sigmoid(logits_TE)
        return Scores.by_softmax(logits_TE)

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        logits_TE = scores.logits_TE
        if not self.training:
            return select_top_k(logits_TE, self.setting.top_k)
        bias_TE = choose_in_pools(
            lambda logits_UE: sinkhorn_bias(logits_UE).expand_as(logits_UE),
            logits_TE,
            torch.zeros_like(logits_TE),
            self.config.pool,
            context,
            self.setting.data_parallel_group,
        )
        # The entries of a row of the plan are in the order of z + log d1.
        return select_top_k(logits_TE + bias_TE, self.setting.top_k)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, normalise=False)
