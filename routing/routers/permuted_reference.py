"""The reference's structure without its information."""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.parts.hashing import choice_from_keys, cumulative_thresholds
from moe_testbed.routing.routers.reference import Reference, ReferenceConfig


class PermutedReferenceConfig(ReferenceConfig):
    """Options of ``permuted_reference``."""

    name: str = "permuted_reference"


@ROUTERS.register("permuted_reference")
class PermutedReference(Reference):
    """``reference`` with the labels permuted among the sequences: the control of the reference's lead.

    The tokens of one sequence that share a group in ``reference`` share one here, but it is drawn for each (sequence,
    reference's group) with the groups' shares of the mix. The draw is a function of (seed, sequence, reference's
    group), the same in all layers.

    Oracle: ``route_permuted_reference`` in tests/routing/oracles.py.
    """

    Config = PermutedReferenceConfig
    config: PermutedReferenceConfig
    thresholds_J: Tensor

    def __init__(self, config: PermutedReferenceConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        thresholds_J = cumulative_thresholds(self.groups.shares(setting.domain_weights))
        self.register_buffer("thresholds_J", thresholds_J, persistent=False)

    def group_T(self, context: RoutingContext) -> Tensor:
        return choice_from_keys(self.thresholds_J, self.setting.seed, context.sequence_T, self.own_group_T(context))
