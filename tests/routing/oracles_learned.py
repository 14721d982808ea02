"""Oracles of the routers that decide for each token by a learned score: see `oracles`."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from tests.routing.oracles import (
    Problem,
    Route,
    Token,
    best,
    linear,
    normalises,
    oracle,
    shares,
    softmax,
    split_mix,
)


def length(vector: Tensor) -> Tensor:
    return vector.square().sum().sqrt()


def route_top_k_of(logits: list[Tensor], token: Token, problem: Problem) -> Route:
    """Softmax over all, the K largest."""
    p = softmax(logits)
    experts = best(p, token.bias, problem.top_k, list(range(problem.num_experts)))
    weights = [p[e] for e in experts]
    return Route(experts, shares(weights) if normalises(problem) else weights, p, logits)


def normal_draw(token: Token, expert: int, problem: Problem) -> float:
    """The quantile of N(0, 1) in the middle of one of 2^24 equal parts."""
    part = split_mix(problem.seed, problem.layer, token.sequence, token.position, expert) >> 40
    return NormalDist().inv_cdf((part + 0.5) / 2**24)


@oracle("noisy_top_k", {}, {"normalise": True}, {"normalise": False})
def route_noisy_top_k(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    if problem.training:
        scales = [(1 + z.exp()).log() for z in linear(problem.parameters["noise_scorer.weight"], token.x)]
        logits = [z + normal_draw(token, e, problem) * scales[e] for e, z in enumerate(logits)]
    return route_top_k_of(logits, token, problem)


@oracle("mlp", {}, {"hidden_size": 9, "normalise": False})
def route_mlp(token: Token, problem: Problem) -> Route:
    hidden = [0.5 * h * (1 + (h / 2**0.5).erf()) for h in linear(problem.parameters["scorer.hidden.weight"], token.x)]
    return route_top_k_of(linear(problem.parameters["scorer.weight"], torch.stack(hidden)), token, problem)


@oracle("cosine", {}, {"projection_size": 3, "normalise": False}, {"initial_scale": 50.0})
def route_cosine(token: Token, problem: Problem) -> Route:
    projected = torch.stack(linear(problem.parameters["scorer.projection.weight"], token.x))
    scale = problem.parameters["scorer.log_scale"].squeeze().exp()
    if scale > 100:
        scale = torch.tensor(100.0, dtype=torch.float64)
    directions = problem.parameters["scorer.weight"]
    cosines = [(projected * row).sum() / (length(projected) * length(row)) for row in directions]
    return route_top_k_of([scale * cosine for cosine in cosines], token, problem)


@oracle(
    "group_limited",
    {},
    {"affinity": "softmax", "group_score": "max", "normalise": False, "route_scale": 16.0},
    {"groups": 8, "groups_kept": 3, "group_score": "max"},
    {"groups": 4, "groups_kept": 2},
    {"groups": 6, "groups_kept": 2, "affinity": "softmax", "group_score": "top_sum"},
    {"groups": 1, "groups_kept": 1, "normalise": True},
)
def route_group_limited(token: Token, problem: Problem) -> Route:
    groups, kept = problem.options.get("groups", 2), problem.options.get("groups_kept", 1)
    size = problem.num_experts // groups
    logits = linear(problem.parameters["scorer.weight"], token.x)
    if problem.options.get("affinity") == "softmax":
        affinity = probabilities = softmax(logits)
    else:
        affinity = [1 / (1 + (-z).exp()) for z in logits]
        probabilities = shares(affinity)

    counted = 1 if problem.options.get("group_score") == "max" else math.ceil(problem.top_k / kept)

    def worth(group: int) -> float:
        members = range(group * size, (group + 1) * size)
        return sum(sorted((affinity[e].item() + token.bias[e] for e in members), reverse=True)[:counted])

    chosen = sorted(range(groups), key=lambda group: -worth(group))[:kept]
    allowed = [group * size + member for group in chosen for member in range(size)]
    experts = best(affinity, token.bias, problem.top_k, allowed)
    weights = [affinity[e] for e in experts]
    if normalises(problem):
        weights = shares(weights)
    scale = problem.options.get("route_scale", 1.0)
    return Route(experts, [scale * weight for weight in weights], probabilities, logits)


@oracle("relu")
def route_relu(token: Token, problem: Problem) -> Route:
    offset = problem.parameters["scorer.offset"]
    logits = [z + offset[e] for e, z in enumerate(linear(problem.parameters["scorer.weight"], token.x))]
    gates = [z if z > 0 else 0 * z for z in logits]
    open_gates = [e for e, gate in enumerate(gates) if gate > 0]
    experts = sorted(open_gates, key=lambda e: -gates[e].item())
    even = torch.tensor(1 / problem.num_experts, dtype=torch.float64)
    probabilities = shares(gates) if open_gates else [even] * problem.num_experts
    return Route(experts, [gates[e] for e in experts], probabilities, logits)


def weights_over(experts: list[int], p: list[Tensor], problem: Problem) -> list[Tensor]:
    weights = [p[e] for e in experts]
    return shares(weights) if problem.options.get("normalise") and weights else weights


@oracle("top_p", {}, {"normalise": True, "rate": 0.5})
def route_top_p(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    p = softmax(logits)
    experts, total = [], 0.0
    for e in sorted(range(problem.num_experts), key=lambda e: -p[e].item()):
        if total < problem.state["tau"].item():
            experts.append(e)
            total += p[e].item()
    return Route(experts, weights_over(experts, p, problem), p, logits)


@oracle("expert_threshold", {}, {"normalise": True, "decay": 0.5})
def route_expert_threshold(token: Token, problem: Problem) -> Route:
    logits = linear(problem.parameters["scorer.weight"], token.x)
    p = softmax(logits)
    ordered = sorted(range(problem.num_experts), key=lambda e: -p[e].item())
    if problem.state["steps"] == 0:
        experts = ordered[: problem.top_k]
    else:
        experts = [e for e in ordered if p[e].item() > problem.state["thresholds_E"][e].item()]
    return Route(experts, weights_over(experts, p, problem), p, logits)
