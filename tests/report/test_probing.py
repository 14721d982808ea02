"""The report's tables of probing tasks, on a constructed suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.probing_tables import probing_tables
from moe_testbed.launcher.report.write import write_report
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.probing import ProbedRow, ProbingRecord, Score
from tests.report.conftest import FakeRun, write_suite


def score(value: float) -> Score:
    return Score(value, value - 0.01, value + 0.02, (value,))


def record(task: str, linear: float, fine_tuned: float, step: int) -> ProbingRecord:
    """What a probe has found of a run, and of two floors."""
    rows = (
        ProbedRow("run-seed1", False, score(linear), score(fine_tuned)),
        ProbedRow("random model", True, score(0.3), score(0.4)),
        ProbedRow("majority", True, score(0.2)),
    )
    return ProbingRecord(task, "token", "accuracy", step, "0" * 64, ("a", "b"), 9, 99, 4, 44, {"run": 0.001}, rows)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of two runs and two seeds; one run was probed under both seeds, the other under one."""
    write_suite(tmp_path, {"first": FakeRun("top_k", 0.5), "second": FakeRun("top_k", 0.7)}, seeds=(1, 2))
    step = read_suite(tmp_path).trainings[0].step
    for name, linear in (("first-seed1", 0.5), ("first-seed2", 0.6), ("second-seed1", 0.7)):
        RunFolder(tmp_path / name).write_probing(record("pos", linear, linear + 0.1, step))
    RunFolder(tmp_path / "second-seed2").write_probing(record("pos", 0.9, 0.9, step - 1))
    return tmp_path


def test_scores_are_means_over_seeds_and_what_is_of_another_step_is_left_out(suite: Path) -> None:
    results = summarise(read_suite(suite))
    (task,) = results["probing"]
    first, second = task["runs"]
    assert (first["label"], first["linear"]["mean"], first["fine_tuned"]["mean"]) == ("first", 0.55, 0.65)
    assert first["linear"]["spread"] == pytest.approx(0.1 / 2**0.5)
    assert (second["linear"]["mean"], second["linear"]["low"], second["linear"]["high"]) == (0.7, 0.69, 0.72)
    assert first["beside"]["random model"]["fine_tuned"]["mean"] == 0.4
    assert first["beside"]["majority"]["fine_tuned"] is None
    assert [note for note in results["notes"] if "pos was probed at step" in note and "second, seed 2" in note]


def test_the_table_has_a_column_for_each_floor_and_stands_on_the_page(suite: Path) -> None:
    report = write_report(suite)
    (table,) = probing_tables(report.results)
    assert table.columns == (
        "Run", "Linear", "Fine-tuned", "Random model, linear", "Random model, fine-tuned", "Majority",
    )  # fmt: skip
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["first", "0.550", "0.650", "0.300", "0.400", "0.200"],
        ["second", "0.700", "0.800", "0.300", "0.400", "0.200"],
    ]
    assert table.rows[1][1].note == "[0.690, 0.720]"
    page = report.report_html.read_text(encoding="utf-8")
    assert "What encoders have learned" in page and "Accuracy on 44 labels of 4 documents" in page


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{"name": "x", "linear": {"value": 10**400, "low": 0, "high": 0, "by_seed": []}}]},
        {"rows": []}, {"rows": 7}, {"task": 7}, {"test_labels": "many"}, {"examples": [["a"], 3]}, {"rates": None},
    ],
)  # fmt: skip
def test_a_record_that_makes_no_sense_costs_no_report(suite: Path, change: dict[str, Any]) -> None:
    path = suite / "first-seed1" / "probing" / "pos.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert write_report(suite).results["runs"]


def test_a_suite_that_was_not_probed_has_no_such_part(suite: Path) -> None:
    for path in suite.rglob("probing/*.json"):
        path.unlink()
    report = write_report(suite)
    assert "probing" not in report.results
    assert "What encoders have learned" not in report.report_html.read_text(encoding="utf-8")
