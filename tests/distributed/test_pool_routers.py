"""Routers whose pool is all ranks' tokens route as one process does that has them all.

Shape legend: R ranks, T tokens of a micro-batch, M model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_testbed.routing import routers
from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Router

assert routers.__all__

R, SEQUENCES, LENGTH, M, E, K = 2, 3, 5, 6, 8, 2
T = SEQUENCES * LENGTH


def inputs(padded: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Hidden states [R, T, M], which tokens are no padding [R, T], a router's weight [E, M], factors [R, T, E].

    Only the second rank has padding.
    """
    generator = torch.Generator().manual_seed(4)
    x_RTM = torch.randn(R, T, M, generator=generator) + 0.7
    valid_RT = torch.rand(R, T, generator=generator) < 0.6
    valid_RT[0] = True
    weight_EM = torch.randn(E, M, generator=generator)
    return x_RTM, valid_RT if padded else None, weight_EM, torch.randn(R, T, E, generator=generator)


def make_router(name: str, options: dict[str, Any], weight_EM: Tensor, group: dist.ProcessGroup | None) -> Router:
    counts_DV = torch.ones(1, 3, dtype=torch.int64)
    cls = ROUTERS.get(name)
    router = cls(cls.Config(name=name, **options), RouterSetting(E, K, M, 0, 1, ("all",), (1.0,), counts_DV, group))
    router.load_state_dict({"scorer.weight": weight_EM}, strict=False)
    return router


def context(sequences: int, valid_T: Tensor | None) -> RoutingContext:
    zeros = torch.zeros(sequences, LENGTH, dtype=torch.int64)
    valid_BL = None if valid_T is None or valid_T.all() else valid_T.view(sequences, LENGTH)
    return RoutingContext(zeros, zeros, zeros, zeros, torch.arange(sequences), valid_BL=valid_BL)


def by_expert(decision: RoutingDecision) -> Tensor:
    """Weight of every expert, [T, E], differentiable; decisions of different width become comparable."""
    ids_TK, weights_TK = decision.expert_ids_TK, decision.weights_TK
    return torch.zeros(len(ids_TK), E + 1).scatter(1, ids_TK % (E + 1), weights_TK)[:, :E]


def route(
    router: Router, x_TM: Tensor, valid_T: Tensor | None, factors_TE: Tensor, recompute: bool
) -> dict[str, Tensor]:
    """Weight of every expert, and the gradients of their sum times factors."""
    x_TM = x_TM.clone().requires_grad_()
    here = context(len(x_TM) // LENGTH, valid_T)

    def weights(x_TM: Tensor) -> Tensor:
        return by_expert(router(x_TM, here))

    weights_TE = checkpoint(weights, x_TM, use_reentrant=False) if recompute else weights(x_TM)
    gradients = torch.autograd.grad((weights_TE * factors_TE).sum(), [x_TM, *router.parameters()])
    return {"weights": weights_TE.detach(), "input": gradients[0], "router": gradients[1]}


def route_on_rank(
    name: str, options: dict[str, Any], training: bool, padded: bool, recompute: bool
) -> dict[str, Tensor]:
    rank = dist.get_rank()
    x_RTM, valid_RT, weight_EM, factors_RTE = inputs(padded)
    router = make_router(name, options, weight_EM, dist.group.WORLD).train(training)
    return route(router, x_RTM[rank], None if valid_RT is None else valid_RT[rank], factors_RTE[rank], recompute)


def routes_on_rank(calls: list[tuple[Any, ...]]) -> list[dict[str, Tensor]]:
    return [route_on_rank(*call) for call in calls]


def route_together(name: str, options: dict[str, Any], training: bool, padded: bool) -> dict[str, Tensor]:
    x_RTM, valid_RT, weight_EM, factors_RTE = inputs(padded)
    router = make_router(name, options, weight_EM, None).train(training)
    valid_T = None if valid_RT is None else valid_RT.flatten()
    return route(router, x_RTM.flatten(0, 1), valid_T, factors_RTE.flatten(0, 1), recompute=False)


CALLS = [
    (name, training, padded, recompute)
    for name, training in (("expert_choice", True), ("expert_choice", False), ("sinkhorn", True), ("base", True))
    for padded in (False, True)
    for recompute in ((False, True) if training else (False,))
]


@pytest.fixture(scope="module")
def over_ranks(run_on_ranks: Callable[..., list[Any]]) -> list[list[dict[str, Tensor]]]:
    """Of each rank the results of all calls, in one launch."""
    calls = [(name, {"pool": "data_parallel"}, *rest) for name, *rest in CALLS]
    return run_on_ranks(routes_on_rank, R, calls)


@pytest.mark.parametrize("number", range(len(CALLS)), ids=["-".join(map(str, call)) for call in CALLS])
def test_ranks_route_as_one_process_with_all_tokens(number: int, over_ranks: list[list[dict[str, Tensor]]]) -> None:
    name, training, padded, _ = CALLS[number]
    ranks = [results[number] for results in over_ranks]
    together = route_together(name, {"pool": "data_parallel"}, training, padded)
    for part in ("weights", "input"):
        torch.testing.assert_close(torch.cat([rank[part] for rank in ranks]), together[part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ranks[0]["router"] + ranks[1]["router"], together["router"], rtol=1e-5, atol=1e-5)
    # The pool matters: micro-batch by micro-batch the routes would be others.
    x_RTM, valid_RT, weight_EM, factors_RTE = inputs(padded)
    alone = make_router(name, {}, weight_EM, None).train(training)
    valid_T = None if valid_RT is None else valid_RT[0]
    assert not torch.allclose(route(alone, x_RTM[0], valid_T, factors_RTE[0], False)["weights"], ranks[0]["weights"])


def take_steps(router: Router, x_RTM: Tensor, valid_RT: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Prices of `quantile` after two steps with one micro-batch for each row."""
    for _ in range(2):
        for x_TM, valid_T in zip(x_RTM, valid_RT, strict=True):
            here = context(SEQUENCES, valid_T)
            router.observe(router(x_TM, here), here)
        router.finish_step(LayerStep(torch.zeros(E, dtype=torch.int64), torch.tensor(0), mean))
    return router.get_buffer("beta_E")


def prices_on_rank() -> Tensor:
    rank = dist.get_rank()
    x_RTM, valid_RT, weight_EM, _ = inputs(padded=True)
    assert valid_RT is not None

    def mean(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values / R

    router = make_router("quantile", {}, weight_EM, dist.group.WORLD)
    return take_steps(router, x_RTM[rank : rank + 1], valid_RT[rank : rank + 1], mean)


def test_quantile_s_prices_do_not_depend_on_which_rank_has_which_micro_batch(
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    ranks = run_on_ranks(prices_on_rank, R)
    x_RTM, valid_RT, weight_EM, _ = inputs(padded=True)
    assert valid_RT is not None
    expected_E = take_steps(make_router("quantile", {}, weight_EM, None), x_RTM, valid_RT, lambda values: values)
    assert torch.equal(ranks[0], ranks[1]) and expected_E.any()
    torch.testing.assert_close(ranks[0], expected_E)
