"""The names of what a run keeps for single optimizer steps: evaluations, probes and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

STEP = "step_"
"""What stands before the number in such a name."""


def step_name(step: int) -> str:
    """Returns the name of what was written after so many optimizer steps."""
    return f"{STEP}{step:08d}"


def step_of(path: Path) -> int:
    """Returns the step that `step_name` has put into a name."""
    return int(path.stem.removeprefix(STEP))


def steps_in(series: Path) -> list[Path]:
    """Returns the files of a folder that has one for each step that was looked at, in the order of their steps."""
    return in_order(series.glob(f"{STEP}*.npz"), ".npz")


def in_order(paths: Iterable[Path], suffix: str) -> list[Path]:
    """Returns those whose names are `step_name` and a suffix, in the order of their steps. What somebody has copied
    beside them under another name is none."""
    named = [path for path in paths if path.suffix == suffix and path.stem.removeprefix(STEP).isdecimal()]
    return sorted((path for path in named if path.stem == step_name(step_of(path))), key=step_of)
