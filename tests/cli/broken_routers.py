"""One router or more for each property that violates it, and the good ones that they start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_testbed.routing.learned import select_top_k
from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Capability, Router, RouterConfig, Scores
from moe_testbed.routing.routers.parts.hashing import uniform_from_keys
from moe_testbed.routing.routers.top_k import TopK, TopKConfig


def broken(property: str, words: str) -> Callable[[type[Router]], type[Router]]:
    """Registers a class below as one that violates a property, and what must be said of it."""

    def add(cls: type[Router]) -> type[Router]:
        BROKEN.append((cls, property, words))
        return cls

    return add


BROKEN: list[tuple[type[Router], str, str]] = []


class Plain(TopK):
    """A good router, in the form that the broken ones change."""

    def change(self, decision: RoutingDecision, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        return decision

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        return self.change(super().forward(x_TM, context), x_TM, context)


@broken("builds", "cannot be built: ValueError: needs a prime number of experts")
class NeedsPrimes(Plain):
    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        raise ValueError("needs a prime number of experts")


@broken("decision", "returned expert 16")
class OneTooFar(Plain):
    def change(self, decision: RoutingDecision, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        return replace(decision, expert_ids_TK=decision.expert_ids_TK + 1)


@broken("decision", "raises KeyError: 'surprise'")
class Raises(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        raise KeyError("surprise")


@broken("experts", "uses an expert twice: [")
class Twice(Plain):
    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.affinity_TE, 1, context.bias_E).expand(-1, 2)


@broken("probabilities", "sum to 2, not 1")
class SumsToTwo(Plain):
    def change(self, decision: RoutingDecision, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        assert decision.probabilities_TE is not None
        return replace(decision, probabilities_TE=2 * decision.probabilities_TE)


@broken("provides", "vectors_EX() does not return one row for each")
class WithoutVectors(Plain):
    def vectors_EX(self) -> Tensor:
        return self.scorer.weight[:3]


@broken("provides", "context.bias_E changes nothing")
class DeafToBias(Plain):
    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.affinity_TE, self.setting.top_k)


class ClaimsNoise(TopKConfig):
    @property
    def provides(self) -> frozenset[Capability]:
        return frozenset({Capability.SCORES, Capability.NOISE})


@broken("provides", "carries no noise")
class WithoutNoise(Plain):
    Config = ClaimsNoise


@broken("gradients", "neither weights nor scores carry a gradient")
class Detached(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        with torch.no_grad():
            return super().score(x_TM, context)


@broken("gradients", "no gradient reaches 'spare'")
class UnusedParameter(Plain):
    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.spare = torch.nn.Parameter(torch.zeros(3))


@broken("gradients", "the weights carry no gradient, so that the model's loss")
class DetachedWeights(Plain):
    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return super().weigh(scores, expert_ids_TK).detach()


@broken("finite differences", "of its size from finite differences")
class HalfTheGradient(Plain):
    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        weights_TK = super().weigh(scores, expert_ids_TK)
        return weights_TK * weights_TK.detach()


@broken("recomputation", "its gradients are others")
class CountsCalls(Plain):
    calls = 0

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        self.calls += 1
        weights_TK = super().weigh(scores, expert_ids_TK) / self.calls
        return weights_TK * weights_TK


@broken("causality", "when the tokens from position 1 on change, the experts of earlier tokens change")
class SeesTheFuture(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        x_BLM = x_TM.float().view(*context.token_ids_BL.shape, -1)
        if context.valid_BL is not None:
            x_BLM = x_BLM * context.valid_BL[..., None]
        return super().score((x_BLM - x_BLM.mean(1, keepdim=True)).flatten(0, 1), context)


@broken("micro-batches", "when it is routed with 0 others instead of 3")
class SeesOtherSequences(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        first_BM = x_TM.float().view(*context.token_ids_BL.shape, -1)[:, 0]
        return super().score(x_TM + 5 * first_BM.mean(0), context)


@broken("labels", "without domain labels its experts change in training")
class ReadsLabels(Plain):
    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        shift_T1 = context.domain_BL.reshape(-1, 1)
        return (super().select(scores, context) + shift_T1) % self.setting.num_experts


@broken("determinism", "draws from torch's generator in training")
class DrawsNoise(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return super().score(x_TM + torch.rand_like(x_TM), context)


class Counting(Plain):
    """A good router with a buffer that the broken ones change at the wrong time."""

    seen: Tensor

    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.register_buffer("seen", torch.zeros(setting.num_experts))

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        scores = super().score(x_TM, context)
        return replace(scores, affinity_TE=scores.affinity_TE / (1 + self.seen))


@broken("determinism", "changes its buffer 'seen' while it decides in training")
class CountsInForward(Counting):
    def change(self, decision: RoutingDecision, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        self.seen += 1
        return decision


@broken("optimizer step", "after observe() the experts of the same tokens are others")
class ChangesInObserve(Counting):
    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        self.seen += torch.bincount(decision.expert_ids_TK.reshape(-1), minlength=len(self.seen))


@broken("state", "restored from its state_dict it chooses other experts")
class KeepsStateOutside(Plain):
    counts_E: Tensor | None = None

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        scores = super().score(x_TM, context)
        return scores if self.counts_E is None else replace(scores, affinity_TE=scores.affinity_TE / self.counts_E)

    def finish_step(self, step: LayerStep) -> None:
        self.counts_E = 1.0 + step.counts_E


@broken("state", "trained for one more step it chooses other experts")
class NeverForgets(Counting):
    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.register_buffer("gathered", torch.zeros(setting.num_experts), persistent=False)

    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        ids_TK = decision.expert_ids_TK if context.valid_T is None else decision.expert_ids_TK[context.valid_T]
        self.gathered += torch.bincount(ids_TK.reshape(-1), minlength=len(self.gathered))

    def finish_step(self, step: LayerStep) -> None:
        self.seen.copy_(self.gathered)


@broken("precision", "is torch.bfloat16")
class RoundsItsScores(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        logits_TE = torch.nn.functional.linear(x_TM, self.scorer.weight.to(x_TM.dtype))
        return Scores.by_softmax(logits_TE)


@broken("device", "create tensors with device=x_TM.device")
class StaysOnTheHost(Plain):
    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        scores = super().score(x_TM, context)
        return replace(scores, affinity_TE=scores.affinity_TE + torch.zeros(self.setting.num_experts))


@broken("padding", "its buffer 'seen' depends on what stands in the padding")
class CountsPadding(Counting):
    def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.register_buffer("gathered", torch.zeros(setting.num_experts), persistent=False)

    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        self.gathered += torch.bincount(decision.expert_ids_TK.reshape(-1), minlength=len(self.gathered))

    def finish_step(self, step: LayerStep) -> None:
        self.seen.copy_(self.gathered)
        self.gathered.zero_()


class StrangeConfig(TopKConfig):
    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"name": "another"}


@broken("config", "written as JSON and read again, is another")
class ForgetsItsConfig(Plain):
    Config = StrangeConfig


class SaysNotCausal(TopKConfig):
    @property
    def causal(self) -> bool:
        return False


class SaysLearned(RouterConfig):
    @property
    def provides(self) -> frozenset[Capability]:
        return frozenset()


class SaysNotLearned(SaysLearned):
    @property
    def learned(self) -> bool:
        return False


class Draws(Router):
    """Experts by a hash, without parameters."""

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        experts_E = torch.arange(self.setting.num_experts, device=x_TM.device)
        draws_TE = uniform_from_keys(1, context.sequence_T[:, None], context.position_BL.reshape(-1, 1), experts_E)
        expert_ids_TK = select_top_k(draws_TE, self.setting.top_k)
        return RoutingDecision(expert_ids_TK, torch.ones_like(expert_ids_TK, dtype=torch.float32))
