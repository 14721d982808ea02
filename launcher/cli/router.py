"""The command `router check`."""

from __future__ import annotations

import argparse

from moe_testbed.launcher.cli.parts import Commands, add_command


def add_router_commands(commands: Commands) -> None:
    """Adds `router check` to the command line."""
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


def _router_check(arguments: argparse.Namespace) -> int:
    from moe_testbed.launcher.cli.router_check import check_routers

    return check_routers(arguments.overrides, arguments.all)
