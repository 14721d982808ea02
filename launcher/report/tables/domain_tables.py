"""Tables by domain: the loss of every run, what it recovers, and what a capacity dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.tables.extra_tables import ExtraTable
from moe_testbed.launcher.report.tables.table import DROPPING, Cell, drop_cells, recovered_cell, stat_cell

MOST_COLUMNS = 16
"""More domains than these are rows, and the runs columns."""


def domain_tables(results: dict[str, Any]) -> Iterator[ExtraTable]:
    """The tables that have rows, runs in the order of the result table."""
    domains, runs = results["domains"], ranked(results)
    having = [run for run in runs if run["loss"]["mean"] is not None and domains]
    yield from _table(
        "Loss by domain",
        "Nats per token of the evaluation split; ± is the standard deviation over seeds.",
        domains,
        {run["label"]: [stat_cell(run["loss_by_domain"][domain], 3) for domain in domains] for run in having},
    )
    if results["reference"]["lead_over_control"] is not None:
        yield from _table(
            "Recovered by domain",
            "Share of the reference's lead over its control that a run gets in each domain, with its interval; "
            "undefined where that lead is within noise.",
            domains,
            {run["label"]: [recovered_cell(run["recovered_by_domain"].get(d)) for d in domains] for run in having},
        )
    yield from _table(
        "Dropped by domain",
        "Share of each domain's assignments that found no place in their expert's buffer, mean over layers, in the "
        "runs that dropped any; and specialization by what was chosen and by what was kept.",
        [*domains, *DROPPING],
        {run["label"]: drop_cells(run) for run in runs if run["drop_rate"]["mean"]},
    )


def _table(title: str, caption: str, names: Sequence[str], cells: Mapping[str, Sequence[Cell]]) -> Iterator[ExtraTable]:
    """Runs by domains, or the other way round where there are many; nothing without runs."""
    if not cells:
        return
    columns = ("Run", *names)
    rows = [(Cell(label), *of_run) for label, of_run in cells.items()]
    if len(names) > MOST_COLUMNS:
        columns = ("Domain", *cells)
        rows = [(Cell(name), *of_name) for name, *of_name in zip(names, *cells.values(), strict=True)]
    yield ExtraTable("domains", title, caption, columns, rows)
