"""What README and docs name is there: files, modules, commands, targets of the Makefile, headings of links."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The log is history: what it names may have moved since.
PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "findings").glob("*.md"),
    )
    if page.name != "log.md"
)
FOLDERS = r"(?:benchmarks|configs|data|docs|findings|launcher|model|routing|tests)"


def pages() -> list[tuple[str, str]]:
    return [(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")) for page in PAGES]


def slug(heading: str) -> str:
    """Returns the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def names_in(module: Path) -> set[str]:
    """Returns the classes and functions of a module."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@pytest.mark.parametrize("name, text", pages(), ids=[name for name, _ in pages()])
def test_links_lead_somewhere(name: str, text: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), f"{name}: there is no {target}"
        if anchor:
            there = names_in(found) if found.suffix == ".py" else anchors(found)
            assert anchor in there, f"{name}: {target} is not there"


@pytest.mark.parametrize("name, text", pages(), ids=[name for name, _ in pages()])
def test_files_that_are_named_exist(name: str, text: str) -> None:
    for path in re.findall(rf"(?<![\w/.-])({FOLDERS}/[\w/.-]*\w\.(?:py|yaml|md|json|sh|hostfile))\b", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{name}: there is no {path}"


@pytest.mark.parametrize("name, text", pages(), ids=[name for name, _ in pages()])
def test_modules_that_are_named_can_be_imported(name: str, text: str) -> None:
    for path in set(re.findall(r"\bmoe_testbed(?:\.\w+)+", text)):
        if path == "moe_testbed.routers":  # a group of entry points
            continue
        assert resolved(path), f"{name}: there is no {path}"


def resolved(path: str) -> bool:
    """Tells whether a dotted path is a module, or a name in one."""
    parts = path.split(".")
    for length in range(len(parts), 1, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def test_targets_of_the_makefile_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, text in pages():
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{name}: there is no `make {target}`"


def test_commands_that_are_named_exist() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "moe_testbed.launcher", "--help"], capture_output=True, text=True, check=True
    )
    commands = set(re.findall(r"^    (\w+)  ", shown.stdout, re.MULTILINE))
    assert {"train", "report"} <= commands
    for name, text in pages():
        for command in re.findall(r"(?:`|^|\$ )moe-testbed (\w+)", text, re.MULTILINE):
            assert command in commands, f"{name}: there is no `moe-testbed {command}`"


def imports_of(text: str) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of every import of the package, also in scripts that a benchmark starts as a string."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_testbed"):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nfrom moe_testbed" in node.value:
            yield from imports_of(node.value)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_exists(script: Path) -> None:
    for module, name in imports_of(script.read_text(encoding="utf-8")):
        assert resolved(f"{module}.{name}"), f"{script.name}: {module} has no {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("script", sorted((ROOT / "findings").glob("*.sh")), ids=lambda path: path.stem)
def test_a_finding_has_the_stated_form(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111, "the script is not executable"
    for part in ("Seen with", "Input", "Expected", "Seen ", "Status"):
        assert f"\n# {part}" in text, f"the head of {script.name} does not state: {part}"
    assert re.search(r"pip install [^\n]*==\d", text), "no package is pinned"
    assert "moe_testbed" not in text and "moe-testbed" not in text, "a finding uses none of our code"
    assert f"]({script.name})" in (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
