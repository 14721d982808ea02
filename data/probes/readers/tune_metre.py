"""The metre of a tune in ABC notation, from its notes alone."""

import re
from collections.abc import Iterator
from typing import ClassVar

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds

METRE = re.compile(r"^M: *([^\s%]+)[^\n]*\n", re.MULTILINE)
HEADER = re.compile(r"^(?:[A-Za-z]:|%)[^\n]*(?:\n|\Z)", re.MULTILINE)
TELLING = re.compile(r"\[[LMQ]:[^\]\n]*\]")


@labelled_reader_kinds.register("tune_metre")
class TuneMetre(LabelledReader):
    """Gives the notes of a tune without any field or comment: `M:` is the answer, `L:` and `Q:` tell of it, and titles
    name the dance. A tune without a metre, or with a second one, is left out."""

    kind: str = "tune_metre"
    task_kind: ClassVar[Kind] = "sequence"

    def examples(self, document: Document) -> Iterator[Example]:
        tune = document.text
        metres = set(METRE.findall(tune)) | set(re.findall(r"\[M: *([^\]\s]+)", tune))
        notes = TELLING.sub("", HEADER.sub("", tune)).strip()
        if len(metres) == 1 and notes:
            yield Example(notes, (metres.pop(),), origins=(tune,))
