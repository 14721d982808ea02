"""MLflow as a mirror of run folders. The folder is the truth: what a store missed is read from it and sent later.

Nothing here may stop or slow training: MLflow is imported by the thread that needs it, a store that cannot be reached
is told once on stderr and tried again at the next push, and what was sent is remembered in the folder's mlflow.json,
so that a run continued by another process continues its own MLflow run and nothing is sent twice.

The store is MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the working directory with artifacts in mlartifacts/
beside it. Writers to a SQLite store take turns by a lock file, the creation of its tables included.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml
from filelock import FileLock

from moe_testbed.launcher.files import read_json
from moe_testbed.launcher.ledger import LEDGER_NAME, Ledger, flatten, new_points, read_ledger, write_ledger

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_STORE = "sqlite:///mlflow.db"
MAX_BATCH_PARAMETERS = 100
RUN_ARTIFACTS = ("config.yaml", "manifest.json", "summary.json", "status.json")
SUITE_ARTIFACTS = ("suite.yaml", "report.html", "results.json", "results.csv")
QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Mirror:
    """Mirrors one training's run folder; used by rank 0 only.

    run_dir: holds config.yaml and the growing metrics.jsonl. experiment: name of the MLflow experiment. parent: id
    of the suite's MLflow run. interval: seconds between two pushes of the background thread.
    """

    def __init__(self, run_dir: Path, experiment: str, parent: str | None = None, interval: float = 20.0) -> None:
        self._run_dir, self._experiment, self._parent = Path(run_dir), experiment, parent
        self._thread = _Periodic(self.push, interval)
        self._store = _Store(self._run_dir)
        self._read_from_start = True

    def start(self) -> None:
        """Push from a background thread from now on; the first time after one interval."""
        self._thread.start()

    def push(self) -> bool:
        """Send the new lines of metrics.jsonl. False if the store cannot be reached; they are sent by a later push."""
        return self._store.exchange(self._send_metrics) if self._has_news() else True

    def finish(self, status: str = "finished") -> bool:
        """Send the remaining lines and the artifacts and end the MLflow run; False if the store cannot be reached.

        status: finished, failed or killed. May be called again, by another process too: it then sends what is new.
        """
        self._thread.stop()
        ended = self._store.ledger()
        if ended.status == status and ended.parent == self._parent and not self._has_news():
            return True

        def end(client: MlflowClient, ledger: Ledger) -> Ledger:
            ledger = self._send_metrics(client, ledger)
            assert ledger.run_id is not None
            with tempfile.TemporaryDirectory() as scratch:
                _send_artifacts(client, ledger.run_id, self._run_dir, RUN_ARTIFACTS)
                _send_evaluation(client, ledger.run_id, self._run_dir, Path(scratch))
            client.set_terminated(ledger.run_id, status.upper())
            return replace(ledger, status=status)

        return self._store.exchange(end)

    def _has_news(self) -> bool:
        path = self._run_dir / "metrics.jsonl"
        return not path.exists() or path.stat().st_size != self._store.ledger().offset

    def _send_metrics(self, client: MlflowClient, ledger: Ledger) -> Ledger:
        from mlflow.entities import Metric

        ledger = self._ensure_run(client, ledger)
        if self._read_from_start:  # a training that was continued may have cut the file and written on
            ledger, self._read_from_start = replace(ledger, offset=0), False
        for points, sent in new_points(self._run_dir / "metrics.jsonl", ledger):
            if points:
                client.log_batch(sent.run_id, metrics=[Metric(*point) for point in points], synchronous=True)
            ledger = sent
            write_ledger(self._run_dir, ledger)
        return ledger

    def _ensure_run(self, client: MlflowClient, ledger: Ledger) -> Ledger:
        ledger = self._store.ensure_run(client, ledger, self._experiment, self._run_dir.name)
        assert ledger.run_id is not None
        if not ledger.described:
            _send_parameters(client, ledger.run_id, self._run_dir / "config.yaml")
            ledger = replace(ledger, described=True)
        if self._parent and ledger.parent != self._parent:
            client.set_tag(ledger.run_id, "mlflow.parentRunId", self._parent)
            ledger = replace(ledger, parent=self._parent)
        if ledger.status is not None:
            client.update_run(ledger.run_id, status="RUNNING")
            ledger = replace(ledger, status=None)
        write_ledger(self._run_dir, ledger)
        return ledger


class SuiteMirror:
    """Mirrors a suite folder: a parent run for the suite, and its run folders as children, from a single process.

    Mirroring from here instead of from every training imports MLflow once for the whole suite.
    """

    def __init__(self, suite_dir: Path, experiment: str, interval: float = 20.0) -> None:
        self._suite_dir, self._experiment = Path(suite_dir), experiment
        self._thread = _Periodic(self.push, interval)
        self._store = _Store(self._suite_dir)
        self._children: dict[Path, Mirror] = {}

    def start(self) -> None:
        """Push the suite and its runs from a background thread from now on; the first time after one interval."""
        self._thread.start()

    def parent(self) -> str | None:
        """The id of the suite's MLflow run, made if it is not there yet; None while the store cannot be reached."""

        def ensure(client: MlflowClient, ledger: Ledger) -> Ledger:
            return self._store.ensure_run(client, ledger, self._experiment, self._suite_dir.name)

        ledger = self._store.ledger()
        if ledger.run_id is None and self._store.exchange(ensure):
            ledger = self._store.ledger()
        return ledger.run_id

    def push(self) -> bool:
        """Send what is new in every run folder. False if the store cannot be reached."""
        parent = self.parent()
        return parent is not None and all(self._child(folder, parent).push() for folder in self._folders())

    def finish(self, status: str = "finished") -> bool:
        """End the children by their status.json, send the suite's results and report, and end the parent run."""
        self._thread.stop()
        parent = self.parent()
        if parent is None:
            return False
        for folder in self._folders():
            state = read_json(folder / "status.json").get("state")
            if not self._child(folder, parent).finish(state if state in ("finished", "failed") else "killed"):
                return False

        def end(client: MlflowClient, ledger: Ledger) -> Ledger:
            ledger = self._store.ensure_run(client, ledger, self._experiment, self._suite_dir.name)
            assert ledger.run_id is not None
            _send_artifacts(client, ledger.run_id, self._suite_dir, SUITE_ARTIFACTS)
            client.set_terminated(ledger.run_id, status.upper())
            return replace(ledger, status=status)

        return self._store.exchange(end)

    def _folders(self) -> list[Path]:
        """Of the runs that have begun; the others have a config and no status yet."""
        return sorted(path.parent for path in self._suite_dir.glob("*/status.json"))

    def _child(self, folder: Path, parent: str) -> Mirror:
        return self._children.setdefault(folder, Mirror(folder, self._experiment, parent))


