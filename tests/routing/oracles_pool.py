"""The dumbest form of the routers that choose over a pool, and of `quantile`. Nothing here calls the package."""

import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from tests.routing.oracles import (
    Problem,
    Route,
    Token,
    batch_oracle,
    best,
    linear,
    normalises,
    oracle,
    shares,
    softmax,
)

POOLS: tuple[dict[str, Any], ...] = ({}, {"pool": "sequence"}, {"pool": "document"})
KEYS: dict[str, Callable[[Token], Hashable]] = {
    "sequence": lambda token: token.sequence,
    "document": lambda token: (token.sequence, token.document),
    "micro_batch": lambda token: None,
}


def pools_of(tokens: list[Token], problem: Problem) -> list[list[int]]:
    """Indices of the tokens of every pool."""
    key = KEYS[problem.options.get("pool", "micro_batch")]
    pools: dict[Hashable, list[int]] = {}
    for index, token in enumerate(tokens):
        pools.setdefault(key(token), []).append(index)
    return list(pools.values())


def logits_of(tokens: list[Token], problem: Problem) -> list[list[Tensor]]:
    return [linear(problem.parameters["scorer.weight"], token.x) for token in tokens]


def sigmoids(logits: list[Tensor]) -> list[Tensor]:
    return [1 / (1 + (-z).exp()) for z in logits]


def greedy(logits: list[Tensor], k: int) -> list[int]:
    return best(logits, [0.0] * len(logits), k, list(range(len(logits))))


@batch_oracle("expert_choice", *POOLS, {"capacity_factor": 0.6}, {"capacity_factor": 5.0, "pool": "sequence"})
def route_expert_choice(tokens: list[Token], problem: Problem) -> list[Route]:
    logits = logits_of(tokens, problem)
    p = [softmax(z) for z in logits]
    takers: list[list[int]] = [[] for _ in tokens]
    for pool in pools_of(tokens, problem):
        wanted = problem.options.get("capacity_factor", 1.0) * problem.top_k * len(pool) / problem.num_experts
        for e in range(problem.num_experts):
            for t in sorted(pool, key=lambda t: -p[t][e].item())[: max(1, math.ceil(wanted))]:
                takers[t].append(e)
    ordered = [sorted(takers[t], key=lambda e: -p[t][e].item()) for t in range(len(tokens))]
    return [Route(ordered[t], [p[t][e] for e in ordered[t]], p[t], logits[t]) for t in range(len(tokens))]


def transport_plan(scores: list[list[float]]) -> list[list[float]]:
    """All rows of ``exp(scores)`` scaled to sum 1 / N, all columns to 1 / E, in turn, until nothing changes."""
    plan = [[math.exp(score) for score in row] for row in scores]
    N, E = len(plan), len(plan[0])
    for _ in range(20_000):
        before = plan
        plan = [[value / sum(row) / N for value in row] for row in plan]
        sums = [sum(row[e] for row in plan) for e in range(E)]
        plan = [[value / sums[e] / E for e, value in enumerate(row)] for row in plan]
        pairs = zip(itertools.chain(*before), itertools.chain(*plan), strict=True)
        if all(math.isclose(a, b, rel_tol=1e-12) for a, b in pairs):
            return plan
    raise AssertionError("the plan does not converge")


@batch_oracle("sinkhorn", *POOLS)
def route_sinkhorn(tokens: list[Token], problem: Problem) -> list[Route]:
    logits = logits_of(tokens, problem)
    chosen = [greedy(z, problem.top_k) for z in logits]
    if problem.training:
        for pool in pools_of(tokens, problem):
            plan = transport_plan([[z.item() for z in logits[t]] for t in pool])
            for t, row in zip(pool, plan, strict=True):
                chosen[t] = sorted(range(problem.num_experts), key=lambda e: -row[e])[: problem.top_k]
    routes = []
    for z, experts in zip(logits, chosen, strict=True):
        gates = sigmoids(z) if problem.top_k == 1 else softmax(z)
        routes.append(Route(experts, [gates[e] for e in experts], shares(gates), z))
    return routes


