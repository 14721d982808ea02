"""A code of law as a JSON tree of sections (`children`) with articles as leaves (the legi-data format)."""

import json
from collections.abc import Iterator
from typing import Any

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("law_tree")
class LawTree(Reader):
    """Every article is a document: `data.texte` of the nodes whose `type` is article."""

    kind: str = "law_tree"

    def texts(self, content: bytes) -> Iterator[str]:
        yield from article_texts(json.loads(content))


def article_texts(node: dict[str, Any]) -> Iterator[str]:
    """The texts of the articles at or below a node, in the order of the code."""
    if node["type"] == "article" and node["data"].get("texte"):
        yield node["data"]["texte"]
    for child in node.get("children", []):
        yield from article_texts(child)
