"""The reference: every domain has its own experts."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.groups import group_masks, group_sizes
from moe_testbed.routing.hashing import balanced_table
from moe_testbed.routing.records import RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, Router, RouterConfig, Scores
from moe_testbed.routing.score import LinearScore
from moe_testbed.routing.select import select_top_k
from moe_testbed.routing.weight import gathered, normalises, uniform


class ReferenceConfig(RouterConfig):
    """Options of ``reference``."""

    name: str = "reference"
    groups: Literal["equal", "proportional"] = Field(
        "equal", description="experts per domain: the same, or by the domain's share of the mix"
    )
    inside: Literal["learned", "hash", "all"] = Field(
        "learned",
        description="inside the group: learned top-k, a table by token id, or all its experts "
        "(then every group has top_k experts)",
    )

    @property
    def provides(self) -> frozenset[Capability]:
        """Only the learned form scores the experts of a group."""
        learned = {Capability.SCORES, Capability.SELECTION_BIAS, Capability.VECTORS}
        return frozenset(learned if self.inside == "learned" else ())

    @property
    def needs_domains(self) -> bool:
        """The label chooses the group."""
        return True

    @property
    def learned(self) -> bool:
        """The groups are prescribed."""
        return False


@ROUTERS.register("reference")
class Reference(Router):
    """The ideal routing by domain (MoE Routing Testbed, arXiv 2604.07030): the experts are partitioned into one group
    per domain, a token uses its own domain's group only.

    Inside the group ``learned`` is ``p = softmax(z)`` over the group, ``S = topk(p)``, ``g_i = p_i / sum_S p`` (for k =
    1 ``g = p_i``); ``hash`` a table by token id balanced over the domain's own tokens, ``g = 1/k``; ``all`` every
    expert of the group, ``g = 1/k``.

    Raises:
        ValueError: the domains need more experts than there are, or ``all`` and a group whose size is not top_k.
    """

    Config = ReferenceConfig
    config: ReferenceConfig
    group_DE: Tensor
    table_DVK: Tensor

    def __init__(self, config: ReferenceConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        shares = setting.domain_weights if config.groups == "proportional" else (1.0,) * len(setting.domains)
        sizes = group_sizes(setting.num_experts, shares, setting.top_k)
        if config.inside == "all" and set(sizes) != {setting.top_k}:
            raise ValueError(
                f"routing.router.inside: all uses every expert of a domain's group, but the groups have {min(sizes)} "
                f"to {max(sizes)} experts and "
                f"model.moe.top_k is {setting.top_k}; set model.moe.num_experts to {setting.top_k * len(sizes)} or "
                f"choose inside: learned or hash"
            )
        self.register_buffer("group_DE", group_masks(sizes), persistent=False)
        if config.inside == "learned":
            self.scorer = LinearScore(setting.hidden_size, setting.num_experts)
        else:
            self.register_buffer("table_DVK", self._tables(sizes), persistent=False)

    def _tables(self, sizes: list[int]) -> Tensor:
        """Experts of every (domain, token id), int64 [D, V, K]."""
        first = 0
        tables = []
        for domain, size in enumerate(sizes):
            seed = (self.setting.seed * 1_000 + self.setting.layer) * 1_000 + domain
            tables.append(first + balanced_table(self.setting.token_counts_DV[domain], size, self.setting.top_k, seed))
            first += size
        return torch.stack(tables)

    def domain_T(self, context: RoutingContext) -> Tensor:
        """Domain whose group serves each token, int64 [T]."""
        return context.domain_BL.reshape(-1)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        if self.config.inside == "learned":
            return super().forward(x_TD, context)
        expert_ids_TK = self.table_DVK[self.domain_T(context), context.token_ids_BL.reshape(-1)]
        return RoutingDecision(expert_ids_TK, uniform(expert_ids_TK))

    def score(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        outside_TE = ~self.group_DE[self.domain_T(context)]
        # Masked before anything reads them: a loss on the logits must not reach the experts of other domains.
        logits_TE = self.scorer(x_TD).masked_fill(outside_TE, float("-inf"))
        probabilities_TE = logits_TE.softmax(-1)
        # A bias could lift a probability of 0 over one inside the group, but not -inf.
        return Scores(logits_TE, probabilities_TE.masked_fill(outside_TE, float("-inf")), probabilities_TE)

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.affinity_TE, self.setting.top_k, context.bias_E)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, normalises(None, self.setting.top_k))

    def vectors_ED(self) -> Tensor | None:
        return self.scorer.weight if self.config.inside == "learned" else None
