"""Attention, rotary positions, norms and feed-forward layers against their definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_testbed.model.transformer import Attention, FeedForward, RMSNorm, RotaryPositions

THETA = 100.0


def naive_rotate(x_P: Tensor, position: int, theta: float = THETA) -> Tensor:
    """Pairs (i, i + P/2) turned by ``position * theta^(-2i/P)``."""
    half = len(x_P) // 2
    turned = torch.empty_like(x_P)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_P))
        turned[i] = x_P[i] * math.cos(angle) - x_P[i + half] * math.sin(angle)
        turned[i + half] = x_P[i] * math.sin(angle) + x_P[i + half] * math.cos(angle)
    return turned


def test_rotary_equals_turning_pair_by_pair() -> None:
    heads, size, length = 3, 6, 7
    positions = RotaryPositions(heads, size, 9, THETA)
    x_BLN = torch.randn(2, length, 3 * heads * size)
    ordered_BL3HP = x_BLN[..., positions.order_3M].view(2, length, 3, heads, size)
    turned_BLN = torch.empty_like(x_BLN)
    turned_BLN[..., positions.order_3M] = positions(ordered_BL3HP).flatten(2)
    for b in range(2):
        for position in range(length):
            query_HP, key_HP, value_HP = x_BLN[b, position].view(3, heads, size)
            turned_HP = [
                torch.stack([naive_rotate(x_P, position) for x_P in part_HP]) for part_HP in (query_HP, key_HP)
            ]
            expected_3HP = torch.stack([*turned_HP, value_HP])
            torch.testing.assert_close(turned_BLN[b, position].view(3, heads, size), expected_3HP)


def test_attention_equals_a_loop_over_heads_and_positions() -> None:
    hidden_size, num_heads, length = 12, 2, 5
    attention = Attention(hidden_size, num_heads)
    positions = RotaryPositions(num_heads, hidden_size // num_heads, length, THETA)
    x_BLM = torch.randn(2, length, hidden_size)
    query_BLM, key_BLM, value_BLM = (x_BLM @ attention.query_key_value.weight.T).chunk(3, dim=-1)
    oracle_BLM = torch.zeros_like(x_BLM)
    for b in range(2):
        for h in range(num_heads):
            head = slice(h * 6, (h + 1) * 6)
            keys = [naive_rotate(key_BLM[b, j, head], j) for j in range(length)]
            for i in range(length):
                query = naive_rotate(query_BLM[b, i, head], i)
                scores = torch.stack([query @ keys[j] / math.sqrt(6) for j in range(i + 1)]).softmax(0)
                oracle_BLM[b, i, head] = scores @ value_BLM[b, : i + 1, head]
    torch.testing.assert_close(attention(x_BLM, positions), oracle_BLM @ attention.output.weight.T)


def test_rms_norm_equals_its_formula() -> None:
    norm = RMSNorm(8, epsilon=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
    x = torch.randn(3, 8, requires_grad=True)
    twin, twin_weight = x.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    oracle = torch.stack([row / ((row**2).mean() + 0.1).sqrt() * twin_weight for row in twin])
    torch.testing.assert_close(norm(x), oracle)
    gradient = torch.randn(3, 8)
    norm(x).backward(gradient)
    oracle.backward(gradient)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(norm.weight.grad, twin_weight.grad)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    norm = RMSNorm(8, epsilon=1e-6)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(4, 6)
    x = torch.randn(5, 4)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)
