"""Trains the runs of a suite in child processes, some at a time, each after the one that it starts from; one that fails
stops no others but those that start from it."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.errors import ASKED_TO_STOP, WRONG_INPUT
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import FAILED_STATES, Progress
from moe_testbed.launcher.suites import processes
from moe_testbed.launcher.suites.forks import Forks, ServerLost, forks_will_do, modules_of
from moe_testbed.launcher.suites.order import failed_with
from moe_testbed.launcher.suites.processes import Child
from moe_testbed.launcher.suites.progress import ProgressView, duration

TRAIN_COMMAND = (sys.executable, "-m", "moe_testbed.launcher", "train")
MOST_ATTEMPTS = 3
_POLL_SECONDS = 0.2


@dataclass
class _Attempt:
    run: SuiteRun
    earlier_reasons: list[str] = field(default_factory=list)
    process: Child | None = None
    started: float = 0.0
    log_size: int = 0


def train_all(
    runs: Sequence[SuiteRun],
    jobs: int,
    environment: Mapping[str, str],
    view: ProgressView,
    command: Sequence[str] = TRAIN_COMMAND,
) -> dict[str, str]:
    """Trains every run to its end, ``jobs`` at a time, in their order as far as those that they start from allow it.

    A run that fails is started again, which continues from its last checkpoint, unless it fails a second time for the
    same reason, `MOST_ATTEMPTS` times in all, or for wrong input. One that a signal has stopped continues. With a run
    that fails, those fail that start from it. Whatever ends this function ends the processes.

    Args:
        environment: variables that the children get besides this process's own.
        command: what trains; ``CONFIG --run-dir DIR`` is appended.

    Returns:
        Name of each run that failed -> reason, one line.
    """
    waiting = deque(_Attempt(run) for run in runs)
    running: list[_Attempt] = []
    failed: dict[str, str] = {}
    unfinished = {run.name for run in runs}
    with closing(_starter(runs, command, environment)) as starter, _stopped_at_the_end(running, view):
        while waiting or running:
            while len(running) < jobs and (attempt := _first_ready(waiting, unfinished)):
                waiting.remove(attempt)
                running.append(attempt)
                _start(attempt, starter, view)
            for attempt in [one for one in running if one.process is not None and one.process.poll() is not None]:
                running.remove(attempt)
                assert attempt.process is not None
                if attempt.process.returncode == ASKED_TO_STOP:
                    view.event(f"{attempt.run.name}: was asked to stop, starting it again")
                    waiting.appendleft(_Attempt(attempt.run, attempt.earlier_reasons))
                    continue
                reason = _failure(attempt)
                if reason is None:
                    unfinished.remove(attempt.run.name)
                    view.event(f"{attempt.run.name}: finished after {duration(time.time() - attempt.started)}")
                elif gives_up(attempt.process.returncode, reason, attempt.earlier_reasons):
                    _fail(attempt.run, reason, failed, view, f" (see {RunFolder(attempt.run.run_dir).log_file})")
                    _fail_children(attempt.run, waiting, failed, view)
                else:
                    view.event(f"{attempt.run.name}: failed, starting it again: {reason}")
                    waiting.appendleft(_Attempt(attempt.run, [*attempt.earlier_reasons, reason]))
            done = len(runs) - len(waiting) - len(running)
            view.update([(one.run.name, _progress(one.run)) for one in running], done)
            if running:
                starter.pause(_POLL_SECONDS)
    return failed


def _first_ready(waiting: Iterable[_Attempt], unfinished: Set[str]) -> _Attempt | None:
    """Returns the first that starts from no unfinished run; None if all do."""
    return next((attempt for attempt in waiting if unfinished.isdisjoint(attempt.run.parents)), None)


def _fail_children(parent: SuiteRun, waiting: deque[_Attempt], failed: dict[str, str], view: ProgressView) -> None:
    """Gives up the runs that start from one that has failed, and those that start from these. What a finished one has
    found stays: it has started from weights of before."""
    for attempt in [attempt for attempt in waiting if parent.name in attempt.run.parents]:
        waiting.remove(attempt)
        reason = failed_with(parent.name, failed[parent.name])
        if RunFolder(attempt.run.run_dir).is_finished:
            failed[attempt.run.name] = reason
            view.event(f"{attempt.run.name}: stays as it is: {reason}")
        else:
            _fail(attempt.run, reason, failed, view)
        _fail_children(attempt.run, waiting, failed, view)


def _fail(run: SuiteRun, reason: str, failed: dict[str, str], view: ProgressView, see: str = "") -> None:
    """Notes that a run is given up, where the report finds it and where the user sees it."""
    failed[run.name] = reason
    RunFolder(run.run_dir).note_failure(_steps(run), reason)
    view.event(f"{run.name}: failed: {reason}{see}")


@contextmanager
def _stopped_at_the_end(running: Sequence[_Attempt], view: ProgressView) -> Iterator[None]:
    try:
        yield
    finally:
        view.close()
        processes.stop([attempt.process for attempt in running if attempt.process is not None])


class _Interpreters:
    """Starts each training as a new interpreter."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment

    def start(self, arguments: Sequence[str], log: Path) -> Child:
        """Starts the command with more arguments, its output appended to ``log``."""
        return processes.start([*self._command, *arguments], log, self._environment)

    def pause(self, seconds: float) -> None:
        """Waits, perhaps only until a training ends."""
        time.sleep(seconds)

    def close(self) -> None:
        """Ends what served the trainings."""


