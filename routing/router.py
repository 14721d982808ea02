"""The router: score, select, weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from moe_testbed.routing.records import LayerStep, Noise, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.registry import Registry


class Capability(str, Enum):
    """What balancers may need of a router; the values are the words of messages."""

    SCORES = "scores of all experts"
    SELECTION_BIAS = "a selection that takes a bias"
    VECTORS = "one vector per expert"
    NOISE = "noise in its scores"
    RELU_GATES = "gates that are the positive part of its scores"


class RouterConfig(BaseModel, extra="forbid", frozen=True):
    """Options that every router has; its properties say what the rest of the testbed must know of the router."""

    name: str = Field(description="registered name of the router")

    @property
    def provides(self) -> frozenset[Capability]:
        """What balancers can act on. ``SCORES`` means that decisions carry probabilities and logits."""
        return frozenset({Capability.SCORES})

    @property
    def causal(self) -> bool:
        """In evaluation a token's route does not change when later tokens change."""
        return True

    @property
    def needs_domains(self) -> bool:
        """The router reads domain labels."""
        return False

    @property
    def learned(self) -> bool:
        """The routing is learned from the data (neither prescribed nor fixed), so that the router competes with the
        reference."""
        return True

    @property
    def varying_top_k(self) -> bool:
        """Tokens may use more or fewer experts than ``top_k``; decisions are as wide as the widest choice."""
        return False


@dataclass(frozen=True)
class Scores:
    """What the selection and the weights are drawn from.

    Attributes:
        logits_TE: raw scores, float32.
        affinity_TE: scores in the form that is compared and weighted (softmax probabilities, sigmoids), float32.
        probabilities_TE: affinity normalised to sum 1 per token, float32; what the balancers see.
        from_logits: makes the scores from logits, as these ones were made; -inf is the logit of an expert that is not
            there.
        noise: what the logits are made of, if they are noisy.
    """

    logits_TE: Tensor
    affinity_TE: Tensor
    probabilities_TE: Tensor
    from_logits: Callable[[Tensor], Scores]
    noise: Noise | None = None

    @classmethod
    def by_softmax(cls, logits_TE: Tensor, noise: Noise | None = None) -> Scores:
        """Affinities and probabilities are ``softmax(z)``."""
        probabilities_TE = logits_TE.softmax(-1)
        return cls(logits_TE, probabilities_TE, probabilities_TE, cls.by_softmax, noise)

    @classmethod
    def by_sigmoid(cls, logits_TE: Tensor) -> Scores:
        """Affinities are ``s = sigmoid(z)``, probabilities ``s / sum(s)``."""
        affinity_TE = logits_TE.sigmoid()
        return cls(logits_TE, affinity_TE, shares_of_sigmoids(affinity_TE, logits_TE), cls.by_sigmoid)

    def without(self, barred_TE: Tensor) -> Scores:
        """The scores as they would be if each token's barred experts were not there.

        A token with no expert left keeps its scores: whatever it chooses is barred, and left to
        :func:`~moe_testbed.routing.layer.without_barred`.
        """
        left_T1 = (~barred_TE & (self.logits_TE > float("-inf"))).any(-1, keepdim=True)
        return self.from_logits(self.logits_TE.masked_fill(barred_TE & left_T1, float("-inf")))

    def for_selection(self) -> Scores:
        """The same with affinities of -inf where the logits are: a bias could lift an affinity of 0 over another, but
        not -inf."""
        absent_TE = self.logits_TE == float("-inf")
        return replace(self, affinity_TE=self.affinity_TE.masked_fill(absent_TE, float("-inf")))


def shares_of_sigmoids(affinity_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """``s / sum(s)`` of ``s = sigmoid(z)``, by ``softmax(log s)`` for a token of which all s underflow."""
    sum_T1, limits = affinity_TE.sum(-1, keepdim=True), torch.finfo(affinity_TE.dtype)
    by_logarithm_TE = nn.functional.logsigmoid(logits_TE.clamp(min=limits.min)).softmax(-1)
    whole_T1 = sum_T1 >= limits.tiny
    return torch.where(whole_T1, affinity_TE / sum_T1.where(whole_T1, 1.0), by_logarithm_TE)


class KeepsBufferDtype(nn.Module):
    """A module whose buffers move between devices but never between dtypes.

    Parameters that are cast to bfloat16 have a float32 copy in the optimizer; the buffers of routers and balancers
    (biases, moving averages) have none, and ``model.bfloat16()`` would round away their steps of 1e-3.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Router(KeepsBufferDtype):
    """Base of all routers: three decisions, each a method that a router replaces without touching the others.

    A router without scores (hash, random) overrides :meth:`forward` instead.

    State that follows the data lives in buffers, so that checkpoints carry it, and changes in :meth:`finish_step` only,
    so that all micro-batches of a step are routed alike, also when a layer is recomputed in the backward pass. Whatever
    is random is drawn by hashing (seed, layer, sequence, position), never from torch's generator.

    Attributes:
        Config: class of the router's options.
    """

    Config: ClassVar[type[RouterConfig]] = RouterConfig

    def __init__(self, config: Any, setting: RouterSetting) -> None:
        super().__init__()
        self.config = config
        self.setting = setting

    def __init_subclass__(cls) -> None:
        """Makes ``vectors_ED``, the name that :meth:`vectors_EX` had in other people's routers, mean the same."""
        super().__init_subclass__()
        for given, other in (("vectors_EX", "vectors_ED"), ("vectors_ED", "vectors_EX")):
            if given in vars(cls):
                setattr(cls, other, vars(cls)[given])

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        """Scores of all experts for all tokens."""
        raise AssertionError(f"{type(self).__name__} overrides neither score nor forward")

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        """Returns the chosen experts, int64 [T, K]."""
        raise AssertionError(f"{type(self).__name__} overrides neither select nor forward")

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        """Returns the factors of the chosen experts' outputs, float32 [T, K]."""
        raise AssertionError(f"{type(self).__name__} overrides neither weigh nor forward")

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        """Routes T tokens.

        Args:
            x_TM: hidden states, any floating dtype.
            context: labels, ids and positions of the same tokens, and what they may not use. A router without scores
                has no second choice and may pay no heed to that; what it should not have chosen is taken from it.
        """
        scores = offered = self.score(x_TM, context)
        if (barred_TE := context.barred_TE) is not None:
            scores = scores.without(barred_TE)
            offered = scores.for_selection()
        expert_ids_TK = self.select(offered, context)
        weights_TK = self.weigh(scores, expert_ids_TK)
        return RoutingDecision(
            expert_ids_TK, weights_TK, scores.probabilities_TE, scores.logits_TE, self.vectors_EX(), scores.noise
        )

    def vectors_EX(self) -> Tensor | None:
        """The vector that stands for each expert in the score; None without such vectors."""
        return None

    vectors_ED = vectors_EX

    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        """Is called once per training micro-batch with the router's own decision, never under recomputation."""

    def finish_step(self, step: LayerStep) -> None:
        """Called once per optimizer step, on all ranks: the place where state changes."""


ROUTERS: Registry[Router] = Registry("router", Router)
