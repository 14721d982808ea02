"""MLflow as a mirror of run folders. The folder is the truth: what a store missed is read from it and sent later.

Nothing here may stop or slow training: MLflow is imported and talked to by another thread, a store that cannot be
reached is told once on stderr and tried again at the next push, the end of a training waits for it no longer than
`FINISH_SECONDS`, and what was sent is remembered in the folder's mlflow.json, so that a run continued by another
process continues its own MLflow run and nothing is sent twice.

The store is MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the working directory with artifacts in mlartifacts/
beside it. Writers to a SQLite store take turns by a lock file, the creation of its tables included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moe_testbed.launcher.background import Background
from moe_testbed.launcher.files import read_json
from moe_testbed.launcher.ledger import (
    LEDGER_NAME,
    MAX_KEYS_OF_A_KIND,
    Ledger,
    new_points,
    read_ledger,
    write_ledger,
)
from moe_testbed.launcher.tracking_content import PARENT, Content, DatasetCard, run_content, suite_content

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_STORE = "sqlite:///mlflow.db"
FINISH_SECONDS = 60.0
"""How long the end of a training waits for the store at most; the end of a suite so long for each of its runs."""
MAX_BATCH_PARAMETERS = 100
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
    of the suite's MLflow run, if the folder is one of a suite's. interval: seconds between two pushes of the
    background thread. background: of the suite, whose failures are told together.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: str,
        parent: str | None = None,
        interval: float = 20.0,
        background: Background | None = None,
    ) -> None:
        self._run_dir, self._experiment, self._parent, self._interval = Path(run_dir), experiment, parent, interval
        self._uri = _tracking_uri()
        self._background = background or _background(self._run_dir)
        self._read_file: int | None = None

    def start(self) -> None:
        """Push from a background thread from now on; the first time after one interval."""
        self._background.start(self.push, self._interval)

    def push(self) -> bool:
        """Send the new lines of metrics.jsonl. False if the store cannot be reached; they are sent by a later push."""
        return not self._has_news() or self._background.attempt(self._send)

    def finish(self, status: str = "finished") -> bool:
        """Send what remains, artifacts included, and end the MLflow run; False if the store does not take it in time.

        status: finished, failed or killed. May be called again, by another process too: it then sends what is new.
        """
        return self._background.end(lambda: self.settle(status), FINISH_SECONDS)

    def settle(self, status: str) -> bool:
        """`finish` without a bound on the time."""
        return self._background.attempt(lambda: self._send(status))

    def _has_news(self) -> bool:
        path = self._run_dir / "metrics.jsonl"
        return not path.exists() or path.stat().st_size != read_ledger(self._run_dir, self._uri).offset

    def _send(self, status: str | None = None) -> None:
        with _session(self._run_dir, self._uri, self._experiment) as session:
            before = session.ledger.left_out
            self._send_metrics(session)
            if session.ledger.left_out and not before:
                names = ", ".join(session.ledger.left_out)
                print(
                    f"{self._run_dir}: MLflow gets the first {MAX_KEYS_OF_A_KIND} metrics of a kind; the others are in "
                    f"metrics.jsonl only, among them {names}",
                    file=sys.stderr,
                )
            if status is not None or "tags" not in session.ledger.sent:
                tags = {PARENT: self._parent or "", "metrics_left_out": ", ".join(session.ledger.left_out)}
                content = run_content(self._run_dir, self._run_dir.parent if self._parent else None, tags)
                session.tell(content, with_files=status is not None)
            if status is not None:
                session.end(status, self._run_dir / "status.json")

    def _send_metrics(self, session: _Session) -> None:
        from mlflow.entities import Metric

        path = self._run_dir / "metrics.jsonl"
        file = path.stat().st_ino if path.exists() else None
        # A training that goes back to a checkpoint replaces the file by a shorter one and writes on.
        offset = session.ledger.offset if file == self._read_file else 0
        for points, ledger in new_points(path, replace(session.ledger, offset=offset)):
            if points:
                session.reopen()
                metrics = [Metric(*point) for point in points]
                session.client.log_batch(session.run_id, metrics=metrics, synchronous=True)
            session.keep(replace(ledger, status=session.ledger.status))
        self._read_file = file


class SuiteMirror:
    """Mirrors a suite folder: a parent run for the suite, and its run folders as children, from a single process.

    Mirroring from here instead of from every training imports MLflow once for the whole suite.
    """

    def __init__(self, suite_dir: Path, experiment: str, interval: float = 20.0) -> None:
        self._suite_dir, self._experiment, self._interval = Path(suite_dir), experiment, interval
        self._uri = _tracking_uri()
        self._background = _background(self._suite_dir)
        self._children: dict[tuple[Path, str], Mirror] = {}
        self._settled: set[Path] = set()

    def start(self) -> None:
        """Push the suite and its runs from a background thread from now on; the first time after one interval."""
        self._background.start(self.push, self._interval)

    def parent(self) -> str | None:
        """The id of the suite's MLflow run, made if it is not there yet; None while the store cannot be reached."""
        ledger = read_ledger(self._suite_dir, self._uri)
        if (ledger.run_id is None or ledger.status is not None) and not self._background.attempt(self._open):
            return None
        return read_ledger(self._suite_dir, self._uri).run_id

    def push(self) -> bool:
        """Send what is new in every run folder, and end the runs that have ended. False if the store is away."""
        parent = self.parent()
        return parent is not None and all(self._push(folder, parent) for folder in self._folders())

    def finish(self, status: str = "finished") -> bool:
        """End the children by their status.json, send the suite's results and report, and end the parent run."""
        return self._background.end(lambda: self._finish(status), FINISH_SECONDS * (1 + len(self._folders())))

    def _open(self) -> None:
        with _session(self._suite_dir, self._uri, self._experiment) as session:
            session.reopen()
            session.tell(suite_content(self._suite_dir), with_files=False)

    def _push(self, folder: Path, parent: str) -> bool:
        child, state = self._child(folder, parent), _state(folder)
        if state is None:
            self._settled.discard(folder)
            return child.push()
        if folder not in self._settled and child.settle(state):
            self._settled.add(folder)
        return folder in self._settled

    def _finish(self, status: str) -> bool:
        parent = self.parent()
        if parent is None:
            return False
        # Once more, the settled ones too: the report has something to say of each.
        settled = all(self._child(folder, parent).settle(_state(folder) or "killed") for folder in self._folders())
        return settled and self._background.attempt(lambda: self._end(status))

    def _end(self, status: str) -> None:
        with _session(self._suite_dir, self._uri, self._experiment) as session:
            session.tell(suite_content(self._suite_dir), with_files=True)
            session.end(status, self._suite_dir / "results.json")

    def _folders(self) -> list[Path]:
        """Of the runs that have begun; the others have a config and no status yet."""
        return sorted(path.parent for path in self._suite_dir.glob("*/status.json"))

    def _child(self, folder: Path, parent: str) -> Mirror:
        if (folder, parent) not in self._children:
            self._children[folder, parent] = Mirror(folder, self._experiment, parent, background=self._background)
        return self._children[folder, parent]


