"""The options of sbatch: those that follow from the cluster's file, and those that stand in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from moe_testbed.launcher.cluster.config import ClusterConfig, SlurmConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_LOGS = "leave it out: the logs lie in the suite's folder"
_TAKEN = {
    "array": "leave it out: slurm.jobs_at_once is how many runs train at a time",
    "chdir": "leave it out: jobs work in the folder in which they are submitted",
    "cpus-per-task": "set slurm.cpus_per_gpu, which srun is told as well",
    "error": _LOGS,
    "no-requeue": "leave it out: a job whose time ends is queued again",
    "nodes": "set nodes",
    "ntasks": "set gpus_per_node, one process each",
    "ntasks-per-node": "set gpus_per_node, one process each",
    "open-mode": _LOGS,
    "output": _LOGS,
    "partition": "set slurm.partition",
    "signal": "set slurm.grace_seconds",
    "test-only": "use --dry-run",
    "time": "set slurm.time",
    "wait": "leave it out: `moe-testbed slurm status` tells how far the jobs are",
}
_LETTERS = {
    "a": "array",
    "D": "chdir",
    "c": "cpus-per-task",
    "e": "error",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "t": "time",
    "W": "wait",
}


def sbatch_lines(suite_dir: Path, indices: range, cluster: ClusterConfig, slurm: SlurmConfig) -> list[str]:
    """Returns the options of a suite's job array with these indices as they stand behind ``#SBATCH``."""
    # sbatch reads % as the beginning of a placeholder, and two of them as one.
    logs = SuiteFolder(Path(str(suite_dir).replace("%", "%%")))
    options: dict[str, object] = {
        "job-name": suite_dir.name,
        "array": f"{indices[0]}-{indices[-1]}%{slurm.jobs_at_once}",
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus_per_node,
        "gpus-per-node": cluster.gpus_per_node if cluster.accelerator == "cuda" else None,
        "cpus-per-task": slurm.cpus_per_gpu,
        "signal": f"B:USR1@{slurm.grace_seconds}",
        "open-mode": "append",
        "output": shlex.quote(str(logs.job_log("%A_%a"))),
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*given, "--requeue", *slurm.options]


def words(lines: Sequence[str]) -> list[str]:
    """Returns options as a command takes them, from lines of a script for sbatch, where # begins a comment."""
    return [word for line in lines for word in shlex.split(line, comments=True)]


def check_options(slurm: SlurmConfig) -> None:
    """Checks the cluster's own options, as far as sbatch would take them and not do what was meant.

    Raises:
        ConfigError: a line holds no option or more than options, or it says what follows from the rest of the file.
    """
    for number, line in enumerate(slurm.options):
        where = f"slurm.options.{number} is '{line}'"
        try:
            found = words([line])
        except ValueError as error:
            raise ConfigError(f"{where}: {str(error).lower()}; write it as in a script for sbatch") from None
        if not found or not found[0].startswith("-"):
            raise ConfigError(
                f"{where}, which sbatch reads as no option; write --NAME or --NAME=VALUE, without #SBATCH"
            )
        for before, word in pairwise(found):
            if not word.startswith("-") and "=" in before:
                raise ConfigError(f"{where}, where '{word}' stands apart; put quotes around a value that has blanks")
        if taken := next(_taken(found), None):
            raise ConfigError(f"{where}, but --{taken} is not for slurm.options; {_TAKEN[taken]}")


def _taken(found: Sequence[str]) -> Iterator[str]:
    """Yields the names of options that are taken; sbatch knows one by its letter or by the beginning of its name."""
    for word in found:
        name = word.partition("=")[0].removeprefix("--")
        if not word.startswith("--"):
            yield from [_LETTERS[letter] for letter in word[1:2] if word.startswith("-") and letter in _LETTERS]
        elif name:
            yield from [taken for taken in _TAKEN if taken.startswith(name)]
