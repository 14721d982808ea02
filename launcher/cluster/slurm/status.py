"""Tells how far the runs of a suite are: what their folders say, and what SLURM says of their jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from moe_testbed.launcher.cluster.slurm.jobs import Job, read_jobs
from moe_testbed.launcher.config.suite import Suite, SuiteRun, suite_runs
from moe_testbed.launcher.errors import FAILED
from moe_testbed.launcher.run.columns import aligned
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import FAILED_STATES, MISSING
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_HEADER = ("run", "state", "step", "job", "nodes", "reason")
_FOLDER_STATES = {
    "finished": "done",
    "failed": "failed",
    "diverged": "diverged",
    "stopped": "stopped",
    "running": "cut off",
}
_JOB_STATES = {"PENDING": "queued", "RUNNING": "running", "COMPLETING": "ending"}
# SLURM's words.
_NO_REASON = "None"
_DEPENDENCY = "Dependency"
_NEVER_SATISFIED = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class _Row:
    run: str
    state: str
    step: str
    job: str
    nodes: str
    reason: str


def print_status(suite: Suite, runs_dir: Path) -> int:
    """Prints a table of the suite's runs.

    Returns:
        Exit status: 1 if a run has failed for good, else 0.

    Raises:
        ConfigError: SLURM does not answer.
    """
    folder = SuiteFolder(runs_dir.resolve() / suite.config.name)
    jobs = read_jobs(folder)
    rows = [_row(run, folder, jobs.get(run.name)) for run in suite_runs(suite, runs_dir.resolve())]
    texts = [_HEADER, *(astuple(row) for row in rows)]
    print("\n".join(aligned(texts, left=range(len(_HEADER)))))
    return FAILED if any(row.state in FAILED_STATES for row in rows) else 0


def _row(run: SuiteRun, suite: SuiteFolder, job: Job | None) -> _Row:
    folder, steps = RunFolder(run.run_dir), run.config.training.steps
    status, progress = folder.read_status(), folder.read_progress(steps)
    in_folder, told = status.state, status.reason or ""
    waits_for = [name for name in run.parents if not RunFolder(suite.path / name).is_finished]
    if in_folder == "finished" or job is None or job.is_over:
        state = _FOLDER_STATES.get(in_folder, "not started")
        if job is not None and in_folder == MISSING and job.reason == _NEVER_SATISFIED and waits_for:
            told = f"the run it starts from, {waits_for[0]}, has not come to its end"
        elif job is not None and in_folder in (MISSING, "running"):
            told = f"its job ended as {job.state}; see {suite.job_log(job.number)}"
        elif job is None and in_folder == "running":
            told = "no job of it is left"
    else:
        state = _JOB_STATES.get(job.state, job.state.lower())
        told = ", ".join(_why_queued(job, waits_for, told)) if state == "queued" else ""
    step = f"{progress.step:,} of {steps:,}"
    return _Row(run.name, state, step, job.number if job else "", job.nodes if job else "", told)


def _why_queued(job: Job, waits_for: Sequence[str], last_end: str) -> Iterator[str]:
    if job.reason == _DEPENDENCY and waits_for:
        yield f"waits for {', '.join(waits_for)}"
    elif job.reason != _NO_REASON:
        yield f"waits: {job.reason}"
    if last_end:
        yield f"after: {last_end}"
