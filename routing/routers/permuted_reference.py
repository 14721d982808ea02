"""The reference's structure without its information."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.hashing import uniform_from_keys
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.reference import Reference, ReferenceConfig


class PermutedReferenceConfig(ReferenceConfig):
    """Options of ``permuted_reference``."""

    name: str = "permuted_reference"


@ROUTERS.register("permuted_reference")
class PermutedReference(Reference):
    """``reference`` with the labels permuted among the sequences: the control of the reference's lead.

    The tokens of one sequence that share a label share a group, as in ``reference``, but the group is drawn for each
    (sequence, label) with the mix's weights instead of being the domain's own. The draw is a function of (seed,
    sequence, label), the same in all layers.
    """

    Config = PermutedReferenceConfig
    config: PermutedReferenceConfig
    cumulative_weights_D: Tensor

    def __init__(self, config: PermutedReferenceConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        weights_D = torch.tensor(setting.domain_weights, dtype=torch.float64)
        self.register_buffer("cumulative_weights_D", (weights_D.cumsum(0) / weights_D.sum()).float(), persistent=False)

    def domain_T(self, context: RoutingContext) -> Tensor:
        draw_T = uniform_from_keys(context.sequence_T, context.domain_BL.reshape(-1), self.setting.seed)
        last = len(self.setting.domains) - 1
        return torch.searchsorted(self.cumulative_weights_D.float(), draw_T, right=True).clamp(max=last)
