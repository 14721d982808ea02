"""Mirrors folders to MLflow. The folder is the truth: what a store missed is read from it and sent later.

Nothing here may stop or slow training: MLflow is imported and talked to by another thread, a store that cannot be
reached, or that refuses something, is told once on stderr and tried again at the next push, the end of a training waits
for it no longer than `FINISH_SECONDS`, and what was sent is remembered in the folder's mlflow.json, so that a run
continued by another process continues its own MLflow run and nothing is sent twice.

A training whose folder lies in the folder of a suite that has an MLflow run becomes that run's child, whoever started
it: the suite's own process, a job of SLURM, or a person.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from moe_testbed.launcher.tracking.background import Background
from moe_testbed.launcher.tracking.content import PARENT, run_content, suite_content
from moe_testbed.launcher.tracking.state import MAX_KEYS_OF_A_KIND, Ledger, named, new_points, read_ledger
from moe_testbed.launcher.tracking.store import NewRun, Session, session
from moe_testbed.launcher.tracking.uri import store_uri

FINISH_SECONDS = 60.0
"""How long the end of a training waits for the store at most; the end of a suite so long for each of its runs."""

_ENDED_AS = {"finished": "finished", "failed": "failed", "diverged": "failed", "stopped": "killed"}


class Mirror:
    """Mirrors one training's run folder; used by rank 0 only.

    run_dir: holds config.yaml and the growing metrics.jsonl. experiment: name of the MLflow experiment. interval:
    seconds between two pushes of the background thread. background: where failures are told, if not by one of its own.
    replace: makes a new MLflow run if the folder's was deleted.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: str,
        interval: float = 20.0,
        background: Background | None = None,
        replace: bool = False,
    ) -> None:
        self._folder, self._interval = RunFolder(Path(run_dir)), interval
        self._new = NewRun(experiment, replace=replace)
        self._uri = store_uri()
        self._background = background or _background(self._folder.path)
        self._read_file: int | None = None

    def start(self) -> None:
        """Pushes from a background thread from now on; the first time after one interval."""
        self._background.start(self.push, self._interval)

    def push(self) -> bool:
        """Sends the new lines of the metrics. Returns False if the store cannot be reached or refuses the run; they are
        sent by a later push."""
        return not self._has_news() or self._background.attempt(self._send)

    def finish(self, status: str = "finished") -> bool:
        """Sends what remains, artifacts included, and ends the MLflow run. Returns False if the store does not take it
        in time.

        status: finished, failed or killed. May be called again, by another process too: it then sends what is new.
        """
        return self._background.end(lambda: self.settle(status), FINISH_SECONDS)

    def settle(self, status: str | None) -> bool:
        """Does what `finish` does without a bound on the time; with None, the MLflow run goes on as the training
        does."""
        return self._background.attempt(lambda: self._send(status, True))

    def _has_news(self) -> bool:
        path = self._folder.metrics_file
        return not path.exists() or path.stat().st_size != read_ledger(self._folder.path, self._uri).offset

    def _send(self, status: str | None = None, everything: bool = False) -> None:
        suite_dir = self._folder.path.parent
        parent = read_ledger(suite_dir, self._uri).run_id
        with session(self._folder.path, self._uri, dataclasses.replace(self._new, beside=parent)) as run:
            before = run.ledger
            self._send_metrics(run)
            if everything or "tags" not in run.ledger.sent:
                tags = {PARENT: parent or "", "metrics_left_out": ", ".join(run.ledger.left_out)}
                content = run_content(self._folder.path, suite_dir if parent else None, tags)
                run.tell(content, results=everything)
            if everything:
                # Numbers and status first: artifacts go to another place, which may be slow or closed.
                run.settle(status, self._folder.status_file)
                run.send_files(content.files)
            _tell_what_is_missing(self._folder.path, before, run.ledger)

    def _send_metrics(self, run: Session) -> None:
        path = self._folder.metrics_file
        file = path.stat().st_ino if path.exists() else None
        # A training that goes back to a checkpoint replaces the file by a shorter one and writes on.
        offset = run.ledger.offset if file == self._read_file else 0
        for points, ledger in new_points(self._folder, dataclasses.replace(run.ledger, offset=offset), run.slashes):
            if points:
                run.log_points(points)
            now = run.ledger
            run.keep(dataclasses.replace(ledger, status=now.status, plainer=now.plainer, refused=now.refused))
        self._read_file = file


