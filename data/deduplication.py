"""Exact de-duplication of documents and paragraphs over the whole mix, after normalisation.

It runs before the split, so that a paragraph stands in one document of the mix and hence in one split.
"""

import hashlib
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moe_testbed.data.documents import Document, beginning, clean_text, utf8_fits

DIGEST_BYTES = 16


@dataclass
class Figures:
    """Counts what de-duplication did to one domain, in documents, paragraphs and bytes of UTF-8."""

    documents_read: int = 0
    bytes_read: int = 0
    duplicate_documents: int = 0
    duplicate_paragraphs: int = 0
    short_documents: int = 0
    documents_kept: int = 0
    bytes_kept: int = 0


@dataclass
class Cuts:
    """Counts the documents of one domain of which only the beginning is kept, and the bytes of UTF-8 left out."""

    documents: int = 0
    bytes: int = 0

    def add(self, left_out: int) -> None:
        self.documents += 1
        self.bytes += left_out


@dataclass
class Memory:
    """Remembers the digests of documents and paragraphs that were let through.

    Those of text that is kept are remembered for good, those of text that was read and is not kept only as long as
    they are among the latest `most_unkept`: memory grows with what is kept, not with what is read.

    earlier: digests of the domains read before; not written to.
    """

    most_unkept: int
    earlier: Set[bytes] = frozenset()
    digests: set[bytes] = field(default_factory=set)
    _unkept: deque[bytes] = field(default_factory=deque)

    def is_new(self, digest: bytes) -> bool:
        """Returns whether the digest was unknown, and remembers it."""
        if digest in self.digests or digest in self.earlier:
            return False
        self.digests.add(digest)
        return True

    def forget(self, digests: Iterable[bytes]) -> None:
        """Says that these, which were new, were not let through after all."""
        self.digests.difference_update(digests)

    def release(self, digests: Iterable[bytes]) -> None:
        """Says that the text to which these belong is not kept."""
        self._unkept.extend(digests)
        while len(self._unkept) > self.most_unkept:
            self.digests.discard(self._unkept.popleft())


class Unique(NamedTuple):
    """A document without what occurred before. digests: what `Memory` learnt from it."""

    document: Document
    digests: list[bytes]


@dataclass
class Deduplicator:
    """Lets through what the memory does not know, and of a long document no more than its beginning.

    minimum_paragraph_characters: shorter paragraphs (normalised) may recur.
    minimum_document_characters: what is left of a document must be as long, or it is dropped.
    max_document_bytes: a longer document is cut where a paragraph ends.
    """

    memory: Memory
    minimum_paragraph_characters: int
    minimum_document_characters: int
    max_document_bytes: int

    def filter(self, documents: Iterable[Document], figures: Figures, cuts: Cuts) -> Iterator[Unique]:
        """Yields cleaned documents without what occurred before; adds to `figures` and `cuts`."""
        for document in documents:
            figures.documents_read += 1
            figures.bytes_read += len(document.text.encode())
            document = replace(document, text=clean_text(document.text))
            digest = text_digest(normalise(document.text), b"document")
            if not self.memory.is_new(digest):
                figures.duplicate_documents += 1
                continue
            digests = [digest]
            document = self._without_known_paragraphs(document, digests, figures, cuts)
            if len(document.text) < self.minimum_document_characters:
                figures.short_documents += 1
                self.memory.release(digests)
                continue
            figures.documents_kept += 1
            figures.bytes_kept += len(document.text.encode())
            yield Unique(document, digests)

    def _without_known_paragraphs(
        self, document: Document, digests: list[bytes], figures: Figures, cuts: Cuts
    ) -> Document:
        paragraphs = document.paragraphs()
        if utf8_fits(document.text, self.max_document_bytes):
            kept = [paragraph for paragraph in paragraphs if self._may_stay(paragraph, digests)]
            figures.duplicate_paragraphs += len(paragraphs) - len(kept)
        else:
            kept = self._first_paragraphs(paragraphs, document, digests, figures, cuts)
        return replace(document, text=clean_text(document.separator.join(kept)))

    def _first_paragraphs(
        self, paragraphs: list[str], document: Document, digests: list[bytes], figures: Figures, cuts: Cuts
    ) -> list[str]:
        """Returns the new paragraphs up to the first for which there is no room; of the very first, its beginning."""
        kept: list[str] = []
        room = self.max_document_bytes
        for number, paragraph in enumerate(paragraphs):
            known = len(digests)
            if not self._may_stay(paragraph, digests):
                figures.duplicate_paragraphs += 1
            elif len(paragraph.encode()) <= room:
                kept.append(paragraph)
                room -= len((paragraph + document.separator).encode())
            else:
                left_out = len(document.separator.join(paragraphs[number:]).encode())
                if kept:
                    # What is left out must not be missing in another document.
                    self.memory.forget(digests[known:])
                    del digests[known:]
                else:
                    kept.append(beginning(paragraph, room))
                    left_out -= len(kept[0].encode())
                cuts.add(left_out)
                break
        return kept

    def _may_stay(self, paragraph: str, digests: list[bytes]) -> bool:
        normalised = normalise(paragraph)
        if len(normalised) < self.minimum_paragraph_characters:
            return True
        digest = text_digest(normalised)
        if not self.memory.is_new(digest):
            return False
        digests.append(digest)
        return True


def normalise(text: str) -> str:
    """Case, runs of white space and Unicode's compatible forms do not make two texts different."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_digest(text: str, person: bytes = b"") -> bytes:
    """Returns 128 bits that identify a text. person: digests for another purpose are others."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES, person=person).digest()
