"""The Brown corpus as it is handed on: running words with their tags, `The/at jury/nn said/vbd`.

Source of the tags and genres: Francis and Kucera, "Brown Corpus Manual" (1979).
"""

import re
from collections.abc import Iterator
from typing import ClassVar

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds

GENRES = {
    "a": "news",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "belles_lettres",
    "h": "government",
    "j": "learned",
    "k": "fiction",
    "l": "mystery",
    "m": "science_fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}
QUOTES = {"``": '"', "''": '"'}
CLOSING, OPENING = {".", ",", ":", ")", "''"}, {"(", "``"}
BASE_TAG = re.compile(r"(?:fw-)?(--|[^-+]+)")


def tagged_words(text: str) -> Iterator[tuple[str, str]]:
    """Yields (word, base tag): of a tag, without what marks titles, headlines and foreign words (-tl, -hl, fw-),
    contractions (of `ppss+bem` the first) and a negation that is a part of the word (`doz*`)."""
    for token in text.split():
        word, slash, tag = token.rpartition("/")
        found = BASE_TAG.match(tag.lower())
        if not slash or not word or found is None:
            raise ValueError(f"'{token}' is no word with a tag")
        yield QUOTES.get(word, word), found[1].rstrip("*") or "*"


def running_text(tagged: str) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Returns the text as it would be printed, the tags, and where the words stand."""
    text, labels, words, glued = "", [], [], True
    for word, tag in tagged_words(tagged):
        text += "" if glued or tag in CLOSING else " "
        words.append((len(text), len(text) + len(word)))
        labels.append(tag)
        text += word
        glued = tag in OPENING
    return text, labels, words


@labelled_reader_kinds.register("brown_tags")
class BrownTags(LabelledReader):
    """Labels every word and sign of a file with its base tag."""

    kind: str = "brown_tags"
    task_kind: ClassVar[Kind] = "token"

    def examples(self, document: Document) -> Iterator[Example]:
        text, labels, words = running_text(document.text)
        yield Example(text, tuple(labels), tuple(words))


@labelled_reader_kinds.register("brown_genre")
class BrownGenre(LabelledReader):
    """Labels a file with its genre, which the first letter of its name tells: `ca01` is news."""

    kind: str = "brown_genre"
    task_kind: ClassVar[Kind] = "sequence"

    def examples(self, document: Document) -> Iterator[Example]:
        name = re.search(r"\bc([a-r])\d\d$", document.origin)
        if name is None or name[1] not in GENRES:
            raise ValueError("its name is none of the Brown corpus, such as ca01")
        yield Example(running_text(document.text)[0], (GENRES[name[1]],))
