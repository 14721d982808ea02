"""Whose a run is. What can hold code, a pickle or the name of a module, is taken from the user's own runs only."""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_testbed.launcher.errors import ConfigError

_CODE = "the checkpoints of a run can hold code and its config can name some, which would run as yours"


def refuse_foreign(folder: Path, config_file: Path, checkpoints: Path) -> None:
    """Raises ConfigError if another user owns a run's folder, its config, its checkpoints, or a link to one of them, or
    may write there."""
    below = [path for checkpoint in _inside(checkpoints) for path in (checkpoint, *_inside(checkpoint))]
    paths = (folder, config_file, checkpoints, *below)
    strangers: dict[int, Path] = {}
    for path, owner in _owners(paths):
        if owner != os.geteuid():
            strangers.setdefault(owner, path)
    if strangers:
        strangers.pop(_own_number_in(folder), None)
    for owner, path in strangers.items():
        raise ConfigError(
            f"{path} belongs to {_name(owner)}, and you are {_name(os.geteuid())}: {_CODE}; choose another folder, or "
            f"give --trust if you trust {_name(owner)}"
        )
    for path in paths:
        writers = _writers(path)
        if writers is not None and _keeps_modes(folder):
            raise ConfigError(
                f"{path} can be written by {writers}: {_CODE}; if nobody but you has written there, chmod -R go-w "
                f"{shlex.quote(str(path))}, or give --trust if you trust {writers}"
            )


def refuse_foreign_code(config: Mapping[str, Any], folder: Path, config_file: Path, checkpoints: Path) -> None:
    """Does what `refuse_foreign` does if a run's config names code: for whoever reads its weights as weights only.

    Args:
        config: what stands in the run's config, unchecked, since a check imports what it names.
    """
    if any(":" in text for text in _texts(config.get("routing"))):
        refuse_foreign(folder, config_file, checkpoints)


@contextmanager
def writable_by_owner() -> Iterator[None]:
    """Lets this process make files and folders that only their owner can write, so that `refuse_foreign` takes them."""
    mask = os.umask(0o077)
    os.umask(mask | stat.S_IWGRP | stat.S_IWOTH)
    try:
        yield
    finally:
        os.umask(mask)


def _texts(tree: Any) -> Iterator[str]:
    """Yields all keys and values of a tree: where there is a colon, one names a class of other people's modules."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    else:
        yield str(tree)


def _owners(paths: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Yields the paths that are there, and the numbers of their owners: of a link, and of what it leads to."""
    for path in paths:
        for follow in (False, True):
            try:
                yield path, _owner(path, follow)
            except FileNotFoundError:
                continue


def _owner(path: Path, follow: bool) -> int:
    return os.stat(path, follow_symlinks=follow).st_uid


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _writers(path: Path) -> str | None:
    """Returns who may write a file or folder, or what a link leads to, beside its owner; None if nobody may."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if status.st_mode & stat.S_ISVTX and stat.S_ISDIR(status.st_mode):
        # As in /tmp: what others lay into it is theirs, and what is there they cannot replace.
        return None
    if status.st_mode & stat.S_IWOTH:
        return "every user"
    return _other_members(status.st_gid) if status.st_mode & stat.S_IWGRP else None


def _other_members(number: int) -> str | None:
    """Returns what to call the users of a group; None if the user is alone in it, as in a group of the user's own name,
    which many systems give to each. A group that the system does not know is one of storage in a container."""
    try:
        group = grp.getgrgid(number)
    except KeyError:
        return None
    user = _name(os.geteuid())
    return None if group.gr_name == user and set(group.gr_mem) <= {user} else f"the group {group.gr_name}"


def _own_number_in(folder: Path) -> int:
    """Returns who owns a file that this process makes there. Shares give files to others: NFS those of root to nobody,
    a mount of Windows all files to one user."""
    own = _own_file_in(folder)
    return os.geteuid() if own is None else own.st_uid


def _keeps_modes(folder: Path) -> bool:
    """Tells whether a file that only its owner may write is one there: on a mount of Windows all may write all."""
    own = _own_file_in(folder)
    return own is None or not own.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _own_file_in(folder: Path) -> os.stat_result | None:
    """Returns what the system says of a file that this process makes there, for itself alone; None if it cannot."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno())
    except OSError:
        return None


def _name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
