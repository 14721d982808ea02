"""What may name a folder, and how the trainings of one label are told apart: LABEL-seedSEED."""

from __future__ import annotations

import re

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of names that are a part of the names of folders and files."""


def training_name(label: str, seed: int) -> str:
    """Returns the name of a training, which is that of its folder in a suite's."""
    return f"{label}-seed{seed}"


def label_and_seed(name: str) -> tuple[str, int] | None:
    """Returns what `training_name` has put into a name; None if it is no such name."""
    match = re.fullmatch(r"(.+)-seed(\d+)", name)
    return (match[1], int(match[2])) if match else None
