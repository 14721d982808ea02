"""The balancing scope: over which set of tokens the load must be even.

Shape legend: G balance sets in a micro-batch, E experts, T tokens, K choices, Y MoE layers, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision


class Scope(str, Enum):
    """Over which tokens the load must be even.

    - ``token``: each token by itself.
    - ``sequence``: each sequence.
    - ``micro_batch``: the micro-batch of one rank.
    - ``data_parallel``: the current micro-batch over all data-parallel ranks.
    - ``global_batch``: the whole batch of an optimizer step, all ranks and all accumulated micro-batches.
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    MICRO_BATCH = "micro_batch"
    DATA_PARALLEL = "data_parallel"
    GLOBAL_BATCH = "global_batch"


class Estimator(str, Enum):
    """What stands for the counts of the global batch while it is still being run.

    - ``online``: the counts of this step so far, the current micro-batch included.
    - ``previous``: the counts of the step before; in the first step ``online``.
    """

    ONLINE = "online"
    PREVIOUS = "previous"


@dataclass(frozen=True)
class Load:
    """The load of one layer's experts over the balance sets that a micro-batch touches.

    Attributes:
        fractions_GE: share of each expert in the set's assignments, rows sum to 1; counted, so without gradient.
            Float32.
        probabilities_GE: mean routing probability over the tokens of the set that lie in this micro-batch, float32,
            differentiable.
        share_G: share of this micro-batch's tokens that lie in the set, sums to 1, float32.
    """

    fractions_GE: Tensor
    probabilities_GE: Tensor
    share_G: Tensor


def count_assignments(expert_ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """Assignments to each expert, int64 [E]; ``NO_EXPERT`` and padding (False in ``valid_T``) are not counted."""
    columns = (_without_padding(expert_ids_TK, valid_T) - NO_EXPERT).reshape(-1)
    # torch.bincount would make a GPU wait for its largest entry.
    return columns.new_zeros(num_experts + 1).scatter_add_(0, columns, torch.ones_like(columns))[1:]


def _without_padding(expert_ids_TK: Tensor, valid_T: Tensor | None) -> Tensor:
    return expert_ids_TK if valid_T is None else expert_ids_TK.masked_fill(~valid_T[:, None], NO_EXPERT)


def _number_of_sets(scope: Scope, context: RoutingContext) -> int:
    """Balance sets of a micro-batch, G; each is a run of T / G tokens."""
    B, L = context.token_ids_BL.shape
    return {Scope.TOKEN: B * L, Scope.SEQUENCE: B}.get(scope, 1)


def _fractions(counts_GE: Tensor, dtype: torch.dtype) -> Tensor:
    return counts_GE.to(dtype) / counts_GE.sum(-1, keepdim=True).clamp(min=1)


def load_in_scope(
    scope: Scope, decision: RoutingDecision, context: RoutingContext, wider_counts_E: Tensor | None = None
) -> Load:
    """The load of one layer in ``scope``.

    Args:
        decision: the layer's routing of this micro-batch; it must carry probabilities.
        context: tells sequences apart and which tokens are padding.
        wider_counts_E: for the scopes wider than a micro-batch, the assignments of the whole balance set, [E].
    """
    probabilities_TE = decision.probabilities_TE
    assert probabilities_TE is not None, "a router without scores cannot be balanced"
    T, E = probabilities_TE.shape
    G = _number_of_sets(scope, context)
    if wider_counts_E is not None:
        counts_GE = wider_counts_E[None]
    else:
        # Column 0 of each set collects the choices that are no expert's.
        columns_GA = (_without_padding(decision.expert_ids_TK, context.valid_T) - NO_EXPERT).reshape(G, -1)
        counts_GE = columns_GA.new_zeros(G, E + 1).scatter_add_(1, columns_GA, torch.ones_like(columns_GA))[:, 1:]
    valid_T1 = probabilities_TE.new_ones(T, 1) if context.valid_T is None else context.valid_T[:, None]
    tokens_G1 = valid_T1.view(G, -1, 1).sum(1).to(probabilities_TE.dtype)
    sums_GE = (probabilities_TE * valid_T1).view(G, -1, E).sum(1)
    share_G = (tokens_G1 / tokens_G1.sum().clamp(min=1)).squeeze(1)
    return Load(_fractions(counts_GE, sums_GE.dtype), sums_GE / tokens_G1.clamp(min=1), share_G)
