"""How far apart two suites are in one run: differences with their intervals, paired where that is possible.

Shape legend: O runs, Z resamples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.values import Results, of_layers, over_layers
from moe_testbed.launcher.report.read.arrays import paired_losses
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.launcher.run.files import value_at
from moe_testbed.routing.metrics import COUNTS, REPORTED, Metric
from moe_testbed.routing.metrics.bootstrap import Interval, percentile_interval, seeds_interval
from moe_testbed.routing.metrics.gap import resampled_losses

BY_NAME = {metric.name: metric for metric in REPORTED}


@dataclass(frozen=True)
class Summarised:
    """A suite, the name that it has in the comparison, and its results."""

    suite: Suite
    name: str
    results: Results

    @cached_property
    def runs(self) -> dict[str, Results]:
        """The results of the runs by label."""
        return {run["label"]: run for run in self.results["runs"]}

    @property
    def ends(self) -> list[str]:
        """The labels of the control and of the best reference."""
        return [str(self.suite.control), str(self.results["reference"]["best"])]


def estimate(run: Results, metric: str) -> Results:
    """Returns value, low, high and over; low and high are null where the report has no interval."""
    found = value_at(run, *BY_NAME[metric].path) or {}
    return {
        "value": found.get("mean", found.get("value")),
        **{name: found.get(name) for name in ("low", "high", "over")},
    }


@dataclass(frozen=True)
class Pair:
    """Two suites; a difference is the other one's value less the first one's."""

    one: Summarised
    other: Summarised

    @cached_property
    def same(self) -> str:
        """Says how much of what the two suites were evaluated on is the same: `sequences`, `data` or `nothing`."""
        trainings = [t for member in (self.one, self.other) for t in member.suite.trainings if t.evaluation is not None]
        data = [(training.manifest, training.split) for training in trainings]
        if not data or not data[0][0].content or any(content != data[0] for content in data):
            return "nothing"
        lengths = {training.sequence_length for training in trainings}
        first, last = trainings[0].evaluation, trainings[-1].evaluation
        assert first is not None and last is not None  # chosen above; all of one suite have the same sequences
        alike = (
            np.array_equal(getattr(first, name), getattr(last, name))
            for name in ("domains", "sequence_domain_N", "tokens_D")
        )
        return "sequences" if len(lengths) == 1 and all(alike) else "data"

    def difference(self, label: str, metric: str) -> Results:
        """Returns value, low, high, over and paired; without a value, the reason why."""
        nothing = {"value": None, "low": None, "high": None, "over": None, "paired": False}
        estimates = [estimate(member.runs[label], metric) for member in (self.one, self.other)]
        if any(found["value"] is None for found in estimates):
            return {**nothing, "reason": "no value in both suites"}
        if metric == "loss" and self.same == "nothing":
            return {**nothing, "reason": "losses of different data"}
        paired = self._paired(label, metric) if self.same == "sequences" else None
        found = paired or independent_difference(*map(_interval, estimates))
        return {**asdict(found), "paired": paired is not None, "reason": None}

    def _paired(self, label: str, metric: str) -> Interval | None:
        """The paired difference; None where the seeds differ, or where counts would have to be paired by document."""
        if metric not in ("loss", "recovered"):
            return self._paired_by_seed(label, BY_NAME[metric])
        found = self._resampled(label, with_ends=metric == "recovered")
        if found is None:
            return None
        means_O, resampled_ZO, over = found
        if metric == "loss":
            return percentile_interval(float(means_O[1] - means_O[0]), resampled_ZO[:, 1] - resampled_ZO[:, 0], over)
        one_Z3, other_Z3 = resampled_ZO[:, :3], resampled_ZO[:, 3:]
        # As in `gap.recovered`: resamples in which a reference does not lead have no share.
        usable_Z = (one_Z3[:, 1] > one_Z3[:, 2]) & (other_Z3[:, 1] > other_Z3[:, 2])
        shares_Z = _share(other_Z3[usable_Z].T) - _share(one_Z3[usable_Z].T)
        return percentile_interval(float(_share(means_O[3:]) - _share(means_O[:3])), shares_Z, over)

    def _paired_by_seed(self, label: str, metric: Metric) -> Interval | None:
        one, other = (member.suite.evaluations(label) for member in (self.one, self.other))
        if metric.of != COUNTS or len(one) < 2 or set(one) != set(other):
            return None
        values = [[_over_layers(metric, run[seed]) for seed in sorted(one)] for run in (one, other)]
        return seeds_interval(np.subtract(values[1], values[0]))

    def _resampled(self, label: str, with_ends: bool) -> tuple[NDArray[Any], NDArray[Any], str] | None:
        """Returns `gap.resampled_losses` of the run in both suites, each followed by its suite's ends."""
        runs = [
            member.suite.evaluations(name)
            for member in (self.one, self.other)
            for name in (label, *(member.ends if with_ends else ()))
        ]
        seeds = sorted(runs[0])
        if not seeds or any(sorted(run) != seeds for run in runs):
            return None
        return resampled_losses(*paired_losses([[run[seed] for seed in seeds] for run in runs]))


def independent_difference(one: Interval, other: Interval) -> Interval:
    """Returns `other` less `one` with its interval, for independent estimates with intervals of their own.

    The distances of the bounds from the estimates are added in squares: MOVER, Zou and Donner (2008), "Construction of
    confidence limits about effect measures: a general approach".
    """
    value = other.value - one.value
    below = math.hypot(other.value - other.low, one.high - one.value)
    above = math.hypot(other.high - other.value, one.value - one.low)
    over = one.over if one.over == other.over else f"{one.over} and {other.over}"
    return Interval(value, value - below, value + above, over)


def _interval(found: Results) -> Interval:
    low, high = (math.nan if found[bound] is None else found[bound] for bound in ("low", "high"))
    return Interval(found["value"], low, high, found["over"] or "nothing")


def _share(losses_3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns `recovered` for the losses of a router, its control and the reference."""
    router, control, reference = losses_3
    share: NDArray[np.float64] = (control - router) / (control - reference)
    return share


def _over_layers(metric: Metric, evaluation: Evaluation) -> float:
    return over_layers(of_layers(metric, evaluation, counts_YDE=evaluation.counts_top_k_YDE) or [])
