"""What remains of an encoder's routing: of a run that starts from an encoder with experts, the routing of the probe's
tokens before the first step beside that of later steps, in the encoder's layers.

Shape legend: T tokens of the probe, W places for choices, Y MoE layers of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.errors import visible
from moe_testbed.launcher.report.numbers.training import shared_curves
from moe_testbed.launcher.report.numbers.values import Results, layered, over_layers
from moe_testbed.launcher.report.read.records import Training
from moe_testbed.launcher.run.array_file import DAMAGED
from moe_testbed.launcher.run.arrays import RoutingProbe
from moe_testbed.model.config import ENCODER
from moe_testbed.routing.metrics import REPORTED, Metric

KEPT = tuple(metric for metric in REPORTED if metric.part == "routing_kept")
KEPT_CURVES = tuple(metric for metric in KEPT if metric.axis)
"""Those that are followed over the steps."""


@dataclass(frozen=True)
class Kept:
    """One training: each metric's value in each layer at the end, of all tokens and by domain; and the curves."""

    last: dict[str, list[float]]
    last_by_domain: dict[str, dict[str, list[float]]]
    curves: dict[int, dict[str, float]]


def routing_kept(trainings: Sequence[Training], domains: Sequence[str]) -> Results | None:
    """Returns what remains of the encoder's routing; None where there was none, or where it is not known."""
    found = [kept for training in trainings if (kept := _kept(training, domains)) is not None]
    if not found:
        return None
    return {
        **{metric.name: layered(one.last[metric.name] for one in found) for metric in KEPT},
        **{
            f"{metric.name}_by_domain": {
                domain: layered(one.last_by_domain[domain][metric.name] for one in found) for domain in domains
            }
            for metric in KEPT
        },
        "over_training": shared_curves([one.curves for one in found], KEPT_CURVES),
    }


def _kept(training: Training, domains: Sequence[str]) -> Kept | None:
    layers = training.layers.by_stack.get(ENCODER)
    taken = training.setting("start", "encoder", "take") or "all"
    if layers is None or training.setting("start", "encoder", "run") is None or taken == "tables":
        return None
    probes = _probes(training.of_layers(layers))
    before = next(probes, None)
    if before is None or before.step != 0:
        return None  # of an earlier version, which did not look before the first step
    last, curves = before, {0: _means(_by_layer(before, before, KEPT_CURVES))}
    for probe in probes:
        if probe.expert_ids_YTW.shape[:2] == before.expert_ids_YTW.shape[:2]:
            last, curves[probe.step] = probe, _means(_by_layer(probe, before, KEPT_CURVES))
    if last.domains is None or last.domain_T is None or last is before:
        return None
    number = {visible(domain): d for d, domain in enumerate(last.domains)}
    by_domain = {
        domain: _by_layer(last, before, KEPT, np.flatnonzero(last.domain_T == number.get(domain, -1)))
        for domain in domains
    }
    return Kept(_by_layer(last, before, KEPT), by_domain, curves)


def _probes(training: Training) -> Iterator[RoutingProbe]:
    """The probes that can be used; `training.over_training` tells of the others."""
    for path in training.probe_files:
        try:
            yield training.read_probe(path)
        except DAMAGED:
            continue


def _by_layer(
    probe: RoutingProbe, before: RoutingProbe, wanted: Sequence[Metric], tokens: NDArray[np.intp] | slice = slice(None)
) -> dict[str, list[float]]:
    """Each metric of each layer, of these of the tokens."""
    pairs = list(zip(probe.expert_ids_YTW[:, tokens], before.expert_ids_YTW[:, tokens], strict=True))
    found = {}
    for metric in wanted:
        assert metric.function is not None
        found[metric.name] = [float(metric.function(ids_TW, before_TW)) for ids_TW, before_TW in pairs]
    return found


def _means(by_layer: dict[str, list[float]]) -> dict[str, float]:
    return {name: over_layers(values) for name, values in by_layer.items()}
