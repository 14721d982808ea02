"""Text inside a version- and hash-pinned package of PyPI or npm."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from moe_testbed.data.documents import Document
from moe_testbed.data.readers import PlainText, Reader, reader_kinds
from moe_testbed.data.sources.archives import damage_told, read_members
from moe_testbed.data.sources.base import Limits, Source, read_file, source_kinds
from moe_testbed.data.sources.fetch import Pin, fetch_archive
from moe_testbed.data.sources.tally import Tally


@source_kinds.register("package")
class PackageSource(Source):
    """Reads members of the package's archive; nothing is installed or executed."""

    kind: str = "package"
    index: Literal["pypi", "npm"] = "pypi"
    package: str = Field(pattern=r"^(@[\w.-]+/)?\w[\w.-]*$")
    version: str = Field(pattern=r"^\w[\w.+!-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the wheel (pypi) or tarball (npm)")
    members: tuple[str, ...] = Field(min_length=1, description="globs over paths in the archive; `**/` spans folders")
    exclude: tuple[str, ...] = ()
    max_member_bytes: int | None = Field(default=None, ge=1, description="larger members are skipped")
    reader: SerializeAsAny[Annotated[Reader, BeforeValidator(reader_kinds.parse)]] = PlainText()

    @property
    def pin(self) -> Pin:
        return Pin(self.index, self.package, self.version, self.sha256)

    def prepare(self, cache_dir: Path, log: Callable[[str], None]) -> None:
        fetch_archive(self.pin, cache_dir / "archives", log)

    def documents(self, cache_dir: Path, limits: Limits, tally: Tally) -> Iterator[Document]:
        archive = fetch_archive(self.pin, cache_dir / "archives", log=lambda _: None)
        with damage_told(archive):
            for path, file in read_members(archive, self.members, self.exclude, self.max_member_bytes):
                yield from read_file(self.reader, file, f"{self.pin}:{path}", tally)