class _Exchange(Protocol):
    def __call__(self, client: MlflowClient, ledger: Ledger) -> Ledger: ...


class _Store:
    """The tracking store as seen from one folder, with the folder's ledger of what was sent to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uri = _tracking_uri()
        self._told = False

    def ledger(self) -> Ledger:
        return read_ledger(self._folder, self._uri)

    def exchange(self, send: _Exchange) -> bool:
        """Run `send` with the client and the ledger, and write the ledger that it returns. False if that failed."""
        try:
            with FileLock(self._folder / ".mlflow.lock"), _connected(self._uri) as client:
                ledger = self.ledger()
                if ledger.run_id is not None and not _has_run(client, ledger.run_id):
                    (self._folder / LEDGER_NAME).unlink()
                    ledger = self.ledger()
                write_ledger(self._folder, send(client, ledger))
        except Exception as error:  # whatever a store's driver raises, training goes on
            if not self._told:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                print(f"MLflow store not reached, will try again: {reason}", file=sys.stderr)
            self._told = True
            return False
        self._told = False
        return True

    def ensure_run(self, client: MlflowClient, ledger: Ledger, experiment: str, name: str) -> Ledger:
        """The ledger with a run id. The key is written before the run is made, so that no run is ever made twice."""
        if ledger.run_id is not None:
            return ledger
        write_ledger(self._folder, ledger)
        experiment_id = _experiment_id(client, experiment, self._uri)
        found = client.search_runs([experiment_id], f"tags.`moe_testbed.key` = '{ledger.key}'", max_results=1)
        run = (
            found[0]
            if found
            else client.create_run(
                experiment_id, ledger.started_ms, {"moe_testbed.key": ledger.key, "mlflow.source.type": "LOCAL"}, name
            )
        )
        ledger = replace(ledger, run_id=run.info.run_id)
        write_ledger(self._folder, ledger)
        return ledger


class _Periodic:
    """Calls a function every `interval` seconds in a daemon thread until stopped."""

    def __init__(self, call: Callable[[], object], interval: float) -> None:
        self._call, self._interval = call, interval
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._call()


def _tracking_uri() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    path = _sqlite_path(uri)
    return f"sqlite:///{path}" if path else uri


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri[len("sqlite:///") :]).absolute() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[MlflowClient]:
    """A client of the store; alone with it if it is SQLite, which takes one writer and must be created only once."""
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


def _send_parameters(client: MlflowClient, run_id: str, path: Path) -> None:
    from mlflow.entities import Param

    config = yaml.safe_load(path.read_text()) if path.exists() else {}
    parameters = [Param(key, value) for key, value in flatten(config).items()]
    for start in range(0, len(parameters), MAX_BATCH_PARAMETERS):
        client.log_batch(run_id, params=parameters[start : start + MAX_BATCH_PARAMETERS], synchronous=True)


def _send_artifacts(client: MlflowClient, run_id: str, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    if (folder / "figures").is_dir():
        client.log_artifacts(run_id, str(folder / "figures"), "figures")


def _send_evaluation(client: MlflowClient, run_id: str, run_dir: Path, scratch: Path) -> None:
    """The last evaluation as it is, and its domain x expert counts as one CSV line per layer, domain and expert."""
    import numpy as np

    evaluations = sorted((run_dir / "evaluations").glob("step_*.npz"))
    if not evaluations:
        return
    client.log_artifact(run_id, str(evaluations[-1]), "evaluations")
    with np.load(evaluations[-1]) as arrays:
        domains = [str(domain) for domain in arrays["domains"]]
        tables = {name: arrays[name] for name in arrays.files if name.endswith("_YDE")}
    for name, counts_YDE in tables.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("moe_layer", "domain", "expert", "assignments"))
        for (layer, domain, expert), count in np.ndenumerate(counts_YDE):
            writer.writerow((layer, domains[domain], expert, int(count)))
        (scratch / f"{name.removesuffix('_YDE')}.csv").write_text(text.getvalue())
    client.log_artifacts(run_id, str(scratch), "matrices")
