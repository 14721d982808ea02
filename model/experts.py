"""The experts of one rank as two stacked tensors.

Shape legend: e experts of a rank, A assignments, R ranks of an expert-parallel group, X slots of an expert, M model
width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WEIGHTS = ("gate_up", "down")


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_AF2: Tensor, weights_A: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_AF2, weights_A)
        gate_AF, up_AF = gate_up_AF2.chunk(2, dim=-1)
        return F.silu(gate_AF).mul_(up_AF).mul_(weights_A[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_AF2, weights_A = ctx.saved_tensors
        gate_AF, up_AF = gate_up_AF2.chunk(2, dim=-1)
        gradient_AF = gradients[0]
        active_AF = F.silu(gate_AF)
        gate_up_gradient_AF2 = torch.empty_like(gate_up_AF2)
        gate_gradient_AF, up_gradient_AF = gate_up_gradient_AF2.chunk(2, dim=-1)
        torch.mul(gradient_AF, active_AF, out=up_gradient_AF)
        weights_gradient_A = torch.linalg.vecdot(up_gradient_AF.float(), up_AF.float()).to(weights_A.dtype)
        up_gradient_AF.mul_(weights_A[:, None])
        inner_AF = torch.mul(gradient_AF, up_AF).mul_(weights_A[:, None])
        torch.ops.aten.silu_backward.grad_input(inner_AF, gate_AF, grad_input=gate_gradient_AF)
        return gate_up_gradient_AF2, weights_gradient_A


def weighted_swiglu(gate_up_AF2: Tensor, weights_A: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` row by row, [A, F].

    Weighting here rather than after the down-projection is the same, since that is linear, on fewer numbers. Gradients
    are written into the two halves of one tensor, where autograd would build each half with its zeros and add them.

    Args:
        gate_up_AF2: both projections side by side, [A, 2 F].
        weights_A: float32, whatever the dtype of the projections.
    """
    hidden_AF: Tensor = _WeightedSwiGLU.apply(gate_up_AF2, weights_A)
    return hidden_AF


class GroupedExperts(nn.Module):
    """SwiGLU experts, run as grouped matrix products over rows sorted by expert.

    In state dicts every expert has its own entries, ``deepspeed_experts.<i>.{gate_up,down}``, which is how DeepSpeed's
    checkpoints name experts: each goes into a file of its own, whatever the expert-parallel size.

    Args:
        num_experts: e, the experts that this rank holds.
        group_name: name of DeepSpeed's expert-parallel group; marks the parameters as not replicated over all ranks.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden_size: int, group_name: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * expert_hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, expert_hidden_size, hidden_size))
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_split_by_expert)
        self.register_load_state_dict_pre_hook(_join_experts)

    def grouped(self, x_AM: Tensor, counts_e: Tensor, weights_A: Tensor) -> Tensor:
        """Runs row blocks of uneven length and weights their outputs.

        Args:
            x_AM: rows sorted by expert.
            counts_e: rows of each expert, int64.
            weights_A: factor of each row's output.
        """
        if not len(x_AM):
            # grouped_mm refuses no rows at all; all ranks need the gradients, which are zero.
            return weighted_swiglu(x_AM @ self.gate_up[0], weights_A) @ self.down[0]
        ends_e = counts_e.cumsum(0).to(torch.int32)
        hidden_AF = weighted_swiglu(F.grouped_mm(x_AM, self.gate_up, offs=ends_e), weights_A)
        return F.grouped_mm(hidden_AF, self.down, offs=ends_e)

    def forward(self, x_ReXM: Tensor) -> Tensor:
        """Runs equal buffers of X rows, as DeepSpeed's MoE layer hands them over, [R, e, X, M]."""
        R, experts, slots, M = x_ReXM.shape
        x = x_ReXM.transpose(0, 1).reshape(experts, R * slots, M)
        gate, up = torch.bmm(x, self.gate_up).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down)
        return y.view(experts, R, slots, M).transpose(0, 1)


def _split_by_expert(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in _WEIGHTS:
        stacked = state.pop(prefix + name)
        for index in range(len(stacked)):
            state[f"{prefix}deepspeed_experts.{index}.{name}"] = stacked[index]


def _join_experts(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    assert isinstance(module, GroupedExperts)
    for name in _WEIGHTS:
        keys = [f"{prefix}deepspeed_experts.{index}.{name}" for index in range(module.num_experts)]
        if all(key in state for key in keys):
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])
