"""A server for the tests of this folder, and the ranks and data of the distributed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.conftest import data, make_experiment, run_on_ranks, run_until_killed
from tests.tracking.server import TrackingServer

__all__ = ["data", "make_experiment", "run_on_ranks", "run_until_killed"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """One that runs through all the tests."""
    pytest.importorskip("mlflow")
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def served(server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's own client of the server, which is the store of every mirror in the test."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return MlflowClient(server.uri)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all the tests: its first use migrates the database."""
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's own client of the SQLite store, which is the store of every mirror in the test."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return MlflowClient(store)
