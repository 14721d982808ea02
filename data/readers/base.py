"""What a reader is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from pydantic import BaseModel

from moe_testbed.data.registry import Registry


class Reader(BaseModel, ABC, extra="forbid", frozen=True):
    """Turns the content of one file into texts; its fields are the options that a mix file may set."""

    kind: str
    paragraph_separator: ClassVar[str] = "\n\n"

    @abstractmethod
    def texts(self, content: bytes) -> Iterator[str]:
        """Yields one text a document. Raises ValueError, LookupError or TypeError if the content is not as expected."""


reader_kinds: Registry[Reader] = Registry("reader")
