"""The lead of every run over every other one, with its interval: what the page compares two runs by.

All runs see the same resamples, so that each run is resampled once and a pair costs a difference.

Shape legend: O runs, Z resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from moe_testbed.launcher.report.numbers.values import rounded
from moe_testbed.launcher.report.read.arrays import paired_losses
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.routing.metrics.bootstrap import percentiles
from moe_testbed.routing.metrics.gap import resampled_losses

Lead = tuple[float, float, float, int]
"""Value, lower and upper bound in nats per token, and the place in `over` of what was resampled."""


def pairs(suite: Suite, labels: list[str]) -> dict[str, Any]:
    """The leads of all pairs, over the seeds that both runs of a pair finished.

    `leads[i][j - i - 1]` is L_i - L_j for i < j, positive where j is better, or None without a common finite loss, and
    for checkpoints with different tokenizers, whose losses are per different tokens, and for different tasks.
    """
    over: list[str] = []
    found: list[list[Any]] = [[None] * (len(labels) - i - 1) for i in range(len(labels))]
    finished = {label: frozenset(suite.evaluations(label)) for label in labels}
    tokenizers = {label: [t.summary.tokenizer for t in suite.of(label)] for label in labels}
    tasks = {label: {t.task for t in suite.of(label)} for label in labels}
    for seeds in {finished[one] & finished[other] for one, other in combinations(labels, 2)} - {frozenset()}:
        members = [i for i, label in enumerate(labels) if finished[label] >= seeds]
        for i, j, lead in _leads(suite, labels, members, sorted(seeds), over):
            comparable = tokenizers[labels[i]] == tokenizers[labels[j]] and tasks[labels[i]] == tasks[labels[j]]
            if comparable and finished[labels[i]] & finished[labels[j]] == seeds:
                found[i][j - i - 1] = lead
    result: dict[str, Any] = rounded({"over": over, "leads": found})
    return result


def lead_rows(suite: Suite, labels: list[str]) -> Iterator[tuple[str, str, float, float, float, str]]:
    """Run, other run, the first one's loss less the other's, its bounds, and over what they were resampled."""
    content = pairs(suite, labels)
    for i, row in enumerate(content["leads"]):
        for j, lead in enumerate(row, start=i + 1):
            if lead is not None:
                yield (labels[i], labels[j], *lead[:3], content["over"][lead[3]])


def _leads(
    suite: Suite, labels: list[str], members: list[int], seeds: list[int], over: list[str]
) -> Iterator[tuple[int, int, Lead]]:
    """The leads among the runs that have these seeds."""
    evaluations = [[suite.evaluations(labels[i])[seed] for seed in seeds] for i in members]
    means_O, resampled_ZO, unit = resampled_losses(*paired_losses(evaluations))
    if unit not in over:
        over.append(unit)
    for a, i in enumerate(members[:-1]):
        later = np.arange(a + 1, len(members))
        bounds = percentiles(resampled_ZO[:, [a]] - resampled_ZO[:, later])
        for b, low, high in zip(later, *bounds, strict=True):
            value = float(means_O[a] - means_O[b])
            if np.isfinite([value, low, high]).all():
                yield i, members[b], (value, float(low), float(high), over.index(unit))
