"""The commands for clusters: plan, launch, slurm, sync."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_testbed.launcher.cli.parts import EXPERIMENT_OVERRIDES_HELP, Commands, add_command, add_experiment, add_trust

CLUSTER_HELP = "YAML file of a cluster, such as configs/clusters/one_node_h100.yaml"
RUN_DIR_HELP = "folder of the run (default: as `moe-testbed train` chooses it)"


def add_cluster_commands(commands: Commands) -> None:
    """Adds them to the command line."""
    plan = add_command(
        commands,
        "plan",
        "say how a training would lie on a cluster",
        "Say which rank holds which experts, which groups cross nodes, how much memory each GPU needs and how many "
        "bytes a step moves. Starts nothing. Ends with status 1 if it will not fit.",
        """
        moe-testbed plan configs/experiments/large.yaml --cluster configs/clusters/slurm_h100.yaml
        moe-testbed plan configs/experiments/large.yaml --cluster configs/clusters/slurm_h100.yaml --set nodes=16
        """,
        _plan,
    )
    add_experiment(plan)
    _add_cluster(plan)

    launch = add_command(
        commands,
        "launch",
        "train one experiment on the hosts of a cluster, by deepspeed",
        "Train one experiment on the hosts of a cluster by one deepspeed command, over ssh. Ends with the training, "
        "and leaves no process behind.",
        """
        moe-testbed launch configs/experiments/small.yaml --cluster configs/clusters/two_hosts.yaml
        moe-testbed launch configs/experiments/small.yaml --cluster configs/clusters/two_hosts.yaml --dry-run
        moe-testbed launch configs/experiments/small.yaml --cluster configs/clusters/two_hosts.yaml --node-rank 1
        """,
        _launch,
    )
    add_experiment(launch)
    _add_cluster(launch)
    launch.add_argument("--run-dir", type=Path, metavar="DIR", help=RUN_DIR_HELP)
    add_trust(launch)
    launch.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    launch.add_argument(
        "--node-rank",
        type=int,
        metavar="I",
        help="start the processes of the hostfile's I-th host (from 0) here, without ssh; repeat it on every host",
    )

    slurm = add_command(commands, "slurm", "train suites by SLURM", "Train suites by SLURM.", None, None)
    slurm_commands = slurm.add_subparsers(title="commands", metavar="COMMAND", required=True)
    submit = add_command(
        slurm_commands,
        "submit",
        "submit the unfinished runs of a suite as a job array",
        "Submit the unfinished runs of a suite as a job array. A job that is preempted, or whose time ends, continues "
        "from a checkpoint written at that moment.",
        """
        moe-testbed slurm submit configs/suites/demo.yaml --cluster configs/clusters/slurm_h100.yaml
        moe-testbed slurm submit configs/suites/demo.yaml --cluster configs/clusters/slurm_h100.yaml --dry-run
        """,
        _slurm_submit,
    )
    _add_suite(submit)
    _add_cluster(submit)
    add_trust(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    status = add_command(
        slurm_commands,
        "status",
        "print how far the runs of a suite are",
        "Print of every run of a suite whether it is queued, running (and at which step), done, or failed and why. "
        "Ends with status 1 if a run failed.",
        "moe-testbed slurm status configs/suites/demo.yaml",
        _slurm_status,
    )
    _add_suite(status)
    cancel = add_command(
        slurm_commands,
        "cancel",
        "cancel the jobs of a suite",
        "Cancel the queued and running jobs of a suite. Running ones write a checkpoint first; submitting the suite "
        "again continues them.",
        "moe-testbed slurm cancel configs/suites/demo.yaml",
        _slurm_cancel,
    )
    _add_suite(cancel)

    sync = add_command(
        commands,
        "sync",
        "send runs to MLflow that were written without a network",
        "Send to the MLflow store what it does not have yet of the folders of runs or suites, also of unfinished ones.",
        """
        moe-testbed sync runs/demo
        moe-testbed sync runs/demo runs/study
        moe-testbed sync --new-runs --experiment again runs/demo
        """,
        _sync,
    )
    sync.add_argument(
        "--new-runs", action="store_true", help="make a new MLflow run in the place of each that was deleted there"
    )
    sync.add_argument(
        "--experiment",
        metavar="NAME",
        help="MLflow experiment in which runs are made (default: tracking.experiment of the run). A run that is there "
        "already stays where it is, and runs of a suite are made beside the suite's",
    )
    sync.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run or of a suite: runs/demo")


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cluster", required=True, metavar="CLUSTER", help=CLUSTER_HELP)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="cluster_overrides",
        metavar="KEY=VALUE",
        help="a value that replaces the cluster file's, such as nodes=8; may be given several times",
    )


def _add_suite(command: argparse.ArgumentParser) -> None:
    command.add_argument("suite", metavar="SUITE", help="YAML file of a suite, such as configs/suites/demo.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"for all runs: {EXPERIMENT_OVERRIDES_HELP}")
    command.add_argument(
        "--runs-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="parent of the suite's folder, seen by all nodes (default: runs)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cluster.config import load_cluster
    from moe_testbed.launcher.cluster.plan.text import print_plan
    from moe_testbed.launcher.config.experiment import load_experiment

    config = load_experiment(arguments.experiment, arguments.overrides)
    return print_plan(config, load_cluster(arguments.cluster, arguments.cluster_overrides))


def _launch(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cluster.config import load_cluster
    from moe_testbed.launcher.cluster.launch.launch import launch
    from moe_testbed.launcher.config.experiment import load_experiment, run_name

    cluster = load_cluster(arguments.cluster, arguments.cluster_overrides)
    config = load_experiment(arguments.experiment, arguments.overrides)
    run_dir = arguments.run_dir or Path("runs") / run_name(config, arguments.overrides)
    return launch(config, run_dir, cluster, arguments.node_rank, arguments.dry_run, arguments.trust)


def _slurm_submit(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cluster.config import load_cluster
    from moe_testbed.launcher.cluster.slurm.submit import submit
    from moe_testbed.launcher.config.suite import load_suite

    cluster = load_cluster(arguments.cluster, arguments.cluster_overrides)
    suite = load_suite(arguments.suite, arguments.overrides)
    return submit(suite, arguments.runs_dir, cluster, arguments.dry_run, arguments.trust)


def _slurm_status(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cluster.slurm.status import print_status
    from moe_testbed.launcher.config.suite import load_suite

    return print_status(load_suite(arguments.suite, arguments.overrides), arguments.runs_dir)


def _slurm_cancel(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cluster.slurm.cancel import cancel
    from moe_testbed.launcher.config.suite import load_suite

    return cancel(load_suite(arguments.suite, arguments.overrides), arguments.runs_dir)


def _sync(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.tracking.sync import sync

    return sync(arguments.folders, arguments.new_runs, arguments.experiment)
