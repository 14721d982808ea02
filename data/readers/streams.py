"""Files as streams of plain bytes: what is compressed, and how, is told by the content, never by the name."""

import bz2
import codecs
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

HEAD_BYTES = 264
MOST_COPIED_BYTES = 1 << 32

DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading raises if the disk fails, or if compressed content is damaged or was cut off."""


def _zstandard(file: BinaryIO) -> BinaryIO:
    # The standard library has it from Python 3.14 on; pyarrow comes with `datasets`.
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


def _gzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))


def _bzip2(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(file))


def _xz(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(file))


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[BinaryIO], BinaryIO]], ...] = (
    (b"\x1f\x8b\x08", _gzip),
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _xz),
    (b"\x28\xb5\x2f\xfd", _zstandard),
    *((bytes([0x50 + n]) + b"\x2a\x4d\x18", _zstandard) for n in range(16)),
)
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ARCHIVES = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"%PDF-", "a PDF file"),
    (0, b"\x1f\x9d", "compressed by `compress`"),
    (0, b"\x04\x22\x4d\x18", "compressed by LZ4"),
)


def plain(file: BinaryIO) -> BinaryIO:
    """Returns the content of a file decompressed, and as UTF-8 if a byte-order mark says that it is UTF-16 or UTF-32.

    Nothing but a buffer is held, whatever the file unpacks to. Raises ValueError if the file is of a kind that no
    reader reads; reading the stream raises one of DAMAGED.
    """
    file = _buffered(file)
    head = peek(file)
    for magic, decompressor in _DECOMPRESSORS:
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] in _BZIP2_BLOCKS):
            file = _buffered(decompressor(file))
            head = peek(file)
            break
    for offset, magic, name in _ARCHIVES:
        if head.startswith(magic, offset):
            raise ValueError(f"it is {name}: unpack it, and give the files in it")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return _buffered(cast(BinaryIO, _Recoded(file, encoding)))
    return file


def peek(file: BinaryIO) -> bytes:
    """Returns the first bytes of what is still to be read, which stays to be read; empty at the end."""
    return cast(io.BufferedReader, file).peek(HEAD_BYTES)


def lines(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Yields the lines of a file with their ends; of one longer than most_bytes its beginning, which is longer, too."""
    while line := file.readline(most_bytes + 1):
        yield line
        rest = line
        while len(rest) > most_bytes and not rest.endswith(b"\n"):
            rest = file.readline(most_bytes + 1)


@contextmanager
def on_disk(file: BinaryIO) -> Iterator[BinaryIO]:
    """Gives a file that can be sought in: the file itself, or a copy that is gone afterwards.

    Raises ValueError if the copy would be too large (see `copy_bounded`).
    """
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        copy_bounded(file, cast(BinaryIO, copy))
        copy.seek(0)
        yield cast(BinaryIO, copy)


def copy_bounded(file: BinaryIO, copy: BinaryIO) -> None:
    """Copies what is still to be read. Raises ValueError if it has more than MOST_COPIED_BYTES."""
    size = 0
    while block := file.read(1 << 20):
        size += copy.write(block)
        if size > MOST_COPIED_BYTES:
            raise ValueError(f"unpacked, it has more than {MOST_COPIED_BYTES >> 30} GiB: unpack it yourself")


def _buffered(file: BinaryIO) -> BinaryIO:
    if isinstance(file, io.BufferedReader):
        return file
    return io.BufferedReader(cast(io.RawIOBase, file), 1 << 16)


class _Recoded(io.RawIOBase):
    """The text of a file as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        block = b"-"
        while block and not self._ready:
            block = self._file.read(1 << 16)
            self._ready = self._decoder.decode(block, final=not block).encode()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
