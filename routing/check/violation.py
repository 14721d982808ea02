"""How a check of a router's properties says no."""

from __future__ import annotations

import traceback


class Violation(Exception):
    """A router does not do what it promises; the message says what, and how to mend it."""


def told(error: Exception) -> str:
    """An unexpected error in one line, with the place where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text[:300]} ({frames[-1].filename}:{frames[-1].lineno})"
