"""Ends the jobs of a suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_testbed.launcher.cluster.slurm.jobs import Job, call_slurm, read_jobs
from moe_testbed.launcher.config.suite import Suite
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_OVER_ALREADY = "already completing or completed"  # SLURM's words about a job that ended in between


def cancel(suite: Suite, runs_dir: Path) -> int:
    """Takes the waiting jobs out of the queue and tells the running ones to write a checkpoint and end.

    Returns:
        Exit status 0.

    Raises:
        ConfigError: SLURM does not answer, or refuses.
    """
    folder = SuiteFolder(runs_dir.resolve() / suite.config.name)

    def those(chosen: Callable[[Job], bool]) -> list[str]:
        return [job.number for job in read_jobs(folder).values() if chosen(job)]

    # The waiting ones first, or they would take the places of those that end; before these, what starts from them.
    waiting = those(lambda job: job.is_waiting)
    for number in reversed(waiting):
        _call("scancel", number)
    running = those(lambda job: job.is_running)
    for number in running:
        # A job that may not be queued again ends where it would else ask for that.
        _call("scontrol", "update", f"JobId={number}", "Requeue=0")
        _call("scancel", "--batch", "--signal=USR1", number)
    # Some may just have asked.
    for number in those(lambda job: job.is_waiting):
        _call("scancel", number)
    if running or waiting:
        print(
            f"{len(waiting)} waiting jobs cancelled, {len(running)} running ones told to write a checkpoint and end; "
            "`moe-testbed slurm status` shows when they have"
        )
    else:
        print(f"no job of the suite {suite.config.name} waits or runs")
    return 0


def _call(*command: str) -> None:
    try:
        call_slurm(command)
    except ConfigError as error:
        if _OVER_ALREADY not in str(error):
            raise
