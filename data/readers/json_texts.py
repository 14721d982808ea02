"""JSON: each reader says which strings of a file are text, and which of them make a document."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from pydantic import Field

from moe_testbed.data.readers.base import (
    NOT_AS_EXPECTED,
    Reader,
    Unreadable,
    WholeFile,
    reader_kinds,
    reason_of,
    whole,
)
from moe_testbed.data.readers.records.fields import text_of


@reader_kinds.register("json_key")
class JsonKey(WholeFile):
    """The text under `key` is cut at every `separator`; each piece is a document, but for the first `skip` of them."""

    kind: str = "json_key"
    key: str
    separator: str = Field(default="\n\n", min_length=1, description="what stands between two documents; left out")
    skip: int = Field(default=0, ge=0, description="pieces at the beginning that are no documents: a heading")

    def texts(self, content: bytes) -> Iterator[str]:
        text = json.loads(content)[self.key]
        if not isinstance(text, str):
            raise TypeError(f"under '{self.key}' stands no text but {type(text).__name__}")
        yield from (piece for piece in text.split(self.separator)[self.skip :] if piece.strip())


@reader_kinds.register("json_list")
class JsonList(Reader):
    """The field `field` of the records in the list under the key `records` is text: sentences of a treebank.

    A whole work is too large a unit for the split, so a document is so many records in a row, a record a paragraph.
    """

    kind: str = "json_list"
    records: str = Field(description="key of the list, for example sentences")
    field: str = "text"
    records_per_document: int = Field(default=50, ge=1)
    paragraph_separator = "\n"

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields a document for every so many records, and nothing for those between. See `Reader`."""
        content = whole(file)
        if not content.strip():
            return
        try:
            records = list(json.loads(content)[self.records])
        except NOT_AS_EXPECTED as error:
            yield Unreadable("", reason_of(error))
            return
        paragraphs: list[str] = []
        for number, record in enumerate(records, start=1):
            try:
                paragraphs.append(text_of(record, self.field).replace("\n", " "))
            except ValueError as error:
                yield Unreadable(f"record {number}", reason_of(error))
                continue
            if len(paragraphs) < self.records_per_document:
                yield []
            else:
                yield ["\n".join(paragraphs)]
                paragraphs = []
        if paragraphs:
            yield ["\n".join(paragraphs)]


@reader_kinds.register("json_leaves")
class JsonLeaves(WholeFile):
    """All strings are text: books of chapters of verses. Those below one node at `document_depth` are one document, a
    string a paragraph.

    document_depth 0 makes the whole file one document, 2 makes every chapter of every book one.
    """

    kind: str = "json_leaves"
    document_depth: int = Field(default=0, ge=0)

    def texts(self, content: bytes) -> Iterator[str]:
        for node in _nodes_at(json.loads(content), self.document_depth):
            yield "\n\n".join(string for string in _strings(node) if string.strip())


@reader_kinds.register("json_field")
class JsonField(WholeFile):
    """The strings under `field`, however deep, are text: verses with their translations. Those below one node at
    `document_depth` are one document, a string a paragraph.

    document_depth 0 makes the whole file one document, 1 every element of a list.
    """

    kind: str = "json_field"
    field: str = Field(description="key of the text, for example translation")
    document_depth: int = Field(default=0, ge=0)
    paragraph_separator = "\n"

    def texts(self, content: bytes) -> Iterator[str]:
        found = False
        for node in _nodes_at(json.loads(content), self.document_depth):
            fields = (each[self.field] for each in _nodes(node) if isinstance(each, dict) and self.field in each)
            strings = [text.replace("\n", " ") for text in fields if isinstance(text, str) and text.strip()]
            if strings:
                found = True
                yield "\n".join(strings)
        if not found:
            raise ValueError(f"no record has a text under '{self.field}'")


@reader_kinds.register("law_tree")
class LawTree(WholeFile):
    """A code of law is a tree of sections with articles as leaves (the legi-data format); every article is a document:
    `data.texte` of the nodes whose `type` is article."""

    kind: str = "law_tree"

    def texts(self, content: bytes) -> Iterator[str]:
        sections = [json.loads(content)]
        while sections:
            node = sections.pop()
            if node["type"] == "article" and node["data"].get("texte"):
                yield text_of(node["data"], "texte")
            sections += reversed(node.get("children", []))


def _nodes(node: Any) -> Iterator[Any]:
    """Yields the node and all nodes below it, in the order of the file."""
    yield node
    for child in _children(node):
        yield from _nodes(child)


def _strings(node: Any) -> Iterator[str]:
    return (each for each in _nodes(node) if isinstance(each, str))


def _nodes_at(node: Any, depth: int) -> Iterator[Any]:
    """Yields the nodes `depth` levels down, and strings that lie higher."""
    if depth == 0 or isinstance(node, str):
        yield node
        return
    for child in _children(node):
        yield from _nodes_at(child, depth - 1)


def _children(node: Any) -> list[Any]:
    """Returns the values of a JSON list or object; nothing for anything else."""
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
