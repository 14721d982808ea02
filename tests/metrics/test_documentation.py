"""docs/metrics.md: its examples are run and compared, and it explains every public function and reported number."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
from pathlib import Path

import pytest

from moe_testbed.routing import metrics

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
FUNCTIONS = [name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))]


def test_examples() -> None:
    example = doctest.DocTestParser().get_doctest(TEXT, {}, DOCUMENT.name, str(DOCUMENT), 0)
    output: list[str] = []
    results = doctest.DocTestRunner().run(example, out=output.append)
    assert results.attempted > 50
    assert not results.failed, "".join(output)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_row_and_an_example(name: str) -> None:
    row = re.search(rf"^\| `{name}` \|(.+)\|$", TEXT, re.MULTILINE)
    assert row, f"docs/metrics.md has no row for {name}"
    cells = re.split(r"(?<!\\)\|", row[1])
    assert len(cells) == 5, "answers, formula, range, blind to, in results.json"
    assert all(cell.strip() for cell in cells), f"the row of {name} has an empty cell"
    assert re.search(rf"^(>>>|\.\.\.).*metrics\.{name}\b", TEXT, re.MULTILINE), f"no example calls metrics.{name}"


def test_every_row_is_of_a_function() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert rows == set(FUNCTIONS) | {metric.name for metric in metrics.REPORTED}


def test_the_tables_are_written_from_the_records() -> None:
    with_tables = runpy.run_path(str(DOCUMENT.parents[1] / "benchmarks" / "metric_tables.py"))["with_tables"]
    assert with_tables(TEXT) == TEXT, "python benchmarks/metric_tables.py writes docs/metrics.md anew"


def test_a_function_with_a_record_is_named_after_it() -> None:
    """One name means one thing, in Python and in results.json."""
    for metric in metrics.METRICS:
        if metric.name in FUNCTIONS and metric.function is not float:
            assert metric.function is getattr(metrics, metric.name)
