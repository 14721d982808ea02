"""Writes the batch script of a suite: one job for each run, one process for each GPU."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.cluster.config import ClusterConfig, SlurmConfig
from moe_testbed.launcher.cluster.slurm.options import sbatch_lines
from moe_testbed.launcher.errors import ASKED_TO_STOP
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_TEMPLATE = r"""#!/bin/bash
# Trains one run of the suite @SUITE_NAME@ for each index of a job array. Written by `moe-testbed slurm submit`.
@OPTIONS@

runs=(
@RUNS@
)
run=${runs[$SLURM_ARRAY_TASK_ID]}
export RUN_DIR=@SUITE_DIR@/$run

# Before a job's time ends, or a more urgent one takes its nodes, the training is told to write a checkpoint and end.
told=no
stop() {
    trap '' USR1 TERM  # once is enough
    told=yes
    echo "$run is asked to stop"
    kill -USR1 $! 2>/dev/null || true  # srun, if it has started; it passes the signal on
}
trap stop USR1 TERM

# SLURM_JOB_ID would not do: of the last job of an array, it is the whole array's.
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
export start="job $job, start $((${SLURM_RESTART_COUNT:-0} + 1))"
echo "$run: $start, on $SLURM_JOB_NODELIST"
mkdir -p "@RANK_LOGS@" && touch "@START_FILE@"

# The processes meet at the first node, at a port that no other job of this cluster is likely to use. If one does, the
# next start takes another.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 15000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=@THREADS@ PYTHONSAFEPATH=1

# The Python that submits trains too, unless the modules or the setup put another one first, or a container has its own.
set -e
@SURROUNDINGS@
. @ENVIRONMENT@
set +e

# Each process takes its rank from SLURM. One that was asked to stop ends with @ASKED_TO_STOP@, which srun must not take
# for a failure, or it would end the others before they are ready.
rank() {
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    echo "$start, rank $RANK on $SLURMD_NODENAME"
    trap : USR1 TERM
    . @ENVIRONMENT@  # again: in a container, what its image says of a variable goes first
    "$python" -m moe_testbed.launcher train "@CONFIG@" --run-dir "$RUN_DIR"@TRUST@
    local status=$?
    [ $status = @ASKED_TO_STOP@ ] || exit $status
}
export -f rank

status=0
if [ $told = no ]; then
    srun \
        @SRUN_OPTIONS@ \
        bash -c rank &
    steps=$!
    wait $steps
    status=$?
    # A signal ends `wait` before srun has ended.
    while kill -0 $steps 2>/dev/null; do
        wait $steps
        status=$?
    done
fi

# 0: finished; @ASKED_TO_STOP@: to be continued; else it has failed, for a reason that stands in its folder.
@PYTHON@ -m moe_testbed.launcher.cluster.slurm.ending "$RUN_DIR" --status $status --told $told \
    --start "$start" --log @LOGS@/"$job.txt"
status=$?
# A job that is being cancelled is no longer running, and must not come back.
if [ $status = @ASKED_TO_STOP@ ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job" || echo "$run is not queued again"
fi
exit $status
"""


def job_script(
    suite_dir: Path,
    runs: Sequence[str],
    cluster: ClusterConfig,
    slurm: SlurmConfig,
    trust: bool = False,
    first: int | None = None,
) -> str:
    """Returns the script that trains runs of a suite, as `sbatch` takes it.

    Args:
        suite_dir: absolute, on a disk that all nodes see; holds the runs' folders.
        runs: names of these folders, by the index of the job.
        slurm: the cluster's part of that name.
        trust: the runs may be another user's.
        first: so many runs are in the array of which the script's own options speak; None: all.
    """
    suite, run = SuiteFolder(suite_dir), RunFolder(Path("$RUN_DIR"))
    indices = range(len(runs) if first is None else first)
    parts = {
        "SUITE_NAME": suite_dir.name,
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in sbatch_lines(suite_dir, indices, cluster, slurm)),
        "RUNS": "\n".join(f"    {run}" for run in runs),
        "SUITE_DIR": shlex.quote(str(suite_dir)),
        "LOGS": shlex.quote(str(suite.slurm)),
        "CONFIG": str(run.config_file),
        "RANK_LOGS": str(run.rank_logs),
        "START_FILE": str(run.job_start_file),
        "THREADS": str(slurm.cpus_per_gpu or 1),
        "SURROUNDINGS": "\n".join(_surroundings(slurm)),
        "ENVIRONMENT": shlex.quote(str(suite.job_environment_file)),
        "SRUN_OPTIONS": " \\\n        ".join(_srun_options(slurm)),
        "TRUST": " --trust" if trust else "",
        "PYTHON": shlex.quote(sys.executable),
        "ASKED_TO_STOP": str(ASKED_TO_STOP),
    }
    return re.sub("@([A-Z_]+)@", lambda match: parts[match[1]], _TEMPLATE)


def environment_file(cluster: ClusterConfig) -> str:
    """Returns what the script reads after the modules and the setup, so that what the cluster's file says of a variable
    holds. It is a file of its own, since SLURM shows the script of a job to others."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment.items())


def _srun_options(slurm: SlurmConfig) -> list[str]:
    rank_log = RunFolder(Path("$RUN_DIR")).rank_log("%t")
    # Where sbatch is told --export=NONE, srun would pass on nothing of this script either.
    options = ["--export=ALL", "--kill-on-bad-exit=1", "--open-mode=append", f'--output="{rank_log}"']
    if slurm.cpus_per_gpu is not None:
        # srun does not take it over from sbatch.
        options.append(f"--cpus-per-task={slurm.cpus_per_gpu}")
    if slurm.container is not None:
        options += [f"--container-image={shlex.quote(slurm.container)}", '--container-workdir="$PWD"']
    if slurm.container_mounts:
        options.append(f"--container-mounts={shlex.quote(','.join(slurm.container_mounts))}")
    return options


def _surroundings(slurm: SlurmConfig) -> list[str]:
    """Returns lines of shell, after which `python` names the Python that trains."""
    here = Path(sys.executable)
    around = [*(f"module load {shlex.quote(module)}" for module in slurm.modules), *slurm.setup]
    lines = [f"export PATH={shlex.quote(str(here.parent))}:$PATH", *around, "export python=python3"]
    if slurm.container is not None:
        return lines
    # The python3 beside the Python that submits may be of another version.
    lines.insert(1, "first=$(command -v python3 || true)")
    return [*lines, f'[ "$(command -v python3)" != "$first" ] || python={shlex.quote(str(here))}']
