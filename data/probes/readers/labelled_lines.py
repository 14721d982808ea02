"""Lines of a label and a text: the plainest form of a task of one's own."""

from collections.abc import Iterator
from typing import ClassVar

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds


@labelled_reader_kinds.register("labelled_lines")
class LabelledLines(LabelledReader):
    """Makes a document of each line, in which a tab parts the label from the text; blank lines are passed over."""

    kind: str = "labelled_lines"
    task_kind: ClassVar[Kind] = "sequence"

    def examples(self, document: Document) -> Iterator[Example]:
        for number, line in enumerate(document.text.splitlines(), start=1):
            if not line.strip():
                continue
            label, tab, text = line.partition("\t")
            if not tab or not label or not text.strip():
                raise ValueError(f"line {number} is not a label, a tab and a text")
            yield Example(text.strip(), (label,), document=str(number))
