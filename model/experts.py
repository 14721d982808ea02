"""The experts of one rank as three stacked tensors.

Shape legend: X experts of this rank, A assignments (rows sorted by expert), C capacity, D model width, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WEIGHTS = ("gate", "up", "down")


class GroupedExperts(nn.Module):
    """SwiGLU experts, run as grouped matrix products over rows sorted by expert.

    In state dicts every expert has its own entries, ``deepspeed_experts.<i>.{gate,up,down}``, which is how DeepSpeed's
    checkpoints name experts: each goes into a file of its own, whatever the expert-parallel size.

    Args:
        num_experts: X, the experts that this rank holds.
        group_name: name of DeepSpeed's expert-parallel group; marks the parameters as not replicated over all ranks.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden_size: int, group_name: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, expert_hidden_size, hidden_size))
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_split_by_expert)
        self.register_load_state_dict_pre_hook(_join_experts)

    def grouped(self, x_AD: Tensor, counts_X: Tensor) -> Tensor:
        """Runs row blocks of uneven length.

        Args:
            x_AD: rows sorted by expert.
            counts_X: rows of each expert, int64.
        """
        ends_X = counts_X.cumsum(0).to(torch.int32)
        gate_AF = F.grouped_mm(x_AD, self.gate, offs=ends_X)
        up_AF = F.grouped_mm(x_AD, self.up, offs=ends_X)
        return F.grouped_mm(F.silu(gate_AF) * up_AF, self.down, offs=ends_X)

    def forward(self, x_RXCD: Tensor) -> Tensor:
        """Runs equal buffers of C rows, as DeepSpeed's MoE layer hands them over: [ranks of the group, X, C, D]."""
        R, X, C, D = x_RXCD.shape
        x = x_RXCD.transpose(0, 1).reshape(X, R * C, D)
        y = torch.bmm(F.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up), self.down)
        return y.view(X, R, C, D).transpose(0, 1)


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
