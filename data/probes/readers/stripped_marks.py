"""Text without its combining marks, which are to be restored: the vowels of Arabic, for example."""

import unicodedata
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds


@labelled_reader_kinds.register("stripped_marks")
class StrippedMarks(LabelledReader):
    """Asks for as many whole words of a text as are not too long, given them without their combining marks.

    max_characters: of the words with their marks. Marks that Unicode has as one character with their letter stay.
    part: where the words are taken from; texts of one kind often begin alike.
    """

    kind: str = "stripped_marks"
    task_kind: ClassVar[Kind] = "generation"
    max_characters: int = Field(default=80, ge=8)
    part: Literal["beginning", "end"] = "beginning"

    def examples(self, document: Document) -> Iterator[Example]:
        whole = text = " ".join(document.text.split())
        if len(text) > self.max_characters:
            most = self.max_characters + 1
            text = text[:most].rpartition(" ")[0] if self.part == "beginning" else text[-most:].partition(" ")[2]
        stripped = "".join(character for character in text if unicodedata.category(character) != "Mn")
        if stripped and stripped != text:
            yield Example(stripped, (text,), origins=(whole,))
