"""Taking barred experts out of decisions, for examinations."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, RoutingDecision


def without_barred(decision: RoutingDecision, barred_TE: Tensor) -> RoutingDecision:
    """The decision with ``NO_EXPERT`` and weight 0 where a token chose an expert that it may not use.

    Routers with scores choose the next best expert by themselves (see :meth:`Router.forward`). What is left for here is
    a token with fewer than K experts to choose among, a router without scores, and a layer that follows the decision of
    an earlier one: none of them has a next best. The other weights stay as they are.

    Args:
        decision: of any router.
        barred_TE: experts that each token may not use, bool.
    """
    if decision.logits_TE is not None:
        # For want of another a router may have chosen what the token may never use, such as another domain's expert.
        barred_TE = barred_TE | (decision.logits_TE == float("-inf"))
    ids_TK = decision.expert_ids_TK
    taken_TK = barred_TE.gather(-1, ids_TK.clamp(min=0)) & (ids_TK != NO_EXPERT)
    return replace(
        decision,
        expert_ids_TK=ids_TK.masked_fill(taken_TK, NO_EXPERT),
        weights_TK=decision.weights_TK.masked_fill(taken_TK, 0.0),
    )
