"""One layer's routing: what its router sees, what it decides, and which experts its tokens may not use.

Shape legend: T tokens, M model width, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.guard import checked
from moe_testbed.routing.records import NO_EXPERT, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Router
from moe_testbed.routing.unit import RouterInput


class LayerRouter(nn.Module):
    """A layer's router and what it is shown; no decision leaves it unchecked."""

    def __init__(self, config: RoutingConfig, setting: RouterSetting) -> None:
        super().__init__()
        self.shown = RouterInput(
            config.unit, config.pooling, config.first_tokens, config.input, setting.hidden_size, len(setting.domains)
        )
        self.router: Router = ROUTERS.get(config.router.name)(config.router, setting)

    def forward(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        """The decision for T tokens. Raises RouterError if what the router returns is none."""
        # By position: other people's routers may name their arguments as they like.
        decision = self.router(*self.shown(x_TM, context))
        setting, config = self.router.setting, self.router.config
        return checked(decision, setting.num_experts, setting.top_k, len(x_TM), config, context, self.training)


def make_layer_router(config: RoutingConfig, setting: RouterSetting) -> LayerRouter:
    """The routing of a layer, on the default device.

    On the meta device tensors have no numbers. A router that looks at some while it is built, to lay out a table, say,
    is built on the CPU instead.
    """
    if torch.get_default_device().type != "meta":
        return LayerRouter(config, setting)
    try:
        return LayerRouter(config, setting)
    except (NotImplementedError, RuntimeError):
        with torch.device("cpu"):
            return LayerRouter(config, setting)


def without_barred(decision: RoutingDecision, barred_TE: Tensor) -> RoutingDecision:
    """The decision with ``NO_EXPERT`` and weight 0 where a token chose an expert that it may not use.

    Routers with scores choose the next best expert by themselves (see :meth:`Router.forward`). What is left for here is
    a token with fewer than K experts to choose among, a router without scores, and a layer that follows the decision of
    an earlier one: none of them has a next best. The other weights stay as they are.

    Args:
        decision: the decision of any router.
        barred_TE: the experts that each token may not use, bool.
    """
    if decision.logits_TE is not None:
        # For want of another a router may have chosen what the token may never use, such as another domain's expert.
        barred_TE = barred_TE | (decision.logits_TE == float("-inf"))
    ids_TK = decision.expert_ids_TK
    taken_TK = barred_TE.gather(-1, ids_TK.clamp(min=0)) & (ids_TK != NO_EXPERT)
    return replace(
        decision,
        expert_ids_TK=ids_TK.masked_fill(taken_TK, NO_EXPERT),
        weights_TK=decision.weights_TK.masked_fill(taken_TK, 0.0),
    )
