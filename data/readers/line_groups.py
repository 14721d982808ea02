"""A long file of independent lines."""

from collections.abc import Iterator
from typing import BinaryIO

from pydantic import Field

from moe_testbed.data.readers.base import MOST_RECORD_BYTES, Reader, Unreadable, reader_kinds, reason_of
from moe_testbed.data.readers.streams import lines


@reader_kinds.register("line_groups")
class LineGroups(Reader):
    """Makes documents of so many lines each; a line is a paragraph."""

    kind: str = "line_groups"
    lines_per_document: int = Field(default=200, ge=1)
    paragraph_separator = "\n"

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields a document for every so many lines, and nothing for those between. See `Reader`."""
        group: list[str] = []
        line = b""
        for number, line in enumerate(lines(file, MOST_RECORD_BYTES), start=1):
            try:
                group.append(_text(line))
            except ValueError as error:
                yield Unreadable(f"line {number}", reason_of(error))
                continue
            if len(group) < self.lines_per_document:
                yield []
            else:
                yield ["\n".join(group)]
                group = []
        if line.endswith(b"\n"):
            group.append("")
        if group:
            yield ["\n".join(group)]


def _text(line: bytes) -> str:
    if len(line) > MOST_RECORD_BYTES:
        raise ValueError(f"it has more than {MOST_RECORD_BYTES >> 20} MiB")
    return line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
