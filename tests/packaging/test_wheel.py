"""A wheel, installed into a fresh virtual environment, works from another folder and without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["configs", "data", "launcher", "model", "routing"]
FILES = ["pyproject.toml", "LICENSE", "README.md"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")], folder)
    (found,) = folder.glob("*.whl")
    shutil.rmtree(folder / "source")
    return found


@pytest.fixture(scope="module")
def fresh_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a virtual environment with the wheel; what it depends on is borrowed from this environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--ignore-installed"]
    run([sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", *options, str(wheel)], folder)
    # A plain line puts a folder on the path; the .pth files inside it, an editable install among them, are not read.
    (purelib / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin"


def run(command: list[str], folder: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_all_sources_and_data_and_nothing_else(wheel: Path) -> None:
    patterns = {"configs": ["*.py", "*.yaml", "*.hostfile"], "launcher": ["*.py", "*.html", "*.css", "*.js"]}
    expected = {
        f"moe_testbed/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for pattern in patterns.get(folder, ["*.py"])
        for path in (ROOT / folder).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = next(name for name in names if name.endswith("licenses/LICENSE"))
        assert "Apache License" in archive.read(licence).decode()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_console_script_shows_an_embedded_experiment(fresh_bin: Path, tmp_path: Path) -> None:
    text = run([str(fresh_bin / "moe-testbed"), "config", "show", "configs/experiments/tiny.yaml", "seed=5"], tmp_path)
    assert "seed: 5" in text and "# command line" in text
    assert "# configs/models/tiny.yaml:" in text


def test_the_module_runs_and_is_the_installed_one(fresh_bin: Path, tmp_path: Path) -> None:
    assert run([str(fresh_bin / "python"), "-m", "moe_testbed.launcher", "--help"], tmp_path).startswith(
        "usage: moe-testbed"
    )
    script = (
        "import moe_testbed.launcher.config.suite as suite; suite.load_suite('suites/demo.yaml'); print(suite.__file__)"
    )
    assert Path(run([str(fresh_bin / "python"), "-c", script], tmp_path).strip()).is_relative_to(fresh_bin.parent)
