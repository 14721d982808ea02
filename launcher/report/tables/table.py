"""The result table: its columns, once for the page and once for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from moe_testbed.launcher.report.numbers.gap import NO_REFERENCE
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.words import NOTHING, failures, number, percent, without_result
from moe_testbed.launcher.run.columns import aligned
from moe_testbed.routing.metrics import REPORTED, Metric


@dataclass(frozen=True)
class Cell:
    """A cell's text, a quieter second text, and the number to sort by."""

    text: str
    note: str = ""
    value: float | None = None


def metric_cell(metric: Metric, run: dict[str, Any]) -> Cell:
    """What a run's row of the result table has in the column of this metric."""
    if metric.name in _SPECIAL:
        return _SPECIAL[metric.name](run)
    number_of: Any = run
    for key in metric.path:
        number_of = number_of[key]
    return stat_cell(number_of, metric.digits, metric.in_percent)


def stat_cell(stat: dict[str, Any], digits: int, in_percent: bool = False) -> Cell:
    """Shows a mean with its spread over seeds beside it."""
    mean, spread = stat["mean"], stat["spread"]
    if in_percent:
        return Cell(percent(mean, digits), "" if spread is None else f"± {number(100 * spread, digits)}", mean)
    return Cell(number(mean, digits), "" if spread is None else f"± {number(spread, digits)}", mean)


def _recovered(run: dict[str, Any]) -> Cell:
    if run["recovered"]["undefined"] == NO_REFERENCE or run["loss"]["mean"] is None:
        return Cell(NOTHING)
    return recovered_cell(run["recovered"])


def recovered_cell(share: dict[str, Any] | None) -> Cell:
    """A recovered share with its bounds, or that it is undefined; a dash without one."""
    if share is None:
        return Cell(NOTHING)
    if share["value"] is None:
        return Cell("undefined")
    bounds = f"[{number(100 * share['low'], 0)}, {number(100 * share['high'], 0)}]"
    return Cell(percent(share["value"]), bounds, share["value"])


DROPPING = ("Domain information before", "and after dropping")
"""The columns behind those of the domains in the table of what was dropped."""


def drop_cells(run: dict[str, Any]) -> list[Cell]:
    """What a capacity took from each domain, and what that did to specialization, in a run that dropped something."""
    rates = [stat_cell(stat, 1, in_percent=True) for stat in run["drop_rate_by_domain"].values()]
    forms = [run["routing"][form]["domain_information"] for form in ("top_k", "top_k_kept")]
    return rates + [stat_cell(stat, 2) for stat in forms]


def _parameters(run: dict[str, Any]) -> Cell:
    total, active = run["parameters"]["mean"], run["active_parameters"]["mean"]
    if total is None:
        return Cell(NOTHING)
    return Cell(f"{total / 1e6:.1f} M", "" if active is None else f"{active / 1e6:.1f} M active", total)


_SPECIAL: dict[str, Callable[[dict[str, Any]], Cell]] = {"recovered": _recovered, "parameters": _parameters}
"""The cells that are no mean over seeds with their spread."""

COLUMNS = tuple(metric for metric in REPORTED if metric.column is not None)


def topic(results: dict[str, Any]) -> str:
    """Says what the suite is about: its title, after its name."""
    return "routers against the reference" if results["reference"]["labels"] else "how experts are used"


def shown_columns(results: dict[str, Any]) -> list[Metric]:
    """Returns the columns that say anything: a suite that names neither reference nor control has nothing to
    recover."""
    compares = (
        results["reference"]["labels"]
        or results["control"]
        or any(run["recovered"]["value"] is not None for run in results["runs"])
    )
    return [column for column in COLUMNS if compares or column.name != "recovered"]


def legend(columns: Iterable[Metric]) -> str:
    """Says what these columns mean, in a line."""
    recovered = "Recovered: share of the reference's lead over its control (with its bootstrap interval). "
    return (
        "Loss: nats per token of the evaluation split, mean over domains. "
        f"{recovered if any(column.name == 'recovered' for column in columns) else ''}"
        "Routing metrics: top-k choices, mean over layers; effective experts as a share of the maximum's logarithm. "
        "± is the standard deviation over seeds."
    )


def status(run: dict[str, Any]) -> str:
    """What a reader must know about a run beside its numbers: how many seeds are missing, and that it is not causal."""
    return ", ".join(note for note in (missing(run), "" if run["causal"] else "not causal") if note)


def missing(run: dict[str, Any]) -> str:
    """How many seeds of a run have no result, or how it ended if none has one, and where one has diverged."""
    without = without_result(run)
    diverged = [f"diverged at step {training['step']}" for training in without if training["state"] == "diverged"]
    notes = [f"{len(without)} of {len(run['trainings'])} seeds without result"] if without else []
    if len(without) == len(run["trainings"]):
        notes = [] if diverged else [str(without[0]["state"]) if without[0]["state"] != "running" else "cut off"]
    return ", ".join(notes + diverged[:1])


def terminal_table(results: dict[str, Any]) -> str:
    """Returns aligned columns, then the reason of every training without a result, then the legend."""
    columns = [column for column in shown_columns(results) if column.column != "third"]
    rows = [["Run", "Role", *(column.column_title for column in columns)]]
    for run in ranked(results):
        note = status(run)
        cells = [metric_cell(column, run) for column in columns]
        notes = [
            cell.note if column.name in ("loss", "recovered") else ""
            for column, cell in zip(columns, cells, strict=True)
        ]
        texts = [f"{cell.text} {note}".strip() for cell, note in zip(cells, notes, strict=True)]
        rows.append([f"{run['label']} ({note})" if note else run["label"], run["role"], *texts])
    reasons = failures(ranked(results))
    lines = aligned(rows, left=(0, 1))
    return "\n".join(
        [lines[0], "-" * max(map(len, lines)), *lines[1:], *(["", *reasons] if reasons else []), "", legend(columns)]
    )
