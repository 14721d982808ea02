"""Errors that a user can cause and mend; the command line prints them as one line and exits with status 2."""

from moe_testbed.data.errors import DataError
from moe_testbed.routing.errors import RouterError

WRONG_INPUT = 2
"""Exit status of the command line after one of these errors."""

ASKED_TO_STOP = 75
"""Exit status of a training that a signal has stopped, and that the same command continues (EX_TEMPFAIL)."""


class ConfigError(ValueError):
    """A configuration is wrong: the message names where, the value, what is allowed and how to mend it."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit the configuration."""


class OtherRankError(RuntimeError):
    """Another rank ended for one of these errors, and this one cannot go on without it; the message is its reason."""


class LostRankError(RuntimeError):
    """A rank has died, hangs or cannot be reached; the message names it, its host and the step. Told already, by one
    of the others."""


class AskedToStop(Exception):
    """A signal has asked the training to stop; a checkpoint is written, and the same command continues."""


MENDABLE = (CheckpointError, ConfigError, DataError, RouterError)
"""What a user can mend, on the rank that meets it."""
