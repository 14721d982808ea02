"""Data sets of the Hugging Face hub, streamed: only what the mix needs is downloaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import Field

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.readers.base import reason_of
from moe_testbed.data.readers.records.fields import text_of
from moe_testbed.data.sources.base import Limits, Source, document, source_kinds
from moe_testbed.data.sources.tally import Tally


@source_kinds.register("hub")
class HubSource(Source):
    """Reads a column of one split of a data set; it stops at `limit` documents or the mix's bytes per domain."""

    kind: str = "hub"
    path: str = Field(description="repository of the data set, for example allenai/c4")
    name: str | None = Field(default=None, description="configuration of the data set, for example a language")
    revision: str | None = Field(default=None, description="commit; without it the newest is read")
    split: str = "train"
    column: str = "text"
    limit: int | None = Field(default=None, ge=1, description="documents at most")

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        with self._clear_errors():
            rows = self._stream()
            columns = rows.column_names or list(next(iter(rows), {}))
        if self.column not in columns and self.column.partition(".")[0] not in columns:
            raise DataError(
                f"{self._label()} has no column '{self.column}': correct `column`. Available: {', '.join(columns)}"
            )

    def documents(self, cache_dir: Path, limits: Limits, tally: Tally) -> Iterator[Document]:
        with self._clear_errors():
            rows = iter(self._stream())
        given = 0
        for number in count():
            if given >= limits.max_bytes or number == self.limit:
                return
            with self._clear_errors():
                row = next(rows, None)
            if row is None:
                return
            origin = f"{self._label()}#{number}"
            try:
                text = text_of(row, self.column)
            except ValueError as error:
                tally.skip(f"{origin}: {reason_of(error)}")
                continue
            tally.records += 1
            found = document(text, origin, tally)
            # No more of a long document is kept, so that it must not count for more.
            given += min(len(found.text.encode()), limits.max_document_bytes)
            yield found

    def _stream(self) -> Any:
        from datasets import load_dataset

        return load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the hub's client raises dozens of types: network, gate, missing set, script
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{self._label()} cannot be read ({reason[0][:300]}): check the name, the network and your access "
                "(`hf auth login` for gated sets), or take this domain out of the mix"
            ) from error

    def _label(self) -> str:
        return "/".join(part for part in ("hub", self.path, self.name, self.split) if part)