class _Forks(_Interpreters):
    """Starts each training as a fork."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], modules: Sequence[str]) -> None:
        super().__init__(command, environment)
        self._options = command[len(TRAIN_COMMAND) :]
        self._forks = Forks(environment, modules)

    def start(self, arguments: Sequence[str], log: Path) -> Child:
        """Starts the command with more arguments as a fork, its output appended to ``log``."""
        try:
            return self._forks.start(["train", *self._options, *arguments], log)
        except ServerLost:
            # What the server could not do, such as an import, a new interpreter says in the log.
            return super().start(arguments, log)

    def pause(self, seconds: float) -> None:
        """Waits, but only until a training ends."""
        self._forks.pause(seconds)

    def close(self) -> None:
        """Ends the fork server."""
        self._forks.close()


def _starter(runs: Sequence[SuiteRun], command: Sequence[str], environment: Mapping[str, str]) -> _Interpreters:
    """Returns what starts the trainings: as forks where these will do."""
    if tuple(command[: len(TRAIN_COMMAND)]) == TRAIN_COMMAND and forks_will_do(runs):
        return _Forks(command, environment, modules_of(runs))
    return _Interpreters(command, environment)


def _start(attempt: _Attempt, starter: _Interpreters, view: ProgressView) -> None:
    run = attempt.run
    step = _progress(run).step
    view.event(f"{run.name}: {f'continues (it had come to step {step:,})' if step else 'starts'}")
    log = RunFolder(run.run_dir).log_file
    attempt.log_size = log.stat().st_size if log.exists() else 0
    attempt.started = time.time()
    attempt.process = starter.start([str(RunFolder(run.run_dir).config_file), "--run-dir", str(run.run_dir)], log)


def _failure(attempt: _Attempt) -> str | None:
    """Returns why a process that has ended did not train the run to its end; None if it did."""
    assert attempt.process is not None
    code = attempt.process.returncode
    folder = RunFolder(attempt.run.run_dir)
    status = folder.read_status()
    if code == 0 and status.state == "finished":
        return None
    if code < 0:
        hint = ", perhaps by the system for lack of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    if status.state in FAILED_STATES and status.reason and folder.status_time_ns >= attempt.started * 1e9:
        return status.reason
    with folder.log_file.open("rb") as log:
        log.seek(attempt.log_size)
        return last_words(log.read().decode(errors="replace"), code)


def last_words(log: str, status: int) -> str:
    """Returns in one line why a process has ended that has left no other reason than what it said last."""
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].removeprefix("moe-testbed: ") if lines else f"ended with status {status} without a message"


def gives_up(status: int, reason: str, earlier_reasons: Sequence[str]) -> bool:
    """Tells whether a run is given up that ended with this status and for this reason, after failures for others."""
    return status == WRONG_INPUT or reason in earlier_reasons[-1:] or len(earlier_reasons) + 1 >= MOST_ATTEMPTS


def _progress(run: SuiteRun) -> Progress:
    return RunFolder(run.run_dir).read_progress(_steps(run))


def _steps(run: SuiteRun) -> int:
    return run.config.training.steps
