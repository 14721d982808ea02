"""Which documents are kept, which of them are trained on, and which are held out."""

import heapq
from collections.abc import Sequence

from moe_testbed.data.deduplication import Unique, text_digest
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError

TRAIN, VALIDATION, TUNING = SPLITS = ("train", "validation", "tuning")


class Selection:
    """Takes documents one by one and holds those with the smallest digests of their text, `max_bytes` of them.

    The order of the digests has nothing to do with where a document stood or what it is about. What is held at the end
    is what one would get by sorting all documents by digest (equal ones in their order) and keeping them up to the
    first that exceeds max_bytes: the sizes of those before a document only grow while others come.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._heap: list[tuple[int, int, Unique]] = []
        self._added = self._bytes = 0

    def add(self, unique: Unique) -> list[Unique]:
        """Takes a document; returns those that are held no longer, which may be this one."""
        digest = int.from_bytes(text_digest(unique.document.text), "big")
        self._added += 1
        self._bytes += len(unique.document.text.encode())
        heapq.heappush(self._heap, (-digest, -self._added, unique))
        let_go = []
        while self._bytes > self._max_bytes:
            let_go.append(heapq.heappop(self._heap)[2])
            self._bytes -= len(let_go[-1].document.text.encode())
        return let_go

    def documents(self) -> list[Document]:
        """Returns the documents held, in the order of their digests."""
        return [unique.document for _, _, unique in sorted(self._heap, key=lambda held: held[:2], reverse=True)]


def split_documents(
    ordered: Sequence[Document], validation_fraction: float, tuning_fraction: float
) -> dict[str, list[Document]]:
    """Splits the documents of one domain, in the order that `Selection` gives them.

    They are cut into consecutive pieces: validation, tuning, train. A document falls where its middle byte falls, so
    that the shares are right to within half a document. Raises DataError if a split is left empty.
    """
    sizes = [len(document.text.encode()) for document in ordered]
    total = sum(sizes)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    position = 0
    for document, size in zip(ordered, sizes, strict=True):
        middle = (position + size / 2) / total
        position += size
        if middle < validation_fraction:
            splits[VALIDATION].append(document)
        elif middle < validation_fraction + tuning_fraction:
            splits[TUNING].append(document)
        else:
            splits[TRAIN].append(document)
    for split, members in splits.items():
        if not members:
            raise DataError(
                f"no document is left for the split '{split}' ({len(ordered)} documents, {total:,} bytes in all): "
                "add text, make documents shorter (reader options) or raise the split's fraction"
            )
    return splits
