"""A JSON object with a list of records: a treebank's index of sentences."""

import json
from collections.abc import Iterator

from pydantic import Field

from moe_testbed.data.readers.base import Reader, reader_kinds


@reader_kinds.register("json_list")
class JsonList(Reader):
    """Joins the field `field` of the records under the key `records`.

    A whole work is too large a unit for the split, so a document is so many records in a row.
    """

    kind: str = "json_list"
    records: str = Field(description="key of the list, for example sentences")
    field: str = "text"
    records_per_document: int = Field(default=50, ge=1)
    paragraph_separator = "\n"

    def texts(self, content: bytes) -> Iterator[str]:
        records = [record[self.field].replace("\n", " ") for record in json.loads(content)[self.records]]
        for start in range(0, len(records), self.records_per_document):
            yield "\n".join(records[start : start + self.records_per_document])
