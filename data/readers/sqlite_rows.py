"""Rows of an SQLite database."""

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, field_validator

from moe_testbed.data.readers.base import Reader, Unreadable, reader_kinds
from moe_testbed.data.readers.records.fields import kind_of
from moe_testbed.data.readers.streams import copy_bounded, peek


@reader_kinds.register("sqlite_rows")
class SqliteRows(Reader):
    """Makes one document (a law) of the rows of one table that share `group_by`; a row (an article) is a paragraph."""

    kind: str = "sqlite_rows"
    table: str
    text: str = Field(description="column of the text")
    group_by: str = Field(description="column that identifies the document")
    prefix: str | None = Field(default=None, description="column put before the text, for example the article's number")

    @field_validator("table", "text", "group_by", "prefix")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w+", name):
            raise ValueError(f"'{name}' must be a plain table or column name (letters, digits, underscores)")
        return name

    def read(self, file: BinaryIO) -> Iterator[list[str] | Unreadable]:
        """Yields the document of every group of rows. See `Reader`."""
        if not peek(file):
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "database"
            with path.open("wb") as copy:
                copy_bounded(file, copy)
            try:
                with closing(sqlite3.connect(path)) as connection:
                    # What is no UTF-8 comes through as half surrogates, which are replaced as everywhere.
                    connection.text_factory = lambda content: content.decode(errors="surrogateescape")
                    for group, rows in groupby(connection.execute(self._query()), key=lambda row: row[0]):
                        yield self._document(group, list(rows))
            except sqlite3.Error as error:
                raise ValueError(f"the database cannot be read: {error}") from error

    def _document(self, group: Any, rows: list[tuple[Any, Any, Any]]) -> list[str] | Unreadable:
        for _, _, text in rows:
            if not isinstance(text, str):
                return Unreadable(f"{self.group_by} {group}", f"{self.text} is {kind_of(text)}, not text")
        return ["\n\n".join(f"{prefix} {text}" if prefix else text for _, prefix, text in rows)]

    def _query(self) -> str:
        # rowid follows the order in which the rows were stored, so that articles stay in order. Names stand in brackets
        # because they may be words of SQL.
        prefix = f"[{self.prefix}]" if self.prefix else "NULL"
        return (
            f"SELECT [{self.group_by}], {prefix}, [{self.text}] FROM [{self.table}] "
            f"WHERE [{self.text}] IS NOT NULL ORDER BY [{self.group_by}], rowid"
        )
