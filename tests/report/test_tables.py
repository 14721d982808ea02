"""tables/: LaTeX and CSV."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.report.numbers.results import ranked, read_results, summarise
from moe_testbed.launcher.report.numbers.values import Results
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.domain_tables import domain_tables
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.tables.files import write_tables
from moe_testbed.launcher.report.tables.latex import escape, latex_table
from moe_testbed.launcher.report.tables.table import Cell
from moe_testbed.launcher.report.words import number

MakeSuite = Callable[..., Path]


def tables_of(suite_dir: Path) -> Results:
    """Writes the tables as a report does, without its pictures; returns the results."""
    suite = read_suite(suite_dir)
    results = summarise(suite)
    write_tables(suite, results, extra_tables(results), suite.folder.tables)
    return results


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("top_k & 50 %", r"top\_k \& 50 \%"),
        ("−0.12 ± 0.01", r"$-$0.12 $\pm$ 0.01"),
        ("\\input{x}", r"\textbackslash{}input\{x\}"),
        ("a~b^c #1 $2", r"a\textasciitilde{}b\textasciicircum{}c \#1 \$2"),
        ("<i> – |", r"\textless{}i\textgreater{} -- \textbar{}"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_is_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_a_table_has_as_many_cells_in_every_row_as_columns() -> None:
    rows = [[Cell("a_b"), Cell("1.0", "± 0.1", 1.0)], [Cell("[c]"), Cell("–")]]
    lines = latex_table("What & why", "tab:x", ["Run", "Loss"], rows).splitlines()
    assert r"  \caption{What \& why}" in lines and r"  \begin{tabular}{lr}" in lines
    assert [line.strip() for line in lines if line.endswith(r"\\")] == [
        r"{Run} & Loss \\",
        r"{a\_b} & 1.0 $\pm$ 0.1 \\",
        r"{[c]} & -- \\",
    ]
    rules = re.findall(r"\\(toprule|midrule|bottomrule)", "\n".join(lines))
    assert rules == ["toprule", "midrule", "bottomrule"]


def test_the_tables_of_a_suite(make_suite: MakeSuite) -> None:
    suite = make_suite(seeds=(1, 2), num_layers=1)
    results = tables_of(suite)
    tex = (suite / "tables" / "results.tex").read_text()
    by_domain = (suite / "tables" / "loss_by_domain.tex").read_text()
    recovered = (suite / "tables" / "recovered_by_domain.tex").read_text()
    for run in ranked(results):
        start = f"    {{{escape(run['label'])}}} & "
        row = next(line for line in tex.splitlines() if line.startswith(start))
        if run["loss"]["mean"] is None:
            assert row.count("--") > 3
            continue
        assert f"& {number(run['loss']['mean'])} $\\pm$ {number(run['loss']['spread'])} &" in row
        cells = next(line for line in by_domain.splitlines() if line.startswith(start)).split(" & ")[1:]
        means = [number(stat["mean"]) for stat in run["loss_by_domain"].values()]
        assert [cell.split()[0] for cell in cells] == means
        shares = next(line for line in recovered.splitlines() if line.startswith(start)).split(" & ")[1:]
        assert [cell.split()[0].replace("$-$", "−") for cell in shares] == [
            number(100 * share["value"], 0) for share in run["recovered_by_domain"].values()
        ]
    for text in (tex, by_domain, recovered, (suite / "tables" / "dropped_by_domain.tex").read_text()):
        columns = re.search(r"\\begin\{tabular\}\{(l r*)\}".replace(" ", ""), text)
        assert columns is not None
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {line.count(" & ") for line in rows} == {len(columns[1]) - 1}
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")

    with (suite / "tables" / "pairwise.csv").open() as file:
        rows = list(csv.DictReader(file))
    finished = [run for run in results["runs"] if run["loss"]["mean"] is not None]
    assert len(rows) == len(finished) * (len(finished) - 1) // 2
    means = {run["label"]: run["loss"]["mean"] for run in finished}
    for row in rows:
        assert float(row["loss_less_the_others"]) == pytest.approx(means[row["run"]] - means[row["other"]], abs=1e-6)
        assert float(row["low"]) <= float(row["loss_less_the_others"]) <= float(row["high"])
        assert row["over"] == "seeds"


def test_many_domains_are_rows(make_suite: MakeSuite) -> None:
    domains = tuple(f"topic_{number}" for number in range(20))
    results = read_results(make_suite(labels=("reference", "top_k_global"), domains=domains))
    table = next(iter(domain_tables(results)))
    runs = ranked(results)
    assert table.columns == ("Domain", *(run["label"] for run in runs))
    expected = [(name, *(run["loss_by_domain"][name]["mean"] for run in runs)) for name in domains]
    assert [(row[0].text, *(cell.value for cell in row[1:])) for row in table.rows] == expected


def test_sections_tables_are_csv(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("reference", "permuted_reference", "top_k_global"), num_layers=1)
    results = tables_of(suite)
    with (suite / "tables" / "agreement_experts_matched_to_domains.csv").open() as file:
        rows = {row["Run"]: row for row in csv.DictReader(file)}
    for run in results["runs"]:
        assert float(rows[run["label"]]["Precision"]) == run["agreement"]["precision"]["mean"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_takes_the_tables(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite = make_suite(num_layers=1)
    tables_of(suite)
    inputs = "".join(rf"\input{{{path}}}" for path in sorted((suite / "tables").glob("*.tex")))
    source = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "paper.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
