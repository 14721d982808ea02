"""The commands that train and report: train, compare, report, config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moe_testbed.launcher.cli.parts import (
    EXPERIMENT_OVERRIDES_HELP,
    Commands,
    add_command,
    add_experiment,
    add_trust,
)
from moe_testbed.launcher.errors import ConfigError


def add_training_commands(commands: Commands) -> None:
    """Adds train, compare and report to the command line."""
    train = add_command(
        commands,
        "train",
        "train one experiment",
        "Train one experiment. A run that was cut off continues from its last checkpoint.",
        """
        moe-testbed train configs/experiments/tiny.yaml
        moe-testbed train configs/experiments/tiny.yaml routing.router.name=top_k seed=2
        moe-testbed train configs/experiments/tiny.yaml training.steps=50 --run-dir runs/trial
        """,
        _train,
    )
    add_experiment(train)
    train.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/NAME-seedSEED, followed by the other overrides and a digest of them, so "
        "that the same command continues the same run)",
    )
    add_trust(train)

    compare = add_command(
        commands,
        "compare",
        "train the runs of a suite and report on them",
        "Train the runs of a suite side by side and write a report. Finished runs are skipped, runs that were cut off "
        "continue, a run that fails does not stop the others. Ends with status 1 if a run failed.",
        """
        moe-testbed compare configs/suites/demo.yaml
        moe-testbed compare configs/suites/demo.yaml --jobs 2 training.steps=200 'seeds=[1,2,3]'
        """,
        _compare,
    )
    compare.add_argument("suite", metavar="SUITE", help="YAML file of a suite, such as configs/suites/demo.yaml")
    compare.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"for all runs: {EXPERIMENT_OVERRIDES_HELP}")
    compare.add_argument(
        "--jobs",
        type=_jobs,
        default=None,
        metavar="auto|N",
        help="trainings at a time; auto: one per core, as far as each has 1.5 GB of free memory (default: auto)",
    )
    compare.add_argument(
        "--runs-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="parent of the suite's folder (default: runs)",
    )
    add_trust(compare)

    report = add_command(
        commands,
        "report",
        "report on a suite's folder, or compare suites",
        "Write results.json, results.csv, report.html, figures/ and tables/ from the runs in a suite's folder, in "
        "whatever state they are. With several folders: compare every other suite with the first, runs matched by "
        "label, and write comparison.html, comparison.json, comparison.csv and figures/.",
        """
        moe-testbed report runs/demo
        moe-testbed report runs/small runs/large --out runs/small-and-large
        """,
        _report,
    )
    report.add_argument("suite_dirs", nargs="+", type=Path, metavar="SUITE_DIR", help="folder of a suite: runs/demo")
    report.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the comparison (default: comparison-A-B beside A, for the suites' folders A and B)",
    )


def add_config_command(commands: Commands) -> None:
    """Adds `config show` to the command line."""
    config = add_command(commands, "config", "look at configurations", "Look at configurations.", None, None)
    config_commands = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = add_command(
        config_commands,
        "show",
        "print the whole configuration of an experiment",
        "Print the whole configuration of an experiment as YAML, with a comment that says where each value comes from: "
        "default, FILE:LINE or command line.",
        "moe-testbed config show configs/experiments/tiny.yaml training.steps=100",
        _config_show,
    )
    add_experiment(show)


def _jobs(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number of at least 1, got '{text}'")
    return int(text)


def _train(arguments: argparse.Namespace) -> None:
    # Read when torch is imported: a lost connection would be told in fifty lines of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from moe_testbed.launcher.config.experiment import load_experiment, run_name
    from moe_testbed.launcher.suites.processes import end_with_parent

    end_with_parent()
    config = load_experiment(arguments.experiment, arguments.overrides)
    run_dir = arguments.run_dir or Path("runs") / run_name(config, arguments.overrides)

    from moe_testbed.launcher.train.train import train

    train(config, run_dir, arguments.trust)


def _compare(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.config.suite import load_suite
    from moe_testbed.launcher.suites.compare import compare

    suite = load_suite(arguments.suite, arguments.overrides)
    return compare(suite, arguments.runs_dir, arguments.jobs, trust=arguments.trust)


def _report(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.report.write import print_comparison, print_report

    if len(arguments.suite_dirs) > 1:
        print_comparison(arguments.suite_dirs, arguments.out)
    elif arguments.out is None:
        print_report(arguments.suite_dirs[0])
    else:
        raise ConfigError("--out is the folder of a comparison: give a second suite, or leave --out away")


def _config_show(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.config.experiment import explain_experiment

    print(explain_experiment(arguments.experiment, arguments.overrides), end="")
