"""Error-corrected text, `{wrong=>right:::error_type=...}`: the corrected side is kept."""

import re
from collections.abc import Iterator

from moe_testbed.data.readers.base import WholeFile, reader_kinds

ANNOTATION = re.compile(r"\{[^{}]*?=>([^{}]*?):::[^{}]*\}")


@reader_kinds.register("annotated_text")
class AnnotatedText(WholeFile):
    """Makes one document of a file: the text as the annotator would have written it."""

    kind: str = "annotated_text"

    def texts(self, content: bytes) -> Iterator[str]:
        yield ANNOTATION.sub(r"\1", content.decode("utf-8-sig"))
