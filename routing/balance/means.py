"""What the balancers share whose loss is a function of means, linear or not.

Shape legend: Y MoE layers, G sets of tokens, T tokens, X averaged values.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moe_testbed.routing.balance.balancer import Balancer, RoutedBatch, ScopedBalancerConfig
from moe_testbed.routing.scopes import Counts, Scope


class MeansBalancerConfig(ScopedBalancerConfig):
    """Options of a balancer that needs all tokens of a balance set at once."""

    scope: Scope = Field(
        Scope.DATA_PARALLEL,
        description="over which tokens the load must be even: data_parallel (the current micro-batch of all ranks) or "
        "one inside the micro-batch",
    )

    @field_validator("scope")
    @classmethod
    def _all_tokens_are_at_hand(cls, scope: Scope) -> Scope:
        if not scope.at_once:
            raise ValueError(
                f"scope is {scope.value}, but this loss is not linear in what it averages, so that counts cannot stand "
                "for the tokens of other micro-batches; set scope to data_parallel or to one inside the micro-batch "
                f"({', '.join(scope.value for scope in Scope if scope.inside_micro_batch)})"
            )
        return scope


class MeansBalancer(Balancer):
    """``sum_G share_G * F(m_G)`` with ``m_G`` the mean of some values over the tokens of balance set G, and any F.

    Scope ``data_parallel``: the mean over all tokens is ``m = mean_r m_r`` over the ranks' own means, and the gradient
    of ``F(m)`` is ``F'(m) mean_r dm_r``. Rank r computes ``F(m_r + sg(m - m_r))``: its value is ``F(m)``, its gradient
    ``F'(m) dm_r``. Ranks average gradients, so they train on exactly the loss of the concatenated batch. As everywhere,
    ranks hold equal numbers of tokens. One all-reduce serves all layers.
    """

    config: MeansBalancerConfig

    @property
    def reads_counts(self) -> Counts | None:
        """Means are read instead of counts."""
        return None

    def token_values(self, batch: RoutedBatch) -> list[Tensor]:
        """What is averaged, of every layer, [T, X] each, differentiable."""
        raise AssertionError(f"{type(self).__name__} does not say what it averages")

    def loss_of_means(self, means_YGX: Tensor) -> Tensor:
        """F, [Y, G]."""
        raise AssertionError(f"{type(self).__name__} has no loss")

    def loss(self, batch: RoutedBatch) -> Tensor:
        scope, valid_T = self.config.scope, batch.context.valid_T
        sets, values = batch.sets(scope), self.token_values(batch)
        means_YGX = torch.stack([sets.mean(values_TX, valid_T) for values_TX in values])
        if scope is Scope.DATA_PARALLEL:
            means_YGX = means_YGX + (batch.mean_over_ranks(means_YGX) - means_YGX).detach()
        share_G = sets.shares(valid_T, values[0])
        return (self.loss_of_means(means_YGX) @ share_G).mean()
