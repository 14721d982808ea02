"""The `moe-testbed` command. Everything heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_testbed.launcher.cli.analyze import add_analyze_command
from moe_testbed.launcher.cli.cluster import add_cluster_commands
from moe_testbed.launcher.cli.data import add_data_commands
from moe_testbed.launcher.cli.export import add_export_command
from moe_testbed.launcher.cli.parts import new_parser
from moe_testbed.launcher.cli.probe import add_probe_command
from moe_testbed.launcher.cli.router import add_router_commands
from moe_testbed.launcher.cli.training import add_config_command, add_training_commands
from moe_testbed.launcher.errors import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Exit status: 0 done, or one of those in :mod:`moe_testbed.launcher.errors`.
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


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands and their options."""
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
    add_training_commands(commands)
    add_cluster_commands(commands)
    add_analyze_command(commands)
    add_export_command(commands)
    add_probe_command(commands)
    add_data_commands(commands)
    add_router_commands(commands)
    add_config_command(commands)
    return parser
