"""The user's own files."""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DISK_FULL, DataError
from moe_testbed.data.readers import PlainText, Reader, reader_kinds
from moe_testbed.data.readers.base import reason_of
from moe_testbed.data.readers.streams import DAMAGED
from moe_testbed.data.sources.base import Limits, Source, printable, read_file, source_kinds
from moe_testbed.data.sources.tally import Tally


@source_kinds.register("files")
class FilesSource(Source):
    """Reads files by glob with any reader: `plain_text` (a file is a document), `jsonl` (a line is one), ...

    Files compressed by gzip, bzip2, xz or zstd are told by their content.
    """

    kind: str = "files"
    glob: str = Field(description="files relative to the working directory; `**` spans folders, `~` is your home")
    reader: SerializeAsAny[Annotated[Reader, BeforeValidator(reader_kinds.parse)]] = PlainText()

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        if not self.paths():
            raise DataError(f"no file matches '{self.glob}' in {Path.cwd()}: correct `glob`")

    def documents(self, cache_dir: Path, limits: Limits, tally: Tally) -> Iterator[Document]:
        for path in self.paths():
            name = printable(path)
            try:
                with path.open("rb") as file:
                    yield from read_file(self.reader, file, name, tally)
            except DAMAGED as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if isinstance(error, OSError) and error.strerror:
                    raise DataError(f"{name} cannot be read ({error.strerror}): correct that, or `glob`") from error
                raise DataError(f"{name} is damaged or was cut off ({reason_of(error)}): fetch it again") from error

    def paths(self) -> list[Path]:
        """Returns the files that match, sorted by path."""
        pattern = str(Path(self.glob).expanduser())
        return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())

    def identity(self) -> dict[str, Any]:
        """Adds size and time of change of every file, so that edited files make a new store."""
        states = [(printable(path), path.stat()) for path in self.paths()]
        return super().identity() | {"files": [[path, state.st_size, state.st_mtime_ns] for path, state in states]}
