"""The former place of what `routing.learned` weighs with, for routers that were written after the published example."""

from moe_testbed.routing.learned import gathered, normalises, softmax_over_chosen, uniform
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen

__all__ = ["gathered", "gathered_where_chosen", "normalises", "softmax_over_chosen", "uniform"]
