"""Tells whether a run has started from weights that the run it starts from has no more."""

from __future__ import annotations

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
    start, checkpoint = run.read_start(), newest_whole(parent.checkpoints)
    if start is None or checkpoint is None or stamp(checkpoint) == start.stamp or digest(checkpoint) == start.digest:
        return
    raise ConfigError(
        f"{run.path} has started from {parent.path}, which has been trained anew since, with other weights: it is "
        f"stale; remove {run.path.name} to train it anew, or put the former {parent.path.name} back"
    )
