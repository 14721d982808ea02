"""The folders of checkpoints and the mark that makes one whole, for whoever need not load it: no torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeGuard

from moe_testbed.launcher.run.files import read_json, write_atomically
from moe_testbed.launcher.run.steps import STEP, in_order, step_name, step_of

_MARK = "complete.json"


@dataclass(frozen=True)
class CheckpointMark:
    """What is written into a checkpoint's folder last.

    Attributes:
        step: optimizer steps completed.
        layout: how the model was spread over ranks, as `checkpoint.regroup.RankLayout` has it.
        files: name -> size in bytes of every file of the checkpoint.
    """

    step: int
    layout: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)


def write_mark(checkpoint: Path, mark: CheckpointMark) -> None:
    """Makes a checkpoint whole."""
    write_atomically(checkpoint / _MARK, json.dumps(asdict(mark), indent=1) + "\n")


def read_mark(checkpoint: Path) -> CheckpointMark | None:
    """Returns the mark of a checkpoint; None if it has none that can be read."""
    content = read_json(checkpoint / _MARK)
    step, layout, files = content.get("step"), content.get("layout", {}), content.get("files")
    if step != step_of(checkpoint) or not _are_numbers(layout) or not _are_numbers(files):
        return None
    return CheckpointMark(step, layout, files)


def _are_numbers(content: object) -> TypeGuard[dict[str, int]]:
    return isinstance(content, dict) and all(type(value) is int for value in content.values())


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after so many optimizer steps."""
    return checkpoints / step_name(step)


def checkpoints_in(checkpoints: Path) -> list[Path]:
    """Returns the folders of the checkpoints, whole or not, in the order of their steps."""
    return in_order(checkpoints.glob(f"{STEP}*"), "")


def newest_marked_step(checkpoints: Path) -> int:
    """Returns the step of the newest checkpoint that has a mark, whose files are not looked at; 0 if there is none."""
    marked = (checkpoint for checkpoint in checkpoints_in(checkpoints) if (checkpoint / _MARK).exists())
    return max(map(step_of, marked), default=0)
