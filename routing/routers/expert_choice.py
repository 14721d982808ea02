"""Experts choose tokens."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores
from moe_testbed.routing.routers.parts.pools import PoolRouterConfig, choose_in_pools
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen, select_where


class ExpertChoiceConfig(PoolRouterConfig):
    """Options of ``expert_choice``."""

    name: str = "expert_choice"
    capacity_factor: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="mean number of experts per token, in units of top_k"
    )

    @property
    def causal(self) -> bool:
        """Whether an expert takes a token depends on the tokens that come after it."""
        return False

    @property
    def varying_top_k(self) -> bool:
        """A token may be taken by many experts or by none."""
        return True


@ROUTERS.register("expert_choice")
class ExpertChoice(LinearRouter):
    """``p = softmax(W x)``; of every pool of n tokens each expert takes the ``c = ceil(capacity_factor * k * n / E)``
    that give it the highest p_i (at least 1, at most n); ``g_i = p_i``.

    Zhou et al., arXiv 2202.09368, section 3.2, where capacity_factor * k is called the capacity factor. The load is
    even by construction; how many experts a token gets is not, and a token may get none.

    It is not causal, in training or in evaluation, over whatever pool: a token's experts depend on later tokens, which
    tell of the next token what a language model must not know. Its losses are no language model's.

    Oracle: ``route_expert_choice`` in tests/routing/oracles_pool.py.
    """

    Config = ExpertChoiceConfig
    config: ExpertChoiceConfig

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        scores_TE = scores.affinity_TE
        chosen_TE = choose_in_pools(
            self._take,
            scores_TE,
            torch.zeros_like(scores_TE, dtype=torch.bool),
            self.config.pool,
            context,
            self.setting.data_parallel_group,
        )
        return select_where(chosen_TE, scores_TE)

    def _take(self, scores_UE: Tensor) -> Tensor:
        """Which tokens of a pool each expert takes, bool [U, E]."""
        U, E = scores_UE.shape
        capacity = min(math.ceil(self.config.capacity_factor * self.setting.top_k * U / E), U)
        # Along rows, topk is several times as fast.
        taken_EX = scores_UE.t().contiguous().topk(capacity, dim=-1, sorted=False).indices
        return torch.zeros_like(scores_UE, dtype=torch.bool).scatter_(0, taken_EX.t(), True)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered_where_chosen(scores.affinity_TE, expert_ids_TK, normalise=False)
