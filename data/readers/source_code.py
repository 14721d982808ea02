"""A source file is one document; the licence comment that heads every file of a project is dropped."""

import re
from collections.abc import Iterator

from moe_testbed.data.readers.base import WholeFile, reader_kinds
from moe_testbed.data.readers.plain_text import decode

# A comment block at the very top: /* ... */, or lines that all begin with //, # or --.
LEADING_COMMENT = re.compile(
    r"\s*(?:/\*.*?\*/|(?:[ \t]*(?://|#(?!\s*(?:include|define|if|pragma))|--)[^\n]*(?:\n|\Z))+)", re.DOTALL
)
LICENCE_WORDS = re.compile(r"copyright|licen[cs]e|spdx", re.IGNORECASE)


@reader_kinds.register("source_code")
class SourceCode(WholeFile):
    """Strips the leading comment where it speaks of copyright or licence; any other comment is text of the domain."""

    kind: str = "source_code"
    fallback_encoding: str | None = None

    def texts(self, content: bytes) -> Iterator[str]:
        text = decode(content, self.fallback_encoding)
        comment = LEADING_COMMENT.match(text)
        if comment and LICENCE_WORDS.search(comment.group()):
            text = text[comment.end() :]
        yield text
