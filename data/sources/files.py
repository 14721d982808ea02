"""The user's own files."""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import PlainText, Reader, reader_kinds
from moe_testbed.data.sources.base import Source, read_file, source_kinds


@source_kinds.register("files")
class FilesSource(Source):
    """Reads files by glob with any reader: `plain_text` (a file is a document), `jsonl` (a line is one), ..."""

    kind: str = "files"
    glob: str = Field(description="files relative to the working directory; `**` spans folders, `~` is your home")
    reader: SerializeAsAny[Annotated[Reader, BeforeValidator(reader_kinds.parse)]] = PlainText()

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        if not self.paths():
            raise DataError(f"no file matches '{self.glob}' in {Path.cwd()}: correct `glob`")

    def documents(self, cache_dir: Path, max_bytes: int) -> Iterator[Document]:
        for path in self.paths():
            yield from read_file(self.reader, path.read_bytes(), origin=str(path))

    def paths(self) -> list[Path]:
        """Returns the files that match, sorted by path."""
        pattern = str(Path(self.glob).expanduser())
        return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())

    def identity(self) -> dict[str, Any]:
        """Adds size and time of change of every file, so that edited files make a new store."""
        states = [(str(path), path.stat()) for path in self.paths()]
        return super().identity() | {"files": [[path, state.st_size, state.st_mtime_ns] for path, state in states]}
