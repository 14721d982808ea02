"""Shape letters mean the same everywhere: every legend is compared with docs/shapes.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data", "launcher", "model", "routing")
FOLDERS = (*PACKAGES, "tests", "benchmarks")
COMMON = set("BDEKLMNTY")
"""Letters that a legend may leave out."""

ROW = re.compile(r"^\| ([A-Za-z]) \| ([^|]+) \|", re.MULTILINE)
LEGEND = re.compile(r"Shape legend: (.*?)(?:[.;]\s|\.$|\n\n|$)", re.DOTALL)
ENTRY = re.compile(r"([A-Za-z])(?: = [A-Z */]+)? ([a-z].*|MoE .*)")
SUFFIX = re.compile(r"[a-z0-9]_([A-Zet0-9]*[A-Z][A-Zet0-9]*|[et])$")


def meanings() -> dict[str, str]:
    rows = ROW.findall((ROOT / "docs" / "shapes.md").read_text())
    assert len({letter for letter, _ in rows}) == len(rows), "a letter has two rows"
    assert len({meaning for _, meaning in rows}) == len(rows), "a meaning has two letters"
    return dict(rows)


def legend_of(path: Path) -> dict[str, str] | None:
    """Letter -> meaning in a module's docstring; None without a legend."""
    found = LEGEND.search(ast.get_docstring(ast.parse(path.read_text())) or "")
    if found is None:
        return None
    entries = [ENTRY.fullmatch(entry) for entry in re.split(r", (?=[A-Za-z] )", " ".join(found[1].split()))]
    assert all(entries), f"{path}: {found[1]!r} is no list of letters and meanings"
    return {entry[1]: entry[2] for entry in entries if entry}


def letters_used(path: Path) -> set[str]:
    """Letters behind the names of a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {value for field in ("id", "attr", "arg") if isinstance(value := getattr(node, field, None), str)}
    found = [match for name in names if name != name.upper() and (match := SUFFIX.search(name))]
    return {letter for match in found for letter in match[1] if not letter.isdigit()}


def modules(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LEGENDS = {path: legend for path in modules(FOLDERS) if (legend := legend_of(path)) is not None}


def test_the_legends_are_found() -> None:
    read = {str(path.relative_to(ROOT)) for path in LEGENDS}
    assert {"routing/records.py", "launcher/report/read/arrays.py", "routing/metrics/gap.py"} <= read


def test_legends_say_what_the_page_says() -> None:
    page = meanings()
    others = [
        f"{path.relative_to(ROOT)}: {letter} is {page.get(letter)}, not {meaning}"
        for path, legend in LEGENDS.items()
        for letter, meaning in legend.items()
        if letter not in page or (letter != "X" and not re.match(rf"{re.escape(page[letter])}\b", meaning))
    ]
    assert not others, "\n".join(others)


def test_legends_leave_out_no_letter_that_names_end_in() -> None:
    page = meanings()
    missing = {
        str(path.relative_to(ROOT)): left
        for path in modules(PACKAGES)
        if (left := letters_used(path) - (COMMON | set(LEGENDS[path]) if path in LEGENDS else set(page)))
    }
    assert not missing


def test_a_legend_is_read_as_it_is_written(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Text.\n\nShape legend: B sequences, T = B * L tokens of a\nprobe, Y MoE layers. More.\n"""\n')
    assert legend_of(module) == {"B": "sequences", "T": "tokens of a probe", "Y": "MoE layers"}
    module.write_text("x_TM, y_tK, ROUNDS_AT = 1, 2, 3\nz.counts_Re\n")
    assert letters_used(module) == set("TMtKRe")
