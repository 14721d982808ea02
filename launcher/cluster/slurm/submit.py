"""Submits the runs of a suite that are not finished."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.cluster.config import ClusterConfig, SlurmConfig
from moe_testbed.launcher.cluster.layout import layout_of
from moe_testbed.launcher.cluster.run_config import config_on
from moe_testbed.launcher.cluster.slurm.arrays import job_arrays, submit_arrays, told
from moe_testbed.launcher.cluster.slurm.jobs import call_slurm, read_jobs, require
from moe_testbed.launcher.cluster.slurm.options import check_options, sbatch_lines, words
from moe_testbed.launcher.cluster.slurm.script import environment_file, job_script
from moe_testbed.launcher.config.suite import Suite, SuiteRun, suite_runs
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SubmittedJobs, SuiteFolder
from moe_testbed.launcher.suites.order import left_to_train, parents_first
from moe_testbed.launcher.suites.starts import check_starts
from moe_testbed.launcher.suites.stores import build_stores
from moe_testbed.launcher.tracking.mirror import open_suite

_SHORTEST_WORK_SECONDS = 90  # SLURM may tell a job 60 s earlier than it was asked to


def submit(suite: Suite, runs_dir: Path, cluster: ClusterConfig, dry_run: bool, trust: bool = False) -> int:
    """Submits the runs of a suite that are not finished, or prints the script of their jobs. They are one job array,
    unless some start from others.

    Args:
        runs_dir: parent of the suite's folder, on a disk that all nodes see.
        dry_run: print the script, write and submit nothing.
        trust: runs may be another user's, whose checkpoints can hold code.

    Returns:
        Exit status 0.

    Raises:
        ConfigError: the runs do not fit the cluster, one has started from weights that its parent has no more, jobs of
            the suite are in the queue, or SLURM refuses.
        DataError: the data cannot be built.
    """
    slurm = _slurm_part(cluster)
    runs = suite_runs(suite, runs_dir.resolve())
    for run in runs:
        _check_layout(run, cluster)
    folder = SuiteFolder(runs_dir.resolve() / suite.config.name)
    check_starts(runs)
    missing = parents_first(left_to_train(runs))
    if not missing:
        print(f"all {len(runs)} runs are finished; `moe-testbed report {folder.path}` reports on them")
        return 0
    _warn_of_lost_work(missing)
    names, arrays = [run.name for run in missing], job_arrays(missing)
    script = job_script(folder.path, names, cluster, slurm, trust, first=len(arrays[0].indices))

    def options(indices: range) -> list[str]:
        # They stand in the script, but SBATCH_PARTITION and the like would go before those.
        return words(sbatch_lines(folder.path, indices, cluster, slurm))

    if dry_run:
        print(script + told(arrays, folder.job_script_file, options), end="")
        return 0
    require("sbatch")
    _check_partition(slurm.partition)
    with folder.held():
        _refuse_queued(folder)
        _prepare(folder, suite, runs, cluster, trust)
        build_stores(missing)
        folder.write_job(script, environment_file(cluster))
        runs_of = [names[array.indices.start : array.indices.stop] for array in arrays]

        def note(numbers: Sequence[str]) -> None:
            folder.write_jobs(SubmittedJobs(dict(zip(numbers, runs_of, strict=False))))

        numbers = submit_arrays(arrays, folder.job_script_file, options, note)
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished and skipped", file=sys.stderr)
    what = f"job array {numbers[0]}, at most {slurm.jobs_at_once} at a time"
    if len(numbers) > 1:
        what = f"job arrays {', '.join(numbers)}, at most {slurm.jobs_at_once} of each at a time"
    print(f"{len(missing)} runs submitted as {what}: {folder.job_script_file}")
    return 0


def _prepare(folder: SuiteFolder, suite: Suite, runs: list[SuiteRun], cluster: ClusterConfig, trust: bool) -> None:
    """Writes what the jobs find in the suite's folder, and gives runs that have failed before a new chance."""
    for run in runs:
        run_folder = RunFolder(run.run_dir)
        run_folder.prepare(config_on(run.config, cluster), trust)
        run_folder.prepare_jobs()
    folder.write_config(suite.config.model_dump(mode="json"))
    tracking = runs[0].config.tracking
    if tracking.mlflow and cluster.nodes_reach_mlflow:
        open_suite(folder.path, tracking.experiment)


def _slurm_part(cluster: ClusterConfig) -> SlurmConfig:
    slurm = cluster.slurm
    if cluster.launcher != "slurm" or slurm is None:
        raise ConfigError(
            f"the cluster {cluster.name} has launcher {cluster.launcher}; set launcher to slurm and add `slurm: "
            "{partition: NAME}`, or train with `moe-testbed launch`"
        )
    if _seconds(slurm.time) < slurm.grace_seconds + _SHORTEST_WORK_SECONDS:
        raise ConfigError(
            f"slurm.time is {slurm.time} and slurm.grace_seconds {slurm.grace_seconds}: a job would be told to stop "
            f"as it starts; the time must be at least {_SHORTEST_WORK_SECONDS} s longer than the grace"
        )
    check_options(slurm)
    return slurm


def _seconds(time: str) -> int:
    """Returns the seconds in D-HH:MM:SS or HH:MM:SS."""
    days, hours, minutes, seconds = (int(part) for part in re.split("[-:]", time if "-" in time else f"0-{time}"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_layout(run: SuiteRun, cluster: ClusterConfig) -> None:
    try:
        layout_of(run.config, cluster)
    except ConfigError as error:
        raise ConfigError(f"run '{run.label}' on the cluster {cluster.name}: {error}") from None


def _warn_of_lost_work(runs: list[SuiteRun]) -> None:
    bare = [run.name for run in runs if not run.config.checkpoint.every]
    if bare:
        print(
            f"moe-testbed: checkpoint.every is 0 in {len(bare)} of {len(runs)} runs: one whose node is lost, or which "
            "is preempted in a partition or QOS without GraceTime, begins anew; set checkpoint.every",
            file=sys.stderr,
        )


def _refuse_queued(folder: SuiteFolder) -> None:
    queued = [job for job in read_jobs(folder).values() if not job.is_over]
    if queued:
        told = ", ".join(f"{job.number} {job.state}" for job in queued[:3]) + (", ..." if len(queued) > 3 else "")
        raise ConfigError(
            f"the suite {folder.path.name} has {len(queued)} jobs in the queue ({told}); wait for them, or end them by "
            "`moe-testbed slurm cancel`"
        )


def _check_partition(names: str) -> None:
    there = call_slurm(["sinfo", "--noheader", "--format=%R"]).split()
    for name in names.split(","):
        if name not in there:
            raise ConfigError(f"slurm.partition is '{name}', which is none of this cluster's: {', '.join(there)}")
