"""Spikes of a training's loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW, DEVIATIONS = 50, 6.0
"""A loss is part of a spike if it lies above the median of so many losses before it by more than so many of their
standard deviations."""

# The standard deviation of a normal distribution, in its median absolute deviations.
_PER_DEVIATION = 1.4826


def loss_spikes(curve: NDArray[np.float64]) -> list[int]:
    """Returns the steps of a curve's spikes: for each run of neighbouring losses that lie far above the losses before
    them, the step of the highest.

    Median and standard deviation are those of the `WINDOW` finite losses before; the deviation is 1.4826 times their
    median absolute deviation, which an earlier spike among them hardly moves. The first `WINDOW` losses are in none.

    Args:
        curve: (step, loss) in the order of the steps, [n, 2]. A loss that is not finite is left out: it is divergence.
    """
    finite = curve[np.isfinite(curve[:, 1])]
    if len(finite) <= WINDOW:
        return []
    steps, losses = finite[WINDOW:, 0], finite[WINDOW:, 1]
    before = np.lib.stride_tricks.sliding_window_view(finite[:-1, 1], WINDOW)
    median = np.median(before, axis=1)
    # Rounding alone makes no spike.
    above = losses - median > 1e-6 * np.abs(median)
    deviation = _PER_DEVIATION * np.median(np.abs(before[above] - median[above, None]), axis=1)
    above[above] = (losses - median)[above] > DEVIATIONS * deviation
    (edges,) = np.diff(above, prepend=False, append=False).nonzero()
    return [int(steps[first + losses[first:end].argmax()]) for first, end in edges.reshape(-1, 2)]
