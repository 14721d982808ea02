"""The mark of a checkpoint, and that whoever reads it or a run's folder waits for no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_testbed.launcher.run.checkpoint_mark import (
    CheckpointMark,
    checkpoint_path,
    checkpoints_in,
    newest_marked_step,
    read_mark,
    write_mark,
)


def test_a_mark_is_read_as_it_was_written_and_has_the_form_of_old(tmp_path: Path) -> None:
    mark = CheckpointMark(7, {"ranks": 2, "expert_parallel_size": 1}, {"a.pt": 3})
    checkpoint = checkpoint_path(tmp_path, 7)
    checkpoint.mkdir()
    write_mark(checkpoint, mark)
    assert read_mark(checkpoint) == mark
    assert json.loads((checkpoint / "complete.json").read_text()) == {
        "step": 7,
        "layout": {"ranks": 2, "expert_parallel_size": 1},
        "files": {"a.pt": 3},
    }


UNREADABLE = [
    None,
    "",
    "{}",
    '{"step": 7, "files": [1]}',
    '{"step": 7, "files": {',
    '{"step": 7, "layout": 2, "files": {}}',
    # One digit has changed: it is not the step of the folder's name.
    '{"step": 3, "files": {}}',
    '{"step": "7", "files": {}}',
    '{"step": 7, "files": {"a.pt": "3"}}',
    '{"step": 7, "files": {}, "layout": {"ranks": [2]}}',
]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_mark_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    checkpoint = checkpoint_path(tmp_path, 7)
    checkpoint.mkdir()
    if content is not None:
        (checkpoint / "complete.json").write_text(content)
    assert read_mark(checkpoint) is None


def test_the_newest_marked_step(tmp_path: Path) -> None:
    assert newest_marked_step(tmp_path / "nowhere") == 0
    for step in (9, 100, 2):
        checkpoint_path(tmp_path, step).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000002", "step_00000009", "step_00000100"]
    assert newest_marked_step(tmp_path) == 0
    for step in (2, 9):
        write_mark(checkpoint_path(tmp_path, step), CheckpointMark(step))
    assert newest_marked_step(tmp_path) == 9


def test_only_names_of_steps_are_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """A user copies a checkpoint beside it, under a name of theirs; it neither counts nor is removed."""
    for step in (10**8, 99_999_999, 7):
        write_mark(made(checkpoint_path(tmp_path, step)), CheckpointMark(step))
    for copy in ("00000007_before", "00000009.bak", "00000011 (copy)", "latest", "9", "000000012", "²", "\u0663"):
        write_mark(made(tmp_path / f"step_{copy}"), CheckpointMark(9))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000007", "step_99999999", "step_100000000"]
    assert newest_marked_step(tmp_path) == 10**8


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_reading_a_folder_imports_no_torch() -> None:
    modules = ("run.checkpoint_mark", "run.folder", "run.suite_folder", "cluster.slurm.ending")
    script = "; ".join(["import sys", *(f"import moe_testbed.launcher.{name}" for name in modules)])
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit('torch' in sys.modules)"], timeout=60, check=False
    )
    assert done.returncode == 0
