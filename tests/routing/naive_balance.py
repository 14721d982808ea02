"""Balance sets and their losses by loops over tokens, from the definitions alone. Nothing here calls the package."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaiveLayer:
    """One layer's routing of a micro-batch: per token its experts, its probabilities, whether it is no padding, and the
    number of its document."""

    experts: list[list[int]]
    probabilities_TE: Tensor
    valid: list[bool]
    documents: list[int] | None = None


def set_of_token(scope: str, token: int, length: int, documents: list[int] | None) -> tuple[int, ...]:
    """What the tokens of one balance set have in common."""
    if scope == "token":
        return (token,)
    if scope == "sequence":
        return (token // length,)
    if scope == "document":
        assert documents is not None
        return token // length, documents[token]
    assert scope == "micro_batch"
    return ()


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
    sets: dict[tuple[int, ...], list[int]] = {}
    for token, valid in enumerate(layer.valid):
        if valid:
            sets.setdefault(set_of_token(scope, token, length, layer.documents), []).append(token)
    return list(sets.values())


def loss_of_set(tokens: list[int], layer: NaiveLayer, counts: Sequence[float]) -> Tensor:
    """``E * sum_i f_i P_i`` of one set."""
    E = layer.probabilities_TE.shape[1]
    total = torch.zeros((), dtype=layer.probabilities_TE.dtype)
    for i in range(E):
        mean = sum(layer.probabilities_TE[t, i] for t in tokens) / len(tokens)
        total = total + E * counts[i] / max(sum(counts), 1) * mean
    return total


def naive_loss(layer: NaiveLayer, scope: str, length: int, wider_counts: Sequence[float] | None = None) -> Tensor:
    """Mean over tokens of the loss of the set that they belong to."""
    E, total = layer.probabilities_TE.shape[1], torch.zeros((), dtype=layer.probabilities_TE.dtype)
    for tokens in sets_of(layer, scope, length):
        own = NaiveLayer([layer.experts[t] for t in tokens], layer.probabilities_TE, [True] * len(tokens))
        counts = wider_counts or count([own], E)
        total = total + len(tokens) * loss_of_set(tokens, layer, counts)
    return total / sum(layer.valid)


def naive_direction(layer: NaiveLayer, scope: str, length: int, update: str = "sign") -> list[float]:
    """Mean over tokens of the update in the set that they belong to."""
    E = layer.probabilities_TE.shape[1]
    direction = [0.0] * E
    for tokens in sets_of(layer, scope, length):
        own = NaiveLayer([layer.experts[t] for t in tokens], layer.probabilities_TE, [True] * len(tokens))
        for i, step in enumerate(UPDATES[update](count([own], E))):
            direction[i] += len(tokens) / sum(layer.valid) * step
    return direction


def signs(counts: Sequence[float]) -> list[float]:
    """sign(mean(C) - C_i), without rounding."""
    return [float((sum(counts) > c * len(counts)) - (sum(counts) < c * len(counts))) for c in counts]


def distances(counts: Sequence[float]) -> list[float]:
    """(mean(C) - C_i) / mean(C)."""
    mean = sum(counts) / len(counts)
    return [(mean - c) / mean for c in counts]


UPDATES = {"sign": signs, "proportional": distances}


def naive_window(steps: list[list[int]], n: int) -> list[float]:
    """Moving average of the counts of some steps: the newest weighs 1 / n, the first stands for all before it."""
    average = [float(c) for c in steps[0]]
    for counts in steps[1:]:
        average = [(1 - 1 / n) * a + 1 / n * c for a, c in zip(average, counts, strict=True)]
    return average
