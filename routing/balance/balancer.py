"""The balancer: what keeps the load even."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from moe_testbed.routing.load import Load, TokenSets
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.registry import Registry
from moe_testbed.routing.router import Capability, KeepsBufferDtype
from moe_testbed.routing.scopes import Counts, Scope, ScopeConfig

T = TypeVar("T")

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Schedule = Annotated[
    Coefficient | Annotated[dict[Annotated[int, Field(ge=0)], Coefficient], Field(min_length=1)],
    Field(description="factor of the loss of each layer, or its values at some steps: {0: 0.1, 1000: 0.01}"),
]


def scheduled(schedule: float | Mapping[int, float], step: int) -> float:
    """The factor in the step after ``step`` completed ones: linear between the steps given, constant outside them."""
    if not isinstance(schedule, Mapping):
        return schedule
    before = max((at for at in schedule if at <= step), default=None)
    after = min((at for at in schedule if at > step), default=None)
    if before is None or after is None:
        at = after if before is None else before
        assert at is not None, "a schedule without steps is refused"
        return schedule[at]
    return schedule[before] + (schedule[after] - schedule[before]) * (step - before) / (after - before)


class BalancerConfig(BaseModel, extra="forbid", frozen=True):
    """Options that every balancer has."""

    name: str = Field(description="registered name of the balancer")

    @property
    def needs(self) -> frozenset[Capability]:
        """What the router must provide."""
        return frozenset({Capability.SCORES})

    @property
    def needs_outputs(self) -> bool:
        """The balancer reads what the experts returned."""
        return False


class ScopedBalancerConfig(BalancerConfig, ScopeConfig):
    """Options of a balancer that acts over a balancing scope."""


@dataclass(frozen=True)
class RoutedBatch:
    """What the balancers see of one training micro-batch.

    Attributes:
        decisions: the decision of every deciding layer.
        context: the model's, the same for all layers.
        loads: the load of every layer in the scope that a balancer's config asks for.
        sets: the balance sets of a scope.
        mean_over_ranks: mean of a tensor over the data-parallel ranks, without gradient.
        outputs_TKM: what each token's experts returned in every MoE layer, deciding or not, weighted, zeros where there
            is no expert; empty if no balancer needs it.
    """

    decisions: list[RoutingDecision]
    context: RoutingContext
    loads: Callable[[ScopeConfig], list[Load]]
    sets: Callable[[Scope], TokenSets]
    mean_over_ranks: Callable[[Tensor], Tensor]
    outputs_TKM: list[Tensor]


@dataclass(frozen=True)
class CompletedStep:
    """What balancers learn of an optimizer step once it is complete, the same on all ranks.

    Attributes:
        counts_YE: assignments of the global batch, int64.
        tokens: tokens of the global batch without padding, int64 scalar.
        window_counts_YE: moving averages of the counts, this step included, by ``window_steps``, float64.
        mean_over_ranks: mean of a tensor over the data-parallel ranks.
    """

    counts_YE: Tensor
    tokens: Tensor
    window_counts_YE: Mapping[int, Tensor]
    mean_over_ranks: Callable[[Tensor], Tensor]


class Balancer(KeepsBufferDtype):
    """Base of all balancers. A balancer adds a loss, or a bias to the selection, or both.

    State lives in buffers, so that checkpoints carry it.
    """

    Config: ClassVar[type[BalancerConfig]] = BalancerConfig

    def __init__(self, config: Any, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.top_k = top_k

    def loss(self, batch: RoutedBatch) -> Tensor | None:
        """Mean over the layers, before the coefficient; None if the balancer has no loss."""
        return None

    def observe(self, batch: RoutedBatch) -> None:
        """Called once per training micro-batch, after :meth:`loss`."""

    def finish_step(self, step: CompletedStep) -> None:
        """Called once per optimizer step."""

    @property
    def reads_counts(self) -> Counts | None:
        """Which counts of other ranks or micro-batches :meth:`loss` and :meth:`observe` read; None for none."""
        return self.config.counts if isinstance(self.config, ScopeConfig) else None

    def coefficient(self, step: int) -> float:
        """Factor of the loss, which is summed over layers, in the step after ``step`` completed ones."""
        return scheduled(getattr(self.config, "coefficient", 0.0), step)

    def selection_bias_YE(self) -> Tensor | None:
        """Added to the scores for the selection only, float32 [Y, E]."""
        return None


BALANCERS: Registry[Balancer] = Registry("balancer", Balancer)


def carried(values: Iterable[T | None]) -> list[T]:
    """What every layer's decision carries because the router provides it."""
    values = list(values)
    present = [value for value in values if value is not None]
    assert len(present) == len(values), "the router does not carry what it provides"
    return present


def mean_over_layers(values: list[Tensor]) -> Tensor:
    """Mean of one scalar per layer."""
    return torch.stack(values).mean()
