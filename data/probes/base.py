"""What a probing task consists of: labelled texts, and the readers that make them of documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel

from moe_testbed.data.documents import Document
from moe_testbed.data.registry import Registry

Kind = Literal["token", "sequence", "generation"]


@dataclass(frozen=True)
class Example:
    """One labelled text.

    document: what it is part of, the unit of splitting and of resampling; a reader may leave it empty, and then the
        document that it reads is meant.
    text: what the model reads.
    labels: of a token task one a word, of a sequence task just one; of a generation task the text to write.
    words: of a token task, where each word stands in the text, [start, end) in characters; else empty.
    origins: the texts that it was made from, where they say more than `text`: the answers. None of them must have been
        trained on.
    """

    text: str
    labels: tuple[str, ...]
    words: tuple[tuple[int, int], ...] = ()
    origins: tuple[str, ...] = ()
    document: str = ""


class LabelledReader(BaseModel, ABC, extra="forbid", frozen=True):
    """Turns a document of a source into labelled texts; its fields are the options that a task's file may set."""

    kind: str
    task_kind: ClassVar[Kind]

    @abstractmethod
    def examples(self, document: Document) -> Iterator[Example]:
        """Yields the labelled texts of a document, none if it has none. Raises one of readers.base.NOT_AS_EXPECTED if
        the document is not as expected."""


labelled_reader_kinds: Registry[LabelledReader] = Registry("labelled reader")
