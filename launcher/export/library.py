"""Imports transformers, which is an extra."""

from __future__ import annotations

from typing import Any

from moe_testbed.launcher.errors import ConfigError


def import_transformers(what: str) -> Any:
    """Imports it without its progress bars and notes. Raises ConfigError, which says what needs it, if it is not
    there."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{what} need transformers, which is not installed; pip install 'moe-testbed[checkpoints]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
