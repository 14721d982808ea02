"""Tune books in ABC notation: every tune is a document."""

import re
from collections.abc import Iterator

from moe_testbed.data.readers.base import WholeFile, reader_kinds
from moe_testbed.data.readers.plain_text import decode

TUNE_START = re.compile(r"^(?=X:)", re.MULTILINE)


@reader_kinds.register("abc_tunes")
class AbcTunes(WholeFile):
    """A tune begins with its `X:` field; old books that are not UTF-8 are read as Latin-1."""

    kind: str = "abc_tunes"

    def texts(self, content: bytes) -> Iterator[str]:
        text = decode(content, "latin-1").replace("\r\n", "\n")
        yield from (tune for tune in TUNE_START.split(text) if tune.startswith("X:"))
