"""Grouped experts against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.model.experts import GroupedExperts, weighted_swiglu

D, F_SIZE = 8, 12


def make_experts(num_experts: int = 4) -> GroupedExperts:
    experts = GroupedExperts(num_experts, D, F_SIZE, "ep_size_1")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def naive(experts: GroupedExperts, x_AD: Tensor, counts_X: list[int]) -> Tensor:
    blocks = x_AD.split(counts_X)
    return torch.cat(
        [
            (F.silu(block @ experts.gate_up[x, :, :F_SIZE]) * (block @ experts.gate_up[x, :, F_SIZE:]))
            @ experts.down[x]
            for x, block in enumerate(blocks)
        ]
    )


@pytest.mark.parametrize("counts_X", [[3, 1, 5, 2], [0, 4, 0, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_outputs_and_gradients_equal_a_loop_over_experts(counts_X: list[int]) -> None:
    experts = make_experts()
    x_AD = torch.randn(sum(counts_X), D, requires_grad=True)
    weights_A = torch.rand(sum(counts_X), requires_grad=True)
    upstream_AD = torch.randn(sum(counts_X), D)
    inputs = (x_AD, weights_A, *experts.parameters())

    mine_AD = experts.grouped(x_AD, torch.tensor(counts_X), weights_A)
    oracle_AD = weights_A[:, None] * naive(experts, x_AD, counts_X)
    torch.testing.assert_close(mine_AD, oracle_AD)
    mine = torch.autograd.grad(mine_AD, inputs, upstream_AD)
    oracle = torch.autograd.grad(oracle_AD, inputs, upstream_AD)
    for mine_gradient, oracle_gradient in zip(mine, oracle, strict=True):
        torch.testing.assert_close(mine_gradient, oracle_gradient)


def test_weighted_swiglu_s_gradients_equal_finite_differences() -> None:
    gate_up_AF2 = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    weights_A = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_up_AF2, weights_A))


def test_buffers_equal_a_loop_over_experts() -> None:
    experts = make_experts(3)
    x_RXCD = torch.randn(2, 3, 5, D, requires_grad=True)
    upstream = torch.randn(2, 3, 5, D)
    inputs = (x_RXCD, *experts.parameters())

    mine_RXCD = experts(x_RXCD)
    oracle_RXCD = torch.stack([naive(experts, x_XCD.reshape(-1, D), [5, 5, 5]).view(3, 5, D) for x_XCD in x_RXCD])
    torch.testing.assert_close(mine_RXCD, oracle_RXCD)
    for mine, oracle in zip(
        torch.autograd.grad(mine_RXCD, inputs, upstream),
        torch.autograd.grad(oracle_RXCD, inputs, upstream),
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
