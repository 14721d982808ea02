"""Saves and restores checkpoints, each of which is whole or does not count.

DeepSpeed writes the files of a checkpoint one after another. A checkpoint counts once its mark stands beside
them (`run.checkpoint_mark`), written last and listing every file with its size; anything else is a crash's leftover.

On the ranks that wrote it, training continues bit for bit; on others the optimizer's state is regrouped, and only the
order of sums changes.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_testbed.launcher.checkpoint.regroup import RankLayout, regroup
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.array_file import DAMAGED
from moe_testbed.launcher.run.checkpoint_mark import (
    CheckpointMark,
    checkpoint_path,
    checkpoints_in,
    read_mark,
    write_mark,
)
from moe_testbed.launcher.run.ownership import writable_by_owner

# How long a shared disk may take to show one host what another has written.
_SEEN_SECONDS = 60.0


def save(engine: Any, folder: Path, step: int, ranks: Ranks, expert_parallel_size: int) -> None:
    """Writes the state after ``step`` optimizer steps."""
    checkpoint = checkpoint_path(folder, step)
    if ranks.rank == 0:
        shutil.rmtree(checkpoint, ignore_errors=True)
    dist.barrier()
    try:
        with writable_by_owner():
            engine.save_checkpoint(str(folder), tag=checkpoint.name, client_state={"step": step}, save_latest=False)
    except RuntimeError as error:
        # torch.save has words of its own for a full disk.
        if "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{checkpoint} could not be written, {free:,} bytes are free there; make room and start the same command "
            "again: training continues from the checkpoint before"
        ) from error
    files = _written(checkpoint, ranks)
    if ranks.rank != 0:
        return
    _wait_for(files, checkpoint)
    with writable_by_owner():
        write_mark(checkpoint, CheckpointMark(step, asdict(RankLayout(ranks.size, expert_parallel_size)), files))


def remove_old(folder: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` whole checkpoints."""
    checkpoints = checkpoints_in(folder)
    kept = [one for one in checkpoints if _is_whole(one)][-keep:]
    for one in checkpoints:
        if one not in kept:
            # What a shared disk holds on to is no whole checkpoint any more, and goes with the next one.
            shutil.rmtree(one, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """Removes the checkpoint after so many optimizer steps, if there is one."""
    shutil.rmtree(checkpoint_path(folder, step), ignore_errors=True)


def _written(checkpoint: Path, ranks: Ranks) -> dict[str, int]:
    """Returns name and size of every file. Each host lists the files that it sees, since it sees its own at once."""
    if ranks.group is not None:
        dist.barrier(group=ranks.group)
    seen: dict[str, int] = {}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        seen = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    everywhere = [seen] * ranks.size
    if ranks.group is not None:
        dist.all_gather_object(everywhere, seen, group=ranks.group)
    return dict(sorted(item for files in everywhere for item in files.items()))


def _wait_for(files: Mapping[str, int], checkpoint: Path) -> None:
    """Returns when this process sees the files, as it does at once where all hosts are one.

    Raises:
        CheckpointError: it does not see them, and so would take a checkpoint for whole that it cannot read.
    """
    deadline = time.monotonic() + _SEEN_SECONDS
    while missing := [name for name, size in files.items() if not _has_size(checkpoint / name, size)]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{checkpoint}: {len(missing)} files that other hosts have written, such as {missing[0]}, are not seen "
                f"by rank 0 after {_SEEN_SECONDS:.0f} s; put the run's folder on a disk that all hosts share"
            )
        time.sleep(0.2)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except (OSError, ValueError):  # the mark may name a file as no file is named
        return False


def _is_whole(checkpoint: Path) -> bool:
    mark = read_mark(checkpoint)
    if mark is None or mark.layout.keys() != {one.name for one in fields(RankLayout)}:
        return False
    return all(_has_size(checkpoint / name, size) for name, size in mark.files.items())


def _is_sound(checkpoint: Path) -> bool:
    """Tells whether the files hold what was written: after a loss of power they may have their sizes and be empty, and
    a bit of theirs may have changed. Those of torch are archives with a checksum of each part, and nothing in them is
    compressed: one that holds more than its size was made to take for ever."""
    try:
        for path in checkpoint.glob("*.pt"):
            with zipfile.ZipFile(path) as archive:
                held = sum(member.file_size for member in archive.infolist())
                if held > path.stat().st_size or archive.testzip() is not None:
                    return False
    except (*DAMAGED, RuntimeError):
        return False
    return True


def restore(engine: Any, folder: Path, ranks: Ranks, expert_parallel_size: int) -> int:
    """Restores weights, optimizer and balancers from the newest whole checkpoint, whatever ranks have written it.

    Returns:
        Optimizer steps completed; 0 without a checkpoint.

    Raises:
        CheckpointError: the checkpoint has to be regrouped, but is damaged or does not fit the model.
    """
    # One rank chooses for all: on a shared disk two of them may not see the same files at the same moment.
    chosen = [newest_whole(folder) if ranks.rank == 0 else None]
    if ranks.group is not None:
        dist.broadcast_object_list(chosen, src=0, group=ranks.group)
    checkpoint = chosen[0]
    if checkpoint is None:
        return 0
    mark = read_mark(checkpoint)
    assert mark is not None, f"{checkpoint} was whole"
    step, written = mark.step, RankLayout(**mark.layout)
    present = RankLayout(ranks.size, expert_parallel_size)
    # In bfloat16 DeepSpeed prints the name of a function there.
    with contextlib.redirect_stdout(io.StringIO()):
        loaded, others = engine.load_checkpoint(str(folder), tag=checkpoint.name, load_module_only=written != present)
        assert loaded is not None, f"DeepSpeed found nothing to load in {checkpoint}"
        if written != present:
            if ranks.rank == 0:
                print(f"{checkpoint}: written by {written}, regrouped for {present}", file=sys.stderr)
            regroup(engine, checkpoint, written, present, ranks)
            engine.global_steps, engine.skipped_steps = step, others["skipped_steps"]
    return step


def newest_whole(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint among those of a run; None if there is none."""
    for checkpoint in reversed(checkpoints_in(folder)):
        if _is_whole(checkpoint) and _is_sound(checkpoint):
            return checkpoint
        print(f"{checkpoint} is not whole (cut off or damaged) and is passed over", file=sys.stderr)
    return None
