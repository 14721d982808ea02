"""Writes the tables of docs/metrics.md anew from the records of the metrics.

    python benchmarks/metric_tables.py

A table stands between two comments, the first of which names its topic. Nothing else of the page is changed.
"""

from __future__ import annotations

import re
from pathlib import Path

from moe_testbed.routing.metrics import TOPICS, Metric

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
BEGIN = "<!-- {topic}: this table is written by python benchmarks/metric_tables.py -->"
END = "<!-- end of the table -->"
HEADS = ("name", "answers", "formula", "range", "blind to", "in results.json")


def with_tables(text: str) -> str:
    """The page with the table of each topic. Raises ValueError if a topic has no place in it, or more than one."""
    for topic, records in TOPICS.items():
        begin = BEGIN.format(topic=topic)
        text, places = re.subn(
            f"{re.escape(begin)}.*?{re.escape(END)}",
            lambda _, begin=begin, records=records: "\n".join([begin, "", *_table(records), "", END]),  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if places != 1:
            raise ValueError(f"docs/metrics.md must have one place for the table of {topic}, not {places}: {begin}")
    return text


def _table(records: tuple[Metric, ...]) -> list[str]:
    return [_row(HEADS), "|---" * len(HEADS) + "|", *(_row(_cells(metric)) for metric in records)]


def _cells(metric: Metric) -> tuple[str, ...]:
    place = "–" if metric.part is None else f"`{metric.part}`" if metric.part else "the run"
    said = (metric.question, metric.formula, metric.range, metric.blind_to)
    return (f"`{metric.name}`", *(text.replace("|", r"\|") for text in said), place)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
