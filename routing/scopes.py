"""The balancing scope: over which set of tokens the load must be even.

Shape legend: G sets of tokens of a micro-batch, A assignments, E experts, T tokens, K choices, Y MoE layers, B
sequences, L positions, X columns of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision


class Scope(str, Enum):
    """Over which tokens the load must be even.

    - ``token``: each token by itself.
    - ``sequence``: each sequence.
    - ``document``: each document's part of each sequence, where sequences hold several.
    - ``micro_batch``: the micro-batch of one rank.
    - ``data_parallel``: the current micro-batch over all data-parallel ranks.
    - ``global_batch``: the whole batch of an optimizer step, all ranks and all accumulated micro-batches.
    - ``window``: the last optimizer steps, by an exponential moving average.
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    DOCUMENT = "document"
    MICRO_BATCH = "micro_batch"
    DATA_PARALLEL = "data_parallel"
    GLOBAL_BATCH = "global_batch"
    WINDOW = "window"

    @property
    def inside_micro_batch(self) -> bool:
        """A balance set lies within the micro-batch of one rank."""
        return self in (Scope.TOKEN, Scope.SEQUENCE, Scope.DOCUMENT, Scope.MICRO_BATCH)

    @property
    def at_once(self) -> bool:
        """A balance set lies within what the ranks compute at the same moment."""
        return self.inside_micro_batch or self is Scope.DATA_PARALLEL


class Estimator(str, Enum):
    """What stands for the counts of the global batch while it is still being run.

    - ``online``: the counts of this step so far, the current micro-batch included. Exact without accumulation.
    - ``previous``: the counts of the step before; in the first step ``online``.
    - ``exact``: the counts of this step, from a routing pass over all its micro-batches before the first of them is
      trained. It costs one more forward pass without the output layer; nothing where there is no accumulation.
    """

    ONLINE = "online"
    PREVIOUS = "previous"
    EXACT = "exact"


class Counts(str, Enum):
    """Which counts a balance set that is wider than a rank's micro-batch is counted by.

    - ``now``: of all ranks, up to the micro-batch that is running.
    - ``earlier``: of completed steps; in the very first step ``now``.
    - ``ahead``: of the whole step that is running; ``now`` where nobody has told them.
    """

    NOW = "now"
    EARLIER = "earlier"
    AHEAD = "ahead"


class ScopeConfig(BaseModel, extra="forbid", frozen=True):
    """A balancing scope with all that defines it."""

    scope: Scope = Field(Scope.GLOBAL_BATCH, description="over which tokens the load must be even")
    estimator: Estimator = Field(
        Estimator.ONLINE,
        description="global_batch only: counts of this step so far (online), of the last step (previous), or of this "
        "step by a routing pass ahead (exact)",
    )
    window_steps: int = Field(
        16, gt=0, description="window only: n of the moving average, whose newest step weighs 1 / n"
    )

    @model_validator(mode="after")
    def _options_have_a_use(self) -> ScopeConfig:
        if self.estimator is not Estimator.ONLINE and self.scope is not Scope.GLOBAL_BATCH:
            raise ValueError(
                f"estimator is {self.estimator.value} with scope {self.scope.value}, which needs none; "
                "leave estimator out or set scope to global_batch"
            )
        if "window_steps" in self.model_fields_set and self.scope is not Scope.WINDOW and self.window_steps != 16:
            raise ValueError(
                f"window_steps is {self.window_steps} with scope {self.scope.value}, which has no window; "
                "leave window_steps out or set scope to window"
            )
        return self

    @property
    def counts(self) -> Counts | None:
        """Which counts it takes; None inside a micro-batch, whose own are at hand."""
        if self.scope.inside_micro_batch:
            return None
        if self.scope is Scope.WINDOW or self.estimator is Estimator.PREVIOUS:
            return Counts.EARLIER
        return Counts.AHEAD if self.estimator is Estimator.EXACT else Counts.NOW

    @property
    def key(self) -> tuple[Scope, Estimator, int]:
        """Equal for configs of the same scope."""
        return self.scope, self.estimator, self.window_steps


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


def load_in_scope(
    scope: Scope, decision: RoutingDecision, context: RoutingContext, wider_counts_E: Tensor | None = None
) -> Load:
    """:func:`load_in_sets` of the sets of a scope."""
    return load_in_sets(token_sets(scope, context), decision, context.valid_T, wider_counts_E)
