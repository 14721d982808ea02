"""Chapters of verses with their translation beside them, as JSON."""

import json
from collections.abc import Iterator
from typing import ClassVar

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds


@labelled_reader_kinds.register("verse_pairs")
class VersePairs(LabelledReader):
    """Asks for the translation of each verse of a chapter, `{"verses": [{"text": ..., "translation": ...}, ...]}`.

    given, wanted: the fields of a verse.
    """

    kind: str = "verse_pairs"
    task_kind: ClassVar[Kind] = "generation"
    given: str = "text"
    wanted: str = "translation"

    def examples(self, document: Document) -> Iterator[Example]:
        for verse in json.loads(document.text)["verses"]:
            given, wanted = (" ".join(verse[field].split()) for field in (self.given, self.wanted))
            if given and wanted:
                yield Example(given, (wanted,), origins=(wanted,))
