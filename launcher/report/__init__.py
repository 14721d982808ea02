"""The report of a suite: results.json, results.csv, report.html and figures/, all made from the run folders alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportPaths:
    """The files that a report consists of; the figures are in the folder figures/ beside them."""

    results_json: Path
    results_csv: Path
    report_html: Path


def write_report(suite_dir: Path) -> ReportPaths:
    """Write the report of a suite's folder into it. Raises ValueError if it is no suite's folder."""
    from moe_testbed.launcher.files import write_atomically
    from moe_testbed.launcher.report.figures import draw_all, save
    from moe_testbed.launcher.report.page import render
    from moe_testbed.launcher.report.records import read_suite
    from moe_testbed.launcher.report.results import summarise, write_results

    suite = read_suite(Path(suite_dir))
    results = summarise(suite)
    results_json, results_csv = write_results(results, suite.folder)
    pictures = draw_all(suite, results)
    save(pictures, suite.folder / "figures")
    report_html = suite.folder / "report.html"
    write_atomically(report_html, render(suite, results, pictures))
    return ReportPaths(results_json, results_csv, report_html)


def print_report(suite_dir: Path) -> None:
    """Write the report of a suite's folder; print its table and path. Raises ConfigError if it is no suite's folder."""
    from moe_testbed.launcher.errors import ConfigError

    try:
        paths = write_report(suite_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(result_table(json.loads(paths.results_json.read_text(encoding="utf-8"))))
    print(f"\nReport: {paths.report_html}")


def result_table(results: dict[str, object]) -> str:
    """The result table for a terminal: the best reference first, the others by rising loss, and a legend line."""
    from moe_testbed.launcher.report.table import terminal_table

    return terminal_table(results)
