"""Two tables by domain: the loss of every run, and what a capacity dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.report.extra_tables import ExtraTable
from moe_testbed.launcher.report.results import ranked
from moe_testbed.launcher.report.table import DROPPING, Cell, drop_cells
from moe_testbed.launcher.report.words import number

MOST_COLUMNS = 16
"""More domains than these are rows, and the runs columns."""


def domain_tables(results: dict[str, Any]) -> Iterator[ExtraTable]:
    """The tables that have rows, runs in the order of the result table."""
    domains, runs = results["domains"], ranked(results)
    having = [run for run in runs if run["loss"]["mean"] is not None]
    losses = {run["label"]: [_loss_cell(run["loss_by_domain"][domain]) for domain in domains] for run in having}
    if losses and domains:
        rows = [(Cell(label), *cells) for label, cells in losses.items()]
        columns = ("Run", *domains)
        if len(domains) > MOST_COLUMNS:
            columns = ("Domain", *losses)
            rows = [(Cell(domain), *cells) for domain, *cells in zip(domains, *losses.values(), strict=True)]
        yield ExtraTable(
            "domains",
            "Loss by domain",
            "Nats per token of the evaluation split; ± is the standard deviation over seeds.",
            columns,
            rows,
        )
    drops = [(Cell(run["label"]), *drop_cells(run)) for run in runs if run["drop_rate"]["mean"]]
    if drops:
        yield ExtraTable(
            "domains",
            "Dropped by domain",
            "Share of each domain's assignments that found no place in their expert's buffer, mean over layers, in the "
            "runs that dropped any; and specialization by what was chosen and by what was kept.",
            ("Run", *domains, *DROPPING),
            drops,
        )


def _loss_cell(stat: dict[str, Any]) -> Cell:
    spread = stat["spread"]
    return Cell(number(stat["mean"]), "" if spread is None else f"± {number(spread)}", stat["mean"])
