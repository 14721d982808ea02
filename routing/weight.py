"""The former place of what `routing.learned` weighs with, for routers that were written after the published example."""

from moe_testbed.routing.learned import gathered, normalises, uniform
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen
from moe_testbed.routing.routers.top_k_softmax import softmax_over_chosen

__all__ = ["gathered", "gathered_where_chosen", "normalises", "softmax_over_chosen", "uniform"]
