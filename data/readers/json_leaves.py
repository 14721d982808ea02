"""Nested JSON whose strings are the text: books of chapters of verses."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("json_leaves")
class JsonLeaves(Reader):
    """All strings below one node at `document_depth` are one document, a string a paragraph.

    document_depth 0 makes the whole file one document, 2 makes every chapter of every book one.
    """

    kind: str = "json_leaves"
    document_depth: int = Field(default=0, ge=0)

    def texts(self, content: bytes) -> Iterator[str]:
        for node in nodes_at(json.loads(content), self.document_depth):
            yield "\n\n".join(string for string in leaves(node) if string.strip())


def children(node: Any) -> list[Any]:
    """The values of a JSON list or object; nothing for anything else."""
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def nodes_at(node: Any, depth: int) -> Iterator[Any]:
    """The nodes `depth` levels down, and leaves that lie higher."""
    if depth == 0 or isinstance(node, str):
        yield node
        return
    for child in children(node):
        yield from nodes_at(child, depth - 1)


def leaves(node: Any) -> Iterator[str]:
    """All strings at or below a node, in order."""
    if isinstance(node, str):
        yield node
    for child in children(node):
        yield from leaves(child)
