"""JSON Lines."""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from moe_testbed.data.readers.base import MOST_RECORD_BYTES, Reader, Unreadable, reader_kinds, reason_of
from moe_testbed.data.readers.records.fields import text_of
from moe_testbed.data.readers.records.tables import table_rows
from moe_testbed.data.readers.streams import lines, peek


@reader_kinds.register("jsonl")
class JsonLines(Reader):
    """JSON Lines: one text field of every line is a document; blank lines are skipped.

    `datasets` would make tables of the lines first, in which a field has the type of its first rows; here text stays
    text. A Parquet or Arrow file is told by its content and its column `field` read.
    """

    kind: str = "jsonl"
    field: str = "text"

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the document of every line. See `Reader`."""
        if rows := table_rows(file, peek(file), self.field):
            yield from rows
            return
        for number, line in enumerate(lines(file, MOST_RECORD_BYTES), start=1):
            if len(line) > MOST_RECORD_BYTES:
                yield Unreadable(f"line {number}", f"it has more than {MOST_RECORD_BYTES >> 20} MiB")
            elif line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    text = text_of(json.loads(line.rstrip(b"\r\n")), self.field)
                except json.JSONDecodeError as error:
                    yield Unreadable(f"line {number}", f"no JSON: {error.msg} (character {error.pos + 1})")
                except (ValueError, RecursionError) as error:
                    yield Unreadable(f"line {number}", reason_of(error))
                else:
                    yield [text]
