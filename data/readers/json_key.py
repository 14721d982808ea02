"""A JSON object with one text a key: prompts by subject."""

import json
from collections.abc import Iterator

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("json_key")
class JsonKey(Reader):
    """The text under `key`, cut at every `separator`; each piece is a document, but for the first `skip` of them."""

    kind: str = "json_key"
    key: str
    separator: str = Field(default="\n\n", min_length=1, description="what stands between two documents; left out")
    skip: int = Field(default=0, ge=0, description="pieces at the beginning that are no documents: a heading")

    def texts(self, content: bytes) -> Iterator[str]:
        text = json.loads(content)[self.key]
        if not isinstance(text, str):
            raise TypeError(f"under '{self.key}' stands no text but {type(text).__name__}")
        yield from (piece for piece in text.split(self.separator)[self.skip :] if piece.strip())
