"""The commands `data build`, `data show` and `data check`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_testbed.launcher.cli.parts import OVERRIDES_HELP, Commands, add_command

if TYPE_CHECKING:
    from moe_testbed.data.config import MixConfig
    from moe_testbed.data.tokens.store import Store


def add_data_commands(commands: Commands) -> None:
    """Adds the three to the command line."""
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


def _data(arguments: argparse.Namespace) -> None:
    from moe_testbed.launcher.config.mix import load_mix

    command = {"build": build, "show": show, "check": check}[arguments.action]
    command(load_mix(arguments.mix, arguments.overrides), arguments.cache_dir)


def build(mix: MixConfig, cache_dir: Path) -> None:
    """Builds the store where it is missing and prints its folder."""
    print(_open(mix, cache_dir).path)


def show(mix: MixConfig, cache_dir: Path) -> None:
    """Prints counts, licences and samples."""
    from moe_testbed.data.inspect import describe_documents, describe_store
    from moe_testbed.data.texts import read_texts

    if mix.evaluation_only:
        print(describe_documents(read_texts(mix, cache_dir, _log)))
    else:
        print(describe_store(_open(mix, cache_dir)))


def check(mix: MixConfig, cache_dir: Path) -> None:
    """Prints how well a linear classifier tells the domains apart."""
    from moe_testbed.data.inspect import check_domains

    print(check_domains(_open(mix, cache_dir)))


def _open(mix: MixConfig, cache_dir: Path) -> Store:
    from moe_testbed.data.build import build_store

    return build_store(mix, cache_dir, _log)


def _log(text: str) -> None:
    print(text, file=sys.stderr)
