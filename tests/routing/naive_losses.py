"""The dumbest form of every balancer's loss: scalars, one at a time, from the formula alone. Nothing here calls the
package.

A new balancer gets an oracle here: the loss of one balance set, registered under the balancer's name with the options
to try. Tensors are float64; what is differentiable carries its gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.routing.naive_balance import NaiveLayer, count


@dataclass(frozen=True)
class Routed:
    """One layer of a micro-batch, with all that balancers may read."""

    experts: list[list[int]]
    weights_TK: Tensor
    probabilities_TE: Tensor
    logits_TE: Tensor
    clean_TE: Tensor
    scale_TE: Tensor
    vectors_EX: Tensor
    outputs_TKM: Tensor

    @property
    def num_experts(self) -> int:
        return self.probabilities_TE.shape[1]


Options = dict[str, Any]
LossOfSet = Callable[[Routed, list[int], Options], Tensor]


@dataclass(frozen=True)
class Oracle:
    """Loss of one balance set (layer, its tokens, options), and the options to try."""

    loss: LossOfSet
    options: list[Options]


ORACLES: dict[str, Oracle] = {}


def oracle(name: str, *options: Options) -> Callable[[LossOfSet], LossOfSet]:
    def add(loss: LossOfSet) -> LossOfSet:
        ORACLES[name] = Oracle(loss, list(options) or [{}])
        return loss

    return add


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def fractions(layer: Routed, tokens: list[int]) -> list[float]:
    own = NaiveLayer([layer.experts[t] for t in tokens], layer.probabilities_TE, [True] * len(tokens))
    counts = count([own], layer.num_experts)
    return [c / max(sum(counts), 1) for c in counts]


def squared_variation(loads: list[Tensor]) -> Tensor:
    middle = mean(loads)
    return mean([(load - middle) ** 2 for load in loads]) / middle**2


def entropy(chances: list[Tensor]) -> Tensor:
    return -torch.stack([p * p.log() for p in chances]).sum() / math.log(len(chances))


@oracle("load_balancing_loss")
def _load_balancing_loss(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    E, shares = layer.num_experts, fractions(layer, tokens)
    return torch.stack([E * shares[i] * mean([layer.probabilities_TE[t, i] for t in tokens]) for i in range(E)]).sum()


@oracle("z_loss")
def _z_loss(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    return mean([layer.logits_TE[t].exp().sum().log() ** 2 for t in tokens])


@oracle("entropy", {}, {"token_weight": 0.25, "batch_weight": 3.0}, {"token_weight": 0.0})
def _entropy(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    p_TE, experts = layer.probabilities_TE, range(layer.num_experts)
    of_tokens = mean([entropy([p_TE[t, i] for i in experts]) for t in tokens])
    of_set = entropy([mean([p_TE[t, i] for t in tokens]) for i in experts])
    return options.get("token_weight", 1.0) * of_tokens - options.get("batch_weight", 1.0) * of_set


@oracle("variance")
def _variance(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    E, total = layer.num_experts, torch.zeros((), dtype=torch.float64)
    for i in range(E):
        column = [layer.probabilities_TE[t, i] for t in tokens]
        total = total + mean([(p - mean(column)) ** 2 for p in column])
    return -total * E / (E - 1)


@oracle("importance")
def _importance(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    importance = [torch.zeros((), dtype=torch.float64) for _ in range(layer.num_experts)]
    for t in tokens:
        for place, expert in enumerate(layer.experts[t]):
            if expert != -1:
                importance[expert] = importance[expert] + layer.weights_TK[t, place]
    return squared_variation(importance)


@oracle("load")
def _load(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    K = len(layer.experts[0])
    loads = []
    for i in range(layer.num_experts):
        chances = []
        for t in tokens:
            others = [layer.logits_TE[t, j] for j in range(layer.num_experts) if j != i]
            to_beat = sorted(others, key=lambda logit: -logit.item())[K - 1]
            normal = (layer.clean_TE[t, i] - to_beat) / layer.scale_TE[t, i]
            chances.append((1 + torch.erf(normal / math.sqrt(2))) / 2)
        loads.append(torch.stack(chances).sum())
    return squared_variation(loads)


@oracle("similarity_preserving")
def _similarity_preserving(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    E, R = layer.num_experts, layer.vectors_EX
    entries = [((R[i] * R[j]).sum() - (1.0 if i == j else 0.0)).abs() for i in range(E) for j in range(E)]
    return torch.stack(entries).sum() / E


@oracle("orthogonality")
def _orthogonality(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    overlaps = []
    for t in tokens:
        outputs = [layer.outputs_TKM[t, place] for place, expert in enumerate(layer.experts[t]) if expert != -1]
        squares = [
            (a * b).sum() ** 2 / ((a * a).sum() * (b * b).sum())
            for place, a in enumerate(outputs)
            for b in outputs[place + 1 :]
        ]
        overlaps.append(mean(squares) if squares else torch.zeros((), dtype=torch.float64))
    return mean(overlaps)


@oracle("l1_sparsity", {}, {"sparsity": "layer"})
def _l1_sparsity(layer: Routed, tokens: list[int], options: Options) -> Tensor:
    E, shares = layer.num_experts, fractions(layer, tokens)
    open_gates = [mean([layer.logits_TE[t, i].clamp(min=0) for t in tokens]) for i in range(E)]
    return torch.stack([E * shares[i] * open_gates[i] for i in range(E)]).sum()
