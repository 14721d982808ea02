"""Balance sets and their losses by loops over tokens, from the definitions alone. Nothing here calls the package."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaiveLayer:
    """One layer's routing of a micro-batch: per token its experts and its probabilities, and whether it is padding."""

    experts: list[list[int]]
    probabilities_TE: Tensor
    valid: list[bool]


def sequence_of(length: int) -> Callable[[int], int]:
    return lambda t: t // length


SET_OF_TOKEN: dict[str, Callable[[int], Callable[[int], int]]] = {
    "token": lambda length: lambda t: t,
    "sequence": sequence_of,
    "micro_batch": lambda length: lambda t: 0,
}


def count(layers: list[NaiveLayer], num_experts: int) -> list[int]:
    """Assignments over all tokens of several micro-batches."""
    counts = [0] * num_experts
    for layer in layers:
        for experts, valid in zip(layer.experts, layer.valid, strict=True):
            for expert in experts:
                if valid and expert != -1:
                    counts[expert] += 1
    return counts


def sets_of(layer: NaiveLayer, scope: str, length: int) -> list[list[int]]:
    """Tokens of every balance set that holds a token."""
    set_of = SET_OF_TOKEN[scope](length)
    sets: dict[int, list[int]] = {}
    for token, valid in enumerate(layer.valid):
        if valid:
            sets.setdefault(set_of(token), []).append(token)
    return list(sets.values())


def loss_of_set(tokens: list[int], layer: NaiveLayer, counts: list[int]) -> Tensor:
    """``E * sum_i f_i P_i`` of one set."""
    E = layer.probabilities_TE.shape[1]
    total = torch.zeros((), dtype=layer.probabilities_TE.dtype)
    for i in range(E):
        mean = sum(layer.probabilities_TE[t, i] for t in tokens) / len(tokens)
        total = total + E * counts[i] / max(sum(counts), 1) * mean
    return total


def naive_loss(layer: NaiveLayer, scope: str, length: int, wider_counts: list[int] | None = None) -> Tensor:
    """Mean over tokens of the loss of the set that they belong to."""
    E, total = layer.probabilities_TE.shape[1], torch.zeros((), dtype=layer.probabilities_TE.dtype)
    for tokens in sets_of(layer, scope, length):
        own = NaiveLayer([layer.experts[t] for t in tokens], layer.probabilities_TE, [True] * len(tokens))
        counts = count([own], E) if wider_counts is None else wider_counts
        total = total + len(tokens) * loss_of_set(tokens, layer, counts)
    return total / sum(layer.valid)


def naive_direction(layer: NaiveLayer, scope: str, length: int) -> list[float]:
    """Mean over tokens of the sign of (mean count - count) in the set that they belong to."""
    E = layer.probabilities_TE.shape[1]
    direction = [0.0] * E
    for tokens in sets_of(layer, scope, length):
        own = NaiveLayer([layer.experts[t] for t in tokens], layer.probabilities_TE, [True] * len(tokens))
        for i, sign in enumerate(signs(count([own], E))):
            direction[i] += len(tokens) / sum(layer.valid) * sign
    return direction


def signs(counts: list[int]) -> list[int]:
    """sign(mean(C) - C_i), in integers."""
    return [(sum(counts) > c * len(counts)) - (sum(counts) < c * len(counts)) for c in counts]
