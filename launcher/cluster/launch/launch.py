"""Trains on the hosts of a cluster by one deepspeed command, and ends with the training."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from moe_testbed.data.build import build_store
from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import read_hosts
from moe_testbed.launcher.cluster.launch.command import deepspeed_command
from moe_testbed.launcher.cluster.launch.preflight import check_hosts, check_this_host
from moe_testbed.launcher.cluster.launch.supervision import End, Lifelines, supervise
from moe_testbed.launcher.cluster.layout import layout_of
from moe_testbed.launcher.cluster.run_config import config_on
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ASKED_TO_STOP, FAILED, WRONG_INPUT, ConfigError
from moe_testbed.launcher.ranks.lifeline import LIFELINE_VARIABLE
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import FAILED_STATES, Manifest, Status

# How long the last word of another host's rank may take to be seen here.
_LAST_WORD_SECONDS = 20.0
# Beyond the time that ranks wait for one another: rank 0 may be a minute at MLflow when the others have ended.
_PATIENCE_SECONDS = 75.0


def launch(
    config: ExperimentConfig,
    run_dir: Path,
    cluster: ClusterConfig,
    node_rank: int | None,
    dry_run: bool,
    trust: bool = False,
) -> int:
    """Trains one experiment on all hosts of a cluster; the same call continues it.

    Args:
        run_dir: the folder of the run, on a disk that all hosts share.
        node_rank: start the processes of the hostfile's host of this number here, without ssh; None: all, by ssh, or
            here where the cluster has no hostfile.
        dry_run: print the command; write and start nothing.
        trust: the run may be another user's, whose checkpoints can hold code.

    Returns:
        Exit status of `moe-testbed train`: 0 finished, 1 failed, 2 wrong input, 75 asked to stop.

    Raises:
        ConfigError, DataError: what is wrong with the cluster, its hosts or the experiment.
    """
    hosts = _hosts(cluster, node_rank)
    config = config_on(config, cluster)
    layout_of(config, cluster)
    run_dir = run_dir.absolute()
    folder = RunFolder(run_dir)
    if dry_run:
        print(deepspeed_command(cluster, hosts, node_rank, folder, {}, trust))
        return 0
    by_ssh = bool(hosts) and node_rank is None
    # Hosts are asked whether they see it.
    folder.create()
    if by_ssh:
        check_hosts(hosts, cluster, run_dir)
    else:
        check_this_host(hosts, cluster, run_dir, is_first=not node_rank)
    # Here, once: hosts may have no network to download from.
    store = build_store(config.data.mix, Path(config.data.cache_dir), lambda text: print(text, file=sys.stderr))
    if node_rank:
        # Rank 0, on the first host, may have begun.
        folder.prepare(config, trust)
    else:
        # Under a training that is going on the config must stay as it is.
        RunFolder.claim(run_dir, config, Manifest(store.manifest), trust).release()
    num_ranks = cluster.gpus_per_node * (1 if node_rank is not None else cluster.nodes)
    lifelines = Lifelines(everywhere=by_ssh, num_ranks=num_ranks)
    place = f":{lifelines.port}" if by_ssh else f"127.0.0.1:{lifelines.port}"
    command = deepspeed_command(cluster, hosts, node_rank, folder, {LIFELINE_VARIABLE: place}, trust)
    command.write_files()
    print(f"{num_ranks} of {cluster.num_gpus} processes start: {run_dir}", file=sys.stderr)
    before = folder.status_time_ns, folder.read_status()
    patience = config.parallel.timeout_seconds + _PATIENCE_SECONDS
    try:
        end = supervise(command.arguments, command.environment, lifelines, patience)
    finally:
        command.remove_script()
    # On a shared disk of several hosts, another one's word may come late.
    status = _last_word(folder, before, wait=bool(hosts))
    return _outcome(folder, config, status, end, node_rank)


def _hosts(cluster: ClusterConfig, node_rank: int | None) -> list[str]:
    if cluster.launcher != "deepspeed":
        raise ConfigError(
            f"launcher of cluster {cluster.name} is {cluster.launcher}; use `moe-testbed slurm submit`, or --set "
            "launcher=deepspeed where there are hosts to ssh to"
        )
    hosts = read_hosts(cluster)
    if node_rank is not None and not 0 <= node_rank < len(hosts):
        allowed = f"0 to {len(hosts) - 1}, the hosts of {cluster.hostfile}" if hosts else "for clusters with a hostfile"
        raise ConfigError(f"--node-rank is {node_rank}; it is {allowed}")
    return hosts


def _outcome(folder: RunFolder, config: ExperimentConfig, status: Status, end: End, node_rank: int | None) -> int:
    """Returns the exit status by the run's folder; deepspeed's may be 0 after its death, 1 after a checkpoint."""
    state = status.state
    if not end.all_gone:
        print(
            "moe-testbed: a host cannot be reached; what runs there ends by itself when it notices, a minute at most",
            file=sys.stderr,
        )
    if state == "finished":
        return 0
    # deepspeed tells ranks to stop when it has lost another one; its exit status is then that one's.
    if state == "stopped" and (end.asked or end.code == ASKED_TO_STOP):
        return ASKED_TO_STOP
    if state in FAILED_STATES:
        print(f"moe-testbed: the training failed: {status.reason}", file=sys.stderr)
        return WRONG_INPUT if end.code == WRONG_INPUT else FAILED
    if end.asked:
        print("moe-testbed: stopped before it could write a checkpoint; the same command continues", file=sys.stderr)
        return ASKED_TO_STOP
    reason = _reason(end)
    if state == "stopped":
        reason = f"{reason}; the others were {status.reason}"
    print(f"moe-testbed: {reason}; the same command continues", file=sys.stderr)
    # One host alone does not know; and rank 0 may have come to the end after all.
    if node_rank is None and not folder.is_finished:
        folder.write_status(Status("failed", folder.read_status().step, config.training.steps, reason))
    return WRONG_INPUT if end.code == WRONG_INPUT else FAILED


def _reason(end: End) -> str:
    """Returns the reason of a failure of which no rank could say more."""
    if end.first_gone is not None:
        host = socket.getnameinfo((end.first_gone, 0), 0)[0]
        return f"a rank on host {host} ended, and others waited for it until `launch` ended them"
    return f"deepspeed ended with exit status {end.code}, and no rank could say why"


def _last_word(folder: RunFolder, before: tuple[int, Status], wait: bool) -> Status:
    """Returns the status that this training has left; that of a missing run if it has left none.

    Args:
        before: when the status was written before the training began, and what it said.
    """
    deadline = time.monotonic() + (_LAST_WORD_SECONDS if wait else 0)
    while True:
        now = folder.status_time_ns, folder.read_status()
        said = now[1].state
        if said == "finished" or (now != before and said in (*FAILED_STATES, "stopped")):
            return now[1]
        if time.monotonic() >= deadline:
            return Status()
        time.sleep(0.2)
