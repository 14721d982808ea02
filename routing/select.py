"""Select: which experts a token uses."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT

# Above this many choices one sort is cheaper than one pass over the scores per choice.
_MAX_PASSES = 4


@torch.no_grad()
def select_top_k(scores_TE: Tensor, top_k: int, bias_E: Tensor | None = None) -> Tensor:
    """The ``top_k`` experts with the highest score plus bias, best first.

    Args:
        scores_TE: scores; -inf bars an expert.
        top_k: K.
        bias_E: added for the selection only (loss-free balancing, arXiv 2408.15664).

    Returns:
        Expert ids, int64 [T, K]. The choice carries no gradient.
    """
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if top_k > _MAX_PASSES:
        return biased_TE.topk(top_k, dim=-1).indices
    # torch.topk on CPU costs several times as much as a few passes of max.
    chosen = []
    for choice in range(top_k):
        ids_T1 = biased_TE.max(dim=-1, keepdim=True).indices
        chosen.append(ids_T1)
        if choice + 1 < top_k:
            biased_TE = biased_TE.scatter(-1, ids_T1, float("-inf"))
    return torch.cat(chosen, dim=-1)


@torch.no_grad()
def select_where(chosen_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """The experts that each token uses, a varying number of them.

    Args:
        chosen_TE: which, bool.
        scores_TE: finite scores that order a token's experts, the best first.

    Returns:
        Expert ids, int64 [T, K], with K the largest number that a token uses, at least 1; ``NO_EXPERT`` where it uses
        fewer.
    """
    top_k = max(1, int(chosen_TE.sum(-1).max()))
    ordered_TE = scores_TE.masked_fill(~chosen_TE, float("-inf"))
    values_TK, ids_TK = ordered_TE.topk(top_k, dim=-1)
    return ids_TK.masked_fill(values_TK == float("-inf"), NO_EXPERT)
