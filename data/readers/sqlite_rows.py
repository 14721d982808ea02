"""Rows of an SQLite database."""

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from pydantic import Field, field_validator

from moe_testbed.data.readers.base import Reader, reader_kinds


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

    def texts(self, content: bytes) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "database"
            path.write_bytes(content)
            try:
                with closing(sqlite3.connect(path)) as connection:
                    rows = connection.execute(self._query()).fetchall()
            except sqlite3.Error as error:
                raise ValueError(f"the database cannot be read: {error}") from error
        for _, group in groupby(rows, key=lambda row: row[0]):
            yield "\n\n".join(f"{prefix} {text}" if prefix else text for _, prefix, text in group)

    def _query(self) -> str:
        # rowid follows the order in which the rows were stored, so that articles stay in order. Names stand in brackets
        # because they may be words of SQL.
        prefix = f"[{self.prefix}]" if self.prefix else "NULL"
        return (
            f"SELECT [{self.group_by}], {prefix}, [{self.text}] FROM [{self.table}] "
            f"WHERE [{self.text}] IS NOT NULL ORDER BY [{self.group_by}], rowid"
        )
