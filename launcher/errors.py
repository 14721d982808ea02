"""Errors that a user can cause and mend; the command line prints them as one line and exits with status 2."""

WRONG_INPUT = 2
"""Exit status of the command line after one of these errors."""


class ConfigError(ValueError):
    """A configuration is wrong: the message names where, the value, what is allowed and how to mend it."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit the configuration."""