class SuiteMirror:
    """Mirrors a suite folder: a parent run for the suite, and its run folders as children, from a single process.

    Mirroring from here instead of from every training imports MLflow once for the whole suite. replace: makes a new
    MLflow run if the suite's was deleted.
    """

    def __init__(
        self,
        suite_dir: Path,
        experiment: str,
        interval: float = 20.0,
        background: Background | None = None,
        replace: bool = False,
    ) -> None:
        self._suite_dir, self._interval = Path(suite_dir), interval
        self._new = NewRun(experiment, replace=replace)
        self._uri = store_uri()
        self._background = background or _background(self._suite_dir)
        self._children: dict[Path, Mirror] = {}
        self._settled: set[Path] = set()
        self._opened = False

    def start(self) -> None:
        """Pushes the suite and its runs from a background thread from now on. The first time is now, while the
        trainings start, since the import of MLflow takes seconds."""
        self._background.start(self.push, self._interval, at_once=True)

    def parent(self) -> str | None:
        """Returns the id of the suite's MLflow run, made if it is not there yet, and also if it was deleted; None while
        the store cannot be reached."""
        if not self._opened:
            self._opened = self._background.attempt(self._open)
            if self._background.away:
                return None
        return read_ledger(self._suite_dir, self._uri).run_id

    def push(self) -> bool:
        """Sends what is new in every run's folder, and ends the runs that have ended. Returns False if the store is
        away."""
        return self.parent() is not None and self._for_each(begun_runs(self._suite_dir), self._push)

    def finish(self, status: str = "finished") -> bool:
        """Ends the children by their status, sends the suite's results and report, and ends the parent run."""
        seconds = FINISH_SECONDS * (1 + len(begun_runs(self._suite_dir)))
        return self._background.end(lambda: self._finish(status), seconds)

    def settle(self, status: str | None) -> bool:
        """Sends what the store lacks of the suite, its runs left out, and ends its MLflow run; with None, it goes
        on."""
        return self._background.attempt(lambda: self._end(status))

    def open(self) -> bool:
        """Makes the suite's run if it is not there yet. Returns False if the store does not do so in time."""
        return self._background.end(lambda: self.parent() is not None, FINISH_SECONDS)

    def _open(self) -> None:
        with session(self._suite_dir, self._uri, self._new) as run:
            before = run.ledger
            run.reopen()
            run.tell(suite_content(self._suite_dir), results=False)
            _tell_what_is_missing(self._suite_dir, before, run.ledger)

    def _push(self, folder: Path) -> bool:
        child, state = self._child(folder), ended_as(folder)
        if state is None:
            self._settled.discard(folder)
            return child.push()
        if folder not in self._settled and child.settle(state):
            self._settled.add(folder)
        return folder in self._settled

    def _finish(self, status: str) -> bool:
        if self.parent() is None:
            return False
        # Once more, the settled ones too: the report has something to say of each.
        children = begun_runs(self._suite_dir)
        settled = self._for_each(children, lambda folder: self._child(folder).settle(ended_as(folder) or "killed"))
        return not self._background.away and self.settle(status) and settled

    def _end(self, status: str | None) -> None:
        with session(self._suite_dir, self._uri, self._new) as run:
            before = run.ledger
            content = suite_content(self._suite_dir)
            run.tell(content, results=True)
            run.settle(status, SuiteFolder(self._suite_dir).results_file)
            run.send_files(content.files)
            _tell_what_is_missing(self._suite_dir, before, run.ledger)

    def _for_each(self, folders: Iterable[Path], send: Callable[[Path], bool]) -> bool:
        """Tells whether all were sent. A refused one holds up no other; a store that is away is not tried again."""
        sent = True
        for folder in folders:
            sent &= send(folder)
            if self._background.away:
                return False
        return sent

    def _child(self, folder: Path) -> Mirror:
        if folder not in self._children:
            self._children[folder] = Mirror(folder, self._new.experiment, background=self._background)
        return self._children[folder]


def open_suite(suite_dir: Path, experiment: str) -> None:
    """Makes the MLflow run whose children the trainings in a suite's folder become, wherever they are started.

    suite_dir: holds suite.yaml. experiment: name of the MLflow experiment. A store that is away is told on stderr;
    `moe-testbed sync` makes the run then, and its children with it.
    """
    SuiteMirror(suite_dir, experiment).open()


def begun_runs(suite_dir: Path) -> list[Path]:
    """Returns the folders of the runs that have begun; the others have a config and no status yet."""
    return [folder.path for folder in SuiteFolder(suite_dir).begun_trainings()]


def ended_as(run_dir: Path) -> str | None:
    """Returns the status of the MLflow run of a training that has ended; None for one that goes on."""
    return _ENDED_AS.get(RunFolder(run_dir).read_status().state)


def _background(folder: Path) -> Background:
    away = f"MLflow store not reached; training goes on, what the store misses is in {folder} and sent later"
    return Background(away, str(folder))


def _tell_what_is_missing(folder: Path, before: Ledger, after: Ledger) -> None:
    """Tells once of what the store has not got of a folder, and will not get."""
    metrics_file = RunFolder(folder).metrics_file.name
    if after.left_out and not before.left_out:
        print(
            f"{folder}: MLflow gets the first {MAX_KEYS_OF_A_KIND} metrics of a kind; the others are in {metrics_file} "
            f"only, among them {', '.join(after.left_out)}",
            file=sys.stderr,
        )
    plainer = [f"{key} as {plain}" for key, plain in after.plainer.items() if key not in before.plainer]
    if plainer:
        print(f"{folder}: MLflow took {named(plainer)}, since it refused the name as it is", file=sys.stderr)
    new = {what: reason for what, reason in after.refused.items() if before.refused.get(what) != reason}
    if new:
        print(
            f"{folder}: MLflow did not take {named(new)}, which is here only: {next(iter(new.values()))}",
            file=sys.stderr,
        )
