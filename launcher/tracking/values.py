"""Makes texts that a tracking store takes of values. Nothing here knows MLflow."""

from __future__ import annotations

import json
from typing import Any

MAX_PARAMETER_LENGTH, MAX_TAG_LENGTH = 6000, 8000
OLDER_LENGTHS = (5000, 500, 250)
"""What older versions of MLflow take of a value; they refuse the whole batch for one that is longer."""


def as_text(value: Any) -> str:
    """Returns a value of a config as a parameter's text."""
    return shortened(value if isinstance(value, str) else json.dumps(value, default=str), MAX_PARAMETER_LENGTH)


def shortened(text: str, length: int) -> str:
    """Returns the text, its end replaced by … if it is longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
