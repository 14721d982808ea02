"""Treebanks in CoNLL-U: a word a line, ten columns, sentences apart by blank lines."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from moe_testbed.data.documents import BLANK_LINES, Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds

COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
NO_VALUE = "_"


@labelled_reader_kinds.register("conllu")
class Conllu(LabelledReader):
    """Makes a document of each sentence. A word that several syntactic words share (a range of ids) carries no label,
    since it has several.

    column: the label of a word.
    part_relation: the relation of a row that is the beginning of a word whose end stands in the next row, which has
        the label of the whole; for treebanks that part words at their derivations.
    """

    kind: str = "conllu"
    task_kind: ClassVar[Kind] = "token"
    column: Literal["upos", "xpos", "deprel"] = "upos"
    part_relation: str | None = None

    def examples(self, document: Document) -> Iterator[Example]:
        for number, block in enumerate(BLANK_LINES.split(document.text.strip("\n")), start=1):
            rows = [line.split("\t") for line in block.splitlines() if line and not line.startswith("#")]
            if rows:
                yield self._sentence(rows, number)

    def _sentence(self, rows: list[list[str]], number: int) -> Example:
        text, labels, words = "", [], []
        shared_up_to = 0
        start: int | None = None
        for row in rows:
            if len(row) != len(COLUMNS):
                raise ValueError(f"sentence {number} has a line of {len(row)} columns, and CoNLL-U has {len(COLUMNS)}")
            values = dict(zip(COLUMNS, row, strict=True))
            first, _, last = values["id"].partition("-")
            if "." in first or (not last and int(first) <= shared_up_to):
                continue
            shared_up_to = int(last) if last else shared_up_to
            start = len(text) if start is None else start
            text += values["form"]
            label, is_last = values[self.column], "SpaceAfter=No" not in values["misc"].split("|")
            if self.part_relation is not None and values["deprel"] == self.part_relation and not is_last:
                continue
            if not last and label != NO_VALUE:
                labels.append(label)
                words.append((start, len(text)))
            text += " " if is_last else ""
            start = None
        return Example(text.rstrip(), tuple(labels), tuple(words), document=str(number))
