"""Score: what the router's logits are made from.

Shape legend: T tokens, M model width, E experts, X features that are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def full_precision_linear(x_TX: Tensor, weight: Tensor) -> Tensor:
    """``W x``, float32 (float64 for float64 inputs), for W of any number of rows and X columns, whatever the model's
    precision (Switch Transformers, arXiv 2101.03961, section 2.4)."""
    dtype = torch.promote_types(x_TX.dtype, torch.float32)
    # Under autocast F.linear would fall back to the low precision, and near ties would be decided by rounding.
    with torch.autocast(x_TX.device.type, enabled=False):
        return F.linear(x_TX.to(dtype), weight.to(dtype))


class Scorer(nn.Module):
    """Turns hidden states [T, M] into logits, float32 [T, E].

    Attributes:
        weight: the vector that stands for each expert in the score, [E, X].
    """

    weight: nn.Parameter


class LinearScore(Scorer):
    """``z = W x``.

    Args:
        hidden_size: M.
        num_outputs: experts scored.
        trainable: False leaves W as initialised (the frozen router of arXiv 2402.13089).
        std: standard deviation of W's initial entries.
    """

    def __init__(self, hidden_size: int, num_outputs: int, trainable: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size), requires_grad=trainable)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_TM: Tensor) -> Tensor:
        """Logits, float32 [T, num_outputs]."""
        return full_precision_linear(x_TM, self.weight)
