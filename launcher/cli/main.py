"""The `moe-testbed` command. Everything heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_testbed.launcher.cli.cluster import add_cluster_commands
from moe_testbed.launcher.cli.parts import (
    EXPERIMENT_OVERRIDES_HELP,
    OVERRIDES_HELP,
    add_command,
    add_experiment,
    new_parser,
)
from moe_testbed.launcher.errors import (
    ASKED_TO_STOP,
    MENDABLE,
    WRONG_INPUT,
    AskedToStop,
    ConfigError,
    LostRankError,
    OtherRankError,
)

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
    errno.EROFS: "make it writable or choose another folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Exit status: 0 done, 1 a training failed, 2 wrong input, 75 a signal has stopped a training, 130 interrupted.
    """
    parser = build_parser()
    arguments, extra = parser.parse_known_args(argv)
    # argparse gives up on positional arguments that stand behind an option.
    overrides = getattr(arguments, "overrides", None)
    if extra and (overrides is None or any(text.startswith("-") for text in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if overrides is not None:
        overrides.extend(extra)
    return guarded(lambda: int(arguments.run(arguments) or 0))


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; what a user can mend becomes one line on stderr."""
    try:
        return command()
    except (*MENDABLE, OtherRankError) as error:
        return _complain(str(error))
    except AskedToStop as stop:
        print(f"moe-testbed: {stop}; the same command continues", file=sys.stderr)
        return ASKED_TO_STOP
    except LostRankError:
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except OSError as error:
        if error.errno is None or not (error.filename or error.errno in REMEDIES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = REMEDIES.get(error.errno, "correct this path")
        return _complain(f"{error.strerror}{where}: {remedy}, then repeat the command; what is finished is kept")


def _complain(message: str) -> int:
    print(f"moe-testbed: {' '.join(message.split())}", file=sys.stderr)
    return WRONG_INPUT


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = new_parser(
        "Compare mixture-of-experts routers with a reference router on real, labelled domains.",
        """
        moe-testbed compare configs/suites/demo.yaml        train eight runs and write a report
        moe-testbed train configs/experiments/tiny.yaml     train one
        moe-testbed config show configs/experiments/tiny.yaml
        """,
    )
    # The deepspeed launcher gives it to every process; the environment variable LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

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

    add_cluster_commands(commands)
    _add_analyze_command(commands)
    _add_data_commands(commands)
    _add_router_commands(commands)

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
    return parser


def _add_analyze_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from moe_testbed.launcher.cli.analyze import add_options

    analyze = add_command(
        commands,
        "analyze",
        "analyse the routing of existing checkpoints",
        "Record how checkpoints route the labelled text of a mix, and write the same report as for a suite. Ends with "
        "status 1 if a checkpoint failed and others did not.",
        """
        moe-testbed analyze --checkpoint models/OLMoE-1B-7B --mix configs/mixes/packages8.yaml
        moe-testbed analyze --checkpoint runs/demo/top_k_global-seed1 --mix configs/mixes/languages_udhr.yaml
        """,
        _analyze,
    )
    add_options(analyze)


def _add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = add_command(
        commands, "data", "build and look at the data of a mix", "Build and look at the data of a mix.", None, None
    )
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, description in (
        (
            "build",
            "download, clean and tokenise a mix",
            "Download, clean, split and tokenise a mix. What is there is not built again.",
        ),
        (
            "show",
            "print samples, token counts and licences",
            "Print a sample, the token counts and the licence of every domain.",
        ),
        (
            "check",
            "measure how distinguishable the domains are",
            "Measure with a linear classifier how distinguishable the domains are.",
        ),
    ):
        command = add_command(
            data_commands, name, summary, description, f"moe-testbed data {name} configs/mixes/packages8.yaml", _data
        )
        command.set_defaults(action=name)
        command.add_argument("mix", metavar="MIX", help="YAML file of a mix, such as configs/mixes/packages8.yaml")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES_HELP.format("vocab_size=4096"))
        command.add_argument(
            "--cache-dir",
            type=Path,
            default=Path("data_cache"),
            metavar="DIR",
            help="downloads and token stores (default: data_cache)",
        )


def _add_router_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    router = add_command(commands, "router", "try routers", "Try routers.", None, None)
    router_commands = router.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = add_command(
        router_commands,
        "check",
        "check that routers keep their promises",
        "Try routers on small random problems: shapes, gradients, causality, determinism, state, precision, padding. "
        "Says of each property whether it holds. Ends with status 1 if a router does not do what it says of itself.",
        """
        moe-testbed router check top_k
        moe-testbed router check configs/examples/nearest_vector.py:NearestVector sharpness=4.0
        moe-testbed router check --all
        """,
        _router_check,
    )
    check.add_argument("--all", action="store_true", help="all built-in routers")
    check.add_argument(
        "overrides",
        nargs="*",
        metavar="NAME|OPTION=VALUE",
        help="names of routers (built in, of an installed package, package.module:Class, or path/to/file.py:Class) and "
        "options for all of them (VALUE is YAML)",
    )


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

    train(config, run_dir)


def _compare(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.config.suite import load_suite
    from moe_testbed.launcher.suites.compare import compare

    return compare(load_suite(arguments.suite, arguments.overrides), arguments.runs_dir, arguments.jobs)


def _report(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.report import print_comparison, print_report

    if len(arguments.suite_dirs) > 1:
        print_comparison(arguments.suite_dirs, arguments.out)
    elif arguments.out is None:
        print_report(arguments.suite_dirs[0])
    else:
        raise ConfigError("--out is the folder of a comparison: give a second suite, or leave --out away")


def _analyze(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cli.analyze import run

    return run(arguments)


def _config_show(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.config.experiment import explain_experiment

    print(explain_experiment(arguments.experiment, arguments.overrides), end="")


def _data(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.cli import data as data_commands
    from moe_testbed.launcher.config.mix import load_mix

    mix = load_mix(arguments.mix, arguments.overrides)
    getattr(data_commands, arguments.action)(mix, arguments.cache_dir)


def _router_check(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cli.router import check_routers

    return check_routers(arguments.overrides, arguments.all)
