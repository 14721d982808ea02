"""Grouped experts against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.model.experts import GroupedExperts, weighted_swiglu

M, F_SIZE = 8, 12


def make_experts(num_experts: int = 4) -> GroupedExperts:
    experts = GroupedExperts(num_experts, M, F_SIZE, "ep_size_1")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def naive(experts: GroupedExperts, x_AM: Tensor, counts_e: list[int]) -> Tensor:
    blocks = x_AM.split(counts_e)
    return torch.cat(
        [
            (F.silu(block @ experts.gate_up[x, :, :F_SIZE]) * (block @ experts.gate_up[x, :, F_SIZE:]))
            @ experts.down[x]
            for x, block in enumerate(blocks)
        ]
    )


@pytest.mark.parametrize("counts_e", [[3, 1, 5, 2], [0, 4, 0, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_outputs_and_gradients_equal_a_loop_over_experts(counts_e: list[int]) -> None:
    experts = make_experts()
    x_AM = torch.randn(sum(counts_e), M, requires_grad=True)
    weights_A = torch.rand(sum(counts_e), requires_grad=True)
    upstream_AM = torch.randn(sum(counts_e), M)
    inputs = (x_AM, weights_A, *experts.parameters())

    mine_AM = experts.grouped(x_AM, torch.tensor(counts_e), weights_A)
    oracle_AM = weights_A[:, None] * naive(experts, x_AM, counts_e)
    torch.testing.assert_close(mine_AM, oracle_AM)
    mine = torch.autograd.grad(mine_AM, inputs, upstream_AM)
    oracle = torch.autograd.grad(oracle_AM, inputs, upstream_AM)
    for mine_gradient, oracle_gradient in zip(mine, oracle, strict=True):
        torch.testing.assert_close(mine_gradient, oracle_gradient)


def test_weighted_swiglu_s_gradients_equal_finite_differences() -> None:
    gate_up_AF2 = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    weights_A = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_up_AF2, weights_A))


def test_buffers_equal_a_loop_over_experts() -> None:
    experts = make_experts(3)
    x_ReXM = torch.randn(2, 3, 5, M, requires_grad=True)
    upstream = torch.randn(2, 3, 5, M)
    inputs = (x_ReXM, *experts.parameters())

    mine_ReXM = experts(x_ReXM)
    oracle_ReXM = torch.stack([naive(experts, x_eXM.reshape(-1, M), [5, 5, 5]).view(3, 5, M) for x_eXM in x_ReXM])
    torch.testing.assert_close(mine_ReXM, oracle_ReXM)
    for mine, oracle in zip(
        torch.autograd.grad(mine_ReXM, inputs, upstream),
        torch.autograd.grad(oracle_ReXM, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, oracle)


def test_state_has_one_entry_per_expert_and_loads_back() -> None:
    experts, other = make_experts(), make_experts()
    state = experts.state_dict()
    assert set(state) == {f"deepspeed_experts.{x}.{name}" for x in range(4) for name in ("gate_up", "down")}
    for x in range(4):
        assert torch.equal(state[f"deepspeed_experts.{x}.down"], experts.down[x])
    other.load_state_dict(state)
    for name, parameter in experts.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter)


def test_a_missing_expert_is_told() -> None:
    state = make_experts().state_dict()
    del state["deepspeed_experts.2.down"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*down"):
        make_experts().load_state_dict(state)


def test_parameters_are_marked_for_their_expert_parallel_group() -> None:
    for parameter in make_experts().parameters():
        assert parameter.allreduce is False  # type: ignore[attr-defined]
        assert parameter.group_name == "ep_size_1"  # type: ignore[attr-defined]
