"""Trains the runs of a suite that are not finished and reports on all of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moe_testbed.data.machine import usable_cores
from moe_testbed.launcher.config.model_size import model_on_meta, size_of
from moe_testbed.launcher.config.suite import Suite, SuiteRun, suite_runs
from moe_testbed.launcher.errors import FAILED, ConfigError
from moe_testbed.launcher.report.write import print_report
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from moe_testbed.launcher.suites.machine import free_memory_bytes, jobs_at_once
from moe_testbed.launcher.suites.order import left_to_train, most_at_once, work_behind
from moe_testbed.launcher.suites.progress import ProgressView
from moe_testbed.launcher.suites.scheduling import TRAIN_COMMAND, train_all
from moe_testbed.launcher.suites.starts import check_starts
from moe_testbed.launcher.suites.stores import build_stores
from moe_testbed.launcher.tracking.mirror import SuiteMirror


def compare(
    suite: Suite,
    runs_dir: Path,
    jobs: int | None = None,
    command: Sequence[str] = TRAIN_COMMAND,
    trust: bool = False,
) -> int:
    """Trains the runs of a suite that are not finished, then writes the report and prints its table and path.

    Args:
        runs_dir: parent of the suite's folder.
        jobs: trainings at a time; None: as many as cores and free memory carry.
        command: what trains a run, see `train_all`.
        trust: runs may be another user's, whose checkpoints can hold code.

    Returns:
        Exit status: 0 if all runs are finished, 1 if one failed.

    Raises:
        ConfigError: a run's folder holds another config, a run has started from weights that its parent has no more, or
            the suite is being compared by another process.
        DataError: the data cannot be built.
    """
    folder = SuiteFolder(runs_dir / suite.config.name)
    with folder.held(), _ended_by_signals():
        runs = suite_runs(suite, runs_dir)
        for run in runs:
            # The suite's own process mirrors its runs to MLflow, so that each training need not load it.
            quiet = run.config.model_copy(update={"tracking": run.config.tracking.model_copy(update={"mlflow": False})})
            RunFolder(run.run_dir).prepare(quiet, trust)
        folder.write_config(suite.config.model_dump(mode="json"))
        for label in dict.fromkeys(run.label for run in runs if not run.config.causal):
            print(f"{label} is not causal: its loss cannot be compared; the report marks it", file=sys.stderr)
        check_starts(runs)
        missing = left_to_train(runs)
        if len(missing) < len(runs):
            print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished and skipped", file=sys.stderr)
        build_stores(missing)
        tracking = runs[0].config.tracking
        mirror = SuiteMirror(folder.path, tracking.experiment) if tracking.mlflow else None
        if mirror:
            mirror.start()
        command = (*command, "--trust") if trust else command
        failed = _train_missing(missing, jobs, command) if missing else {}
        print_report(folder.path)
        if mirror:
            mirror.finish("failed" if failed else "finished")
    return FAILED if failed else 0


def _train_missing(runs: list[SuiteRun], jobs: int | None, command: Sequence[str]) -> dict[str, str]:
    cores = usable_cores()
    most = most_at_once(runs)
    jobs = min(jobs or jobs_at_once(cores, free_memory_bytes(), most), most)
    threads = max(1, cores // jobs)
    print(f"{len(runs)} runs to train, {jobs} at a time with {threads} thread(s) each", file=sys.stderr)
    # Without the safe path, a module in the working directory could take the place of an installed one.
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    if jobs > 1:
        # A long one that comes last would run alone, and so would a long one that waits for others.
        work = work_behind(runs, {run.name: _work_left(run) for run in runs})
        runs = sorted(runs, key=lambda run: work[run.name], reverse=True)
    return train_all(runs, jobs, environment, ProgressView(sys.stderr, len(runs)), command)


def _work_left(run: SuiteRun) -> int:
    """Returns the FLOPs of a training from where it is; 0 for one that cannot be built, and says so when it starts."""
    data, training = run.config.data, run.config.training
    try:
        size = size_of(model_on_meta(run.config), data.sequence_length, run.config.objective)
    except ConfigError:
        return 0
    steps_left = training.steps - RunFolder(run.run_dir).read_progress(training.steps).step
    return steps_left * training.global_batch_size * data.sequence_length * size.flops_per_token


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that the trainings end too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
