"""What each family's router does with one token, written down from its paper, one expert at a time.

Shape legend: E experts, M model width, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Choice = tuple[list[int], list[float], Floats]
"""Experts, heaviest first; their weights; the distribution over all experts."""


def softmax(logits_E: Floats) -> Floats:
    exponentials = [math.exp(logit - max(logits_E)) for logit in logits_E]
    return np.array(exponentials) / sum(exponentials)


def best(scores: Floats, number: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:number]


def in_best_groups(scores_E: Floats, groups: int, kept: int, value: Callable[[Floats], float]) -> list[int]:
    """The experts of the `kept` groups of highest value."""
    size = len(scores_E) // groups
    values = np.array([value(scores_E[group * size : (group + 1) * size]) for group in range(groups)])
    return [group * size + member for group in best(values, kept) for member in range(size)]


def ordered(experts: list[int], weight: Callable[[int], float], probabilities_E: Floats) -> Choice:
    experts = sorted(experts, key=lambda expert: -weight(expert))
    return experts, [weight(expert) for expert in experts], probabilities_E


def choose(name: str, router: Any, hidden_M: Floats) -> Choice:
    """The decision for one token by the router of a family of ``models.CONFIGS``."""
    logits_E = np.array([sum(h * w for h, w in zip(hidden_M, row, strict=True)) for row in router.weight.tolist()])
    top_k = router.top_k
    if name == "gpt_oss":
        logits_E = logits_E + np.array(router.bias.tolist())
        experts = best(logits_E, top_k)
        weights = dict(zip(experts, softmax(logits_E[experts]), strict=True))
        return ordered(experts, lambda expert: float(weights[expert]), softmax(logits_E))
    if name == "deepseek_v3":
        affinity_E = np.array([1 / (1 + math.exp(-logit)) for logit in logits_E])
        biased_E = affinity_E + np.array(router.e_score_correction_bias.tolist())
        allowed = in_best_groups(biased_E, 4, 2, lambda scores: float(sum(sorted(scores)[-2:])))
        experts = sorted(allowed, key=lambda expert: -biased_E[expert])[:top_k]
        total = sum(affinity_E[experts])
        return ordered(experts, lambda expert: float(2.5 * affinity_E[expert] / total), affinity_E / affinity_E.sum())
    probabilities_E = softmax(logits_E)
    allowed = list(range(len(logits_E)))
    if name == "deepseek_v2_groups":
        allowed = in_best_groups(probabilities_E, 4, 2, max)
    experts = sorted(allowed, key=lambda expert: -probabilities_E[expert])[:top_k]
    total = sum(probabilities_E[experts]) if name in ("mixtral", "qwen3_moe") else 1.0
    return ordered(experts, lambda expert: float(probabilities_E[expert] / total), probabilities_E)
