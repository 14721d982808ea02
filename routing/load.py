"""The load of the experts over sets of tokens: counts, fractions and mean probabilities.

Shape legend: G sets of tokens of a micro-batch, A assignments, E experts, T tokens, K choices, B sequences, L
positions, X columns of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Scope


@dataclass(frozen=True)
class TokenSets:
    """A partition of a micro-batch's tokens.

    Attributes:
        number: G.
        set_T: number of the set that each token belongs to, int64; None where the sets are runs of equal length.
    """

    number: int
    set_T: Tensor | None = None

    def numbers(self, num_tokens: int, device: torch.device) -> Tensor:
        """Number of the set that each token belongs to, int64 [T], also where the sets are runs."""
        if self.set_T is not None:
            return self.set_T
        return torch.arange(num_tokens, device=device) // (num_tokens // self.number)

    def sum(self, values_TX: Tensor) -> Tensor:
        """Sums over each set, [G, X], differentiable."""
        if self.set_T is None:
            return values_TX.view(self.number, -1, values_TX.shape[-1]).sum(1)
        return values_TX.new_zeros(self.number, values_TX.shape[-1]).index_add(0, self.set_T, values_TX)

    def mean(self, values_TX: Tensor, valid_T: Tensor | None = None) -> Tensor:
        """Means over each set's tokens that are not padding, [G, X], differentiable; 0 for a set of padding."""
        if valid_T is not None:
            values_TX = values_TX.masked_fill(~valid_T[:, None], 0.0)
        return self.sum(values_TX) / self.sizes(valid_T, values_TX).clamp(min=1)[:, None]

    def sizes(self, valid_T: Tensor | None, like: Tensor) -> Tensor:
        """Tokens of each set that are not padding, [G], in dtype and on the device of ``like``, [T, ...]."""
        if valid_T is None and self.set_T is None:
            return like.new_full((self.number,), len(like) // self.number)
        ones_T = like.new_ones(len(like)) if valid_T is None else valid_T.to(like.dtype)
        return self.sum(ones_T[:, None])[:, 0]

    def shares(self, valid_T: Tensor | None, like: Tensor) -> Tensor:
        """Share of the tokens that lie in each set, [G], sums to 1."""
        sizes_G = self.sizes(valid_T, like)
        return sizes_G / sizes_G.sum().clamp(min=1)

    def count(self, expert_ids_TK: Tensor, num_experts: int) -> Tensor:
        """Assignments to each expert in each set, int64 [G, E]; ``NO_EXPERT`` is not counted."""
        # Column 0 of each set collects the choices that are no expert's. torch.bincount would make a GPU wait.
        columns_TK = expert_ids_TK - NO_EXPERT
        width = num_experts + 1
        if self.set_T is None:
            columns_GA = columns_TK.reshape(self.number, -1)
            zeros_GE = columns_GA.new_zeros(self.number, width)
            counts_GE = zeros_GE.scatter_add_(1, columns_GA, torch.ones_like(columns_GA))
        else:
            cells = (self.set_T[:, None] * width + columns_TK).reshape(-1)
            counts_GE = cells.new_zeros(self.number * width).scatter_add_(0, cells, torch.ones_like(cells))
        return counts_GE.view(self.number, width)[:, 1:]


def token_sets(scope: Scope, context: RoutingContext) -> TokenSets:
    """The balance sets of a micro-batch; one of all its tokens where the scope reaches beyond it.

    Raises:
        ValueError: the batch lacks the ids that the scope needs.
    """
    B, L = context.token_ids_BL.shape
    if scope is Scope.TOKEN:
        return TokenSets(B * L)
    if scope is Scope.SEQUENCE:
        return TokenSets(B)
    if scope is not Scope.DOCUMENT:
        return TokenSets(1)
    if context.document_BL is None:
        raise ValueError(
            "scope document needs the number of every token's document, which this batch does not have; use scope "
            "sequence, or give RoutingContext.document_BL"
        )
    document_BL = context.document_BL
    rows_B1 = torch.arange(B, device=document_BL.device)[:, None]
    keys_BL = document_BL + rows_B1 * (document_BL.max() + 1)
    documents, set_BL = torch.unique(keys_BL, return_inverse=True)
    return TokenSets(len(documents), set_BL.reshape(-1))


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


def without_padding(expert_ids_TK: Tensor, valid_T: Tensor | None) -> Tensor:
    """The choices with ``NO_EXPERT`` where the token is padding (False in ``valid_T``)."""
    return expert_ids_TK if valid_T is None else expert_ids_TK.masked_fill(~valid_T[:, None], NO_EXPERT)


def count_assignments(expert_ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """Assignments to each expert, int64 [E]; ``NO_EXPERT`` and padding (False in ``valid_T``) are not counted."""
    return TokenSets(1).count(without_padding(expert_ids_TK, valid_T), num_experts)[0]


def fractions(counts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Counts as shares of their sum over the last dimension; zeros where there are none."""
    counts = counts.to(dtype)
    return counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


def load_in_sets(
    sets: TokenSets, decision: RoutingDecision, valid_T: Tensor | None = None, wider_counts_E: Tensor | None = None
) -> Load:
    """The load of one layer over the balance sets of a micro-batch.

    Args:
        sets: of :func:`token_sets`.
        decision: the layer's routing of this micro-batch; it must carry probabilities.
        valid_T: False for padding, bool.
        wider_counts_E: for the scopes wider than a micro-batch, the assignments of the whole balance set, [E].
    """
    probabilities_TE = decision.probabilities_TE
    assert probabilities_TE is not None, "a router without scores cannot be balanced"
    if wider_counts_E is not None:
        counts_GE = wider_counts_E[None]
    else:
        ids_TK = without_padding(decision.expert_ids_TK, valid_T)
        counts_GE = sets.count(ids_TK, probabilities_TE.shape[1])
    return Load(
        fractions(counts_GE, probabilities_TE.dtype),
        sets.mean(probabilities_TE, valid_T),
        sets.shares(valid_T, probabilities_TE),
    )
