"""What a probing task has found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from moe_testbed.launcher.run.columns import aligned
from moe_testbed.launcher.run.probing import ProbingRecord, Score

_HEADS = ("", "linear", "interval", "above random table", "fine-tuned", "interval", "above random model")


def probing_text(records: Sequence[ProbingRecord]) -> str:
    """Returns the table of one task: the runs, then the floors of the last of them."""
    last = records[-1]
    rows = [row for record in records for row in record.rows if not row.floor]
    rows += [row for row in last.rows if row.floor]
    cells = [
        (row.name, *_cells(row.linear), _lead(row.linear_lead), *_cells(row.fine_tuned), _lead(row.fine_tuned_lead))
        for row in rows
    ]
    told = (
        f"{last.task}: {last.metric}, {last.train_labels:,} labels of {last.train_documents:,} documents to learn "
        f"from, {last.test_labels:,} of {last.test_documents:,} to test on"
    )
    lines = [told, "", *aligned([_HEADS, *cells], left={0})]
    for given, wanted, written in last.examples:
        lines += ["", f"given    {given}", f"wanted   {wanted}", f"written  {written}"]
    return "\n".join(lines)


def _cells(score: Score | None) -> tuple[str, str]:
    return ("", "") if score is None else (f"{score.value:.3f}", f"[{score.low:.3f}, {score.high:.3f}]")


def _lead(score: Score | None) -> str:
    return "" if score is None else f"{score.value:+.3f} [{score.low:+.3f}, {score.high:+.3f}]"
