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
    positions = RotaryPositions(head_size=6, length=9, theta=THETA)
    x_BHLP = torch.randn(2, 3, 7, 6)
    turned = positions(x_BHLP)
    for b in range(2):
        for h in range(3):
            for position in range(7):
                torch.testing.assert_close(turned[b, h, position], naive_rotate(x_BHLP[b, h, position], position))


def test_attention_equals_a_loop_over_heads_and_positions() -> None:
    hidden_size, num_heads, length = 12, 2, 5
    attention = Attention(hidden_size, num_heads)
    positions = RotaryPositions(hidden_size // num_heads, length, THETA)
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
    x = torch.randn(3, 8)
    oracle = torch.stack([row / math.sqrt(float((row**2).mean()) + 0.1) * norm.weight for row in x])
    torch.testing.assert_close(norm(x), oracle)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    norm = RMSNorm(8, epsilon=1e-6)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(4, 6)
    x = torch.randn(5, 4)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)
