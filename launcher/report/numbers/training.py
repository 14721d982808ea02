"""Over training: load, information, saturation and fluctuation by step, and when each layer settles.

Load and information are those of each step's training batch; saturation and fluctuation are those of a fixed probe. The
files of a run are read one at a time, so that memory does not grow with their number.

Shape legend: Y MoE layers, T tokens of the probe, W places for choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_testbed.launcher.report.numbers.values import Results, layered, of_layers, over_layers, stat
from moe_testbed.launcher.report.read.records import Training
from moe_testbed.launcher.run.array_file import DAMAGED
from moe_testbed.launcher.run.arrays import RoutingProbe
from moe_testbed.routing import metrics
from moe_testbed.routing.metrics import COUNTS, REPORTED, Metric

COUNTED = tuple(metric for metric in REPORTED if metric.axis and metric.of == COUNTS)
OF_PROBE = tuple(metric for metric in REPORTED if metric.axis and metric.part == "over_training")
CURVES = (*COUNTED, *OF_PROBE)
"""The metrics of each step's counts, and those of the probe's choices."""


@dataclass(frozen=True)
class Course:
    """One training: each curve's value, the mean over layers, by step; and the step at which each layer settles."""

    curves: dict[int, dict[str, float]]
    settled_Y: list[float]


def over_training(trainings: Sequence[Training]) -> tuple[Results | None, list[str]]:
    """Returns the curves of a run, with the range of its seeds, on the steps that they share; and what was left out."""
    courses, notes = [], []
    for training in trainings:
        course, problem = _course(training)
        if problem is not None:
            notes.append(f"{training.label}, seed {training.seed}: {problem}")
        if course is not None:
            courses.append(course)
    if not courses:
        return None, notes
    layers = {len(course.settled_Y) for course in courses}
    settled = layered(course.settled_Y for course in courses) if len(layers) == 1 else None
    return {**shared_curves([course.curves for course in courses], CURVES), "settled_step": settled}, notes


def shared_curves(seeds: Sequence[Mapping[int, Mapping[str, float]]], shown: Sequence[Metric]) -> Results:
    """Returns the curves of some metrics, with the range of the seeds, on the steps that these share.

    Args:
        seeds: step -> name of each metric -> value, of each seed.
    """
    steps = sorted(set.intersection(*map(set, seeds)))
    curves = {}
    for metric in shown:
        values = [[curves_of_seed[step][metric.name] for curves_of_seed in seeds] for step in steps]
        curves[metric.name] = {
            "mean": [stat(of_step)["mean"] for of_step in values],
            "low": [min(of_step) for of_step in values],
            "high": [max(of_step) for of_step in values],
        }
    return {"steps": steps, "seeds": len(seeds), "curves": curves}


def _course(training: Training) -> tuple[Course | None, str | None]:
    """One training's curves; None where there is nothing to draw. A file that cannot be used is left out and told."""
    left_out: list[str] = []
    paths = training.probe_files
    final = next((found for path in reversed(paths) if (found := _read(training, path, left_out)) is not None), None)
    left_out.clear()  # the files are read once more, in order
    if final is None:
        return None, f"none of its {len(paths)} statistics files can be used" if paths else None
    if not len(final.expert_ids_YTW):
        return None, None
    curves: dict[int, dict[str, float]] = {}
    saturations: list[list[float]] = []
    before: RoutingProbe | None = None
    for path in paths:
        now = _read(training, path, left_out)
        if now is None:
            continue
        if now.expert_ids_YTW.shape[:2] != final.expert_ids_YTW.shape[:2]:
            left_out.append(f"{path.name} has other layers or tokens than the last one")
            continue
        saturations.append(
            [
                metrics.saturation(ids_TW, last_TW)
                for ids_TW, last_TW in zip(now.expert_ids_YTW, final.expert_ids_YTW, strict=True)
            ]
        )
        curves[now.step] = {**_counted(now), "saturation": over_layers(saturations[-1]), "fluctuation": math.nan}
        if before is not None:
            pairs = zip(now.expert_ids_YTW, before.expert_ids_YTW, strict=True)
            curves[now.step]["fluctuation"] = over_layers([metrics.fluctuation(*pair) for pair in pairs])
        before = now
    steps = list(curves)
    settled = [metrics.settled_step(steps, np.array(values)) for values in zip(*saturations, strict=True)]
    problem = f"{len(left_out)} of {len(paths)} statistics files left out: {left_out[0]}" if left_out else None
    return Course(curves, [math.nan if step is None else float(step) for step in settled]), problem


def _counted(probe: RoutingProbe) -> dict[str, float]:
    found = {metric.name: of_layers(metric, None, counts_YDE=probe.counts_top_k_YDE) for metric in COUNTED}
    return {name: math.nan if layers is None else over_layers(layers) for name, layers in found.items()}


def _read(training: Training, path: Path, left_out: list[str]) -> RoutingProbe | None:
    try:
        return training.read_probe(path)
    except DAMAGED as error:
        left_out.append(f"{path.name} cannot be read ({' '.join(str(error).split())})")
        return None
