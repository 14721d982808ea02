"""Talks to MLflow's store: the one file that knows MLflow.

The store is MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the working directory with artifacts in mlartifacts/
beside it. Writers to a SQLite store take turns by a lock file, the creation of its tables included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moe_testbed.launcher.run.folder import RunFolder, mlflow_file, mlflow_lock_file
from moe_testbed.launcher.tracking.content import Content, DatasetCard
from moe_testbed.launcher.tracking.state import Ledger, Point, read_ledger, write_ledger

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_STORE = "sqlite:///mlflow.db"
MAX_BATCH_PARAMETERS = 100
QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


def store_uri() -> str:
    """Returns the store's URI, with an absolute path if it is a SQLite file."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    path = _sqlite_path(uri)
    return f"sqlite:///{path}" if path else uri


def ask(uri: str) -> None:
    """Raises whatever MLflow raises if the store does not answer."""
    with _connected(uri) as client:
        client.search_experiments(max_results=1)


@contextlib.contextmanager
def session(folder: Path, uri: str, experiment: str) -> Iterator[Session]:
    """Yields the folder's MLflow run, made if there is none; no other process talks of the folder meanwhile.

    Raises:
        Exception: whatever MLflow raises if the store cannot be reached.
    """
    with FileLock(mlflow_lock_file(folder)), _connected(uri) as client:
        yield Session(client, folder, uri, experiment)


class Session:
    """The store as one folder's process talks to it while it holds the folder's ledger: the run and what it gets."""

    def __init__(self, client: MlflowClient, folder: Path, uri: str, experiment: str) -> None:
        self._client, self._folder = client, folder
        self.ledger = read_ledger(folder, uri)
        if self.ledger.run_id is not None and not _has_run(client, self.ledger.run_id):
            mlflow_file(folder).unlink()
            self.ledger = read_ledger(folder, uri)
        self.run_id: str = self.ledger.run_id or self._open(_experiment_id(client, experiment, uri))

    def keep(self, ledger: Ledger) -> None:
        """Remembers the ledger, in the folder too."""
        if ledger != self.ledger:
            write_ledger(self._folder, ledger)
        self.ledger = ledger

    def reopen(self) -> None:
        """Lets a run that was ended go on."""
        if self.ledger.status is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            self.keep(replace(self.ledger, status=None))

    def settle(self, status: str | None, last: Path) -> None:
        """Ends the run at the time when its last file was written, unless it has been ended so already; None: it goes
        on."""
        if status is None:
            self.reopen()
        elif self.ledger.status != status:
            ended_ms = int(1000 * last.stat().st_mtime) if last.exists() else None
            self._client.set_terminated(self.run_id, status.upper(), ended_ms)
            self.keep(replace(self.ledger, status=status))

    def log_points(self, points: Sequence[Point]) -> None:
        """Sends values over time, and lets a run that was ended go on with them."""
        from mlflow.entities import Metric

        self.reopen()
        metrics = [Metric(*point) for point in points]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def tell(self, content: Content, with_files: bool) -> None:
        """Sends of this what the run does not have yet."""
        self._once("parameters", "", lambda: self._log_parameters(content.parameters))
        self._once("tags", json.dumps(content.tags, sort_keys=True), lambda: self._log_tags(content.tags))
        if (dataset := content.dataset) is not None:
            self._once("dataset", dataset.digest, lambda: self._log_dataset(dataset))
        if with_files:
            if content.results:
                self._once("results", json.dumps(content.results), lambda: self._log_results(content.results))
            for name, file in content.files.items():
                self._log_file(name, file)

    def _open(self, experiment_id: str) -> str:
        """Returns the id of the folder's run. Its key is written before the run is made, so that no run is ever made
        twice."""
        write_ledger(self._folder, self.ledger)
        key = {"moe_testbed.key": self.ledger.key}
        search = f"tags.`moe_testbed.key` = '{self.ledger.key}'"
        found = self._client.search_runs([experiment_id], search, max_results=1)
        tags = {**key, "mlflow.source.type": "LOCAL", "mlflow.source.name": "moe-testbed"}
        run = (
            found[0]
            if found
            else self._client.create_run(experiment_id, self.ledger.started_ms, tags, self._folder.name)
        )
        run_id = str(run.info.run_id)
        self.keep(replace(self.ledger, run_id=run_id))
        return run_id

    def _once(self, name: str, content: str | bytes, send: Callable[[], Any]) -> None:
        """Sends what has changed since it was sent last; a failure leaves it for the next time."""
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
        if self.ledger.sent.get(name) != digest:
            send()
            self.keep(replace(self.ledger, sent={**self.ledger.sent, name: digest}))

    def _log_parameters(self, parameters: dict[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(entities), MAX_BATCH_PARAMETERS):
            batch = entities[start : start + MAX_BATCH_PARAMETERS]
            self._client.log_batch(self.run_id, params=batch, synchronous=True)

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        self._client.log_batch(self.run_id, tags=entities, synchronous=True)

    def _log_results(self, results: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), max(self.ledger.steps.values(), default=0)
        metrics = [Metric(key, value, now, step) for key, value in results.items()]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def _log_dataset(self, card: DatasetCard) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=card.name,
            digest=card.digest,
            source_type="moe-testbed mix",
            source=json.dumps({"manifest": f"{RunFolder(self._folder).manifest_file.name}, an artifact of this run"}),
            profile=json.dumps({"training tokens": card.tokens}),
        )
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [context])])

    def _log_file(self, name: str, file: Path | str) -> None:
        folder = str(Path(name).parent) if "/" in name else None
        if isinstance(file, str):
            self._once(f"file {name}", file, lambda: self._client.log_text(self.run_id, file, name))
        else:
            content = file.read_bytes()
            self._once(f"file {name}", content, lambda: self._client.log_artifact(self.run_id, str(file), folder))


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri[len("sqlite:///") :]).absolute() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[MlflowClient]:
    """Yields a client of the store, alone with it if it is SQLite, which takes one writer and must be created only
    once."""
    path = _sqlite_path(uri)
    if path is None:
        yield _client(uri)
        return
    _quietly_import()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        yield _client(uri)


def _quietly_import() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    assert mlflow.tracking


@lru_cache(maxsize=4)
def _client(uri: str) -> MlflowClient:
    _quietly_import()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = _sqlite_path(uri)
        location = (path.parent / "mlartifacts").as_uri() if path else None
        try:
            return str(client.create_experiment(name, location))
        except MlflowException:  # another process made it first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _has_run(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
