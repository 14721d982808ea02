"""Capacity: which assignments an expert takes if the number of its slots is bounded.

Shape legend: T tokens, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT


def place_in_slots(expert_ids_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Which assignments find one of their expert's slots, bool [T, K], and which slot, int64 [T, K], 0 for the others.

    First choices have precedence over second ones, earlier tokens over later ones (GShard, arXiv 2006.16668, algorithm
    1).
    """
    ids_KT = expert_ids_TK.t()
    flat = ids_KT.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat - NO_EXPERT, minlength=num_experts + 1)
    first_row = counts.cumsum(0) - counts
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=order.device) - first_row[flat[order] - NO_EXPERT]
    kept = (slot < capacity) & (flat != NO_EXPERT)
    return kept.view_as(ids_KT).t(), (slot * kept).view_as(ids_KT).t()
