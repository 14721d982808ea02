"""Licence texts with YAML front matter."""

import re
from collections.abc import Iterator

from pydantic import Field

from moe_testbed.data.readers.base import WholeFile, reader_kinds

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\s*\n", re.DOTALL)
LANGUAGE = re.compile(r"^language: *(\S+)", re.MULTILINE)


@reader_kinds.register("license_text")
class LicenseText(WholeFile):
    """Drops the front matter, and the file if it names a language other than English or is very short."""

    kind: str = "license_text"
    minimum_characters: int = Field(default=201, ge=0)

    def texts(self, content: bytes) -> Iterator[str]:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        front_matter = FRONT_MATTER.match(text)
        if front_matter:
            text = text[front_matter.end() :]
            language = LANGUAGE.search(front_matter.group(1))
            if language and language.group(1) != "en":
                return
        if len(text.strip()) >= self.minimum_characters:
            yield text
