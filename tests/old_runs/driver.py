"""What a child does: continue a run as its user would."""

from __future__ import annotations

import os

from moe_testbed.launcher.cli.main import main


def resume(folder: str) -> int:
    """Runs the command that `stopped` was begun with, in the folder where it was."""
    os.chdir(folder)
    return main(["train", "old.yaml", "--run-dir", "stopped"])
