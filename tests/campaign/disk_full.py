"""A full disk: a command runs out of space at some byte. It says so in one line; with space it comes to its end."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.campaign.commands import complaint, copied, difference, outcome, prepare, run
from tests.campaign.trials import Part, Trial

WORLDS = {
    "build": (),
    "train": ("build",),
    "report": ("build", "compare"),
    "analyze": ("build", "train"),
    "sync": ("build", "train"),
}


class DiskFull(Part):
    """A trial is a command, and how much space it has of what it takes. Only root can make a small disk of memory."""

    name = "disk_full"
    number = 100

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if os.geteuid() != 0:
            raise SystemExit("disk_full makes small disks by mount, which needs root; leave it out by --parts")
        self._whole: dict[str, tuple[Path, int, dict[str, Any]]] = {}

    def draw(self, generator: random.Random) -> Trial:
        return {"command": generator.choice(list(WORLDS)), "space": generator.random()}

    def fault(self, trial: Trial) -> str | None:
        command = trial["command"]
        world, needed, expected = self._of(command)
        disk = self.folder / "disk"
        with _disk(disk):
            folder = copied(world, disk / "world")
            _resize(disk, _used(folder) + int(trial["space"] * needed))
            result = run(command, folder, TMPDIR=str(self.folder))
            # sync may end with status 1: the store has missed something.
            missed = command == "sync" and result.returncode == 1 and "Traceback" not in result.stderr
            if not missed and (wrong := complaint(result)):
                return wrong
            _resize(disk, 1 << 30)
            again = run(command, folder)
            if wrong := complaint(again):
                return f"with space again: {wrong}"
            if again.returncode:
                return f"with space again: {again.stderr[-300:]}"
            return difference(outcome(command, folder), expected)

    def _of(self, command: str) -> tuple[Path, int, dict[str, Any]]:
        """Returns the world before a command, the bytes that it adds, and what it makes."""
        if command not in self._whole:
            world = prepare(self.folder / command, *WORLDS[command])
            folder = copied(world, self.folder / "undisturbed")
            result = run(command, folder)
            assert result.returncode == 0, result.stderr
            self._whole[command] = (world, _used(folder) - _used(world), outcome(command, folder))
        return self._whole[command]


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A disk of memory at a folder; `_resize` gives it its size."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "campaign", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def _used(folder: Path) -> int:
    """Returns the bytes of a folder on a disk whose blocks have 4096."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))
