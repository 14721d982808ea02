"""Weight: the factor of each chosen expert's output."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT


def normalises(wanted: bool | None, top_k: int) -> bool:
    """Whether weights are divided by their sum; without a wish, if there is more than one of them.

    Raises:
        ValueError: one weight is to be normalised: it would always be 1, and the router would get no gradient.
    """
    if wanted and top_k == 1:
        raise ValueError(
            "routing.router.normalise is true with model.moe.top_k 1: the only weight would always be 1 and the router "
            "would learn nothing from the loss; leave normalise out, or set it to false"
        )
    return top_k > 1 if wanted is None else wanted


def gathered(scores_TE: Tensor, expert_ids_TK: Tensor, normalise: bool) -> Tensor:
    """Scores of the chosen experts, divided by their sum if ``normalise``. Float32 [T, K], differentiable in the
    scores."""
    weights_TK = scores_TE.gather(-1, expert_ids_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    return weights_TK


def gathered_where_chosen(scores_TE: Tensor, expert_ids_TK: Tensor, normalise: bool) -> Tensor:
    """:func:`gathered` for choices of varying number: 0 where there is no expert."""
    unused_TK = expert_ids_TK == NO_EXPERT
    weights_TK = scores_TE.gather(-1, expert_ids_TK.clamp(min=0)).masked_fill(unused_TK, 0.0)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    return weights_TK


def softmax_over_chosen(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Softmax over the logits of the chosen experts only (Mixtral, arXiv 2401.04088, section 2.1). Float32 [T, K]."""
    return logits_TE.gather(-1, expert_ids_TK).softmax(-1)


def uniform(expert_ids_TK: Tensor) -> Tensor:
    """1/K for each choice. Float32 [T, K]."""
    return torch.full(expert_ids_TK.shape, 1.0 / expert_ids_TK.shape[1], device=expert_ids_TK.device)
