"""What the commands of the command line are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse has no public name for it

EXPERIMENT_HELP = "YAML file; also one that comes with the package, such as configs/experiments/tiny.yaml"
OVERRIDES_HELP = "values that replace the file's, such as {} (VALUE is YAML)"
EXPERIMENT_OVERRIDES_HELP = OVERRIDES_HELP.format("training.steps=100; routing.balance.LABEL=null takes a balancer out")


def add_experiment(command: argparse.ArgumentParser) -> None:
    """Adds the arguments for an experiment's file and its overrides."""
    command.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=EXPERIMENT_OVERRIDES_HELP)


def add_trust(command: argparse.ArgumentParser) -> None:
    """Adds the option that lets a command take code from what others have written."""
    command.add_argument(
        "--trust",
        action="store_true",
        help="run code that runs may hold which others own or can write; these are refused otherwise",
    )


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    description: str,
    examples: str | None,
    run: Callable[[argparse.Namespace], int | None] | None,
) -> argparse.ArgumentParser:
    """Adds a command. ``run`` gets the parsed arguments and returns the exit status; None where commands follow."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, **_texts(description, examples))
    if run is not None:
        added.set_defaults(run=run)
    return added


def new_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Returns the parser of `moe-testbed` itself."""
    return argparse.ArgumentParser(prog="moe-testbed", **_texts(description, examples))


def _texts(description: str, examples: str | None) -> dict[str, Any]:
    lines = [f"  {line.strip()}" for line in (examples or "").strip().splitlines()]
    return {
        "description": description,
        "epilog": "\n".join(["examples:", *lines]) if lines else None,
        "formatter_class": _Formatter,
        "allow_abbrev": False,
    }


class _Formatter(argparse.HelpFormatter):
    """Wraps descriptions and leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)
