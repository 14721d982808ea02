"""The records of the metrics: each number that they promise is in results.json, on the page and where else they say."""

from __future__ import annotations

import csv
import html
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.page.layout import grouped
from moe_testbed.launcher.report.suites.comparison import COMPARED
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.tables.table import COLUMNS, terminal_table
from moe_testbed.launcher.report.write import write_report
from moe_testbed.launcher.run.arrays import Ablation, Evaluation
from moe_testbed.launcher.run.files import value_at
from moe_testbed.launcher.tracking.content import run_content
from moe_testbed.routing import metrics

MakeSuite = Callable[..., Path]
COMPUTED_BY_THE_REPORT = {
    *metrics.COUNTS, "layer_tokens_YD", "routed_YDE", "ablation_damage_YED", "mean_damage_YED",
}  # fmt: skip
MODEL = {
    "architecture": "encoder", "num_layers": 2, "hidden_size": 128, "num_heads": 4,
    "moe": {"num_experts": 32, "top_k": 2, "expert_hidden_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.report.conftest import DEMO, edit, write_suite

    runs = {label: DEMO[label] for label in ("reference", "permuted_reference", "top_k_global")}
    folder = write_suite(tmp_path_factory.mktemp("records") / "suite", runs)
    start = {"encoder": {"run": "mlm"}}
    for path in folder.glob("*/config.yaml"):
        # The width that the level of chance of CKA needs, an encoder to start from, and the run's own name.
        own = {"name": path.parent.name.removesuffix("-seed1"), "model": MODEL, "start": start}
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | own))
        probes = path.parent / "statistics"
        shutil.copy(min(probes.iterdir()), probes / "step_00000000.npz")
        edit(probes / "step_00000000.npz", step=0)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def results(suite: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((suite / "results.json").read_text())
    return content


@pytest.fixture(scope="module")
def run(results: dict[str, Any]) -> dict[str, Any]:
    return next(run for run in results["runs"] if run["label"] == "top_k_global")


def test_a_name_and_a_title_are_one_metric_s() -> None:
    for of in (lambda metric: metric.name, lambda metric: metric.title):
        values = [of(metric) for metric in metrics.METRICS if of(metric)]
        assert len(values) == len(set(values))


@pytest.mark.parametrize("metric", metrics.REPORTED, ids=lambda metric: metric.name)
def test_a_record_says_what_a_reader_must_know(metric: metrics.Metric) -> None:
    assert all((metric.title, metric.question, metric.formula, metric.range, metric.blind_to))
    assert metric.question.endswith("?")
    assert not metric.note or metric.note.endswith(".")
    known = {field.name for kind in (Evaluation, Ablation) for field in fields(kind)} | COMPUTED_BY_THE_REPORT
    assert set(metric.of) <= known
    assert metric.function is not None or not metric.of
    assert not metric.compared or metric.bounded is not None, "suites are compared by metrics with an interval"


@pytest.mark.parametrize("metric", metrics.REPORTED, ids=lambda metric: metric.name)
def test_a_metric_is_in_results_json_and_csv(metric: metrics.Metric, run: dict[str, Any], suite: Path) -> None:
    number = value_at(run, *metric.path)
    if metric.part == "over_training" and metric.axis:
        number = value_at(run, metric.part, "curves", metric.name)
    assert number is not None
    if metric.bounded is not None and metric.name != "recovered":
        low, high = metric.bounded
        assert low <= number["low"] <= number["mean"] <= number["high"] <= high
    if metric.part != "over_training":  # curves have no rows
        with (suite / "results.csv").open() as file:
            assert any(row["quantity"] == metric.name and row["mean"] for row in csv.DictReader(file))


@pytest.mark.parametrize("metric", metrics.REPORTED, ids=lambda metric: metric.name)
def test_the_page_defines_a_metric(metric: metrics.Metric, suite: Path) -> None:
    page = html.unescape((suite / "report.html").read_text())
    definition = page.partition(f'<details id="definition-{metric.name}">')[2].partition("</details>")[0]
    assert metric.title in definition and f"<code>{metric.name}</code>" in definition


def test_columns_are_those_that_the_records_ask_for(results: dict[str, Any], suite: Path) -> None:
    asked = [metric for metric in metrics.REPORTED if metric.column is not None]
    groups = grouped(COLUMNS)
    assert sorted(column.name for group in groups for column in (*group.main, *group.more)) == sorted(
        metric.name for metric in asked
    )
    head = terminal_table(results).splitlines()[0]
    tex = (suite / "tables" / "results.tex").read_text()
    for metric in asked:
        assert (metric.column_title in head) == (metric.column in ("first", "second")), metric.name
        assert (f"& {metric.column_title} " in tex) == (metric.column == "first"), metric.name


def test_parts_of_a_run_are_tables_of_their_own(results: dict[str, Any]) -> None:
    shown = {title for table in extra_tables(results) for title in table.columns}
    for metric in metrics.REPORTED:
        if metric.part not in ("", "routing", "over_training"):
            assert metric.column_title in shown


def test_mlflow_gets_the_tracked_metrics(suite: Path, run: dict[str, Any]) -> None:
    found = run_content(suite / "top_k_global-seed1", suite).results
    for metric in metrics.REPORTED:
        number = value_at(run, *metric.path) or {}
        value = number.get("value", number.get("mean"))
        assert (found.get(f"result/{metric.name}") == value and value is not None) == metric.tracked, metric.name


def test_suites_are_compared_by_the_metrics_that_say_so() -> None:
    assert COMPARED[0] == "recovered"
    assert set(COMPARED) == {metric.name for metric in metrics.REPORTED if metric.compared}


def test_the_report_is_read_again_as_it_was_written(suite: Path, results: dict[str, Any]) -> None:
    assert read_results(suite) == results
