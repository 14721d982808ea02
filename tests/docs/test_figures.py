"""The figures of README and docs: pages say what docs/figures.json says, and each figure has a benchmark."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# What measures no figure: the runner, what several share, tools for work on speed, the writer of docs/metrics.md, and
# what needs a GPU.
STAMP = {"commit": "c", "hardware": "h"}
OTHERS = {
    "figures.py",
    "suite_tables.py",
    "earlier_commit.py",
    "metric_tables.py",
    "suite_time.py",
    "gpu_check.py",
    "looking.py",
    "probes.py",
}


def load(path: Path) -> ModuleType:
    """Returns a script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


figures = load(BENCHMARKS / "figures.py")
RESULTS = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_says_what_the_file_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text, RESULTS) == text, "run `make figures FIGURES=pages`"


def test_every_figure_is_measured_by_a_command_that_is_there() -> None:
    assert set(RESULTS) == {benchmark.name for benchmark in figures.BENCHMARKS}
    for benchmark in figures.BENCHMARKS:
        result = RESULTS[benchmark.name]
        assert result["command"] == f"python {benchmark.command}"
        assert set(result["figures"]) == set(benchmark.questions)
        assert all(result[stamp] for stamp in ("commit", "hardware", "date"))
        for word in benchmark.command.split():
            assert "/" not in word or (ROOT / word).exists(), f"{benchmark.command}: there is no {word}"


def test_every_script_has_a_figure() -> None:
    named = {benchmark.command.split()[0].removeprefix("benchmarks/") for benchmark in figures.BENCHMARKS}
    assert {path.name for path in BENCHMARKS.glob("*.py")} - OTHERS == named


def test_every_table_has_a_place() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in figures.PAGES)
    tables = {name for result in RESULTS.values() for name in result["tables"]}
    assert {name for name in tables if f"<!-- table: {name} -->" not in pages} == set()


def test_a_place_is_filled_and_the_rest_of_the_page_stays() -> None:
    results = {"toy": {"figures": {"speed": "7 MB/s"}, "tables": {"two": ["a | b", "1 | 2"]}, **STAMP}}
    page = (
        "<!-- stamp: toy -->x<!-- end --> It takes <!-- figure: speed -->5 MB/s<!-- end -->.\n\n"
        "<!-- table: two -->\n<!-- end -->\nEnd."
    )
    expected = (
        "<!-- stamp: toy -->commit c, h<!-- end --> It takes <!-- figure: speed -->7 MB/s<!-- end -->.\n\n"
        "<!-- table: two -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\nEnd."
    )
    assert figures.filled(page, results) == expected
    assert figures.filled(expected, results) == expected
    with pytest.raises(ValueError, match="no benchmark tells of the figure heat"):
        figures.filled("<!-- figure: heat --><!-- end -->", results)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A repository of one page and one benchmark; the fixture's function runs figures.py on a script."""
    page, results, script = (tmp_path / name for name in ("page.md", "figures.json", "toy.py"))
    page.write_text("<!-- figure: speed -->old<!-- end -->")
    results.write_text(json.dumps({"toy": {"figures": {"speed": "old"}, "tables": {}, **STAMP}}))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", (page,))
    monkeypatch.setattr(figures, "RESULTS", results)
    monkeypatch.setattr(figures, "BENCHMARKS", (figures.Benchmark("toy", "quick", "toy.py", {"speed": "How fast?"}),))
    monkeypatch.setattr(figures, "commit", lambda: "abc1234")
    monkeypatch.setattr(sys, "argv", ["figures.py", "quick"])

    def run(text: str) -> list[Any]:
        script.write_text(text)
        status = figures.main()
        return [status, page.read_text(), json.loads(results.read_text())["toy"]["figures"]["speed"]]

    return run


def test_the_last_line_of_a_benchmark_is_kept_with_its_stamp(
    project: Callable[[str], list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = '{"figures": {"speed": "9 MB/s"}, "tables": {"rows": [["a", "b"], ["1", "2"]]}}'
    assert project(f"print('first line'); print('''{said}''')") == [0, page_of("9 MB/s"), "9 MB/s"]
    kept = json.loads((tmp_path / "figures.json").read_text())["toy"]
    assert kept["tables"] == {"rows": ["a | b", "1 | 2"]}
    assert (kept["command"], kept["commit"]) == ("python toy.py", "abc1234")
    assert "first line" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, reason",
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('no json')", "is not a JSON object"),
        ("pass", "is not a JSON object"),
    ],
)
def test_what_a_failed_benchmark_leaves_is_what_was_there(
    project: Callable[[str], list[Any]], capsys: pytest.CaptureFixture[str], script: str, reason: str
) -> None:
    assert project(script) == [1, page_of("old"), "old"]
    assert reason in capsys.readouterr().err


def test_a_name_that_is_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown: heat; known are .*moe_layer"):
        figures.chosen(["heat"])


def page_of(figure: str) -> str:
    return f"<!-- figure: speed -->{figure}<!-- end -->"
