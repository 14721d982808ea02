"""docs/run_folder.md lists the files that launcher/run/folder.py knows and the arrays in them, and no others."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from moe_testbed.launcher.run.arrays import Ablation, Evaluation, RoutingProbe
from moe_testbed.launcher.run.folder import RunFolder, mlflow_file, mlflow_lock_file
from moe_testbed.launcher.run.suite_folder import SuiteFolder

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")


def first_table_below(line: str) -> list[str]:
    """Returns the names in the first column of the first table below the line that begins so."""
    lines = TEXT.partition(f"\n{line}")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    names = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        names += re.findall(r"`([^`]+)`", line.split("|")[1])
    return names


def known_names(folder: RunFolder | SuiteFolder) -> set[str]:
    """Returns the names that the module of a folder knows in it, without what lies deeper."""
    paths = [value for value in vars(folder).values() if isinstance(value, Path) and value != folder.path]
    return {path.relative_to(folder.path).parts[0] for path in paths} | {
        mlflow_file(folder.path).name,
        mlflow_lock_file(folder.path).name,
    }


def test_the_page_lists_the_files_of_a_run_and_no_others() -> None:
    names = first_table_below("## A run") + first_table_below("Others add files of their own:")
    assert len(names) == len(set(names))
    assert {name.rstrip("/") for name in names} == known_names(RunFolder(Path("run")))


def test_the_page_lists_the_files_of_a_suite_and_no_others() -> None:
    names = {name.rstrip("/") for name in first_table_below("## A suite")}
    assert names == known_names(SuiteFolder(Path("suite"))) | {"LABEL-seedN"}


@pytest.mark.parametrize(
    "file, record", [("evaluations", Evaluation), ("statistics", RoutingProbe), ("analysis.npz", Ablation)]
)
def test_the_page_lists_the_arrays_of_a_file_and_no_others(file: str, record: type) -> None:
    names = first_table_below(f"`{file}")
    assert len(names) == len(set(names))
    assert set(names) == {field.name for field in fields(record)}
