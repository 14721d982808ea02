"""Archives are read as archives: members by glob, never unpacked to disk, never installed, never executed."""

import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_testbed.data.errors import DataError


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Returns the pattern of a glob over paths: `*` and `?` stay in a folder, `**/` spans folders, `[sS]` is a set."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    translations = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(translations.get(p) or (p if p.startswith("[") else re.escape(p)) for p in pieces))


def read_members(
    archive: Path, include: Sequence[str], exclude: Sequence[str] = (), max_member_bytes: int | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yields (path inside the archive, content) of the chosen members in the archive's own order.

    archive: a zip (wheel) or a gzipped tar (npm; paths are given below its root folder).
    max_member_bytes: larger members are skipped (generated files).
    Raises DataError if the archive is damaged or nothing matches.
    """
    wanted = [glob_pattern(glob) for glob in include]
    unwanted = [glob_pattern(glob) for glob in exclude]

    def chosen(path: str, size: int) -> bool:
        if max_member_bytes is not None and size > max_member_bytes:
            return False
        return any(p.fullmatch(path) for p in wanted) and not any(p.fullmatch(path) for p in unwanted)

    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    found = False
    try:
        for path, content in members(archive, chosen):
            found = True
            yield path, content
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive.name} is damaged ({error}): delete {archive} and build again") from error
    if not found:
        raise DataError(f"{archive.name} has no member that matches {', '.join(include)}: correct `members`")


def _zip_members(archive: Path, chosen: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir() and chosen(info.filename, info.file_size):
                yield info.filename, opened.read(info)


def _tar_members(archive: Path, chosen: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, mode="r:gz") as opened:
        for info in opened:
            path = info.name.partition("/")[2]
            content = opened.extractfile(info) if info.isfile() and chosen(path, info.size) else None
            if content is not None:
                yield path, content.read()
