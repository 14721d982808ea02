"""Every expert takes the tokens above its own threshold.

Shape legend: T tokens, E experts, K choices on average.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, normalises, select_top_k
from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, RouterConfig, Scores
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen, select_where


class ExpertThresholdConfig(RouterConfig):
    """Options of ``expert_threshold``."""

    name: str = "expert_threshold"
    decay: float = Field(0.9, ge=0, lt=1, description="share of the thresholds that one optimizer step keeps")
    normalise: bool = Field(False, description="divide the weights of the chosen experts by their sum")

    @property
    def provides(self) -> frozenset[Capability]:
        """No bias: the thresholds are one already."""
        return frozenset({Capability.SCORES, Capability.VECTORS})

    @property
    def varying_top_k(self) -> bool:
        """A token may be above many thresholds, or above none."""
        return True


def upper_quantile(values_TE: Tensor, share: float) -> Tensor:
    """What ``share`` of each column lies above: the (1 - share) quantile, linear between neighbours. [E].

    Without torch.quantile, which refuses more than 2^24 numbers.
    """
    place = (1 - share) * (len(values_TE) - 1)
    below = int(place)
    highest = values_TE.topk(len(values_TE) - below, dim=0).values
    above_E = highest[max(len(highest) - 2, 0)]
    return torch.lerp(highest[-1], above_E, place - below)


@ROUTERS.register("expert_threshold")
class ExpertThreshold(LinearRouter):
    """``p = softmax(W x)``, ``S = {i: p_i > c_i}``, ``g_i = p_i``, divided by ``sum_S p`` if ``normalise``, with c_i
    expert i's running ``1 - K / E`` quantile of p_i (arXiv 2603.11535).

    Each expert gets K / E of the tokens as with expert choice, and so an even load without any balancer, but a token's
    route hangs on nothing but itself and the past. After each optimizer step ``c <- decay * c + (1 - decay) * q``, in
    the first ones the plain mean of all q so far, with q the mean of the micro-batches' quantiles, weighted by their
    tokens. With few tokens in a micro-batch that mean is off: at K = 2 of 24 experts by 10 % of the load for 64 tokens
    and by 2 % for 512. In the first step, which has no thresholds yet, S = topk(p).

    Oracle: ``route_expert_threshold`` in tests/routing/oracles_learned.py.
    """

    Config = ExpertThresholdConfig
    config: ExpertThresholdConfig
    thresholds_E: Tensor
    steps: Tensor
    quantile_sum_E: Tensor
    tokens: Tensor

    def __init__(self, config: ExpertThresholdConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.normalise = normalises(config.normalise, setting.top_k)
        zeros_E = torch.zeros(setting.num_experts, dtype=torch.float64)
        self.register_buffer("thresholds_E", zeros_E)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Of the running optimizer step; checkpoints are taken between steps.
        self.register_buffer("quantile_sum_E", zeros_E.clone(), persistent=False)
        self.register_buffer("tokens", torch.zeros((), dtype=torch.float64), persistent=False)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        probabilities_TE = scores.probabilities_TE
        if not self.steps:
            return select_top_k(probabilities_TE, self.setting.top_k)
        return select_where(probabilities_TE > self.thresholds_E, probabilities_TE)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered_where_chosen(scores.probabilities_TE, expert_ids_TK, self.normalise)

    @torch.no_grad()
    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        probabilities_TE = decision.probabilities_TE
        assert probabilities_TE is not None
        if context.valid_T is not None:
            probabilities_TE = probabilities_TE[context.valid_T]
        num_tokens = len(probabilities_TE)
        if num_tokens:
            share = self.setting.top_k / self.setting.num_experts
            self.quantile_sum_E += num_tokens * upper_quantile(probabilities_TE, share)
            self.tokens += num_tokens

    def finish_step(self, step: LayerStep) -> None:
        quantile_E = step.mean_over_ranks(self.quantile_sum_E) / step.mean_over_ranks(self.tokens)
        self.steps += 1
        newest = (1.0 / self.steps).clamp(min=1 - self.config.decay)
        self.thresholds_E.lerp_(quantile_E, newest)
        self.quantile_sum_E.zero_()
        self.tokens.zero_()
