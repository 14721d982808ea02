"""Suites against each other: what each run scores in each, how far apart that is, and whether routers keep their order.

Runs are matched by their label. A difference is the other suite's value less the first one's. It is paired where both
suites were evaluated on the same sequences under the same seeds. Else the two intervals are combined as those of
independent estimates. Losses of different data are not subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.report.numbers.pairwise import pairs as leads
from moe_testbed.launcher.report.numbers.results import ranked, summarise
from moe_testbed.launcher.report.numbers.values import Results, rounded
from moe_testbed.launcher.report.read.records import Suite, read_suite
from moe_testbed.launcher.report.suites.differences import Pair, Summarised, estimate
from moe_testbed.launcher.report.tables.table import missing
from moe_testbed.routing.metrics import REPORTED

FORMAT = 1
COMPARED = tuple(
    metric.name
    for metric in sorted(REPORTED, key=lambda metric: metric.name != "recovered")  # the question of a suite comes first
    if metric.compared
)
FEWEST = 4
"""The order of fewer shared routers says nothing: three keep theirs by chance one time in six."""


def open_suites(folders: Sequence[Path]) -> list[Suite]:
    """Returns the suites of these folders. Raises ConfigError if one is no suite's, or is given twice."""
    resolved = [folder.resolve() for folder in folders]
    twice = next((folder for folder in folders if resolved.count(folder.resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice: a comparison needs the folders of different suites")
    try:
        return [read_suite(folder) for folder in folders]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def compare_suites(suites: Sequence[Suite]) -> Results:
    """Returns the content of comparison.json: every other suite against the first.

    Raises ConfigError if another suite has no run in common with the first.
    """
    for other in suites[1:]:
        if not set(suites[0].descriptions) & set(other.descriptions):
            raise ConfigError(
                f"{suites[0].folder.path} and {other.folder.path} have no run in common: runs are matched by label, "
                f"and these are {', '.join(suites[0].descriptions)} and {', '.join(other.descriptions)}"
            )
    members = [Summarised(suite, name, summarise(suite)) for suite, name in zip(suites, _names(suites), strict=True)]
    first, *others = members
    pairs = [Pair(first, other) for other in others]
    order = [run["label"] for run in ranked(first.results)]
    shared = [label for label in order if any(label in other.runs for other in others)]
    content = {
        "format": FORMAT,
        "suites": [
            {"name": m.name, "folder": str(m.suite.folder.path), "seeds": list(m.suite.seeds), "runs": list(m.runs)}
            for m in members
        ],
        "pairs": [
            {
                "suite": pair.other.name,
                "same": pair.same,
                "ranks": {metric: _rank_correlation(pair, metric) for metric in COMPARED},
                "told_apart": _told_apart(pair),
            }
            for pair in pairs
        ],
        "runs": [_run(label, members, pairs) for label in shared],
        "unmatched": {member.name: [label for label in member.runs if label not in shared] for member in members},
    }
    result: Results = rounded(content)
    return result


def _run(label: str, members: Sequence[Summarised], pairs: Sequence[Pair]) -> Results:
    """A run's values in every suite that has it, what is missing of it there, and its differences to the first."""
    run = members[0].runs[label]
    return {
        **{key: run[key] for key in ("label", "role", "router", "description", "causal")},
        "missing": [missing(member.runs[label]) if label in member.runs else "" for member in members],
        "suites": [
            {metric: estimate(member.runs[label], metric) for metric in COMPARED} if label in member.runs else None
            for member in members
        ],
        "differences": [
            {metric: pair.difference(label, metric) for metric in COMPARED} if label in pair.other.runs else None
            for pair in pairs
        ],
    }


def _names(suites: Sequence[Suite]) -> list[str]:
    """The suites' names, with their folders where two have the same."""
    names = [suite.name for suite in suites]
    return [
        name if names.count(name) == 1 else f"{name} ({suite.folder.path})"
        for name, suite in zip(names, suites, strict=True)
    ]


def _ranked_routers(pair: Pair, metric: str) -> list[str]:
    """The routers with a value in both suites; not reference and control, which keep their places by design."""
    one, other = pair.one.runs, pair.other.runs
    return [
        label
        for label in one
        if label in other
        and all(content[label]["role"] not in ("reference", "control") for content in (one, other))
        and all(content[label]["causal"] for content in (one, other))
        and all(estimate(content[label], metric)["value"] is not None for content in (one, other))
    ]


def _rank_correlation(pair: Pair, metric: str) -> dict[str, Any]:
    """Spearman's rank correlation of the routers between the suites, and which routers they are."""
    labels = _ranked_routers(pair, metric)
    values = [[estimate(member.runs[label], metric)["value"] for label in labels] for member in (pair.one, pair.other)]
    varied = len(labels) >= FEWEST and all(len(set(row)) > 1 for row in values)
    return {"spearman": float(spearmanr(*values).statistic) if varied else None, "runs": labels}


def _told_apart(pair: Pair) -> dict[str, int]:
    """Pairs of routers; those whose losses differ beyond noise in both suites; those of them in the same order."""
    labels = _ranked_routers(pair, "loss")
    signs = [
        [_sign(lead) for row in leads(member.suite, labels)["leads"] for lead in row]
        for member in (pair.one, pair.other)
    ]
    products = [one * other for one, other in zip(*signs, strict=True)]
    return {"pairs": len(products), "in_both": sum(map(abs, products)), "in_same_order": products.count(1)}


def _sign(lead: Sequence[float] | None) -> int:
    """Returns 1 or -1 where the interval is on one side of 0, else 0."""
    if lead is None or lead[1] <= 0 <= lead[2]:
        return 0
    return 1 if lead[1] > 0 else -1
