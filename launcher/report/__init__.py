"""The report of a suite, and the comparison of suites, all made from the run folders alone.

A report is results.json, results.csv, report.html, figures/ and tables/ in the suite's folder. A comparison is
comparison.html, comparison.json, comparison.csv and figures/ in a folder of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportPaths:
    """The files that a report consists of; the figures and tables are in the folders figures/ and tables/."""

    results_json: Path
    results_csv: Path
    report_html: Path


def write_report(suite_dir: Path) -> ReportPaths:
    """Write the report of a suite's folder into it. Raises ValueError if it is no suite's folder."""
    from moe_testbed.launcher.report.figures.figures import draw_all, save
    from moe_testbed.launcher.report.numbers.results import summarise, write_results
    from moe_testbed.launcher.report.page.page import render
    from moe_testbed.launcher.report.read.records import read_suite
    from moe_testbed.launcher.report.tables.extra_tables import extra_tables
    from moe_testbed.launcher.report.tables.files import write_tables
    from moe_testbed.launcher.run.files import write_atomically

    suite = read_suite(Path(suite_dir))
    results = summarise(suite)
    results_json, results_csv = write_results(results, suite.folder)
    pictures, tables = draw_all(suite, results), extra_tables(results)
    save(pictures, suite.folder / "figures")
    write_tables(suite, results, tables, suite.folder / "tables")
    report_html = suite.folder / "report.html"
    write_atomically(report_html, render(suite, results, pictures, tables))
    return ReportPaths(results_json, results_csv, report_html)


def print_report(suite_dir: Path) -> None:
    """Write the report of a suite's folder; print its table and path. Raises ConfigError if it is no suite's folder."""
    from moe_testbed.launcher.errors import ConfigError

    try:
        paths = write_report(suite_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    results = json.loads(paths.results_json.read_text(encoding="utf-8"))
    for note in results["notes"]:
        print(note, file=sys.stderr)
    print(result_table(results))
    print(f"\nReport: {paths.report_html}")


def print_comparison(suite_dirs: Sequence[Path], out: Path | None) -> None:
    """Write the comparison of suites into `out`, by default comparison-A-B beside the first; print its table and path.

    Raises ConfigError if a folder is no suite's, if one is given twice, or if the first has no run in common with
    another.
    """
    from moe_testbed.launcher.report.suites.comparison import compare_suites, open_suites
    from moe_testbed.launcher.report.suites.files import write_comparison
    from moe_testbed.launcher.report.suites.words import terminal_table

    suites = open_suites(suite_dirs)
    comparison = compare_suites(suites)
    folder = out or suites[0].folder.resolve().parent / "-".join(
        ["comparison", *(s.folder.resolve().name for s in suites)]
    )
    path = write_comparison(comparison, folder)
    print(terminal_table(comparison))
    print(f"\nComparison: {path}")


def result_table(results: dict[str, object]) -> str:
    """The result table for a terminal: the best reference first, the others by rising loss, and a legend line."""
    from moe_testbed.launcher.report.tables.table import terminal_table

    return terminal_table(results)
