"""The command `export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_testbed.launcher.cli.parts import Commands, add_command, add_trust


def add_export_command(commands: Commands) -> None:
    """Adds `export` to the command line."""
    command = add_command(
        commands,
        "export",
        "write a run's model for transformers",
        "Write the newest checkpoint of a run as a folder of the Hugging Face hub's format: model, tokenizer and model "
        "card. It is loaded with transformers and compared with the run before it gets its name.",
        """
        moe-testbed export runs/mlm-seed1 --out models/mlm
        """,
        _export,
    )
    command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder that is written")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    command.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="downloads and token stores (default: the run's own)"
    )
    add_trust(command)


def _export(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises what `export.export` does."""
    from moe_testbed.launcher.export.export import export

    class_name = export(
        arguments.run_folder,
        arguments.out,
        arguments.cache_dir,
        lambda text: print(text, file=sys.stderr),
        arguments.overwrite,
        arguments.trust,
    )
    print(f"{arguments.out}: {class_name}")
