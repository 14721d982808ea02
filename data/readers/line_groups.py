"""A long file of independent lines."""

from collections.abc import Iterator

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("line_groups")
class LineGroups(Reader):
    """Makes documents of so many lines each; a line is a paragraph."""

    kind: str = "line_groups"
    lines_per_document: int = Field(default=200, ge=1)
    paragraph_separator = "\n"

    def texts(self, content: bytes) -> Iterator[str]:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        for start in range(0, len(lines), self.lines_per_document):
            yield "\n".join(lines[start : start + self.lines_per_document])
