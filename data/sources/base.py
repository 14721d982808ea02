"""What a source is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import Reader
from moe_testbed.data.registry import Registry


class Source(BaseModel, ABC, extra="forbid", frozen=True):
    """Yields the documents of a domain; its fields are what a mix file says about it."""

    kind: str

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        """Downloads what is to be kept and checks that the source can be read. Raises DataError."""

    @abstractmethod
    def documents(self, cache_dir: Path, max_bytes: int) -> Iterator[Document]:
        """Yields the documents in a fixed order; an endless source stops after max_bytes of UTF-8. Raises DataError."""

    def identity(self) -> dict[str, Any]:
        """Returns what decides the documents, as JSON: two sources of equal identity yield the same."""
        return self.model_dump(mode="json")


source_kinds: Registry[Source] = Registry("source kind")


def read_file(reader: Reader, content: bytes, origin: str) -> Iterator[Document]:
    """Yields the documents of one file. Raises DataError, naming the file, if it is not what the reader expects."""
    try:
        for text in reader.texts(content):
            yield Document(text=text, origin=origin, separator=reader.paragraph_separator)
    except (ValueError, LookupError, TypeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{origin} is not what the reader '{reader.kind}' expects: {reason}; "
            "choose another reader or correct its options"
        ) from error
