"""Top-k inside the best groups of experts.

Shape legend: T tokens, E experts, K choices, J groups of experts, X groups kept, or experts of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, LinearRouterConfig, gathered, normalises, select_top_k
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Scores
from moe_testbed.routing.routers.parts.sigmoids import gathered_sigmoids


class GroupLimitedConfig(LinearRouterConfig):
    """Options of ``group_limited``."""

    name: str = "group_limited"
    groups: int = Field(2, gt=0, description="J, groups of equally many consecutive experts")
    groups_kept: int = Field(1, gt=0, description="groups that a token may use")
    group_score: Literal["max", "top_sum"] = Field(
        "top_sum",
        description="a group is worth its best affinity (max), or the sum of its K / groups_kept best (top_sum)",
    )
    affinity: Literal["softmax", "sigmoid"] = Field("sigmoid", description="what affinities are made of logits by")
    normalise: bool | None = Field(
        None, description="divide the weights of the chosen experts by their sum; default: where top_k is more than 1"
    )
    route_scale: float = Field(1.0, gt=0, description="factor of all weights")


@ROUTERS.register("group_limited")
class GroupLimited(LinearRouter):
    """The ``groups_kept`` groups of highest score, then ``S = topk(a + b)`` inside them, ``g_i = route_scale * a_i``,
    divided by ``sum_S a`` if ``normalise``, with a the affinities and b the selection bias, which enters the groups'
    scores too.

    ``affinity: softmax, group_score: max, normalise: false`` is DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), where a
    group is what lies on one device; ``affinity: sigmoid, group_score: top_sum, groups: 8, groups_kept: 4, route_scale:
    2.5`` is DeepSeek-V3 (arXiv 2412.19437, section 2.1.2 and equations 12-16). Where K / groups_kept is not whole, the
    sum is of the next larger number.

    Oracle: ``route_group_limited`` in tests/routing/oracles_learned.py.

    Raises:
        ValueError: the experts cannot be divided into the groups, or the groups kept have fewer than K experts.
    """

    Config = GroupLimitedConfig
    config: GroupLimitedConfig

    def __init__(self, config: GroupLimitedConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.normalise = normalises(config.normalise, setting.top_k)
        E, K, J, kept = setting.num_experts, setting.top_k, config.groups, config.groups_kept
        if E % J:
            raise ValueError(
                f"routing.router.groups is {J}, but model.moe.num_experts is {E}, which {J} does not divide; choose a "
                f"divisor of {E}"
            )
        if kept > J:
            raise ValueError(
                f"routing.router.groups_kept is {kept}, but there are {J} groups (routing.router.groups); keep at most "
                f"{J}"
            )
        if kept * (E // J) < K:
            raise ValueError(
                f"routing.router.groups_kept is {kept}, but {kept} groups of {E // J} experts are fewer than "
                f"model.moe.top_k {K}; keep at least {-(-K * J // E)} groups, or lower routing.router.groups"
            )

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        logits_TE = self.scorer(x_TM)
        if self.config.affinity == "softmax":
            return Scores.by_softmax(logits_TE)
        return Scores.by_sigmoid(logits_TE)

    @torch.no_grad()
    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        affinity_TE = scores.affinity_TE
        biased_TE = affinity_TE if context.bias_E is None else affinity_TE + context.bias_E
        biased_TJX = biased_TE.unflatten(-1, (self.config.groups, -1))
        kept_TX = select_top_k(self._group_scores_TJ(biased_TJX), self.config.groups_kept)
        barred_TJ = torch.ones_like(biased_TJX[..., 0], dtype=torch.bool).scatter(-1, kept_TX, False)
        return select_top_k(biased_TJX.masked_fill(barred_TJ[..., None], float("-inf")).flatten(-2), self.setting.top_k)

    def _group_scores_TJ(self, biased_TJX: Tensor) -> Tensor:
        if self.config.group_score == "max":
            return biased_TJX.amax(-1)
        summed = -(-self.setting.top_k // self.config.groups_kept)
        return biased_TJX.topk(summed, dim=-1).values.sum(-1)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        if self.config.affinity == "softmax":
            return self.config.route_scale * gathered(scores.affinity_TE, expert_ids_TK, self.normalise)
        return self.config.route_scale * gathered_sigmoids(scores, expert_ids_TK, self.normalise)
