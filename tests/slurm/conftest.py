"""A SLURM cluster for the tests of this folder, and suites that train on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_testbed.data import build
from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.config.suite import Suite, load_suite
from tests.slurm.slurm_cluster import SlurmCluster, missing

MakeSuite = Callable[..., Suite]
MakeCluster = Callable[..., ClusterConfig]


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes, up."""
    if lack := missing():
        (pytest.fail if os.environ.get("MOE_TESTBED_REQUIRE_DAEMONS") else pytest.skip)(lack)
    started = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def slurm(daemons: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster without jobs, as this process and the commands that it starts see it."""
    for name, value in daemons.environment.items():
        monkeypatch.setenv(name, value)
    yield daemons
    daemons.clear()


@pytest.fixture
def make_cluster(tmp_path: Path) -> MakeCluster:
    """A cluster file's content; keyword arguments replace its parts, ``stub=True`` the training by a stub."""

    def make(stub: bool = True, slurm: dict[str, object] | None = None, **parts: object) -> ClusterConfig:
        # Longer than the grace by what a job needs at least, and short enough for tests of its end.
        options: dict[str, object] = {"partition": "main", "time": "0:10:00", "grace_seconds": 60} | (slurm or {})
        if stub:
            options["setup"] = [f"export PATH={_stub_folder(tmp_path)}:$PATH"]
        content: dict[str, object] = {
            "name": "test",
            "nodes": 1,
            "gpus_per_node": 2,
            "accelerator": "cpu",
            "gpu_memory_gb": 1,
            "interconnect": {"within_node_gb_per_s": 1, "between_nodes_gb_per_s": 1},
            "launcher": "slurm",
            "environment": {"GLOO_SOCKET_IFNAME": "lo"},
            "slurm": options,
        }
        return ClusterConfig.model_validate(content | parts)

    return make


@pytest.fixture
def make_stub_suite(experiment: Path, write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> MakeSuite:
    """A suite, in a fresh working directory, of runs that behave as their labels say; see stub_training.py. Keyword
    arguments are labels, with _ for -, of runs that start from others, and the labels of these."""
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: None)

    def make(*labels: str, **starts: str) -> Suite:
        children = {label.replace("_", "-"): f"start.encoder.run: {parent}" for label, parent in starts.items()}
        runs = "\n".join(f"  {label}: {{overrides: {{{children.get(label, '')}}}}}" for label in (*labels, *children))
        encoders = "overrides: {model.architecture: encoder, objective: masked}" if children else ""
        write("stubs.yaml", f"name: stubs\nexperiment: small.yaml\n{encoders}\nruns:\n{runs}\n")
        return load_suite("stubs.yaml")

    return make


def _stub_folder(folder: Path) -> Path:
    """A folder whose python3 runs the stub."""
    python = folder / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    stub = Path(__file__).with_name("stub_training.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stub}" "$@"\n')
    python.chmod(0o755)
    return python.parent
