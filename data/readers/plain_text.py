"""A text file is one document."""

from collections.abc import Iterator

from moe_testbed.data.readers.base import WholeFile, reader_kinds


@reader_kinds.register("plain_text")
class PlainText(WholeFile):
    """Reads UTF-8, and files that are not by `fallback_encoding` (for example latin-1)."""

    kind: str = "plain_text"
    fallback_encoding: str | None = None

    def texts(self, content: bytes) -> Iterator[str]:
        yield decode(content, self.fallback_encoding)


def decode(content: bytes, fallback_encoding: str | None) -> str:
    """Decodes UTF-8, else by the fallback. Raises UnicodeDecodeError if neither fits."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if fallback_encoding is None:
            raise
        return content.decode(fallback_encoding)
