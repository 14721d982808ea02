"""A router that is never trained."""

from __future__ import annotations

from moe_testbed.routing.records import RouterSetting
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.top_k import TopK, TopKConfig


class FrozenConfig(TopKConfig):
    """Options of ``frozen``."""

    name: str = "frozen"

    @property
    def learned(self) -> bool:
        """W is not trained."""
        return False


@ROUTERS.register("frozen")
class Frozen(TopK):
    """``top_k`` with W as initialised (Fan et al., arXiv 2402.13089): the hidden states still move, the
    router's map does not.

    Oracle: ``route_top_k`` in tests/routing/oracles.py.
    """

    Config = FrozenConfig
    config: FrozenConfig

    def __init__(self, config: FrozenConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting, trainable=False)
