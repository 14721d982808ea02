"""Selection and weights where tokens use more or fewer experts than ``top_k``.

Shape legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT


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


def gathered_where_chosen(scores_TE: Tensor, expert_ids_TK: Tensor, normalise: bool) -> Tensor:
    """Scores of the chosen experts as :func:`~moe_testbed.routing.learned.gathered` returns them, 0 where there is no
    expert."""
    unused_TK = expert_ids_TK == NO_EXPERT
    weights_TK = scores_TE.gather(-1, expert_ids_TK.clamp(min=0)).masked_fill(unused_TK, 0.0)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    return weights_TK
