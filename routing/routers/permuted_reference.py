"""The reference's structure without its information."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.hashing import choice_from_keys, cumulative_thresholds
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
    thresholds_D: Tensor

    def __init__(self, config: PermutedReferenceConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.register_buffer("thresholds_D", cumulative_thresholds(setting.domain_weights), persistent=False)

    def domain_T(self, context: RoutingContext) -> Tensor:
        return choice_from_keys(self.thresholds_D, self.setting.seed, context.sequence_T, context.domain_BL.reshape(-1))
