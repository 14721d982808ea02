"""What the ranks do: run the command line, as the process that the launcher started would."""

from __future__ import annotations

import contextlib
import io
import os
from importlib import metadata
from typing import Any

from moe_testbed.launcher.cli.main import main


def run_cli(folder: str, arguments: list[str], entry_points: dict[str, str]) -> tuple[int, str]:
    """Status and stderr of ``moe-testbed ARGUMENTS`` in a working directory.

    Args:
        entry_points: of group moe_testbed.routers, beside those of the installed packages.
    """
    os.chdir(folder)
    real = metadata.entry_points

    def with_ours(**selection: Any) -> Any:
        found = real(**selection)
        if selection.get("group") != "moe_testbed.routers":
            return found
        return [*found, *(metadata.EntryPoint(*pair, "moe_testbed.routers") for pair in entry_points.items())]

    metadata.entry_points = with_ours
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(arguments)
    return status, stderr.getvalue()
