"""tables/: the report's tables as LaTeX for papers, and as CSV what results.csv does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_testbed.launcher.report.numbers.pairwise import lead_rows
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.report.tables.domain_tables import domain_tables
from moe_testbed.launcher.report.tables.extra_tables import ExtraTable
from moe_testbed.launcher.report.tables.latex import latex_table
from moe_testbed.launcher.report.tables.table import Cell, legend, metric_cell, shown_columns, topic
from moe_testbed.launcher.run.files import csv_text, write_atomically


def write_tables(suite: Suite, results: dict[str, Any], tables: Iterable[ExtraTable], folder: Path) -> None:
    """Writes results.tex, pairwise.csv, the tables by domain as LaTeX, and those of sections as SECTION_TITLE.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    name = results["suite"]
    shown = [column for column in shown_columns(results) if column.column == "first"]
    rows = [(Cell(run["label"]), *(metric_cell(column, run) for column in shown)) for run in ranked(results)]
    caption = f"{name}: {topic(results)}. {legend(shown)}"
    titles = ["Run", *(column.column_title for column in shown)]
    write_atomically(folder / "results.tex", latex_table(caption, f"tab:{_slug(name)}-results", titles, rows))
    for table in domain_tables(results):
        slug = _slug(table.title)
        tex = latex_table(
            f"{name}: {table.title}. {table.caption}", f"tab:{_slug(name)}-{slug}", table.columns, table.rows
        )
        write_atomically(folder / f"{slug}.tex", tex)
    for table in tables:
        write_csv(
            folder / f"{_slug(f'{table.section} {table.title}')}.csv",
            table.columns,
            ([cell.text if cell.value is None else cell.value for cell in row] for row in table.rows),
        )
    heads = ("run", "other", "loss_less_the_others", "low", "high", "over")
    write_csv(folder / "pairwise.csv", heads, lead_rows(suite, [run["label"] for run in ranked(results)]))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table with a line of headings."""
    write_atomically(path, csv_text(columns, rows))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
