"""Exchange: sends sorted rows to the ranks that hold their experts, and the results back.

Shape legend: A assignments, E experts, R ranks of an expert-parallel group, e experts of a rank, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """All-to-all with uneven splits; the backward pass is the same exchange the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        output = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        gradient = gradients[0]
        output = gradient.new_empty(sum(sent), *gradient.shape[1:])
        dist.all_to_all_single(output, gradient.contiguous(), sent, received, group=ctx.group)
        return output, None, None, None


@dataclass(frozen=True)
class ExchangePlan:
    """How the sorted rows of all ranks become the sorted rows of this rank's experts.

    Attributes:
        sent, received: rows per rank of the group.
        order: arrival order -> order by expert, int64.
        counts_e: rows of each of this rank's experts, int64.
    """

    sent: list[int]
    received: list[int]
    order: Tensor
    counts_e: Tensor
    group: dist.ProcessGroup


def plan_exchange(counts_E: Tensor, group: dist.ProcessGroup) -> ExchangePlan:
    """Tells every rank of the group how many rows it will get for each of its experts."""
    ranks = dist.get_world_size(group)
    counts_Re = counts_E.view(ranks, -1)
    arriving_Re = torch.empty_like(counts_Re)
    dist.all_to_all_single(arriving_Re, counts_Re.contiguous(), group=group)
    experts = torch.arange(arriving_Re.shape[1], device=counts_E.device).expand_as(arriving_Re).reshape(-1)
    expert_of_row = experts.repeat_interleave(arriving_Re.reshape(-1))
    return ExchangePlan(
        counts_Re.sum(1).tolist(),
        arriving_Re.sum(1).tolist(),
        expert_of_row.argsort(stable=True),
        arriving_Re.sum(0),
        group,
    )


def send_rows(x_AM: Tensor, plan: ExchangePlan) -> Tensor:
    """Rows to the ranks that hold their experts; what arrives here is sorted by this rank's experts."""
    arrived: Tensor = _Exchange.apply(x_AM, plan.sent, plan.received, plan.group)
    return arrived.index_select(0, plan.order)


def return_rows(y_AM: Tensor, plan: ExchangePlan) -> Tensor:
    """Undoes :func:`send_rows`."""
    returned: Tensor = _Exchange.apply(y_AM.index_select(0, plan.order.argsort()), plan.received, plan.sent, plan.group)
    return returned
