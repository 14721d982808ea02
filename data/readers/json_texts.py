"""JSON: each reader says which strings of a file are text, and which of them make a document."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("jsonl")
class JsonLines(Reader):
    """JSON Lines: one text field of every line is a document; blank lines are skipped."""

    kind: str = "jsonl"
    field: str = "text"

    def texts(self, content: bytes) -> Iterator[str]:
        for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
                found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"line {number} has no text field '{self.field}' (it has: {found})")
            yield record[self.field]


@reader_kinds.register("json_key")
class JsonKey(Reader):
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

    def texts(self, content: bytes) -> Iterator[str]:
        records = [record[self.field].replace("\n", " ") for record in json.loads(content)[self.records]]
        for start in range(0, len(records), self.records_per_document):
            yield "\n".join(records[start : start + self.records_per_document])


@reader_kinds.register("json_leaves")
class JsonLeaves(Reader):
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
class JsonField(Reader):
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
class LawTree(Reader):
    """A code of law is a tree of sections with articles as leaves (the legi-data format); every article is a document:
    `data.texte` of the nodes whose `type` is article."""

    kind: str = "law_tree"

    def texts(self, content: bytes) -> Iterator[str]:
        sections = [json.loads(content)]
        while sections:
            node = sections.pop()
            if node["type"] == "article" and node["data"].get("texte"):
                yield node["data"]["texte"]
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
