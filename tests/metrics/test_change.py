"""Saturation and fluctuation against loops over tokens; when a layer settles, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_testbed.routing import metrics

KEPT = (
    metrics.first_choice_kept,
    metrics.first_choice_kept_chance,
    metrics.choices_kept,
    metrics.choices_kept_chance,
)


def choices(tokens: int, width: int, experts: int, seed: int, holes: bool = True) -> np.ndarray:
    """Distinct experts of each token, fewer than `width` for some."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:width] for _ in range(tokens)])
    if holes:
        ids[np.arange(width) >= rng.integers(0, width + 1, (tokens, 1))] = -1
    return ids


@pytest.mark.parametrize("holes", [False, True])
def test_against_loops(holes: bool) -> None:
    now, final = choices(50, 3, 8, 0, holes), choices(50, 4, 8, 1, holes)
    shares, changed = [], []
    for a, b in zip(now.tolist(), final.tolist(), strict=True):
        kept = {e for e in b if e >= 0}
        if kept:
            shares.append(len(kept & set(a)) / len(kept))
        changed.append(a[0] != b[0])
    assert metrics.saturation(now, final) == pytest.approx(np.mean(shares))
    assert metrics.fluctuation(now, final) == pytest.approx(np.mean(changed))


@pytest.mark.parametrize("holes", [False, True])
def test_what_is_kept_against_loops(holes: bool) -> None:
    """Chance is what is kept when each token now meets each token before."""
    before, now = choices(30, 3, 8, 0, holes), choices(30, 4, 8, 1, holes)
    now[:10, :3] = before[:10]
    firsts, shares, firsts_by_chance, shares_by_chance = [], [], [], []
    for t, b in enumerate(now.tolist()):
        kept = {e for e in b if e >= 0}
        for u, a in enumerate(before.tolist()):
            first, share = a[0] == b[0], len(kept & set(a)) / len(kept) if kept else None
            firsts_by_chance.append(first)
            firsts += [first] if t == u else []
            if share is not None:
                shares_by_chance.append(share)
                shares += [share] if t == u else []
    assert metrics.first_choice_kept(now, before) == pytest.approx(np.mean(firsts))
    assert metrics.first_choice_kept_chance(now, before) == pytest.approx(np.mean(firsts_by_chance))
    assert metrics.choices_kept(now, before) == pytest.approx(np.mean(shares))
    assert metrics.choices_kept_chance(now, before) == pytest.approx(np.mean(shares_by_chance))
    assert metrics.first_choice_kept(now, before) > metrics.first_choice_kept_chance(now, before)


def test_known_values() -> None:
    final = np.array([[0, 1], [2, 3]])
    assert metrics.saturation(final, final) == 1
    assert metrics.saturation(final[:, ::-1], final) == 1  # the order does not count
    assert metrics.fluctuation(final[:, ::-1], final) == 1  # only the order of the first does
    assert metrics.saturation([[0, 5], [4, 5]], final) == 0.25
    assert metrics.fluctuation([[0, 5], [4, 5]], final) == 0.5


def test_relabelling_experts_and_reordering_tokens_change_nothing() -> None:
    now, final = choices(40, 2, 6, 2, holes=False), choices(40, 2, 6, 3, holes=False)
    rng = np.random.default_rng(4)
    names, order = rng.permutation(6), rng.permutation(40)
    for metric in (metrics.saturation, metrics.fluctuation):
        assert metric(names[now][order], names[final][order]) == metric(now, final)
    for metric in KEPT:  # sums over experts, in another order
        assert metric(names[now][order], names[final][order]) == pytest.approx(metric(now, final), rel=1e-12)


def test_chance_is_as_stated() -> None:
    now, final = choices(20000, 2, 8, 5, holes=False), choices(20000, 2, 8, 6, holes=False)
    assert metrics.saturation(now, final) == pytest.approx(2 / 8, abs=0.01)
    assert metrics.fluctuation(now, final) == pytest.approx(7 / 8, abs=0.01)


def test_tokens_without_choices() -> None:
    nothing = np.full((3, 2), -1)
    assert math.isnan(metrics.saturation(nothing, nothing))
    assert metrics.saturation(nothing, [[0, 1]] * 3) == 0
    assert metrics.fluctuation(nothing, nothing) == 0
    assert metrics.fluctuation(nothing, [[0], [-1], [2]]) == pytest.approx(2 / 3)
    assert metrics.first_choice_kept(nothing, nothing) == metrics.first_choice_kept_chance(nothing, nothing) == 1
    assert math.isnan(metrics.choices_kept(nothing, nothing)) and math.isnan(
        metrics.choices_kept_chance(nothing, nothing)
    )
    for metric in (metrics.saturation, metrics.fluctuation, *KEPT):
        assert math.isnan(metric(np.zeros((0, 2), dtype=int), np.zeros((0, 2), dtype=int)))


@pytest.mark.parametrize(
    ("values", "settled"),
    [
        ([0.2, 0.95, 0.97, 1.0], 20),
        ([0.95, 0.5, 0.92, 1.0], 30),  # it left again
        ([0.9, 0.9, 0.9, 1.0], 10),
        ([0.2, 0.3, 0.4, 1.0], None),  # the end is level with itself only
        ([0.2, 0.3, 0.4, 0.5], None),
        ([0.95, math.nan, 0.95, 1.0], 30),
        ([math.nan] * 4, None),
    ],
)
def test_settled_from_the_first_step_that_stays_at_the_level(values: list[float], settled: int | None) -> None:
    assert metrics.settled_step([10, 20, 30, 40], values) == settled
    assert metrics.settled_step(np.array([10, 20, 30, 40]).tolist(), np.array(values)) == settled


def test_settled_at_another_level_and_without_steps() -> None:
    assert metrics.settled_step([1, 2, 3], [0.6, 0.7, 1.0], level=0.65) == 2
    assert metrics.settled_step([], []) is None


def test_bad_input_is_refused() -> None:
    for metric in (metrics.saturation, metrics.fluctuation):
        with pytest.raises(ValueError, match=r"for the same tokens, got \(2, 1\), \(3, 1\)"):
            metric([[0], [1]], [[0], [1], [2]])
    for metric in KEPT:
        with pytest.raises(ValueError, match="both choices must be tokens x experts for the same tokens"):
            metric([[0], [1]], [[0], [1], [2]])
    for steps, values in (([1, 2], [0.5]), ([2, 1], [0.5, 0.6])):
        with pytest.raises(ValueError, match="one value for each of rising steps"):
            metrics.settled_step(steps, values)
