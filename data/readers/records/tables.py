"""Tables in Apache's formats, read row group by row group with pyarrow, on which `datasets` stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from moe_testbed.data.readers.base import Reader, Unreadable, reader_kinds, reason_of
from moe_testbed.data.readers.records.fields import missing, text_of
from moe_testbed.data.readers.streams import on_disk, peek

if TYPE_CHECKING:
    import pyarrow

PARQUET, ARROW = b"PAR1", b"ARROW1"
ROWS_AT_ONCE = 256


@reader_kinds.register("parquet")
class Parquet(Reader):
    """One column of a Parquet file: every row is a document."""

    kind: str = "parquet"
    field: str = "text"

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the document of every row. See `Reader`."""
        if head := peek(file):
            rows = table_rows(file, head, self.field)
            if rows is None:
                raise ValueError("it is neither a Parquet nor an Arrow file")
            yield from rows


@reader_kinds.register("arrow")
class Arrow(Reader):
    """One column of an Arrow file, or of a stream such as `datasets` saves: every row is a document."""

    kind: str = "arrow"
    field: str = "text"

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the document of every row. See `Reader`."""
        if head := peek(file):
            yield from table_rows(file, head, self.field) or _texts(_stream_batches(file, self.field), self.field)


def table_rows(file: BinaryIO, head: bytes, field: str) -> Iterator[list[str] | Unreadable] | None:
    """Returns the rows of a Parquet or Arrow file, which its first bytes tell, or None if it is neither."""
    if head.startswith(PARQUET):
        return _texts(_parquet_batches(file, field), field)
    if head.startswith(ARROW):
        return _texts(_file_batches(file, field), field)
    return None


def _parquet_batches(file: BinaryIO, field: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with on_disk(file) as seekable, pyarrow.parquet.ParquetFile(seekable, buffer_size=1 << 20) as table:
        column = _column(table.schema_arrow.names, field)
        yield from table.iter_batches(ROWS_AT_ONCE, columns=[column], use_threads=False)


def _file_batches(file: BinaryIO, field: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with on_disk(file) as seekable, pyarrow.ipc.open_file(seekable) as table:
        column = _column(table.schema.names, field)
        for number in range(table.num_record_batches):
            yield table.get_batch(number).select([column])


def _stream_batches(file: BinaryIO, field: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with pyarrow.ipc.open_stream(file) as table:
        column = _column(table.schema.names, field)
        for batch in table:
            yield batch.select([column])


def _column(names: list[str], field: str) -> str:
    """Returns the column that holds a field. Raises ValueError."""
    for column in (field, field.partition(".")[0]):
        if column in names:
            return column
    raise ValueError(missing(field, names))


def _texts(batches: Iterator[pyarrow.RecordBatch], field: str) -> Iterator[list[str] | Unreadable]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for first in range(0, len(batch), ROWS_AT_ONCE):
                for row in _rows(batch.slice(first, ROWS_AT_ONCE)):
                    number += 1
                    try:
                        if isinstance(row, UnicodeDecodeError):
                            raise row
                        text = text_of(row, field)
                    except ValueError as error:
                        yield Unreadable(f"row {number}", reason_of(error))
                    else:
                        yield [text]
    except pyarrow.ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(reason_of(error)) from error


def _rows(batch: pyarrow.RecordBatch) -> list[Any]:
    """Returns the rows as dictionaries; in the place of one that is no UTF-8 stands the error."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [error]
        return [row for n in range(len(batch)) for row in _rows(batch.slice(n, 1))]
    return rows
