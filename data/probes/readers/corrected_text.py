"""Error-corrected text, `{wrong=>right:::error_type=...}`: where the errors are, and how they are corrected."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds

ANNOTATION = re.compile(r"\{([^{}]*?)=>([^{}]*?):::[^{}]*\}")
LEFT = re.compile(r"=>|:::")
WORD = re.compile(r"[\w'’ʼ-]+|[^\w\s]")
ERROR, CORRECT = "error", "correct"


@dataclass(frozen=True)
class Sides:
    """Both sides of an annotated text, and where the wrong one was changed, [start, end) in its characters."""

    wrong: str
    right: str
    edits: tuple[tuple[int, int], ...]


def sides_of(annotated: str) -> Sides:
    """Returns both sides of an annotated text. Raises ValueError if something is left that an annotation has."""
    wrong = right = ""
    edits = []
    end = 0
    for found in ANNOTATION.finditer(annotated):
        between = annotated[end : found.start()]
        wrong, right, end = wrong + between, right + between, found.end()
        if found[1] != found[2]:
            edits.append((len(wrong), len(wrong) + len(found[1])))
        wrong, right = wrong + found[1], right + found[2]
    if (place := LEFT.search(rest := ANNOTATION.sub("", annotated))) is not None:
        raise ValueError(f"an annotation is not whole: '{rest[max(0, place.start() - 10) : place.end() + 10]}'")
    return Sides(wrong + annotated[end:], right + annotated[end:], tuple(edits))


@labelled_reader_kinds.register("corrected_text_errors")
class CorrectedTextErrors(LabelledReader):
    """Labels the words and signs of the text as it was written: `error` what was changed, and what stands behind the
    place of something that was missing; `correct` the rest."""

    kind: str = "corrected_text_errors"
    task_kind: ClassVar[Kind] = "token"

    def examples(self, document: Document) -> Iterator[Example]:
        sides = sides_of(document.text)
        words = tuple(found.span() for found in WORD.finditer(sides.wrong))
        wrong = {place for edit in sides.edits for place in _touched(words, edit)}
        labels = tuple(ERROR if place in wrong else CORRECT for place in range(len(words)))
        yield Example(sides.wrong, labels, words, origins=(sides.right,))


def _touched(words: tuple[tuple[int, int], ...], edit: tuple[int, int]) -> list[int]:
    """Returns the numbers of the words that an edit changes; of an insertion, or a change of white space alone, the
    next word."""
    start, end = edit
    touched = [place for place, word in enumerate(words) if word[0] < end and word[1] > start]
    return touched or [place for place, word in enumerate(words) if word[1] > start][:1]


@labelled_reader_kinds.register("corrected_text")
class CorrectedText(LabelledReader):
    """Asks for the right side of a line of text, given the wrong one. Lines that are right already count, too."""

    kind: str = "corrected_text"
    task_kind: ClassVar[Kind] = "generation"
    minimum_characters: int = Field(default=20, ge=1)

    def examples(self, document: Document) -> Iterator[Example]:
        for line in document.text.split("\n"):
            sides = sides_of(line)
            wrong, right = sides.wrong.strip(), sides.right.strip()
            if len(wrong) >= self.minimum_characters and right:
                yield Example(wrong, (right,), origins=(right,))
