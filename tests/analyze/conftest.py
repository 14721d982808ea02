"""Checkpoints and runs that the tests of this folder share; everything is made here, nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.analyze import models
from tests.distributed import corpus
from tests.processes.python import run_python

Analyze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def analyze() -> Analyze:
    """``analyze(*arguments)``: runs the command in a process of its own, without a network."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = ["-m", "moe_testbed.launcher", "analyze", "--device", "cpu", *map(str, arguments)]
        return run_python(*command, environment=os.environ | {"HF_HUB_OFFLINE": "1"})

    return run


@pytest.fixture(scope="session")
def alphabets_mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix for evaluation only, whose domains have alphabets of their own."""
    folder = tmp_path_factory.mktemp("alphabets")
    domains = {}
    for name, documents in models.make_documents(per_domain=6, characters=60).items():
        (folder / name).mkdir()
        for number, document in enumerate(documents):
            (folder / name / f"{number}.txt").write_text(document.text, encoding="utf-8")
        domains[name] = {"licence": "ours", "sources": [{"kind": "files", "glob": f"{folder / name}/*.txt"}]}
    mix = folder / "alphabets.yaml"
    mix.write_text(yaml.safe_dump({"name": "alphabets", "evaluation_only": True, "domains": domains}, sort_keys=False))
    return mix


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral in the hub's format."""
    return models.save(models.make_model("mixtral"), tmp_path_factory.mktemp("models") / "mixtral")


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``data`` part of our runs' config, its token store built."""
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def own_mix(own_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mix of our runs as a file."""
    path = tmp_path_factory.mktemp("mix") / "tiny.yaml"
    path.write_text(yaml.safe_dump(own_data["mix"], sort_keys=False))
    return path


@pytest.fixture(scope="session")
def train_run(own_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``train_run(name, num_ranks=1, **parts)``: the folder of a trained run."""

    def train(name: str, num_ranks: int = 1, **parts: Any) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        config = corpus.make_experiment(own_data, name=name, **{"ablation": {"sequences_per_domain": 1}, **parts})
        (folder / "experiment.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        module = ["-m", "moe_testbed.launcher", "train", str(folder / "experiment.yaml")]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        run_python(*(launch if num_ranks > 1 else []), *module, "--run-dir", str(folder / name)).check_returncode()
        return folder / name

    return train
