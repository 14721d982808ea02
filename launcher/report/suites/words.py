"""What a comparison of suites says: in sentences, in tables for the page, and in a table for a terminal."""

from __future__ import annotations

from typing import Any

from moe_testbed.launcher.report.suites.comparison import COMPARED, FEWEST
from moe_testbed.launcher.report.suites.differences import BY_NAME
from moe_testbed.launcher.report.tables.extra_tables import ExtraTable
from moe_testbed.launcher.report.tables.table import Cell
from moe_testbed.launcher.report.words import NOTHING, Verdict, number, percent
from moe_testbed.launcher.run.columns import aligned
from moe_testbed.routing.metrics import Metric

HOLDS, HOLDS_IN_PART = 0.95, 0.75
"""Bounds of the words for the share of the pairs told apart in both suites that keep their order."""


def headlines(comparison: dict[str, Any]) -> list[Verdict]:
    """Says of each other suite whether the order of the routers holds and what the differences are worth."""
    first = comparison["suites"][0]["name"]
    return [verdict for pair in comparison["pairs"] for verdict in (_order(first, pair), _data(first, pair))]


def _order(first: str, pair: dict[str, Any]) -> Verdict:
    """Judges by the pairs of routers that differ beyond noise: among equal routers a rank correlation is noise too."""
    rank, apart = pair["ranks"]["loss"], pair["told_apart"]
    count = len(rank["runs"])
    subject = f"the order of the routers by loss in {first}"
    if count < FEWEST:
        text = (
            f"Whether {subject} holds in {pair['suite']} cannot be said: the suites share {count} routers with a loss."
        )
        return Verdict(text, "caution")
    correlation = f"Spearman's rank correlation is {number(rank['spearman'], 2)} over {count} routers"
    if not apart["in_both"]:
        text = f"Whether {subject} holds in {pair['suite']} cannot be told from noise: no two routers differ beyond it"
        return Verdict(f"{text} in both suites ({correlation}).", "caution")
    share = apart["in_same_order"] / apart["in_both"]
    words = ((HOLDS, "holds", "good"), (HOLDS_IN_PART, "holds in part", "caution"))
    holds, tone = next(((word, tone) for bound, word, tone in words if share >= bound), ("does not hold", "bad"))
    text = (
        f"T{subject[1:]} {holds} in {pair['suite']}: of {apart['pairs']} pairs {apart['in_both']} differ beyond noise"
    )
    return Verdict(f"{text} in both suites, {apart['in_same_order']} of them in the same order ({correlation}).", tone)


def _data(first: str, pair: dict[str, Any]) -> Verdict:
    suites = f"{first} and {pair['suite']}"
    texts = {
        "sequences": f"{suites} were evaluated on the same sequences: differences are paired where seeds allow it.",
        "data": f"{suites} were evaluated on the same data but not on the same sequences: differences are unpaired.",
        "nothing": f"{suites} were evaluated on different data: losses are not subtracted, differences are unpaired.",
    }
    return Verdict(texts[pair["same"]], "plain")


def metric_tables(comparison: dict[str, Any]) -> dict[str, ExtraTable]:
    """Returns a table for each metric: a row a run, a column a suite, then the differences to the first suite."""
    names = [suite["name"] for suite in comparison["suites"]]
    return {
        metric: ExtraTable(
            metric,
            BY_NAME[metric].column_title,
            _caption(comparison, metric),
            ("Run", *names, *(f"{name} less {names[0]}" for name in names[1:])),
            [
                (
                    Cell(run["label"]),
                    *(
                        _value(estimates and estimates[metric], BY_NAME[metric], missing)
                        for estimates, missing in zip(run["suites"], run["missing"], strict=True)
                    ),
                    *(_difference(found and found[metric], BY_NAME[metric]) for found in run["differences"]),
                )
                for run in comparison["runs"]
            ],
        )
        for metric in COMPARED
    }


def terminal_table(comparison: dict[str, Any]) -> str:
    """A block of aligned columns for each metric, between the sentences and the runs that only one suite has."""
    blocks = ["\n".join(verdict.text for verdict in headlines(comparison))]
    for table in metric_tables(comparison).values():
        rows = [table.columns, *([f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows)]
        lines = aligned(rows, left=(0,))
        blocks.append("\n".join([table.title, lines[0], "-" * len(lines[0]), *lines[1:], table.caption]))
    return "\n\n".join([*blocks, *unmatched(comparison)])


def unmatched(comparison: dict[str, Any]) -> list[str]:
    """A line for each suite with runs that are not compared."""
    return [
        f"Not compared, in {name}: {', '.join(labels)}." for name, labels in comparison["unmatched"].items() if labels
    ]


def _caption(comparison: dict[str, Any], metric: str) -> str:
    ranks = [
        f"Spearman's rank correlation with {pair['suite']}: {number(pair['ranks'][metric]['spearman'], 2)} over "
        f"{len(pair['ranks'][metric]['runs'])} shared routers."
        for pair in comparison["pairs"]
    ]
    return " ".join(ranks)


def _value(estimate: dict[str, Any] | None, form: Metric, missing: str) -> Cell:
    """The value of a run in a suite, with its bounds and what is missing of the run there."""
    if estimate is None or estimate["value"] is None:
        return Cell(NOTHING, missing)
    text = percent(estimate["value"], form.digits) if form.in_percent else number(estimate["value"], form.digits)
    return Cell(text, ", ".join(note for note in (_bounds(estimate, form), missing) if note), estimate["value"])


def _difference(found: dict[str, Any] | None, form: Metric) -> Cell:
    if found is None or found["value"] is None:
        return Cell(NOTHING, "" if found is None else found["reason"])
    scale, unit = (100, " points") if form.in_percent else (1, "")
    pairing = "paired" if found["paired"] else "unpaired"
    note = f"{_bounds(found, form)} {pairing}".strip()
    return Cell(number(scale * found["value"], form.digits, signed=True) + unit, note, found["value"])


def _bounds(estimate: dict[str, Any], form: Metric) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return ""
    scale = 100 if form.in_percent else 1
    return f"[{number(scale * estimate['low'], form.digits)}, {number(scale * estimate['high'], form.digits)}]"
