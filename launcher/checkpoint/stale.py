"""Tells whether a run has started from weights that the run it starts from has no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_testbed.launcher.checkpoint.checkpoints import newest_whole
from moe_testbed.launcher.checkpoint.weights import digest, stamp
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder


def has_started(run: RunFolder) -> bool:
    """Tells whether a run that starts from another one has gone on from its first weights: it needs them no more."""
    return run.read_start() is not None and (run.is_finished or newest_whole(run.checkpoints) is not None)


def refuse_stale(run: RunFolder, parent: RunFolder) -> None:
    """Refuses a run that has started from other weights than the run in the other folder has now.

    A parent that is gone, or is being trained anew, says nothing. Weights are read only where their files are not the
    ones any more that the run has started from.

    Raises:
        ConfigError: it has; one line.
    """
    if not has_started(run) or not parent.is_finished:
        return
    checkpoint = newest_whole(parent.checkpoints)
    if checkpoint is not None:
        refuse_changed(run, parent.path, stamp(checkpoint), lambda: digest(checkpoint), "trained anew")


def refuse_changed(run: RunFolder, parent: Path, stamp: str, digest: Callable[[], str], what_was_done: str) -> None:
    """Refuses a run that has started from other weights than those of this stamp and digest.

    Args:
        parent: the folder that holds them.
        digest: reads them; it is called only where the stamp is another one.

    Raises:
        ConfigError: it has; one line.
    """
    start = run.read_start()
    if start is None or stamp == start.stamp or digest() == start.digest:
        return
    raise ConfigError(
        f"{run.path} has started from {parent}, which has been {what_was_done} since, with other weights: it is stale; "
        f"remove {run.path.name} to train it anew, or put the former {parent.name} back"
    )
