"""The dumbest form of every router: one token at a time, from the formula alone. Nothing here calls the package.

A new router gets an oracle here: a function of one token and of the router's parameters, registered under the router's
name with the options to try. Numbers are float64 scalars that carry gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What a router is built from, in plain Python: its parameters (float64) and buffers, and whether it trains."""

    num_experts: int
    top_k: int
    layer: int
    seed: int
    domain_weights: tuple[float, ...]
    token_counts: list[list[int]]
    parameters: dict[str, Tensor]
    options: dict[str, Any]
    state: dict[str, Tensor]
    training: bool


@dataclass(frozen=True)
class Token:
    """One token and what is known of it; ``bias`` is the selection bias of every expert, ``document`` is numbered
    within the batch."""

    x: Tensor
    token_id: int
    domain: int
    sequence: int
    document: int
    position: int
    bias: list[float]


@dataclass(frozen=True)
class Route:
    """Experts and weights, best first; probability and logit of every expert where there are scores."""

    experts: list[int]
    weights: list[Tensor]
    probabilities: list[Tensor] | None = None
    logits: list[Tensor] | None = None


RouteToken = Callable[[Token, Problem], Route]
RouteBatch = Callable[[list[Token], Problem], list[Route]]


@dataclass(frozen=True)
class Oracle:
    route: RouteBatch
    options: list[dict[str, Any]]


ORACLES: dict[str, Oracle] = {}


def oracle(name: str, *options: dict[str, Any]) -> Callable[[RouteToken], RouteToken]:
    """Registers the route of one token, which does not depend on the others."""

    def add(route: RouteToken) -> RouteToken:
        ORACLES[name] = Oracle(lambda tokens, problem: [route(t, problem) for t in tokens], list(options) or [{}])
        return route

    return add


def batch_oracle(name: str, *options: dict[str, Any]) -> Callable[[RouteBatch], RouteBatch]:
    """Registers the routes of all tokens of a micro-batch, in order, for routers that choose over a pool."""

    def add(route: RouteBatch) -> RouteBatch:
        ORACLES[name] = Oracle(route, list(options) or [{}])
        return route

    return add


def linear(weight: Tensor, x: Tensor) -> list[Tensor]:
    return [(row * x).sum() for row in weight]


def softmax(values: list[Tensor]) -> list[Tensor]:
    return shares([value.exp() for value in values])


def best(scores: list[Tensor], bias: list[float], k: int, among: list[int]) -> list[int]:
    return sorted(among, key=lambda e: -(scores[e].item() + bias[e]))[:k]


def shares(values: list[Tensor]) -> list[Tensor]:
    total = sum(values[1:], values[0])
    return [value / total for value in values]


def normalises(problem: Problem) -> bool:
    wanted: bool | None = problem.options.get("normalise")
    return problem.top_k > 1 if wanted is None else wanted


def one_over_k(k: int) -> list[Tensor]:
    return [torch.tensor(1 / k, dtype=torch.float64)] * k


