"""Exact de-duplication of documents and paragraphs over the whole mix, after normalisation.

It runs before the split, so that a paragraph stands in one document of the mix and hence in one split.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from moe_testbed.data.documents import Document, clean_text


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
class Deduplicator:
    """Remembers the digests of every document and paragraph it has let through, over all domains.

    minimum_paragraph_characters: shorter paragraphs (normalised) may recur.
    minimum_document_characters: what is left of a document must be as long, or it is dropped.
    """

    minimum_paragraph_characters: int
    minimum_document_characters: int
    _documents: set[bytes] = field(default_factory=set)
    _paragraphs: set[bytes] = field(default_factory=set)

    def filter(self, documents: Iterable[Document], figures: Figures) -> Iterator[Document]:
        """Yields cleaned documents without what occurred before; adds to `figures`."""
        for document in documents:
            figures.documents_read += 1
            figures.bytes_read += len(document.text.encode())
            document = replace(document, text=clean_text(document.text))
            if self._is_new(self._documents, normalise(document.text)):
                document = self._without_known_paragraphs(document, figures)
            else:
                figures.duplicate_documents += 1
                continue
            if len(document.text) < self.minimum_document_characters:
                figures.short_documents += 1
                continue
            figures.documents_kept += 1
            figures.bytes_kept += len(document.text.encode())
            yield document

    def _without_known_paragraphs(self, document: Document, figures: Figures) -> Document:
        paragraphs = document.paragraphs()
        kept = [paragraph for paragraph in paragraphs if self._may_stay(paragraph)]
        figures.duplicate_paragraphs += len(paragraphs) - len(kept)
        return replace(document, text=clean_text(document.separator.join(kept)))

    def _may_stay(self, paragraph: str) -> bool:
        normalised = normalise(paragraph)
        return len(normalised) < self.minimum_paragraph_characters or self._is_new(self._paragraphs, normalised)

    @staticmethod
    def _is_new(seen: set[bytes], normalised: str) -> bool:
        digest = text_digest(normalised)
        if digest in seen:
            return False
        seen.add(digest)
        return True


def normalise(text: str) -> str:
    """Case, runs of white space and Unicode's compatible forms do not make two texts different."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_digest(text: str) -> bytes:
    """Returns 128 bits that identify a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
