"""Talks to MLflow's store: the one file that knows MLflow.

Artifacts of a SQLite store go into mlartifacts/ beside it. Writers to a store on disk take turns by a lock file, the
creation of its tables included.

What a store refuses (a deleted run, a value, a file) is another matter than a store that is away: it is told as
refused, and what can be sent without it is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moe_testbed.launcher.run.folder import RunFolder, mlflow_file, mlflow_lock_file
from moe_testbed.launcher.tracking.answers import is_about_content, is_servers_fault, refusals_of
from moe_testbed.launcher.tracking.content import Content, DatasetCard
from moe_testbed.launcher.tracking.names import key_of, plain_key
from moe_testbed.launcher.tracking.parts import Item, send_in_parts, send_texts
from moe_testbed.launcher.tracking.refusal import Refused, deleted_experiment, deleted_run, in_short
from moe_testbed.launcher.tracking.state import Ledger, Point, read_ledger, write_ledger
from moe_testbed.launcher.tracking.uri import keeps_files, path_of

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

MAX_BATCH_PARAMETERS = 100
KEY = "moe_testbed.key"
DELETED = "deleted"
QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


def ask(uri: str) -> None:
    """Raises a `Refused`, or whatever MLflow raises if the store does not answer."""
    with refusals_of(uri), _connected(uri) as client:
        client.search_experiments(max_results=1)


@dataclass(frozen=True)
class NewRun:
    """Says where a folder's MLflow run is made if there is none.

    experiment: name of the MLflow experiment. beside: id of a run; the new one is made in that one's experiment, which
    may have been renamed. replace: also if the folder's run was deleted.
    """

    experiment: str
    beside: str | None = None
    replace: bool = False


@contextlib.contextmanager
def session(folder: Path, uri: str, new: NewRun) -> Iterator[Session]:
    """Yields the folder's MLflow run, made if there is none; no other process talks of the folder meanwhile.

    Raises:
        Refused: the run or its experiment was deleted, or the store gave another reason.
        Exception: whatever MLflow raises if the store cannot be reached.
    """
    with FileLock(mlflow_lock_file(folder)), refusals_of(uri), _connected(uri) as client:
        yield Session(client, folder, uri, new)


class Session:
    """The store as one folder's process talks to it while it holds the folder's ledger: the run and what it gets."""

    def __init__(self, client: MlflowClient, folder: Path, uri: str, new: NewRun) -> None:
        self._client, self._folder, self._uri = client, folder, uri
        self.ledger = read_ledger(folder, uri)
        run = self._known() or self._found(new)
        if run is not None and new.replace and self._deletion(run):
            found = self._found(new)
            run = self._create(new, run.info.run_id) if found is None or self._deletion(found) else found
        elif run is None:
            run = self._create(new)
        self.run_id = str(run.info.run_id)
        self.slashes = 1 if keeps_files(uri, run.info.experiment_id) else None
        """How many a metric's key may have, see `key_of`."""
        if self.run_id != self.ledger.run_id:
            self.keep(Ledger(self.ledger.store, self.ledger.key, self.ledger.started_ms, self.run_id))
        self._check(run)

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
        """Sends values over time, and lets a run that was ended go on with them. A key that the store refuses gets a
        plainer one from then on; one whose plainer one is refused too is left out from then on."""
        from mlflow.entities import Metric

        self.reopen()

        def send(keys: Sequence[str]) -> None:
            chosen, plainer = set(keys), self.ledger.plainer
            metrics = [Metric(plainer.get(point.key, point.key), *point[1:]) for point in points if point.key in chosen]
            self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)

        keys = [key for key in dict.fromkeys(point.key for point in points) if _metric(key) not in self.ledger.refused]
        if refused := [key for key, _ in send_in_parts(keys, send, self._refuses)]:
            before = self.ledger.plainer
            self.keep(replace(self.ledger, plainer=before | {key: plain_key(key) for key in refused}))
            for key, error in send_in_parts(refused, send, self._refuses):
                self._note(_metric(key), error)
            taken = {
                key: plain for key, plain in self.ledger.plainer.items() if _metric(key) not in self.ledger.refused
            }
            self.keep(replace(self.ledger, plainer=taken))

    def tell(self, content: Content, results: bool) -> None:
        """Sends of this what the run does not have yet, once more what was refused before; files are sent apart."""
        metrics = {what: reason for what, reason in self.ledger.refused.items() if what.startswith(_metric(""))}
        self.keep(replace(self.ledger, refused=metrics))
        self._once("parameters", "", lambda: self._log_parameters(content.parameters))
        self._once("tags", json.dumps(content.tags, sort_keys=True), lambda: self._log_tags(content.tags))
        if (dataset := content.dataset) is not None:
            self._once("dataset", dataset.digest, lambda: self._log_dataset(dataset))
        if results and content.results:
            self._once("results", json.dumps(content.results), lambda: self._log_results(content.results))

    def send_files(self, files: Mapping[str, Path | str]) -> None:
        """Sends the artifacts that the run does not have yet."""
        for name, file in files.items():
            self._log_file(name, file)

    def _known(self) -> Run | None:
        """Returns the run whose id the folder knows, deleted or not; None if there is none in this store, such as one
        that was made anew. A store that was moved has the run under the same id."""
        if self.ledger.run_id is not None:
            run = _run(self._client, self.ledger.run_id)
            if run is None:
                mlflow_file(self._folder).unlink()
                self.ledger = read_ledger(self._folder, self._uri)
            return run
        moved = _run(self._client, self.ledger.elsewhere) if self.ledger.elsewhere is not None else None
        return moved if moved is not None and moved.data.tags.get(KEY) == self.ledger.key else None

    def _found(self, new: NewRun) -> Run | None:
        """Returns the run that has the folder's key, such as one whose id was never written down; rather one that is
        not deleted."""
        from mlflow.entities import ViewType

        experiment = self._experiment(new)
        if experiment is None:
            return None
        search = f"tags.`{KEY}` = '{self.ledger.key}'"
        found = self._client.search_runs([experiment.experiment_id], search, run_view_type=ViewType.ALL)
        return min(found, key=_is_deleted, default=None)

    def _create(self, new: NewRun, replaced: str | None = None) -> Run:
        """Returns a new run. Its key is written before the run is made, so that no run is ever made twice."""
        experiment = self._experiment(new) or _new_experiment(self._client, new.experiment, self._uri)
        if experiment.lifecycle_stage == DELETED:
            raise deleted_experiment(self._uri, experiment.name, experiment.experiment_id)
        write_ledger(self._folder, self.ledger)
        tags = {KEY: self.ledger.key, "mlflow.source.type": "LOCAL", "mlflow.source.name": "moe-testbed"}
        if replaced is not None:
            tags["replaces_run"] = replaced
        name = self._folder.name.encode(errors="replace").decode()
        return self._client.create_run(experiment.experiment_id, self.ledger.started_ms, tags, name)

    def _experiment(self, new: NewRun) -> Experiment | None:
        """Returns the experiment in which the folder's run is, or will be, deleted or not; None if it is not there."""
        beside = _run(self._client, new.beside) if new.beside is not None else None
        if beside is not None:
            return self._client.get_experiment(beside.info.experiment_id)
        return self._client.get_experiment_by_name(new.experiment)

    def _check(self, run: Run) -> None:
        """Raises `Refused` if the run or its experiment was deleted."""
        if deletion := self._deletion(run):
            raise deletion

    def _deletion(self, run: Run) -> Refused | None:
        """Returns what is told of a run that was deleted, or whose experiment was. A run alone can be restored in a
        deleted experiment, and then nobody sees it."""
        experiment = self._client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage == DELETED:
            return deleted_experiment(self._uri, experiment.name, experiment.experiment_id)
        return deleted_run(self._folder, self._uri, run.info.run_id) if _is_deleted(run) else None

    def _refuses(self, error: Exception, again_later: bool = False) -> bool:
        """Tells whether an error is about what was sent. Raises `Refused` if it is about the run. again_later: what is
        refused will be sent again some day, so that a fault of the server, which may pass, counts too."""
        refused = is_about_content(error) or (again_later and is_servers_fault(error))
        if refused:
            self._check(self._client.get_run(self.run_id))
        return refused

    def _note(self, what: str, error: Exception) -> None:
        """Remembers what the store did not take."""
        self.keep(replace(self.ledger, refused={**self.ledger.refused, what: in_short(error)}))

    def _once(self, name: str, content: str | bytes, send: Callable[[], Any]) -> None:
        """Sends what has changed since it was sent last; a failure, of a part of it too, leaves it for the next
        time."""
        digest = hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
        if self.ledger.sent.get(name) == digest:
            return
        before = self.ledger.refused
        with self._noted(name):
            send()
        if self.ledger.refused == before:
            self.keep(replace(self.ledger, sent={**self.ledger.sent, name: digest}))

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._refuses(error, again_later=True):
                raise
            self._note(what, error)

    def _log_parameters(self, parameters: dict[str, str]) -> None:
        from mlflow.entities import Param

        values: dict[str, str] = {}
        for name, value in parameters.items():
            values[name if self.slashes is None else key_of(name, values, slashes=0)] = value
        for batch in _batches(list(values.items()), MAX_BATCH_PARAMETERS):
            self._log_texts("parameter", batch, lambda pairs: {"params": [Param(*pair) for pair in pairs]})

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log_texts("tag", list(tags.items()), lambda pairs: {"tags": [RunTag(*pair) for pair in pairs]})

    def _log_texts(
        self,
        kind: str,
        texts: Sequence[tuple[str, str]],
        entities: Callable[[Sequence[tuple[str, str]]], dict[str, Any]],
    ) -> None:
        def send(pairs: Sequence[tuple[str, str]]) -> None:
            self._client.log_batch(self.run_id, **entities(pairs), synchronous=True)

        refused = {key for key, _ in send_texts(texts, send, self._refuses)}
        plainer = {plain_key(key): (key, text) for key, text in texts if key in refused}
        for plain, error in send_texts([(plain, text) for plain, (_, text) in plainer.items()], send, self._refuses):
            self._note(f"{kind} {plainer[plain][0]}", error)

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
            return
        with self._noted(f"file {name}"):
            content = file.read_bytes()
            self._once(f"file {name}", content, lambda: self._client.log_artifact(self.run_id, str(file), folder))


