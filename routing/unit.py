"""The routing unit: what a router decides for, and what it sees of it.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, G sets of tokens: units, U tokens of a set.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor, nn

from moe_testbed.routing.load import TokenSets, token_sets
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.scopes import Scope


class Unit(str, Enum):
    """What is routed as a whole (Fan et al., arXiv 2402.13089, section 3)."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    DOCUMENT = "document"


class Pooling(str, Enum):
    """Which tokens of a unit the router sees.

    - ``prefix_mean``: at each token the mean of the unit's tokens up to it; the route may change along the unit.
    - ``first_m``: the mean of the first m tokens; the tokens before see those up to them.
    - ``full_mean``: the mean of all tokens, one route for all. It tells earlier tokens of later ones: not causal.
    """

    PREFIX_MEAN = "prefix_mean"
    FIRST_M = "first_m"
    FULL_MEAN = "full_mean"


class Input(str, Enum):
    """What the router's scores are made from."""

    HIDDEN_STATES = "hidden_states"
    DOMAIN_EMBEDDING = "domain_embedding"


def first_of_unit(sets: TokenSets, num_tokens: int, device: torch.device) -> Tensor:
    """The first token of the unit that each token belongs to, int64 [T]."""
    token_T, set_T = torch.arange(num_tokens, device=device), sets.numbers(num_tokens, device)
    first_G = token_T.new_full((sets.number,), num_tokens).scatter_reduce_(0, set_T, token_T, "amin")
    return first_G[set_T]


def pooled(x_TM: Tensor, sets: TokenSets, pooling: Pooling, first_tokens: int, valid_T: Tensor | None = None) -> Tensor:
    """What the router sees at each token, in float32 at least, [T, M], differentiable.

    Args:
        x_TM: hidden states.
        sets: the units; the tokens of each are in order, padding last.
        first_tokens: m of ``first_m``.
        valid_T: False for padding, bool; no other token sees it.
    """
    x_TM = x_TM.to(torch.promote_types(x_TM.dtype, torch.float32))
    set_T = sets.numbers(len(x_TM), x_TM.device)
    if pooling is Pooling.FULL_MEAN:
        return sets.mean(x_TM, valid_T)[set_T]
    # Place of every token within its unit.
    order_T = set_T.argsort(stable=True)
    sizes_G = torch.bincount(set_T, minlength=sets.number)
    start_G = sizes_G.cumsum(0) - sizes_G
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = torch.arange(len(x_TM), device=x_TM.device) - start_G[set_T[order_T]]
    # A unit's tokens as one row of running sums, so that no unit's rounding touches another's.
    padded_GUM = x_TM.new_zeros(sets.number, int(sizes_G.max()), x_TM.shape[1])
    padded_GUM = padded_GUM.index_put((set_T, rank_T), x_TM)
    counted_T = rank_T if pooling is Pooling.PREFIX_MEAN else rank_T.clamp(max=first_tokens - 1)
    return padded_GUM.cumsum(1)[set_T, counted_T] / (counted_T + 1)[:, None]


class RouterInput(nn.Module):
    """Turns the hidden states of tokens into what a router sees of their units.

    Whatever else a router may read of a token (its id, label, position) is that of the unit's first token, so that a
    unit is routed as a whole by every router, also by one without scores.

    Args:
        unit: what is routed as a whole.
        pooling: which of a unit's tokens are seen.
        first_tokens: m of ``first_m``.
        source: where the input comes from.
        hidden_size: M.
        num_domains: D, rows of the domain embedding.
    """

    def __init__(
        self, unit: Unit, pooling: Pooling, first_tokens: int, source: Input, hidden_size: int, num_domains: int
    ) -> None:
        super().__init__()
        self.unit = unit
        self.pooling = pooling
        self.first_tokens = first_tokens
        self.domain_embedding: nn.Parameter | None = None
        if source is Input.DOMAIN_EMBEDDING:
            # As wide as normed hidden states are: variance 1 in each entry.
            self.domain_embedding = nn.Parameter(torch.randn(num_domains, hidden_size))

    def forward(self, x_TM: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingContext]:
        """What the router sees, [T, M], and the context of the units."""
        if self.unit is not Unit.TOKEN:
            sets = token_sets(Scope(self.unit.value), context)
            if self.domain_embedding is None:
                x_TM = pooled(x_TM, sets, self.pooling, self.first_tokens, context.valid_T)
            first_T = first_of_unit(sets, len(x_TM), x_TM.device)
            shape = context.token_ids_BL.shape

            def of_first(values_BL: Tensor) -> Tensor:
                return values_BL.reshape(-1)[first_T].view(shape)

            context = replace(
                context,
                token_ids_BL=of_first(context.token_ids_BL),
                domain_BL=of_first(context.domain_BL),
                position_BL=of_first(context.position_BL),
            )
        if self.domain_embedding is not None:
            x_TM = self.domain_embedding[context.domain_BL.reshape(-1)]
        return x_TM, context
