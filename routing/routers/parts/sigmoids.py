"""Weights of routers whose affinities are sigmoids.

Shape legend: T tokens, K choices.
"""

from __future__ import annotations

from torch import Tensor

from moe_testbed.routing.learned import gathered
from moe_testbed.routing.router import Scores, shares_of_sigmoids


def gathered_sigmoids(scores: Scores, expert_ids_TK: Tensor, normalise: bool) -> Tensor:
    """The chosen experts' sigmoids as :func:`~moe_testbed.routing.learned.gathered` returns them. If ``normalise``,
    they sum to 1 also for a token whose sigmoids all underflow. Float32 [T, K], differentiable in the scores."""
    if not normalise:
        return gathered(scores.affinity_TE, expert_ids_TK, normalise=False)
    return shares_of_sigmoids(scores.affinity_TE.gather(-1, expert_ids_TK), scores.logits_TE.gather(-1, expert_ids_TK))
