"""The documents of one domain, as they come from its sources and as many as the mix keeps."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from moe_testbed.data.config import DomainConfig, MixConfig
from moe_testbed.data.deduplication import Cuts, Deduplicator, Figures, Memory
from moe_testbed.data.documents import Document, clean_text
from moe_testbed.data.sources.base import Limits
from moe_testbed.data.sources.tally import Tally
from moe_testbed.data.splits import Selection

KEPT_BYTES_PER_DIGEST = 16
"""For every so many bytes that a domain may keep, the digest of a paragraph that is not kept is remembered."""


@dataclass
class Reading:
    """What reading a domain gave.

    documents: those that are kept, by digest; of an evaluation-only mix all of them, in their order.
    digests: of the documents and paragraphs that further domains must not have again.
    """

    documents: list[Document]
    figures: Figures
    tally: Tally
    cuts: Cuts
    digests: Set[bytes] = frozenset()


def read_domain(mix: MixConfig, config: DomainConfig, earlier: Set[bytes], cache_dir: Path) -> Reading:
    """Reads a domain once, from beginning to end, and holds no more of it than is kept.

    earlier: digests of the domains before it. Raises DataError, OSError.
    """
    tally, figures, cuts = Tally(mix.max_bad_records), Figures(), Cuts()
    most = mix.max_bytes_per_domain
    if mix.evaluation_only:
        documents = _documents(config, cache_dir, Limits(most, most), tally)
        return Reading(list(_with_text(documents, figures)), figures, tally, cuts)
    memory = Memory(most // KEPT_BYTES_PER_DIGEST, earlier)
    deduplicator = Deduplicator(
        memory, mix.minimum_paragraph_characters, mix.minimum_document_characters, mix.max_document_bytes
    )
    documents = _documents(config, cache_dir, Limits(most, mix.max_document_bytes), tally)
    selection = Selection(most)
    for unique in deduplicator.filter(documents, figures, cuts):
        for let_go in selection.add(unique):
            memory.release(let_go.digests)
    return Reading(selection.documents(), figures, tally, cuts, memory.digests)


def _documents(config: DomainConfig, cache_dir: Path, limits: Limits, tally: Tally) -> Iterator[Document]:
    for source in config.sources:
        yield from source.documents(cache_dir, limits, tally)


def _with_text(documents: Iterator[Document], figures: Figures) -> Iterator[Document]:
    for found in documents:
        text = clean_text(found.text)
        figures.documents_read += 1
        figures.bytes_read += len(found.text.encode())
        if text:
            figures.documents_kept += 1
            figures.bytes_kept += len(text.encode())
            yield Document(text, found.origin, found.separator)