def _state(folder: Path) -> str | None:
    """finished or failed; None for a run that goes on."""
    state = read_json(folder / "status.json").get("state")
    return state if state in ("finished", "failed") else None


def _background(folder: Path) -> Background:
    return Background(
        f"MLflow store not reached; training goes on, what the store misses is in {folder} and sent later"
    )


class _Session:
    """The store as one folder's process talks to it while it holds the folder's ledger: the run and what it gets."""

    def __init__(self, client: MlflowClient, folder: Path, uri: str, experiment: str) -> None:
        self.client, self._folder = client, folder
        self.ledger = read_ledger(folder, uri)
        if self.ledger.run_id is not None and not _has_run(client, self.ledger.run_id):
            (folder / LEDGER_NAME).unlink()
            self.ledger = read_ledger(folder, uri)
        self.run_id: str = self.ledger.run_id or self._open(_experiment_id(client, experiment, uri))

    def keep(self, ledger: Ledger) -> None:
        """Remember the ledger, in the folder too."""
        if ledger != self.ledger:
            write_ledger(self._folder, ledger)
        self.ledger = ledger

    def reopen(self) -> None:
        """Let a run that was ended go on."""
        if self.ledger.status is not None:
            self.client.update_run(self.run_id, status="RUNNING")
            self.keep(replace(self.ledger, status=None))

    def end(self, status: str, last: Path) -> None:
        """End the run, if it has not been ended so already, at the time when its last file was written."""
        if self.ledger.status != status:
            ended_ms = int(1000 * last.stat().st_mtime) if last.exists() else None
            self.client.set_terminated(self.run_id, status.upper(), ended_ms)
            self.keep(replace(self.ledger, status=status))

    def tell(self, content: Content, with_files: bool) -> None:
        """Send of this what the run does not have yet."""
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
        """The id of the folder's run. Its key is written before the run is made, so that no run is ever made twice."""
        write_ledger(self._folder, self.ledger)
        key = {"moe_testbed.key": self.ledger.key}
        found = self.client.search_runs([experiment_id], f"tags.`moe_testbed.key` = '{self.ledger.key}'", max_results=1)
        tags = {**key, "mlflow.source.type": "LOCAL", "mlflow.source.name": "moe-testbed"}
        run = (
            found[0]
            if found
            else self.client.create_run(experiment_id, self.ledger.started_ms, tags, self._folder.name)
        )
        run_id = str(run.info.run_id)
        self.keep(replace(self.ledger, run_id=run_id))
        return run_id

    def _once(self, name: str, content: str | bytes, send: Callable[[], Any]) -> None:
        """Send what has changed since it was sent last; a failure leaves it for the next time."""
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
        if self.ledger.sent.get(name) != digest:
            send()
            self.keep(replace(self.ledger, sent={**self.ledger.sent, name: digest}))

    def _log_parameters(self, parameters: dict[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(entities), MAX_BATCH_PARAMETERS):
            batch = entities[start : start + MAX_BATCH_PARAMETERS]
            self.client.log_batch(self.run_id, params=batch, synchronous=True)

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        self.client.log_batch(self.run_id, tags=entities, synchronous=True)

    def _log_results(self, results: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), max(self.ledger.steps.values(), default=0)
        metrics = [Metric(key, value, now, step) for key, value in results.items()]
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def _log_dataset(self, card: DatasetCard) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=card.name,
            digest=card.digest,
            source_type="moe-testbed mix",
            source=json.dumps({"manifest": "manifest.json, an artifact of this run"}),
            profile=json.dumps({"training tokens": card.tokens}),
        )
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [context])])

    def _log_file(self, name: str, file: Path | str) -> None:
        folder = str(Path(name).parent) if "/" in name else None
        if isinstance(file, str):
            self._once(f"file {name}", file, lambda: self.client.log_text(self.run_id, file, name))
        else:
            content = file.read_bytes()
            self._once(f"file {name}", content, lambda: self.client.log_artifact(self.run_id, str(file), folder))


@contextlib.contextmanager
def _session(folder: Path, uri: str, experiment: str) -> Iterator[_Session]:
    with FileLock(folder / ".mlflow.lock"), _connected(uri) as client:
        yield _Session(client, folder, uri, experiment)


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