def _is_deleted(run: Run) -> bool:
    return bool(run.info.lifecycle_stage == DELETED)


def _metric(key: str) -> str:
    return f"metric {key}"


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[MlflowClient]:
    """Yields a client of the store, alone with it if it is on disk: SQLite takes one writer, and either must be created
    only once."""
    path = path_of(uri)
    if path is None:
        yield _client(uri)
        return
    _quietly_import()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not keeps_files(uri) and "?" not in uri and not path.exists():
            _create_database(path)
        yield _client(uri)


def _create_database(path: Path) -> None:
    """Makes a SQLite store beside its place and puts it there once it is whole: MLflow takes seconds for its tables,
    and cannot go on where a process that made them was killed."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = path.with_name(f"{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        store = SqlAlchemyStore(f"sqlite:///{folder / path.name}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        (folder / path.name).rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _new_experiment(client: MlflowClient, name: str, uri: str) -> Experiment:
    from mlflow.exceptions import MlflowException

    path = path_of(uri)
    beside = None if path is None or keeps_files(uri) else (path.parent / "mlartifacts").as_uri()
    try:
        return client.get_experiment(client.create_experiment(name, beside))
    except MlflowException:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment  # another process made it first


def _run(client: MlflowClient, run_id: str) -> Run | None:
    """Returns a run, deleted or not; None if the store has none of this id."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
