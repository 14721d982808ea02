"""What a reader is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from pydantic import BaseModel

from moe_testbed.data.registry import Registry

MOST_RECORD_BYTES = 1 << 26
"""A line or a field that is longer is no record that anybody wrote."""

MOST_FILE_BYTES = 1 << 29
"""What a reader takes into memory that needs a file as a whole."""

BLOCK_BYTES = 1 << 16

NOT_AS_EXPECTED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What code raises that meets another structure than it was written for."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a record that cannot be read. place: "line 143", or empty if the file is the record."""

    place: str
    reason: str


class Reader(BaseModel, ABC, extra="forbid", frozen=True):
    """Turns one file into texts; its fields are the options that a mix file may set."""

    kind: str
    paragraph_separator: ClassVar[str] = "\n\n"

    @abstractmethod
    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the documents of one record after another (a line, a row, a file), or why it cannot be read.

        file: its content, already decompressed, as `streams.plain` gives it; it cannot be sought in.
        Raises ValueError if the file as a whole is not as expected.
        """


class WholeFile(Reader):
    """A reader to which a file is one record, and which takes it into memory."""

    @abstractmethod
    def texts(self, content: bytes) -> Iterator[str]:
        """Yields one text a document. Raises one of NOT_AS_EXPECTED if the content is not as expected."""

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the documents of the file, or why it cannot be read; an empty one need not be as expected."""
        content = whole(file)
        try:
            documents = list(self.texts(content))
        except NOT_AS_EXPECTED as error:
            if content.strip():
                yield Unreadable("", reason_of(error))
        else:
            yield documents


def whole(file: BinaryIO) -> bytes:
    """Returns the content of a file. Raises ValueError if it is larger than MOST_FILE_BYTES."""
    # Not at once: a buffered file allocates what it is asked for before it knows how much there is.
    blocks: list[bytes] = []
    size = 0
    while block := file.read(BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if size > MOST_FILE_BYTES:
            raise ValueError(
                f"it has more than {MOST_FILE_BYTES >> 20} MiB, and this reader takes a file into memory as a whole: "
                "cut it up, or make it one of records (jsonl, parquet)"
            )
    return b"".join(blocks)


def reason_of(error: BaseException) -> str:
    """Returns in one line why a record cannot be read."""
    if isinstance(error, KeyError):
        return f"key {error} is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__


reader_kinds: Registry[Reader] = Registry("reader")
