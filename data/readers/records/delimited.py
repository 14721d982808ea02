"""Tables as text."""

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from typing import BinaryIO

from pydantic import Field

from moe_testbed.data.readers.base import MOST_RECORD_BYTES, Reader, Unreadable, reader_kinds
from moe_testbed.data.readers.records.fields import missing


@reader_kinds.register("csv")
class Csv(Reader):
    """One column of a CSV file whose first row names the columns: every further row is a document.

    Fields stay as they are written: pandas, by which `datasets` reads CSV, takes "NA" for a missing value.
    """

    kind: str = "csv"
    field: str = "text"
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="what stands between two fields")
    quoted: bool = Field(
        default=True, description="false: a double quote is a character like others, and no field spans lines"
    )

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the document of every row. See `Reader`."""
        # The limit is the interpreter's; it is raised and never lowered, so that nobody else's reading suffers.
        csv.field_size_limit(max(csv.field_size_limit(), MOST_RECORD_BYTES))
        rows = csv.reader(
            _lines(file),
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            strict=True,
        )
        header = next(rows, None)
        if header is None:
            return
        if self.field not in header:
            raise ValueError(missing(self.field, header))
        column = header.index(self.field)
        while True:
            place = f"line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Unreadable(place, str(error))
                continue
            if not row:
                continue
            if len(row) != len(header):
                yield Unreadable(place, f"it has {len(row)} fields, the first row has {len(header)}")
            elif not _is_utf8(row[column]):
                yield Unreadable(place, f"{self.field} is no UTF-8")
            else:
                yield [row[column]]


@reader_kinds.register("tsv")
class Tsv(Csv):
    """The same, with tabs between the fields."""

    kind: str = "tsv"
    delimiter: str = Field(default="\t", min_length=1, max_length=1, description="what stands between two fields")


def _lines(file: BinaryIO) -> Iterator[str]:
    # Bytes that are no UTF-8 come through as half surrogates, so that they cost their row and not the file.
    text = TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    while line := text.readline(MOST_RECORD_BYTES + 1):
        if len(line) > MOST_RECORD_BYTES:
            raise ValueError(f"a line has more than {MOST_RECORD_BYTES >> 20} MiB")
        yield line
    text.detach()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
