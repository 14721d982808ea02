"""Zero-computation experts: routed like the others, but without a feed-forward layer (MoE++, arXiv 2410.07348).

Shape legend: T tokens, K choices, M model width, X zero-computation experts (zero, copy, constant, in this order);
``...`` are the dimensions over which the weights vary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ZeroComputation(nn.Module):
    """The zero-computation experts of one layer (MoE++, section 3.1).

    A zero expert returns 0, a copy expert its input x, a constant expert ``a1 x + a2 v`` with ``[a1, a2] = softmax(W
    x)`` and learned v and W. Every rank holds all of them, so that their tokens are never sent anywhere and never
    dropped. v and W start from 0, at ``x / 2``: what tells two constant experts apart are the tokens that they get.

    The products run over all tokens at once, with weight 0 where an expert is not chosen: 3 M multiplications a
    token and constant expert, less than gathering would cost.
    """

    def __init__(self, hidden_size: int, num_zero: int, num_copy: int, num_constant: int) -> None:
        super().__init__()
        self.num_zero, self.num_copy, self.num_constant = num_zero, num_copy, num_constant
        if num_constant:
            self.vectors = nn.Parameter(torch.zeros(num_constant, hidden_size))
            self.mixing = nn.Parameter(torch.zeros(2 * num_constant, hidden_size))

    def weights_by_number(self, numbers: Tensor, weights: Tensor) -> Tensor:
        """The weight of each of the X experts, [..., X], from choices, [..., K].

        Args:
            numbers: from 0 to X - 1 as in the legend; choices with any other number belong elsewhere.
        """
        N = self.num_zero + self.num_copy + self.num_constant
        mine = (numbers >= 0) & (numbers < N)
        by_number = weights.new_zeros(*weights.shape[:-1], N)
        return by_number.scatter_add(-1, numbers.clamp(0, N - 1), weights.where(mine, 0.0))

    def forward(self, x_TM: Tensor, weights_TX: Tensor) -> Tensor:
        """Sum of the weighted outputs, [T, M] in the dtype of x; with weights [T, ..., X] one sum for each, [T, ...,
        M]."""
        dims = weights_TX.ndim - x_TM.ndim
        copy, constant = weights_TX[..., self.num_zero :].split([self.num_copy, self.num_constant], -1)
        of_input = copy.sum(-1, keepdim=True)
        x = x_TM.view(len(x_TM), *(1,) * dims, -1)
        if not self.num_constant:
            return of_input.to(x.dtype) * x
        mixed = F.linear(x, self.mixing).float().unflatten(-1, (self.num_constant, 2)).softmax(-1)
        of_input = of_input + (constant * mixed[..., 0]).sum(-1, keepdim=True)
        return of_input.to(x.dtype) * x + (constant * mixed[..., 1]).to(x.dtype) @ self.vectors
