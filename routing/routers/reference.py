"""The reference: every domain has its own experts.

Shape legend: T tokens, E experts, K choices, D domains, J groups of experts, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moe_testbed.routing.learned import LinearScore, gathered, normalises, select_top_k, uniform
from moe_testbed.routing.records import RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, Router, RouterConfig, Scores
from moe_testbed.routing.routers.parts.groups import DomainGroups, domain_groups, group_masks, group_sizes
from moe_testbed.routing.routers.parts.hashing import balanced_table, choice_from_keys, cumulative_thresholds


class ReferenceConfig(RouterConfig):
    """Options of ``reference``."""

    name: str = "reference"
    groups: Literal["equal", "proportional"] = Field(
        "equal", description="experts per group: the same, or by the share of its domains in the mix"
    )
    partition: dict[str, tuple[str, ...]] | None = Field(
        None, description="group -> domains that share its experts, each domain once; default: one group per domain"
    )
    document_parts: int = Field(
        1,
        gt=0,
        description="divides every group into n by document, at random: finer than the labels, but parts of a domain "
        "share its content, so that finer is not better by construction",
    )
    inside: Literal["learned", "hash", "all"] = Field(
        "learned",
        description="inside the group: learned top-k, a table by token id, or all its experts "
        "(then every group has top_k experts)",
    )

    @field_validator("partition")
    @classmethod
    def _each_domain_once(cls, value: dict[str, tuple[str, ...]] | None) -> dict[str, tuple[str, ...]] | None:
        group_of: dict[str, str] = {}
        for group, domains in (value or {}).items():
            if not domains:
                raise ValueError(f"routing.router.partition.{group} is empty: name its domains, or leave the group out")
            for domain in domains:
                if domain in group_of:
                    raise ValueError(
                        f"routing.router.partition has the domain '{domain}' twice, in {group_of[domain]} and "
                        f"{group}; keep one"
                    )
                group_of[domain] = group
        return value

    def groups_of(self, domains: Sequence[str]) -> DomainGroups:
        """Returns the groups that serve these domains. Raises ValueError if the partition leaves one out."""
        return domain_groups(domains, self.partition, self.document_parts)

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
    """The ideal routing by domain (MoE Routing Testbed, arXiv 2604.07030): the experts are partitioned into groups, one
    for each domain or family of domains, and a token uses its own domain's group only.

    Inside the group ``learned`` is ``p = softmax(z)`` over the group, ``S = topk(p)``, ``g_i = p_i / sum_S p`` (for k =
    1 ``g = p_i``); ``hash`` a table by token id balanced over the tokens of the group's domains, ``g = 1/k``; ``all``
    every expert of the group, ``g = 1/k``.

    With ``document_parts`` n every group becomes n groups, and the document's number decides by hash which of them
    serves its tokens, the same in all layers.

    Oracle: ``route_reference`` in tests/routing/oracles.py.

    Raises:
        ValueError: a domain without a group, groups that need more experts than there are, or ``all`` and a group whose
            size is not top_k.
    """

    Config = ReferenceConfig
    config: ReferenceConfig
    group_JE: Tensor
    table_JVK: Tensor
    family_D: Tensor
    part_thresholds: Tensor

    def __init__(self, config: ReferenceConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.groups = config.groups_of(setting.domains)
        shares = self.groups.shares(setting.domain_weights)
        if config.groups == "equal":
            shares = (1.0,) * len(shares)
        sizes = group_sizes(setting.num_experts, shares, setting.top_k)
        if config.inside == "all" and set(sizes) != {setting.top_k}:
            raise ValueError(
                f"routing.router.inside: all uses every expert of a token's group, but the groups have {min(sizes)} "
                f"to {max(sizes)} experts and a token uses {setting.top_k}; change model.moe.num_experts so that there "
                f"are {setting.top_k * len(sizes)}, or choose inside: learned or hash"
            )
        self.register_buffer("group_JE", group_masks(sizes), persistent=False)
        self.register_buffer("family_D", torch.tensor(self.groups.family_of_domain), persistent=False)
        thresholds = cumulative_thresholds((1.0,) * config.document_parts)
        self.register_buffer("part_thresholds", thresholds, persistent=False)
        if config.inside == "learned":
            self.scorer = LinearScore(setting.hidden_size, setting.num_experts)
        else:
            self.register_buffer("table_JVK", self._tables(sizes), persistent=False)

    def _tables(self, sizes: list[int]) -> Tensor:
        """Experts of every (group, token id), int64 [J, V, K]."""
        first = 0
        tables = []
        for group, size in enumerate(sizes):
            seed = (self.setting.seed * 1_000 + self.setting.layer) * 1_000 + group
            weights_V = self._token_weights_V(self.groups.domains_of(group))
            tables.append(first + balanced_table(weights_V, size, self.setting.top_k, seed))
            first += size
        return torch.stack(tables)

    def _token_weights_V(self, domains: list[int]) -> Tensor:
        """Relative frequency of every token id in the mix of these domains, float64; a single one's counts."""
        counts_DV = self.setting.token_counts_DV[domains].double()
        weights_D = counts_DV.new_tensor([self.setting.domain_weights[domain] for domain in domains])
        factors_D = weights_D / counts_DV.sum(1).clamp(min=1)
        largest = factors_D.max()
        return (factors_D / largest if largest > 0 else torch.ones_like(factors_D)) @ counts_DV

    def own_group_T(self, context: RoutingContext) -> Tensor:
        """Returns the group of each token's domain and document, int64 [T].

        Raises:
            ValueError: documents decide, and the context does not tell them apart.
        """
        family_T = self.family_D[context.domain_BL.reshape(-1)]
        if self.config.document_parts == 1:
            return family_T
        if context.document_BL is None:
            raise ValueError(
                f"routing.router.document_parts is {self.config.document_parts}, but the batch has no document "
                f"numbers; set it to 1, or use data that has them"
            )
        part_T = choice_from_keys(self.part_thresholds, self.setting.seed, context.document_BL.reshape(-1))
        return family_T * self.config.document_parts + part_T

    def group_T(self, context: RoutingContext) -> Tensor:
        """Group that serves each token, int64 [T]."""
        return self.own_group_T(context)

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        if self.config.inside == "learned":
            return super().forward(x_TM, context)
        expert_ids_TK = self.table_JVK[self.group_T(context), context.token_ids_BL.reshape(-1)]
        return RoutingDecision(expert_ids_TK, uniform(expert_ids_TK))

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        outside_TE = ~self.group_JE[self.group_T(context)]
        # Masked before anything reads them: a loss on the logits must not reach the experts of other groups.
        return Scores.by_softmax(self.scorer(x_TM).masked_fill(outside_TE, float("-inf")))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.for_selection().affinity_TE, self.setting.top_k, context.bias_E)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, normalises(None, self.setting.top_k))

    def vectors_EX(self) -> Tensor | None:
        return self.scorer.weight if self.config.inside == "learned" else None
