"""The result table: its columns, once for the page and once for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from moe_testbed.launcher.report.numbers.gap import NO_REFERENCE
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.words import NOTHING, failures, number, percent, without_result
from moe_testbed.launcher.run.columns import aligned


@dataclass(frozen=True)
class Cell:
    """A cell's text, a quieter second text, and the number to sort by."""

    text: str
    note: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the result table; `metric` is the name under which the definitions explain it."""

    title: str
    metric: str
    cell: Callable[[dict[str, Any]], Cell]
    in_terminal: bool = True


def _stat(key: str, digits: int, in_percent: bool = False) -> Callable[[dict[str, Any]], Cell]:
    def cell(run: dict[str, Any]) -> Cell:
        return _stat_cell(run[key], digits, in_percent)

    return cell


def _routing(metric: str, digits: int = 2, in_percent: bool = False) -> Callable[[dict[str, Any]], Cell]:
    def cell(run: dict[str, Any]) -> Cell:
        return _stat_cell(run["routing"]["top_k"][metric], digits, in_percent)

    return cell


def _stat_cell(stat: dict[str, Any], digits: int, in_percent: bool) -> Cell:
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
"""Columns behind those of the domains in the table of what was dropped."""


def drop_cells(run: dict[str, Any]) -> list[Cell]:
    """What a capacity took from each domain, and what that did to specialization, in a run that dropped something."""
    rates = [_stat_cell(stat, 1, in_percent=True) for stat in run["drop_rate_by_domain"].values()]
    forms = [run["routing"][form]["domain_information"] for form in ("top_k", "top_k_kept")]
    return rates + [_stat_cell(stat, 2, in_percent=False) for stat in forms]


def _parameters(run: dict[str, Any]) -> Cell:
    total, active = run["parameters"]["mean"], run["active_parameters"]["mean"]
    if total is None:
        return Cell(NOTHING)
    return Cell(f"{total / 1e6:.1f} M", "" if active is None else f"{active / 1e6:.1f} M active", total)


COLUMNS = (
    Column("Loss", "loss", _stat("loss", 3)),
    Column("Recovered", "recovered", _recovered),
    Column("Perplexity", "perplexity", _stat("perplexity", 2), in_terminal=False),
    Column("Domain information", "domain_information", _routing("domain_information")),
    Column(
        "Shuffled labels", "domain_information_shuffled", _routing("domain_information_shuffled"), in_terminal=False
    ),
    Column("Purity", "purity", _routing("purity")),
    Column("Effective experts", "normalised_effective_experts", _routing("normalised_effective_experts")),
    Column("Dead experts", "dead_experts", _routing("dead_experts", 0, in_percent=True)),
    Column("Max violation", "max_violation", _routing("max_violation")),
    Column("Experts per token", "experts_per_token", _stat("experts_per_token", 2)),
    Column("Dropped", "drop_rate", _stat("drop_rate", 1, in_percent=True), in_terminal=False),
    Column("Tokens/s", "tokens_per_second", _stat("tokens_per_second", 0)),
    Column("Parameters", "parameters", _parameters, in_terminal=False),
)


def topic(results: dict[str, Any]) -> str:
    """What the suite is about: its title, after its name."""
    return "routers against the reference" if results["reference"]["labels"] else "how experts are used"


def shown_columns(results: dict[str, Any]) -> list[Column]:
    """The columns that say anything: a suite that names neither reference nor control has nothing to recover."""
    compares = (
        results["reference"]["labels"]
        or results["control"]
        or any(run["recovered"]["value"] is not None for run in results["runs"])
    )
    return [column for column in COLUMNS if compares or column.metric != "recovered"]


def legend(columns: Iterable[Column]) -> str:
    """What these columns mean, in a line."""
    recovered = "Recovered: share of the reference's lead over its control (with its bootstrap interval). "
    return (
        "Loss: nats per token of the evaluation split, mean over domains. "
        f"{recovered if any(column.metric == 'recovered' for column in columns) else ''}"
        "Routing metrics: top-k choices, mean over layers; effective experts as a share of the maximum's logarithm. "
        "± is the standard deviation over seeds."
    )


def status(run: dict[str, Any]) -> str:
    """What a reader must know about a run beside its numbers: how many seeds are missing, and that it is not causal."""
    without = without_result(run)
    notes = [f"{len(without)} of {len(run['trainings'])} seeds without result"] if without else []
    if len(without) == len(run["trainings"]):
        notes = [str(without[0]["state"]) if without[0]["state"] != "running" else "cut off"]
    return ", ".join(notes + ([] if run["causal"] else ["not causal"]))


def terminal_table(results: dict[str, Any]) -> str:
    """Aligned columns, then the reason of every training without a result, then the legend."""
    columns = [column for column in shown_columns(results) if column.in_terminal]
    rows = [["Run", "Role", *(column.title for column in columns)]]
    for run in ranked(results):
        note = status(run)
        cells = [column.cell(run) for column in columns]
        notes = [
            cell.note if column.metric in ("loss", "recovered") else ""
            for column, cell in zip(columns, cells, strict=True)
        ]
        texts = [f"{cell.text} {note}".strip() for cell, note in zip(cells, notes, strict=True)]
        rows.append([f"{run['label']} ({note})" if note else run["label"], run["role"], *texts])
    reasons = failures(ranked(results))
    lines = aligned(rows, left=(0, 1))
    return "\n".join(
        [lines[0], "-" * max(map(len, lines)), *lines[1:], *(["", *reasons] if reasons else []), "", legend(columns)]
    )
