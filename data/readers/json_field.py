"""Nested JSON in which one field of every record is the text: verses with their translations."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds
from moe_testbed.data.readers.json_leaves import children, nodes_at


@reader_kinds.register("json_field")
class JsonField(Reader):
    """The strings that stand under `field`, however deep, below one node at `document_depth` are one document, a string
    a paragraph.

    document_depth 0 makes the whole file one document, 1 every element of a list.
    """

    kind: str = "json_field"
    field: str = Field(description="key of the text, for example translation")
    document_depth: int = Field(default=0, ge=0)
    paragraph_separator = "\n"

    def texts(self, content: bytes) -> Iterator[str]:
        found = False
        for node in nodes_at(json.loads(content), self.document_depth):
            strings = [string.replace("\n", " ") for string in field_values(node, self.field) if string.strip()]
            if strings:
                found = True
                yield "\n".join(strings)
        if not found:
            raise ValueError(f"no record has a text under '{self.field}'")


def field_values(node: Any, field: str) -> Iterator[str]:
    """All strings under a key `field` at or below a node, in order."""
    if isinstance(node, dict) and isinstance(node.get(field), str):
        yield node[field]
    for child in children(node):
        yield from field_values(child, field)
