"""What pyproject.toml says about the folders, and the rules of imports."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NOT_PACKAGED = {"runs", "tests", "benchmarks", "docs", "build"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_code() -> set[str]:
    """Folders with Python files, as packages; folders that are ignored or hidden do not count."""
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return {
        ".".join(("moe_testbed", *path.parent.parts))
        for path in files
        if path.parts[0] not in NOT_PACKAGED
        and not any(part.startswith(".") for part in path.parts)
        and len(path.parts) > 1
    }


def test_every_folder_with_code_is_a_listed_package() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders_with_code())


def test_every_package_has_a_docstring_and_there_is_none_at_the_root() -> None:
    assert not (ROOT / "__init__.py").exists(), "moe_testbed is a namespace package"
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        file = ROOT.joinpath(*name.split(".")[1:], "__init__.py")
        assert file.read_text().startswith('"""'), file


def test_import_rules_hold() -> None:
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_pin_every_dependency_for_every_python() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9-]+==[^;+ ]+(; python_version (<|>=) "3\.11")?', line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["dev"]]
    names = {re.split(r"[\[<>=]", text)[0].lower() for text in wanted} - {"moe-testbed"}
    assert names <= pinned


@pytest.mark.parametrize("folder", ["configs", "data", "launcher", "model", "routing"])
def test_folders_are_not_importable_by_their_bare_names(folder: str, tmp_path: Path) -> None:
    script = f"import importlib.util, moe_testbed.{folder}; print(importlib.util.find_spec({folder!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout
