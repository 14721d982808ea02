"""Loss spikes: found where they are, counted once each, and nowhere else; the oracle takes one loss at a time."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.spikes import DEVIATIONS, WINDOW, loss_spikes


def curve(count: int = 300, seed: int = 1) -> NDArray[np.float64]:
    """A loss that falls, with noise."""
    steps = np.arange(1.0, count + 1)
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    return np.stack([steps, 3 + 2 * np.exp(-steps / 60) + noise], axis=1)


def one_by_one(curve: NDArray[np.float64]) -> list[int]:
    found: list[int] = []
    highest = -1.0
    for place, (step, loss) in enumerate(curve):
        before = curve[max(place - WINDOW, 0) : place, 1].tolist()
        far = False
        if len(before) == WINDOW:
            median = statistics.median(before)
            far = loss - median > DEVIATIONS * 1.4826 * statistics.median(abs(value - median) for value in before)
        if far and highest < 0:
            found.append(int(step))
            highest = loss
        elif far and loss > highest:
            found[-1], highest = int(step), loss
        elif not far:
            highest = -1.0
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_with_noise_has_none(seed: int) -> None:
    assert loss_spikes(curve(seed=seed)) == one_by_one(curve(seed=seed)) == []


def test_each_spike_is_told_once_by_its_highest_step() -> None:
    spiked = curve()
    spiked[149, 1] += 1.0
    spiked[199:204, 1] += [0.5, 2.0, 4.0, 1.0, 0.5]
    assert loss_spikes(spiked) == one_by_one(spiked) == [150, 202]


def test_where_there_are_few_steps_nothing_is_marked() -> None:
    early = curve()
    early[10, 1] = 1000.0
    assert loss_spikes(early) == []
    assert loss_spikes(curve(WINDOW)) == loss_spikes(np.empty((0, 2))) == []


def test_a_loss_that_is_not_finite_is_divergence_and_no_spike() -> None:
    diverged = curve()
    diverged[250:, 1] = np.nan
    diverged[249, 1] = np.inf
    assert loss_spikes(diverged) == []


def test_a_constant_loss_has_none_and_rounding_makes_none() -> None:
    constant = curve()
    constant[:, 1] = 3.0
    constant[150, 1] = np.nextafter(3.0, 4.0)
    assert loss_spikes(constant) == []
