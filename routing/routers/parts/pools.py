"""Pools: sets of tokens whose experts are chosen together.

Shape legend: T tokens of a micro-batch, U tokens of a set, E experts, R ranks, X columns of any kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import Tensor

from moe_testbed.routing.load import token_sets
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import Capability, RouterConfig
from moe_testbed.routing.scopes import Scope


class PoolRouterConfig(RouterConfig):
    """Options of a router that chooses over pools."""

    pool: Scope = Field(
        Scope.MICRO_BATCH,
        description="tokens whose experts are chosen together: those of a sequence, document, micro_batch, or of the "
        "micro-batches of all ranks (data_parallel)",
    )

    @field_validator("pool")
    @classmethod
    def _pool_is_at_hand(cls, value: Scope) -> Scope:
        allowed = "use sequence, document, micro_batch or data_parallel"
        if value is Scope.TOKEN:
            raise ValueError(f"routing.router.pool is token, and one token leaves nothing to choose among; {allowed}")
        if not value.at_once:
            raise ValueError(
                f"routing.router.pool is {value.value}, but a pool must be at hand as a whole when its tokens are "
                f"routed, and ranks hold one micro-batch at a time; {allowed}, or keep another router even over "
                f"{value.value} by a balancer with that scope"
            )
        return value

    @property
    def provides(self) -> frozenset[Capability]:
        """Scores and the rows of W; what a bias adds to an expert's scores, the choice over a pool takes away."""
        return frozenset({Capability.SCORES, Capability.VECTORS})


@torch.no_grad()
def choose_in_pools(
    choose: Callable[[Tensor], Tensor],
    scores_TE: Tensor,
    padding_TX: Tensor,
    pool: Scope,
    context: RoutingContext,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Calls ``choose`` for every pool that touches this rank's micro-batch.

    Args:
        choose: the scores of a pool's tokens, [U, E] with U at least 1, -> what is chosen for each of them, [U, X]. It
            must be a function of the scores alone: for a pool over several ranks each of them calls it.
        scores_TE: of this rank's micro-batch.
        padding_TX: what padding gets, which enters no pool.
        pool: a scope that is at hand at once.
        group: the data-parallel ranks, which must hold equally many tokens and must all call this; None for one
            process.

    Returns:
        What was chosen for each token of this rank's micro-batch, [T, X], in dtype of ``padding_TX``, without gradient.
    """
    chosen_TX = padding_TX.clone()
    if pool is Scope.DATA_PARALLEL and group is not None:
        valid_RT, scores_RTE = _gather(scores_TE, context.valid_T, group)
        pooled_UE = scores_RTE[valid_RT]
        if len(pooled_UE):
            sizes = valid_RT.sum(1).tolist()
            rank = dist.get_rank(group)
            chosen_TX[valid_RT[rank]] = choose(pooled_UE).split(sizes)[rank]
        return chosen_TX
    for token_U in pool_tokens(pool, context):
        chosen_TX[token_U] = choose(scores_TE[token_U])
    return chosen_TX


def pool_tokens(pool: Scope, context: RoutingContext) -> list[Tensor]:
    """The tokens of every pool within the micro-batch, int64 [U] each, in order; padding is in none, and no pool is
    empty."""
    sets = token_sets(pool, context)
    token_T = torch.arange(context.token_ids_BL.numel(), device=context.token_ids_BL.device)
    set_T = sets.numbers(len(token_T), token_T.device)
    if context.valid_T is not None:
        token_T, set_T = token_T[context.valid_T], set_T[context.valid_T]
    sizes = torch.bincount(set_T, minlength=sets.number).tolist()
    ordered_T = token_T[set_T.argsort(stable=True)]
    return [token_U for token_U in ordered_T.split(sizes) if len(token_U)]


def _gather(scores_TE: Tensor, valid_T: Tensor | None, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Which tokens of each rank are no padding, bool [R, T], and the scores of all, [R, T, E]."""
    # Sent even without padding, and with the scores, so that ranks with and without padding call the same collective.
    valid_T1 = scores_TE.new_ones(len(scores_TE), 1) if valid_T is None else valid_T[:, None].to(scores_TE.dtype)
    mine = torch.cat([valid_T1, scores_TE], dim=1)
    T, columns = mine.shape
    everyone = mine.new_empty(dist.get_world_size(group) * T, columns)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    everyone = everyone.view(-1, T, columns)
    return everyone[..., 0] > 0, everyone[..., 1:]
