"""What a source is."""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import Reader, Unreadable
from moe_testbed.data.readers.base import reason_of
from moe_testbed.data.readers.streams import plain
from moe_testbed.data.registry import Registry
from moe_testbed.data.sources.tally import Tally


@dataclass(frozen=True)
class Limits:
    """Says how much a domain keeps, in bytes of UTF-8: of all documents, and at most of one."""

    max_bytes: int
    max_document_bytes: int


class Source(BaseModel, ABC, extra="forbid", frozen=True):
    """Yields the documents of a domain; its fields are what a mix file says about it."""

    kind: str

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        """Downloads what is to be kept and checks that the source can be read. Raises DataError."""

    @abstractmethod
    def documents(self, cache_dir: Path, limits: Limits, tally: Tally) -> Iterator[Document]:
        """Yields the documents in a fixed order; an endless source stops when it has given limits.max_bytes.

        Records are counted in `tally`, those that cannot be read are passed over. Raises DataError.
        """

    def identity(self) -> dict[str, Any]:
        """Returns what decides the documents, as JSON: two sources of equal identity yield the same."""
        return self.model_dump(mode="json")


source_kinds: Registry[Source] = Registry("source kind")


def read_file(reader: Reader, file: BinaryIO, origin: str, tally: Tally) -> Iterator[Document]:
    """Yields the documents of one file, which may be compressed.

    Raises DataError, naming the file, if it is not what the reader expects, and one of streams.DAMAGED.
    """
    try:
        for record in reader.read(plain(file)):
            if isinstance(record, Unreadable):
                place = f"{origin} {record.place}".rstrip()
                tally.skip(f"{place}: {record.reason}")
                continue
            tally.records += 1
            for text in record:
                yield document(text, origin, tally, reader.paragraph_separator)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{origin} is not what the reader '{reader.kind}' expects: {reason_of(error)}; "
            "choose another reader or correct its options"
        ) from error


def document(text: str, origin: str, tally: Tally, separator: str = "\n\n") -> Document:
    """Returns a text as a document. Halves of surrogate pairs are joined, or replaced if the other half is missing."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tally.mend(origin)
    return Document(text, origin, separator)


def printable(path: Path) -> str:
    """Returns a path as text of one line: bytes that are no UTF-8, and control characters, are escaped."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) == "Cc" else character
        for character in str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
    )
