"""What probing tasks have found of a suite's runs, gathered by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_testbed.launcher.errors import visible
from moe_testbed.launcher.report.numbers.values import Results, stat
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.run.probing import ProbedRow, ProbingRecord, Score
from moe_testbed.routing.metrics import Interval

COLUMNS = ("linear", "fine_tuned")


def probing(suite: Suite) -> tuple[list[Results], list[str]]:
    """Returns the tasks by name with the scores of each run and of its floors; and a line for what is left out: what
    was found at another step than the run has now."""
    found: dict[str, dict[str, list[ProbingRecord]]] = {}
    notes = []
    for training in suite.trainings:
        for record in training.folder.read_probing():
            if record.step == training.step:
                found.setdefault(record.task, {}).setdefault(training.label, []).append(record)
            else:
                notes.append(
                    f"{training.label}, seed {training.seed}: {record.task} was probed at step {record.step}, and the "
                    f"run is at step {training.step}: left out"
                )
    return [_task(name, of_labels) for name, of_labels in sorted(found.items())], notes


def _task(name: str, of_labels: dict[str, list[ProbingRecord]]) -> Results:
    first = next(iter(of_labels.values()))[0]
    return {
        "task": visible(name),
        "metric": visible(first.metric),
        "test_documents": first.test_documents,
        "test_labels": first.test_labels,
        "runs": [_run(label, records) for label, records in of_labels.items()],
    }


def _run(label: str, records: Sequence[ProbingRecord]) -> Results:
    """The scores of a run's trainings, which are the first rows of their records, and of what stands beside them."""
    others = dict.fromkeys(row.name for record in records for row in record.rows[1:])
    beside = {name: [row for record in records for row in record.rows[1:] if row.name == name] for name in others}
    return {
        "label": label,
        **_scores([record.rows[0] for record in records if record.rows]),
        "beside": {visible(name): _scores(rows) for name, rows in beside.items()},
    }


def _scores(rows: Sequence[ProbedRow]) -> dict[str, Any]:
    found = {column: [getattr(row, column) for row in rows] for column in COLUMNS}
    return {column: _score([score for score in scores if score is not None]) for column, scores in found.items()}


def _score(scores: Sequence[Score]) -> Results | None:
    """The mean over trainings with their spread; of one training with its interval over documents."""
    if not scores:
        return None
    values = [score.value for score in scores]
    if len(scores) > 1:
        return stat(values)
    return stat(values, Interval(values[0], scores[0].low, scores[0].high, "documents"))
