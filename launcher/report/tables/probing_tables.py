"""Tables of probing tasks: the scores of each run beside what is found without its pre-training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.report.tables.extra_tables import ExtraTable
from moe_testbed.launcher.report.tables.table import Cell, stat_cell
from moe_testbed.launcher.report.words import NOTHING, interval

Results = dict[str, Any]
_DIGITS = 3
_WORDS = {"linear": "linear", "fine_tuned": "fine-tuned"}


def probing_tables(results: Results) -> Iterator[ExtraTable]:
    """A table for each task."""
    for task in results.get("probing", ()):
        runs = task["runs"]
        own = [column for column in _WORDS if any(run[column] is not None for run in runs)]
        beside = [
            (name, column)
            for name in dict.fromkeys(name for run in runs for name in run["beside"])
            for column in _WORDS
            if any(run["beside"].get(name, {}).get(column) is not None for run in runs)
        ]
        both = {name for name, _ in beside if len([other for other, _ in beside if other == name]) > 1}
        heads = [_WORDS[column].capitalize() for column in own]
        heads += [
            f"{name.capitalize()}, {_WORDS[column]}" if name in both else name.capitalize() for name, column in beside
        ]
        rows = [
            (
                Cell(run["label"]),
                *(_cell(run[column]) for column in own),
                *(_cell(run["beside"].get(name, {}).get(column)) for name, column in beside),
            )
            for run in runs
        ]
        yield ExtraTable(
            "probing",
            task["task"],
            f"{task['metric'].replace('_', ' ').capitalize()} on {task['test_labels']:,} labels of "
            f"{task['test_documents']:,} documents. Linear: a linear layer on states that stay as they are; "
            "fine-tuned: everything trained. The columns behind them are floors, which know nothing of the "
            "pre-training, but for the table alone. Mean over trainings with their standard deviation; of one "
            "training with its interval over documents.",
            ("Run", *heads),
            rows,
        )


def _cell(found: Results | None) -> Cell:
    if found is None or found["mean"] is None:
        return Cell(NOTHING)
    cell = stat_cell(found, _DIGITS)
    return cell if found.get("low") is None else Cell(cell.text, interval(found, 1, _DIGITS), cell.value)
