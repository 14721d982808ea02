"""Errors that a user can cause and mend; the command line prints them as one line and exits with status 2."""


class ConfigError(ValueError):
    """A configuration is wrong: the message names where, the value, what is allowed and how to mend it."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit the configuration."""
