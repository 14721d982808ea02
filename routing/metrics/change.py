"""How routing changes over a training, from the choices that the same probe tokens make at several steps.

Shape legend: T tokens of the probe, E experts, W places for choices, X places of a table in one row. `ids_TW` are the
chosen experts of one layer, first choice first, -1 where a token chose fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.metric import Metric

SETTLED_LEVEL = 0.9


def saturation(ids_TW: ArrayLike, final_TW: ArrayLike) -> float:
    """Mean over tokens of |S_t ∩ S_final| / |S_final|: how many of its final experts a token already has; 0 to 1.

    Chance is k/E. Tokens without a final choice are left out; nan if none remains. Blind to the order of the choices,
    and to when the router changes its mind and back. Raises ValueError for different numbers of tokens.
    Source: router saturation, OLMoE (arXiv 2409.02060).
    """
    now, final = _same_tokens(ids_TW, final_TW)
    num_experts = int(max(now.max(initial=-1), final.max(initial=-1))) + 1
    # Tokens x experts in one row, each token with a place before its experts for -1: a table would take twice the time.
    before_T1 = (num_experts + 1) * np.arange(len(now))[:, None] + 1
    now_TW, final_TW = before_T1 + now, before_T1 + final
    chosen_X = np.zeros((num_experts + 1) * len(now), dtype=bool)
    chosen_X[now_TW] = True
    # S_final is a set: of an expert that stands in it twice the last place counts, and -1 not at all.
    last_X = np.empty(len(chosen_X), dtype=np.int64)
    last_X[final_TW] = np.arange(final.shape[1])
    in_final_TW = (last_X[final_TW] == np.arange(final.shape[1])) & (final >= 0)
    size_T = np.einsum("tw->t", in_final_TW.astype(np.int64))
    kept_T = np.einsum("tw->t", (in_final_TW & chosen_X[final_TW]).astype(np.int64))
    share_T = kept_T[size_T > 0] / size_T[size_T > 0]
    return float(share_T.mean()) if share_T.size else float("nan")


def fluctuation(ids_TW: ArrayLike, before_TW: ArrayLike) -> float:
    """Share of tokens whose first choice is another than before; 0 (none) to 1 (all).

    Chance for an even load is 1 - 1/E. To choose nothing counts as a choice. nan without tokens. Blind to the other
    choices, and it grows with the steps between the two. Raises ValueError for different numbers of tokens.
    Source: routing fluctuation, StableMoE (arXiv 2204.08396).
    """
    now, before = _same_tokens(ids_TW, before_TW)
    return float(np.mean(now[:, 0] != before[:, 0])) if len(now) else float("nan")


def first_choice_kept(ids_TW: ArrayLike, before_TW: ArrayLike) -> float:
    """Share of tokens whose first choice is the same as before; 0 (none) to 1 (all). It is 1 less `fluctuation`.

    `first_choice_kept_chance` is its chance. nan without tokens. Raises ValueError for different numbers of tokens.
    """
    return 1.0 - fluctuation(ids_TW, before_TW)


def first_choice_kept_chance(ids_TW: ArrayLike, before_TW: ArrayLike) -> float:
    """What `first_choice_kept` would be if the two routings knew nothing of one another and had the loads that they
    have: its mean over all pairs of a token now and a token before, sum_e q_e q'_e for the shares of first choices.

    nan without tokens. Blind to what tokens have in common, such as their domain. Raises ValueError for different
    numbers of tokens.
    """
    now, before = _same_tokens(ids_TW, before_TW)
    if not len(now):
        return float("nan")
    width = int(max(now.max(), before.max())) + 2  # the first place is that of no choice
    shares = [np.bincount(ids_TW[:, 0] + 1, minlength=width) / len(ids_TW) for ids_TW in (now, before)]
    return float(shares[0] @ shares[1])


def choices_kept(ids_TW: ArrayLike, before_TW: ArrayLike) -> float:
    """Mean over tokens of |S ∩ S_before| / |S|: how many of its experts a token had before; 0 to 1. It is `saturation`
    with the routing before in the place of that on the way.

    `choices_kept_chance` is its chance. Raises ValueError for different numbers of tokens.
    """
    return saturation(before_TW, ids_TW)


def choices_kept_chance(ids_TW: ArrayLike, before_TW: ArrayLike) -> float:
    """What `choices_kept` would be if the two routings knew nothing of one another and had the loads that they have:
    its mean over all pairs of a token now and a token before.

    nan if no token has a choice now. Blind to what tokens have in common, such as their domain. Raises ValueError for
    different numbers of tokens.
    """
    now, before = _same_tokens(ids_TW, before_TW)
    num_experts = int(max(now.max(initial=-1), before.max(initial=-1))) + 1
    now_TE, before_TE = _chosen(now, num_experts), _chosen(before, num_experts)
    now_TE = now_TE[now_TE.any(axis=1)]
    if not len(now_TE):
        return float("nan")
    weight_E = (now_TE / now_TE.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(weight_E @ before_TE.mean(axis=0))


def settled_step(steps: Sequence[int], saturation_values: ArrayLike, level: float = SETTLED_LEVEL) -> int | None:
    """The first of the steps from which on the saturation stays at or above the level; None if there is none.

    The last value does not count by itself, since there the end is compared with itself: a layer that reaches the
    level only there has not settled. A nan is below every level. Blind to what happens between the steps recorded.
    Raises ValueError where the steps do not rise or are not as many as the values.
    """
    values = np.asarray(saturation_values, dtype=np.float64)
    if values.shape != (len(steps),) or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(
            f"there must be one value for each of rising steps, got {list(steps)} and values of shape {values.shape}"
        )
    settled: int | None = None
    for step, value in zip(reversed(steps), values[::-1], strict=True):
        if not value >= level:
            break
        settled = step
    return None if settled is None or settled == steps[-1] else int(settled)


def _chosen(ids_TW: NDArray[np.int64], num_experts: int) -> NDArray[np.bool_]:
    """The experts [T, E] that each token has chosen."""
    chosen = np.zeros((len(ids_TW), num_experts + 1), dtype=bool)
    np.put_along_axis(chosen, ids_TW + 1, True, axis=1)
    return chosen[:, 1:]


def _same_tokens(ids_TW: ArrayLike, others_TW: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids, others = np.asarray(ids_TW, dtype=np.int64), np.asarray(others_TW, dtype=np.int64)
    if ids.ndim != 2 or others.ndim != 2 or len(ids) != len(others) or 0 in (ids.shape[1], others.shape[1]):
        raise ValueError(f"both choices must be tokens x experts for the same tokens, got {ids.shape}, {others.shape}")
    return ids, others


METRICS = (
    Metric(
        name="saturation",
        title="Saturation",
        function=saturation,
        part="over_training",
        question="How much of its final choice has a token already?",
        formula="mean over tokens of |S_t ∩ S_final| / |S_final|",
        range="0 to 1; k/E is chance",
        blind_to="the order of choices; minds changed and changed back",
        note="It is measured on a fixed probe.",
        axis="saturation",
    ),
    Metric(
        name="fluctuation",
        title="Fluctuation",
        function=fluctuation,
        part="over_training",
        question="How many tokens changed their first choice since the last record?",
        formula="share of tokens whose first choice is another than at the point before",
        range="0 to 1; 1 − 1/E is chance",
        blind_to="the other choices",
        note="It grows with the steps between two points, so compare only suites of equal spacing.",
        axis="fluctuation",
    ),
    Metric(
        name="settled_step",
        title="Settled",
        function=settled_step,
        part="over_training",
        question="From when on did a layer stay?",
        formula="first step from which on saturation stays at or above 0.9",
        range="a step before the last, or none",
        blind_to="what happens between the points recorded; the last alone, where the end is compared with itself",
    ),
    Metric(
        name="first_choice_kept",
        title="First choice kept",
        function=first_choice_kept,
        part="routing_kept",
        question="How many tokens have the first choice in the encoder that they had when it came?",
        formula="share of decisions (token, layer) whose first choice is that of before the first step",
        range="0 to 1; chance beside it",
        blind_to="the other choices; minds changed and changed back",
        note="Of runs that start from an encoder with experts, on the tokens of a fixed probe, in the layers of the "
        "encoder. While that is frozen it is 1. results.json has each domain's as first_choice_kept_by_domain.",
        axis="first choice kept",
    ),
    Metric(
        name="first_choice_kept_chance",
        title="Chance of first choices",
        function=first_choice_kept_chance,
        part="routing_kept",
        question="How many would by chance, at these loads?",
        formula="Σ_e q_e q′_e, q and q′ the shares of first choices now and before",
        range="1/E for an even load, to 1",
        blind_to="domains: a router that sends each domain to its own experts keeps more than this by that alone; see "
        "the levels of each domain",
    ),
    Metric(
        name="choices_kept",
        title="Choices kept",
        function=choices_kept,
        part="routing_kept",
        question="How many of its experts in the encoder had a token when it came?",
        formula="mean over decisions (token, layer) of |S ∩ S_before| / |S|",
        range="0 to 1; chance beside it",
        blind_to="the order of choices; minds changed and changed back",
        note="It is saturation with the routing before the first step in the place of that at a point.",
        axis="choices kept",
    ),
    Metric(
        name="choices_kept_chance",
        title="Chance of choices",
        function=choices_kept_chance,
        part="routing_kept",
        question="How many would be kept by chance, at these loads?",
        formula="mean of |S ∩ S′_before| / |S| over all pairs of a token now and a token before",
        range="k/E for an even load, to 1",
        blind_to="domains, as the chance of first choices",
    ),
)
