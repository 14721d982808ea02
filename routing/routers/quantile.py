"""Prices per expert that are quantiles of what tokens would pay."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, gathered, normalises, select_top_k
from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, RouterConfig, Scores


class QuantileConfig(RouterConfig):
    """Options of ``quantile``."""

    name: str = "quantile"
    normalise: bool | None = Field(
        None, description="divide the weights of the chosen experts by their sum; default: where top_k is more than 1"
    )

    @property
    def provides(self) -> frozenset[Capability]:
        """Scores and the rows of W; the selection's bias is the router's own."""
        return frozenset({Capability.SCORES, Capability.VECTORS})


@torch.no_grad()
def quantile_prices(logits_TE: Tensor, prices_E: Tensor, top_k: int) -> Tensor:
    """One step of coordinate descent on the dual of the balanced assignment.

    ``alpha_t`` is the (k+1)-th largest of ``z_t - beta``, what an expert must offer token t to be among its best k.
    The new ``beta_i`` is the (T k / E + 1)-th largest of ``z_i - alpha``, so that T k / E tokens (rounded down) would
    choose expert i if the other prices stayed.

    Args:
        logits_TE: z, T at least 1.
        prices_E: beta.
        top_k: k, less than E.

    Returns:
        The new beta, [E].
    """
    T, E = logits_TE.shape
    alpha_T1 = (logits_TE - prices_E).kthvalue(E - top_k, dim=1, keepdim=True).values
    surplus_ET = (logits_TE - alpha_T1).t().contiguous()
    return surplus_ET.kthvalue(T - T * top_k // E, dim=1).values


@ROUTERS.register("quantile")
class Quantile(LinearRouter):
    """``S = topk(z - beta)`` with ``z = W x``; ``g_i = p_i`` of ``p = softmax(z)``, divided by ``sum_S p`` if
    ``normalise``. After every step beta is set to the quantiles of :func:`quantile_prices`, averaged over the step's
    micro-batches and ranks by their tokens, less their mean, which changes no choice.

    Megatron-LM's quantile balancing. Computed inside the batch that it routes, beta would make that batch even, and
    every route depend on tokens that come later. Here it is what the last step's tokens asked for: the load is even
    as far as that step foretells this one, and the routing is causal, the same function in training and in evaluation.

    Oracle: ``route_quantile`` in tests/routing/oracles_pool.py.

    Raises:
        ValueError: top_k is the number of experts, which leaves nothing to choose.
    """

    Config = QuantileConfig
    config: QuantileConfig
    beta_E: Tensor
    beta_sum_E: Tensor
    token_sum: Tensor

    def __init__(self, config: QuantileConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        if setting.top_k == setting.num_experts:
            raise ValueError(
                f"routing.router.name is quantile with model.moe.top_k {setting.top_k}, which is all of "
                "model.moe.num_experts: there is nothing to choose and no next best; lower top_k, or use top_k"
            )
        self.normalise = normalises(config.normalise, setting.top_k)
        self.register_buffer("beta_E", torch.zeros(setting.num_experts))
        self.register_buffer("beta_sum_E", torch.zeros(setting.num_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("token_sum", torch.zeros((), dtype=torch.float64), persistent=False)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.logits_TE, self.setting.top_k, -self.beta_E)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered(scores.affinity_TE, expert_ids_TK, self.normalise)

    def observe(self, decision: RoutingDecision, context: RoutingContext) -> None:
        assert decision.logits_TE is not None
        logits_TE = decision.logits_TE.detach()
        if context.valid_T is not None:
            logits_TE = logits_TE[context.valid_T]
        if len(logits_TE):
            self.beta_sum_E += len(logits_TE) * quantile_prices(logits_TE, self.beta_E, self.setting.top_k)
            self.token_sum += len(logits_TE)

    def finish_step(self, step: LayerStep) -> None:
        sums = step.mean_over_ranks(torch.cat([self.beta_sum_E, self.token_sum[None]]))
        # Without any token, 0 / 0: the old prices stay.
        beta_E = sums[:-1] / sums[-1]
        self.beta_E.copy_(torch.where(sums[-1] > 0, beta_E - beta_E.mean(), self.beta_E))
        self.beta_sum_E.zero_()
        self.token_sum.zero_()
