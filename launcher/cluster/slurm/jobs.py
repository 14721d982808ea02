"""Asks SLURM what it knows of the jobs of a suite."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """A job of an array.

    Attributes:
        number: the job's number as SLURM's commands take it, such as 12_3.
        state: the job's state in SLURM's words, such as PENDING.
        nodes: compressed, such as node[1-2]; empty before it starts.
        reason: why it waits, in SLURM's words.
    """

    number: str
    state: str
    nodes: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether the job neither waits nor runs, and will not."""
        return self.state in _OVER

    @property
    def is_waiting(self) -> bool:
        """Whether nothing but SLURM keeps the job's processes from starting."""
        return not self.is_over and not self.is_running and self.state != "COMPLETING"

    @property
    def is_running(self) -> bool:
        """Whether the job's processes run."""
        return self.state == "RUNNING"


def require(command: str) -> None:
    """Raises ConfigError if one of SLURM's commands is not installed."""
    if shutil.which(command) is None:
        raise ConfigError(
            f"{command} is not on the PATH: SLURM is not installed here; use a login node of the cluster, or "
            "`moe-testbed launch` with a cluster file of launcher deepspeed"
        )


def call_slurm(command: Sequence[str]) -> str:
    """Runs one of SLURM's commands and returns what it prints.

    Raises:
        ConfigError: it is not installed, or it complains; one line with its own words.
    """
    require(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]} gave no answer within {_TIMEOUT_SECONDS} s; see with `scontrol ping` whether SLURM's "
            "controller is up, and repeat the command"
        ) from None
    if done.returncode:
        raise ConfigError(f"{command[0]} refuses: {_complaint(done.stderr) or f'status {done.returncode}'}")
    return done.stdout


def read_jobs(suite: SuiteFolder) -> dict[str, Job]:
    """Returns the newest job of each run that was submitted, by the run's name, as far as SLURM remembers it.

    Raises:
        ConfigError: SLURM does not answer.
    """
    submitted = suite.read_jobs()
    if submitted is None:
        return {}
    # Ends of jobs are remembered for some minutes; of one array that is forgotten, squeue says that there is none.
    numbers = ",".join(submitted.arrays)
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={numbers}"]
    try:
        lines = call_slurm(command).splitlines()
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    jobs = {line.partition("|")[0]: line.split("|", 3)[1:] for line in lines}
    found = {}
    for run, number in submitted.numbers().items():
        # Of jobs that are cancelled before they start, SLURM may forget the indices: it tells of their array then.
        if told := jobs.get(number) or jobs.get(number.partition("_")[0]):
            found[run] = Job(number, *told)
    return found


def _complaint(text: str) -> str:
    """Returns the lines of an error message as one, without the name of the program before each."""
    lines = [line.strip().partition("error: ") for line in text.splitlines() if line.strip()]
    return "; ".join(after or before for before, _, after in lines)
