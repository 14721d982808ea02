"""Archives are read as archives: members by glob, never unpacked to disk, never installed, never executed."""

import gzip
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from moe_testbed.data.errors import DISK_FULL, DataError
from moe_testbed.data.readers.streams import DAMAGED


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold at most; more is taken for one that was made to fill memory or disk.

    ratio: bytes unpacked for each byte of the archive, looked at from `least` unpacked bytes on: text packs to a
    fifth, a table of zeros to a thousandth.
    """

    members: int = 500_000
    unpacked: int = 1 << 36
    ratio: int = 200
    least: int = 1 << 26


BOUNDS = Bounds()


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Returns the pattern of a glob over paths: `*` and `?` stay in a folder, `**/` spans folders, `[sS]` is a set."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    translations = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(translations.get(p) or (p if p.startswith("[") else re.escape(p)) for p in pieces))


def read_members(
    archive: Path,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    max_member_bytes: int | None = None,
    bounds: Bounds = BOUNDS,
) -> Iterator[tuple[str, BinaryIO]]:
    """Yields (path inside the archive, content) of the chosen members in the archive's own order.

    The content is a stream, to be read before the next member is asked for; no member is held as a whole.

    archive: a zip (wheel) or a gzipped tar (npm; paths are given below its root folder).
    max_member_bytes: larger members are skipped (generated files).
    Raises DataError if the archive is damaged, exceeds the bounds, or if nothing matches.
    """
    wanted = [glob_pattern(glob) for glob in include]
    unwanted = [glob_pattern(glob) for glob in exclude]

    def chosen(path: str, size: int) -> bool:
        if max_member_bytes is not None and size > max_member_bytes:
            return False
        return any(p.fullmatch(path) for p in wanted) and not any(p.fullmatch(path) for p in unwanted)

    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    found = False
    with damage_told(archive):
        for path, content in members(archive, chosen, _Meter(archive, bounds)):
            found = True
            yield path, cast(BinaryIO, content)
    if not found:
        raise DataError(f"{archive.name} has no member that matches {', '.join(include)}: correct `members`")


@contextmanager
def damage_told(archive: Path) -> Iterator[None]:
    """Turns what reading a damaged archive raises into DataError."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise DataError(f"{archive.name} is damaged ({error}): delete {archive} and build again") from error


class _Meter:
    """Counts what comes out of an archive. Raises DataError if it is more than the bounds allow."""

    def __init__(self, archive: Path, bounds: Bounds) -> None:
        self._archive, self._bounds = archive, bounds
        self._size = archive.stat().st_size
        self._members = self._unpacked = 0

    def add_member(self) -> None:
        self._members += 1
        if self._members > self._bounds.members:
            raise self._refusal(f"more than {self._bounds.members:,} members")

    def add_bytes(self, count: int) -> None:
        self._unpacked += count
        if self._unpacked > self._bounds.unpacked:
            raise self._refusal(f"more than {self._bounds.unpacked:,} bytes unpacked")
        if self._unpacked > max(self._bounds.least, self._size * self._bounds.ratio):
            raise self._refusal(f"more than {self._bounds.ratio} bytes unpacked for each byte of its {self._size:,}")

    def _refusal(self, reason: str) -> DataError:
        return DataError(
            f"{self._archive.name} holds {reason}, as an archive does that is made to fill memory or disk: it is not "
            "read; take this package out of the mix"
        )


class _Metered(io.RawIOBase):
    """A stream whose bytes are counted before they are handed on."""

    def __init__(self, stream: IO[bytes], meter: _Meter) -> None:
        self._stream, self._meter = stream, meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        self._meter.add_bytes(len(content))
        buffer[: len(content)] = content
        return len(content)


def _zip_members(
    archive: Path, chosen: Callable[[str, int], bool], meter: _Meter
) -> Iterator[tuple[str, io.BufferedReader]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            meter.add_member()
            if not info.is_dir() and chosen(info.filename, info.file_size):
                try:
                    member = opened.open(info)
                except RuntimeError as error:  # it is encrypted, or compressed in a way that zipfile does not know
                    raise zipfile.BadZipFile(str(error)) from error
                with member:
                    yield info.filename, io.BufferedReader(_Metered(member, meter), 1 << 16)


def _tar_members(archive: Path, chosen: Callable[[str, int], bool], meter: _Meter) -> Iterator[tuple[str, IO[bytes]]]:
    # All that is unpacked is counted, members that are skipped and headers too: they come from the same stream.
    with (
        gzip.open(archive) as unzipped,
        io.BufferedReader(_Metered(cast(IO[bytes], unzipped), meter), 1 << 16) as counted,
        tarfile.open(fileobj=counted, mode="r|") as opened,
    ):
        for info in opened:
            meter.add_member()
            path = info.name.partition("/")[2]
            content = opened.extractfile(info) if info.isfile() and chosen(path, info.size) else None
            if content is not None:
                yield path, content
