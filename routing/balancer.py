"""The balancer: what keeps the load even."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.registry import Registry
from moe_testbed.routing.scopes import Estimator, Load, Scope
from moe_testbed.routing.state import KeepsBufferDtype


class BalancerConfig(BaseModel, extra="forbid", frozen=True):
    """Options that every balancer has."""

    name: str = Field(description="registered name of the balancer")


class ScopedBalancerConfig(BalancerConfig):
    """Options of a balancer that acts over a balancing scope."""

    scope: Scope = Field(Scope.GLOBAL_BATCH, description="over which tokens the load must be even")
    estimator: Estimator = Field(
        Estimator.ONLINE,
        description="global_batch only: counts of this step so far (online) or of the last step (previous)",
    )

    @model_validator(mode="after")
    def _estimator_has_a_use(self) -> ScopedBalancerConfig:
        if self.estimator is Estimator.PREVIOUS and self.scope is not Scope.GLOBAL_BATCH:
            raise ValueError(
                f"estimator is previous with scope {self.scope.value}, whose counts are exact; "
                "leave estimator out or set scope to global_batch"
            )
        return self


@dataclass(frozen=True)
class RoutedBatch:
    """What the balancers see of one training micro-batch.

    Attributes:
        decisions: of every MoE layer.
        context: of the model, the same for all layers.
        loads: the load of every layer in the scope that a balancer's config asks for.
    """

    decisions: list[RoutingDecision]
    context: RoutingContext
    loads: Callable[[ScopedBalancerConfig], list[Load]]


class Balancer(KeepsBufferDtype):
    """Base of all balancers. A balancer adds a loss, or a bias to the selection, or both.

    State lives in buffers, so that checkpoints carry it.
    """

    Config: ClassVar[type[BalancerConfig]] = BalancerConfig

    def __init__(self, config: Any, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.num_experts = num_experts

    def loss(self, batch: RoutedBatch) -> Tensor | None:
        """Mean over the layers, before the coefficient; None if the balancer has no loss."""
        return None

    def observe(self, batch: RoutedBatch) -> None:
        """Called once per training micro-batch, after :meth:`loss`."""

    def finish_step(self, counts_YE: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Called once per optimizer step with the assignments of the global batch, int64 [Y, E], and a mean over the
        data-parallel ranks."""

    @property
    def reads_wider_counts(self) -> bool:
        """:meth:`loss` or :meth:`observe` read counts of other ranks or micro-batches while the step is running."""
        scope = getattr(self.config, "scope", None)
        return scope in (Scope.DATA_PARALLEL, Scope.GLOBAL_BATCH)

    def coefficient(self, step: int) -> float:
        """Factor of the loss, which is summed over layers, in the step after ``step`` completed ones."""
        return float(getattr(self.config, "coefficient", 0.0))

    def selection_bias_YE(self) -> Tensor | None:
        """Added to the scores for the selection only, float32 [Y, E]."""
        return None


BALANCERS: Registry[Balancer] = Registry("balancer")


def mean_over_layers(values: list[Tensor]) -> Tensor:
    """Mean of one scalar per layer."""
    return torch.stack(values).mean()
