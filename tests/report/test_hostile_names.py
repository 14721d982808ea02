"""Names that a page, a terminal, a spreadsheet, LaTeX or a drawing would obey: all of them are shown as they stand."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from moe_testbed.launcher.errors import ConfigError, visible
from moe_testbed.launcher.report.write import print_comparison, print_report
from moe_testbed.launcher.tracking.content import run_content, suite_content
from tests.report.conftest import FakeRun, write_suite
from tests.report.test_report import Page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[2J\x1b]0;title\x07",
    "=cmd|'/C calc'!A0",
    "@SUM(1+1)",
    "+1",
    "-2+3",
    r"\input{/etc/passwd}%&#_^~$",
    r"$\frac{1}{0$ and $x^",
    "two\nlines\r\tand a tab",
    "abc\u202egnp.exe\u2066",
    "half \ud800 a pair",
    "null\x00byte",
    "--><!--",
    "a" * 3000,
)
WORDS = "".join(HOSTILE)
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite whose domains, descriptions, reasons, routers and manifest have hostile names."""
    labels = {
        "reference": FakeRun("reference", 0.0, 1.0, 0.1, description=WORDS),
        "top_k": FakeRun(HOSTILE[1], 0.4, 0.0, 0.1, drops=0.1),
        "broken": FakeRun("top_k", 0.0, state="failed", reason=WORDS),
    }
    # NumPy cuts zeros at the end of a text off, and writes no halves of pairs.
    domains = tuple(name.replace("\ud800", "") for name in HOSTILE)
    folder = write_suite(
        tmp_path_factory.mktemp("suites") / "s",
        labels,
        domains=domains,
        num_layers=1,
        num_experts=16,
        sequences_per_domain=2,
    )
    content = yaml.safe_load((folder / "suite.yaml").read_text())
    (folder / "suite.yaml").write_text(yaml.safe_dump(content | {"name": HOSTILE[0] + HOSTILE[3] + HOSTILE[8]}))
    return folder


@pytest.fixture(scope="module")
def printed(suite: Path) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", out)
        print_report(suite)
    return out.getvalue()


def test_a_terminal_is_told_nothing_to_obey(printed: str) -> None:
    assert r"\x1b[2J\x1b]0;title\x07" in printed and r"\u202egnp" in printed
    assert not CONTROLS.search(printed)


def test_a_page_has_no_element_of_a_name(suite: Path, printed: str) -> None:
    html = (suite / "report.html").read_text()
    page = Page(html)
    assert page.tags.count("script") == 2
    assert not {"x"} & set(page.loads) and all(load.startswith(("data:", "#")) for load in page.loads)
    assert all(not name.startswith("on") for name in page.attributes)
    assert "{{ 7 * 7 }}{% raw %}" in page.text and "<script>alert(1)</script>" in page.text
    assert not CONTROLS.search(html)
    embedded = re.search(r'<script type="application/json" id="data-of-runs">(.*?)</script>', html, re.S)
    assert embedded is not None
    assert json.loads(embedded[1])["domains"][0] == HOSTILE[0]


def test_a_spreadsheet_finds_no_formula(suite: Path, printed: str) -> None:
    files = [suite / "results.csv", *(suite / "tables").glob("*.csv")]
    assert len(files) > 3
    cells = [cell for file in files for row in csv.reader(io.StringIO(file.read_text())) for cell in row]
    formulas = {cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))}
    assert not [cell for cell in formulas if not re.fullmatch(r"[-+][\d.]+(e-?\d+)?", cell) or cell == "+1"]
    assert {"'=cmd|'/C calc'!A0", "'@SUM(1+1)", "'+1", "'-2+3"} <= set(cells)


def test_latex_prints_them(suite: Path, printed: str) -> None:
    text = "".join(path.read_text() for path in (suite / "tables").glob("*.tex"))
    assert r"\input" not in text and r"\textbackslash{}input\{/etc/passwd\}\%\&\#\_" in text
    assert not CONTROLS.search(text)


def test_figures_are_sound_pictures_in_their_folder(suite: Path, printed: str) -> None:
    figures = list((suite / "figures").iterdir())
    assert len(figures) > 5
    for path in figures:
        if path.suffix == ".svg":
            tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(path.read_bytes()).iter()}
            assert not tags & {"script", "foreignObject", "a"}
    assert {path.name for path in suite.parent.iterdir()} == {"s"}


@pytest.mark.parametrize(
    "label", ["../../evil", "a/b", "", ".", "..", "=1+1", "a\n", "<b>", "\x1b[2J", "a" * 10 + "\u202e"]
)
def test_a_label_that_is_no_name_of_a_folder_is_refused(label: str, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "suite", "runs": {label: {}}}))
    with pytest.raises(ConfigError) as refused:
        print_report(folder)
    assert f"runs has the label {label!r}, but a label is of letters" in str(refused.value)
    assert {path.name for path in tmp_path.rglob("*")} == {"suite", "suite.yaml"}


def test_a_comparison_shows_them_too(
    suite: Path, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_suite(
        tmp_path / "other",
        {"reference": FakeRun("reference", 0.0, 1.0, 0.1, description=WORDS)},
        num_layers=1,
        recorded=False,
    )
    print_comparison([suite, other], tmp_path / "out")
    assert not CONTROLS.search(capsys.readouterr().out)
    html = (tmp_path / "out" / "comparison.html").read_text()
    page = Page(html)
    assert page.tags.count("script") == 2 and not CONTROLS.search(html)
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    for path in (tmp_path / "out" / "figures").glob("*.svg"):
        ElementTree.fromstring(path.read_bytes())


def test_mlflow_is_told_words(suite: Path, printed: str) -> None:
    description = suite_content(suite).tags["mlflow.note.content"]
    assert "<" not in description and "](" not in description and not CONTROLS.search(description)
    content = run_content(suite / "top_k-seed1", suite)
    matrices = [text for name, text in content.files.items() if name.startswith("matrices/")]
    assert matrices
    for text in matrices:
        assert isinstance(text, str) and "'=cmd" in text and not CONTROLS.search(text)


def test_what_is_seen_stays_as_it_is() -> None:
    for text in ("latin", "ελληνικά", "العربية", "日本語", "a b\u00a0c", "👩\u200d🔬", "naïve – “quoted”"):
        assert visible(text) == text
    assert visible("\x1b[1m\u202e\ud800\n") == r"\x1b[1m\u202e\ud800\n"
