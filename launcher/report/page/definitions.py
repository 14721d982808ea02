"""What the page explains of every metric that it shows: its record, and the words that verdicts have for its values."""

from __future__ import annotations

from dataclasses import dataclass

from moe_testbed.launcher.report.words import EVEN, MODERATE, STRONG, UNEVEN, WEAK
from moe_testbed.routing.metrics import REPORTED, Metric

_WORDS = {
    "domain_information": f"In words: strongly from {STRONG}, moderately from {MODERATE}, weakly from {WEAK} above "
    "shuffled labels.",
    "normalised_effective_experts": f"In words: evenly from {EVEN}, unevenly from {UNEVEN}.",
}


@dataclass(frozen=True)
class Definition:
    """A metric with all that a reader must know beside its question, formula, range and blind spot."""

    metric: Metric
    note: str


DEFINITIONS = tuple(Definition(metric, f"{metric.note} {_WORDS.get(metric.name, '')}".strip()) for metric in REPORTED)
