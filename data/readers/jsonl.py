"""JSON Lines: every line is a document."""

import json
from collections.abc import Iterator

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("jsonl")
class JsonLines(Reader):
    """Takes one text field of every line; blank lines are skipped."""

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
