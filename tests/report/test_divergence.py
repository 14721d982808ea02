"""Runs that diverged, loss spikes and skipped steps, as the report shows them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe_testbed.launcher.report.figures.lines import loss_panel
from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.suites.comparison import compare_suites, open_suites
from moe_testbed.launcher.report.suites.words import metric_tables, terminal_table
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.tables.table import status
from moe_testbed.launcher.report.words import NOTHING, failures, verdict
from tests.report.conftest import FakeRun, write_suite

REASON = "diverged at step 220: loss, cross_entropy are not finite; it began in blocks.0.dense; train with another rate"


def make_suite(folder: Path) -> Path:
    """A run without and one with spikes and a skipped step, and one of which one seed or both have diverged."""
    runs = {
        "reference": FakeRun("reference", 0.0),
        "spiky": FakeRun("top_k", 0.1),
        "blown": FakeRun("hash", 0.2, state="diverged", reason=REASON),
    }
    suite = write_suite(folder, runs, seeds=(1, 2), control=None, num_layers=1, num_experts=8)
    metrics = suite / "spiky-seed2" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["cross_entropy"] += 3.0 * (line["step"] in (250, 300, 301))
            line["skipped_steps"] = int(line["step"] > 120)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return suite


def test_what_diverged_is_told_with_its_step_and_spikes_are_counted_and_marked(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite")
    results = read_results(suite)
    runs = {run["label"]: run for run in results["runs"]}
    assert [training["state"] for training in runs["blown"]["trainings"]] == ["diverged"] * 2
    assert [training["step"] for training in runs["blown"]["trainings"]] == [220] * 2
    assert status(runs["blown"]) == "diverged at step 220"
    assert failures(results["runs"]) == [f"blown, seeds 1, 2: {REASON}"]
    assert verdict(runs["blown"], results).text == f"has no result: {REASON}."

    first, second = runs["spiky"]["trainings"]
    assert (first["loss_spikes"], first["skipped_steps"]) == ([], 0)
    assert second["loss_spikes"] in ([250, 300], [250, 301]) and second["skipped_steps"] == 1
    (table,) = (table for table in extra_tables(results) if table.title == "Loss spikes and skipped steps")
    ((label, spikes, skipped, where),) = table.rows
    assert (label.text, spikes.text, skipped.text) == ("spiky", "2", "1")
    assert where.text == f"seed 2 at step 250, {second['loss_spikes'][1]}"

    panel = loss_panel(read_suite(suite), [runs["reference"], runs["spiky"]], "train")
    marked = {line.label: [] if line.spikes is None else np.asarray(line.spikes).tolist() for line in panel.lines}
    assert marked == {"reference": [], "spiky": [float(step) for step in second["loss_spikes"]]}


def test_a_run_of_which_one_seed_diverged_says_so(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite")
    path = suite / "spiky-seed1" / "status.json"
    path.write_text(json.dumps({"state": "diverged", "step": 7, "steps": 400, "reason": REASON}))
    runs = {run["label"]: run for run in read_results(suite)["runs"]}
    assert status(runs["spiky"]) == "1 of 2 seeds without result, diverged at step 7"


def test_a_comparison_of_suites_says_which_runs_diverged_and_in_which_suite(tmp_path: Path) -> None:
    one, other = make_suite(tmp_path / "one"), make_suite(tmp_path / "other")
    status_file = other / "spiky-seed1" / "status.json"
    status_file.write_text(json.dumps({"state": "diverged", "step": 7, "steps": 400, "reason": REASON}))
    comparison = compare_suites(open_suites([one, other]))
    assert {run["label"]: run["missing"] for run in comparison["runs"]} == {
        "reference": ["", ""],
        "spiky": ["", "1 of 2 seeds without result, diverged at step 7"],
        "blown": ["diverged at step 220"] * 2,
    }
    for table in metric_tables(comparison).values():
        cells = {row[0].text: row[1:3] for row in table.rows}
        assert [(cell.text, cell.note) for cell in cells["blown"]] == [(NOTHING, "diverged at step 220")] * 2
        assert ["diverged at step 7" in cell.note for cell in cells["spiky"]] == [False, True]
        assert not any("diverged" in cell.note for cell in cells["reference"])
    assert "diverged at step 220" in terminal_table(comparison)
