"""What a reader meets: folders that can be taken in, files of one idea, imports in one direction."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "data", "launcher", "model", "routing")
REGISTRIES = {"data/readers", "routing/routers", "routing/balance/balancers"}
"""Folders of variants: one file each, as many as there are."""

MOST_MODULES, MOST_LINES, MOST_ROOMS = 12, 400, 14


def modules() -> list[Path]:
    """The modules of the package, relative to the repository."""
    return [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_folder_has_more_modules_than_can_be_taken_in() -> None:
    found = Counter(path.parent.as_posix() for path in modules() if path.name != "__init__.py")
    assert {folder: count for folder, count in found.items() if count > MOST_MODULES and folder not in REGISTRIES} == {}


def test_launcher_has_few_rooms() -> None:
    rooms = {path.parts[1] for path in modules() if path.parts[0] == "launcher" and len(path.parts) > 2}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)


def test_no_file_is_long() -> None:
    lengths = {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = grimp.build_graph(*(f"moe_testbed.{package}" for package in PACKAGES), cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
