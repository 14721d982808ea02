"""Which documents are trained on and which are held out."""

from collections.abc import Sequence

from moe_testbed.data.deduplication import text_digest
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError

TRAIN, VALIDATION, TUNING = SPLITS = ("train", "validation", "tuning")


def split_documents(
    documents: Sequence[Document], max_bytes: int, validation_fraction: float, tuning_fraction: float
) -> dict[str, list[Document]]:
    """Caps one domain at max_bytes and splits it by document.

    The documents are put into the order of their content's digest, which has nothing to do with where they stood, and
    cut into consecutive pieces: validation, tuning, train. A document falls where its middle byte falls, so that the
    shares are right to within half a document. Raises DataError if a split is left empty.
    """
    ordered = sorted(documents, key=lambda document: text_digest(document.text))
    sizes = [len(document.text.encode()) for document in ordered]
    total = 0
    kept = 0
    while kept < len(ordered) and total + sizes[kept] <= max_bytes:
        total += sizes[kept]
        kept += 1
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    position = 0
    for document, size in zip(ordered[:kept], sizes[:kept], strict=True):
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
                f"no document is left for the split '{split}' ({kept} documents, {total:,} bytes in all): "
                "add text, make documents shorter (reader options) or raise the split's fraction"
            )
    return splits
