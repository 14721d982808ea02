"""Runs of all architectures that the tests of this folder share, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.export.export import export
from tests.distributed import corpus
from tests.processes.python import run_python

pytest.importorskip("transformers")

TrainRun = Callable[[Mapping[str, Any]], Path]


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``data`` part of a config, its token store built."""
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def train_run(own_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """``train_run(parts)``: the folder of a trained run; the same one for the same parts."""
    made: dict[str, Path] = {}

    def train(parts: Mapping[str, Any]) -> Path:
        if (key := repr(parts)) not in made:
            folder = tmp_path_factory.mktemp("runs")
            config = corpus.make_experiment(own_data, **parts)
            (folder / "experiment.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            command = ["-m", "moe_testbed.launcher", "train", str(folder / "experiment.yaml")]
            run_python(*command, "--run-dir", str(folder / "run")).check_returncode()
            made[key] = folder / "run"
        return made[key]

    return train


@pytest.fixture
def exported(train_run: TrainRun, tmp_path: Path) -> Callable[[Mapping[str, Any]], tuple[Path, str]]:
    """``exported(parts)``: the folder of the export of a run, and the name of its class."""

    def write(parts: Mapping[str, Any]) -> tuple[Path, str]:
        out = tmp_path / "exported"
        return out, export(train_run(parts), out, None, print)

    return write
