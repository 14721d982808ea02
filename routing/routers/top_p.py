"""As many experts as a share of the probability takes.

Shape legend: T tokens, E experts, W places for choices.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.learned import LinearRouter, normalises
from moe_testbed.routing.records import NO_EXPERT, LayerStep, RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Capability, RouterConfig, Scores
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen

# Keeps the controller from running away where K experts cannot be reached, as with K = 1 or K = E.
_LOWEST, _HIGHEST = 1e-4, 1 - 1e-4


class TopPConfig(RouterConfig):
    """Options of ``top_p``."""

    name: str = "top_p"
    rate: float = Field(
        0.3, ge=0, description="how fast tau is moved towards top_k experts per token; 0 leaves it at top_k / E"
    )
    normalise: bool = Field(False, description="divide the weights of the chosen experts by their sum")

    @property
    def provides(self) -> frozenset[Capability]:
        """No bias: the set is one of probabilities."""
        return frozenset({Capability.SCORES, Capability.VECTORS})

    @property
    def varying_top_k(self) -> bool:
        """An undecided token uses more experts."""
        return True


@torch.no_grad()
def select_top_p(probabilities_TE: Tensor, tau: Tensor) -> Tensor:
    """The smallest set of experts whose probabilities sum to at least ``tau``; never empty, as tau is above 0.

    Returns:
        Expert ids, int64 [T, W], best first, ``NO_EXPERT`` where a token uses fewer than W.
    """
    sorted_TE, ids_TE = probabilities_TE.sort(dim=-1, descending=True, stable=True)
    # An expert is needed if those before it do not reach tau.
    before_TE = sorted_TE.cumsum(-1).roll(1, -1)
    before_TE[:, 0] = 0.0
    needed_TE = before_TE < tau
    return ids_TE.masked_fill(~needed_TE, NO_EXPERT)[:, : int(needed_TE.sum(-1).max())]


@ROUTERS.register("top_p")
class TopP(LinearRouter):
    """``p = softmax(W x)``, S = the smallest set with ``sum_S p >= tau``, ``g_i = p_i``, divided by ``sum_S p`` if
    ``normalise`` (Huang et al., arXiv 2403.07652, equations 4-5, with a fixed tau of 0.4 and unnormalised weights).

    Here a controller sets tau, so that the router costs on average what top-k does: after each optimizer step
    ``logit(tau) += rate * log(K / m)`` with m the experts per token in the global batch, starting from tau = K / E,
    which would be right for uniform p. In logits, since near 1 a little of tau is many experts.

    Oracle: ``route_top_p`` in tests/routing/oracles_learned.py.
    """

    Config = TopPConfig
    config: TopPConfig
    tau: Tensor

    def __init__(self, config: TopPConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.normalise = normalises(config.normalise, setting.top_k)
        tau = torch.tensor(setting.top_k / setting.num_experts, dtype=torch.float64)
        self.register_buffer("tau", tau.clamp(_LOWEST, _HIGHEST))

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return Scores.by_softmax(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_p(scores.probabilities_TE, self.tau)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered_where_chosen(scores.probabilities_TE, expert_ids_TK, self.normalise)

    def finish_step(self, step: LayerStep) -> None:
        used = step.counts_E.sum().double() / step.tokens
        moved = self.tau.logit() + self.config.rate * (self.setting.top_k / used).log()
        self.tau.copy_(moved.sigmoid().clamp(_LOWEST, _HIGHEST))
