"""Whose a run is. What can hold code, a pickle or the name of a module, is taken from the user's own runs only."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_testbed.launcher.errors import ConfigError


def refuse_foreign(folder: Path, config_file: Path, checkpoints: Path) -> None:
    """Raises ConfigError if another user owns a run's folder, its config, its checkpoints, or a link to one of them.

    Who could merely write them is not asked: groups share folders, and only an owner tells who has.
    """
    strangers: dict[int, Path] = {}
    for path, owner in _owners(folder, config_file, checkpoints):
        if owner != os.geteuid():
            strangers.setdefault(owner, path)
    if strangers:
        strangers.pop(_own_number_in(folder), None)
    for owner, path in strangers.items():
        raise ConfigError(
            f"{path} belongs to {_name(owner)}, and you are {_name(os.geteuid())}: the checkpoints of a run can hold "
            "code and its config can name some, which would run as yours; choose another folder, or give --trust if "
            f"you trust {_name(owner)}"
        )


def _owners(folder: Path, config_file: Path, checkpoints: Path) -> Iterator[tuple[Path, int]]:
    """Yields what is there of a run, and the numbers of its owners: of a link, and of what it leads to."""
    below = [path for checkpoint in _inside(checkpoints) for path in (checkpoint, *_inside(checkpoint))]
    for path in (folder, config_file, checkpoints, *below):
        for follow in (False, True):
            try:
                yield path, _owner(path, follow)
            except FileNotFoundError:
                continue


def _owner(path: Path, follow: bool) -> int:
    return os.stat(path, follow_symlinks=follow).st_uid


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _own_number_in(folder: Path) -> int:
    """Returns who owns a file that this process makes there. Shares give files to others: NFS those of root to nobody,
    a mount of Windows all files to one user."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()


def _name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
