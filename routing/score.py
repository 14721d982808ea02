"""Score: what the router's logits are made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearScore(nn.Module):
    """``z = W x``, computed in float32 at least, whatever the model's precision (Switch Transformers, arXiv 2101.03961,
    section 2.4).

    Args:
        hidden_size: D.
        num_outputs: experts scored.
        trainable: False leaves W as initialised (the frozen router of arXiv 2402.13089).
    """

    def __init__(self, hidden_size: int, num_outputs: int, trainable: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size), requires_grad=trainable)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits, float32 (float64 for a float64 model) [T, num_outputs]."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        # Under autocast F.linear would fall back to the low precision, and near ties would be decided by rounding.
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))
