"""Licence texts with YAML front matter that names their category."""

import re
from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from moe_testbed.data.documents import Document, clean_text
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds
from moe_testbed.data.readers.license_text import FRONT_MATTER, LANGUAGE

CATEGORY = re.compile(r"^category: *(.+?) *$", re.MULTILINE)


@labelled_reader_kinds.register("licence_category")
class LicenceCategory(LabelledReader):
    """Takes the text behind the front matter, as the reader `license_text` does: English ones, and no very short
    ones."""

    kind: str = "licence_category"
    task_kind: ClassVar[Kind] = "sequence"
    minimum_characters: int = Field(default=201, ge=0)

    def examples(self, document: Document) -> Iterator[Example]:
        text = document.text.replace("\r\n", "\n") + "\n"
        front_matter = FRONT_MATTER.match(text)
        if front_matter is None:
            raise ValueError("it has no front matter")
        category, language = CATEGORY.search(front_matter[1]), LANGUAGE.search(front_matter[1])
        if category is None:
            raise ValueError("its front matter names no category")
        text = clean_text(text[front_matter.end() :])
        if (language is None or language[1] == "en") and len(text) >= self.minimum_characters:
            yield Example(text, (category[1],))
