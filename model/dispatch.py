"""Dispatch: sort the assignments by expert, send them to the ranks that hold these experts, and bring the results back
to the tokens; and which assignments an expert takes if the number of its slots is bounded.

Shape legend: T tokens, K choices, A assignments, E experts, R ranks of an expert-parallel group, e experts of a rank, M
model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.routing.records import NO_EXPERT


@dataclass(frozen=True)
class DispatchPlan:
    """Where each assignment goes; the record that combining needs.

    Attributes:
        choice_A: every assignment in sorted order as the number ``t * K + k`` of token t's choice k, int64.
        token_A: its token, int64.
        row_TK: row of every choice in sorted order, int64; A for a choice without an expert.
        counts_E: assignments of each expert, int64.
    """

    choice_A: Tensor
    token_A: Tensor
    row_TK: Tensor
    counts_E: Tensor


def plan_dispatch(expert_ids_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Sorts the assignments by expert; within an expert by token. No gradient."""
    T, K = expert_ids_TK.shape
    flat = expert_ids_TK.reshape(-1)
    counts = torch.bincount(flat - NO_EXPERT, minlength=num_experts + 1)
    order = flat.argsort(stable=True)
    unused = int(counts[0])
    row = torch.empty_like(order)
    # NO_EXPERT sorts first: those choices get row A, a row of zeros.
    row[order] = torch.arange(T * K, device=order.device) - unused
    row = torch.where(row < 0, T * K - unused, row)
    choice_A = order[unused:]
    return DispatchPlan(choice_A, choice_A // K, row.view(T, K), counts[1:])


class _Gather(torch.autograd.Function):
    """Rows of x by token. Backward sums by gathering, which is cheaper than scattering."""

    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, token_A: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TM.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(gradients[0], row_TK), None, None


class _Combine(torch.autograd.Function):
    """Sum of each token's rows: the transpose of :class:`_Gather`."""

    @staticmethod
    def forward(ctx: Any, y_AM: Tensor, token_A: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_A)
        return _sum_rows(y_AM, row_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (token_A,) = ctx.saved_tensors
        return gradients[0].index_select(0, token_A), None, None


def _sum_rows(y_AM: Tensor, row_TK: Tensor) -> Tensor:
    """``sum_k y[row_tk]``, [T, M]."""
    if len(y_AM) < row_TK.numel():
        # A choice without an expert reads a row of zeros.
        y_AM = torch.cat([y_AM, y_AM.new_zeros(1, y_AM.shape[1])])
    return F.embedding_bag(row_TK, y_AM, mode="sum")


def gather_rows(x_TM: Tensor, plan: DispatchPlan) -> Tensor:
    """Returns every assignment's hidden state, sorted by expert, [A, M]."""
    gathered: Tensor = _Gather.apply(x_TM, plan.token_A, plan.row_TK)
    return gathered


def gather_weights(weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Returns every assignment's weight, sorted by expert, [A]."""
    return weights_TK.reshape(-1).index_select(0, plan.choice_A)


def combine_rows(y_AM: Tensor, plan: DispatchPlan) -> Tensor:
    """Returns the sum of every token's expert outputs, [T, M]."""
    combined: Tensor = _Combine.apply(y_AM, plan.token_A, plan.row_TK)
    return combined


def outputs_by_choice(y_AM: Tensor, plan: DispatchPlan) -> Tensor:
    """Returns every choice's row, [T, K, M], 0 for a choice without an expert."""
    padded = torch.cat([y_AM, y_AM.new_zeros(1, y_AM.shape[1])])
    return F.embedding(plan.row_TK, padded)


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