@oracle("top_k", {}, {"normalise": True}, {"normalise": False})
@oracle("frozen", {}, {"normalise": True}, {"normalise": False})
def route_top_k(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    p = softmax(logits)
    experts = best(p, token.bias, problem.top_k, list(range(problem.num_experts)))
    weights = [p[e] for e in experts]
    return Route(experts, shares(weights) if normalises(problem) else weights, p, logits)


@oracle("top_k_softmax")
def route_top_k_softmax(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    experts = best(logits, token.bias, problem.top_k, list(range(problem.num_experts)))
    return Route(experts, softmax([logits[e] for e in experts]), softmax(logits), logits)


@oracle("sigmoid", {}, {"normalise": True}, {"normalise": False}, {"route_scale": 2.5})
def route_sigmoid(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    s = [1 / (1 + (-z).exp()) for z in logits]
    experts = best(s, token.bias, problem.top_k, list(range(problem.num_experts)))
    weights = [s[e] for e in experts]
    if normalises(problem):
        weights = shares(weights)
    scale = problem.options.get("route_scale", 1.0)
    return Route(experts, [scale * weight for weight in weights], shares(s), logits)


def greedy_table(frequencies: list[float], experts: list[int], k: int, seed: int) -> list[list[int]]:
    """From frequent to rare, the order shaken by the seed; each token goes to the k experts that carry least."""
    generator = torch.Generator().manual_seed(seed)
    shake = (0.5 + torch.rand(len(frequencies), generator=generator, dtype=torch.float64)).tolist()
    load, tokens = dict.fromkeys(experts, 0.0), dict.fromkeys(experts, 0)
    table: list[list[int]] = [[] for _ in frequencies]
    for token in sorted(range(len(frequencies)), key=lambda v: (-frequencies[v] * shake[v], v)):
        table[token] = sorted(experts, key=lambda e: (load[e], tokens[e], e))[:k]
        for e in table[token]:
            load[e] += frequencies[token]
            tokens[e] += 1
    return table


def expected_frequencies(problem: Problem) -> list[float]:
    """Share of every token id in the mix, by exact summation over domains."""
    return [
        math.fsum(
            weight * counts[v] / sum(counts)
            for weight, counts in zip(problem.domain_weights, problem.token_counts, strict=True)
        )
        for v in range(len(problem.token_counts[0]))
    ]


@oracle("hash", {"table": "balanced"}, {"table": "modulo"})
def route_hash(token: Token, problem: Problem) -> Route:
    E, K, seed = problem.num_experts, problem.top_k, problem.seed * 1_000 + problem.layer
    if problem.options["table"] == "balanced":
        experts = greedy_table(expected_frequencies(problem), list(range(E)), K, seed)[token.token_id]
        return Route(experts, one_over_k(K))
    generator = torch.Generator().manual_seed(seed)
    strides = [stride for stride in range(1, E) if all(stride % f or E % f for f in range(2, E + 1))]
    stride = strides[int(torch.randint(len(strides), (), generator=generator))]
    offset = int(torch.randint(E, (), generator=generator))
    return Route([(token.token_id + offset + j * stride) % E for j in range(K)], one_over_k(K))


def split_mix(*keys: int) -> int:
    """SplitMix64 with the state moved by each key before it is mixed, as unsigned integers."""
    mask, state = 2**64 - 1, 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


@oracle("random")
def route_random(token: Token, problem: Problem) -> Route:
    draws = [
        split_mix(problem.seed, problem.layer, token.sequence, token.position, e) >> 40
        for e in range(problem.num_experts)
    ]
    experts = sorted(range(problem.num_experts), key=lambda e: -draws[e])
    return Route(experts[: problem.top_k], one_over_k(problem.top_k))


def largest_remainder(num_experts: int, parts: tuple[float, ...], smallest: int) -> list[int]:
    """Every part gets ``smallest``; the others go to the parts in proportion to what is due to them beyond that."""
    due = [max(part / sum(parts) * num_experts - smallest, 0.0) for part in parts]
    spare = num_experts - smallest * len(parts)
    sizes = [smallest + int(spare * d / sum(due)) if sum(due) else smallest for d in due]
    while sum(sizes) < num_experts:
        wanting = [smallest + spare * d / sum(due) - size for d, size in zip(due, sizes, strict=True)]
        sizes[wanting.index(max(wanting))] += 1
    return sizes


DOMAIN_NAMES = ("prose", "code", "law", "music")


def families(problem: Problem) -> list[list[int]]:
    """The domains of every family; without a partition each domain is one."""
    partition = problem.options.get("partition") or {name: [name] for name in DOMAIN_NAMES}
    return [[DOMAIN_NAMES.index(name) for name in names] for names in partition.values()]


def group_of(token: Token, problem: Problem) -> int:
    """The group of the token's domain and document."""
    parts = problem.options.get("document_parts", 1)
    part = split_mix(problem.seed, token.document) * parts >> 64 if parts > 1 else 0
    return next(f for f, domains in enumerate(families(problem)) if token.domain in domains) * parts + part


def group_shares(problem: Problem) -> list[float]:
    """Share of the mix that every group serves."""
    parts = problem.options.get("document_parts", 1)
    of_families = [math.fsum(problem.domain_weights[d] for d in domains) for domains in families(problem)]
    return [share / parts for share in of_families for _ in range(parts)]


def experts_of_group(group: int, problem: Problem) -> list[int]:
    shares_of_mix = group_shares(problem)
    parts = tuple(shares_of_mix) if problem.options.get("groups") == "proportional" else (1.0,) * len(shares_of_mix)
    sizes = largest_remainder(problem.num_experts, parts, problem.top_k)
    return list(range(sum(sizes[:group]), sum(sizes[: group + 1])))


def frequencies_in_group(group: int, problem: Problem) -> list[float]:
    """Of every token id among the group's domains in the mix's proportions; of a single domain its counts."""
    domains = families(problem)[group // problem.options.get("document_parts", 1)]
    factors = [problem.domain_weights[d] / sum(problem.token_counts[d]) for d in domains]
    columns = zip(*(problem.token_counts[d] for d in domains), strict=True)
    return [
        math.fsum(factor / max(factors) * count for factor, count in zip(factors, counts, strict=True))
        for counts in columns
    ]


def route_inside(group_number: int, token: Token, problem: Problem) -> Route:
    """The routing of a token that a group serves."""
    group, inside = experts_of_group(group_number, problem), problem.options.get("inside", "learned")
    if inside == "all":
        return Route(group, one_over_k(problem.top_k))
    if inside == "hash":
        seed = (problem.seed * 1_000 + problem.layer) * 1_000 + group_number
        table = greedy_table(frequencies_in_group(group_number, problem), group, problem.top_k, seed)
        return Route(table[token.token_id], one_over_k(problem.top_k))
    logits = linear(problem.parameters["scorer.weight"], token.x)
    p_group = dict(zip(group, softmax([logits[e] for e in group]), strict=True))
    zero, minus_infinity = torch.zeros((), dtype=torch.float64), torch.tensor(-math.inf, dtype=torch.float64)
    p = [p_group.get(e, zero) for e in range(problem.num_experts)]
    experts = best(p, token.bias, problem.top_k, group)
    inside_logits = [logits[e] if e in group else minus_infinity for e in range(problem.num_experts)]
    weights = [p[e] for e in experts]
    return Route(experts, shares(weights) if problem.top_k > 1 else weights, p, inside_logits)


REFERENCE_OPTIONS: tuple[dict[str, Any], ...] = (
    {"groups": "equal"},
    {"groups": "proportional"},
    {"inside": "hash"},
    {"inside": "hash", "groups": "proportional"},
    {"inside": "all"},
    {"partition": {"language": ["law", "prose"], "code": ["code"], "music": ["music"]}},
    {"partition": {"even": ["prose", "law"], "odd": ["code", "music"]}, "groups": "proportional", "document_parts": 2},
    {"partition": {"first": ["prose", "code"], "others": ["law", "music"]}, "inside": "hash", "document_parts": 2},
)


@oracle("reference", *REFERENCE_OPTIONS)
def route_reference(token: Token, problem: Problem) -> Route:
    return route_inside(group_of(token, problem), token, problem)


@oracle("permuted_reference", *REFERENCE_OPTIONS)
def route_permuted_reference(token: Token, problem: Problem) -> Route:
    draw = (split_mix(problem.seed, token.sequence, group_of(token, problem)) >> 40) / 2**24
    group, ends = 0, group_shares(problem)
    while draw >= math.fsum(ends[: group + 1]):
        group += 1
    return route_inside(group, token, problem)
