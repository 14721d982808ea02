"""The router: score, select, weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from moe_testbed.routing.records import RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.registry import Registry
from moe_testbed.routing.state import KeepsBufferDtype


class RouterConfig(BaseModel, extra="forbid", frozen=True):
    """Options that every router has."""

    name: str = Field(description="registered name of the router")

    @property
    def has_scores(self) -> bool:
        """The router returns probabilities, so that balancers can act on it."""
        return True


@dataclass(frozen=True)
class Scores:
    """What the selection and the weights are drawn from.

    Attributes:
        logits_TE: raw scores, float32.
        affinity_TE: scores in the form that is compared and weighted (softmax probabilities, sigmoids), float32.
        probabilities_TE: affinity normalised to sum 1 per token, float32; what the balancers see.
    """

    logits_TE: Tensor
    affinity_TE: Tensor
    probabilities_TE: Tensor


class Router(KeepsBufferDtype):
    """Base of all routers: three decisions, each a method that a router replaces without touching the others.

    A router without scores (hash, random) overrides :meth:`forward` instead.

    Class attributes say what the rest of the testbed must know:
        Config: options of the router.
        causal: a token's route does not change when later tokens change.
        needs_domains: the router reads domain labels.
        learned: the routing is learned from the data (neither prescribed nor fixed), so that the router competes with
            the reference.
    """

    Config: ClassVar[type[RouterConfig]] = RouterConfig
    causal: ClassVar[bool] = True
    needs_domains: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    def __init__(self, config: Any, setting: RouterSetting) -> None:
        super().__init__()
        self.config = config
        self.setting = setting

    def score(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        """Scores of all experts for all tokens."""
        raise AssertionError(f"{type(self).__name__} overrides neither score nor forward")

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        """Chosen experts, int64 [T, K]."""
        raise AssertionError(f"{type(self).__name__} overrides neither select nor forward")

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        """Factors of the chosen experts' outputs, float32 [T, K]."""
        raise AssertionError(f"{type(self).__name__} overrides neither weigh nor forward")

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Routes T tokens.

        Args:
            x_TD: hidden states, any floating dtype.
            context: labels, ids and positions of the same tokens.
        """
        scores = self.score(x_TD, context)
        expert_ids_TK = self.select(scores, context)
        weights_TK = self.weigh(scores, expert_ids_TK)
        return RoutingDecision(expert_ids_TK, weights_TK, scores.probabilities_TE, scores.logits_TE)

    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        """Called once per training micro-batch with the router's own decision, never under recomputation."""

    def finish_step(self, counts_E: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Called once per optimizer step, on all ranks: the place for state that follows the data.

        Args:
            counts_E: assignments of the global batch, int64.
            mean_over_ranks: mean of a tensor over the data-parallel ranks.
        """


ROUTERS: Registry[Router] = Registry("router")
