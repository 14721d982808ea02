"""A bias in the selection instead of a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.balancer import BALANCERS, Balancer, RoutedBatch, ScopedBalancerConfig
from moe_testbed.routing.scopes import Load, Scope


class LossFreeBiasConfig(ScopedBalancerConfig):
    """Options of ``loss_free_bias``."""

    name: str = "loss_free_bias"
    update_rate: float = Field(1e-3, gt=0, description="u: how far the bias moves per optimizer step")


def update_direction(load: Load) -> Tensor:
    """``sum_G share_G * sign(mean(C^G) - C_i^G)``: up for experts below the mean load of their balance set. Float32
    [E]."""
    mean = 1.0 / load.fractions_GE.shape[-1]
    return (load.share_G[:, None] * torch.sign(mean - load.fractions_GE)).sum(0)


@BALANCERS.register("loss_free_bias")
class LossFreeBias(Balancer):
    """``b_i += u * sign(mean(C) - C_i)`` after each optimizer step (Wang et al., arXiv 2408.15664, algorithm 1).

    The mean of the update is taken off, which changes no selection and keeps the biases from drifting together. The
    bias enters the selection and not the weights. Scope ``global_batch`` counts the whole batch of the step, so that
    its estimator is not used; a smaller scope averages the update over its balance sets, micro-batches and ranks.
    """

    Config = LossFreeBiasConfig
    config: LossFreeBiasConfig
    bias_YE: Tensor

    def __init__(self, config: LossFreeBiasConfig, num_layers: int, num_experts: int) -> None:
        super().__init__(config, num_layers, num_experts)
        self.register_buffer("bias_YE", torch.zeros(num_layers, num_experts))
        self.register_buffer("_direction_YE", torch.zeros(num_layers, num_experts), persistent=False)
        self._observed = 0
        self._direction_YE: Tensor

    @property
    def reads_wider_counts(self) -> bool:
        """The global batch is read once it is complete."""
        return self.config.scope is Scope.DATA_PARALLEL

    def observe(self, batch: RoutedBatch) -> None:
        if self.config.scope is Scope.GLOBAL_BATCH:
            return
        with torch.no_grad():
            self._direction_YE += torch.stack([update_direction(load) for load in batch.loads(self.config)])
        self._observed += 1

    def finish_step(self, counts_YE: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        if self.config.scope is Scope.GLOBAL_BATCH:
            counts = counts_YE.double()
            direction_YE = torch.sign(counts.mean(-1, keepdim=True) - counts).float()
        else:
            direction_YE = mean_over_ranks(self._direction_YE / max(self._observed, 1))
            self._direction_YE.zero_()
            self._observed = 0
        self.bias_YE += self.config.update_rate * (direction_YE - direction_YE.mean(-1, keepdim=True))

    def selection_bias_YE(self) -> Tensor:
        return self.bias_YE
