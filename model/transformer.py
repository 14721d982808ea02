"""Attention, norms and dense feed-forward layers.

Shape legend: B sequences, L positions, H heads, P projected width of a head, M model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """``x / rms(x) * w`` (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split form, with its table for a given length."""

    cosine_LP: Tensor
    sine_LP: Tensor

    def __init__(self, head_size: int, length: int, theta: float) -> None:
        super().__init__()
        # To count on the meta device, torch would load its compiler.
        frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size)
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        angle_LP = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cosine_LP", angle_LP.cos().float(), persistent=False)
        self.register_buffer("sine_LP", angle_LP.sin().float(), persistent=False)

    def forward(self, x_BHLP: Tensor) -> Tensor:
        length = x_BHLP.shape[-2]
        first, second = x_BHLP.chunk(2, dim=-1)
        turned_BHLP = torch.cat([-second, first], dim=-1)
        return (x_BHLP * self.cosine_LP[:length] + turned_BHLP * self.sine_LP[:length]).to(x_BHLP.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BLM: Tensor, positions: RotaryPositions) -> Tensor:
        B, L, M = x_BLM.shape
        query, key, value = (
            part.view(B, L, self.num_heads, M // self.num_heads).transpose(1, 2)
            for part in self.query_key_value(x_BLM).split(M, dim=-1)
        )
        mixed_BHLP = F.scaled_dot_product_attention(positions(query), positions(key), value, is_causal=True)
        return self.output(mixed_BHLP.transpose(1, 2).reshape(B, L, M))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, feed_forward_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, feed_forward_size, bias=False)
        self.up = nn.Linear(hidden_size, feed_forward_size, bias=False)
        self.down = nn.Linear(feed_forward_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
