"""A bias in the selection instead of a loss."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe_testbed.routing.balance.balancer import BALANCERS, Balancer, CompletedStep, RoutedBatch, ScopedBalancerConfig
from moe_testbed.routing.load import fractions
from moe_testbed.routing.router import Capability
from moe_testbed.routing.scopes import Counts, Estimator, Scope


class LossFreeBiasConfig(ScopedBalancerConfig):
    """Options of ``loss_free_bias``."""

    name: str = "loss_free_bias"
    update_rate: float = Field(1e-3, gt=0, description="u: how far the bias moves per optimizer step")
    update: Literal["sign", "proportional"] = Field(
        "sign", description="sign: every expert by u; proportional: by u times its distance from the mean load"
    )

    @property
    def needs(self) -> frozenset[Capability]:
        """The bias enters the selection."""
        return frozenset({Capability.SCORES, Capability.SELECTION_BIAS})

    @model_validator(mode="after")
    def _no_estimate_is_needed(self) -> LossFreeBiasConfig:
        if self.estimator is not Estimator.ONLINE:
            raise ValueError(
                f"estimator is {self.estimator.value}, but the bias moves once the step is complete and its counts are "
                "known; leave estimator out"
            )
        return self


def update_direction(fractions_GE: Tensor, update: str) -> Tensor:
    """Where the bias of each expert goes: up below the mean load of the balance set, down above it, [G, E].

    ``sign``: ``sign(mean(C) - C_i)``; ``proportional``: ``(mean(C) - C_i) / mean(C)``.
    """
    num_experts = fractions_GE.shape[-1]
    if update == "sign":
        return torch.sign(1.0 / num_experts - fractions_GE)
    return 1.0 - num_experts * fractions_GE


@BALANCERS.register("loss_free_bias")
class LossFreeBias(Balancer):
    """``b_i += u * d_i`` after each optimizer step, with d of :func:`update_direction` (Wang et al., arXiv 2408.15664,
    algorithm 1, and section 4.3 for the proportional form).

    The mean of the update is taken off, which changes no selection and keeps the biases from drifting together. The
    bias enters the selection and not the weights. Scopes ``global_batch`` and ``window`` read the load once the step is
    complete, so that no estimator is needed; a smaller scope averages the update over its balance sets, micro-batches
    and ranks.
    """

    Config = LossFreeBiasConfig
    config: LossFreeBiasConfig
    bias_YE: Tensor

    def __init__(self, config: LossFreeBiasConfig, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, num_layers, num_experts, top_k)
        self.register_buffer("bias_YE", torch.zeros(num_layers, num_experts))
        self.register_buffer("_direction_YE", torch.zeros(num_layers, num_experts), persistent=False)
        self._observed = 0
        self._direction_YE: Tensor

    @property
    def reads_counts(self) -> Counts | None:
        """The wider scopes are read once the step is complete."""
        return Counts.NOW if self.config.scope is Scope.DATA_PARALLEL else None

    @torch.no_grad()
    def observe(self, batch: RoutedBatch) -> None:
        if not self.config.scope.at_once:
            return
        for y, load in enumerate(batch.loads(self.config)):
            direction_GE = update_direction(load.fractions_GE, self.config.update)
            self._direction_YE[y] += load.share_G @ direction_GE
        self._observed += 1

    def finish_step(self, step: CompletedStep) -> None:
        if self.config.scope.at_once:
            direction_YE = step.mean_over_ranks(self._direction_YE / max(self._observed, 1))
            self._direction_YE.zero_()
            self._observed = 0
        else:
            window = self.config.scope is Scope.WINDOW
            counts_YE = step.window_counts_YE[self.config.window_steps] if window else step.counts_YE
            direction_YE = update_direction(fractions(counts_YE, torch.float64), self.config.update).float()
        self.bias_YE += self.config.update_rate * (direction_YE - direction_YE.mean(-1, keepdim=True))

    def selection_bias_YE(self) -> Tensor:
        return self.bias_YE
