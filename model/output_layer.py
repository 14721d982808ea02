"""The output layer and its loss: the logits of all tokens are never held at once.

Shape legend: B sequences, L positions, T tokens, U tokens of a set (a block here), M model width, V token ids, X
targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits of one block: on a CPU as many as its cache holds, on a GPU as many as keep it busy.
_BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
_SMALLEST_BLOCK = 64

NO_TARGET = -1
"""Stands where nothing is to be predicted."""


def token_loss(
    hidden_TM: Tensor, weight_VM: Tensor, targets_T: Tensor, shares_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted cross-entropy of the targets, a scalar, and that of each, [T], both in nats, and whether
    each target has the highest logit, bool [T].

    The cross-entropy of token t with logits ``z = W h_t`` is ``logsumexp(z) - z[target]``, in float32. Gradients of the
    scalar are computed with it, block by block, since ``softmax(z)`` is at hand there: one exponential per logit, and
    nothing of size T x V. Gradients of single tokens' values cost the whole computation once more.

    Args:
        hidden_TM: input of the output layer.
        weight_VM: its weight, of the same dtype.
        targets_T: ids of the tokens that are to be predicted, int64.
        shares_T: weight of each token's cross-entropy in the sum, float32; None for the mean.
    """
    loss, cross_entropy_T, correct_T = _TokenLoss.apply(
        hidden_TM, weight_VM, targets_T, shares_T, torch.is_grad_enabled()
    )
    return loss, cross_entropy_T, correct_T


def target_loss(
    hidden_BLM: Tensor, weight_VM: Tensor, targets_BL: Tensor, valid_BL: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same where only some places have a target: the mean over the sequences of the mean over a sequence's
    targets, a scalar, the cross-entropy of each place and whether its target has the highest logit, [B, L], 0 and False
    where there is none. Nothing is computed for the other places.

    Args:
        hidden_BLM: input of the output layer.
        targets_BL: ids of the tokens that are to be predicted, int64, ``NO_TARGET`` where nothing is.
        valid_BL: False for padding, bool; a sequence that is padding as a whole does not count.
    """
    wanted_BL = targets_BL != NO_TARGET
    if valid_BL is not None:
        wanted_BL = wanted_BL & valid_BL.any(1, keepdim=True)
    shares_BL = wanted_BL / (wanted_BL.sum(1, keepdim=True) * wanted_BL.any(1).sum()).clamp(min=1)
    place_X = wanted_BL.flatten().nonzero()[:, 0]
    loss, of_targets_X, correct_X = token_loss(
        hidden_BLM.flatten(0, 1)[place_X], weight_VM, targets_BL.flatten()[place_X], shares_BL.flatten()[place_X]
    )
    cross_entropy_T = torch.zeros(targets_BL.numel(), device=loss.device).index_put((place_X,), of_targets_X)
    correct_T = torch.zeros(targets_BL.numel(), dtype=torch.bool, device=loss.device)
    correct_T[place_X] = correct_X
    return loss, cross_entropy_T.view_as(targets_BL), correct_T.view_as(targets_BL)


def tokens_per_block(vocab_size: int, device_type: str) -> int:
    """Returns how many tokens' logits are computed at once on a device of a type such as ``cpu``."""
    return max(_SMALLEST_BLOCK, _BLOCK_NUMBERS.get(device_type, _BLOCK_NUMBERS["cuda"]) // vocab_size)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TM: Tensor,
        weight_VM: Tensor,
        targets_T: Tensor,
        shares_T: Tensor | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if shares_T is None:
            shares = hidden_TM.new_full((len(hidden_TM),), 1 / len(hidden_TM), dtype=torch.float32)
        else:
            shares = shares_T
        cross_entropy_T, correct_T, *gradients = _by_blocks(
            hidden_TM, weight_VM, targets_T, shares if with_gradients else None
        )
        ctx.save_for_backward(hidden_TM, weight_VM, targets_T, shares, *gradients)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct_T)
        loss = cross_entropy_T.mean() if shares_T is None else (cross_entropy_T * shares).sum()
        return loss, cross_entropy_T, correct_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_TM, weight_VM, targets_T, shares_T, hidden_gradient_TM, weight_gradient_VM = ctx.saved_tensors
        of_loss, of_tokens_T, _ = gradients
        if of_tokens_T is None:
            return hidden_gradient_TM * of_loss, weight_gradient_VM * of_loss, None, None, None
        if of_loss is not None:
            of_tokens_T = of_tokens_T + of_loss * shares_T
        *_, hidden_gradient_TM, weight_gradient_VM = _by_blocks(hidden_TM, weight_VM, targets_T, of_tokens_T)
        return hidden_gradient_TM, weight_gradient_VM, None, None, None


def _by_blocks(hidden_TM: Tensor, weight_VM: Tensor, targets_T: Tensor, shares_T: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the cross-entropy of each token, whether its logit is the highest and, with shares, the gradients of
    their weighted sum in the hidden states and in the weight; zeros in that if it needs none."""
    T, V = len(hidden_TM), len(weight_VM)
    size = tokens_per_block(V, hidden_TM.device.type)
    # Products with the transposed weight and its gradient are faster if these lie in memory row by row.
    weight_MV = weight_VM.t().contiguous()
    cross_entropy_T = hidden_TM.new_empty(T, dtype=torch.float32)
    correct_T = hidden_TM.new_empty(T, dtype=torch.bool)
    if shares_T is not None:
        hidden_gradient_TM = torch.empty_like(hidden_TM)
        weight_gradient_MV = torch.zeros_like(weight_MV, dtype=torch.float32)
    logits_UV = weight_MV.new_empty(min(size, T), V)
    for start in range(0, T, size):
        block = slice(start, start + size)
        hidden_UM, target_U1 = hidden_TM[block], targets_T[block, None]
        z_UV = torch.mm(hidden_UM, weight_MV, out=logits_UV[: len(hidden_UM)]).float()
        target_logit_U1, largest_U1 = z_UV.gather(1, target_U1), z_UV.amax(1, keepdim=True)
        correct_T[block] = (target_logit_U1 == largest_U1)[:, 0]
        exponentials_UV = z_UV.sub_(largest_U1).exp_()
        sum_U1 = exponentials_UV.sum(1, keepdim=True)
        cross_entropy_T[block] = (largest_U1 + sum_U1.log() - target_logit_U1)[:, 0]
        if shares_T is None:
            continue
        # share * (softmax(z) - onehot(target)), but for the factor share / sum, which the narrower sides take.
        factor_U1 = shares_T[block, None] / sum_U1
        gradient_UV = exponentials_UV.scatter_add_(1, target_U1, -sum_U1).to(weight_VM.dtype)
        hidden_gradient_TM[block] = (gradient_UV @ weight_VM) * factor_U1
        if not weight_VM.requires_grad:
            continue
        factored_MU = (hidden_UM * factor_U1).to(weight_VM.dtype).t()
        if factored_MU.dtype == torch.float32:
            # Not in place by name: torch's flop counter would pass it by.
            torch.addmm(weight_gradient_MV, factored_MU, gradient_UV, out=weight_gradient_MV)
        else:
            weight_gradient_MV += factored_MU @ gradient_UV
    if shares_T is None:
        return cross_entropy_T, correct_T
    return cross_entropy_T, correct_T, hidden_gradient_TM, weight_gradient_MV.t().to(weight_VM.dtype)
