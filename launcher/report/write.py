"""The report of a suite and the comparison of suites, written into folders and printed to a terminal.

A report is results.json, results.csv, report.html, figures/ and tables/ in the suite's folder. A comparison is
comparison.html, comparison.json, comparison.csv and figures/ in a folder of its own. Both come from the run folders
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.numbers.results_csv import results_csv
from moe_testbed.launcher.report.numbers.values import Results
from moe_testbed.launcher.report.page.page import render
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.tables.files import write_tables
from moe_testbed.launcher.report.tables.probing_tables import probing_tables
from moe_testbed.launcher.report.tables.stage_tables import stage_tables
from moe_testbed.launcher.report.tables.table import terminal_table
from moe_testbed.launcher.run.files import write_atomically


@dataclass(frozen=True)
class Report:
    """The numbers of a report, and the files that hold them beside those in the folders figures/ and tables/."""

    results: Results
    results_json: Path
    results_csv: Path
    report_html: Path


def write_report(suite_dir: Path) -> Report:
    """Writes the report of a suite into the suite's folder. Raises ValueError if it is no suite's folder."""
    # matplotlib takes a second to load, which whoever only asks for a table or makes a mistake need not wait for.
    from moe_testbed.launcher.report.figures.figures import draw_all, save

    suite = read_suite(Path(suite_dir))
    results = summarise(suite)
    folder = suite.folder
    folder.write_results(results, results_csv(results))
    pictures, tables = (
        draw_all(suite, results),
        [*stage_tables(results), *probing_tables(results), *extra_tables(results)],
    )
    save(pictures, folder.figures)
    write_tables(suite, results, tables, folder.tables)
    write_atomically(folder.page, render(suite, results, pictures, tables))
    return Report(results, folder.results_file, folder.results_table, folder.page)


def print_report(suite_dir: Path) -> None:
    """Writes the report of a suite and prints its table and path. Raises ConfigError if it is no suite's folder."""
    try:
        report = write_report(suite_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for note in report.results["notes"]:
        print(note, file=sys.stderr)
    print(terminal_table(report.results))
    print(f"\nReport: {report.report_html}")


def print_comparison(suite_dirs: Sequence[Path], out: Path | None) -> None:
    """Writes the comparison of suites into `out` and prints its table and path.

    The default of `out` is a folder comparison-A-B beside the first suite. Raises ConfigError if a folder is no
    suite's, if one is given twice, or if the first has no run in common with another.
    """
    from moe_testbed.launcher.report.suites.comparison import compare_suites, open_suites
    from moe_testbed.launcher.report.suites.files import write_comparison
    from moe_testbed.launcher.report.suites.words import terminal_table as comparison_table

    suites = open_suites(suite_dirs)
    comparison = compare_suites(suites)
    folder = out or suites[0].folder.path.resolve().parent / "-".join(
        ["comparison", *(suite.folder.path.resolve().name for suite in suites)]
    )
    path = write_comparison(comparison, folder)
    print(comparison_table(comparison))
    print(f"\nComparison: {path}")
