"""Score: what the router's logits are made from.

Shape legend: T tokens, D model width, E experts, F features that the experts are compared with, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def full_precision_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """``W x``, float32 (float64 for float64 inputs) [T, O], whatever the model's precision (Switch Transformers, arXiv
    2101.03961, section 2.4)."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    # Under autocast F.linear would fall back to the low precision, and near ties would be decided by rounding.
    with torch.autocast(x_TI.device.type, enabled=False):
        return F.linear(x_TI.to(dtype), weight_OI.to(dtype))


class Scorer(nn.Module):
    """Turns hidden states [T, D] into logits, float32 [T, E].

    Attributes:
        weight: the vector that stands for each expert in the score, [E, F].
    """

    weight: nn.Parameter


class LinearScore(Scorer):
    """``z = W x``.

    Args:
        hidden_size: D.
        num_outputs: experts scored.
        trainable: False leaves W as initialised (the frozen router of arXiv 2402.13089).
        std: standard deviation of W's initial entries.
    """

    def __init__(self, hidden_size: int, num_outputs: int, trainable: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size), requires_grad=trainable)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits, float32 [T, num_outputs]."""
        return full_precision_linear(x_TD, self.weight)
