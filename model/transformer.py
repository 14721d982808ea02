"""Attention, norms and dense feed-forward layers.

Shape legend: B sequences, L positions of a text, T tokens, H heads, P projected width of a head, X complex
numbers of it, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Memory:
    """What a decoder sees of an encoder.

    Attributes:
        hidden_BLM: its output.
        seen_B11L: False for padding, bool; None where there is none.
    """

    hidden_BLM: Tensor
    seen_B11L: Tensor | None


class RMSNorm(nn.Module):
    """``x / rms(x) * w`` (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)
        normed_TM: Tensor = _RMSNorm.apply(x.flatten(0, -2).float(), self.weight.float(), self.epsilon)
        return normed_TM.view(x.shape).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in fewer passes over memory than torch takes on a CPU, where its own is put together of small parts."""

    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, weight_M: Tensor, epsilon: float) -> Tensor:
        mean_square_T1 = torch.linalg.vector_norm(x_TM, dim=1, keepdim=True).square_().div_(x_TM.shape[1])
        scale_T1 = mean_square_T1.add_(epsilon).rsqrt_()
        scaled_TM = x_TM * scale_T1
        ctx.save_for_backward(scaled_TM, weight_M, scale_T1)
        return scaled_TM * weight_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        scaled_TM, weight_M, scale_T1 = ctx.saved_tensors
        (gradient_TM,) = gradients
        products_TM = gradient_TM * scaled_TM
        # Of the gradient only the part that is orthogonal to x changes the scaled x.
        along_T1 = (products_TM @ weight_M / len(weight_M))[:, None]
        across_TM = torch.addcmul(gradient_TM * weight_M, scaled_TM, along_T1, value=-1)
        return across_TM.mul_(scale_T1), products_TM.sum(0), None


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split form, with its table for a given length.

    Features i and i + P / 2 of a head are the parts of a complex number, which position l turns by the angle ``l *
    theta ** (-2 i / P)``. Queries, keys and values are turned together in one product of complex numbers; for the
    values, which have no position, the factor is 1.

    Attributes:
        order_3M: what order of the projection's outputs makes the parts of each number neighbours in memory. Queries
            and keys are in the same order, so that it changes none of their products.
    """

    factors_L3hX: Tensor
    order_3M: Tensor

    def __init__(self, num_heads: int, head_size: int, length: int, theta: float) -> None:
        super().__init__()
        # To count on the meta device, torch would load its compiler.
        with torch.device("cpu"):
            frequency_X = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
            angle_LX = torch.arange(length, dtype=torch.float64)[:, None] * frequency_X
            turn_LX = torch.polar(torch.ones_like(angle_LX), angle_LX)
            factors_L3X = torch.stack([turn_LX, turn_LX, torch.ones_like(turn_LX)], dim=1)
            numbers_3HP = torch.arange(3 * num_heads * head_size).view(3, num_heads, head_size)
            ordered_2HP = numbers_3HP[:2].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        self.register_buffer("factors_L3hX", factors_L3X[:, :, None].to(torch.complex64), persistent=False)
        self.register_buffer("order_3M", torch.cat([ordered_2HP, numbers_3HP[2:]]).flatten(), persistent=False)

    @property
    def length(self) -> int:
        """How many positions there are."""
        return len(self.factors_L3hX)

    def forward(self, x_BL3HP: Tensor, parts: slice = slice(None)) -> Tensor:
        """Turns queries and keys, whose features are in the order ``order_3M``, and leaves the values as they are.

        Args:
            parts: which of queries, keys and values they are.
        """
        number_BL3HX = torch.view_as_complex(x_BL3HP.float().unflatten(-1, (-1, 2)))
        turned_BL3HX = number_BL3HX * self.factors_L3hX[: x_BL3HP.shape[1], parts]
        return torch.view_as_real(turned_BL3HX).flatten(-2).to(x_BL3HP.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Args:
        causal: a token sees itself and those before it; otherwise it sees all.
    """

    def __init__(self, hidden_size: int, num_heads: int, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BLM: Tensor, positions: RotaryPositions, seen_B11L: Tensor | None = None) -> Tensor:
        """Returns what each token takes from the others, [B, L, M].

        Args:
            seen_B11L: False for padding, which no token sees, bool; None where there is none. A causal layer needs it
                for padding before other tokens only.
        """
        B, L, M = x_BLM.shape
        projected = F.linear(x_BLM, self.query_key_value.weight.index_select(0, positions.order_3M))
        turned_BL3HP = positions(projected.view(B, L, 3, self.num_heads, M // self.num_heads))
        query_BHLP, key_BHLP, value_BHLP = turned_BL3HP.transpose(1, 3).unbind(2)
        mixed_BHLP = F.scaled_dot_product_attention(
            query_BHLP, key_BHLP, value_BHLP, None if self.causal else seen_B11L, is_causal=self.causal
        )
        return self.output(mixed_BHLP.transpose(1, 2).reshape(B, L, M))


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder's tokens to what an encoder has made of its own, with rotary positions: where
    both texts are nearly the same, a token is looked for near its own place."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BLM: Tensor, memory: Memory, positions: RotaryPositions) -> Tensor:
        """Returns what each of the decoder's tokens takes from the encoder's, [B, L, M]."""
        B, L, M = x_BLM.shape
        heads = self.num_heads, M // self.num_heads
        query_weight = self.query.weight.index_select(0, positions.order_3M[:M])
        key_value_weight = self.key_value.weight.index_select(0, positions.order_3M[M:] - M)
        query_BL1HP = positions(F.linear(x_BLM, query_weight).view(B, L, 1, *heads), slice(0, 1))
        key_value_BL2HP = F.linear(memory.hidden_BLM, key_value_weight).view(B, -1, 2, *heads)
        key_value_BL2HP = positions(key_value_BL2HP, slice(1, 3))
        query_BHLP, key_value_BH2LP = query_BL1HP[:, :, 0].transpose(1, 2), key_value_BL2HP.transpose(1, 3)
        key_BHLP, value_BHLP = key_value_BH2LP.unbind(2)
        mixed_BHLP = F.scaled_dot_product_attention(query_BHLP, key_BHLP, value_BHLP, memory.seen_B11L)
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