def cheapest_path(edges: dict[tuple[int, int], list[float]], source: int, sink: int) -> list[int]:
    """Bellman and Ford's path over the edges with room left, ``(from, to) -> [room, cost]``."""
    distance, previous = {source: 0.0}, {}
    changed = True
    while changed:
        changed = False
        for (a, b), (room, cost) in edges.items():
            if room > 0 and a in distance and distance[a] + cost < distance.get(b, math.inf) - 1e-12:
                distance[b], previous[b], changed = distance[a] + cost, a, True
    assert sink in distance, "no balanced assignment"
    path = [sink]
    while path[-1] != source:
        path.append(previous[path[-1]])
    return path[::-1]


def best_assignment(
    scores: list[list[float]], barred: list[list[int]], fewest: list[int], most: list[int]
) -> list[int]:
    """The expert of every token, by successive cheapest paths from a source over tokens and experts to a sink.

    An expert's first `fewest` places are so cheap that they are filled before any other.
    """
    N, E, prize = len(scores), len(scores[0]), 1e4
    source, sink, extra = N + E, N + E + 1, N + E + 2
    edges: dict[tuple[int, int], list[float]] = {}

    def connect(a: int, b: int, room: int, cost: float) -> None:
        edges[a, b], edges[b, a] = [room, cost], [0, -cost]

    for t in range(N):
        connect(source, t, 1, 0.0)
        for e in set(range(E)) - set(barred[t]):
            connect(t, N + e, 1, -scores[t][e])
    for e in range(E):
        connect(N + e, sink, fewest[e], -prize)
        connect(N + e, extra, most[e] - fewest[e], 0.0)
    connect(extra, sink, N, 0.0)
    for _ in range(N):
        path = cheapest_path(edges, source, sink)
        for a, b in itertools.pairwise(path):
            edges[a, b][0] -= 1
            edges[b, a][0] += 1
    return [next(e for e in range(E) if (N + e, t) in edges and edges[N + e, t][0] > 0) for t in range(N)]


@batch_oracle("base", *POOLS)
def route_base(tokens: list[Token], problem: Problem) -> list[Route]:
    logits = logits_of(tokens, problem)
    chosen = [greedy(z, problem.top_k) for z in logits]
    if problem.training:
        for pool in pools_of(tokens, problem):
            scores = [[z.item() for z in logits[t]] for t in pool]
            mine: list[list[int]] = [[] for _ in pool]
            for choice in range(1, problem.top_k + 1):
                taken = [sum(e in experts for experts in mine) for e in range(problem.num_experts)]
                due = choice * len(pool) / problem.num_experts
                fewest = [max(0, math.floor(due) - n) for n in taken]
                most = [math.ceil(due) - n for n in taken]
                for experts, e in zip(mine, best_assignment(scores, mine, fewest, most), strict=True):
                    experts.append(e)
            for t, experts in zip(pool, mine, strict=True):
                chosen[t] = experts
    gates = [sigmoids(z) for z in logits]
    return [
        Route(experts, [g[e] for e in experts], shares(g), z)
        for z, g, experts in zip(logits, gates, chosen, strict=True)
    ]


@oracle("quantile", {}, {"normalise": True}, {"normalise": False})
def route_quantile(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    p = softmax(logits)
    relief = [-beta for beta in problem.state["beta_E"].tolist()]
    experts = best(logits, relief, problem.top_k, list(range(problem.num_experts)))
    weights = [p[e] for e in experts]
    return Route(experts, shares(weights) if normalises(problem) else weights, p, logits)


def naive_prices(logits: Tensor, beta: list[float], k: int) -> list[float]:
    """The two quantiles of `quantile`, by sorting Python lists."""
    rows = logits.tolist()
    T, E = len(rows), len(beta)
    alpha = [sorted((z - b for z, b in zip(row, beta, strict=True)), reverse=True)[k] for row in rows]
    return [sorted((rows[t][e] - alpha[t] for t in range(T)), reverse=True)[T * k // E] for e in range(E)]
